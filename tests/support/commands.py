"""Runs commands as users do, in this process or in a separate one."""

import contextlib
import importlib
import io
import os
import subprocess
import sys
from pathlib import Path

from trapo_jax.runs.command_line import exit_code_of

REPOSITORY = Path(__file__).parents[2]
TINY_MODEL = REPOSITORY / "trapo_jax" / "assets" / "card_shuffles_tiny"


def run_command(module, *arguments, cwd=REPOSITORY):
    """Runs the equivalent of `python -m MODULE ARGUMENTS` in this process.

    This is faster than a separate process, because most of what the command needs is already imported and compiled.

    Returns:
      A completed process with the exit code and the output.
    """
    main = importlib.import_module(module).main
    out, err, search_path = io.StringIO(), io.StringIO(), list(sys.path)
    with (
        contextlib.chdir(cwd),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        code = exit_code_of(lambda: main(list(map(str, arguments))))
    sys.path[:] = search_path
    return subprocess.CompletedProcess([module, *arguments], code, out.getvalue(), err.getvalue())


def run_process(module, *arguments, cwd=REPOSITORY, **environment):
    """Runs `python -m MODULE ARGUMENTS` and returns the completed process with its output as text.

    The process has no time limit of its own, because a busy machine may take many times longer than an idle one. The
    `timeout` in pyproject.toml ends tests that hang.
    """
    return run_python("-m", module, *arguments, cwd=cwd, **environment)


def run_python(*arguments, cwd=REPOSITORY, **environment):
    """Runs `python ARGUMENTS` and returns the completed process with its output as text."""
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=cwd,
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
    )
