"""Checks what a run is about to train on: counts, lengths, and whether the graders accept the expert solutions.

The checks run before anything is compiled, because mistakes in the data would cause no errors later: every reward
would be 0, or nothing would be left to learn from.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from trapo_jax.config import Config
from trapo_jax.data.examples import DataReport
from trapo_jax.data.mistakes import find_errors, find_warnings
from trapo_jax.data.reward_checks import (
    EXPERT,
    Tried,
    check_answers,
    check_experts,
    check_functions,
    try_rewards,
)
from trapo_jax.data.splits import LoadedData
from trapo_jax.methods import Method
from trapo_jax.rewards import Grader, is_text
from trapo_jax.types import Problem

MAX_SHOWN_CHARS = 1_500


class Terminal(Protocol):
    """The output on which the result of the checks is printed."""

    def say(self, text: str) -> None: ...

    def table(self, title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None: ...


@dataclasses.dataclass(frozen=True)
class Preflight:
    """The result of `check_data`.

    Attributes:
      counts: the table's rows for each split, keyed by split and row name.
      source: the template and the columns in use, for display.
      prompt: the first training prompt as the model sees it.
      answer: the answer of the first training problem.
      notes: why rows, prompts and expert solutions were dropped, and other remarks, one line each.
      warnings: probable mistakes, one line each.
      errors: mistakes that prevent the run from starting, one line each.
    """

    counts: dict[str, dict[str, str]]
    source: str
    prompt: str
    answer: str
    notes: list[str]
    warnings: list[str]
    errors: list[str]

    def show(self, terminal: Terminal) -> None:
        """Prints everything except the errors."""
        header, rows = self.table()
        terminal.table("problems (lengths: median / 95% / longest)", header, rows)
        for note in self.notes:
            terminal.say(note)
        terminal.say(self.source)
        show_text("first prompt", self.prompt, terminal)
        show_text("its answer", self.answer or "none", terminal)
        for warning in self.warnings:
            terminal.say(f"warning: {warning}")

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Returns the header and rows of a table with one column per split."""
        names = dict.fromkeys(name for counts in self.counts.values() for name in counts)
        rows = [[name, *(c.get(name, "") for c in self.counts.values())] for name in names]
        return ["", *self.counts], [row for row in rows if any(row[1:])]

    def summary(self) -> dict[str, Any]:
        """Returns the part of the report that is saved in data.json."""
        return {"counts": self.counts, "notes": self.notes, "warnings": self.warnings}


def show_text(title: str, text: str, terminal: Terminal) -> None:
    """Prints a title, followed by the start of a text, which is indented and keeps its line breaks."""
    more = " ..." if len(text) > MAX_SHOWN_CHARS else ""
    terminal.say(f"{title}:")
    for line in f"{text[:MAX_SHOWN_CHARS]}{more}".split("\n"):
        terminal.say(f"    {line}".rstrip())


def check_data(
    data: LoadedData,
    config: Config,
    method: Method,
    grader: Grader,
) -> Preflight:
    """Checks the problems of a run.

    Args:
      data: the problems.
      config: the config of the run, without null lengths.
      method: the method of the run.
      grader: the grader of the run, which judges expert solutions as it will judge responses.
    """
    train, decode = data.splits["train"], data.tokenizer.decode
    counts = {
        name: _counts(data.splits[name], data.reports.get(name, []), config)
        for name in ("train", "validation", "test")
    }
    warnings, errors = find_warnings(data, config, method), find_errors(data, config, method)
    if config.rewards.functions:
        tried = try_rewards(train, grader, decode, max_len=config.sampling.completion_len)
        experts = [t.grade for t in tried if t.kind == EXPERT]
        if experts:
            accepted = sum(grade.is_correct for grade in experts)
            counts["train"]["experts judged correct"] = f"{accepted} of {len(experts)}"
        if not errors:  # Otherwise, failures may be due to these errors.
            _add_reward_checks(tried, config, method, warnings, errors)
    return Preflight(
        counts,
        _source(data),
        decode(train[0].prompt_ids),
        train[0].answer,
        _notes(data),
        warnings,
        errors,
    )


def _add_reward_checks(
    tried: Sequence[Tried], config: Config, method: Method, warnings: list[str], errors: list[str]
) -> None:
    """Adds warnings and errors about reward functions, and about expert solutions that are not judged correct."""
    broken, fragile = check_functions(tried)
    (errors if method.needs_rewards else warnings).extend(broken)
    warnings.extend(fragile)
    warnings.extend(filter(None, [check_answers(tried, config)]))
    complaint, is_serious = check_experts(tried, config)
    if complaint:
        # A method that learns from both rewards and expert solutions would get conflicting signals.
        stops = is_serious and method.uses_experts and method.needs_rewards
        (errors if stops else warnings).append(complaint)


def _notes(data: LoadedData) -> list[str]:
    """Returns lines that say why rows, prompts and expert solutions were dropped, and other remarks."""
    return [
        f"{name}: {verb}{count:,} {what}"
        for name, stages in data.reports.items()
        for stage in stages
        for verb, counts in (("dropped ", stage.dropped), ("", stage.notes))
        for what, count in counts.items()
        if "without an expert" not in what  # The table shows this count.
    ]


def _source(data: LoadedData) -> str:
    columns = data.columns
    if columns is None:
        return f"template {data.template.kind}"
    used = {
        "prompt": [columns.prompt],
        "answer": [columns.answer],
        "solutions": columns.solutions,
        "source": [columns.source],
        "extra": columns.extra,
    }
    named = ", ".join(f"{name} {data.shown_paths(paths)}" for name, paths in used.items())
    return f"template {data.template.kind}; columns: {named}"


def _counts(
    problems: Sequence[Problem], stages: Sequence[DataReport], config: Config
) -> dict[str, str]:
    experts = [len(e.token_ids) for p in problems for e in p.experts]
    counts = {
        # No rows are read for held-out splits.
        "rows read": f"{stages[0].num_read:,}" if len(stages) > 1 else "",
        "problems": f"{len(problems):,}",
        f"prompt tokens (<= {config.data.max_prompt_length})": _lengths(
            [len(p.prompt_ids) for p in problems]
        ),
    }
    if experts:
        limit = config.sampling.max_completion_length
        counts |= {
            "expert solutions": f"{len(experts):,}",
            f"expert tokens (<= {limit})": _lengths(experts),
            "without expert": f"{sum(not p.experts for p in problems):,}",
        }
    elif problems:
        counts["completion tokens"] = f"<= {config.sampling.max_completion_length}"
    if config.rewards.functions[:1] == ("math",):
        num_text = sum(is_text(p.answer) for p in problems if p.answer)
        counts["answers matched as text"] = f"{num_text:,}"
    return counts


def _lengths(lens: Sequence[int]) -> str:
    if not lens:
        return ""
    median, high = np.percentile(lens, [50, 95])
    return f"{median:.0f} / {high:.0f} / {max(lens)}"
