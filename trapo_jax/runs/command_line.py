"""Exit codes and error lines of the commands, and their handling of Ctrl-C and closed pipes."""

import contextlib
import functools
import io
import os
import sys
import threading
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from trapo_jax.runs.console import OUTPUT, discard, printable
from trapo_jax.runs.system_errors import (
    EXIT_BROKEN_PIPE,
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    EXIT_USER_ERROR,
    check_threads,
    explain,
    remedy_of_exhaustion,
    report,
)
from trapo_jax.types import TrainingFailed, UserError


def command(main: Callable[[Sequence[str]], int]) -> Callable[..., int]:
    """Decorates the main function of a command to turn errors into a line on standard error and an exit code.

    The decorated function takes the command-line arguments; they default to those of the process.
    """

    @functools.wraps(main)
    def run(arguments: Sequence[str] | None = None) -> int:
        try:
            check_threads()
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


def run_and_exit(main: Callable[[], int]) -> NoReturn:
    """Runs `main` and exits with its return value, without a traceback on Ctrl-C or a closed pipe (`| head`).

    What standard output cannot encode is escaped.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    code: Any = 0
    try:
        try:
            code = main()
        except SystemExit as error:  # raised by argparse
            code = error.code
        sys.stdout.flush()
    except KeyboardInterrupt:
        code = fail("stopped", EXIT_INTERRUPTED)
    except BrokenPipeError:
        code = EXIT_BROKEN_PIPE
        discard(sys.stdout)
    except OSError as error:  # Standard output is a file on a full disk.
        code = code or fail(f"{OUTPUT}: {error.strerror}", EXIT_FAILED)
        discard(sys.stdout)
    except Exception as error:
        code = report(error)
    if isinstance(code, int) and code and has_running_threads():
        os._exit(code)
    sys.exit(code)


def has_running_threads() -> bool:
    """Whether Python would wait for threads at exit: those of Orbax wait forever for the rest of a failed save."""
    threads = set(threading.enumerate()) - {threading.main_thread()}
    return any(not thread.daemon for thread in threads)


def fail(message: str, code: int) -> int:
    """Prints an error to standard error and returns the exit code."""
    with contextlib.suppress(OSError):  # Standard error may be a file on a full disk.
        # Config errors have several lines.
        print("error:", printable(message, keep="\n"), file=sys.stderr, flush=True)
    return code
