"""Checks that the reward functions of a run work, and that they judge the expert solutions correct."""

import os
from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple

from trapo_jax.config import Config
from trapo_jax.rewards import (
    ANSWER_FORMS,
    Grader,
    InvalidReward,
    answer_form,
    describe_reasons,
    kind_of,
)
from trapo_jax.types import Grade, Problem

MAX_GRADED_EXPERTS = 200
MAX_PROBED_SOURCES = 20
MIN_ACCEPTED = 0.5  # fraction of the expert solutions that must be judged correct
EXPERT, ANSWER, EMPTY = "expert solutions", "gold answers", "empty responses"


class Tried(NamedTuple):
    """The grade of a response that was not sampled from the policy.

    Attributes:
      kind: EXPERT, ANSWER or EMPTY.
      problem: the problem that the response answers.
      text: the response.
      grade: the response's grade.
      is_cut: whether the response is a truncated expert solution.
    """

    kind: str
    problem: Problem
    text: str
    grade: Grade
    is_cut: bool = False

    def reward_of(self, name: str) -> float:
        """Returns the reward that a function gave; 0 if the reward is missing."""
        return self.grade.judgments[name].reward or 0.0


def try_rewards(
    problems: Sequence[Problem],
    grader: Grader,
    decode: Callable[[Sequence[int]], str],
    *,
    max_len: int,
) -> list[Tried]:
    """Grades expert solutions, gold answers and empty responses, in the same way as samples during training.

    At most `MAX_GRADED_EXPERTS` expert solutions are graded, evenly spaced over the problems with an answer. The other
    responses are graded for the first problem of each source.

    Args:
      problems: training problems.
      grader: the grader of the run.
      decode: converts token ids to text.
      max_len: maximum length of a solution in tokens; longer solutions are truncated, as in training.
    """
    problems = [problem for problem in problems if problem.answer]
    experts = [(problem, expert.token_ids) for problem in problems for expert in problem.experts]
    step = max(1, -(-len(experts) // MAX_GRADED_EXPERTS))
    firsts = {problem.source: problem for problem in reversed(problems)}
    some = [firsts[source] for source in sorted(firsts)[:MAX_PROBED_SOURCES]]
    responses = [
        *((EXPERT, p, decode(ids[:max_len]), len(ids) > max_len) for p, ids in experts[::step]),
        *((ANSWER, p, text, False) for p in some for text in _answers_alone(p)),
        *((EMPTY, p, "", False) for p in some),
    ]
    with grader.without_warnings():  # The preflight checks report failures.
        futures = [grader.submit(text, problem) for _, problem, text, _ in responses]
        grades = [future.result() for future in futures]
    return [
        Tried(kind, problem, text, grade, is_cut)
        for (kind, problem, text, is_cut), grade in zip(responses, grades, strict=True)
    ]


def _answers_alone(problem: Problem) -> tuple[str, str, str]:
    """Returns responses that state the answer and nothing else."""
    answer = problem.answer
    return answer, f"\\boxed{{{answer}}}", f"The answer is {answer}."


def check_functions(tried: Sequence[Tried]) -> tuple[list[str], list[str]]:
    """Returns errors and warnings about reward functions that fail or reward empty responses.

    There is at most one line per function. It is an error if a function returns something other than a reward, or fails
    on most expert solutions or, if there are none, on all other responses.
    """
    errors, warnings = [], []
    for name in dict.fromkeys(name for t in tried for name in t.grade.judgments):
        of_function = [t for t in tried if name in t.grade.judgments]
        failed = [t for t in of_function if name in t.grade.missing]
        if not failed:
            if rewarded := [t for t in of_function if t.kind == EMPTY and t.reward_of(name) > 0]:
                warnings.append(
                    f"rewards.functions: {name} gives an empty response a reward of {rewarded[0].reward_of(name):g}; "
                    f"perhaps it accepts everything, or its arguments are swapped: it is called as "
                    f"{name}(response, problem)"
                )
            continue
        reasons = [t.grade.missing[name] for t in failed]
        kinds = set(map(kind_of, reasons))
        hint = f"it is called as {name}(response, problem); " if "TypeError" in kinds else ""
        if withheld := [x for x in sorted(os.environ) if f"KeyError: {x!r}" in reasons]:
            hint = f"to let it read this environment variable, set rewards.environment=[{', '.join(withheld)}]; "
        line = (
            f"rewards.functions: {name} failed on {_count(failed, of_function)} ({describe_reasons(reasons)}); "
            f"{hint}test it on a few of your rows"
        )
        is_broken = InvalidReward.__name__ in kinds or _fails_mostly(failed, of_function)
        (errors if is_broken else warnings).append(line)
    return errors, warnings


def _count(failed: Sequence[Tried], tried: Sequence[Tried]) -> str:
    """Formats the number of failed responses of each kind."""
    counts, totals = (Counter(t.kind for t in of) for of in (failed, tried))
    return ", ".join(f"{count} of {totals[kind]} {kind}" for kind, count in counts.items())


def _fails_mostly(failed: Sequence[Tried], tried: Sequence[Tried]) -> bool:
    num_experts = sum(t.kind == EXPERT for t in tried)
    if not num_experts:
        return len(failed) == len(tried)
    return sum(t.kind == EXPERT for t in failed) > (1 - MIN_ACCEPTED) * num_experts


def check_answers(tried: Sequence[Tried], config: Config) -> str:
    """Returns a warning if there are no expert solutions, and no response that states a gold answer is judged correct.

    Missing rewards are reported by `check_functions`. The message is empty if there is nothing to report.
    """
    answers = [t for t in tried if t.kind == ANSWER and t.grade.reward is not None]
    if any(t.kind == EXPERT or t.grade.is_correct for t in tried) or not answers:
        return ""
    return (
        f"rewards.functions={list(config.rewards.functions)}: none of {len(answers)} responses that state the correct "
        f"answer is judged correct, for example {answers[-1].text[:60]!r}; unless responses must have another form, check "
        "data.columns.answer, or choose another reward function"
    )


def check_experts(tried: Sequence[Tried], config: Config) -> tuple[str, bool]:
    """Returns a message about expert solutions that are not judged correct, and whether there are too many of them.

    The message is empty if none is judged wrong. Missing rewards are reported by `check_functions`.
    """
    experts = [t for t in tried if t.kind == EXPERT]
    wrong = [t for t in experts if not t.grade.is_correct]
    judged_wrong = [t for t in wrong if t.grade.reward is not None]
    if not judged_wrong:
        return "", False
    return (
        f"rewards.functions={list(config.rewards.functions)}: only {len(experts) - len(wrong)} of {len(experts)} "
        f"expert solutions are judged correct{_why_wrong(judged_wrong, experts, config)}"
    ), len(wrong) > (1 - MIN_ACCEPTED) * len(experts)


def _why_wrong(wrong: Sequence[Tried], experts: Sequence[Tried], config: Config) -> str:
    """Says why expert solutions are not judged correct, and what to change."""
    num_cut, limit = sum(t.is_cut for t in experts), config.sampling.completion_len
    if sum(t.is_cut for t in wrong) <= len(wrong) / 2:
        return f"; {_explain_wrong(wrong[0], config.rewards.functions[0])}"
    way_out = "raise it"
    if num_cut <= len(experts) / 2:  # Otherwise, hardly any solutions would be left.
        way_out += f", or drop longer solutions with data.max_expert_length={limit}"
    which = "all" if num_cut == len(experts) else f"{num_cut}"
    return f", because {which} are truncated at sampling.max_completion_length={limit}; {way_out}"


def _explain_wrong(tried: Tried, function: str) -> str:
    """Says why an expert solution was judged wrong, and what to do."""
    problem, grade = tried.problem, tried.grade
    answer = f"the problem's answer is {problem.answer[:60]!r}"
    if grade.answer is not None:
        return (
            f"in the first one judged wrong, the answer {grade.answer[:60]!r} was found, but {answer}; check "
            "data.columns.answer and data.columns.solutions"
        )
    if len(problem.experts) > 1:
        way_out = "each entry in a list of solutions must be a complete solution; join lists of steps into one string"
    elif ":" in function:
        way_out = "check data.columns.answer and data.columns.solutions, and test the function on a few of your rows"
    else:
        asked = ANSWER_FORMS[answer_form(problem.prompt_text) or "box"]
        way_out = f"end solutions with {asked}, or choose another reward function"
    ending = tried.text.strip()[-60:]
    return f"in the first one judged wrong, which ends with {ending!r}, no answer was found ({answer}); {way_out}"
