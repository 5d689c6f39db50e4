"""A worker process: judgments of texts, one JSON line each way, over the socket that is its standard input.

    python -m trapo_jax.rewards.worker FUNCTIONS TIMEOUT_SECS MEMORY_BYTES

FUNCTIONS is a JSON list of import paths `module:function`. Started by `GraderPool`. Only strings come in, and only
numbers and short strings go out: no pickle, and never a parsed answer, whose very `repr` may hang. Imports no jax.
"""

import functools
import importlib
import json
import os
import signal
import socket
import sys
from collections.abc import Callable, Mapping
from typing import Any

from trapo_jax.rewards.judgments import call
from trapo_jax.sandbox import limit_memory
from trapo_jax.types import Judgment, Problem

MAX_REASON_CHARS = 200


def main(functions: str, timeout_secs: str, memory_bytes: str) -> None:
    """Serves until the other side closes the socket, or until memory has run out.

    A function's module is imported first, and its `warm_up()` called if it has one, outside of every limit.
    """
    connection = socket.socket(fileno=os.dup(0))
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):  # what a library prints is not a judgment and reaches no terminal
        os.dup2(null, descriptor)
    with connection, connection.makefile("rwb") as lines:
        reply = functools.partial(_reply, lines)
        reward_functions = {path: _find(path) for path in json.loads(functions)}
        limit_memory(int(memory_bytes))
        reply(ready=True)
        for line in lines:
            if not _answer(line, reward_functions, reply, float(timeout_secs)):
                return None
    return None


def _find(path: str) -> Callable[..., Any]:
    """Imports a reward function; one that cannot be imported becomes a function that says why."""
    module_name, _, name = path.partition(":")
    try:
        module = importlib.import_module(module_name)
        function = getattr(module, name)
        getattr(module, "warm_up", lambda: None)()
    except (Exception, SystemExit) as error:
        reason = f"{path} cannot be imported in a grading process: {type(error).__name__}: {error}"
        return functools.partial(_raise, reason[:MAX_REASON_CHARS])
    return function


class _CannotImportError(Exception):
    """Says why a reward function is not there; its text is shown, in contrast to that of other exceptions."""


def _raise(reason: str, *_: Any, **__: Any) -> None:
    raise _CannotImportError(reason)


def _answer(
    line: bytes,
    reward_functions: Mapping[str, Callable[..., Any]],
    reply: Callable[..., None],
    timeout_secs: float,
) -> bool:
    """Judges one text; returns whether the process should continue."""
    request = json.loads(line)
    problem = Problem(
        request["id"],
        (),
        request["answer"],
        prompt_text=request["prompt"],
        source=request["source"],
        columns=request["columns"],
    )
    # The pool kills the process at the limit. Should the pool be gone, the kernel does, soon after it.
    signal.setitimer(signal.ITIMER_REAL, timeout_secs + 1.0)
    try:
        judgment = call(reward_functions[request["function"]], request["text"], problem)
        reply(**judgment._asdict())
    except MemoryError:
        reply(**Judgment(None, reason="MemoryError")._asdict())
        return False  # what is still held is unknown; a new process frees it
    except _CannotImportError as error:
        reply(**Judgment(None, reason=str(error))._asdict())
    except (Exception, SystemExit) as error:
        reply(**Judgment(None, reason=type(error).__name__)._asdict())
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
    return True


def _reply(lines: Any, **fields: Any) -> None:
    lines.write(json.dumps(fields).encode() + b"\n")
    lines.flush()


if __name__ == "__main__":
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    main(*sys.argv[1:])
