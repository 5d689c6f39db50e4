"""Tests `trapo_jax.compare` with a small grid of real runs and with mistakes on the command line."""

import csv
import json
import subprocess

import pytest

from support.commands import run_command
from trapo_jax.compare import main
from trapo_jax.comparison import Grid, Trial
from trapo_jax.comparison.experiment import check_train_steps
from trapo_jax.runs.directory import lock_folder
from trapo_jax.types import UserError

SMALL = ("data.num_validation=8", "data.num_test=8", "evaluation.num_samples=2", "log_samples=0")


@pytest.mark.slow
def test_a_grid_is_executed_and_reported(tmp_path):
    result = run_command(
        "trapo_jax.compare",
        *("--methods", "trapo,sft", "--seeds", 1, "--match", "problems", "--budget", 16),
        *("--out", tmp_path / "out", *SMALL, "evaluation.every=0.5"),
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "checked: no gradient differs" in result.stdout
    assert "2 of 2 runs complete" in result.stdout
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names >= {"comparison.md", "comparison.html", "curves.png", "runs.csv", "scores.csv"}
    with open(tmp_path / "out" / "runs.csv") as file:
        rows = {row["method"]: row for row in csv.DictReader(file)}
    assert set(rows) == {"trapo", "sft"}
    for method, row in rows.items():
        folder = tmp_path / "out" / "runs" / method / "as_configured" / "seed_0"
        assert row["folder"] == str(folder)
        after = json.loads((folder / "summary.json").read_text())["test"]["after"]
        assert float(row["sampled"]) == pytest.approx(after["eval/accuracy_sampled"])
        assert (float(row["problems"]), float(row["steps"])) == (16, 2)
        assert float(row["flops"]) > 1e8
        assert {p.name for p in (folder / "evaluations").iterdir()} == {
            "validation_0.json",
            "test_0.json",
            "validation_1.json",
            "validation_2.json",
            "test_2.json",
        }
    assert float(rows["sft"]["expert_share"]) == 1
    assert 0 < float(rows["trapo"]["expert_share"]) < 1
    text = (tmp_path / "out" / "comparison.md").read_text()
    assert text in result.stdout
    assert "this is a smoke test, not a result" in text
    assert "BUDGETS DO NOT MATCH" not in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--out", "{run}"], "--out {run}: contains a training run; choose a different directory"),
        (["--records", "{file}"], "--records {file}: not a directory"),
        (
            ["data.num_test=0"],
            "data.num_test=0: methods are compared by the accuracy on this split",
        ),
        (
            ["data.num_validation=0", "--sweep", "learning_rate=1e-4,2e-4"],
            "data.num_validation=0: settings are chosen by the accuracy on this split",
        ),
        (
            ["--match", "sampled_tokens"],
            "--match sampled_tokens: sft samples nothing; choose another",
        ),
    ],
)
def test_what_cannot_be_compared_is_refused_before_anything_runs(
    arguments, message, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(subprocess, "run", None)
    places = {"run": tmp_path / "run", "file": tmp_path / "run" / "method.json"}
    places["run"].mkdir()
    places["file"].write_text("{}")
    given = ["--out", f"{tmp_path}/out", *(text.format(**places) for text in arguments)]
    assert main(["--methods", "grpo,sft", "--budget", "1000", *given]) == 2
    assert f"error: {message.format(**places)}" in capsys.readouterr().err


def test_a_broken_train_step_stops_the_comparison(tmp_path, monkeypatch):
    grid = Grid(None, (), ("sft",), (), (), None, 1, 1, "steps", 2.0, tmp_path, tmp_path, 0.05)

    def broken(*_, **__):
        return subprocess.CompletedProcess(
            [], 1, "", "a warning\nerror: sft: the gradient differs\n"
        )

    monkeypatch.setattr(subprocess, "run", broken)
    with pytest.raises(UserError, match=r"^train step check: sft: the gradient differs"):
        check_train_steps(grid.final_runs([Trial("sft")]), {}, print)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--methods", "trapo,grppo"], "method.name='grppo'"),
        (["--methods", "trapo", "train.learning_rat=1"], "did you mean train.learning_rate?"),
        (["--methods", "trapo", "--sweep", "learning_rate"], "--sweep learning_rate: expected"),
        (["--methods", "trapo", "seed=1"], "seed: set by the comparison"),
    ],
)
def test_mistakes_cause_one_line_errors(arguments, message, tmp_path, capsys):
    out = tmp_path / "out"
    assert main([*arguments, "--budget", "10", "--out", str(out)]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1
    assert not out.exists()


@pytest.mark.parametrize("locked", ["--out", "--runs"])
def test_a_second_comparison_in_the_same_folder_is_rejected(locked, tmp_path, capsys):
    folders = {"--out": tmp_path / "out", "--runs": tmp_path / "runs"}
    arguments = [text for option, folder in folders.items() for text in (option, str(folder))]
    with lock_folder(folders[locked]):
        assert main(["--methods", "sft", "--budget", "10", *arguments]) == 2
    error = capsys.readouterr().err
    assert f"error: {locked}={folders[locked]}: another process is writing to it" in error


@pytest.mark.parametrize("budget", ["0", "many", "inf"])
def test_the_budget_must_be_a_positive_number(budget, tmp_path, capsys):
    assert main(["--methods", "sft", "--out", str(tmp_path), "--budget", budget]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"error: command line: --budget: '{budget}' is not a positive finite number" in line
