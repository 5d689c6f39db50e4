"""Measures a machine's hardware limits: its matmul throughput for a model's shapes, and its memory bandwidth."""

import contextlib
import functools
import math
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from bench_jobs import num_tokens
from bench_workers import Job
from trapo_jax.models import (
    DecoderConfig,
    abstract_params,
    export_model,
    find_model,
    init_params,
    read_config,
)


@contextlib.contextmanager
def model_folder(path: str) -> Iterator[Path]:
    """Yields the model folder or, if it has no weights, a temporary folder with random weights of the same shapes."""
    # Leave GPU memory for the engines.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    folder = find_model(path, weights=True)
    if any(folder.glob("*.safetensors")):
        yield folder
        return
    config = read_config(folder)
    with tempfile.TemporaryDirectory() as scratch:
        params = jax.jit(functools.partial(init_params, config, seed=0))()
        export_model(params, config, source=folder, destination=Path(scratch) / folder.name)
        del params
        yield Path(scratch) / folder.name


def measure_limits(folder: Path, dtype: str, rows: Sequence[int]) -> dict[str, Any]:
    """Measures the matmul throughput and the memory bandwidth of this machine.

    Args:
      folder: the model folder.
      dtype: dtype of the matmuls.
      rows: numbers of rows for which to measure the matmuls.
    """
    # Use the same precision as the engines.
    jax.config.update("jax_default_matmul_precision", "highest")
    config = read_config(folder, dtype=dtype)
    return {
        "matmul_tokens_per_sec": {n: matmul_tokens_per_sec(config, n) for n in rows},
        "memory_gb_per_sec": read_gb_per_sec(),
        **weight_and_entry_bytes(config),
        "device": str(jax.devices()[0].device_kind),
    }


def weight_and_entry_bytes(config: DecoderConfig) -> dict[str, int]:
    """Returns the size in bytes of the weights, which a decode step reads once, and of one token's keys and values."""
    item = jnp.dtype(config.dtype).itemsize
    params = abstract_params(config)
    if not config.tied_embeddings:
        del params["embedding"]  # A step reads only one row of the embedding per token.
    return {
        "weight_bytes": sum(x.size for x in jax.tree.leaves(params)) * item,
        "entry_bytes": 2 * config.num_layers * config.num_kv_heads * config.head_dim * item,
    }


def matmul_tokens_per_sec(config: DecoderConfig, num_rows: int) -> float:
    """Returns the decoding throughput, in tokens per second, for `num_rows` rows if only the model's matmuls took time.

    The matmuls are measured with the weights as left operands and as right operands. The faster variant determines the
    result.
    """
    weights = [jnp.ones(shape, config.dtype) for shape in matmul_shapes(config)]
    transposed = [w.T + 0 for w in weights]
    x = jnp.ones((num_rows, max(w.shape[0] for w in weights)), config.dtype)

    @functools.partial(jax.jit, static_argnums=0)
    def multiply(one_pass, weights, num_passes):
        def add_pass(i, total):  # Every pass has different inputs, so no result can be reused.
            products = jax.lax.optimization_barrier(one_pass(weights, x + i.astype(x.dtype)))
            return total + sum(jnp.sum(y, dtype=jnp.float32) for y in products)

        return jax.lax.fori_loop(0, num_passes, add_pass, 0.0)

    weights_on_the_right = lambda weights, x: [x[:, : w.shape[0]] @ w for w in weights]
    weights_on_the_left = lambda weights, x: [w @ x[:, : w.shape[1]].T for w in weights]
    return num_rows / min(
        secs_per_pass(functools.partial(multiply, weights_on_the_right, weights)),
        secs_per_pass(functools.partial(multiply, weights_on_the_left, transposed)),
    )


def read_gb_per_sec() -> float:
    """Returns the memory bandwidth achieved by summing a matrix or multiplying it by a vector, whichever is faster."""
    big = jnp.ones((2**14, 2**13), jnp.float32)

    @functools.partial(jax.jit, static_argnums=0)
    def read(one_pass, big, num_passes):
        add_pass = lambda i, total: total + one_pass(big, i.astype(jnp.float32))
        return jax.lax.fori_loop(0, num_passes, add_pass, jnp.zeros(len(big)))

    add_up = lambda big, i: jnp.sum(jnp.maximum(big, i), axis=1)
    multiply = lambda big, i: big @ jnp.full(big.shape[1], i)
    candidates = [functools.partial(read, one_pass, big) for one_pass in (add_up, multiply)]
    return big.nbytes / min(map(secs_per_pass, candidates)) / 1e9


def matmul_shapes(config: DecoderConfig) -> list[tuple[int, int]]:
    """Returns the shapes of all matrices that multiply a token's activations."""
    layer = [
        (config.width, (config.num_heads + 2 * config.num_kv_heads) * config.head_dim),
        (config.num_heads * config.head_dim, config.width),
        (config.width, 2 * config.mlp_width),
        (config.mlp_width, config.width),
    ]
    return layer * config.num_layers + [(config.width, config.vocab_size)]


def secs_per_pass(run: Callable[[int], Any]) -> float:
    """Returns the median time per pass of `run(num_passes)`, with enough passes to hide the dispatch overhead."""

    def timed(num_passes: int) -> float:
        started = time.perf_counter()
        jax.block_until_ready(run(num_passes))
        return (time.perf_counter() - started) / num_passes

    timed(1)  # triggers compilation
    num_passes = min(100, math.ceil(0.2 / timed(1)))
    return statistics.median(timed(num_passes) for _ in range(5))


def bytes_to_move(job: Job, limits: dict[str, Any]) -> int:
    """Returns how many bytes decoding reads: all weights in each step, and all preceding keys and values per token."""
    rows = [row for rows in job["rounds"] for row in rows]
    longest = max(row["num_new"] for row in rows)
    num_steps = max(longest, -(-num_tokens(job) // job["slots"]))
    contexts = [len(job["problems"][row["problem"]]["prompt"]) + row["prefix_len"] for row in rows]
    num_entries = sum(
        row["num_new"] * context + math.comb(row["num_new"], 2)
        for row, context in zip(rows, contexts, strict=True)
    )
    return num_steps * limits["weight_bytes"] + num_entries * limits["entry_bytes"]
