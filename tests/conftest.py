"""Defines the fixtures shared by several test packages, and the compilation settings for the test session."""

import os
import tempfile
from importlib.metadata import version
from pathlib import Path

from support.commands import REPOSITORY, TINY_MODEL, run_command
from support.short_run import JOB

# Test programs are small and run only a few times, so most optimizations take more time than they
# save. Without any optimization, however, programs take several times as long.
FAST_COMPILATION = (
    "--xla_backend_optimization_level=1 --xla_llvm_disable_expensive_passes=true "
    "--xla_cpu_parallel_codegen_split_count=1"
)
# Later versions reject this flag.
if version("jaxlib").startswith("0.10."):
    FAST_COMPILATION += " --xla_cpu_use_fusion_emitters=false"
# A parent test process may have set these flags already.
if FAST_COMPILATION not in (flags := os.environ.get("XLA_FLAGS", "")):
    os.environ["XLA_FLAGS"] = f"{flags} {FAST_COMPILATION}"

# Several processes share the cores, so additional threads would only wait for each other.
os.environ["OMP_NUM_THREADS"] = "1"

# Test processes and the processes that they start compile the same programs, so they share one
# cache, which persists after the session. Its keys include the program, flags, device and versions.
os.environ["JAX_COMPILATION_CACHE_DIR"] = str(REPOSITORY / ".pytest_cache" / "jax")
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "0"

# No test uses the Hugging Face Hub or the user's caches.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HOME"] = str(Path(tempfile.gettempdir()) / "no_hugging_face_caches")

import hypothesis  # noqa: E402
import jax  # noqa: E402
import pytest  # noqa: E402
from filelock import FileLock  # noqa: E402

import trapo_jax.distributed.log_level  # noqa: E402, F401  configures libtpu, if it is installed

# By default, property tests use the same examples in every session. They have no time limit, because
# the machine may be slow. Set `HYPOTHESIS_PROFILE=random` to draw many other examples.
PROPERTIES = {"deadline": None, "suppress_health_check": [hypothesis.HealthCheck.too_slow]}
hypothesis.settings.register_profile("fixed", derandomize=True, database=None, **PROPERTIES)
hypothesis.settings.register_profile("random", max_examples=2000, **PROPERTIES)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "fixed"))


def pytest_collection_modifyitems(items):
    """Schedules files with slow tests first.

    Each file runs in a single worker, so a slow file at the end would leave the other workers idle.
    """
    slow_files = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow_files)


@pytest.fixture
def hub_home(tmp_path, monkeypatch):
    """Returns an empty Hugging Face home folder, whose Hub cache replaces the user's. See also `support.hub`."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "home" / "hub"))
    return tmp_path / "home"


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


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory, worker_id):
    """Returns the folder and the printed output of an uninterrupted run of `JOB`, shared by all workers."""
    root = tmp_path_factory.getbasetemp()
    root = root if worker_id == "master" else root.parent
    folder, output = root / "uninterrupted", root / "uninterrupted.txt"
    with FileLock(root / "uninterrupted.lock"):
        if not output.exists():
            result = run_command("trapo_jax.train", f"output_dir={folder}", *JOB)
            assert result.returncode == 0, result.stderr
            output.write_text(result.stdout)
    return folder, output.read_text()
