"""How a command ends: its exit code, its error line, Ctrl-C and a closed pipe."""

import errno
import functools
import os
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from trapo_jax.runs.console import printable
from trapo_jax.types import TrainingFailed, UserError

EXIT_FAILED, EXIT_USER_ERROR = 1, 2
NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
EXIT_INTERRUPTED, EXIT_BROKEN_PIPE = 130, 141  # as a shell reports SIGINT and SIGPIPE


def command(main: Callable[[Sequence[str]], int]) -> Callable[..., int]:
    """Decorates the main function of a command: errors end it with a line on standard error and an exit code.

    The decorated function takes the arguments, or those of the process if there are none.
    """

    @functools.wraps(main)
    def run(arguments: Sequence[str] | None = None) -> int:
        try:
            return main(sys.argv[1:] if arguments is None else arguments)
        except UserError as error:
            return fail(str(error), EXIT_USER_ERROR)
        except TrainingFailed as error:
            return fail(str(error), EXIT_FAILED)
        except OSError as error:
            if error.errno not in NO_SPACE:
                raise
            return fail(
                f"{error.filename or 'output_dir'}: {error.strerror}; free some space and run the same command again",
                EXIT_FAILED,
            )

    return run


def as_command(main: Callable[[], int]) -> NoReturn:
    """Runs `main` and exits with the code it returns, without a traceback on Ctrl-C or a closed pipe (`| head`)."""
    try:
        try:
            code = main()
        except SystemExit as end:  # raised by argparse
            code = end.code
        sys.stdout.flush()
    except KeyboardInterrupt:
        code = fail("stopped", EXIT_INTERRUPTED)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nothing left to flush
        code = EXIT_BROKEN_PIPE
    sys.exit(code)


def fail(message: str, code: int) -> int:
    """Prints an error to standard error and returns the exit code."""
    print("error:", printable(message, keep="\n"), file=sys.stderr)  # one line per mistake
    return code
