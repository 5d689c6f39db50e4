"""Reward functions in processes that can be killed.

Each thread holds one worker (`worker.py`, a fresh interpreter without jax, started with the allowed environment
variables only) and talks to it over a socket, so that a wall-clock limit bounds every wait. A worker that exceeds it,
or that dies, is replaced.

`multiprocessing` and the pools built on it do not serve here: a spawned child imports the parent's main module again,
and with `python -m trapo_jax.train` that is jax; it inherits the whole environment; an idle worker that is killed
breaks pebble's pool for good; and results are unpickled. POSIX only, as is jax.
"""

import json
import logging
import queue
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, Self

from trapo_jax.sandbox import child_environment
from trapo_jax.types import Judgment, Problem, Verdict

COMMAND = (sys.executable, "-P", "-m", "trapo_jax.rewards.worker")
START_SECS = 120.0
MAX_REPLY_BYTES = 8192

logger = logging.getLogger(__name__)
Job = tuple[Future[Judgment], dict[str, Any]]
RewardFunction = Callable[..., Any]

MAX_RESPONSE_CHARS = 100_000  # Only the end of a longer response is graded.


class GraderPool:
    """Calls reward functions in separate processes, each call within a time limit.

    Args:
      reward_functions: functions at the top level of modules that import no jax. A function sees the response and a
        problem with id, answer, prompt text, source and columns only.
      num_workers: number of processes, started at once; >= 1.
      timeout_secs: wall-clock limit for one call, from when a worker gets it; > 0.
      max_response_chars: number of characters at the end of a longer response that are graded.
      memory_bytes: limit of a worker's address space, where the platform has one.
      environment: names of environment variables that workers get beside the allowed ones.

    Raises:
      ValueError: if a worker could not find a function by its name.
    """

    def __init__(
        self,
        *reward_functions: RewardFunction,
        num_workers: int = 2,
        timeout_secs: float = 5.0,
        max_response_chars: int = MAX_RESPONSE_CHARS,
        memory_bytes: int = 2 * 2**30,
        environment: Sequence[str] = (),
    ):
        self._paths = [path_of(function) for function in reward_functions]
        self._max_response_chars = max_response_chars
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._closed = False
        self._reasons: set[str] = set()
        start = lambda: _Worker(self._paths, timeout_secs, memory_bytes, environment)
        self._threads = [
            threading.Thread(target=_serve, args=(self._jobs, start, self._report), daemon=True)
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
          The judgment; without a reward if the function raises, exceeds its time limit, or its process dies.

        Raises:
          RuntimeError: after `close`.
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
        """Cancels calls that have not begun, waits for the others (at most the time limit), and ends the workers."""
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
        """Warns of each kind of failure once; the rates in the metrics count all of them."""
        logger.log(logging.DEBUG if reason in self._reasons else logging.WARNING, reason)
        self._reasons.add(reason)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()


def path_of(function: RewardFunction) -> str:
    """Returns the import path of a function.

    Raises:
      ValueError: if it has none.
    """
    if function.__module__ == "__main__" or not function.__qualname__.isidentifier():
        raise ValueError(f"{function.__qualname__}: not at the top level of an importable module")
    return f"{function.__module__}:{function.__qualname__}"


def _serve(
    jobs: "queue.SimpleQueue[Job | None]",
    start: Callable[[], "_Worker"],
    report: Callable[[str], None],
) -> None:
    """Serves jobs with one worker at a time, until a job is None."""
    worker: _Worker | None = None
    try:
        worker = _start(start)
        while (job := jobs.get()) is not None:
            future, request = job
            if not future.set_running_or_notify_cancel():
                continue
            if worker is None or not worker.alive:
                worker = _start(start)
            judgment = worker.ask(request) if worker else Judgment(None, reason="no process")
            if judgment.reason:
                report(f"reward function {request['function']}: {judgment.reason}")
            future.set_result(judgment)
            if worker is not None and not worker.alive:
                worker = _start(start)  # It imports while there is nothing to do.
    finally:
        if worker is not None:
            worker.kill()


def _start(start: Callable[[], "_Worker"]) -> "_Worker | None":
    try:
        return start()
    except OSError as error:  # no memory, no file descriptors
        logger.warning("a grading process cannot be started: %s", error)
        return None


class _Worker:
    """A process and the socket to it."""

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
                start_new_session=True,  # Ctrl-C is for the trainer.
            )

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def ask(self, request: dict[str, Any]) -> Judgment:
        """Returns the judgment on a request. If the reward is missing, the worker may be dead."""
        try:
            if not self._ready:
                self._receive(time.monotonic() + START_SECS)
                self._ready = True
            deadline = time.monotonic() + self._timeout_secs
            self._socket.settimeout(self._timeout_secs)
            self._socket.sendall(json.dumps(request).encode() + b"\n")
            judgment = Judgment(**self._receive(deadline))
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
        except Exception as error:  # What the process says is not a judgment.
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
