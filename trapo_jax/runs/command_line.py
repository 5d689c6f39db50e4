"""How a command ends: its exit code, its error line, Ctrl-C and a closed pipe."""

import os
import sys
from collections.abc import Callable
from typing import NoReturn

from trapo_jax.runs.console import printable

EXIT_USER_ERROR = 2
EXIT_INTERRUPTED, EXIT_BROKEN_PIPE = 130, 141  # as a shell reports SIGINT and SIGPIPE


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
