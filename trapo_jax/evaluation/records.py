"""Creates and reads the records of an evaluation: one line of samples.jsonl per graded sample."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trapo_jax.evaluation.scoring import Sample, make_sample, shares_noise
from trapo_jax.inputs.files import read_lines
from trapo_jax.types import Completion, Grade, UserError


def make_record(completion: Completion, grade: Grade, *, text: str) -> dict[str, Any]:
    """Returns the record of a graded completion.

    Args:
      completion: the completion.
      grade: its grade.
      text: the decoded text of the completion.
    """
    problem = completion.request.problem
    return {
        **make_sample(completion, grade)._asdict(),
        **grade.as_record(),
        "sample_index": completion.request.sample_index,
        "prompt": problem.prompt_text,
        "completion": text,
        "gold": problem.answer,
        "token_ids": completion.token_ids,
    }


def key_of(record: Mapping[str, Any]) -> tuple[str, int]:
    """Returns the key that identifies a sample: problem id and sample index."""
    return record["problem_id"], record["sample_index"]


def sample_of(record: Mapping[str, Any]) -> Sample:
    """Returns the sample that a record describes."""
    fields = {name: record[name] for name in Sample._fields if name != "missing"}
    return Sample(**fields, missing=record["missing"].get(next(iter(record["rewards"])), ""))


def read_samples(path: Path) -> list[dict[str, Any]]:
    """Reads samples.jsonl. If the last line is incomplete, it is removed from the file.

    Raises:
      UserError: if the file does not contain samples of an evaluation.
    """
    records: list[dict[str, Any]] = []
    num_bytes = 0
    for number, line in read_lines(path) if path.exists() else ():
        if not line.endswith(b"\n"):
            os.truncate(path, num_bytes)
            break
        num_bytes += len(line)
        try:
            records.append(_parse(line))
        except (
            AttributeError,
            LookupError,
            RuntimeError,
            StopIteration,
            TypeError,
            ValueError,
        ) as error:
            raise UserError(
                f"{path}, line {number}: not a sample of an evaluation; choose a different output_dir"
            ) from error
    return records


def _parse(line: bytes) -> dict[str, Any]:
    record = json.loads(line)
    sample = sample_of(record)
    types = [type(value) for value in (sample.problem_id, sample.source, sample.is_correct)]
    if types != [str, str, bool] or not isinstance(record["sample_index"], int):
        raise TypeError(line)
    return record


def count_shared_noise(records: Sequence[Mapping[str, Any]]) -> tuple[int, int]:
    """Counts the problems with identical samples that are very unlikely to be a coincidence.

    Every sample should have its own random key. If two samples shared a key, the scores would be wrong.

    Returns:
      The number of such problems, and the total number of problems.
    """
    groups: dict[str, list[tuple[tuple[int, ...], float]]] = {}
    for record in records:
        sample = (tuple(record["token_ids"]), record["logprob"])
        groups.setdefault(record["problem_id"], []).append(sample)
    return sum(map(shares_noise, groups.values())), len(groups)
