"""Graders in processes that can be killed.

One thread holds one worker (`worker.py`, a fresh interpreter without jax, started with an environment of allowed
names only) and talks with it over a socket, so that a limit on the wall clock bounds every wait. A worker that
exceeds it, or that dies, is replaced while the verdict is already on its way.

Not `multiprocessing` or a pool built on it, for what was seen there: a spawned child imports the parent's main
module again, and with `python -m trapo_jax.train` that is jax; it starts with the whole environment; an idle worker that
is killed breaks pebble's pool for good; and answers are unpickled. POSIX only, as is jax's support.
"""

import json
import logging
import queue
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, Self

from trapo_jax.sandbox import child_environment
from trapo_jax.types import Problem, Verdict

COMMAND = (sys.executable, "-P", "-m", "trapo_jax.rewards.worker")
START_SECS = 120.0
MAX_REPLY_BYTES = 4096

logger = logging.getLogger(__name__)
Job = tuple[Future[Verdict], dict[str, str]]

MAX_RESPONSE_CHARS = 100_000  # Only the end of a longer response is graded.


class GraderPool:
    """Judges with `reward_function` in processes of their own, each answer within a limit.

    Args:
      reward_function: a function at the top level of a module that imports no jax. It sees the text and a
        problem that has id, answer and source only.
      num_workers: processes, started at once; >= 1.
      timeout_secs: wall-clock limit for one answer, from when a worker gets it; > 0.
      max_response_chars: of a longer text only so many characters at its end are judged.
      memory_bytes: limit of a worker's address space, where the platform has one.

    Raises:
      ValueError: if a worker could not find `reward_function` by its name.
    """

    def __init__(
        self,
        reward_function: Callable[[str, Problem], Any],
        *,
        num_workers: int = 2,
        timeout_secs: float = 5.0,
        max_response_chars: int = MAX_RESPONSE_CHARS,
        memory_bytes: int = 2 * 2**30,
    ):
        if reward_function.__module__ == "__main__" or "." in reward_function.__qualname__:
            raise ValueError(
                f"{reward_function.__qualname__}: not at the top level of an importable module"
            )
        self._max_response_chars = max_response_chars
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._closed = False
        self._reasons: set[str] = set()
        start = lambda: _Worker(reward_function, timeout_secs, memory_bytes)
        self._threads = [
            threading.Thread(target=_serve, args=(self._jobs, start, self._report), daemon=True)
            for _ in range(num_workers)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, response_text: str, problem: Problem) -> Future[Verdict]:
        """A verdict to come: the function's own, ERROR if it raises or its process dies, TIMEOUT
        if it does not answer in time.

        Raises:
          RuntimeError: after `close`.
        """
        if self._closed:
            raise RuntimeError("the grader is closed")
        text = response_text[-self._max_response_chars :]
        request = {
            "text": text,
            "id": problem.id,
            "answer": problem.answer,
            "source": problem.source,
        }
        future: Future[Verdict] = Future()
        self._jobs.put((future, request))
        return future

    def close(self) -> None:
        """Cancels what has not begun, waits for what has (at most the time limit), ends the workers."""
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

    def _report(self, reason: str) -> None:
        """A warning for what goes wrong the first time; the rates in the metrics tell of the rest."""
        logger.log(logging.DEBUG if reason in self._reasons else logging.WARNING, reason)
        self._reasons.add(reason)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_) -> None:
        self.close()


def _serve(
    jobs: "queue.SimpleQueue[Job | None]",
    start: Callable[[], "_Worker"],
    report: Callable[[str], None],
) -> None:
    """A thread's life: one worker after the other, one job after the other."""
    worker: _Worker | None = None
    try:
        worker = _start(start)
        while (job := jobs.get()) is not None:
            future, request = job
            if not future.set_running_or_notify_cancel():
                continue
            if worker is None or not worker.alive:
                worker = _start(start)
            verdict, reason = worker.ask(request) if worker else (Verdict.ERROR, "no process")
            if reason:
                report(f"reward worker: {verdict} ({reason})")
            future.set_result(verdict)
            if worker is not None and not worker.alive:
                worker = _start(start)  # imports while nobody waits for it
    finally:
        if worker is not None:
            worker.kill()


def _start(start: Callable[[], "_Worker"]) -> "_Worker | None":
    try:
        return start()
    except OSError as error:  # no memory, no file descriptors
        logger.warning("reward worker cannot be started: %s", error)
        return None


class _Worker:
    """One process and the socket to it."""

    def __init__(self, reward_function: Callable, timeout_secs: float, memory_bytes: int):
        self._timeout_secs = timeout_secs
        self._ready = False
        self._buffer = b""
        self._socket, theirs = socket.socketpair()
        function = f"{reward_function.__module__}:{reward_function.__qualname__}"
        with theirs:
            self._process = subprocess.Popen(
                [*COMMAND, function, str(timeout_secs), str(memory_bytes)],
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env=child_environment(),
                start_new_session=True,  # Ctrl-C is the trainer's
            )

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def ask(self, request: dict[str, str]) -> tuple[Verdict, str]:
        """Verdict, and what went wrong if something did; then the worker may be dead."""
        try:
            if not self._ready:
                hello = self._receive(time.monotonic() + START_SECS)
                if "failure" in hello:
                    raise ConnectionError(f"does not start: {hello['failure']}")
                self._ready = True
            deadline = time.monotonic() + self._timeout_secs
            self._socket.settimeout(self._timeout_secs)
            self._socket.sendall(json.dumps(request).encode() + b"\n")
            reply = self._receive(deadline)
            if reply.get("reason") == "MemoryError":
                self.kill()
            reason = reply.get("reason")
            return Verdict(reply["verdict"]), repr(reason) if reason else ""
        except TimeoutError:
            self.kill()
            started = "judging" if self._ready else "starting"
            return Verdict.TIMEOUT if self._ready else Verdict.ERROR, f"{started} took too long"
        except Exception as error:  # the process has ended, or what it says is no answer
            self.kill()
            return Verdict.ERROR, repr(error)

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
