"""Tests whole runs: output files, other methods, and export.

`tests/faults/test_stopped_runs.py` tests that runs with the same seed are bitwise identical.
"""

import json

import numpy as np
import pytest

from support.commands import TINY_MODEL, run_command
from support.engines import make_engine
from support.short_run import JOB, TINY_JOB
from trapo_jax import train as train_module
from trapo_jax.config import Config, load_config, parse_command_line
from trapo_jax.evaluation import scoring
from trapo_jax.runs.loggers import read_metrics

NUM_VALIDATION = 6  # different from the sizes of the other splits


def train(folder, *arguments):
    return run_command("trapo_jax.train", f"output_dir={folder}", *JOB, *arguments)


def untimed(folder):
    """Returns the metrics without the measured times."""
    return [
        {k: v for k, v in record.items() if not k.startswith("time/")}
        for record in read_metrics(folder)
    ]


@pytest.mark.slow
def test_a_run_writes_the_documented_files(finished_run):
    folder, output = finished_run
    names = {path.name for path in folder.iterdir()}
    assert names == {
        ".lock",
        "config.yaml",
        "data.json",
        "method.json",
        "run.json",
        "evaluations",
        "metrics.jsonl",
        "samples.jsonl",
        "tb",
        "checkpoints",
        "hf",
        "model",
        "summary.json",
        "report.html",
    }
    scores = {
        r["step"]: r["eval/accuracy_sampled"]
        for r in read_metrics(folder)
        if r["kind"] == "eval" and r["split"] == "validation"
    }
    # Of several steps with the same score, the earliest is the best.
    best = max(scores, key=lambda step: (scores[step], -step))
    saved = {3, 6, 9, 12} | {step for step in scores if scores[step] > scores.get(step - 5, -1)}
    kept = {best, *sorted(saved)[-2:]}
    assert {int(p.name) for p in (folder / "checkpoints").iterdir()} == kept
    assert "accuracy_greedy" in output
    assert str(folder / "hf") in output


def test_metrics_have_the_names_that_scripts_rely_on(finished_run):
    records = read_metrics(finished_run[0])
    train_records = [r for r in records if r["kind"] == "train"]
    assert [r["step"] for r in train_records] == list(range(1, 13))
    assert [(r["step"], r["split"]) for r in records if r["kind"] == "eval"] == [
        (0, "test"),
        (5, "validation"),
        (10, "validation"),
        (12, "test"),
    ]
    for name in (
        "reward/mean",
        "reward/sampled_mean",
        "reward/no_answer",
        "loss/trsft",
        "loss/policy_gradient",
        "guidance/ratio_mean",
        "guidance/ratio_max",
        "tokens/trained",
        "tokens/sampled",
        "time/sample_secs",
        "time/reward_secs",
        "time/train_secs",
        *(f"guidance/level_{i}" for i in range(4)),
    ):
        assert all(isinstance(r[name], (int, float)) for r in train_records), name
    for name in ("eval/accuracy_greedy", "eval/accuracy_sampled", "eval/pass@2"):
        assert 0 <= records[0][name] <= 1
    last = train_records[-1]
    assert abs(sum(last[f"guidance/level_{i}"] for i in range(4)) - 1) < 1e-6
    assert last["tokens/sampled"] == sum(r["batch/completion_tokens"] for r in train_records)
    assert max(r["policy/logprob_gap_max"] for r in train_records) < 1e-4


def test_the_scores_match_the_results_of_the_individual_problems(finished_run):
    folder, _ = finished_run
    assert {p.name for p in (folder / "evaluations").iterdir()} == {
        "test_0.json",
        "validation_5.json",
        "validation_10.json",
        "test_12.json",
    }
    problems = json.loads((folder / "evaluations" / "test_12.json").read_text())
    summary = json.loads((folder / "summary.json").read_text())["test"]["after"]
    assert len(set(problems["id"])) == 24
    assert sum(problems["correct"]) / (24 * 2) == summary["eval/accuracy_sampled"]
    assert sum(problems["greedy"]) / 24 == summary["eval/accuracy_greedy"]
    assert 0 < summary["eval/entropy"] < 3


def test_sampled_rollouts_are_consistent(finished_run):
    with open(finished_run[0] / "samples.jsonl") as file:
        samples = [json.loads(line) for line in file]
    assert len(samples) == 12 * 4 * 8
    for sample in samples:
        assert (sample["reward"] == 1.0) == sample["is_correct"]
        response = sample["prefix"] + sample["completion"]
        if sample["reward"]:
            assert response.endswith(f"#{sample['answer']}<eos>")
        tokens = sample["tokens"]
        assert "".join(tokens["pieces"]) == response
        assert len({len(tokens[name]) for name in tokens}) == 1


@pytest.mark.slow
def test_another_seed_gives_other_metrics(finished_run, tmp_path):
    assert train(tmp_path / "other", "seed=1", "train.num_steps=3").returncode == 0
    assert untimed(tmp_path / "other")[1] != untimed(finished_run[0])[1]


def test_the_scores_of_a_complete_run_are_shown_again_and_nothing_is_overwritten(finished_run):
    folder, _ = finished_run
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()}
    result = train(folder)
    assert result.returncode == 0
    assert "accuracy_greedy" in result.stdout
    assert {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()} == before


def test_another_config_in_the_same_folder_is_rejected(finished_run):
    result = train(finished_run[0], "train.learning_rate=1e-3")
    assert result.returncode == 2
    assert "contains a run with train.learning_rate=0.0002, not 0.001" in result.stderr
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.slow
@pytest.mark.parametrize("method", ["grpo", "sft"])
def test_other_methods_use_the_same_train_step(tmp_path, method):
    result = train(tmp_path / method, f"method.name={method}", "train.num_steps=3")
    assert result.returncode == 0, result.stderr
    record = read_metrics(tmp_path / method)[1]
    assert record["guidance/ratio_mean"] == (1.0 if method == "sft" else 0.0)
    assert ("loss/cross_entropy" in record) == (method == "sft")
    assert ("loss/policy_gradient" in record) == (method == "grpo")


@pytest.mark.slow
def test_several_updates_per_batch_change_the_policy_ratio(tmp_path):
    result = train(
        tmp_path / "r",
        "train.num_steps=2",
        "train.num_iterations=3",
        "train.learning_rate=1e-3",
        "method.clip_low=0.2",
        "method.clip_high=0.2",
        "method.kl_weight=0.1",
    )
    assert result.returncode == 0, result.stderr
    first, second = (r for r in read_metrics(tmp_path / "r") if r["kind"] == "train")
    assert first["policy/ratio_max"] > 1.001
    assert first["policy/logprob_gap_max"] < 1e-4  # the gap between the sampler and the old policy
    assert 0 < first["loss/kl"] < second["loss/kl"] < 0.1


@pytest.mark.slow
def test_problems_of_the_next_step_fill_idle_slots_if_staleness_is_allowed(tmp_path):
    arguments = ("sampling.max_staleness=1", "train.num_steps=4", "sampling.segment_len=4")
    result = train(tmp_path / "r", *arguments)
    assert result.returncode == 0, result.stderr
    records = [r for r in read_metrics(tmp_path / "r") if r["kind"] == "train"]
    assert [r["sampling/stale_tokens"] > 0 for r in records] == [False, True, True, True]
    assert records[0]["policy/ratio_max"] < 1.001
    assert max(r["policy/ratio_max"] for r in records) > 1.001
    assert all(r["sampling/stale_tokens"] < 4 * 8 * 64 for r in records)


def test_staleness_is_rejected_if_guidance_depends_on_the_step(tmp_path):
    result = train(tmp_path / "r", "sampling.max_staleness=1", "method.name=sft_then_grpo")
    assert result.returncode == 2
    (line,) = result.stderr.strip().splitlines()
    assert line.startswith(
        "error: sampling.max_staleness=1: the guidance of method.name=sft_then_grpo"
    )


@pytest.mark.slow
def test_the_reference_preset_runs(tmp_path):
    assert train(tmp_path / "r", "method.preset=reference", "train.num_steps=3").returncode == 0


@pytest.mark.slow
def test_export_loads_in_transformers_with_equal_logits_and_greedy_answers(finished_run):
    torch = pytest.importorskip("torch", reason="torch is not installed (parity with transformers)")
    import jax
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from trapo_jax.data import card_shuffles_splits, encode_examples
    from trapo_jax.models import apply_decoder, load_params, read_config, unembedding
    from trapo_jax.types import RolloutRequest, SamplingParams

    folder = finished_run[0] / "hf"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    config = read_config(folder)
    params = jax.device_put(load_params(folder, config))
    splits = card_shuffles_splits(seed=0, num_train=1, num_validation=1, num_test=20)
    problems, _ = encode_examples(splits["test"], tokenizer, max_prompt_length=16)
    engine = make_engine(config, params, eos_ids=[tokenizer.eos_token_id])
    engine.submit([RolloutRequest(p, 0) for p in problems], step=0, params=SamplingParams(0.0))
    answers = {}
    while engine.is_busy:
        answers |= {c.request.problem.id: c.token_ids for c in engine.step()}
    for problem in problems:
        prompt = torch.tensor([problem.prompt_ids])
        theirs = model.generate(
            prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=64
        )[0, prompt.shape[1] :]
        assert tuple(theirs.tolist()) == answers[problem.id]
        ids = np.array([problem.prompt_ids + answers[problem.id]])
        hidden, _ = apply_decoder(
            config, params, ids, np.arange(ids.shape[1])[None], np.ones_like(ids)
        )
        with torch.no_grad():
            logits = model(torch.tensor(ids)).logits.numpy()
        np.testing.assert_allclose(hidden @ unembedding(params), logits, atol=1e-4)


def test_the_built_in_model_has_the_documented_shape():
    assert (TINY_MODEL / "model.safetensors").stat().st_size < 2 * 2**20
    config = json.loads((TINY_MODEL / "config.json").read_text())
    assert (config["hidden_size"], config["num_hidden_layers"]) == (96, 3)
    assert (config["num_attention_heads"], config["intermediate_size"]) == (3, 256)


def test_an_exported_checkpoint_equals_the_model_of_the_run(finished_run, tmp_path):
    folder, _ = finished_run
    checkpoint = folder / "checkpoints" / "12"
    arguments = ("trapo_jax.export", "--checkpoint", checkpoint, "--out", tmp_path / "out")
    result = run_command(*arguments)
    assert result.returncode == 0, result.stderr
    for file in (folder / "hf").iterdir():
        assert (tmp_path / "out" / file.name).read_bytes() == file.read_bytes()
    again = run_command(*arguments)
    assert again.returncode == 2
    assert "already exists" in again.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("accuracies", "best"), [((0.1, 0.5, 0.3, 0.4), 2), ((0.1, 0.2, 0.3, 0.4), 4)]
)
def test_the_best_checkpoint_is_tested_and_exported(accuracies, best, tmp_path, monkeypatch):
    """The accuracies on the validation split, which is evaluated after each step, are fabricated."""
    remaining = iter([0.0, *accuracies])

    def evaluate(sample, problems, **options):
        result = scoring.evaluate(sample, problems, **options)
        if len(problems) != NUM_VALIDATION:
            return result
        return result._replace(metrics=result.metrics | {"eval/accuracy_sampled": next(remaining)})

    monkeypatch.setattr(train_module, "evaluate", evaluate)
    job = [*TINY_JOB, "train.num_steps=4", "evaluation.every=1", "checkpoint.keep=4"]
    job += ["evaluation.splits=[test, validation]", f"data.num_validation={NUM_VALIDATION}"]
    job += ["checkpoint.keep_best=1", "checkpoint.load_best_model_at_end=true"]
    folder = tmp_path / "run"
    config = load_config(Config, *parse_command_line([*job, f"output_dir={folder}"]))
    summary = train_module.train(config).summary
    assert summary is not None
    scores = summary["validation"]
    assert scores["before"]["eval/accuracy_sampled"] == 0
    assert scores["after"]["eval/accuracy_sampled"] == accuracies[best - 1]
    checkpoint = folder / "checkpoints" / str(best)
    run_command(
        "trapo_jax.export", "--checkpoint", checkpoint, "--out", tmp_path / "out"
    ).check_returncode()
    name = "model.safetensors"
    assert (tmp_path / "out" / name).read_bytes() == (folder / "hf" / name).read_bytes()


@pytest.mark.parametrize(
    ("checkpoint", "message"),
    [
        ("checkpoints/7", "no such checkpoint; existing steps: .*12"),
        ("hf", "not a checkpoint of a run"),
    ],
)
def test_exporting_anything_but_a_checkpoint_causes_a_one_line_error(
    checkpoint, message, finished_run, tmp_path
):
    from trapo_jax.runs.saved_model import load_checkpoint
    from trapo_jax.types import UserError

    with pytest.raises(UserError, match=message):
        load_checkpoint(finished_run[0] / checkpoint)


@pytest.mark.slow
def test_training_on_files(tmp_path, capsys):
    """Training on JSONL files with the built-in task's problems in TRL's columns equals training on the task itself."""
    from trapo_jax.data import card_shuffles_splits
    from trapo_jax.train import main

    splits = card_shuffles_splits(seed=0, num_train=16, num_validation=4, num_test=4)
    for name, split in splits.items():
        rows = [
            {"prompt": e.prompt, "answer": e.answer, "solution": e.solutions[0], "source": e.source}
            for e in split
        ]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = ("train.num_steps=1", "evaluation.num_samples=2")
    sizes = ("data.num_train=16", "data.num_validation=4", "data.num_test=4")
    procedural = train(tmp_path / "a", *common, *sizes)
    files = [f"data.{name}_files={tmp_path}/{name}.jsonl" for name in splits]
    common += (
        *("model.path=card_shuffles_tiny", "rewards.functions=card_shuffles"),
        *("data.template=none", "data.max_prompt_length=16", "sampling.max_completion_length=64"),
        *("train.learning_rate=2e-4", "train.decay_start=0.5", "train.adam_b2=0.98", *files),
        "evaluation.temperature=1",
    )
    from_files = train(tmp_path / "b", *common)
    assert procedural.returncode == from_files.returncode == 0, from_files.stderr
    assert untimed(tmp_path / "a") == untimed(tmp_path / "b")
    data = json.loads((tmp_path / "b" / "data.json").read_text())
    assert data["template"]["kind"] == "none"
    assert [stage["num_kept"] for stage in data["splits"]["train"]] == [16, 16]
    # The run cannot be resumed with different data.
    (tmp_path / "b" / "summary.json").unlink()
    file = tmp_path / "train.jsonl"
    file.write_text(file.read_text().replace('"answer": "', '"answer": "1', 1))
    assert main([f"output_dir={tmp_path / 'b'}", *JOB, *common]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"the problems of data.train_files={file} changed since the run started" in line


def test_splits_without_files_are_held_out(tmp_path):
    from trapo_jax.config import Config, load_config
    from trapo_jax.data.splits import read_splits

    rows = [{"question": f"Q{i}", "answer": f"It is {i}.\n#### {i}"} for i in range(20)]
    file = tmp_path / "gsm.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    overrides = {
        "data.source": "files",
        "data.train_files": str(file),
        "model.path": "card_shuffles_tiny",
        "rewards.functions": "math",
        "data.num_validation": "3",
        "data.num_test": "5",
    }
    examples, reports, _ = read_splits(load_config(Config, None, list(overrides.items())).data)
    assert {name: len(split) for name, split in examples.items()} == {
        "train": 12,
        "validation": 3,
        "test": 5,
    }
    assert sorted(int(e.answer) for split in examples.values() for e in split) == list(range(20))
    assert list(reports) == ["train"]
