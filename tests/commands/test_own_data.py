"""Tests training on a user's own file and model, and evaluation of the resulting run."""

import json
import shutil

import pytest

from support.commands import run_command
from support.text_model import make_text_model

pytestmark = pytest.mark.slow

JOB = (
    "train.num_steps=2",
    "train.problems_per_step=2",
    "evaluation.num_samples=1",
    "evaluation.every=1",
    "sampling.max_completion_length=64",
    "checkpoint.every=1",
)


def write_rows(file, *, with_answers=True):
    rows = []
    for i in range(10):
        row = {"prompt": f"What is {i} + 1?", "solution": f"It is \\boxed{{{i + 1}}}."}
        rows.append(row | ({"answer": i + 1} if with_answers else {}))
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def train(cwd, model, file, *overrides):
    return run_command(
        "trapo_jax.train",
        f"model.path={model}",
        f"data.train_files={file}",
        *JOB,
        *overrides,
        cwd=cwd,
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Returns a run of the default method, whose model folder has been deleted, and the command's output."""
    folder = tmp_path_factory.mktemp("own")
    model = make_text_model(folder / "model")
    file = write_rows(folder / "sums.jsonl")
    result = train(folder, model, file, "rewards.functions=math", "data.prompt_suffix=boxed")
    assert result.returncode == 0, result.stderr
    (run,) = (folder / "runs").iterdir()
    shutil.rmtree(model)
    return run, result.stdout


def test_the_run_has_a_default_name_and_records_the_preflight_check(trained):
    run, output = trained
    assert run.name.startswith("sums_trapo-")
    assert f"run directory runs/{run.name}" in output
    assert "accuracy_sampled" in output
    assert "pass@1" not in output  # pass@1 equals the accuracy, so it is not printed.
    data = json.loads((run / "data.json").read_text())
    assert data["preflight"]["counts"]["train"]["experts judged correct"] == "8 of 8"
    assert data["template"]["kind"] == "chat"
    config = (run / "config.yaml").read_text()
    assert "max_prompt_length: 112" in config  # derived from the data


def test_the_same_command_recognizes_the_complete_run(trained):
    run, _ = trained
    model, file = run.parents[1] / "model", run.parents[1] / "sums.jsonl"
    arguments = ("rewards.functions=math", "data.prompt_suffix=boxed")
    again = train(run.parents[1], model, file, *arguments)
    assert again.returncode == 0, again.stderr
    assert "this run is complete" in again.stdout
    assert [path.name for path in run.parent.iterdir()] == [run.name]


def test_evaluate_inherits_the_settings_of_the_run(trained):
    run, _ = trained
    result = run_command(
        "trapo_jax.evaluate", f"model.path={run}", "output_dir=scores", cwd=run.parents[1]
    )
    assert result.returncode == 0, result.stderr
    assert "template chat; reward functions math" in result.stdout
    assert "test split, 1 problem, 1 sample each at temperature 0.6" in result.stdout
    assert "evaluating test: " in result.stdout
    assert "avg@1" in result.stdout
    assert "pass@1" not in result.stdout  # pass@1 equals the accuracy, so it is not printed.
    (record,) = map(json.loads, (run.parents[1] / "scores" / "samples.jsonl").open())
    assert record["gold"].isdecimal()


def test_sft_needs_no_answers_and_no_grader(tmp_path):
    model = make_text_model(tmp_path / "model")
    file = write_rows(tmp_path / "rows.jsonl", with_answers=False)
    columns = ("data.columns.prompt=prompt", "data.columns.answer=answer?")
    columns += ("data.columns.solutions=solution", "method.name=sft")
    result = train(tmp_path, model, file, *columns, "output_dir=run")
    assert result.returncode == 0, result.stderr
    assert "test: rewards.functions is not set, so this split is not evaluated" in result.stdout
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").open()]
    assert [record["kind"] for record in records] == ["train", "train"]
    assert records[-1]["batch/expert_trained_tokens"] > 0
    assert (tmp_path / "run" / "hf" / "model.safetensors").is_file()
