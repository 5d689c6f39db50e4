"""Converts errors, Ctrl-C, closed pipes and exhausted resources into exit codes and one-line messages."""

import argparse
import contextlib
import functools
import io
import logging
import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn

import trapo_jax.distributed.log_level  # noqa: F401  must be imported before libtpu is loaded
from trapo_jax.inputs.printable import printable
from trapo_jax.runs.system_errors import (
    EXIT_BROKEN_PIPE,
    EXIT_INTERRUPTED,
    EXIT_USER_ERROR,
    OUTPUT,
    check_limits,
    discard,
    explain,
    named_in_errors,
    print_error,
    remedy_of_exhaustion,
    report,
    report_in_native_thread,
    report_unraisable,
)
from trapo_jax.types import EXIT_FAILED, TrainingFailed, UserError


class ArgumentParser(argparse.ArgumentParser):
    """A parser that reports invalid arguments as a one-line `UserError`, without listing all options."""

    def error(self, message: str) -> NoReturn:
        raise UserError(
            f"command line: {message.removeprefix('argument ')}; --help lists the options"
        )


def command(main: Callable[[Sequence[str]], int]) -> Callable[..., int]:
    """Decorates a command's main function so that errors become one line on standard error and an exit code.

    Warnings logged by the package are also printed, one per line.

    The decorated function takes the command-line arguments, which default to `sys.argv[1:]`.
    """

    @functools.wraps(main)
    def run(arguments: Sequence[str] | None = None) -> int:
        try:
            with _warnings_as_lines():
                check_limits()
                return main(sys.argv[1:] if arguments is None else arguments)
        except UserError as error:
            if remedy := remedy_of_exhaustion(error):
                return fail(f"{error}; {remedy}", EXIT_FAILED)
            return fail(str(error), EXIT_USER_ERROR)
        except TrainingFailed as error:
            return fail(str(error), EXIT_FAILED)
        except BrokenPipeError:
            raise
        except Exception as error:
            if (explained := explain(error)) is None:
                raise
            return fail(*explained)

    return run


class _LineHandler(logging.Handler):
    """Prints a log record on one line, without the logger's name."""

    def emit(self, record: logging.LogRecord) -> None:
        print(f"{record.levelname.lower()}: {printable(record.getMessage())}", file=sys.stderr)


@contextlib.contextmanager
def _warnings_as_lines() -> Iterator[None]:
    """Prints the package's log records, and keeps other handlers (such as those of libraries) from printing them."""
    logger, handler = logging.getLogger("trapo_jax"), _LineHandler(logging.WARNING)
    propagates, logger.propagate = logger.propagate, False
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.propagate = propagates


def run_and_exit(main: Callable[[], int]) -> NoReturn:
    """Runs `main` and exits with its return value; see `exit_code_of`."""
    sys.excepthook, sys.unraisablehook = report_in_native_thread, report_unraisable
    code = exit_code_of(main)
    if isinstance(code, int) and code and "jax" in sys.modules:
        from trapo_jax.distributed.failures import exit_failed  # Imports JAX, which takes a second.

        exit_failed(code)
    if isinstance(code, int) and code and _has_running_threads():
        os._exit(code)
    sys.exit(code)


def exit_code_of(main: Callable[[], int]) -> Any:
    """Runs `main` and returns its exit code.

    Ctrl-C, a closed pipe (`| head`) and a lack of memory do not cause a traceback. Characters that standard output
    cannot encode are escaped.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    code: Any = 0
    try:
        try:
            code = main()
        except SystemExit as error:  # Raised by argparse.
            code = error.code
        with named_in_errors(OUTPUT):
            sys.stdout.flush()
    except KeyboardInterrupt:
        code = fail("stopped", EXIT_INTERRUPTED)
    except BrokenPipeError:
        code = EXIT_BROKEN_PIPE
    except Exception as error:
        code = report(error)
    try:
        sys.stdout.flush()
    except OSError:  # The output is a closed pipe or a file on a full disk.
        discard(sys.stdout)
    return code


def _has_running_threads() -> bool:
    """Returns whether Python would wait for other threads at exit. After a failed save, Orbax's threads never end."""
    threads = set(threading.enumerate()) - {threading.main_thread()}
    return any(not thread.daemon for thread in threads)


def fail(message: str, code: int) -> int:
    """Prints an error to standard error and returns the exit code."""
    print_error(message)
    return code
