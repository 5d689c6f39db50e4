"""A worker process: verdicts for texts, one JSON line each way, over the socket that is its stdin.

    python -m trapo_jax.rewards.worker MODULE:FUNCTION TIMEOUT_SECS MEMORY_BYTES

Started by `GraderPool`. Only strings come in and only a verdict and an exception's name go out: no
pickle, and never a parsed answer, whose very `repr` may hang. Imports no jax.
"""

import functools
import importlib
import json
import os
import signal
import socket
import sys
from collections.abc import Callable

from trapo_jax.rewards.verdicts import as_verdict
from trapo_jax.sandbox import limit_memory
from trapo_jax.types import Problem, Verdict


def main(function: str, timeout_secs: str, memory_bytes: str) -> None:
    """Serves until the other side hangs up, or until memory has run out.

    If the function's module has a `warm_up()`, it is called first, outside of every limit.
    """
    connection = socket.socket(fileno=os.dup(0))
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):  # whatever a library prints is no answer and reaches no terminal
        os.dup2(null, descriptor)
    with connection, connection.makefile("rwb") as lines:
        reply = functools.partial(_reply, lines)
        try:
            module_name, _, name = function.partition(":")
            module = importlib.import_module(module_name)
            reward_function = getattr(module, name)
            getattr(module, "warm_up", lambda: None)()
        except Exception as error:
            return reply(failure=f"{type(error).__name__}: {error}"[:500])
        limit_memory(int(memory_bytes))
        reply(ready=True)
        for line in lines:
            if not _answer(line, reward_function, reply, float(timeout_secs)):
                return None
    return None


def _answer(line: bytes, reward_function: Callable, reply: Callable, timeout_secs: float) -> bool:
    """Judges one text; False if the process should end."""
    request = json.loads(line)
    problem = Problem(request["id"], (), request["answer"], source=request["source"])
    # The pool kills at the limit. Should the pool be gone, the kernel does, soon after it.
    signal.setitimer(signal.ITIMER_REAL, timeout_secs + 1.0)
    try:
        reply(verdict=as_verdict(reward_function(request["text"], problem)))
    except MemoryError:
        reply(verdict=Verdict.ERROR, reason="MemoryError")
        return False  # what is still held is unknown: make room
    except Exception as error:
        reply(verdict=Verdict.ERROR, reason=type(error).__name__)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
    return True


def _reply(lines, **fields) -> None:
    lines.write(json.dumps(fields).encode() + b"\n")
    lines.flush()


if __name__ == "__main__":
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    main(*sys.argv[1:])
