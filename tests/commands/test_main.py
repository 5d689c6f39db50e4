"""Tests the dispatcher `trapo COMMAND ...`, both as a console script and as `python -m trapo_jax`."""

import subprocess
import sys

import pytest

import trapo_jax
from support.commands import run_process
from support.console_script import run_console_script
from trapo_jax.__main__ import COMMANDS, dispatch


@pytest.mark.parametrize("arguments", [[], ["--help"]])
def test_help_describes_every_command_in_one_sentence(arguments, capsys):
    assert dispatch(arguments) == 0
    listed = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines()[2:])
    assert set(listed) == set(COMMANDS)
    assert all(sentence.endswith(".") and sentence.count(".") == 1 for sentence in listed.values())


def test_the_version_is_that_of_the_package(capsys):
    assert dispatch(["--version"]) == 0
    assert capsys.readouterr().out == f"trapo_jax {trapo_jax.__version__}\n"


def test_help_does_not_import_jax():
    code = "import sys; from trapo_jax.__main__ import dispatch; dispatch([]); sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


def test_an_unknown_command_causes_a_one_line_error_with_a_suggestion(capsys):
    assert dispatch(["trian"]) == 2
    assert capsys.readouterr().err == "error: trian: no such command; did you mean train?\n"
    assert dispatch(["x"]) == 2
    assert capsys.readouterr().err.endswith(f"choose one of {', '.join(COMMANDS)}\n")


@pytest.mark.slow
def test_the_console_script_and_the_modules_behave_the_same(tmp_path):
    results = [
        run_console_script(tmp_path, "report", tmp_path / "absent"),
        run_process("trapo_jax", "report", tmp_path / "absent"),
        run_process("trapo_jax.report", tmp_path / "absent"),
    ]
    assert {result.returncode for result in results} == {2}
    assert len({result.stderr for result in results}) == 1
    assert f"error: {tmp_path / 'absent'}: not a run directory" in results[0].stderr
