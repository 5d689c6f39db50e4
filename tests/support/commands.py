"""Running commands as users do, each in a separate process."""

import os
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
TINY_MODEL = REPOSITORY / "trapo_jax" / "assets" / "card_shuffles_tiny"

# Test processes and the processes that they start compile the same programs, so they share one
# cache, which persists after the session. Its keys cover programs, flags, devices and versions.
CACHE_SETTINGS = {
    "jax_compilation_cache_dir": str(REPOSITORY / ".pytest_cache" / "jax"),
    "jax_persistent_cache_min_compile_time_secs": 0.2,
    "jax_persistent_cache_min_entry_size_bytes": 0,
}
USER_XLA_FLAGS = os.environ.get("XLA_FLAGS", "")
# Environment of commands, which are compiled with the flags of users, unlike the test process.
CACHE_ENV = {
    **{name.upper(): str(value) for name, value in CACHE_SETTINGS.items()},
    "XLA_FLAGS": USER_XLA_FLAGS,
}


def run_command(module, *arguments, cwd=REPOSITORY, **environment):
    """Runs `python -m MODULE ARGUMENTS` and returns the completed process with its output as text.

    Processes have no time limit of their own, because a loaded machine may need many times longer
    than an idle one; the `timeout` in pyproject.toml ends tests that hang.
    """
    return run_python("-m", module, *arguments, cwd=cwd, **environment)


def run_python(*arguments, cwd=REPOSITORY, **environment):
    """Runs `python ARGUMENTS` and returns the completed process with its output as text."""
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=cwd,
        capture_output=True,
        text=True,
        env={**os.environ, **CACHE_ENV, **environment},
    )
