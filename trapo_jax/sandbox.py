"""Restricts subprocesses that handle untrusted text or templates: they get no secrets and limited memory."""

import contextlib
import os
import resource
import sys
from collections.abc import Iterable

# The only environment variables that are passed to restricted processes.
ENVIRONMENT = ("PATH", "LANG", "LC_ALL", "TMPDIR", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH")


def child_environment(extra: Iterable[str] = ()) -> dict[str, str]:
    """Returns the environment of a restricted process.

    It contains the allowed variables and the import path. It limits the number of threads, because each reserves
    address space, which is limited, and fixes the hash seed, because it affects the order of terms in SymPy.

    Args:
      extra: names of additional variables to pass.
    """
    allowed = {name: os.environ[name] for name in (*ENVIRONMENT, *extra) if name in os.environ}
    return {
        **allowed,
        "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path),
        "PYTHONHASHSEED": "0",
        "OPENBLAS_NUM_THREADS": "1",
        "OMP_NUM_THREADS": "1",
        "RAYON_NUM_THREADS": str(min(8, os.cpu_count() or 1)),
        "RUST_BACKTRACE": "0",
        "MALLOC_ARENA_MAX": "2",
        "ARROW_DEFAULT_MEMORY_POOL": "system",
    }


def limit_memory(num_bytes: int) -> None:
    """Limits this process's address space, if the platform supports it (macOS does not), and disables core dumps."""
    for limit, value in ((resource.RLIMIT_AS, num_bytes), (resource.RLIMIT_CORE, 0)):
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(limit, (value, value))
