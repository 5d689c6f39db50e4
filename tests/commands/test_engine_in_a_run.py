"""Whole runs with a user-defined rollout engine."""

import json
import os

from support.commands import REPOSITORY, run_command

ENGINE = """
import json
from pathlib import Path

from trapo_jax.sampling.jax_engine import JaxEngine

CALLS = Path(__file__).with_name("calls.json")


class MyEngine:
    '''Wraps the JAX engine and counts the accesses to each member.'''

    def __init__(self, spec):
        self.engine, self.calls = JaxEngine(spec), {"model": spec.model_folder.name}

    def __getattr__(self, name):
        self.calls[name] = self.calls.get(name, 0) + 1
        CALLS.write_text(json.dumps(self.calls))
        return getattr(self.engine, name)
"""
SHORT = (
    "train.num_steps=2",
    "evaluation.num_samples=1",
    "data.num_validation=4",
    "data.num_test=4",
)


def test_a_run_uses_the_engine_from_the_command_line(tmp_path):
    (tmp_path / "my_engine.py").write_text(ENGINE)
    search_path = os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])
    result = run_command(
        "trapo_jax.train",
        f"output_dir={tmp_path / 'run'}",
        "sampling.engine=my_engine:MyEngine",
        *SHORT,
        cwd=tmp_path,
        PYTHONPATH=search_path,
    )
    assert result.returncode == 0, result.stderr
    calls = json.loads((tmp_path / "calls.json").read_text())
    assert calls.pop("model") == "card_shuffles_tiny"
    assert calls["update_weights"] > 2
    assert calls["step"] > 2
    assert "engine: my_engine:MyEngine" in (tmp_path / "run" / "config.yaml").read_text()


def test_an_engine_that_cannot_be_imported_is_a_one_line_error(tmp_path):
    result = run_command(
        "trapo_jax.train",
        f"output_dir={tmp_path / 'run'}",
        "sampling.engine=no_module:Engine",
        *SHORT,
    )
    assert result.returncode == 2
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert line.startswith("error: sampling.engine=no_module:Engine: no module 'no_module'")
