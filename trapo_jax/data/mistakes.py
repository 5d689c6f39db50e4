"""Finds probable mistakes in the problems of a run, and describes each in one line that says how to fix it."""

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from itertools import chain

from trapo_jax.config import Config, EvaluateConfig
from trapo_jax.data.examples import DataReport
from trapo_jax.data.problems import EXPERTS_TOO_LONG, PROMPT_TOO_LONG, PROMPTS_CUT
from trapo_jax.data.splits import LoadedData
from trapo_jax.methods import Method
from trapo_jax.rewards import (
    ANSWER_FORMS,
    answer_form,
    answer_forms,
    extract_choice,
    is_sentence,
)
from trapo_jax.types import Problem, find_by_source

MAX_UNUSABLE = 0.5  # fraction of the training problems that may be unusable


# Fraction of rows, prompts, expert solutions or answers that may have the same problem without a warning.
MAX_LOST = 0.1
# What the answers of problems must be for some reward functions: a predicate, and its description for error messages.
EXPECTED_ANSWERS: Mapping[str, tuple[Callable[[str], object], str]] = {
    "card_shuffles": (re.compile(r"[0-9]{5}").fullmatch, "five digits, as in the built-in task"),
    "multiple_choice": (extract_choice, "a single letter A-J"),
}
MIN_EVALUATED = 16  # With fewer problems, accuracies are too noisy to show whether training helps.


MAX_SEARCHED = 100  # number of problems that are searched for a known answer format


MAX_ENDING_CHARS = 60


MAX_SOURCES = 5  # number of sources that a warning lists


def find_warnings(data: LoadedData, config: Config, method: Method) -> list[str]:
    warnings = []
    limit = config.sampling.completion_len
    experts = [len(e.token_ids) for p in data.splits["train"] for e in p.experts]
    if num_cut := sum(length > limit for length in experts):
        warnings.append(
            f"{num_cut:,} of {len(experts):,} expert solutions are longer than "
            f"sampling.max_completion_length={limit} and are truncated; raise it"
        )
    if config.rewards.functions[:1] == ("math",) and method.needs_rewards:
        warnings += _warnings_of_answers(data)
    if (
        data.template.kind == "none"
        and config.data.template == "none"
        and data.tokenizer.chat_template
    ):
        warnings.append(
            "data.template=none: the tokenizer has a chat template, which is not used; consider data.template=chat"
        )
    warnings += _warnings_of_rows(data) + _warnings_of_lengths(data, config)
    warnings += _warnings_of_splits(data, config)
    return warnings + warnings_of_patterns(chain(*data.splits.values()), config)


def warnings_of_patterns(problems: Iterable[Problem], config: Config | EvaluateConfig) -> list[str]:
    """Warns about patterns for sources that match no problem's source."""
    sources = sorted({problem.source for problem in problems})
    given = {
        "rewards.by_source": config.rewards.by_source,
        "evaluation.num_samples_by_source": config.evaluation.num_samples_by_source,
    }
    return [
        f"{field}: {pattern!r} matches none of the sources {', '.join(map(repr, sources[:MAX_SOURCES]))}"
        + (" ..." if len(sources) > MAX_SOURCES else "")
        for field, patterns in given.items()
        for pattern in patterns or ()
        if not any(find_by_source({pattern: True}, source) for source in sources)
    ]


def _warnings_of_answers(data: LoadedData) -> list[str]:
    """Warns if most prompts ask for no known answer format, expert solutions lack it, or many answers are sentences."""
    warnings = []
    train = data.splits["train"]
    forms_asked = Counter(answer_form(problem.prompt_text) for problem in train[:MAX_SEARCHED])
    asked = max(forms_asked, key=lambda form: forms_asked[form], default=None)
    endings = [
        data.tokenizer.decode(expert.token_ids, skip_special_tokens=True)[-MAX_ENDING_CHARS:]
        for problem in train[:MAX_SEARCHED]
        for expert in problem.experts[:1]
    ]
    forms = {answer_form(ending): ending.strip() for ending in endings}
    known = [form for form in forms if form]
    if asked is None:
        advice = "consider data.prompt_suffix=boxed"
        if known and "box" not in known:
            ending = forms[known[0]]
            advice = f"the expert solutions end with {ending!r}; set data.prompt_suffix to a sentence that asks for this format"
            if "answer is" in ending.lower():
                advice = "consider data.prompt_suffix=answer_is, the format of the expert solutions"
        few = "few prompts ask" if any(forms_asked) else "no prompt asks"
        warnings.append(f"{few} for an answer format that the grader looks for; {advice}")
    elif known and not any(asked in answer_forms(ending) for ending in endings):
        warnings.append(
            f"the prompts ask for {ANSWER_FORMS[asked]}, but the expert solutions do not end like this; one ends with "
            f"{forms[known[0]]!r}; change data.prompt_suffix or the solutions, so that both agree"
        )
    answers = [problem.answer for problem in train if problem.answer]
    sentences = [answer for answer in answers if is_sentence(answer)]
    if len(sentences) > MAX_LOST * len(answers):
        warnings.append(
            f"{len(sentences):,} of {len(answers):,} answers are sentences, which responses must repeat verbatim, for "
            f"example {sentences[0][:60]!r}; set data.columns.answer to a column with final answers"
        )
    return warnings


def _warnings_of_rows(data: LoadedData) -> list[str]:
    """Warns if more than `MAX_LOST` of a split's rows are dropped for the same reason before prompts are encoded."""
    return [
        f"{name}: {count:,} of {rows.num_read:,} rows are dropped ({reason})"
        for name, (rows, *encoded) in data.reports.items()
        if encoded  # Otherwise, the split was held out from the training data.
        for reason, count in rows.dropped.items()
        if count > MAX_LOST * rows.num_read
    ]


def _warnings_of_lengths(data: LoadedData, config: Config) -> list[str]:
    """Warns about length limits that drop or truncate more than `MAX_LOST` of a split's prompts or expert solutions."""
    warnings = []
    for name, (*_, encoded) in data.reports.items():
        num_read, notes = encoded.num_read, encoded.notes
        num_experts = sum(len(problem.experts) for problem in data.splits[name])
        left_out = _count_of(notes, EXPERTS_TOO_LONG)
        dropped = _count_of(encoded.dropped, PROMPT_TOO_LONG)
        cut = _count_of(notes, PROMPTS_CUT)
        for num, total, fate, remedy in (
            (dropped, num_read, "prompts are dropped", _longer_prompts(encoded)),
            (cut, num_read, "prompts are truncated", _longer_prompts(encoded)),
            (
                left_out,
                num_experts + left_out,
                "expert solutions are dropped",
                f"they are longer than data.max_expert_length={config.data.max_expert_length}; raise it",
            ),
        ):
            if num > MAX_LOST * total:
                warnings.append(f"{name}: {num:,} of {total:,} {fate}, because {remedy}")
    return warnings


def _longer_prompts(encoded: DataReport) -> str:
    return (
        f"they are longer than {encoded.prompt_limit:,} tokens (the longest has {encoded.longest_prompt}); set "
        "data.max_prompt_length to a higher limit"
    )


def _count_of(counts: Mapping[str, int], start: str) -> int:
    """Returns the sum of the counts whose descriptions start with `start`."""
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
        if name == "test" and 0 < len(problems) < MIN_EVALUATED:
            warnings.append(
                f"{name}: {standard_error(len(problems))}; raise data.num_test, or set data.test_files"
            )
        if repeated := sum(problem.prompt_text in trained for problem in problems):
            warnings.append(
                f"{name}: {repeated:,} of {len(problems):,} problems have the same prompt as a training problem"
            )
    return warnings


def standard_error(num_problems: int) -> str:
    """Returns a clause about the largest standard error that an accuracy can have.

    >>> standard_error(4)
    'an accuracy over 4 problems has a standard error of up to 0.25'
    """
    number = f"{num_problems} problem{'s' * (num_problems > 1)}"
    largest = 0.5 / math.sqrt(num_problems)
    return f"an accuracy over {number} has a standard error of up to {largest:.2f}"


def find_errors(data: LoadedData, config: Config, method: Method) -> list[str]:
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
                f"evaluation.every=0: method.name={method.name} ends a stage based on the validation loss, which is "
                "never computed; set evaluation.every to an interval"
            )
        if not any(problem.experts for problem in data.splits["validation"]):
            errors.append(
                f"method.name={method.name}: it ends a stage based on the loss on the validation split's expert "
                "solutions, but there are none"
            )
    for function in config.rewards.functions[:1]:
        can_match, what = EXPECTED_ANSWERS.get(function, (bool, "an answer"))
        others = [p.answer for p in train if p.answer and not can_match(p.answer)]
        if len(others) > MAX_UNUSABLE * len(train):
            errors.append(
                f"rewards.functions=[{function!r}]: {len(others):,} of {len(train):,} answers are not {what}, for "
                f"example {others[0][:60]!r}; set data.columns.answer, or choose another reward function"
            )
    if len(train) > 1 and len({problem.prompt_text for problem in train}) == 1:
        errors.append(
            f"data.template={config.data.template}: all {len(train):,} training prompts are the same text after the "
            "template has been applied; `trapo preview` shows it"
        )
    unknown = data.tokenizer.unk_token_id
    num_unknown = sum(unknown in problem.prompt_ids for problem in train)
    if unknown is not None and num_unknown > MAX_UNUSABLE * len(train):
        errors.append(
            f"model.path: the tokenizer has no tokens for parts of {num_unknown:,} of {len(train):,} training prompts, "
            f"and encodes these parts as {data.tokenizer.unk_token}; choose a model suited to this data"
        )
    (*_, encoded) = data.reports.get("train", [DataReport(0, 0, {}, {})])
    num_overlong = _count_of(encoded.dropped, PROMPT_TOO_LONG)
    if num_overlong > MAX_UNUSABLE * max(encoded.num_read, 1):
        errors.append(
            f"{num_overlong:,} of {encoded.num_read:,} training prompts were dropped, because "
            f"{_longer_prompts(encoded)}, or set data.overlong_prompts=truncate"
        )
    if len(train) < config.train.problems_per_step:
        errors.append(
            f"train.problems_per_step={config.train.problems_per_step}: more than the {len(train)} training problems, "
            "so a batch would repeat problems; lower it"
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
        if columns and columns.solutions == (columns.prompt,):
            hint = (
                f"no chat in {columns.prompt!r} ends with an assistant message; add the solutions as assistant "
                "messages, or set data.columns.solutions to the column that holds them"
            )
            return (
                f"{hint}, or set method.name=grpo to train without experts"
                if method.needs_rewards
                else hint
            )
        where = f" (now {data.shown_paths(columns.solutions)})" if columns else ""
        hint = f"set data.columns.solutions to the column that holds them{where}"
    return (
        f"{hint}, or set method.name=grpo to train without experts"
        if method.needs_rewards
        else hint
    )
