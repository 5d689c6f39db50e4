"""Tests the built-in task: operations, expert style, splits and grader."""

import random
import re

import pytest

from trapo_jax.data import card_shuffles_splits, encode_examples, problem_batches
from trapo_jax.data.card_shuffles import (
    OPERATIONS,
    UNFAMILIAR,
    apply_operation,
    expert_trace,
)
from trapo_jax.rewards import card_shuffles_grader
from trapo_jax.types import Problem, Verdict

SIZES = {"num_train": 128, "num_validation": 256, "num_test": 256}


@pytest.mark.parametrize(
    ("operation", "result"),
    [
        ("r", "54321"),
        ("l", "23451"),
        ("t", "51234"),
        ("s", "21345"),
        ("e", "12354"),
        ("x", "52341"),
        ("m", "14325"),
        ("o", "32145"),
    ],
)
def test_each_operation_moves_the_digits_as_documented(operation, result):
    assert apply_operation(operation, "12345") == result


def test_trace_equals_the_documented_example():
    trace = expert_trace(random.Random(0), "rsm", "48137", noise=False)
    assert trace == "r73184;s37184;m38174;#38174"


def replay(prompt: str, solution: str) -> tuple[str, int, int]:
    """Returns the digits after following the solution step by step, and the counts of fillers and leaps."""
    program, digits = re.fullmatch(r"\?(\w+):(\d{5})=", prompt).groups()
    done, fillers, leaps = "", 0, 0
    *steps, answer = solution.split(";")
    for step in steps:
        filler, operations, shown = re.fullmatch(
            r"(hm,|ok,|so,|um,)?([a-z]{1,2})(\d{5})", step
        ).groups()
        for name in operations:
            digits = apply_operation(name, digits)
        assert digits == shown
        done += operations
        fillers += filler is not None
        leaps += len(operations) == 2
    assert done == program
    assert answer == "#" + digits
    return digits, fillers, leaps


def test_careless_experts_are_correct_with_fillers_and_leaps():
    examples = card_shuffles_splits(seed=3, num_train=3000, num_validation=1, num_test=1)["train"]
    num_steps = num_fillers = num_leaps = 0
    for example in examples:
        digits, fillers, leaps = replay(example.prompt, example.solutions[0])
        assert digits == example.answer
        num_steps += example.solutions[0].count(";")
        num_fillers += fillers
        num_leaps += leaps
    assert 0.07 < num_fillers / num_steps < 0.09
    assert 0.055 < num_leaps / num_steps < 0.075  # 8% of all steps except the last


def test_splits_are_disjoint_and_have_the_requested_sizes():
    splits = card_shuffles_splits(seed=0, **SIZES)
    prompts = {name: {e.prompt for e in split} for name, split in splits.items()}
    assert {name: len(p) for name, p in prompts.items()} == {
        "train": 128,
        "validation": 256,
        "test": 256,
    }
    assert len(set.union(*prompts.values())) == 640
    assert {e.source for e in splits["train"]} == {"K=3", "K=4", "K=5"}


def test_programs_do_not_repeat_operations():
    for example in card_shuffles_splits(seed=0, **SIZES)["train"]:
        program = example.prompt[1:].split(":")[0]
        assert set(program) <= set(OPERATIONS)
        assert len(set(program)) == len(program)


def test_seed_determines_the_splits():
    assert card_shuffles_splits(seed=5, **SIZES) == card_shuffles_splits(seed=5, **SIZES)
    assert card_shuffles_splits(seed=5, **SIZES) != card_shuffles_splits(seed=6, **SIZES)


def test_early_programs_start_with_the_unfamiliar_operation():
    for example in card_shuffles_splits(seed=0, **SIZES, difficulty="early")["train"]:
        assert re.fullmatch(rf"\?{UNFAMILIAR}[rltsexm]{{1,2}}:\d{{5}}=", example.prompt)
        replay(example.prompt, example.solutions[0])


def test_clean_experts_solve_the_same_problems_step_by_step():
    careless = card_shuffles_splits(seed=0, **SIZES)
    clean = card_shuffles_splits(seed=0, **SIZES, style="clean")
    for name, examples in clean.items():
        assert [e.prompt for e in examples] == [e.prompt for e in careless[name]]
        for example in examples:
            assert re.fullmatch(r"([rltsexm]\d{5};)+#\d{5}", example.solutions[0])
            replay(example.prompt, example.solutions[0])


@pytest.mark.parametrize(
    ("response", "verdict"),
    [
        ("r73184;#38174<eos>", Verdict.CORRECT),
        ("#38174<eos>", Verdict.CORRECT),
        ("r73184;#38174", Verdict.WRONG),  # did not stop
        ("r73184;#38175<eos>", Verdict.WRONG),
        ("#38174;#38174<eos>", Verdict.WRONG),  # two answers
        ("r73184;38174<eos>", Verdict.WRONG),
        ("#38174;<eos>", Verdict.WRONG),
        ("#38174<eos>\n", Verdict.WRONG),
        ("", Verdict.WRONG),
        ("#٣٨١٧٤<eos>", Verdict.WRONG),  # digits in another script
    ],
)
def test_responses_get_the_expected_verdicts(response, verdict):
    verify = card_shuffles_grader("<eos>")
    assert verify(response, Problem("0" * 16, (1,), "38174"))[0] is verdict


def test_expert_solutions_are_graded_correct(problems, tokenizer):
    verify = card_shuffles_grader(tokenizer.eos_token)
    for problem in problems:
        text = tokenizer.decode(problem.experts[0].token_ids)
        assert verify(text, problem)[0] is Verdict.CORRECT


def test_tokenizer_round_trips(problems, tokenizer):
    for problem in problems:
        assert tokenizer.decode(problem.prompt_ids) == problem.prompt_text
        assert tokenizer.unk_token_id not in problem.prompt_ids + problem.experts[0].token_ids


def test_each_epoch_is_a_new_permutation():
    batches = problem_batches(list(range(10)), batch_size=4, seed=0)  # type: ignore[arg-type]
    epochs = [[*batches[2 * e], *batches[2 * e + 1]] for e in range(4)]
    for epoch in epochs:
        assert len(set(epoch)) == 8
    assert len({tuple(epoch) for epoch in epochs}) == 4
    again = problem_batches(list(range(10)), batch_size=4, seed=0)  # type: ignore[arg-type]
    assert again[5] == batches[5]


def test_overlong_prompts_raise_an_error_if_requested(tokenizer):
    from trapo_jax.types import UserError

    examples = card_shuffles_splits(seed=0, num_train=4, num_validation=1, num_test=1)["train"]
    with pytest.raises(UserError, match="max_prompt_length"):
        encode_examples(examples, tokenizer, max_prompt_length=5, overlong_prompts="error")
