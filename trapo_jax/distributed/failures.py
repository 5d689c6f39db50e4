"""Ends the processes of a job together: if one fails or dies, each of the others prints one line and exits.

Otherwise, they would wait for the missing process in a collective operation.
"""

import contextlib
import ctypes
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import jax
from jax._src import distributed  # JAX has no public access to its key-value store.

from trapo_jax.types import EXIT_FAILED, TrainingFailed, UserError

POLL_SECS = 1.0
# Grace period during which a process that fails for the same reason as another one can print its own error.
GRACE_SECS = 3.0
FAILED = "trapo_jax/failed"
_callbacks: list[Any] = []  # Kept alive because C code refers to them until the process ends.


def report_abort(line: str) -> None:
    """Makes this process print an error line and exit, instead of dumping core, if native code aborts it.

    JAX aborts a process that loses contact with the others. Python's own signal handlers do not run in this case.
    """

    def report(number: int) -> None:
        del number
        os.write(2, f"error: {line}\n".encode())
        os._exit(EXIT_FAILED)

    handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(report)
    _callbacks.append(handler)
    ctypes.CDLL(None).signal(signal.SIGABRT, handler)


@contextlib.contextmanager
def fail_together(dead_after_secs: float) -> Iterator[None]:
    """Ends this process if another one fails within this context, and tells the others if this one fails.

    This has no effect if the job has a single process.

    Args:
      dead_after_secs: time after which JAX notices that a process has died.
    """
    client = distributed.global_state.client
    if client is None:
        yield
        return
    watch = _PeerWatch(client)
    try:
        yield
    except BaseException as error:
        if _is_from_runtime(error):
            # Another process may have failed. If so, the peer watch or JAX ends this process and prints the reason.
            time.sleep(dead_after_secs + GRACE_SECS + POLL_SECS)
        watch.close()
        with contextlib.suppress(
            jax.errors.JaxRuntimeError
        ):  # Raised if the coordinator has exited.
            client.key_value_set(f"{FAILED}/{jax.process_index()}", _describe(error))
        raise
    watch.close()


def exit_failed(code: int) -> None:
    """Exits with `code` if the job has several processes, without waiting for the others as JAX would.

    Call this function after `fail_together` has told the other processes of the error and the error has been printed.
    """
    if distributed.global_state.client is None:
        return
    if distributed.global_state.process_id == 0:
        time.sleep(GRACE_SECS + 2 * POLL_SECS)  # The others learn the reason from the coordinator.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


class _PeerWatch:
    """A thread that ends this process with one line if another process has failed."""

    def __init__(self, client: Any):
        self._client = client
        self._closed = threading.Event()
        self._exit_lock = threading.Lock()
        threading.Thread(target=self._watch, name="peer watch", daemon=True).start()

    def close(self) -> None:
        with self._exit_lock:  # Only one of the threads prints an error.
            self._closed.set()

    def _watch(self) -> None:
        while not self._closed.wait(POLL_SECS):
            try:
                failed = self._client.key_value_dir_get(FAILED)
            except jax.errors.JaxRuntimeError:
                return  # The coordinator has exited, and JAX will abort this process.
            if not failed or self._closed.wait(GRACE_SECS):
                continue
            with self._exit_lock:
                if self._closed.is_set():
                    return
                key, reason = failed[0]
                line = f"error: process {os.path.basename(key)} of the job failed: {reason}"
                print(line, file=sys.stderr, flush=True)
                os._exit(EXIT_FAILED)


def _is_from_runtime(error: BaseException) -> bool:
    """Returns whether a device operation failed, for example because another process did not take part in it.

    JAX raises a `JaxRuntimeError` or a `ValueError` whose message begins with the name of a status. Running out of
    memory is excluded, because it is not caused by another process.
    """
    has_status = re.match(r"(?!RESOURCE_EXHAUSTED)[A-Z_]+: ", str(error)) is not None
    return has_status and isinstance(error, (jax.errors.JaxRuntimeError, ValueError))


def _describe(error: BaseException) -> str:
    line = str(error).partition("\n")[0]
    if isinstance(error, (UserError, TrainingFailed)):
        return line
    return f"{type(error).__name__}: {line}".removesuffix(": ")
