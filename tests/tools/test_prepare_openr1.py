"""Tests prepare_openr1.py with small files that have the exact layouts of the two Hub datasets."""

import importlib.util
import json
import sys

import pyarrow as pa
import pyarrow.parquet
import pytest

from support.commands import REPOSITORY
from trapo_jax.data import COLUMN_PRESETS, examples_from_rows
from trapo_jax.data.sources import read_rows
from trapo_jax.rewards import make_grader
from trapo_jax.types import Problem, UserError

LONG_SYSTEM = "Your task is to follow a systematic, thorough reasoning process."


@pytest.fixture(scope="module")
def tool():
    path = REPOSITORY / "tools" / "prepare_openr1.py"
    spec = importlib.util.spec_from_file_location("prepare_openr1", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["prepare_openr1"] = module
    spec.loader.exec_module(module)
    return module


def first_row(question, answer, solution):
    return {
        "data_source": "openr1",
        "prompt": [
            {"content": LONG_SYSTEM, "role": "system"},
            {"content": question, "role": "user"},
        ],
        "target": [{"content": solution, "role": "assistant"}],
        "ability": "math",
        "reward_model": {"ground_truth": answer, "style": "rule"},
        "extra_info": {"index": 0, "split": "train"},
    }


def second_row(question, answer, generations, complete=None):
    flags = [True] * len(generations)
    return {
        "problem": question,
        "solution": "By the book.",
        "answer": answer,
        "problem_type": "Algebra",
        "question_type": "math-word-problem",
        "source": "olympiads",
        "uuid": "c1d2",
        "is_reasoning_complete": flags if complete is None else complete,
        "generations": generations,
        "correctness_math_verify": flags,
        "correctness_llama": None,
        "finish_reasons": None,
        "correctness_count": len(generations),
        "messages": [{"content": question, "role": "user"}],
    }


def solution(thought, answer):
    return f"<think>\n{thought}, so \\boxed{{{answer}}}\n</think>\n\nThe answer is \\boxed{{{answer}}}."


FIRST = [
    first_row("What is 1 + 1?", "2", solution("one and one", "2")),
    first_row("What is 2 + 2?", "4", solution("wrong", "5")),  # the first solution is wrong
    first_row("What is 3 + 3?", "6", solution("three and three", "6")),  # only in this dataset
    first_row("What is 4 + 4?", "8", solution("wrong", "9")),  # no solution is correct
    first_row("What is  1 + 1?", "2", solution("again", "2")),  # a duplicate question
    first_row("What is 5 + 5?", "", solution("five", "10")),
]
SECOND = [
    second_row("What is 9 + 9?", "18", [solution("unused", "18")]),
    second_row(
        "What is 1 + 1?",
        "2",
        [
            solution("one and one", "2"),  # equal to the solution in the first dataset
            solution("truncated", "2"),  # incomplete
            solution("wrong", "3"),
            solution("another way", "2"),
            solution("a third way", "2"),  # exceeds the limit of two correct solutions
        ],
        [True, False, True, True, True],
    ),
    second_row("What is 2 + 2?", "4", [solution("two and two", "\\frac{8}{2}")]),
    second_row("What is 4 + 4?", "8", [solution("wrong too", "7")]),
]


def write(path, rows):
    pa.parquet.write_table(pa.Table.from_pylist(rows), path)
    return str(path)


def test_problems_keep_their_correct_solutions(tool, tmp_path):
    out = tmp_path / "out" / "set.parquet"
    first = write(tmp_path / "first.parquet", FIRST)
    second = write(tmp_path / "second.parquet", SECOND)
    report = tool.prepare(out, first, second, 1, 20.0)
    rows = pa.parquet.read_table(out).to_pylist()
    assert [row["prompt"] for row in rows] == [
        [{"role": "user", "content": f"What is {n} + {n}?"}] for n in (1, 2, 3)
    ]
    assert [row["extra_info"]["answer_list"] for row in rows] == [
        [solution("one and one", "2"), solution("another way", "2")],
        [solution("two and two", "\\frac{8}{2}")],
        [solution("three and three", "6")],
    ]
    assert all(row["target"][0]["content"] == row["extra_info"]["answer_list"][0] for row in rows)
    assert report == {
        "problems read": 6,
        "problems dropped: duplicate question": 1,
        "problems dropped: empty question or answer": 1,
        "second solutions dropped: duplicate": 1,
        "second solutions dropped: incomplete": 1,
        "problems in both sets": 3,
        "first solutions dropped: wrong": 2,
        "second solutions dropped: wrong": 2,
        "problems with 2 solutions": 1,
        "problems with 1 solution": 2,
        "problems dropped: no correct solution": 1,
        "problems written": 3,
        "solutions graded": 8,
        "solutions graded: correct": 4,
    }
    assert json.loads((tmp_path / "out" / "set.json").read_text()) == report
    assert sorted(path.name for path in out.parent.iterdir()) == ["set.json", "set.parquet"]
    # The file can be read for training.
    examples, _ = examples_from_rows(read_rows([str(out)]), COLUMN_PRESETS["verl"])
    assert examples[0].solutions == (
        "one and one, so \\boxed{2}",
        "another way, so \\boxed{2}",
    )
    assert examples[0].source == "openr1"
    with pytest.raises(UserError, match="already exists"):
        tool.prepare(out, first, second, 1, 20.0)


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        ([{"question": "1 + 1?"}], SECOND, "row 1: no field 'prompt'"),
        ([{**FIRST[0], "prompt": "1 + 1?"}], SECOND, "'prompt' is not a list of chat messages"),
        ([{**FIRST[0], "reward_model": None}], SECOND, "no field 'ground_truth'"),
        (FIRST, [{"problem": "What is 1 + 1?"}], "row 1: no field 'generations'"),
        ([FIRST[3]], [SECOND[3]], "no problem has a correct solution"),
    ],
)
def test_other_layouts_cause_one_line_errors(tool, tmp_path, first, second, message):
    files = [write(tmp_path / f"{i}.parquet", rows) for i, rows in enumerate((first, second))]
    with pytest.raises(UserError, match=message) as error:
        tool.prepare(tmp_path / "out.parquet", *files, 1, 20.0)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out.parquet").exists()


def test_out_must_be_parquet(tool, tmp_path):
    with pytest.raises(UserError, match=r"must end in \.parquet"):
        tool.prepare(tmp_path / "out.json", "a", "b", 1, 20.0)


# Endings of thoughts, and whether the answer 12 can be extracted from them.
ENDINGS = [
    ("so the answer is \\boxed{12}.", True),
    ("\\boxed{12}", True),
    ("**Final Answer**\n\\boxed{12}", True),
    ("Therefore, the answer is 12.", True),
    ("The answer is $12$, which is what we wanted.", True),
    ("Answer: 12", True),
    ("The final answer is **12**.", True),
    ("#### 12", True),
    ("so \\boxed{12}. Let me check: 3 * 4 = 12. Yes.", True),
    ("\\boxed{12}? Let me verify whether the answer is consistent. It is.", True),
    ("first \\boxed{11}, but no: \\boxed{12}", True),
    ("so x = \\boxed{12 \\text{ apples}}", True),
    ("Hence 3 * 4 = 12.", False),
    ("I am confident it is twelve.", False),
    ("so it is 12", False),
    ("", False),
    ("The answer is 13. Hmm, 12 it is.", False),
    ("\\boxed{12} is wrong, so \\boxed{13}.", False),
    ("\\boxed{", False),
    ("the result 12 should be in the box", False),
]


@pytest.mark.slow
def test_solutions_are_graded_as_in_training(tool, tmp_path):
    """The answer after the thought is always correct, but the tool must grade only the part used in training."""
    rows = [
        first_row(
            f"Case {i}?", "12", f"<think>\nWe think {i}.\n{end}\n</think>\nIt is \\boxed{{12}}."
        )
        for i, (end, _) in enumerate(ENDINGS)
    ]
    first = write(tmp_path / "first.parquet", rows)
    second = write(tmp_path / "second.parquet", SECOND)
    for part, expected in (("thought", [right for _, right in ENDINGS]), ("whole", [True] * 20)):
        out = tmp_path / f"{part}.parquet"
        report = tool.prepare(out, first, second, 2, 60.0, part)
        rows = pa.parquet.read_table(out).to_pylist()
        kept = {int(row["extra_info"]["index"]) for row in rows}
        assert kept == {i for i, right in enumerate(expected) if right}
        assert report["solutions graded: correct"] == sum(expected)
        examples, _ = examples_from_rows(
            read_rows([str(out)]), COLUMN_PRESETS["verl"], expert_part=part
        )
        with make_grader(["math"], num_workers=2, timeout_secs=60.0) as grader:
            grades = [
                grader.submit(text, Problem("", (), example.answer))
                for example in examples
                for text in example.solutions
            ]
            assert all(grade.result().is_correct for grade in grades)
