"""The dispatcher `trapo COMMAND ...`, as a console script and as `python -m trapo_jax`."""

import os
import subprocess
import sys
import tomllib

import pytest

from support.commands import CACHE_ENV, REPOSITORY, run_command
from trapo_jax.__main__ import COMMANDS, dispatch

ENGINE = """
from trapo_jax.sampling.jax_engine import JaxEngine


class MyEngine(JaxEngine):
    pass
"""
SHORT = (
    "train.num_steps=1",
    "evaluation.num_samples=1",
    "data.num_validation=2",
    "data.num_test=2",
)


@pytest.fixture
def trapo(tmp_path):
    """Runs the console script from pyproject.toml outside of the repository, as if it had been installed."""
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    module, _, function = project["scripts"]["trapo"].partition(":")
    script = tmp_path / "bin" / "trapo"
    script.parent.mkdir()
    script.write_text(f"import sys\nfrom {module} import {function}\nsys.exit({function}())\n")
    search_path = os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])

    def run(*arguments):
        return subprocess.run(
            [sys.executable, str(script), *map(str, arguments)],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            env={**os.environ, **CACHE_ENV, "PYTHONPATH": search_path},
        )

    return run


@pytest.mark.parametrize("arguments", [[], ["--help"]])
def test_help_describes_every_command_in_one_sentence(arguments, capsys):
    assert dispatch(arguments) == 0
    listed = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines()[2:])
    assert set(listed) == set(COMMANDS)
    assert all(sentence.endswith(".") and sentence.count(".") == 1 for sentence in listed.values())


def test_help_does_not_import_jax():
    code = "import sys; from trapo_jax.__main__ import dispatch; dispatch([]); sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


def test_an_unknown_command_is_a_one_line_error_with_a_suggestion(capsys):
    assert dispatch(["trian"]) == 2
    assert capsys.readouterr().err == "error: trian: no such command; did you mean train?\n"
    assert dispatch(["x"]) == 2
    assert capsys.readouterr().err.endswith(f"give one of {', '.join(COMMANDS)}\n")


def test_the_console_script_and_the_modules_behave_the_same(trapo, tmp_path):
    arguments = ("export", "--checkpoint", tmp_path / "absent", "--out", tmp_path / "out")
    results = [
        trapo(*arguments),
        run_command("trapo_jax", *arguments),
        run_command("trapo_jax.export", *arguments[1:]),
    ]
    assert {result.returncode for result in results} == {2}
    assert len({result.stderr for result in results}) == 1
    assert "give a path of the form RUN/checkpoints/STEP" in results[0].stderr


def test_the_console_script_imports_modules_in_the_working_directory(trapo, tmp_path):
    (tmp_path / "my_engine.py").write_text(ENGINE)
    result = trapo(
        "train", f"output_dir={tmp_path / 'run'}", "sampling.engine=my_engine:MyEngine", *SHORT
    )
    assert result.returncode == 0, result.stderr
