"""Tests that unusable data is rejected in one line before the first step, and that other data is shown."""

import contextlib
import json
import re

import pytest

from support.text_model import make_text_model
from trapo_jax import preview as preview_command
from trapo_jax.config import DataConfig
from trapo_jax.data.preflight import show_text
from trapo_jax.data.splits import read_splits
from trapo_jax.preview import main
from trapo_jax.rewards import make_grader
from trapo_jax.runs.console import Console

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
    """Returns a function that previews rows with the grader "math" and returns the exit code, output and error."""

    build = preview_command.grader_for

    def shared_grader(config, functions, tokenizer):
        # The processes of the math grader take seconds to start, so they are shared.
        is_math = list(functions) == ["math"]
        return contextlib.nullcontext(grader) if is_math else build(config, functions, tokenizer)

    monkeypatch.setattr(preview_command, "grader_for", shared_grader)

    def run(rows, *overrides):
        file = tmp_path / "rows.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        fields = [f"model.path={model}", f"data.train_files={file}", "rewards.functions=math"]
        fields.append("data.template=chatml")  # a template that starts no process
        other = tmp_path / "other.jsonl"
        other.write_text('{"query": "What is 3 + 1?", "result": "4"}\n')
        files = {"file": file, "other": other}
        overrides = [re.sub(r"{(file|other)}", lambda m: str(files[m[1]]), x) for x in overrides]
        code = main([*fields, "data.num_validation=2", "data.num_test=2", *overrides])
        output = capsys.readouterr()
        return code, " ".join(output.out.split()), output.err

    return run


@pytest.mark.slow
def test_good_data_is_shown(preview):
    code, output, error = preview(ROWS, "data.prompt_suffix=boxed", "data.template=auto")
    assert (code, error) == (0, "")
    assert "experts judged correct │ 16 of 16" in output
    assert "template chat; columns: prompt prompt, answer answer, solutions solution," in output
    assert "solutions solution, source none, extra none" in output
    assert "first prompt: <|im_start|>user What is" in output  # on its own lines
    assert "put your final answer within \\boxed{}.<|im_end|> <|im_start|>assistant" in output
    assert output.count("warning") == 1  # There are only 20 rows.
    assert "test: an accuracy over 2 problems has a standard error of up to 0.35; raise" in output


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
    "unknown columns": ([{"x": "q", "y": "1"}], [], "the columns are x, y, which fit no preset"),
    "wrong preset": (ROWS, ["data.columns.preset=gsm8k"], "no row has the column 'question'"),
    "no answers": (changed(answer=""), [], "is usable: 0 of 20 kept; dropped: 20 with an"),
    "no answer column": (without("answer"), [], "the columns are prompt, solution, which fit no"),
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
        "set data.columns.answer to the column that holds the answers (now none)",
    ),
    "solutions without a box": (
        changed(solution="One more than before."),
        [],
        "only 0 of 16 expert solutions are judged correct; in the first one judged wrong, which ends",
    ),
    "solutions without the answer for which the prompt asks": (
        changed(solution="One more than before."),
        ["data.prompt_suffix=answer_is"],
        "; end solutions with 'The answer is ANSWER', or choose another reward function",
    ),
    "answers that the built-in grader cannot match": (
        without("solution"),
        ["rewards.functions=card_shuffles", "method.name=grpo"],
        "rewards.functions=['card_shuffles']: 16 of 16 answers are not five digits, as in the built",
    ),
    "a template without the prompt": (
        ROWS,
        ["data.template=support.templates:without_prompt"],
        "data.template=support.templates:without_prompt: all 16 training prompts are the same text",
    ),
    "an unknown tracker": (ROWS, ["trackers=[mlflow]"], "trackers=mlflow: no such tracker"),
    "guidance that cannot start early": (
        ROWS,
        ["method.name=prefix_rft", "sampling.max_staleness=1"],
        "sampling.max_staleness=1: the guidance of method.name=prefix_rft changes with every step",
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
    "all solutions truncated": (
        [row | {"solution": "I think. " * 20 + row["solution"]} for row in ROWS],
        ["sampling.max_completion_length=64"],
        "because all are truncated at sampling.max_completion_length=64; raise it\n",
    ),
    "most solutions truncated": (
        [
            row | {"solution": "I think. " * 20 * (i > 5) + row["solution"]}
            for i, row in enumerate(ROWS)
        ],
        ["sampling.max_completion_length=64"],
        "are truncated at sampling.max_completion_length=64; raise it\n",
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
        "8 of 12 training prompts were dropped, because they are longer than 70 tokens (the longest has 154 tokens); set",
    ),
    "no solutions": (
        without("solution"),
        [],
        "no training problem has one; set data.columns.solutions to the column that holds them (now none), or",
    ),
    "no solutions for sft": (
        without("solution"),
        ["method.name=sft"],
        "method.name=sft: it learns from expert solutions, but no training problem has one",
    ),
    "solutions that are dropped": (
        ROWS,
        ["data.max_expert_length=5"],
        "has one; the solutions in the data are longer than data.max_expert_length=5; raise it, or",
    ),
    "solutions as lists of steps": (
        [row | {"solution": ["One more.", "So:", f"\\boxed{{{row['answer']}}}"]} for row in ROWS],
        [],
        "must be a complete solution; join lists of steps into one string",
    ),
    "repeated prompts": (
        ROWS[:3] * 5,
        [],
        "data.train_files: the 15 rows with an answer have 3 distinct prompts, too few to hold out "
        "data.num_validation=2 and data.num_test=2; specify separate files for these splits, or lower these",
    ),
    "no room for a completion": (
        ROWS,
        ["data.max_prompt_length=3000"],
        "data.max_prompt_length=3000: leaves no room for a completion in the 2048 positions",
    ),
    "too few problems": (ROWS[:5], [], "train.problems_per_step=8: more than the"),
    "beyond the context": (
        ROWS,
        ["sampling.max_completion_length=4096"],
        "it exceeds the 2048 positions of the model (max_position_embeddings)",
    ),
    "unknown template": (ROWS, ["data.template=chatlm"], "no such template; did you mean chatml?"),
    "chats without an answer": (
        [
            {"messages": [{"role": "user", "content": r["prompt"]}], "answer": r["answer"]}
            for r in ROWS
        ],
        [],
        "no chat in 'messages' ends with an assistant message; add the solutions as assistant messages, or",
    ),
    "test files with other columns": (
        ROWS,
        ["data.test_files={other}"],
        "data.columns applies to every split, so rename this file's columns if they differ from those of data.train_files",
    ),
    "a file in a comma-separated list that does not exist": (
        ROWS,
        ["data.train_files={file},missing.jsonl"],
        "missing.jsonl]; missing.jsonl does not exist",
    ),
    "test files that do not exist": (
        ROWS,
        ["data.test_files=missing.jsonl"],
        "data.test_files: missing.jsonl: no such file or folder",
    ),
    "template name without a similar one": (
        ROWS,
        ["data.template=x"],
        "choose 'none', 'chat', 'chatml', 'qwen_math'",
    ),
    "unknown template argument": (
        ROWS,
        ["data.template_arguments={enable_thinking: false}", "data.template=chat"],
        "data.template_arguments",
    ),
    "answers that are not letters": (
        changed(answer="Paris"),
        ["rewards.functions=multiple_choice", "method.name=grpo"],
        "16 of 16 answers are not a single letter A-J, for example 'Paris'",
    ),
    "another task": (ROWS, ["data.source=card_shuffles"], "data.train_files is not read"),
}


@pytest.mark.slow
@pytest.mark.parametrize("what", MISUSES)
def test_misuse_causes_a_one_line_error(what, preview):
    rows, overrides, message = MISUSES[what]
    code, _, error = preview(rows, *overrides)
    assert code == 2
    assert message in error
    assert len(error.splitlines()) == 1


FUNCTIONS = """
import os
def no_problem(response): return 1.0
def out_of_range(response, problem): return 5 if problem.answer in response else 0
def nothing(response, problem): problem.answer in response
def breaks(response, problem): raise KeyError("x")
def needs_text(response, problem): return float(response[0] == "x")
def rewards_all(response, problem): return 1.0
def rewards_none(response, problem): return 0.0
def one_source(response, problem): return {"a": 1.0}[problem.source]
def judge(response, problem): return float(os.environ["JUDGE_TOKEN"] == "x")
"""
EXPECTED = "expected a number in [0, 1] or a verdict"
BROKEN_FUNCTIONS = {
    "no_problem": "TypeError: no_problem() takes 1 positional argument but 2 were given); it is called as",
    "out_of_range": f"InvalidReward: the function returned 5; {EXPECTED}",
    "nothing": f"InvalidReward: the function returned None; {EXPECTED}",
    "breaks": "3 of 3 gold answers, 1 of 1 empty responses (4 x KeyError: 'x'); test it on",
}


@pytest.fixture
def functions(tmp_path, monkeypatch):
    """Writes a user's reward functions to a module in the working directory, and returns the module's name."""
    name = f"my_{tmp_path.name}"  # Modules are cached by name.
    (tmp_path / f"{name}.py").write_text(FUNCTIONS)
    monkeypatch.chdir(tmp_path)
    return name


@pytest.mark.parametrize("with_experts", [True, False])
@pytest.mark.parametrize("name", BROKEN_FUNCTIONS)
def test_a_broken_reward_function_is_detected_before_training(
    name, with_experts, preview, functions
):
    rows = ROWS if with_experts else without("solution")
    overrides = [f"rewards.functions={functions}:{name}", "rewards.timeout_secs=60"]
    code, _, error = preview(rows, *overrides, "method.name=grpo")
    assert code == 2
    (line,) = error.splitlines()
    assert line.startswith(f"error: rewards.functions: {name} failed on ")
    assert ("16 of 16 expert solutions, " in line) == with_experts
    if not (with_experts and name == "breaks"):
        assert BROKEN_FUNCTIONS[name] in line


@pytest.mark.parametrize(
    ("name", "counts"),
    [("needs_text", "2 of 2 empty responses"), ("one_source", "3 of 6 gold answers, 1 of 2")],
)
def test_a_reward_function_that_fails_on_some_responses_causes_one_warning(
    name, counts, preview, functions
):
    rows = [row | {"source": "ab"[i % 2]} for i, row in enumerate(without("solution"))]
    overrides = [f"rewards.functions={functions}:{name}", "rewards.timeout_secs=60"]
    code, output, error = preview(rows, *overrides, "method.name=grpo")
    assert (code, error) == (0, "")
    assert output.count("failed on") == 1
    assert f"warning: rewards.functions: {name} failed on {counts}" in output


def test_a_pattern_that_matches_no_source_causes_a_warning(preview):
    rows = [row | {"source": f"AIME{i % 2}"} for i, row in enumerate(ROWS)]
    code, output, error = preview(
        rows,
        "rewards.by_source={aime*: math, amc: math}",
        "evaluation.num_samples_by_source={arc-c: 2}",
    )
    assert (code, error) == (0, "")
    assert (
        "warning: rewards.by_source: 'amc' matches none of the sources 'AIME0', 'AIME1'" in output
    )
    assert "warning: evaluation.num_samples_by_source: 'arc-c' matches none of" in output
    assert "'aime*' matches none" not in output


def test_a_withheld_environment_variable_is_named(preview, functions, monkeypatch):
    monkeypatch.setenv("JUDGE_TOKEN", "x")
    judge = [f"rewards.functions={functions}:judge", "rewards.timeout_secs=60"]
    _, _, error = preview(ROWS, *judge, "method.name=grpo")
    assert (
        "to let it read this environment variable, set rewards.environment=[JUDGE_TOKEN]" in error
    )
    code, _, error = preview(ROWS, *judge, "method.name=grpo", "rewards.environment=JUDGE_TOKEN")
    assert (code, error) == (0, "")


def test_a_reward_for_an_empty_response_causes_a_warning(preview, functions):
    overrides = [f"rewards.functions={functions}:rewards_all", "rewards.timeout_secs=60"]
    code, output, error = preview(without("solution"), *overrides, "method.name=grpo")
    assert (code, error) == (0, "")
    assert "warning: rewards.functions: rewards_all gives an empty response a reward of 1" in output


def test_the_first_answer_and_the_limits_are_shown(preview):
    _, output, _ = preview(without("solution"), "method.name=grpo")
    assert "its answer: " in output
    assert "completion tokens │ <= 1024" in output


def test_a_broken_reward_function_causes_only_a_warning_if_the_method_uses_no_rewards(
    preview, functions
):
    overrides = [f"rewards.functions={functions}:breaks", "rewards.timeout_secs=60"]
    code, output, error = preview(ROWS, *overrides, "method.name=sft")
    assert (code, error) == (0, "")
    assert output.count("breaks failed on") == 1


def test_a_reward_function_that_accepts_no_gold_answer_causes_a_warning(preview, functions):
    overrides = [f"rewards.functions={functions}:rewards_none", "method.name=grpo"]
    code, output, error = preview(without("solution"), *overrides)
    assert (code, error) == (0, "")
    assert "none of 3 responses that state the correct answer is judged correct, for exam" in output


WARNINGS = {
    "no request for a box": (ROWS, [], "consider data.prompt_suffix=boxed"),
    "some solutions are wrong": (
        [row | {"solution": "One more."} if i % 4 == 0 else row for i, row in enumerate(ROWS)],
        ["data.prompt_suffix=boxed"],
        "expert solutions are judged correct; in the first one judged wrong, which ends",
    ),
    "truncated solutions that are wrong": (
        [*ROWS[:14], *(r | {"solution": "I think. " * 60 + r["solution"]} for r in ROWS[14:])],
        ["sampling.max_completion_length=256"],
        "truncated at sampling.max_completion_length=256; raise it, or drop longer solutions with "
        "data.max_expert_length=256",
    ),
    "prompts that are dropped": (
        [*({**row, "prompt": row["prompt"] * 9} for row in ROWS[:4]), *ROWS[4:]],
        ["data.max_prompt_length=70", "data.num_validation=0", "data.num_test=0"],
        "warning: train: 4 of 20 prompts are dropped, because they are longer than 70 tokens (the longest has 1",
    ),
    "prompts that are truncated": (
        [*({**row, "prompt": row["prompt"] * 9} for row in ROWS[:4]), *ROWS[4:]],
        [
            "data.overlong_prompts=truncate",
            "data.max_prompt_length=70",
            "data.num_validation=0",
            "data.num_test=0",
        ],
        "warning: train: 4 of 20 prompts are truncated, because they are longer than 70 tokens (the longest has 1",
    ),
    "expert solutions that are dropped": (
        [*({**row, "solution": "Hm. " * 20 + row["solution"]} for row in ROWS[:4]), *ROWS[4:]],
        ["data.max_expert_length=64", "data.num_validation=0", "data.num_test=0"],
        "train: 4 of 20 expert solutions are dropped, because they are longer than data.max_expert_length=64; raise it",
    ),
    "lists of solutions": (
        [row | {"solution": [row["solution"], f"\\boxed{{{row['answer']}}}"]} for row in ROWS],
        ["data.prompt_suffix=boxed"],
        "train: 20 with a list of solutions (each entry is one alternative expert solution",
    ),
    "chat model without its template": (
        ROWS,
        ["data.template=none"],
        "the tokenizer has a chat template, which is not used",
    ),
    "some solutions truncated": (
        [*ROWS[:19], ROWS[19] | {"solution": "I think. " * 60 + ROWS[19]["solution"]}],
        ["sampling.max_completion_length=256", "data.num_test=1", "data.num_validation=1"],
        "longer than sampling.max_completion_length=256 and are truncated; raise it",
    ),
    "tested on training problems": (
        ROWS,
        ["data.test_files={file}", "data.num_validation=0"],
        "warning: test: 20 of 20 problems have the same prompt as a training problem",
    ),
    "solutions in another form": (
        [row | {"solution": f"One more. The answer is {row['answer']}."} for row in ROWS],
        [],
        "looks for; consider data.prompt_suffix=answer_is, the format of the expert solutions",
    ),
    "solutions in a form without a name": (
        [row | {"solution": f"One more.\n#### {row['answer']}"} for row in ROWS],
        [],
        "; set data.prompt_suffix to a sentence that asks for this format",
    ),
    "a single prompt that mentions a form": (
        [ROWS[0] | {"prompt": "Is the answer: 1?"}, *ROWS[1:]],
        ["data.num_test=0", "data.num_validation=0"],
        "warning: few prompts ask for an answer format that the grader looks for; consider data",
    ),
    "prompts that ask for another form": (
        ROWS,
        ["data.prompt_suffix=answer_is"],
        "warning: the prompts ask for 'The answer is ANSWER', but the expert solutions do not end like this; one",
    ),
    "sentences as answers": (
        [
            row | {"answer": f"It is {row['answer']}, which is one more."}
            for row in without("solution")
        ],
        ["method.name=grpo"],
        "16 of 16 answers are sentences, which responses must repeat verbatim, for example 'It is",
    ),
    "half of the answers missing": (
        [row | {"answer": None} if i % 2 else row for i, row in enumerate(without("solution"))],
        ["method.name=grpo", "train.problems_per_step=1"],
        "train: 10 of 20 rows are dropped (with an empty answer)",
    ),
    "special tokens": (
        changed(prompt="Say <|im_end|> now."),
        ["train.problems_per_step=1", "data.num_test=1"],
        "prompts that contain one of the tokenizer's special tokens",
    ),
}


@pytest.mark.parametrize("what", WARNINGS)
def test_probable_mistakes_cause_warnings(what, preview):
    rows, overrides, message = WARNINGS[what]
    if what == "special tokens":
        rows = [row | {"prompt": f"{row['prompt']} {i}"} for i, row in enumerate(rows)]
    code, output, _ = preview(rows, *overrides)
    assert code == 0
    assert message in output


def test_a_few_long_prompts_are_counted_but_cause_no_warning(preview):
    rows = [ROWS[0] | {"prompt": ROWS[0]["prompt"] * 9}, *ROWS[1:]]
    sizes = ("data.num_validation=0", "data.num_test=0", "data.prompt_suffix=boxed")
    _, output, _ = preview(rows, "data.max_prompt_length=150", *sizes)
    assert "train: dropped 1 with a prompt longer than 150 tokens" in output
    assert "warning" not in output


@pytest.mark.parametrize(
    "ask", ["End with '#### 7'.", "End with 'Answer: 7'.", "Put it in \\boxed{7}."]
)
def test_prompts_may_ask_for_any_answer_format_that_the_grader_recognizes(ask, preview):
    rows = [row | {"prompt": f"{row['prompt']} {ask}"} for row in ROWS]
    code, output, _ = preview(rows)
    assert code == 0
    assert "asks for the answer format" not in output


def test_texts_are_shown_with_their_line_breaks(capsys):
    show_text("first prompt", "<|im_start|>user\nWhat is\r\x1b[31m 1?\n", Console())
    assert capsys.readouterr().out == (
        "first prompt:\n    <|im_start|>user\n    What is\\r\\x1b[31m 1?\n\n"
    )
    show_text("first prompt", "x\n" * 2000, Console())
    assert capsys.readouterr().out.endswith("    x\n     ...\n")


def test_sft_needs_no_reward_function_but_warns_that_nothing_is_evaluated(preview):
    code, output, error = preview(ROWS, "method.name=sft", "rewards.functions=[]")
    assert (code, error) == (0, "")
    assert "warning: test: rewards.functions is not set, so this split is not evaluated" in output
    # Problems are still held out, for a later evaluation.
    assert "problems │ 16" in output


def test_wrong_solutions_cause_only_a_warning_if_the_method_uses_no_rewards(preview):
    code, output, _ = preview(changed(solution="One more."), "method.name=sft")
    assert code == 0
    assert "warning: rewards.functions=['math']: only 0 of 16 expert solutions" in output


def test_sft_accepts_problems_without_answers(preview):
    code, output, error = preview(without("answer"), "method.name=sft")
    assert (code, error) == (0, "")
    assert "warning: test: no problem has an answer, so this split is not evaluated" in output
    assert "rewards.functions: failed" not in output
    assert "problems │ 20" in output  # Problems that could not be evaluated are not held out.


def test_a_tenth_of_the_distinct_prompts_is_held_out_by_default(tmp_path):
    """Several rows may contain solutions of the same problem."""
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS * 5))
    splits, _, _ = read_splits(DataConfig(source="files", train_files=(str(file),)))
    prompts = {name: {example.prompt for example in split} for name, split in splits.items()}
    assert {name: len(of) for name, of in prompts.items()} == {
        "train": 16,
        "validation": 2,
        "test": 2,
    }


def test_a_lack_of_test_problems_causes_no_warning_if_none_were_requested(preview):
    code, output, _ = preview(ROWS, "data.num_test=0", "data.num_validation=0")
    assert code == 0
    assert "not evaluated" not in output


def test_the_held_out_problems_do_not_depend_on_rows_without_an_answer(tmp_path):
    """Otherwise, `evaluate` would use problems that were used for training with SFT, which keeps those rows."""
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


def test_lengths_are_derived_from_the_data(preview):
    long = [row | {"solution": "I think. " * 60 + row["solution"]} for row in ROWS]
    _, output, _ = preview(long)
    assert "prompt tokens (<= 48)" in output
    assert "expert tokens (<= 720)" in output


def test_a_plain_model_gets_plain_text(plain_model, preview):
    _, output, _ = preview(ROWS, f"model.path={plain_model}", "data.template=auto")
    assert "template none" in output
    assert "first prompt: What is" in output


def test_a_system_prompt_turns_plain_prompts_into_chats(plain_model, preview):
    _, output, _ = preview(
        ROWS, f"model.path={plain_model}", "data.template=auto", "data.system_prompt=Be brief."
    )
    assert "template chatml" in output
    assert "first prompt: <|im_start|>system Be brief.<|im_end|> <|im_start|>user" in output
