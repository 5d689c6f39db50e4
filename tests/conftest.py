"""Shared fixtures: the shipped model, its tokenizer, and a way to run the command line for real."""

import os
import subprocess
import sys
from pathlib import Path

# Small programs, each run a few times: most of their time is LLVM's. The commands' own processes, which
# `run_command` starts, are compiled as users compile them.
FAST_COMPILATION = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
USERS_FLAGS = os.environ.get("XLA_FLAGS", "")
os.environ["XLA_FLAGS"] = f"{USERS_FLAGS} {FAST_COMPILATION}"

import jax  # noqa: E402
import pytest  # noqa: E402
from filelock import FileLock  # noqa: E402

REPOSITORY = Path(__file__).parents[1]
sys.path.insert(0, str(REPOSITORY / "tools"))
TINY_MODEL = REPOSITORY / "trapo_jax" / "assets" / "card_shuffles_tiny"

# Each worker and each child process compiles the same programs: share them.
CACHE = Path(os.environ.get("PYTEST_CACHE_ROOT", REPOSITORY / ".pytest_cache")) / "jax"
CACHE_ENV = {
    "JAX_COMPILATION_CACHE_DIR": str(CACHE),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "0",
    "XLA_FLAGS": USERS_FLAGS,
}
jax.config.update("jax_compilation_cache_dir", str(CACHE))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)


LONGEST = (
    *("test_processes.py", "test_train.py", "test_train_step.py", "test_stopped_runs.py"),
    *("test_jax_engine.py", "test_decoder.py", "test_plan.py", "test_compare.py"),
)


def pytest_collection_modifyitems(items):
    """The longest files first: a file stays in one worker, and a long one at the end leaves the others idle."""
    items.sort(key=lambda item: item.path.name not in LONGEST)


@pytest.fixture(scope="session")
def tokenizer():
    from trapo_jax.models import load_tokenizer

    return load_tokenizer(TINY_MODEL)


@pytest.fixture(scope="session")
def decoder():
    from trapo_jax.models import read_config

    return read_config(TINY_MODEL)


@pytest.fixture(scope="session")
def params(decoder):
    from trapo_jax.models import load_params

    return jax.device_put(load_params(TINY_MODEL, decoder))


@pytest.fixture(scope="session")
def problems(tokenizer):
    from trapo_jax.data import card_shuffles_splits, encode_examples

    splits = card_shuffles_splits(seed=0, num_train=32, num_validation=8, num_test=8)
    return encode_examples(splits["train"], tokenizer, max_prompt_length=16)[0]


def run_command(*arguments, timeout=300, cwd=REPOSITORY, **environment):
    """Runs `python -m trapo_jax.<...>` in a separate process."""
    return subprocess.run(
        [sys.executable, "-m", *map(str, arguments)],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=timeout,
        env={**os.environ, **CACHE_ENV, **environment},
    )


# A short run of the default job, for whoever stops, spoils or repeats it.
JOB = (
    "train.num_steps=12",
    "train.warmup_steps=2",
    "checkpoint.every=3",
    "checkpoint.keep_best=1",
    "evaluation.every=5",
    "evaluation.num_samples=2",
    "data.num_validation=16",
    "data.num_test=24",
)


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory, worker_id):
    """The job's folder and what it printed, after a run without a fault; one run serves all workers."""
    root = tmp_path_factory.getbasetemp()
    root = root if worker_id == "master" else root.parent
    folder, output = root / "uninterrupted", root / "uninterrupted.txt"
    with FileLock(root / "uninterrupted.lock"):
        if not output.exists():
            result = run_command("trapo_jax.train", f"output_dir={folder}", *JOB)
            assert result.returncode == 0, result.stderr
            output.write_text(result.stdout)
    return folder, output.read_text()
