"""Runs a grading worker process, which exchanges JSON lines with `GraderPool` over a socket passed as standard input.

    python -m trapo_jax.rewards.worker FUNCTIONS TIMEOUT_SECS MEMORY_BYTES

FUNCTIONS is a JSON list of import paths `module:function`. Requests and replies are plain JSON without pickled objects,
and a reply never contains a parsed answer, whose `repr` alone may hang. This module does not import JAX.
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

from trapo_jax.rewards.judgments import call, reason_of
from trapo_jax.sandbox import limit_memory
from trapo_jax.types import Judgment, Problem


def main(functions: str, timeout_secs: str, memory_bytes: str) -> None:
    """Serves requests until the pool closes the socket or memory runs out.

    First, the functions' modules are imported, and each module's `warm_up()` is called if it exists. No limits apply
    during this phase.
    """
    connection = socket.socket(fileno=os.dup(0))
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):  # discard output printed by libraries
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
    """Imports a reward function. If the import fails, returns a function that raises an error with the reason."""
    module_name, _, name = path.partition(":")
    try:
        module = importlib.import_module(module_name)
        function = getattr(module, name)
        getattr(module, "warm_up", lambda: None)()
    except (Exception, SystemExit) as error:
        reason = f"{path} cannot be imported in a grading process: {reason_of(error)}"
        return functools.partial(_raise, reason)
    return function


class _CannotImportError(Exception):
    """A reward function cannot be imported. The user sees the message without this exception's type."""


def _raise(reason: str, *_: Any, **__: Any) -> None:
    raise _CannotImportError(reason)


def _answer(
    line: bytes,
    reward_functions: Mapping[str, Callable[..., Any]],
    reply: Callable[..., None],
    timeout_secs: float,
) -> bool:
    """Judges one response, and returns whether the process should continue."""
    request = json.loads(line)
    problem = Problem(
        request["id"],
        (),
        request["answer"],
        prompt_text=request["prompt"],
        source=request["source"],
        columns=request["columns"],
    )
    # The pool kills the process at the time limit. If the pool no longer exists, the timer kills the process a
    # second later.
    signal.setitimer(signal.ITIMER_REAL, timeout_secs + 1.0)
    try:
        judgment = call(reward_functions[request["function"]], request["text"], problem)
        reply(**judgment._asdict())
    except MemoryError:
        reply(**Judgment(None, reason="MemoryError")._asdict())
        return False  # Leaked memory is freed only when the process is replaced.
    except _CannotImportError as error:
        reply(**Judgment(None, reason=str(error))._asdict())
    except (Exception, SystemExit) as error:
        reply(**Judgment(None, reason=reason_of(error))._asdict())
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
    return True


def _reply(lines: Any, **fields: Any) -> None:
    lines.write(json.dumps(fields).encode() + b"\n")
    lines.flush()


if __name__ == "__main__":
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    main(*sys.argv[1:])
