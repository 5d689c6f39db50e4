"""What a process is given that works on text or templates from outside: no secrets, and only so much memory."""

import contextlib
import os
import resource
import sys
from collections.abc import Iterable

# Reaches such a process; nothing else of the environment does.
ENVIRONMENT = ("PATH", "LANG", "LC_ALL", "TMPDIR", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH")


def child_environment(extra: Iterable[str] = ()) -> dict[str, str]:
    """Returns the environment of a restricted process: the allowed variables, the import path, one thread per process,
    and a fixed hash seed, on which the order of terms in sympy depends.

    Args:
      extra: names of further variables that may reach the process.
    """
    allowed = {name: os.environ[name] for name in (*ENVIRONMENT, *extra) if name in os.environ}
    return {
        **allowed,
        "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path),
        "PYTHONHASHSEED": "0",
        "OPENBLAS_NUM_THREADS": "1",
        "OMP_NUM_THREADS": "1",
    }


def limit_memory(num_bytes: int) -> None:
    """Limits this process's address space, where the platform can (macOS cannot), and its core dumps to none."""
    for limit, value in ((resource.RLIMIT_AS, num_bytes), (resource.RLIMIT_CORE, 0)):
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(limit, (value, value))
