"""Failures of the operating system and of the environment: what is wrong, where, and the way out, on one line.

`trapo_jax` imports this module before the module of a command, so it imports only the standard library.
"""

import contextlib
import errno
import os
import re
import sys
import threading
import traceback
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

EXIT_FAILED, EXIT_USER_ERROR = 1, 2
EXIT_INTERRUPTED, EXIT_BROKEN_PIPE = 130, 141  # 128 + SIGINT and 128 + SIGPIPE, as in shells

PLATFORMS = "JAX_PLATFORMS"

_AGAIN = "run the same command again"
_SPACE = f"free some disk space (and inodes, see df -i), then {_AGAIN}"
_FILES = f"raise the limit on open files (ulimit -n), then {_AGAIN}"
_MEMORY = f"free some memory, then {_AGAIN}"
_PROCESSES = f"raise the limit on processes and threads (ulimit -u), then {_AGAIN}"
_EXHAUSTED = {
    errno.ENOSPC: _SPACE,
    errno.EDQUOT: _SPACE,
    errno.EMFILE: _FILES,
    errno.ENFILE: _FILES,
    errno.ENOMEM: _MEMORY,
    errno.EAGAIN: _PROCESSES,
}
_OTHER = {
    errno.EROFS: f"make it writable, then {_AGAIN}",
    errno.EACCES: f"make it accessible, then {_AGAIN}",
    errno.ENOENT: f"if it was deleted, restore it, then {_AGAIN}",
}
# TensorStore and safetensors report system errors only in the text of other exceptions.
_CODE = re.compile(r"os_error_code='(\d+)'|\(os error (\d+)\)")
_PATH = re.compile(r'"(/[^"]+)"')
_JAX_VARIABLE = re.compile(r"(?:JAX flag |environment ')(\w+)")
_NO_BACKEND = "Unable to initialize backend"
_NO_THREAD = "can't start new thread"
_NO_DEVICE_MEMORY = "RESOURCE_EXHAUSTED"


def explain(error: BaseException) -> tuple[str, int] | None:
    """Returns one line about a failure of the system or the environment, and the exit code; None for other exceptions."""
    if line := _wrong_variable(error):
        return line, EXIT_USER_ERROR
    if found := system_error(error):
        where = f"{found.filename}: " if found.filename else ""
        remedy = remedy_of_exhaustion(error) or _OTHER.get(found.errno or 0, _AGAIN)
        return f"{where}{found.strerror or _first_line(found)}; {remedy}", EXIT_FAILED
    if isinstance(error, RuntimeError) and _NO_THREAD in str(error):
        return f"no more threads can be started; {_PROCESSES}", EXIT_FAILED
    if isinstance(error, MemoryError) or _NO_DEVICE_MEMORY in str(error):
        reason = _first_line(error)
        return (
            f"out of memory{reason and f' ({reason})'}; choose a smaller model, or lower sampling.num_slots and, in "
            "training, train.per_device_rows",
            EXIT_FAILED,
        )
    return None


def remedy_of_exhaustion(error: BaseException) -> str | None:
    """Returns the way out of a lack of disk space, memory, open files or processes; None if nothing is lacking."""
    found = system_error(error)
    return _EXHAUSTED.get(found.errno or 0) if found else None


def system_error(error: BaseException) -> OSError | None:
    """Returns the system error that an exception is, contains in its text, or was raised from."""
    current: BaseException | None = error
    while current is not None:
        if isinstance(current, OSError):
            return current
        if found := _CODE.search(str(current)):
            code = int(found[1] or found[2])
            path = _PATH.search(str(current))
            return OSError(code, os.strerror(code), path[1] if path else None)
        current = current.__cause__
    return None


@contextlib.contextmanager
def named_in_errors(path: Path) -> Iterator[None]:
    """Adds a path to system errors that name none, such as those of writing to an open file."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def check_threads() -> None:
    """Checks that about as many threads can be started as XLA needs, which aborts the process if one cannot.

    Raises:
      RuntimeError: if they cannot be started.
    """
    done = threading.Event()
    try:
        for _ in range(16 + 4 * (os.cpu_count() or 1)):
            threading.Thread(target=done.wait, daemon=True).start()
    finally:
        done.set()


def report_import_error(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    """Prints an uncaught exception and exits. A `sys.excepthook` for the imports of a command."""
    del kind, trace
    raise SystemExit(report(error))


def report(error: BaseException) -> int:
    """Prints an uncaught exception, on one line if `explain` knows it, and returns the exit code."""
    stopped = ("stopped", EXIT_INTERRUPTED) if isinstance(error, KeyboardInterrupt) else None
    if explained := stopped or explain(error):
        print("error:", explained[0], file=sys.stderr)
        return explained[1]
    traceback.print_exception(error)
    return EXIT_FAILED


def _wrong_variable(error: BaseException) -> str | None:
    """Says which environment variable JAX rejects: most when it is imported, the platform at the first operation."""
    if isinstance(error, RuntimeError) and _NO_BACKEND in str(error):
        platforms = os.environ.get(PLATFORMS) or "any"
        return (
            f"{PLATFORMS}={platforms}: {_first_line(error)}; unset it to use the available devices"
        )
    found = _JAX_VARIABLE.search(str(error)) if isinstance(error, ValueError) else None
    name = found[1].upper() if found else ""
    if name not in os.environ:
        return None
    return f"{name}={os.environ[name]!r:.100}: JAX does not accept this value; unset the variable or correct it"


def _first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0][:300]
