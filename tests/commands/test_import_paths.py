"""Tests user-defined methods, reward functions, templates and engines that are selected by import path."""

import json

import pytest

from support.console_script import run_console_script
from trapo_jax.runs.loggers import read_metrics
from trapo_jax.train import main as train

MINE = """
import json
from pathlib import Path

from trapo_jax.methods import Hyperparameters, make_method
from trapo_jax.sampling.jax_engine import JaxEngine

class Half(Hyperparameters):
    num_rollouts: int = 2
    \"\"\"Rollouts per problem.\"\"\"

    def make(self):
        return make_method("grpo", num_rollouts=self.num_rollouts)

def ends_well(response, problem):
    return response.rstrip().endswith(problem.answer)

def plain(messages):
    return messages[-1].content

class CountingEngine:
    \"\"\"Wraps the JAX engine and counts the accesses to each member.\"\"\"

    def __init__(self, spec):
        self.engine, self.calls = JaxEngine(spec), {"model": spec.model_folder.name}

    def __getattr__(self, name):
        self.calls[name] = self.calls.get(name, 0) + 1
        Path(__file__).with_name("calls.json").write_text(json.dumps(self.calls))
        return getattr(self.engine, name)
"""

SHORT = (
    "train.num_steps=2",
    "train.problems_per_step=2",
    "data.num_train=4",
    "data.num_validation=1",
    "data.num_test=2",
    "evaluation.num_samples=1",
)


@pytest.mark.slow
def test_objects_in_a_user_file_are_used(tmp_path):
    (tmp_path / "mine.py").write_text(MINE)
    result = run_console_script(
        tmp_path,
        "train",
        "output_dir=run",
        "method.name=mine:Half",
        "method.num_rollouts=3",
        "rewards.functions=mine:ends_well",
        "rewards.timeout_secs=60",
        "data.template=mine:plain",
        "sampling.engine=mine:CountingEngine",
        *SHORT,
    )
    assert result.returncode == 0, result.stderr
    calls = json.loads((tmp_path / "calls.json").read_text())
    assert calls.pop("model") == "card_shuffles_tiny"
    assert calls["update_weights"] > 2
    assert calls["step"] > 2
    assert "engine: mine:CountingEngine" in (tmp_path / "run" / "config.yaml").read_text()
    records = [r for r in read_metrics(tmp_path / "run") if r["kind"] == "train"]
    assert [record["reward/error_rate"] for record in records] == [0, 0]
    with open(tmp_path / "run" / "samples.jsonl") as lines:
        samples = [json.loads(line) for line in lines]
    assert len(samples) == 2 * 2 * 3
    for sample in samples:
        ends = sample["completion"].removesuffix("<eos>").endswith(sample["gold"])
        assert sample["is_correct"] == ends
    assert json.loads((tmp_path / "run" / "method.json").read_text())["name"] == "mine:Half"
    data = json.loads((tmp_path / "run" / "data.json").read_text())
    assert data["template"]["kind"] == "mine:plain"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            "rewards.functions=maths",
            "rewards.functions='maths': no such reward function; did you mean math?",
        ),
        (
            "rewards.functions=my_rewards.exact",
            "rewards.functions='my_rewards.exact': no such reward function; did you mean my_rewards:exact?",
        ),
        ("rewards.by_source={a: my_rewards.exact}", "did you mean my_rewards:exact?"),
        ("rewards.functions=xyz", "or an import path of the form package.module:name"),
        ("rewards.functions=mine.py:exact", "package.module:name; did you mean mine:exact?"),
        ("data.template=mine.plain", "no such template; did you mean mine:plain?"),
        ("method.name=mine.Half", "no such method; did you mean mine:Half?"),
        ("sampling.engine=mine.Engine", "no such engine; did you mean mine:Engine?"),
        ("rewards.functions=no_module:x", "rewards.functions=no_module:x: no module 'no_module'"),
        ("rewards.functions=math:pi", "rewards.functions=math:pi: not a function; expected"),
        ("data.template=chatlm", "data.template='chatlm': no such template; did you mean chatml?"),
        ("data.template=math:pi", "data.template=math:pi: not a function of chat messages"),
        (
            "data.template=math:sqrt",
            "data.template=math:sqrt: raises TypeError for messages with the roles user",
        ),
        ("method.name=math:pi", "method.name=math:pi"),
        ("sampling.engine=math:pi", "sampling.engine=math:pi"),
        ("sampling.engine=no_module:E", "sampling.engine=no_module:E: no module 'no_module'"),
    ],
)
def test_a_wrong_name_or_path_causes_a_one_line_error_and_creates_no_files(
    change, message, tmp_path, capsys
):
    assert train([f"output_dir={tmp_path / 'run'}", *SHORT, change]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
