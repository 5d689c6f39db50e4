"""Runs reward functions in processes that can be killed.

Each thread owns one worker (`worker.py`, a fresh interpreter without JAX that gets only the allowed environment
variables) and communicates with it over a socket, so that a wall-clock limit bounds every wait. A worker that exceeds
the limit or dies is replaced.

`multiprocessing` and pools built on it are unsuitable: a spawned child re-imports the parent's main module, which
imports JAX in the case of `python -m trapo_jax.train`; the child inherits the whole environment; killing an idle worker
permanently breaks pebble's pool; and results are unpickled. This module requires POSIX.
"""

import contextlib
import json
import logging
import queue
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from typing import Any, Self

from trapo_jax.inputs.printable import first_line
from trapo_jax.rewards.judgments import MAX_REASON_CHARS, describe_reason, kind_of
from trapo_jax.sandbox import child_environment
from trapo_jax.types import Judgment, Problem, Verdict

COMMAND = (sys.executable, "-P", "-m", "trapo_jax.rewards.worker")
START_SECS = 120.0
MAX_REPLY_BYTES = 8192

logger = logging.getLogger(__name__)
Job = tuple[Future[Judgment], dict[str, Any]]
RewardFunction = Callable[..., Any]

MAX_RESPONSE_CHARS = 100_000  # only the end of longer responses is graded


class FailureLog:
    """Logs why rewards are missing: a warning for the first reason of each kind, and debug messages for the others."""

    def __init__(self):
        self._reported: set[tuple[str, str]] = set()
        self._is_muted = False

    def report(self, function: str, reason: str) -> None:
        """Logs a failure, unless muted.

        Args:
          function: name of the reward function.
          reason: see `Judgment.reason`.
        """
        if self._is_muted:
            return
        key = (function, kind_of(reason))
        level = logging.DEBUG if key in self._reported else logging.WARNING
        logger.log(level, f"reward function {function}: {describe_reason(reason)}")
        self._reported.add(key)

    @contextlib.contextmanager
    def muted(self) -> Iterator[None]:
        """Returns a context manager that discards reported failures, for callers that show the failures themselves."""
        self._is_muted = True
        try:
            yield
        finally:
            self._is_muted = False


class GraderPool:
    """Calls reward functions in separate processes, with a time limit for each call.

    Args:
      reward_functions: functions defined at the top level of modules that do not import JAX. The problem passed to them
        has only an id, an answer, a prompt text, a source, and columns.
      num_workers: number of processes, which start immediately; >= 1.
      timeout_secs: wall-clock limit per call, measured from the time a worker receives it; > 0.
      max_response_chars: maximum length of a response; only the end of longer responses is graded.
      memory_bytes: limit on a worker's address space, if the platform supports it.
      environment: names of environment variables to pass to workers in addition to those that are always passed.
      failures: where failures are logged.

    Raises:
      ValueError: if a function cannot be imported by name.
    """

    def __init__(
        self,
        *reward_functions: RewardFunction,
        num_workers: int = 2,
        timeout_secs: float = 5.0,
        max_response_chars: int = MAX_RESPONSE_CHARS,
        memory_bytes: int = 2 * 2**30,
        environment: Sequence[str] = (),
        failures: FailureLog | None = None,
    ):
        self._paths = [path_of(function) for function in reward_functions]
        self._max_response_chars = max_response_chars
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._closed = False
        report = (failures or FailureLog()).report
        start = lambda: _Worker(self._paths, timeout_secs, memory_bytes, environment)
        self._threads = [
            threading.Thread(target=_serve, args=(self._jobs, start, report), daemon=True)
            for _ in range(num_workers)
        ]
        for thread in self._threads:
            thread.start()

    def submit(
        self, response: str, problem: Problem, function: RewardFunction | None = None
    ) -> Future[Judgment]:
        """Calls a reward function asynchronously.

        Args:
          response: any text.
          problem: the problem.
          function: one of the pool's functions; the first if None.

        Returns:
          A future of the judgment. The reward is missing if the function raises an exception or exceeds the time limit,
          or if its process dies. The future raises `OSError` if the system cannot start a process.

        Raises:
          RuntimeError: if the pool has been closed.
        """
        if self._closed:
            raise RuntimeError("the grader is closed")
        request = {
            "function": self._paths[0] if function is None else path_of(function),
            "text": response[-self._max_response_chars :],
            "id": problem.id,
            "answer": problem.answer,
            "prompt": problem.prompt_text,
            "source": problem.source,
            "columns": dict(problem.columns),
        }
        future: Future[Judgment] = Future()
        self._jobs.put((future, request))
        return future

    def close(self) -> None:
        """Cancels pending calls, waits for running ones (at most the time limit), and terminates the workers."""
        self._closed = True
        while True:
            try:
                job = self._jobs.get_nowait()
            except queue.Empty:
                break
            if job is not None:
                job[0].cancel()
        for _ in self._threads:
            self._jobs.put(None)
        for thread in self._threads:
            thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()


def path_of(function: RewardFunction) -> str:
    """Returns the import path of a function.

    Raises:
      ValueError: if the function has no import path.
    """
    if function.__module__ == "__main__" or not function.__qualname__.isidentifier():
        raise ValueError(f"{function.__qualname__}: not at the top level of an importable module")
    return f"{function.__module__}:{function.__qualname__}"


def _serve(
    jobs: "queue.SimpleQueue[Job | None]",
    start: Callable[[], "_Worker"],
    report: Callable[[str, str], None],
) -> None:
    """Processes jobs with one worker at a time until a job is None."""
    worker: _Worker | None = None
    try:
        worker = _start(start)
        while (job := jobs.get()) is not None:
            future, request = job
            if not future.set_running_or_notify_cancel():
                continue
            if worker is None or not worker.alive:
                try:
                    worker = start()
                except OSError as error:
                    worker = None
                    future.set_exception(OSError(error.errno, error.strerror, "a grading process"))
                    continue
            judgment = worker.ask(request)
            if judgment.reason:
                report(request["function"], judgment.reason)
            future.set_result(judgment)
            if not worker.alive:
                worker = _start(start)  # Its imports run while this thread waits for the next job.
    finally:
        if worker is not None:
            worker.kill()


def _start(start: Callable[[], "_Worker"]) -> "_Worker | None":
    """Starts a worker. Returns None if this fails; the next job then tries again and reports the error."""
    try:
        return start()
    except OSError:
        return None


class _Worker:
    """A worker process and the socket connected to it."""

    def __init__(
        self,
        paths: Sequence[str],
        timeout_secs: float,
        memory_bytes: int,
        environment: Sequence[str],
    ):
        self._timeout_secs = timeout_secs
        self._ready = False
        self._buffer = b""
        self._socket, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [*COMMAND, json.dumps(paths), str(timeout_secs), str(memory_bytes)],
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env=child_environment(environment),
                start_new_session=True,  # Only the trainer should receive Ctrl-C.
            )

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def ask(self, request: dict[str, Any]) -> Judgment:
        """Returns the worker's judgment for a request. If the reward is missing, the worker may have died."""
        try:
            if not self._ready:
                self._receive(time.monotonic() + START_SECS)
                self._ready = True
            deadline = time.monotonic() + self._timeout_secs
            self._socket.settimeout(self._timeout_secs)
            self._socket.sendall(json.dumps(request).encode() + b"\n")
            judgment = Judgment(**self._receive(deadline))
            # A hostile response may have taken over the process, so the reason is not trusted.
            reason = first_line(str(judgment.reason), MAX_REASON_CHARS)
            judgment = judgment._replace(reason=reason)
            if judgment.reason == "MemoryError":
                self.kill()
            return judgment
        except TimeoutError:
            self.kill()
            return Judgment(
                None, reason=Verdict.TIMEOUT if self._ready else "the process did not start in time"
            )
        except ConnectionError:
            self.kill()
            return Judgment(None, reason="the process died")
        except Exception as error:  # the reply is not a valid judgment
            self.kill()
            return Judgment(None, reason=type(error).__name__)

    def _receive(self, deadline: float) -> dict[str, Any]:
        while b"\n" not in self._buffer:
            self._socket.settimeout(max(deadline - time.monotonic(), 1e-3))
            received = self._socket.recv(MAX_REPLY_BYTES)
            if not received or len(self._buffer) > MAX_REPLY_BYTES:
                raise ConnectionError("no answer")
            self._buffer += received
        line, _, self._buffer = self._buffer.partition(b"\n")
        return json.loads(line)

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()
        self._socket.close()
