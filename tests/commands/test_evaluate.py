"""`python -m trapo_jax.evaluate`, for real: whole, stopped and gone on with, and mistaken."""

import dataclasses
import json

import pytest

from support.commands import run_command
from trapo_jax import evaluate
from trapo_jax.data import card_shuffles_splits
from trapo_jax.evaluate import main, resolve_model


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Problems in verl's layout: chat messages, a ground truth, two sources."""
    file = tmp_path_factory.mktemp("data") / "problems.jsonl"
    split = card_shuffles_splits(seed=3, num_train=1, num_validation=1, num_test=12)["test"]
    with open(file, "w") as lines:
        for i, example in enumerate(split):
            row = {
                "data_source": f"source{i % 2}",
                "prompt": [{"role": "user", "content": example.prompt}],
                "reward_model": {"ground_truth": example.answer},
            }
            lines.write(json.dumps(row) + "\n")
    return file


def arguments(data, out, *more):
    return [
        *("--model", "card_shuffles_tiny", "--data", str(data), "--out", str(out)),
        *("--template", "none", "--verifier", "card_shuffles", "--temperature", "1"),
        *("--samples", "4", "--max-prompt-length", "16", "--max-completion-length", "64"),
        *map(str, more),
    ]


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("evaluations") / "whole"
    result = run_command("trapo_jax.evaluate", *arguments(data, out))
    assert result.returncode == 0, result.stderr
    return out, result


def read_samples(out):
    with open(out / "samples.jsonl") as lines:
        return {
            (record["problem_id"], record["sample_index"]): record
            for record in map(json.loads, lines)
        }


def test_scores_follow_from_the_samples(whole):
    out, result = whole
    samples = read_samples(out).values()
    scores = json.loads((out / "scores.json").read_text())
    assert len(samples) == 48
    correct = [record["verdict"] == "correct" for record in samples]
    assert 0 < sum(correct) < 48
    assert scores["overall"]["accuracy"] == pytest.approx(sum(correct) / 48)
    assert scores["overall"]["pass_at_k"][0] == pytest.approx(sum(correct) / 48)
    assert set(scores["by_source"]) == {"source0", "source1"}
    for record in samples:
        ends = record["completion"].endswith(f"#{record['gold']}<eos>")
        assert (record["verdict"] == "correct") == (ends and record["completion"].count("#") == 1)
    assert "problems" in result.stdout
    assert (out / "pass_at_k.png").read_bytes().startswith(b"\x89PNG")


def test_samples_of_a_problem_differ(whole):
    by_problem = {}
    for (problem_id, _), record in read_samples(whole[0]).items():
        by_problem.setdefault(problem_id, set()).add(record["completion"])
    assert max(len(texts) for texts in by_problem.values()) > 1


def test_going_on_after_a_stop_gives_the_same(whole, data, tmp_path, capsys):
    out, _ = whole
    again = tmp_path / "again"
    again.mkdir()
    (again / "config.yaml").write_text((out / "config.yaml").read_text())
    lines = (out / "samples.jsonl").read_bytes().splitlines(keepends=True)
    # Killed in the middle of a line.
    (again / "samples.jsonl").write_bytes(b"".join(lines[:20]) + lines[20][:30])
    # Another number of slots draws the same.
    assert main(arguments(data, again, "--num-slots", 5)) == 0
    assert "going on after 20 of 48" in capsys.readouterr().out
    ours, theirs = read_samples(again), read_samples(out)
    assert {k: r["completion"] for k, r in ours.items()} == {
        k: r["completion"] for k, r in theirs.items()
    }
    assert (
        json.loads((again / "scores.json").read_text())["overall"]
        == json.loads((out / "scores.json").read_text())["overall"]
    )


def test_other_settings_in_the_same_folder_are_refused(whole, data, capsys):
    assert main(arguments(data, whole[0], "--seed", 1)) == 2
    assert "seed=0, not 1" in capsys.readouterr().err


def test_other_weights_in_the_same_folder_are_refused(whole, data, monkeypatch, capsys):
    """As of a run that has been trained further."""
    known = evaluate.resolve_model

    def trained_further(name):
        model, config = known(name)
        params = {**model.params, "final_norm": model.params["final_norm"] * 1.001}
        return dataclasses.replace(model, params=params), config

    monkeypatch.setattr(evaluate, "resolve_model", trained_further)
    assert main(arguments(data, whole[0])) == 2
    assert "holds a run with weights=" in capsys.readouterr().err


MISTAKES = {
    "no such file": (["--data", "missing.parquet"], "missing.parquet: no such file"),
    "no such model": (["--model", "nowhere/model"], "nowhere/model"),
    "no chat template": (["--template", "chat"], "has no chat template"),
    "no such column": (["--column", "answer=solution"], "column 'solution': missing"),
    "column of another name": (["--column", "gold=x"], "--column gold=x: not NAME=PATH"),
    "prompts too long": (["--max-prompt-length", "3"], "no usable problem"),
}


@pytest.mark.parametrize("what", MISTAKES)
def test_mistakes_are_one_line_and_leave_nothing(what, data, tmp_path, capsys):
    changes, message = MISTAKES[what]
    out = tmp_path / "out"
    assert main([*arguments(data, out), *changes]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not out.exists()


@pytest.mark.parametrize(
    "changes",
    [
        ["--samples", "0"],
        ["--temperature", "hot"],
        ["--temperature", "0"],
        ["--limit", "-1"],
        ["--top-p", "0"],
        ["--top-k", "-1"],
    ],
)
def test_values_out_of_range_are_refused(changes, data, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        main([*arguments(data, tmp_path / "out"), *changes])
    assert stop.value.code == 2
    assert changes[0] in capsys.readouterr().err


def test_a_folder_that_is_no_run_and_no_model_is_refused(tmp_path):
    from trapo_jax.types import UserError

    (tmp_path / "config.yaml").write_text("{}\n")
    with pytest.raises(UserError, match="a run without a checkpoint yet"):
        resolve_model(str(tmp_path))
