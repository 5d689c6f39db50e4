"""Compares rollout engines on the same weights, prompts and sampled lengths, side by side in one run.

    python tools/bench_rollout.py --model models/smollm2_135m --workload uniform
    python tools/bench_rollout.py --model models/smollm2_135m --workload trapo --engines ours,barrier
    python tools/bench_rollout.py ... --engines ours,transformers,tunix --tunix-python VENV/bin/python --json FILE

Engines: `ours`; `barrier`, ours made to finish a micro-group of all problems before the next begins; `unshared`, the
same with the prompt run through the model for every rollout, as in the authors' loop; `transformers` (`generate`,
torch); `tunix` (its own sampler, in an environment of its own).
Each runs in a process of its own and is asked in turn, A B A B ..., after one round that compiles.

Workloads: `uniform` is 1, 16 and 64 rows of 64 new tokens each, or as `--rows` and the options after it say. `trapo` is one step of TRAPO's `paper` guidance on
32 problems: ragged prompts and experts, rewards and completion lengths drawn in advance (log-normal), so that every
engine brings the same tokens (in batches, rows that are done are padded until the longest is); with it `grpo`, the
same number of tokens as eight unguided rollouts a problem.
An engine that cannot refill its rows takes the rounds in batches of `--slots`.

A model folder that holds no weights (`configs/architectures/...`) gets random ones, in a temporary folder: what
is sampled does not matter here.
"""

import argparse
import contextlib
import functools
import json
import math
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from bench_workers import Job, common_options, start_workers, take_turns
from trapo_jax.methods import make_method
from trapo_jax.models import (
    DecoderConfig,
    abstract_params,
    export_model,
    find_model,
    init_params,
    read_config,
)
from trapo_jax.rollouts.guidance import Guidance
from trapo_jax.types import Expert, MicroGroup, Problem

ENGINES = ("ours", "barrier", "unshared", "transformers", "tunix")
WORKER = Path(__file__).with_name("bench_rollout_worker.py")
NUM_PROBLEMS = 32
UNGUIDED = MicroGroup(8, 0.0, -1.0)


def main() -> int:
    args = parse()
    with model_folder(args.model) as folder:
        return compare(args, folder)


def compare(args: argparse.Namespace, folder: Path) -> int:
    console = Console(width=max(132, Console().width))
    jobs = make_jobs(args, read_config(folder).vocab_size)
    workers = start_workers(
        WORKER, args.engines, str(folder), args.dtype, tunix_python=args.tunix_python
    )
    results: dict[str, dict[str, list[dict]]] = {}
    for job in jobs:
        progress = functools.partial(track, console=console)
        results[job["name"]] = take_turns(workers, job, args.repeats, progress)
        for name, replies in results[job["name"]].items():
            if any(reply["decoded_tokens"] != num_tokens(job) for reply in replies):
                sys.exit(f"{name} did not decode the {num_tokens(job)} tokens of {job['name']}")
    for worker in workers:
        worker.close()
    limits = measure_limits(folder, args.dtype, sorted({job["slots"] for job in jobs}))
    report = [
        summary(job, name, rounds[1:], rounds[0], limits)
        for job in jobs
        for name, rounds in results.get(job["name"], {}).items()
    ]
    show(console, report, limits)
    if args.json:
        args.json.write_text(json.dumps({"limits": limits, "results": report}, indent=2) + "\n")
    return 0


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").strip(), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    common_options(parser)
    parser.add_argument(
        "--engines",
        default="ours,barrier,unshared,transformers",
        type=lambda text: text.split(","),
        help=f"of {', '.join(ENGINES)}",
    )
    parser.add_argument("--workload", choices=("uniform", "trapo"), default="trapo")
    parser.add_argument(
        "--rows",
        default=[1, 16, 64],
        type=lambda text: [*map(int, text.split(","))],
        help="uniform: so many at once, one measurement each (default 1,16,64)",
    )
    uniform_options(parser)
    parser.add_argument("--slots", type=int, default=16, help="rows at once, trapo (default 16)")
    parser.add_argument(
        "--median-len",
        type=int,
        default=24,
        help="trapo: median of a whole response's length, in tokens (default 24)",
    )
    args = parser.parse_args(arguments)
    for name in args.engines:
        if name not in ENGINES:
            parser.error(f"--engines: no {name!r}; there are {', '.join(ENGINES)}")
    return args


def uniform_options(parser: argparse.ArgumentParser) -> None:
    """Options of all that samples rows of one length with our engine."""
    parser.add_argument(
        "--prompt-len", type=int, default=32, help="uniform: tokens of a prompt (default 32)"
    )
    parser.add_argument("--new-len", type=int, default=64, help="uniform: new tokens (default 64)")
    parser.add_argument(
        "--segment-len",
        type=int,
        default=16,
        help="ours: tokens decoded between two looks at the queue (default 16)",
    )
    parser.add_argument(
        "--prefill-tokens",
        type=int,
        default=512,
        help="ours: tokens of prompts run through the model at once, at most (default 512)",
    )
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))


@contextlib.contextmanager
def model_folder(path: str) -> Iterator[Path]:
    """The model's folder; if it holds no weights, for a while one of the same shape that does."""
    # The engines need the GPU's memory.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    folder = find_model(path)
    if any(folder.glob("*.safetensors")):
        yield folder
        return
    config = read_config(folder)
    with tempfile.TemporaryDirectory() as scratch:
        params = jax.jit(functools.partial(init_params, config, seed=0))()
        export_model(params, config, source=folder, destination=Path(scratch) / folder.name)
        del params
        yield Path(scratch) / folder.name


# The workloads: what every engine is to decode, drawn in advance.


def make_jobs(args: argparse.Namespace, vocab_size: int) -> list[Job]:
    rng = np.random.default_rng(0)
    if args.workload == "uniform":
        lens = args.prompt_len, args.new_len
        jobs = [uniform_job(rng, rows, *lens, vocab_size) for rows in args.rows]
    else:
        trapo = trapo_job(rng, args.slots, args.median_len, vocab_size)
        jobs = [trapo, grpo_job(trapo)]
    options = {"segment_len": args.segment_len, "prefill_tokens": args.prefill_tokens}
    return [{**job, "engine": options} for job in jobs]


def uniform_job(
    rng: np.random.Generator, num_rows: int, prompt_len: int, new_len: int, vocab_size: int
) -> Job:
    problems = [
        {
            "prompt": random_ids(rng, prompt_len, vocab_size),
            "expert": [],
            "rewards": [0.0],
            "num_new": [new_len],
        }
        for _ in range(num_rows)
    ]
    return finished_job(f"uniform {num_rows}", problems, [MicroGroup(1, 0.0, -1.0)], num_rows)


def trapo_job(rng: np.random.Generator, slots: int, median_len: int, vocab_size: int) -> Job:
    problems = []
    for _ in range(NUM_PROBLEMS):
        solve_rate = rng.beta(0.6, 0.9)  # many hopeless, some easy, few between
        problems.append(
            {
                "prompt": random_ids(rng, log_normal(rng, 48, 0.4, 16, 128), vocab_size),
                "expert": random_ids(
                    rng, log_normal(rng, median_len, 0.5, 8, 4 * median_len), vocab_size
                ),
                "rewards": [float(rng.random() < solve_rate) for _ in range(8)],
                "num_new": [log_normal(rng, median_len, 0.9, 2, 8 * median_len) for _ in range(8)],
            }
        )
    job = finished_job("trapo", problems, make_method("trapo").micro_groups, slots)
    for row in (row for rows in job["rounds"] for row in rows):  # a guided rollout has less to say
        problem, j = problems[row["problem"]], row["sample"]
        share = 1 - row["prefix_len"] / max(1, len(problem["expert"]))
        problem["num_new"][j] = row["num_new"] = max(1, round(problem["num_new"][j] * share))
    return job


def grpo_job(trapo: Job) -> Job:
    """Eight unguided rollouts a problem, as many tokens in all."""
    tokens = num_tokens(trapo)
    lens = np.array([problem["unguided_len"] for problem in trapo["problems"]], float)
    scaled = np.maximum(1, np.floor(lens * tokens / lens.sum())).astype(int)
    for i in range(tokens - int(scaled.sum())):  # what rounding left over
        scaled.flat[i % scaled.size] += 1
    problems = [
        {**problem, "num_new": row.tolist()}
        for problem, row in zip(trapo["problems"], scaled, strict=True)
    ]
    return {
        **finished_job("grpo", problems, [UNGUIDED], trapo["slots"]),
        "only": ["ours"],
    }


def finished_job(
    name: str, problems: list[dict], micro_groups: Sequence[MicroGroup], slots: int
) -> Job:
    """Adds the rounds: what the guidance comes to, one list of rows a micro-group."""
    rounds: list[list[dict]] = [[] for _ in micro_groups]
    longest = max(max(*p["num_new"], len(p["expert"])) for p in problems)
    scheduler = Guidance(tuple(micro_groups), longest)
    for i, p in enumerate(problems):
        p.setdefault("unguided_len", list(p["num_new"]))
        experts = (Expert(tuple(p["expert"])),) if p["expert"] else ()
        problem = Problem(f"{i:016x}", tuple(p["prompt"]), "", experts)
        state = scheduler.start(problem)
        for rows in rounds:  # whose rewards settle the next one's guidance
            for request in scheduler.ready(state):
                j = request.sample_index
                state = scheduler.observe(state, j, p["rewards"][j])
                if request.prefix_len < len(p["expert"]) or not request.prefix_len:
                    rows.append(
                        {
                            "problem": i,
                            "sample": j,
                            "prefix_len": request.prefix_len,
                            "num_new": p["num_new"][j],
                        }
                    )
    return {
        "name": name,
        "problems": problems,
        "micro_groups": [[g.size, g.ratio, g.threshold] for g in micro_groups],
        "rounds": [rows for rows in rounds if rows],
        "slots": slots,
    }


def num_tokens(job: Job) -> int:
    return sum(row["num_new"] for rows in job["rounds"] for row in rows)


def bytes_to_move(job: Job, limits: dict[str, Any]) -> int:
    """By decoding at least: the weights once a step, and for each token the keys and values before it."""
    rows = [row for rows in job["rounds"] for row in rows]
    longest = max(row["num_new"] for row in rows)
    num_steps = max(longest, -(-num_tokens(job) // job["slots"]))
    contexts = [len(job["problems"][row["problem"]]["prompt"]) + row["prefix_len"] for row in rows]
    num_entries = sum(
        row["num_new"] * context + math.comb(row["num_new"], 2)
        for row, context in zip(rows, contexts, strict=True)
    )
    return num_steps * limits["weight_bytes"] + num_entries * limits["entry_bytes"]


def random_ids(rng: np.random.Generator, length: int, vocab_size: int) -> list[int]:
    return rng.integers(3, vocab_size, length).tolist()


def log_normal(rng: np.random.Generator, median: float, sigma: float, low: int, high: int) -> int:
    return int(np.clip(round(rng.lognormal(math.log(median), sigma)), low, high))


# What the machine allows.


def measure_limits(folder: Path, dtype: str, rows: Sequence[int]) -> dict[str, Any]:
    jax.config.update("jax_default_matmul_precision", "highest")  # as the engines
    config = read_config(folder, dtype=dtype)
    return {
        "matmul_tokens_per_sec": {n: matmul_tokens_per_sec(config, n) for n in rows},
        "memory_gb_per_sec": reading_gb_per_sec(),
        **weight_and_entry_bytes(config),
        "device": str(jax.devices()[0].device_kind),
    }


def weight_and_entry_bytes(config: DecoderConfig) -> dict[str, int]:
    """That a decode step reads: once the weights, and keys and values of every token that a token sees."""
    item = jnp.dtype(config.dtype).itemsize
    params = abstract_params(config)
    if not config.tied_embeddings:
        del params["embedding"]  # of which a step reads a row a token
    return {
        "weight_bytes": sum(x.size for x in jax.tree.leaves(params)) * item,
        "entry_bytes": 2 * config.num_layers * config.num_kv_heads * config.head_dim * item,
    }


def matmul_tokens_per_sec(config: DecoderConfig, num_rows: int) -> float:
    """If decoding so many rows were the model's matmuls alone, whichever way round is faster."""
    weights = [jnp.ones(shape, config.dtype) for shape in matmul_shapes(config)]
    turned = [w.T + 0 for w in weights]
    x = jnp.ones((num_rows, max(w.shape[0] for w in weights)), config.dtype)

    @functools.partial(jax.jit, static_argnums=0)
    def multiply(one_pass, weights, num_passes):
        def another(i, total):  # with other numbers each time, lest it is done once
            products = jax.lax.optimization_barrier(one_pass(weights, x + i.astype(x.dtype)))
            return total + sum(jnp.sum(y, dtype=jnp.float32) for y in products)

        return jax.lax.fori_loop(0, num_passes, another, 0.0)

    on_their_left = lambda weights, x: [x[:, : w.shape[0]] @ w for w in weights]
    on_their_right = lambda weights, x: [w @ x[:, : w.shape[1]].T for w in weights]
    return num_rows / min(
        secs_a_pass(functools.partial(multiply, on_their_left, weights)),
        secs_a_pass(functools.partial(multiply, on_their_right, turned)),
    )


def reading_gb_per_sec() -> float:
    """Of memory, by adding it up or multiplying it with a vector, whichever is faster."""
    big = jnp.ones((2**14, 2**13), jnp.float32)

    @functools.partial(jax.jit, static_argnums=0)
    def read(one_pass, big, num_passes):
        another = lambda i, total: total + one_pass(big, i.astype(jnp.float32))
        return jax.lax.fori_loop(0, num_passes, another, jnp.zeros(len(big)))

    add_up = lambda big, i: jnp.sum(jnp.maximum(big, i), axis=1)
    multiply = lambda big, i: big @ jnp.full(big.shape[1], i)
    ways = [functools.partial(read, one_pass, big) for one_pass in (add_up, multiply)]
    return big.nbytes / min(map(secs_a_pass, ways)) / 1e9


def matmul_shapes(config: DecoderConfig) -> list[tuple[int, int]]:
    """Of every matrix that a token is multiplied with."""
    of_layer = [
        (config.width, (config.num_heads + 2 * config.num_kv_heads) * config.head_dim),
        (config.num_heads * config.head_dim, config.width),
        (config.width, 2 * config.mlp_width),
        (config.mlp_width, config.width),
    ]
    return of_layer * config.num_layers + [(config.width, config.vocab_size)]


def secs_a_pass(run: Callable[[int], Any]) -> float:
    """Median seconds of each of `num_passes` of `run(num_passes)`: enough that starting them does not count."""

    def timed(num_passes: int) -> float:
        started = time.perf_counter()
        jax.block_until_ready(run(num_passes))
        return (time.perf_counter() - started) / num_passes

    timed(1)  # compiles
    num_passes = min(100, math.ceil(0.2 / timed(1)))
    return statistics.median(timed(num_passes) for _ in range(5))


# What came out.


def summary(job: Job, engine: str, rounds: list[dict], warm_up: dict, limits: dict) -> dict:
    seconds = statistics.median(r["seconds"] for r in rounds)
    tokens, slots = num_tokens(job), job["slots"]
    bound = limits["matmul_tokens_per_sec"][slots]
    moving = bytes_to_move(job, limits) / limits["memory_gb_per_sec"] / 1e9
    return {
        "workload": job["name"],
        "engine": engine,
        "seconds": seconds,
        "all_seconds": [r["seconds"] for r in rounds],
        "tokens": tokens,
        "tokens_per_sec": tokens / seconds,
        "share_of_matmul_bound": tokens / seconds / bound,
        "share_of_memory_bound": moving / seconds,
        "slot_utilization": rounds[-1].get("slot_utilization"),
        "decode_steps": rounds[-1].get("decode_steps"),
        "prefilled_tokens": rounds[-1].get("prefilled_tokens"),
        "compiles_after_warm_up": sum(r["compiles"] for r in rounds)
        if "compiles" in rounds[0]
        else None,
        "warm_up_seconds": warm_up["seconds"],
        "process_peak_mib": max(r["peak_mib"] for r in rounds),
    }


def show(console: Console, report: list[dict], limits: dict) -> None:
    table = Table(title="medians; `ours` = 1", title_justify="left")
    columns = (
        "workload",
        "engine",
        "tokens/s",
        "time",
        "ratio",
        "of matmul bound",
        "of memory bound",
        "slots in use",
        "decode steps",
        "prefilled",
        "compiles",
        "process peak MiB",
    )
    for name in columns:
        table.add_column(name, justify="left" if name in ("workload", "engine") else "right")
    ours = {r["workload"]: r["seconds"] for r in report if r["engine"] == "ours"}
    show_share = lambda x: "" if x is None else f"{x:.0%}"
    show_count = lambda x: "" if x is None else f"{x:,}"
    for r in report:
        base = ours.get(r["workload"])
        table.add_row(
            r["workload"],
            r["engine"],
            f"{r['tokens_per_sec']:,.0f}",
            f"{r['seconds']:.2f} s",
            f"{r['seconds'] / base:.2f}" if base else "",
            show_share(r["share_of_matmul_bound"]),
            show_share(r["share_of_memory_bound"]),
            show_share(r["slot_utilization"]),
            show_count(r["decode_steps"]),
            show_count(r["prefilled_tokens"]),
            show_count(r["compiles_after_warm_up"]),
            f"{r['process_peak_mib']:,.0f}",
        )
    console.print(table)
    bounds = ", ".join(f"{n}: {v:,.0f}" for n, v in limits["matmul_tokens_per_sec"].items())
    console.print(
        f"{limits['device']}: the model's matmuls alone allow, by rows, tokens/s {bounds}; memory is read "
        f"at {limits['memory_gb_per_sec']:,.1f} GB/s, and decoding reads {limits['weight_bytes'] / 1e9:.2f} GB of weights "
        f"a step and {limits['entry_bytes']:,} bytes for each token that a token sees"
    )


if __name__ == "__main__":
    sys.exit(main())
