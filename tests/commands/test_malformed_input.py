"""Tests that malformed models, data and templates cause a one-line error with exit code 2, without writing files."""

import json
import shutil

import pytest

from support.broken_models import BREAKAGES
from support.commands import TINY_MODEL, run_command
from support.data_files import MALFORMED
from trapo_jax.evaluate import main as evaluate
from trapo_jax.train import main as train

CARDS = "data.source=card_shuffles"
GOOD_ROW = {"prompt": "?r:12345=", "answer": "54321", "solution": "r54321;#54321"}
FILES = ("data.source=files", "model.path=card_shuffles_tiny", "rewards.functions=card_shuffles")
GOOD_ROWS = [{**GOOD_ROW, "prompt": f"?{op}:12345="} for op in "rlt"]


def assert_one_line_error(capsys, code, tmp_path, *mentions):
    stderr = capsys.readouterr().err
    assert code == 2
    assert stderr.startswith("error: ")
    assert stderr.count("\n") == 1, stderr
    for text in mentions:
        assert str(text) in stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize("case", BREAKAGES)
def test_broken_model_folder_is_reported_in_one_line(case, tmp_path, capsys):
    folder = tmp_path / "model"
    shutil.copytree(TINY_MODEL, folder)
    BREAKAGES[case][0](folder)
    before = sorted(tmp_path.rglob("*"))
    code = train([f"model.path={folder}", CARDS, f"output_dir={tmp_path / 'out'}"])
    assert_one_line_error(capsys, code, tmp_path, folder)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(("name", "make", "_"), MALFORMED, ids=[m[0] for m in MALFORMED])
def test_malformed_data_file_is_reported_in_one_line(name, make, _, tmp_path, capsys):
    file = tmp_path / "data" / name
    file.parent.mkdir()
    make(file)
    before = sorted(tmp_path.rglob("*"))
    code = train([*FILES, f"data.train_files={file}", f"output_dir={tmp_path / 'out'}"])
    assert_one_line_error(capsys, code, tmp_path, str(file).replace("\0", "\\x00"))
    assert sorted(tmp_path.rglob("*")) == before


# Cases: (rows, additional arguments, part of the error message).
ROWS = {
    "missing column": (
        [{"question": "?", "answer": "2"}],
        (),
        "no row has the column 'prompt'; the first row has",
    ),
    "number instead of a prompt": (
        [{**GOOD_ROW, "prompt": 7}],
        (),
        "column 'prompt': is int (7), not text",
    ),
    "list instead of an answer": (
        [{**GOOD_ROW, "answer": [2]}],
        (),
        "column 'answer': is list ([2]), not",
    ),
    "number instead of a solution": (
        [{**GOOD_ROW, "solution": 3}],
        (),
        "column 'solution': is int (3)",
    ),
    "no user message at the end": (
        [{**GOOD_ROW, "prompt": [{"role": "assistant", "content": "Hm."}]}],
        (),
        "ends with the role 'assistant'",
    ),
    "all answers empty": ([{**GOOD_ROW, "answer": " "}], (), "1 with an empty answer"),
    "answer without its marker": (
        [{"question": "?", "answer": "It is 2."}],
        ("data.columns.preset=gsm8k",),
        "1 without #### in the answer",
    ),
    "no chat template": (GOOD_ROWS, ("data.template=chat",), "chat template"),
    "prompt too long": (
        [*GOOD_ROWS, {**GOOD_ROW, "prompt": "1234567890" * 3}],
        ("data.max_prompt_length=16", "data.overlong_prompts=error"),
        "raise data.max_prompt_length",
    ),
}


@pytest.mark.parametrize("case", ROWS)
def test_malformed_rows_are_reported_in_one_line(case, tmp_path, capsys):
    rows, more, message = ROWS[case]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = [
        *(*FILES, f"data.train_files={file}", "data.columns.preset=trl", *more),
        *("data.num_validation=1", "data.num_test=1", "train.problems_per_step=1"),
        f"output_dir={tmp_path / 'out'}",
    ]
    assert_one_line_error(capsys, train(arguments), tmp_path, message)


def test_evaluate_reports_malformed_data_in_one_line(tmp_path, capsys):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"prompt": "1 + 1?"}\n')
    code = evaluate(
        [
            *(*FILES, f"data.test_files={file}", "data.columns.preset=trl"),
            f"output_dir={tmp_path / 'out'}",
        ]
    )
    assert_one_line_error(capsys, code, tmp_path, file, "no row has the column 'answer'")


def test_no_traceback_is_printed_for_a_broken_model(tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(TINY_MODEL, folder)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    result = run_command(
        "trapo_jax.train", f"model.path={folder}", CARDS, f"output_dir={tmp_path}/out"
    )
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1
    assert str(weights) in result.stderr
    assert not (tmp_path / "out").exists()
