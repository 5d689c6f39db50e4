"""Compares rollout engines on the same weights, prompts and numbers of sampled tokens.

    python tools/bench_rollout.py --model models/smollm2_135m --workload uniform
    python tools/bench_rollout.py --model models/smollm2_135m --workload trapo --engines ours,barrier
    python tools/bench_rollout.py ... --engines ours,transformers,tunix --tunix-python VENV/bin/python --json FILE

Engines: `ours` is the trapo_jax engine; `barrier` is the same engine, but a micro-group starts only after all problems
have finished the previous one; `unshared` is like `barrier`, but prefills the prompt for every rollout, as the released
code does; `transformers` is the `generate` method of the transformers library (PyTorch); `tunix` is the Tunix sampler,
which runs in a separate Python environment. Each engine runs in a separate process. After one round for compilation,
the engines take turns (A B A B ...).

Workloads: `uniform` decodes `--rows` rows of equal length. `trapo` is one step with the guidance of TRAPO's `paper`
preset on 32 problems with prompts and expert solutions of different lengths. Rewards and (log-normal) completion
lengths are drawn in advance, so that every engine decodes the same number of tokens. With this workload, `ours` also
runs `grpo`, which samples the same number of tokens in eight unguided rollouts per problem. Engines that cannot refill
rows decode batches of `--slots` rows, padded to the longest row.

If the model folder has no weights (`configs/architectures/...`), random weights are used.
"""

import argparse
import functools
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import track
from rich.table import Table

from bench_jobs import make_jobs, num_tokens, uniform_options
from bench_limits import bytes_to_move, measure_limits, model_folder
from bench_workers import Job, common_options, start_workers, take_turns
from trapo_jax.models import (
    read_config,
)

ENGINES = ("ours", "barrier", "unshared", "transformers", "tunix")
WORKER = Path(__file__).with_name("bench_rollout_worker.py")


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
                sys.exit(f"{name} did not decode exactly {num_tokens(job)} tokens in {job['name']}")
    for worker in workers:
        worker.close()
    limits = measure_limits(folder, args.dtype, sorted({job["slots"] for job in jobs}))
    report = [
        summarize(job, name, rounds[1:], rounds[0], limits)
        for job in jobs
        for name, rounds in results.get(job["name"], {}).items()
    ]
    print_table(console, report, limits)
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
        help=f"any of {', '.join(ENGINES)} (default ours,barrier,unshared,transformers)",
    )
    parser.add_argument("--workload", choices=("uniform", "trapo"), default="trapo")
    parser.add_argument(
        "--rows",
        default=[1, 16, 64],
        type=lambda text: [*map(int, text.split(","))],
        help="uniform: numbers of rows to measure (default 1,16,64)",
    )
    uniform_options(parser)
    parser.add_argument(
        "--slots", type=int, default=16, help="trapo: number of concurrent rows (default 16)"
    )
    parser.add_argument(
        "--median-len",
        type=int,
        default=24,
        help="trapo: median length of a response in tokens (default 24)",
    )
    args = parser.parse_args(arguments)
    for name in args.engines:
        if name not in ENGINES:
            parser.error(
                f"--engines: unknown engine {name!r}; expected any of {', '.join(ENGINES)}"
            )
    return args


def summarize(job: Job, engine: str, rounds: list[dict], warm_up: dict, limits: dict) -> dict:
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


def print_table(console: Console, report: list[dict], limits: dict) -> None:
    table = Table(title="medians; time ratios are relative to `ours`", title_justify="left")
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
        f"{limits['device']}: tokens/s with only the model's matmuls, by number of rows: {bounds}. Memory is read at "
        f"{limits['memory_gb_per_sec']:,.1f} GB/s; decoding reads {limits['weight_bytes'] / 1e9:.2f} GB of weights per "
        f"step and {limits['entry_bytes']:,} bytes per attended token"
    )


if __name__ == "__main__":
    sys.exit(main())
