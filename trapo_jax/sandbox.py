"""Restricts subprocesses that handle untrusted text or templates: withholds secrets and limits memory."""

import contextlib
import os
import resource
import sys
from collections.abc import Iterable

# The environment variables that every restricted process inherits.
ENVIRONMENT = ("PATH", "LANG", "LC_ALL", "TMPDIR", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH")


def child_environment(extra: Iterable[str] = ()) -> dict[str, str]:
    """Returns the environment of a restricted process.

    The environment contains the allowed variables and the module search path. It limits the number of threads, because
    each thread reserves part of the limited address space, and fixes the hash seed, because the seed affects the order
    of terms in SymPy.

    Args:
      extra: names of additional variables to inherit.
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
