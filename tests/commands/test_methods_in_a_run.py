"""Tests whole runs in this process: a custom method, a budget, and the method's state after a resume."""

import inspect
import json
import shutil

import pytest

from trapo_jax.config import Config, load_config
from trapo_jax.losses import attenuated_cross_entropy_from_logprobs, probability_attenuation
from trapo_jax.methods import ALWAYS, NEVER, Method, Term, make_method
from trapo_jax.runs.console import Console
from trapo_jax.runs.loggers import read_metrics
from trapo_jax.train import main, train
from trapo_jax.types import MicroGroup, TokenKind

SMALL = {
    "train.problems_per_step": "2",
    "train.warmup_steps": "0",
    "evaluation.every": "0",
    "evaluation.num_samples": "1",
    "data.num_train": "8",
    "data.num_validation": "1",
    "data.num_test": "1",
}


def small_config(folder, **overrides):
    given = {**SMALL, "output_dir": str(folder), **overrides}
    return load_config(Config, None, list(given.items()))


def train_records(folder):
    return [
        {k: v for k, v in record.items() if not k.startswith("time/")}
        for record in read_metrics(folder)
        if record["kind"] == "train"
    ]


@pytest.mark.slow
def test_a_custom_method(tmp_path):
    def loss(x):
        return attenuated_cross_entropy_from_logprobs(
            x.logprobs, attenuation=probability_attenuation(), where=x.where
        )

    toy = Method(
        name="dft_on_half_the_expert",
        micro_groups=(MicroGroup(2, 0.0, NEVER), MicroGroup(1, 0.5, ALWAYS)),
        terms=(
            *make_method("grpo").terms,
            Term("dft", (TokenKind.EXPERT_TRAINED,), loss, 1.0, "token_mean", "1 - p"),
        ),
    )
    assert train(small_config(tmp_path / "toy", **{"train.num_steps": "1"}), toy).step == 1
    (record,) = train_records(tmp_path / "toy")
    assert 0 < record["loss/dft"] < 1
    assert record["guidance/ratio_mean"] == pytest.approx(0.5 / 3)


def test_a_custom_method_takes_at_most_25_lines():
    assert len(inspect.getsource(test_a_custom_method).splitlines()) <= 25


@pytest.mark.slow
def test_a_budget_ends_a_run_and_the_buffer_is_restored_after_a_resume(tmp_path):
    """ReLIFT, with its own optimizer state and buffer, yields bitwise identical results after a resume."""
    folder = tmp_path / "relift"
    config = small_config(
        folder,
        **{
            "method.name": "relift",
            "method.buffer_size": "2",
            "train.problems_per_step": "4",
            "data.num_train": "16",
            "train.num_steps": "50",
            "train.budget_unit": "problems",
            "train.budget": "16",
            "checkpoint.every": "2",
        },
    )
    assert train(config).summary
    expected = train_records(folder)
    assert [r["budget/progress"] for r in expected] == [0.25, 0.5, 0.75, 1.0]
    assert expected[-1]["tokens/sampled"] == sum(r["batch/completion_tokens"] for r in expected)
    rates = [r["optimizer/learning_rate"] for r in expected]
    assert rates[0] == rates[1] == pytest.approx(2e-4)
    # The run is three quarters complete.
    assert rates[3] == pytest.approx(2e-4 * (0.1 + 0.9 * 0.5))
    # Ensures that the test covers the buffer: the buffer's optimizer is used before and after the checkpoint, and the
    # buffer is not empty at the checkpoint.
    assert ["buffer/loss/total" in r for r in expected] == [True] * 4
    host = json.loads((folder / "checkpoints" / "2" / "host" / "data.json").read_text())
    assert len(host["method_state"]["unsolved"]) == 1
    written = {
        name: (folder / name).read_bytes() for name in ("samples.jsonl", "hf/model.safetensors")
    }
    shutil.rmtree(folder / "checkpoints" / "4")
    shutil.rmtree(folder / "hf")
    (folder / "summary.json").unlink()
    assert train(config).summary
    assert train_records(folder) == expected
    for name, content in written.items():
        assert (folder / name).read_bytes() == content
    assert json.loads((folder / "summary.json").read_text())


def test_progress_shows_the_number_of_steps_that_the_budget_allows(capsys):
    terminal = Console(500, first_step=0)
    values = {
        "loss/total": 0.1,
        "reward/sampled_mean": 0.5,
        "reward/num_sampled": 8,
        "reward/num_right": 4,
        "guidance/ratio_mean": 0.0,
        "guidance/ratio_max": 0.0,
        "completion/len_mean": 20.0,
        "time/tokens_per_sec": 1.0,
    }
    terminal.step(2, {**values, "budget/progress": 0.25}, secs=1.0)
    terminal.step(9, {**values, "budget/progress": 1.01}, secs=1.0)
    first, last = capsys.readouterr().out.splitlines()
    assert first.startswith("step 2/8 ")
    assert last.startswith("step 9/9 ")
    assert last.endswith("  0 s left")


def test_print_method_only_prints(tmp_path, capsys):
    folder = tmp_path / "run"
    assert main(["--print-method", f"output_dir={folder}", "method.name=hpt"]) == 0
    assert capsys.readouterr().out.startswith("hpt: HPT, arXiv 2509.04419, mix_trainer.py\n")
    assert not folder.exists()
    assert main(["--print-method", "method.name=hpt", "method.gat=1"]) == 2
    assert "did you mean gate?" in capsys.readouterr().err
