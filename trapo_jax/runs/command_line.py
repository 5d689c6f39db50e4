"""Exit codes and error lines of the commands, and their handling of Ctrl-C and closed pipes."""

import contextlib
import errno
import functools
import logging
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import NoReturn

import trapo_jax.distributed.log_level  # noqa: F401  before libtpu is loaded
from trapo_jax.printable import printable
from trapo_jax.types import EXIT_FAILED, TrainingFailed, UserError

EXIT_USER_ERROR = 2
NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
EXIT_INTERRUPTED, EXIT_BROKEN_PIPE = 130, 141  # 128 + SIGINT and 128 + SIGPIPE, as in shells


def command(main: Callable[[Sequence[str]], int]) -> Callable[..., int]:
    """Decorates the main function of a command to turn errors into a line on standard error and an exit code.

    Warnings of the package become lines as well.

    The decorated function takes the command-line arguments; they default to those of the process.
    """

    @functools.wraps(main)
    def run(arguments: Sequence[str] | None = None) -> int:
        try:
            with _warnings_as_lines():
                return main(sys.argv[1:] if arguments is None else arguments)
        except UserError as error:
            return fail(str(error), EXIT_USER_ERROR)
        except TrainingFailed as error:
            return fail(str(error), EXIT_FAILED)
        except OSError as error:
            if error.errno not in NO_SPACE:
                raise
            return fail(
                f"{error.filename or 'output_dir'}: {error.strerror}; free some disk space and run the same command "
                "again",
                EXIT_FAILED,
            )

    return run


class _LineHandler(logging.Handler):
    """Prints a log record on one line, without the name of the logger."""

    def emit(self, record: logging.LogRecord) -> None:
        print(f"{record.levelname.lower()}: {printable(record.getMessage())}", file=sys.stderr)


@contextlib.contextmanager
def _warnings_as_lines() -> Iterator[None]:
    """Prints what the package logs, which other handlers, such as those of imported libraries, do not print again."""
    logger, handler = logging.getLogger("trapo_jax"), _LineHandler(logging.WARNING)
    propagates, logger.propagate = logger.propagate, False
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.propagate = propagates


def run_and_exit(main: Callable[[], int]) -> NoReturn:
    """Runs `main` and exits with its return value, without a traceback on Ctrl-C or a closed pipe (`| head`)."""
    try:
        try:
            code = main()
        except SystemExit as error:  # raised by argparse
            code = error.code
        sys.stdout.flush()
    except KeyboardInterrupt:
        code = fail("stopped", EXIT_INTERRUPTED)
    except BrokenPipeError:
        # Python flushes standard output at exit, which would fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = EXIT_BROKEN_PIPE
    except Exception:
        traceback.print_exc()
        code = EXIT_FAILED
    if isinstance(code, int) and code and "jax" in sys.modules:
        from trapo_jax.distributed.failures import exit_failed  # imports jax, which takes a second

        exit_failed(code)
    sys.exit(code)


def fail(message: str, code: int) -> int:
    """Prints an error to standard error and returns the exit code."""
    print(
        "error:", printable(message, keep="\n"), file=sys.stderr
    )  # config errors have several lines
    return code
