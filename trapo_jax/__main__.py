"""Implements the `trapo` console script: `trapo COMMAND ...` is equivalent to `python -m trapo_jax.COMMAND ...`."""

import ast
import difflib
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from trapo_jax import __version__
from trapo_jax.runs.command_line import EXIT_USER_ERROR, fail, run_and_exit

COMMANDS = (
    "train",
    "preview",
    "evaluate",
    "export",
    "compare",
    "report",
    "plan",
    "check_step",
    "completion",
)


def main() -> NoReturn:
    """Runs the command that the process was started with, and exits."""
    run_and_exit(lambda: dispatch(sys.argv[1:]))


def dispatch(arguments: Sequence[str]) -> int:
    """Runs a command and returns its exit code. Only the module of that command is imported.

    Args:
      arguments: the name of the command, followed by its arguments.
    """
    command, *rest = arguments or ["--help"]
    if command in ("--help", "-h"):
        print(help_text())
        return 0
    if command == "--version":
        print(f"trapo_jax {__version__}")
        return 0
    if command not in COMMANDS:
        close = difflib.get_close_matches(command, COMMANDS, n=1)
        hint = f"did you mean {close[0]}?" if close else f"choose one of {', '.join(COMMANDS)}"
        return fail(f"{command}: no such command; {hint}", EXIT_USER_ERROR)
    return importlib.import_module(f"trapo_jax.{command}").main(rest)


def help_text() -> str:
    """Returns the list of commands, each with the first sentence of its module docstring."""
    width = max(map(len, COMMANDS))
    lines = ["usage: trapo COMMAND [--help] ..., or trapo --version", ""]
    lines += [f"  {command:{width}}  {_first_sentence(command)}" for command in COMMANDS]
    return "\n".join(lines)


def _first_sentence(command: str) -> str:
    """Returns the first sentence of a command's module docstring.

    The docstring is read from the source file, because importing a command takes seconds.
    """
    source = Path(__file__).with_name(f"{command}.py").read_text(encoding="utf-8")
    docstring = ast.get_docstring(ast.parse(source)) or ""
    return docstring.split("\n")[0].partition(". ")[0].removesuffix(".") + "."


if __name__ == "__main__":
    main()
