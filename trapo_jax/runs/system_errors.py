"""Explains operating-system and environment failures in one line that states the cause, the location and the remedy.

`trapo_jax/__init__.py` imports this module before a command's own module, so this module imports as little as possible.
"""

import contextlib
import errno
import io
import os
import re
import resource
import sys
import threading
import traceback
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from trapo_jax.inputs.printable import printable
from trapo_jax.types import EXIT_FAILED, UserError

EXIT_USER_ERROR = 2
EXIT_INTERRUPTED, EXIT_BROKEN_PIPE = 130, 141  # 128 + SIGINT and 128 + SIGPIPE, as in shells.

OUTPUT = "standard output"  # Name of standard output in error messages.
PLATFORMS = "JAX_PLATFORMS"
MIN_ADDRESS_SPACE = 13 * 2**28  # In bytes. With less, XLA aborts even for the built-in model.
MIN_DESCRIPTORS = 40  # Enough file descriptors to save checkpoints and start grading processes.

_AGAIN = "run the same command again"
_SPACE = f"free some disk space (or inodes; see df -i), then {_AGAIN}"
_FILES = f"raise the limit on open files (ulimit -n), then {_AGAIN}"
_MEMORY = f"free some memory or raise the memory limit (ulimit -v), then {_AGAIN}"
_PROCESSES = (
    f"raise the limit on processes, or on their memory (ulimit -u, ulimit -v), then {_AGAIN}"
)
_WRITABLE = f"make it writable, then {_AGAIN}"
_DISK = f"check the disk, then {_AGAIN}"
_EXHAUSTED = {
    errno.ENOSPC: _SPACE,
    errno.EDQUOT: _SPACE,
    errno.EMFILE: _FILES,
    errno.ENFILE: _FILES,
    errno.ENOMEM: _MEMORY,
    errno.EAGAIN: _PROCESSES,
}
_REMEDIES = _EXHAUSTED | {
    errno.EROFS: _WRITABLE,
    errno.EPERM: _WRITABLE,
    errno.EACCES: _WRITABLE,
    errno.ENOENT: f"if it was deleted or moved, restore it, then {_AGAIN}",
    errno.EIO: _DISK,
    errno.ESTALE: _DISK,
}
# TensorStore and safetensors report system errors only in the text of other exceptions.
_CODE = re.compile(r"os_error_code='(\d+)'|\(os error (\d+)\)")
_PATH = re.compile(r'"(/[^"]+)"')
_JAX_VARIABLE = re.compile(r"(?:JAX flag |environment ')(\w+)")
_NO_BACKEND = "Unable to initialize backend"
_NO_THREAD = "can't start new thread"
_NO_MEMORY = re.compile(r"RESOURCE_EXHAUSTED|cannot allocate memory|failed to map segment")


def explain(error: BaseException) -> tuple[str, int] | None:
    """Returns a one-line message and an exit code for a system or environment failure; None for other exceptions."""
    if line := _wrong_variable(error):
        return line, EXIT_USER_ERROR
    found = system_error(error)
    if found and (remedy := _REMEDIES.get(found.errno or 0)):
        where = f"{found.filename}: " if found.filename else _deleted_directory(found)
        return f"{where}{found.strerror}; {remedy}", EXIT_FAILED
    if isinstance(error, RuntimeError) and _NO_THREAD in str(error):
        return f"no more threads can be started; {_PROCESSES}", EXIT_FAILED
    if isinstance(error, MemoryError) or _NO_MEMORY.search(str(error)):
        reason = _first_line(error)
        return (
            f"out of memory{reason and f' ({reason})'}; free some memory or raise the memory limit (ulimit -v), choose "
            "a smaller model, or lower sampling.num_slots and, in training, train.per_device_rows",
            EXIT_FAILED,
        )
    return None


def _deleted_directory(error: OSError) -> str:
    """Returns "the working directory: " if a file was not found because the working directory was deleted."""
    if error.errno == errno.ENOENT:
        try:
            os.getcwd()
        except FileNotFoundError:
            return "the working directory: "
    return ""


def remedy_of_exhaustion(error: BaseException) -> str | None:
    """Returns the remedy if disk space, memory, file descriptors or processes are exhausted; None otherwise."""
    found = system_error(error)
    return _EXHAUSTED.get(found.errno or 0) if found else None


def system_error(error: BaseException) -> OSError | None:
    """Returns the `OSError` behind an exception; None if there is none.

    It is the exception itself, one of its causes, or an `OSError` built from an error code in one of their messages.
    """
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
def named_in_errors(path: Path | str) -> Iterator[None]:
    """Adds a path to an `OSError` that has none, such as an error raised by writing to an open file."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def check_limits() -> None:
    """Checks that a command can use enough address space, threads and files. Otherwise, native code would abort.

    Raises:
      UserError: if the address space is limited to less than `MIN_ADDRESS_SPACE`.
      RuntimeError: if too few threads can be started.
      OSError: if too few files can be opened.
    """
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit != resource.RLIM_INFINITY and limit < MIN_ADDRESS_SPACE:
        gib = 2**30
        raise UserError(
            f"the address space is limited to {limit / gib:.2f} GiB; raise the limit (ulimit -v) to at least "
            f"{MIN_ADDRESS_SPACE / gib:.2f} GiB"
        )
    done = threading.Event()
    descriptors = []
    try:
        for _ in range(16 + 4 * (os.cpu_count() or 1)):
            threading.Thread(target=done.wait, daemon=True).start()
        while len(descriptors) < MIN_DESCRIPTORS:
            descriptors += os.pipe()
    finally:
        done.set()
        for descriptor in descriptors:
            os.close(descriptor)


def report_import_error(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    """Prints an uncaught exception and exits. Used as `sys.excepthook` while a command's modules are imported."""
    del kind, trace
    raise SystemExit(report(error))


def report_in_native_thread(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    """Prints an exception raised in a thread of native code. Used as `sys.excepthook` while a command runs.

    The threads of a failed save may raise an error much later because their event loop is closed. Such errors are not
    reported.
    """
    if not _is_of_closed_loop(error):
        sys.__excepthook__(kind, error, trace)


def report_unraisable(unraisable: Any) -> None:
    """Prints an exception that cannot be raised. Used as `sys.unraisablehook`; see also `report_in_native_thread`."""
    if not _is_of_closed_loop(unraisable.exc_value):
        sys.__unraisablehook__(unraisable)


def _is_of_closed_loop(error: BaseException | None) -> bool:
    return isinstance(error, RuntimeError) and "Event loop is closed" in str(error)


def report(error: BaseException) -> int:
    """Prints an uncaught exception, on one line if `explain` recognizes it, and returns the exit code."""
    stopped = ("stopped", EXIT_INTERRUPTED) if isinstance(error, KeyboardInterrupt) else None
    if explained := stopped or explain(error):
        print_error(explained[0])
        return explained[1]
    traceback.print_exception(error)
    return EXIT_FAILED


def print_error(message: str) -> None:
    """Prints an error message to standard error. Each line describes one error."""
    with contextlib.suppress(OSError):  # Standard error may be a file on a full disk.
        for line in message.split("\n"):
            print("error:", printable(line), file=sys.stderr, flush=True)


def leave_lost_terminal() -> None:
    """Discards all further output to standard output and standard error if their terminal has been closed."""
    for stream in (sys.stdout, sys.stderr):
        try:
            os.write(stream.fileno(), b"")
        except io.UnsupportedOperation:  # The stream is in memory.
            continue
        except OSError:
            discard(stream)


def discard(stream: TextIO) -> None:
    """Redirects a stream to the null device. Otherwise, Python would fail when it flushes the stream at exit."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, stream.fileno())
    os.close(null)


def _wrong_variable(error: BaseException) -> str | None:
    """Returns a message naming the environment variable that JAX rejects; None for other exceptions.

    JAX checks most variables when it is imported, but `JAX_PLATFORMS` only at the first operation.
    """
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
