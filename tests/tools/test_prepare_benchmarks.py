"""Tests prepare_benchmarks.py with small files that have the columns of the Hub datasets."""

import json

import pyarrow as pa
import pyarrow.parquet
import pytest

import prepare_benchmarks
from prepare_benchmarks import BENCHMARKS, prepare
from trapo_jax.config.schema import MULTIPLE_CHOICE
from trapo_jax.data import COLUMN_PRESETS, examples_from_rows
from trapo_jax.data.hub_datasets import parse_hub_dataset
from trapo_jax.data.layouts import find_preset
from trapo_jax.data.sources import read_rows
from trapo_jax.rewards import make_grader
from trapo_jax.types import Problem, UserError

AIME24 = {
    **{"id": 60, "problem": "Find $x$ if $x = 200 + 4$.", "solution": "\\boxed{204}"},
    **{"answer": "204", "url": "https://example.org", "year": "2024"},
}
AIME25 = {"problem": "Find the sum of all bases.", "answer": "70", "id": "0"}
AMC = {"id": 0, "problem": "How many?", "answer": 142.0, "url": "https://example.org"}
MATH500 = {
    **{"problem": "Convert $(0,3)$ to polar coordinates.", "solution": "By the book."},
    **{"answer": "\\left( 3, \\frac{\\pi}{2} \\right)", "subject": "Precalculus"},
    **{"level": 2, "unique_id": "test/precalculus/807.json"},
}
MINERVA = {"question": "What is the rotation in km/s?", "answer": "4.5e33"}
OLYMPIAD = {
    **{"id": 1606, "question": "Determine all $T$.", "solution": ["By the book."]},
    **{"final_answer": ["$\\frac{2}{3}$", "2"], "context": "Let $T$ be given.", "image_1": None},
    **{"modality": "Text-only", "is_multiple_answer": True, "unit": None},
    **{"answer_type": "Numerical", "subfield": "Algebra", "language": "English"},
}
ARC = {
    **{"id": "Mercury_7175875", "question": "Which is a gas?", "answerKey": "C"},
    "choices": {"text": ["iron", "wood", "air", "ice"], "label": ["A", "B", "C", "D"]},
}
ARC_NUMBERED = {
    **{"id": "NYSEDREGENTS_2013", "question": "Which is ice?", "answerKey": "4"},
    "choices": {"text": ["iron", "wood", "air", "ice"], "label": ["1", "2", "3", "4"]},
}
MMLU_PRO = {
    **{"question_id": 70, "question": "Which number is 10?", "answer": "J", "answer_index": 9},
    "options": [f"the number {i}" for i in range(1, 11)],
    **{"cot_content": "", "category": "math", "src": "ori_mmlu"},
}
ROWS = {
    "aime24": [AIME24],
    "aime25": [AIME25],
    "amc": [AMC],
    "math500": [MATH500],
    "minerva": [MINERVA],
    "olympiadbench": [OLYMPIAD, {**OLYMPIAD, "question": "Else?", "context": None}],
    "arc_c": [ARC, ARC_NUMBERED],
    "mmlu_pro": [MMLU_PRO],
}


def write(folder, name, rows):
    path = folder / f"{name}.parquet"
    pa.parquet.write_table(pa.Table.from_pylist(rows), path)
    return str(path)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("benchmarks")
    data = {name: write(folder, name, rows) for name, rows in ROWS.items()}
    out = folder / "out" / "benchmarks.parquet"
    return out, prepare(out, list(BENCHMARKS), data)


def test_there_are_rows_for_every_benchmark():
    assert list(ROWS) == list(BENCHMARKS)


def test_the_default_data_of_every_benchmark_is_a_split_of_a_hub_dataset():
    for benchmark in BENCHMARKS.values():
        name, _, split = benchmark.data.partition("#")
        assert parse_hub_dataset(name)
        assert split in ("train", "test")


@pytest.mark.slow
def test_all_benchmarks_are_in_one_file_with_their_names_as_sources(prepared):
    out, report = prepared
    rows = pa.parquet.read_table(out).to_pylist()
    assert [row["data_source"] for row in rows] == [
        name for name, rows in ROWS.items() for _ in rows
    ]
    assert report == {name: len(rows) for name, rows in ROWS.items()}
    assert json.loads(out.with_suffix(".json").read_text()) == report
    assert [row["reward_model"]["ground_truth"] for row in rows] == [
        *("204", "70", "142", MATH500["answer"], "4.5e33"),
        *("$\\frac{2}{3}$, 2", "$\\frac{2}{3}$, 2", "C", "D", "J"),
    ]


def test_prompts_contain_the_context_and_lettered_options(prepared):
    rows = pa.parquet.read_table(prepared[0]).to_pylist()
    prompts = {row["data_source"]: row["prompt"][0]["content"] for row in reversed(rows)}
    assert prompts["aime24"] == AIME24["problem"]
    assert prompts["olympiadbench"] == "Let $T$ be given.\n\nDetermine all $T$."
    assert prompts["arc_c"] == (
        "Which is a gas?\n\nA. iron\nB. wood\nC. air\nD. ice\n\n"
        "Answer with the letter of the correct option."
    )
    assert "\nJ. the number 10\n" in prompts["mmlu_pro"]


def test_evaluations_read_the_file_and_grade_every_benchmark(prepared):
    """Reference answers are correct. Multiple choice is graded by letter, so an option's text is a wrong answer."""
    out, _ = prepared
    assert find_preset(next(read_rows([str(out)]))) == "verl"
    examples, _ = examples_from_rows(read_rows([str(out)]), COLUMN_PRESETS["verl"])
    assert [example.source for example in examples].count("arc_c") == 2
    with make_grader(
        ["math"], by_source=MULTIPLE_CHOICE, num_workers=1, timeout_secs=60.0
    ) as grader:
        for example in examples:
            problem = Problem("", (), example.answer, source=example.source)
            responses = [f"\\boxed{{{example.answer.replace('$', '')}}}", "\\boxed{7}", "air"]
            grades = [grader.submit(text, problem).result().is_correct for text in responses]
            assert grades == [True, False, False], example


def test_some_benchmarks_can_be_selected(tmp_path):
    out = tmp_path / "out.parquet"
    file = tmp_path / "aime.jsonl"
    rows = [AIME25, AIME25, {**AIME25, "answer": ""}, {**AIME25, "problem": "Else?", "answer": 7}]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert prepare(out, ["aime25"], {"aime25": str(file)}) == {
        "aime25: dropped, duplicate": 1,
        "aime25: dropped, no question or answer": 1,
        "aime25": 2,
    }
    assert pa.parquet.read_table(out)["extra_info"].to_pylist()[1] == {"index": 1, "split": "test"}


@pytest.mark.parametrize(
    ("name", "rows", "message"),
    [
        ("aime24", [{"question": "1 + 1?", "answer": "2"}], "row 1: no field 'problem'"),
        ("minerva", [{"question": "", "answer": "2"}], "no row has a question and an answer"),
        ("arc_c", [{**ARC, "answerKey": "E"}], "'answerKey' is not one of choices.label"),
        ("mmlu_pro", [{**MMLU_PRO, "answer": "K"}], "'answer' is not the letter of one of the opt"),
        ("arc_c", [{**ARC, "choices": ["iron"]}], "no field 'text'"),
        ("mmlu_pro", [{**MMLU_PRO, "options": None}], "'options' is not a list"),
        ("olympiadbench", [{**OLYMPIAD, "final_answer": "2"}], "'final_answer' is not a list"),
    ],
)
def test_other_layouts_cause_one_line_errors(name, rows, message, tmp_path):
    with pytest.raises(UserError, match=message) as error:
        prepare(tmp_path / "out.parquet", [name], {name: write(tmp_path, name, rows)})
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out.parquet").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--benchmarks", "gsm8k"],
            "--benchmarks gsm8k: unknown benchmark; choose from aime24, aime25",
        ),
        (["--data", "gsm8k=x"], "--data gsm8k: unknown benchmark; choose from"),
        (["--data", "aime24"], "--data aime24: expected NAME=FILE or NAME=HUB_ID"),
        (
            ["--benchmarks", "amc", "--data", "aime24=x"],
            "--data aime24: not listed in --benchmarks",
        ),
        (["--data", "aime24=missing.parquet"], "missing.parquet: no such file"),
    ],
)
def test_mistakes_on_the_command_line_cause_one_line_errors(
    arguments, message, tmp_path, monkeypatch, capsys
):
    command = ["prepare_benchmarks.py", "--out", str(tmp_path / "out.parquet"), *arguments]
    monkeypatch.setattr("sys.argv", command)
    assert prepare_benchmarks.main() == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
