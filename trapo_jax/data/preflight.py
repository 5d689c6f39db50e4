"""Checks what a run is about to train on: counts, lengths, and whether the graders accept the expert solutions.

The checks run before anything is compiled, because mistakes in the data are silent later: every reward is 0, or
nothing is left to learn from.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from trapo_jax.config import Config
from trapo_jax.data.examples import DataReport
from trapo_jax.data.problems import EXPERTS_TOO_LONG, PROMPT_TOO_LONG, PROMPTS_CUT
from trapo_jax.data.reward_checks import (
    EXPERT,
    Tried,
    check_experts,
    check_functions,
    try_rewards,
)
from trapo_jax.data.splits import LoadedData
from trapo_jax.methods import Method
from trapo_jax.rewards import (
    Grader,
    asks_for_answer,
    extract_choice,
    is_text,
)
from trapo_jax.types import Problem

MAX_UNUSABLE = 0.5  # share of the training problems that may be unusable
# Share of prompts or expert solutions that a length limit may drop or cut without a warning.
MAX_LOST = 0.1
MAX_SHOWN_CHARS = 1_500


class Terminal(Protocol):
    """The output that a preflight is printed to."""

    def say(self, text: str) -> None: ...

    def table(self, title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None: ...


@dataclasses.dataclass(frozen=True)
class Preflight:
    """The result of `check_data`.

    Attributes:
      counts: the table's rows for each split, keyed by split and row name.
      source: the template and the columns in use, for display.
      prompt: the first training prompt as the model sees it.
      notes: why rows and experts were left out, one line each.
      warnings: probable mistakes, one line each.
      errors: why the run would learn nothing, one line each.
    """

    counts: dict[str, dict[str, str]]
    source: str
    prompt: str
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
        for warning in self.warnings:
            terminal.say(f"warning: {warning}")

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Returns the header and rows of a table with one column per split."""
        names = dict.fromkeys(name for counts in self.counts.values() for name in counts)
        rows = [[name, *(c.get(name, "") for c in self.counts.values())] for name in names]
        return ["", *self.counts], [row for row in rows if any(row[1:])]

    def summary(self) -> dict[str, Any]:
        """Returns the part that is saved in data.json."""
        return {"counts": self.counts, "notes": self.notes, "warnings": self.warnings}


def show_text(title: str, text: str, terminal: Terminal) -> None:
    """Prints a title and an indented text, keeping its line breaks."""
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
      config: the config of the run, with its lengths.
      method: the method of the run.
      grader: the grader of the run, which judges expert solutions as it will judge responses.
    """
    train, decode = data.splits["train"], data.tokenizer.decode
    counts = {
        name: _counts(data.splits[name], data.reports.get(name, []), config)
        for name in ("train", "validation", "test")
    }
    warnings, errors = _warnings(data, config, method), _errors(data, config, method)
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
        _notes(data),
        warnings,
        errors,
    )


def _add_reward_checks(
    tried: Sequence[Tried], config: Config, method: Method, warnings: list[str], errors: list[str]
) -> None:
    """Appends complaints about reward functions, and about expert solutions that they do not judge correct."""
    broken, fragile = check_functions(tried)
    (errors if method.needs_rewards else warnings).extend(broken)
    warnings.extend(fragile)
    complaint, is_serious = check_experts(tried, config)
    if complaint:
        # A method that learns from both would get conflicting signals.
        stops = is_serious and method.uses_experts and method.needs_rewards
        (errors if stops else warnings).append(complaint)


def _notes(data: LoadedData) -> list[str]:
    """Lists why rows and experts were left out, and other notes about them."""
    return [
        f"{name}: {verb}{count:,} {what}"
        for name, stages in data.reports.items()
        for stage in stages
        for verb, counts in (("dropped ", stage.dropped), ("", stage.notes))
        for what, count in counts.items()
        if "without an expert" not in what  # The table shows them.
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
    named = ", ".join(f"{name} {_shown_paths(paths, data)}" for name, paths in used.items())
    return f"template {data.template.kind}; columns: {named}"


def _shown_paths(paths: Sequence[str], data: LoadedData) -> str:
    """Returns the paths that some row of the training data has."""
    absent = [path for stage in data.reports.get("train", []) for path in stage.absent]
    shown = [path for path in paths if path and path not in absent]
    return ", ".join(path.removesuffix("?") for path in shown) or "none"


def _counts(
    problems: Sequence[Problem], stages: Sequence[DataReport], config: Config
) -> dict[str, str]:
    experts = [len(e.token_ids) for p in problems for e in p.experts]
    counts = {
        # Held-out splits read no rows.
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
    if config.rewards.functions[:1] == ("math",):
        num_text = sum(is_text(p.answer) for p in problems if p.answer)
        counts["answers matched as text"] = f"{num_text:,}"
    return counts


def _lengths(lens: Sequence[int]) -> str:
    if not lens:
        return ""
    median, high = np.percentile(lens, [50, 95])
    return f"{median:.0f} / {high:.0f} / {max(lens)}"


def _warnings(data: LoadedData, config: Config, method: Method) -> list[str]:
    warnings = []
    limit = config.sampling.completion_len
    experts = [len(e.token_ids) for p in data.splits["train"] for e in p.experts]
    if num_cut := sum(length > limit for length in experts):
        warnings.append(
            f"{num_cut:,} of {len(experts):,} expert solutions are longer than "
            f"sampling.max_completion_length={limit} and are cut; raise it"
        )
    is_asked = any(asks_for_answer(problem.prompt_text) for problem in data.splits["train"][:100])
    if config.rewards.functions[:1] == ("math",) and method.needs_rewards and not is_asked:
        warnings.append(
            "no prompt asks for the answer format that the grader looks for; consider data.prompt_suffix=boxed"
        )
    if (
        data.template.kind == "none"
        and config.data.template == "none"
        and data.tokenizer.chat_template
    ):
        warnings.append(
            "data.template=none: the tokenizer has a chat template, which is not used; consider data.template=chat"
        )
    return warnings + _warnings_of_lengths(data, config) + _warnings_of_splits(data, config)


def _warnings_of_lengths(data: LoadedData, config: Config) -> list[str]:
    """Warns of length limits that drop or cut more than `MAX_LOST` of a split's prompts or expert solutions."""
    warnings = []
    for name, (*_, encoded) in data.reports.items():
        num_read, notes = encoded.num_read, encoded.notes
        num_experts = sum(len(problem.experts) for problem in data.splits[name])
        left_out = _count_of(notes, EXPERTS_TOO_LONG)
        dropped = _count_of(encoded.dropped, PROMPT_TOO_LONG)
        for limit, num, total, fate in (
            ("max_prompt_length", dropped, num_read, "prompts are dropped"),
            ("max_prompt_length", _count_of(notes, PROMPTS_CUT), num_read, "prompts are cut"),
            (
                "max_expert_length",
                left_out,
                num_experts + left_out,
                "expert solutions are left out",
            ),
        ):
            if num > MAX_LOST * total:
                value = getattr(config.data, limit)
                warnings.append(
                    f"{name}: {num:,} of {total:,} {fate}, because they are longer than data.{limit}={value}; raise it"
                )
    return warnings


def _count_of(counts: Mapping[str, int], start: str) -> int:
    """Returns a report's total count under descriptions that start with `start`."""
    return sum(count for what, count in counts.items() if what.startswith(start))


def _warnings_of_splits(data: LoadedData, config: Config) -> list[str]:
    warnings = []
    trained = {problem.prompt_text for problem in data.splits["train"]}
    reason = "no problem has an answer"
    if not config.rewards.functions:
        reason = "rewards.functions is not set"
    for name in ("validation", "test"):
        problems = data.splits[name]
        if not problems and getattr(config.data, f"num_{name}") != 0:
            warnings.append(f"{name}: {reason}, so this split is not evaluated")
        if repeated := sum(problem.prompt_text in trained for problem in problems):
            warnings.append(
                f"{name}: {repeated:,} of {len(problems):,} problems have the same prompt as a training problem"
            )
    return warnings


def _errors(data: LoadedData, config: Config, method: Method) -> list[str]:
    errors = []
    train = data.splits["train"]
    if method.uses_experts and not any(problem.experts for problem in train):
        errors.append(
            f"method.name={method.name}: it learns from expert solutions, but no training problem has one; "
            f"{_solutions_hint(data, config, method)}"
        )
    if method.needs_expert_loss:
        if not config.evaluation.every:
            errors.append(
                f"evaluation.every=0: method.name={method.name} ends a stage based on the validation loss, which is never "
                "computed; set an interval"
            )
        if not any(problem.experts for problem in data.splits["validation"]):
            errors.append(
                f"method.name={method.name}: it ends a stage based on the loss on the validation split's expert "
                "solutions, but there are none"
            )
    if config.rewards.functions[:1] == ("multiple_choice",):
        not_letters = [p.answer for p in train if p.answer and extract_choice(p.answer) is None]
        if len(not_letters) > MAX_UNUSABLE * len(train):
            errors.append(
                f"rewards.functions=['multiple_choice']: {len(not_letters):,} of {len(train):,} answers are not a single letter "
                f"A-J, for example {not_letters[0][:60]!r}; set data.columns.answer, or choose another reward function"
            )
    unknown = data.tokenizer.unk_token_id
    num_unknown = sum(unknown in problem.prompt_ids for problem in train)
    if unknown is not None and num_unknown > MAX_UNUSABLE * len(train):
        errors.append(
            f"model.path: its tokenizer has no tokens for parts of {num_unknown:,} of {len(train):,} training prompts, "
            f"which become {data.tokenizer.unk_token}; choose a model suited to this data"
        )
    (*_, encoded) = data.reports.get("train", [DataReport(0, 0, {}, {})])
    num_overlong = _count_of(encoded.dropped, PROMPT_TOO_LONG)
    if num_overlong > MAX_UNUSABLE * max(encoded.num_read, 1):
        errors.append(
            f"data.max_prompt_length={config.data.max_prompt_length}: {num_overlong:,} of {encoded.num_read:,} training "
            "prompts are longer and were dropped; raise it, or set data.overlong_prompts=truncate"
        )
    if len(train) < config.train.problems_per_step:
        errors.append(
            f"train.problems_per_step={config.train.problems_per_step}: more than the {len(train)} training problems, so "
            "a batch would repeat problems; lower it"
        )
    return errors


def _solutions_hint(data: LoadedData, config: Config, method: Method) -> str:
    if any(
        EXPERTS_TOO_LONG in what for stage in data.reports.get("train", []) for what in stage.notes
    ):
        limit = config.data.max_expert_length
        hint = f"the solutions in the data are longer than data.max_expert_length={limit}; raise it"
    else:
        columns = data.columns
        where = f" (now {_shown_paths(columns.solutions, data)})" if columns else ""
        hint = f"set data.columns.solutions to their column{where}"
    return f"{hint}, or method.name=grpo to train without experts" if method.needs_rewards else hint
