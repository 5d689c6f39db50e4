"""From the config's `data` section to train, validation and test problems, and what was dropped on the way."""

import dataclasses
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trapo_jax.config import DataConfig
from trapo_jax.data import (
    COLUMN_PRESETS,
    Columns,
    DataReport,
    Example,
    card_shuffles_splits,
    encode_examples,
    examples_from_rows,
    fingerprint,
    gsm_symbolic_splits,
    hold_out,
    make_template,
    read_rows,
)
from trapo_jax.rewards import extract_math_answer, is_text
from trapo_jax.types import ExpertPart, Problem

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Splits = dict[str, list[Example]]
Reports = dict[str, list[DataReport]]


def load_splits(
    config: DataConfig,
    tokenizer: "PreTrainedTokenizerFast",
    *,
    expert_part: ExpertPart = "thought",
    functions: Sequence[str] = (),
) -> tuple[dict[str, list[Problem]], dict[str, Any]]:
    """Loads the problems of all splits.

    Args:
      config: the data section.
      tokenizer: the policy's tokenizer.
      expert_part: which part of an expert's text is the expert solution.
      functions: names of the reward functions; see `answer_notes`.

    Returns:
      The problems by split; and for data.json their fingerprint, the template, and what was read, dropped and noted.

    Raises:
      UserError: for data that cannot be read, or of which nothing is usable.
    """
    examples, reports = read_splits(config, expert_part)
    template = make_template(config.template, tokenizer)
    splits, counts = {}, {}
    for name, split in examples.items():
        splits[name], report = encode_examples(
            split,
            tokenizer,
            template=template,
            max_prompt_length=config.max_prompt_length,
            overlong_prompts=config.overlong_prompts,
            max_expert_length=config.max_expert_length,
        )
        report = dataclasses.replace(
            report, notes={**report.notes, **answer_notes(split, functions)}
        )
        counts[name] = [dataclasses.asdict(stage) for stage in (*reports.get(name, []), report)]
    return splits, {
        "fingerprint": fingerprint(splits["train"]),
        "template": {"kind": template.kind, "sha256": template.hash},
        "splits": counts,
    }


def answer_notes(examples: Sequence[Example], functions: Sequence[str]) -> dict[str, int]:
    """Counts what mathematical grading cannot do justice to; empty if the first reward function is not "math".

    Args:
      examples: the examples of a split.
      functions: names of the reward functions.
    """
    if not functions or functions[0] != "math":
        return {}
    counts = {
        "answers that only the same text matches": sum(is_text(e.answer) for e in examples),
        "experts in which the grader finds no answer": sum(
            extract_math_answer(text) is None for e in examples for text in e.solutions
        ),
    }
    return {note: count for note, count in counts.items() if count}


def read_splits(config: DataConfig, expert_part: ExpertPart = "thought") -> tuple[Splits, Reports]:
    """Returns the raw examples of every split, and what became of the rows of those that were read from files."""
    if config.source == "files":
        return _from_files(config, expert_part)
    sizes = {
        "num_train": config.num_train,
        "num_validation": config.num_validation,
        "num_test": config.num_test,
    }
    if config.source == "card_shuffles":
        splits = card_shuffles_splits(
            seed=config.seed, difficulty=config.difficulty, style=config.expert_style, **sizes
        )
    else:
        splits = gsm_symbolic_splits(seed=config.seed, **sizes)
    return splits, {}


def _from_files(config: DataConfig, expert_part: ExpertPart) -> tuple[Splits, Reports]:
    """From files or the hub; a split without files of its own is held out of the training data."""
    columns = _columns(config)
    splits: Splits = {}
    reports: Reports = {}
    for name, files, size in (
        ("train", config.train_files, 0),
        ("validation", config.validation_files, config.num_validation),
        ("test", config.test_files, config.num_test),
    ):
        if files:
            rows = read_rows(files, split=name)
            splits[name], report = examples_from_rows(rows, columns, expert_part=expert_part)
            reports[name] = [report]
        else:
            splits["train"], splits[name] = hold_out(splits["train"], size, seed=config.seed)
    return splits, reports


def read_test_examples(
    config: DataConfig, *, limit: int | None = None
) -> tuple[list[Example], dict[str, DataReport]]:
    """Returns the raw test examples without their solutions, and what became of the rows of each file.

    They are those of `data.test_files` if there are any, and the test split that a training run would use otherwise.

    Args:
      config: the data section.
      limit: number of rows read from each file; None for all.
    """
    if not config.test_files:
        examples = read_splits(config)[0]["test"][:limit]
        return [example._replace(solutions=()) for example in examples], {}
    columns = dataclasses.replace(_columns(config), solutions=())
    examples: list[Example] = []
    reports: dict[str, DataReport] = {}
    for entry in config.test_files:
        rows = islice(read_rows([entry], split="test"), limit)
        found, reports[entry] = examples_from_rows(rows, columns, default_source=Path(entry).stem)
        examples += found
    return examples, reports


def default_template(examples: Sequence[Example], tokenizer: "PreTrainedTokenizerFast") -> str:
    """Returns the template of a tokenizer: its own, or else ChatML for chat messages and none for plain text."""
    if tokenizer.chat_template:
        return "chat"
    return "none" if all(isinstance(example.prompt, str) for example in examples) else "chatml"


def _columns(config: DataConfig) -> Columns:
    preset = COLUMN_PRESETS[config.columns.preset]
    replaced = config.columns.model_dump(exclude={"preset"}, exclude_none=True)
    return dataclasses.replace(preset, **replaced)
