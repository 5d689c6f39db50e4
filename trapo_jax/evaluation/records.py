"""Records of an evaluation: one line of samples.jsonl per graded sample."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trapo_jax.evaluation.scoring import Sample, make_sample, shares_noise
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
      UserError: if the file does not contain the samples of an evaluation.
    """
    if not path.is_file():
        return []
    text = path.read_bytes()
    whole = text[: text.rfind(b"\n") + 1]
    if len(whole) < len(text):
        with open(path, "r+b") as file:
            file.truncate(len(whole))
    try:
        return [json.loads(line) for line in whole.splitlines()]
    except ValueError as error:
        raise UserError(f"{path}: not the samples of an evaluation ({error})") from error


def count_shared_noise(records: Sequence[Mapping[str, Any]]) -> tuple[int, int]:
    """Counts the problems with equal samples that are too unlikely to be a coincidence.

    Every sample has its own random key. If two samples shared a key, the scores would be wrong.

    Returns:
      The number of these problems, and the total number of problems.
    """
    groups: dict[str, list[tuple[tuple[int, ...], float]]] = {}
    for record in records:
        sample = (tuple(record["token_ids"]), record["logprob"])
        groups.setdefault(record["problem_id"], []).append(sample)
    return sum(map(shares_noise, groups.values())), len(groups)
