"""Tests `python -m trapo_jax.evaluate`: complete and resumed evaluations, evaluations of runs, and errors."""

import json
import re
import shutil

import pytest
import yaml

from support.commands import run_command
from support.text_model import make_text_model
from trapo_jax import evaluate
from trapo_jax.config import load_evaluate_config
from trapo_jax.data import card_shuffles_splits
from trapo_jax.evaluate import load_model, main
from trapo_jax.runs.console import Console
from trapo_jax.runs.directory import lock_folder
from trapo_jax.types import UserError


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Returns a file of problems in verl's layout, with chat messages, ground truths, and two sources."""
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
        *("model.path=card_shuffles_tiny", f"data.test_files={data}", f"output_dir={out}"),
        *("data.template=none", "rewards.functions=card_shuffles", "evaluation.temperature=1"),
        *("evaluation.num_samples=4", "data.max_prompt_length=16"),
        *("sampling.max_completion_length=64", *more),
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


@pytest.mark.slow
def test_scores_match_the_samples(whole):
    out, result = whole
    samples = read_samples(out).values()
    scores = json.loads((out / "scores.json").read_text())
    assert len(samples) == 48
    correct = [record["is_correct"] for record in samples]
    assert 0 < sum(correct) < 48
    assert scores["overall"]["accuracy"] == pytest.approx(sum(correct) / 48)
    assert scores["overall"]["pass_at_k"][0] == pytest.approx(sum(correct) / 48)
    assert set(scores["by_source"]) == {"source0", "source1"}
    accuracies = [s["accuracy"] for s in scores["by_source"].values()]
    assert scores["mean_of_sources"]["accuracy"] == pytest.approx(sum(accuracies) / 2)
    for record in samples:
        ends = record["completion"].endswith(f"#{record['gold']}<eos>")
        assert record["is_correct"] == (ends and record["completion"].count("#") == 1)
    assert "problems" in result.stdout
    assert (out / "pass_at_k.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_samples_of_a_problem_differ(whole):
    by_problem = {}
    for (problem_id, _), record in read_samples(whole[0]).items():
        by_problem.setdefault(problem_id, set()).add(record["completion"])
    assert max(len(texts) for texts in by_problem.values()) > 1


@pytest.mark.slow
def test_a_resumed_evaluation_gives_the_same_results(whole, data, tmp_path, capsys):
    out, _ = whole
    again = tmp_path / "again"
    again.mkdir()
    (again / "config.yaml").write_text((out / "config.yaml").read_text())
    lines = (out / "samples.jsonl").read_bytes().splitlines(keepends=True)
    # Simulates an evaluation that was killed while it wrote a line.
    (again / "samples.jsonl").write_bytes(b"".join(lines[:20]) + lines[20][:30])
    # Samples do not depend on the number of slots.
    assert main(arguments(data, again, "sampling.num_slots=5")) == 0
    assert "resuming after 20 of 48" in capsys.readouterr().out
    ours, theirs = read_samples(again), read_samples(out)
    assert {k: r["completion"] for k, r in ours.items()} == {
        k: r["completion"] for k, r in theirs.items()
    }
    assert (
        json.loads((again / "scores.json").read_text())["overall"]
        == json.loads((out / "scores.json").read_text())["overall"]
    )


def test_other_settings_in_the_same_folder_are_rejected(whole, data, capsys):
    assert main(arguments(data, whole[0], "seed=1")) == 2
    assert "seed=0, not 1" in capsys.readouterr().err


def test_a_second_evaluation_in_the_same_folder_is_rejected(whole, data, capsys):
    """Two concurrent evaluations would append their samples to the same file."""
    samples = (whole[0] / "samples.jsonl").read_bytes()
    with lock_folder(whole[0]):
        assert main(arguments(data, whole[0])) == 2
    assert f"output_dir={whole[0]}: another process is writing to it" in capsys.readouterr().err
    assert (whole[0] / "samples.jsonl").read_bytes() == samples


def test_other_weights_in_the_same_folder_are_rejected(whole, data, monkeypatch, capsys):
    """The weights of a run change, for example, if it is trained further."""
    original = evaluate.load_model

    def trained_further(config, console):
        model, params = original(config, console)
        return model, {**params, "final_norm": params["final_norm"] * 1.001}

    monkeypatch.setattr(evaluate, "load_model", trained_further)
    assert main(arguments(data, whole[0])) == 2
    assert "contains an evaluation of a model with other weights" in capsys.readouterr().err


@pytest.mark.slow
def test_sources_may_have_different_numbers_of_samples(data, tmp_path, capsys):
    more = ["evaluation.num_samples=1", "evaluation.num_samples_by_source={SOURCE1*: 3}"]
    assert main(arguments(data, tmp_path, *more)) == 0
    out = capsys.readouterr().out
    assert "12 problems, 1 or 3 samples each at temperature 1" in out
    assert "avg@k" in out
    assert re.search(r"\bmean +│ +12 │", out)
    samples = read_samples(tmp_path).values()
    counts = {}
    for sample in samples:
        counts[sample["source"]] = counts.get(sample["source"], 0) + 1
    assert counts == {"source0": 6, "source1": 18}


MISTAKES = {
    "no such file": ("data.test_files=missing.parquet", "missing.parquet: no such file"),
    "no such model": ("model.path=nowhere/model", "model.path='nowhere/model': no such folder"),
    "no chat template": ("data.template=chat", "has no chat template"),
    "no such column": ("data.columns.answer=solution", "no row has the column 'solution'"),
    "no such field": ("data.columns.gold=x", "data.columns.gold: unknown field; did you mean"),
    "a field for training only": ("train.num_steps=3", "train: unknown field"),
    "prompts too long": ("data.max_prompt_length=3", "no problem is usable"),
    "no samples": ("evaluation.num_samples=0", "evaluation.num_samples=0: input should be"),
    "not a number": ("evaluation.temperature=hot", 'evaluation.temperature="hot": input should be'),
    "several greedy samples": ("evaluation.temperature=0", "set evaluation.num_samples=1"),
    "the temperature for training": (
        "sampling.temperature=1",
        "sampling.temperature: unknown field; did you mean evaluation.temperature?",
    ),
    "a negative limit": ("data.limit=-1", "data.limit=-1: input should be"),
    "a top_p of zero": ("evaluation.top_p=0", "evaluation.top_p=0: input should be"),
    "a negative top_k": ("evaluation.top_k=-1", "evaluation.top_k=-1: input should be"),
    "nothing to evaluate": ("data={source: files}", "data.test_files: not set; specify files or"),
    "files and another source": (
        "data.source=card_shuffles",
        "data.source=card_shuffles: data.test_files is not read; set data.source=files",
    ),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes_cause_one_line_errors_and_create_no_files(case, data, tmp_path, capsys):
    change, message = MISTAKES[case]
    out = tmp_path / "out"
    assert main([*arguments(data, out), change]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not out.exists()


def test_the_directory_of_a_training_run_is_rejected_as_output_dir(tmp_path, capsys):
    (tmp_path / "method.json").write_text("{}")
    (tmp_path / "config.yaml").write_text("seed: 0\n")
    assert main([f"output_dir={tmp_path}"]) == 2
    assert "contains a training run, not an evaluation" in capsys.readouterr().err


def test_only_the_built_in_model_is_evaluated_on_the_built_in_task_by_default(capsys):
    assert main(["model.path=a/model"]) == 2
    error = capsys.readouterr().err
    assert "model.path=a/model: no such run in " in error
    assert "to evaluate a model, set data.test_files or data.source as well" in error
    for model, more in (
        ("card_shuffles_tiny", []),
        ("a/model", [("data.source", "card_shuffles")]),
    ):
        config = load_evaluate_config(None, [("model.path", model), *more])
        assert config.data.source == "card_shuffles"
        assert config.rewards.functions == ("card_shuffles",)


@pytest.mark.parametrize("place", [".", "checkpoints/3", "hf", "config.yaml"])
def test_the_error_for_a_path_beside_or_inside_a_run_names_the_run(
    place, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "runs" / "mine"
    (run / "checkpoints" / "3").mkdir(parents=True)
    (run / "hf").mkdir()
    (run / "config.yaml").write_text("seed: 0\n")
    path = "runs" if place == "." else f"runs/mine/{place}"
    assert main([f"model.path={path}"]) == 2
    assert f"model.path={path}: no such run in {tmp_path}; did you mean runs/mine?" in (
        capsys.readouterr().err
    )


TRAINING = {
    "output_dir": "runs/mine",
    "seed": 7,
    "model": {"path": "a/model", "dtype": "bfloat16", "remat": "full"},
    "data": {"train_files": "x.jsonl", "prompt_suffix": "boxed"},
    "method": {"name": "grpo"},
    "sampling": {"max_completion_length": 99, "temperature": 0.9, "num_slots": 3},
    "rewards": {"functions": "math", "max_error_rate": 0.5},
    "evaluation": {"every": 5, "temperature": 0.8, "num_samples_by_source": {"aime*": 32}},
}


def test_an_evaluation_reads_model_data_and_rewards_from_a_training_config(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text(yaml.safe_dump(TRAINING))
    config = load_evaluate_config(file, [("sampling.num_slots", "5")])
    assert (config.model.path, config.model.dtype) == ("a/model", "bfloat16")
    assert (config.data.train_files, config.data.prompt_suffix) == (("x.jsonl",), "boxed")
    assert config.rewards.functions == ("math",)
    assert config.sampling.max_completion_length == 99
    assert config.evaluation.temperature == 0.8
    assert config.evaluation.num_samples_by_source == {"aime*": 32}
    assert config.evaluation.num_samples == 1
    # These fields are not inherited from the training config.
    assert (config.output_dir, config.seed) == (None, 0)
    assert config.sampling.num_slots == 5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data": {"trian_files": "x.jsonl"}}, "data.trian_files: unknown field; did you mean"),
        ({"data": 3}, "data=3: input should be an object"),
        ({"rewads": {}}, "rewads: unknown field; did you mean rewards?"),
        ({"rewards": {"functions": 3}}, "rewards.functions=3: input should be"),
    ],
)
def test_a_mistake_in_a_training_config_is_reported(change, message, tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text(yaml.safe_dump(TRAINING | change))
    with pytest.raises(UserError) as caught:
        load_evaluate_config(file, [])
    assert str(caught.value).startswith(f"{file}: {message}")


def test_a_mistake_in_the_config_of_a_run_is_attributed_to_its_file(tmp_path):
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(TRAINING | {"data": {"template": 3}}))
    with pytest.raises(UserError, match=rf"^{tmp_path}/config\.yaml: data\.template=3: "):
        load_evaluate_config(None, [("model.path", str(tmp_path)), ("seed", "3")])


def test_a_folder_without_a_checkpoint_is_rejected(tmp_path):
    (tmp_path / "config.yaml").write_text("data: {source: card_shuffles}\n")
    config = load_evaluate_config(None, [("model.path", str(tmp_path))])
    with pytest.raises(UserError, match="this run has no checkpoint yet"):
        load_model(config, Console())


@pytest.mark.slow
def test_an_unfinished_run_is_evaluated_at_its_newest_checkpoint_and_the_step_is_printed(
    finished_run, tmp_path, capsys
):
    """The run also has an exported model, because it had been complete before it was extended."""
    folder = tmp_path / "run"
    shutil.copytree(finished_run[0], folder)
    config = load_evaluate_config(None, [("model.path", str(folder))])
    load_model(config, Console())
    assert capsys.readouterr().out == ""
    (folder / "summary.json").unlink()
    load_model(config, Console())
    assert capsys.readouterr().out == (
        f"{folder}: this run is not complete; evaluating it after step 12\n"
    )


def test_data_and_grading_default_to_the_settings_of_the_run(tmp_path):
    data = {"source": "card_shuffles", "num_test": 5, "template": "none", "num_train": 8}
    run = {
        "data": data | {"max_prompt_length": 16},
        "rewards": {"timeout_secs": 9.0, "max_error_rate": 0.1},
        "sampling": {"max_completion_length": 64, "temperature": 1.0},
        "evaluation": {"every": 5, "splits": ["test"], "temperature": 0.8, "num_samples": 3},
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(run))
    config = load_evaluate_config(
        None, [("model.path", str(tmp_path)), ("data.num_test", "7"), ("seed", "1")]
    )
    assert (config.data.num_test, config.data.num_train, config.data.template) == (7, 8, "none")
    assert (config.rewards.timeout_secs, config.rewards.functions) == (9.0, ("card_shuffles",))
    assert config.sampling.max_completion_length == 64
    assert (config.evaluation.temperature, config.evaluation.num_samples) == (0.8, 3)
    given = [("model.path", str(tmp_path)), ("evaluation.temperature", "0.1")]
    assert load_evaluate_config(None, given).evaluation.temperature == 0.1


def test_files_do_not_inherit_the_grader_of_a_generated_task(tmp_path):
    """The grader of the run's task is not suitable for answers from files."""
    run = {
        "data": {"source": "card_shuffles", "max_prompt_length": 16, "prompt_suffix": "boxed"},
        "rewards": {"functions": ["card_shuffles"]},
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(run))
    given = [("model.path", str(tmp_path)), ("data.test_files", "x.jsonl")]
    with pytest.raises(UserError, match=r"rewards\.functions: not set"):
        load_evaluate_config(None, given)
    config = load_evaluate_config(None, [*given, ("rewards.functions", "math")])
    assert (config.data.source, config.data.prompt_suffix) == ("files", "boxed")
    assert config.data.max_prompt_length is None
    run["data"]["source"], run["rewards"]["functions"] = "files", ["multiple_choice"]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(run))
    assert load_evaluate_config(None, given).rewards.functions == ("multiple_choice",)


def test_an_evaluation_holds_out_the_same_problems_as_the_run(tmp_path):
    """Different values of these fields could put problems that the run was trained on into the test split."""
    data = {"source": "files", "train_files": ["x.jsonl"], "limit": 50, "num_test": 5, "seed": 3}
    run = {"data": data, "rewards": {"functions": ["math"]}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(run))
    model = ("model.path", str(tmp_path))
    config = load_evaluate_config(None, [model, ("data.num_test", "5")])
    assert (config.data.limit, config.data.num_test, config.data.seed) == (50, 5, 3)
    for field in ("limit", "num_test", "num_validation", "seed"):
        with pytest.raises(
            UserError, match=rf"data\.{field}=7: the run used .*; omit this field or"
        ):
            load_evaluate_config(None, [model, (f"data.{field}", "7")])
    config = load_evaluate_config(
        None, [model, ("data.test_files", "y.jsonl"), ("data.limit", "7")]
    )
    assert config.data.limit == 7


@pytest.mark.slow
def test_the_context_length_of_the_model_limits_an_evaluation(tmp_path, data, capsys):
    model = make_text_model(tmp_path / "model", max_position_embeddings=100)
    fields = [f"model.path={model}", f"data.test_files={data}", "rewards.functions=math"]
    fields += [f"output_dir={tmp_path / 'out'}", "data.limit=2"]
    assert main([*fields, "sampling.max_completion_length=99"]) == 2
    assert "exceeds the 100 positions of the model" in capsys.readouterr().err
    assert main(fields) == 0
    samples = read_samples(tmp_path / "out").values()
    assert samples
    assert all(len(sample["token_ids"]) < 100 for sample in samples)


def test_help_lists_the_fields_of_an_evaluation(capsys):
    assert main(["--help", "all"]) == 0
    text = capsys.readouterr().out
    assert "evaluation.num_samples  (int, 1; 8 for card_shuffles)" in text
    assert "evaluation.temperature  (float, 0.6; 1.0 for card_shuffles)" in text
    assert "train.num_steps" not in text


@pytest.mark.slow
def test_an_evaluation_warns_if_most_responses_contain_no_answer(data, tmp_path, capsys):
    short = arguments(data, tmp_path / "out", "evaluation.num_samples=1")
    assert main([*short, "sampling.max_completion_length=4"]) == 0
    output = capsys.readouterr().out
    assert "no answer" in output
    assert (
        "warning: the reward function card_shuffles found no answer in 100% of the responses, and"
        in output
    )
    records = read_samples(tmp_path / "out").values()
    assert [record["found_answer"] for record in records] == [False] * 12
