"""Profiles the rollout engine: time per program, decoding time per operation, and the machine's limits.

    python tools/profile_sampling.py --model models/smollm2_135m --rows 16
    python tools/profile_sampling.py --model DIR --dtype bfloat16 --rows 64 --prompt-len 128 --new-len 256 \\
        --segment-len 32

The engine samples one row per slot, once to warm up and once to measure. The profiler waits for each program to finish,
so that a program's time does not include other programs. An operation's time is summed over the threads that executed
it. If the model folder has no weights (`configs/architectures/...`), random weights are used.
"""

import argparse
import collections
import functools
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
from jax.profiler import ProfileData
from rich.console import Console
from rich.table import Table

from bench_jobs import make_jobs, uniform_options
from bench_limits import (
    bytes_to_move,
    matmul_tokens_per_sec,
    model_folder,
    read_gb_per_sec,
    weight_and_entry_bytes,
)
from bench_rollout_worker import run_freely, scripted_engine
from trapo_jax.models import load_params, read_config

PROGRAM = "jit_decode_segment"  # name of the program in a profile


def main() -> int:
    args = parse()
    jax.config.update("jax_default_matmul_precision", "highest")
    with model_folder(args.model) as folder, tempfile.TemporaryDirectory() as scratch:
        profile(args, folder, Path(scratch))
    return 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").strip(), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="Hugging Face model folder")
    parser.add_argument(
        "--rows", type=int, default=16, help="number of concurrent rows (default 16)"
    )
    parser.add_argument(
        "--operations",
        type=int,
        default=20,
        help="number of operations to list (default 20); 0 lists none",
    )
    uniform_options(parser)
    args = parser.parse_args()
    args.workload, args.rows = "uniform", [args.rows]
    return args


def profile(args: argparse.Namespace, folder: Path, scratch: Path) -> None:
    console = Console(width=max(120, Console().width))
    config = read_config(folder, dtype=args.dtype)
    params = load_params(folder, config)
    [job] = make_jobs(args, config.vocab_size)
    engine = scripted_engine(config, job)
    [replica] = engine._replicas
    secs_of: dict[str, list[float]] = collections.defaultdict(list)
    last_call: dict[str, Any] = {}

    def timed(name: str, program: Any) -> Callable:
        @functools.wraps(program)
        def run(*arguments, **options):
            # Keep only the shapes, because donated arrays are deleted.
            last_call[name] = jax.tree.map(jax.typeof, arguments), options
            started = time.perf_counter()
            result = jax.block_until_ready(program(*arguments, **options))
            secs_of[name].append(time.perf_counter() - started)
            return result

        return run

    programs = replica._programs
    replica._programs = type(programs)(
        *(program and timed(name, program) for name, program in programs._asdict().items())
    )
    seconds = 0.0
    for _ in range(2):  # The first round compiles.
        secs_of.clear()
        started = time.perf_counter()
        engine.update_weights(params)
        run_freely(engine, job)
        seconds = time.perf_counter() - started
    print_programs(console, secs_of, seconds)

    num_steps = job["rounds"][0][0]["num_new"]
    limits = {
        "memory_gb_per_sec": read_gb_per_sec(),
        **weight_and_entry_bytes(config),
    }
    bound = bytes_to_move(job, limits) / num_steps / limits["memory_gb_per_sec"] / 1e6
    matmuls = job["slots"] / matmul_tokens_per_sec(config, job["slots"]) * 1e3
    step = sum(secs_of["decode_segment"]) / num_steps * 1e3
    console.print(
        f"{jax.devices()[0].device_kind}: a decode step of {job['slots']} rows takes {step:.2f} ms; reading weights, "
        f"keys and values takes {bound:.2f} ms ({bound / step:.0%}) at {limits['memory_gb_per_sec']:,.0f} GB/s, and "
        f"the matmuls alone take {matmuls:.2f} ms ({matmuls / step:.0%})"
    )
    if args.operations:
        replica._programs = programs
        meanings = operation_meanings(programs.decode_segment, *last_call["decode_segment"])
        with jax.profiler.trace(str(scratch)):
            run_freely(engine, job)
        print_operations(console, scratch, meanings, num_steps, args.operations)


def print_programs(console: Console, secs_of: dict[str, list[float]], seconds: float) -> None:
    table = Table(title="time per program in one round", title_justify="left")
    for name in ("program", "calls", "ms", "share"):
        table.add_column(name, justify="left" if name == "program" else "right")
    rest = seconds - sum(map(sum, secs_of.values()))
    rows = [(name, len(calls), sum(calls)) for name, calls in secs_of.items()]
    for name, count, secs in [*sorted(rows, key=lambda row: -row[2]), ("(the host)", "", rest)]:
        table.add_row(name, str(count), f"{secs * 1e3:,.1f}", f"{secs / seconds:.0%}")
    console.print(table)


def operation_meanings(program: Any, arguments: Any, options: dict) -> dict[str, str]:
    """Returns the result type and the origin of each operation in a compiled program, keyed by name."""
    text = program.lower(*arguments, **options).compile().as_text()
    found = re.findall(r'%(\S+) = (\S+) .*?op_name="([^"]*)"', text)
    return {
        normalize_name(name): f"{shape.split('{')[0]} {'/'.join(origin.split('/')[-2:])}"
        for name, shape, origin in found
    }


def print_operations(
    console: Console, folder: Path, meanings: dict[str, str], num_steps: int, count: int
) -> None:
    total: dict[str, float] = collections.defaultdict(float)
    calls = collections.Counter[str]()
    for name, nanoseconds in operations(folder):
        is_loop = name.startswith("while")  # Operations in the loop's body are counted separately.
        if name in meanings and not is_loop:
            total[name] += nanoseconds
            calls[name] += 1
    by_meaning: dict[tuple[str, str], float] = collections.defaultdict(float)
    calls_of = collections.Counter[tuple[str, str]]()
    for name, nanoseconds in total.items():
        key = re.sub(r"_\d+$", "", name), meanings[name]
        by_meaning[key] += nanoseconds
        calls_of[key] += calls[name]
    table = Table(title="decoding time by operation", title_justify="left")
    for name in ("ms per step", "calls per step", "operation", "result and origin"):
        table.add_column(name, justify="right" if "step" in name else "left")
    for key, nanoseconds in sorted(by_meaning.items(), key=lambda item: -item[1])[:count]:
        ms = nanoseconds / num_steps / 1e6
        table.add_row(f"{ms:.3f}", f"{calls_of[key] / num_steps:.1f}", *key)
    console.print(table)


def operations(folder: Path) -> Iterator[tuple[str, float]]:
    """Yields the name and the duration in nanoseconds of each operation executed by the decode program."""
    for file in folder.rglob("*.xplane.pb"):
        for plane in ProfileData.from_file(str(file)).planes:
            for line in plane.lines:
                for event in line.events:
                    if dict(event.stats).get("hlo_module") == PROGRAM:
                        yield normalize_name(event.name), event.duration_ns


def normalize_name(name: str) -> str:
    """Normalizes the separators in a name, which differ between HLO and the profile."""
    return re.sub(r"[.-]", "_", name)


if __name__ == "__main__":
    sys.exit(main())
