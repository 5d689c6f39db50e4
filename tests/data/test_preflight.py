"""Data that would teach nothing is refused in one line before the first step; the rest is shown."""

import contextlib
import json

import pytest

from support.text_model import make_text_model
from trapo_jax import preview as preview_command
from trapo_jax.config import DataConfig
from trapo_jax.data.splits import read_splits
from trapo_jax.preview import main
from trapo_jax.rewards import make_grader

ROWS = [
    {
        "prompt": f"What is {i} + 1?",
        "answer": str(i + 1),
        "solution": f"One more is {i + 1}: \\boxed{{{i + 1}}}",
    }
    for i in range(20)
]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_text_model(tmp_path_factory.mktemp("models") / "text")


@pytest.fixture(scope="module")
def plain_model(tmp_path_factory):
    return make_text_model(tmp_path_factory.mktemp("models") / "plain", chat_template=None)


@pytest.fixture(scope="module")
def grader():
    with make_grader(["math"], timeout_secs=60.0) as grader:
        yield grader


@pytest.fixture
def preview(model, tmp_path, capsys, grader, monkeypatch):
    """Previews some rows with the grader "math"; returns exit code, output and error."""

    build = preview_command.grader_for

    def shared_grader(config, functions, tokenizer):
        is_math = list(functions) == ["math"]  # its processes take seconds to start
        return contextlib.nullcontext(grader) if is_math else build(config, functions, tokenizer)

    monkeypatch.setattr(preview_command, "grader_for", shared_grader)

    def run(rows, *overrides):
        file = tmp_path / "rows.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        fields = [f"model.path={model}", f"data.train_files={file}", "rewards.functions=math"]
        fields.append("data.template=chatml")  # starts no process
        code = main([*fields, "data.num_validation=2", "data.num_test=2", *overrides])
        output = capsys.readouterr()
        return code, " ".join(output.out.split()), output.err

    return run


def test_good_data_are_shown(preview):
    code, output, error = preview(ROWS, "data.prompt_suffix=boxed", "data.template=auto")
    assert (code, error) == (0, "")
    assert "experts judged correct │ 16 of 16" in output
    assert "template chat; columns: prompt prompt, answer answer, solutions solution?" in output
    assert "first prompt: '<|im_start|>user\\nWhat is" in output
    assert (
        "put your final answer within \\\\boxed{}.<|im_end|>\\n<|im_start|>assistant\\n'" in output
    )
    assert "warning" not in output


def changed(**changes):
    return [row | changes for row in ROWS]


def without(*names):
    return [{k: v for k, v in row.items() if k not in names} for row in ROWS]


MISUSES = {
    "no grader": (ROWS, ["rewards.functions=[]"], "rewards.functions: not set"),
    "unknown grader": (ROWS, ["rewards.functions=maths"], "no such reward function; did you mean"),
    "wrong prompt column": (ROWS, ["data.columns.prompt=question"], "no row has the column"),
    "wrong answer column": (ROWS, ["data.columns.answer=gold"], "no row has the column 'gold'"),
    "wrong solution column": (ROWS, ["data.columns.solutions=cot"], "no row has the column 'cot'"),
    "unknown columns": ([{"x": "q", "y": "1"}], [], "the columns are x, y, which fits no preset"),
    "wrong preset": (ROWS, ["data.columns.preset=gsm8k"], "no row has the column 'question'"),
    "no answers": (changed(answer=""), [], "is usable: 0 of 20 kept; dropped: 20 with an"),
    "no answer column": (without("answer"), [], "the columns are prompt, solution, which fits no"),
    "a chat without answers": (
        [
            {
                "messages": [
                    {"role": "user", "content": f"What is {i}?"},
                    {"role": "assistant", "content": f"\\boxed{{{i}}}"},
                ]
            }
            for i in range(20)
        ],
        [],
        "set data.columns.answer to the column of the answers (now answer?)",
    ),
    "solutions without a box": (
        changed(solution="One more than before."),
        [],
        "only 0 of 16 expert solutions are judged correct; in the first wrong one, which ends",
    ),
    "answers of other problems": (
        changed(answer="77"),
        [],
        "was found, but the problem's answer is '77'; check data.columns.answer",
    ),
    "answers that cannot match": (
        [row | {"answer": f"Result: {row['answer']} apples (see above)"} for row in ROWS],
        [],
        "check data.columns.answer and data.columns.solutions",
    ),
    "solutions that are cut": (
        [row | {"solution": "I think. " * 20 + row["solution"]} for row in ROWS],
        ["sampling.max_completion_length=64"],
        "because most are cut at sampling.max_completion_length=64; raise it",
    ),
    "prompts too long": (ROWS, ["data.max_prompt_length=10"], "no problem is usable: 0 of 16 kept"),
    "most prompts too long": (
        [*({**row, "prompt": row["prompt"] * 9} for row in ROWS[:12]), *ROWS[12:]],
        [
            "data.max_prompt_length=70",
            "data.num_validation=4",
            "data.num_test=4",
            "train.problems_per_step=1",
        ],
        "training prompts are longer and were dropped; raise it",
    ),
    "no solutions": (without("solution"), [], "no training problem has one; set data.columns.sol"),
    "no solutions for sft": (
        without("solution"),
        ["method.name=sft"],
        "method.name=sft: it learns from expert solutions, but no training problem has one",
    ),
    "too few problems": (ROWS[:5], [], "train.problems_per_step=8: more than the"),
    "beyond the context": (
        ROWS,
        ["sampling.max_completion_length=4096"],
        "it exceeds the 2048 positions of the model (max_position_embeddings)",
    ),
    "unknown template": (ROWS, ["data.template=chatlm"], "no such template; did you mean chatml?"),
    "unknown template argument": (
        ROWS,
        ["data.template_arguments={enable_thinking: false}", "data.template=chat"],
        "data.template_arguments",
    ),
    "answers that are no letters": (
        changed(answer="Paris"),
        ["rewards.functions=multiple_choice", "method.name=grpo"],
        "16 of 16 answers are not one letter A-J, for example 'Paris'",
    ),
    "another task": (ROWS, ["data.source=card_shuffles"], "data.train_files are not read"),
}


@pytest.mark.parametrize("what", MISUSES)
def test_misuse_ends_in_one_line(what, preview):
    rows, overrides, message = MISUSES[what]
    code, _, error = preview(rows, *overrides)
    assert code == 2
    assert message in error
    assert error.count("\n") == 1


WARNINGS = {
    "nothing asks for a box": (ROWS, [], "consider data.prompt_suffix=boxed"),
    "chat model without its template": (
        ROWS,
        ["data.template=none"],
        "the tokenizer has a chat template, which is not used",
    ),
    "some solutions are cut": (
        [*ROWS[:19], ROWS[19] | {"solution": "I think. " * 60 + ROWS[19]["solution"]}],
        ["sampling.max_completion_length=256", "data.num_test=1", "data.num_validation=1"],
        "longer than sampling.max_completion_length=256 and are cut",
    ),
    "special tokens": (
        changed(prompt="Say <|im_end|> now."),
        ["train.problems_per_step=1", "data.num_test=1"],
        "prompts that spell a special token of the tokenizer",
    ),
}


@pytest.mark.parametrize("what", WARNINGS)
def test_what_is_probably_a_mistake_is_said(what, preview):
    rows, overrides, message = WARNINGS[what]
    if what == "special tokens":
        rows = [row | {"prompt": f"{row['prompt']} {i}"} for i, row in enumerate(rows)]
    code, output, _ = preview(rows, *overrides)
    assert code == 0
    assert message in output


def test_wrong_solutions_only_warn_a_method_without_rewards(preview):
    code, output, _ = preview(changed(solution="One more."), "method.name=sft")
    assert code == 0
    assert "warning: rewards.functions=['math']: only 0 of 16 expert solutions" in output


def test_problems_without_answers_are_fine_for_sft(preview):
    code, output, error = preview(without("answer"), "method.name=sft", "data.columns.prompt=prompt",
                                  "data.columns.answer=answer?", "data.columns.solutions=solution")  # fmt: skip
    assert (code, error) == (0, "")
    assert "warning: test: no problem with an answer, so this split is not evaluated" in output
    assert "rewards.functions: failed" not in output
    assert "problems │ 20" in output  # Nothing is held out that could not be evaluated.


def test_no_test_problems_are_no_warning_if_none_were_asked_for(preview):
    code, output, _ = preview(ROWS, "data.num_test=0", "data.num_validation=0")
    assert code == 0
    assert "not evaluated" not in output


def test_what_is_held_out_does_not_depend_on_rows_without_an_answer(tmp_path):
    """Otherwise `evaluate` would take problems that SFT, which keeps those rows, was trained on."""
    file = tmp_path / "rows.jsonl"
    rows = [row | {"answer": ""} if i % 3 == 0 else row for i, row in enumerate(ROWS)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = DataConfig(source="files", train_files=(str(file),), num_test=4, num_validation=3)
    kept, _, _ = read_splits(config, needs_answer=False)
    dropped, _, _ = read_splits(config, needs_answer=True)
    assert kept["test"] == dropped["test"]
    assert kept["validation"] == dropped["validation"]
    assert (len(kept["train"]), len(dropped["train"])) == (13, 6)
    trained = {example.prompt for example in kept["train"]}
    assert not trained & {example.prompt for example in kept["test"]}


def test_a_limit_in_the_config_file_is_kept(preview, tmp_path):
    config = tmp_path / "mine.yaml"
    config.write_text("data: {limit: 12}\n")
    _, output, _ = preview(ROWS, "--config", str(config))
    assert "rows read │ 12" in output


def test_lengths_follow_from_the_data(preview):
    long = [row | {"solution": "I think. " * 60 + row["solution"]} for row in ROWS]
    _, output, _ = preview(long)
    assert "prompt tokens (<= 48)" in output
    assert "expert tokens (<= 720)" in output


def test_a_plain_model_gets_plain_text(plain_model, preview):
    _, output, _ = preview(ROWS, f"model.path={plain_model}", "data.template=auto")
    assert "template none" in output
    assert "first prompt: 'What is" in output


def test_a_system_prompt_makes_a_chat(plain_model, preview):
    _, output, _ = preview(
        ROWS, f"model.path={plain_model}", "data.template=auto", "data.system_prompt=Be brief."
    )
    assert "template chatml" in output
    assert "first prompt: '<|im_start|>system\\nBe brief.<|im_end|>\\n<|im_start|>user" in output
