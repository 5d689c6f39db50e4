"""Compares train steps on the same weights and rows: tokens per second and peak memory.

    python tools/bench_train.py --model models/smollm2_135m
    python tools/bench_train.py --model DIR --engines ours,torch,tunix --tunix-python VENV/bin/python --json FILE

Engines: `ours` is the train step of `trapo_jax.train`, including its metrics; `torch` is a plain PyTorch loop with the
transformers model; `tunix` is the step of the Tunix trainer, which runs in a separate Python environment. All of them
perform one AdamW step with clipped gradients on the mean cross-entropy of the responses, in micro-batches of the same
number of rows. Each engine runs in a separate process. After one round for compilation, the engines take turns
(A B A B ...). Their first losses must agree.

Workloads: `equal` has rows of equal length, so packing has no effect. `ragged` has responses of log-normal length:
`ours` packs them into rows, and the others pad each micro-batch to its longest row. `torch` sorts the rows by length;
`unsorted` is the same engine without sorting. `unpacked` is `ours` without packing: it pads all rows to the longest
one. `grouped` has groups of eight responses to one prompt, as in a training step: `ours` computes a prompt once for all
its responses in a row, and `unshared` is `ours` without that. `ours` saves the matmul results for the backward pass
(`model.remat=dots`).

With `--dtype bfloat16`, the weights are stored in float32 and cast for the matmuls; `torch` uses autocast. If the
model folder has no weights, random weights are used.
"""

import argparse
import functools
import json
import sys
from pathlib import Path

import jax
import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from bench_jobs import log_normal, random_ids
from bench_limits import matmul_tokens_per_sec, model_folder
from bench_workers import Job, common_options, median, start_workers, take_turns
from trapo_jax.models import read_config

ENGINES = {
    "ours": "ours",
    "unpacked": "ours, unpacked",
    "unshared": "ours, unshared",
    "torch": "torch",
    "unsorted": "torch, unsorted",
    "tunix": "tunix",
}
GROUP_SIZE = 8
WORKER = Path(__file__).with_name("bench_train_worker.py")
# Relative tolerances. The engines' losses differ slightly because they sum in different orders.
LOSS_TOLERANCES = {"float32": 1e-3, "bfloat16": 1e-2}


def main() -> int:
    args = parse()
    with model_folder(args.model) as folder:
        return compare(args, folder)


def compare(args: argparse.Namespace, folder: Path) -> int:
    console = Console(width=max(120, Console().width))
    config = read_config(folder, dtype=args.dtype)
    jobs = [make(args, config.vocab_size) for make in (equal_job, ragged_job, grouped_job)]
    report = []
    for job in jobs:  # Peak memory is measured per workload, so each workload gets new processes.
        workers = start_workers(
            WORKER, args.engines, str(folder), args.dtype, tunix_python=args.tunix_python
        )
        replies = take_turns(workers, job, args.repeats, functools.partial(track, console=console))
        for worker in workers:
            worker.close()
        losses = {name: found[0]["loss"] for name, found in replies.items()}
        check_losses(losses, job["name"], LOSS_TOLERANCES[args.dtype])
        report += [summarize(job, name, found[1:]) for name, found in replies.items()]
    # Use the same precision as the engines.
    jax.config.update("jax_default_matmul_precision", "highest")
    # The backward pass has twice the FLOPs of the forward pass.
    bound = matmul_tokens_per_sec(config, args.rows * args.row_len) / 3
    for result in report:
        result["share_of_matmul_bound"] = result["tokens_per_sec"] / bound
    print_table(console, report, bound)
    if args.json:
        limits = {"matmul_tokens_per_sec": bound, "device": jax.devices()[0].device_kind}
        args.json.write_text(json.dumps({"limits": limits, "results": report}, indent=2) + "\n")
    return 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").strip(), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    common_options(parser)
    parser.add_argument(
        "--engines",
        default="ours,torch",
        type=lambda text: text.split(","),
        help=f"any of {', '.join(ENGINES)} (default ours,torch)",
    )
    parser.add_argument("--rows", type=int, default=2, help="rows per micro-batch (default 2)")
    parser.add_argument(
        "--row-len", type=int, default=256, help="row length in tokens (default 256)"
    )
    parser.add_argument(
        "--num-rollouts",
        type=int,
        default=24,
        help="ragged and grouped: number of rollouts (default 24)",
    )
    parser.add_argument(
        "--dtype",
        default="float32",
        choices=tuple(LOSS_TOLERANCES),
        help="dtype of activations and matmuls (default float32)",
    )
    args = parser.parse_args()
    if args.dtype != "float32" and "tunix" in args.engines:
        parser.error("--engines: tunix can only be measured in float32")
    for name in args.engines:
        if name not in ENGINES:
            parser.error(
                f"--engines: unknown engine {name!r}; expected any of {', '.join(ENGINES)}"
            )
    args.engines = [ENGINES[name] for name in args.engines]
    return args


def equal_job(args: argparse.Namespace, vocab_size: int) -> Job:
    """Returns a job with two micro-batches of full rows."""
    rng = np.random.default_rng(0)
    rows = [
        {"prompt": random_ids(rng, 1, vocab_size), "response": random_ids(rng, n, vocab_size)}
        for n in [args.row_len - 1] * (2 * args.rows)
    ]
    return make_job("equal", rows, args)


def ragged_job(args: argparse.Namespace, vocab_size: int) -> Job:
    """Returns a job with prompts and responses of realistic lengths. The longest response is extended to fill its row."""
    rng = np.random.default_rng(1)
    rows = []
    for _ in range(args.num_rollouts):
        prompt = log_normal(rng, args.row_len / 12, 0.4, 4, args.row_len // 4)
        response = log_normal(rng, args.row_len / 6, 0.9, 2, args.row_len - prompt)
        rows.append(
            {
                "prompt": random_ids(rng, prompt, vocab_size),
                "response": random_ids(rng, response, vocab_size),
            }
        )
    longest = max(rows, key=lambda row: len(row["response"]))
    missing = args.row_len - len(longest["prompt"]) - len(longest["response"])
    longest["response"] += random_ids(rng, missing, vocab_size)
    return make_job("ragged", rows, args)


def grouped_job(args: argparse.Namespace, vocab_size: int) -> Job:
    """Returns a job in which groups of `GROUP_SIZE` responses have the same prompt."""
    rng = np.random.default_rng(2)
    rows, prompt = [], []
    for i in range(args.num_rollouts):
        if i % GROUP_SIZE == 0:
            prompt = random_ids(rng, args.row_len // 8, vocab_size)
        response = log_normal(rng, args.row_len / 10, 0.3, 2, args.row_len // 2)
        rows.append({"prompt": prompt, "response": random_ids(rng, response, vocab_size)})
    return make_job("grouped", rows, args)


def make_job(name: str, rows: list[dict], args: argparse.Namespace) -> Job:
    return {"name": name, "rows": rows, "micro_batch_rows": args.rows, "row_len": args.row_len}


def check_losses(losses: dict[str, float], job_name: str, tolerance: float) -> None:
    if max(losses.values()) - min(losses.values()) > tolerance * max(losses.values()):
        sys.exit(f"{job_name}: the engines' first losses differ: {losses}")


def summarize(job: Job, engine: str, replies: list[dict]) -> dict:
    seconds = median(replies, "seconds")
    lens = [(len(row["prompt"]), len(row["response"])) for row in job["rows"]]
    return {
        "workload": job["name"],
        "engine": engine,
        "seconds": seconds,
        "all_seconds": [reply["seconds"] for reply in replies],
        "tokens_per_sec": sum(map(sum, lens)) / seconds,
        "trained_tokens_per_sec": sum(response for _, response in lens) / seconds,
        "computed_tokens": replies[-1]["computed_tokens"],
        "process_peak_mib": max(reply["peak_mib"] for reply in replies),
    }


def print_table(console: Console, report: list[dict], bound: float) -> None:
    table = Table(
        title="medians; tokens exclude padding; time ratios are relative to `ours`",
        title_justify="left",
    )
    for name in ("workload", "engine"):
        table.add_column(name)
    for name in ("tokens/s", "trained/s", "step", "time ratio", "of matmul bound", "with padding"):
        table.add_column(name, justify="right")
    table.add_column("process peak MiB", justify="right")
    ours = {r["workload"]: r["seconds"] for r in report if r["engine"] == "ours"}
    for r in report:
        base = ours.get(r["workload"])
        table.add_row(
            r["workload"],
            r["engine"],
            f"{r['tokens_per_sec']:,.0f}",
            f"{r['trained_tokens_per_sec']:,.0f}",
            f"{r['seconds']:.2f} s",
            f"{r['seconds'] / base:.2f}" if base else "",
            f"{r['share_of_matmul_bound']:.0%}",
            f"{r['computed_tokens']:,}",
            f"{r['process_peak_mib']:,.0f}",
        )
    console.print(table)
    console.print(
        f"{jax.devices()[0].device_kind}: {bound:,.0f} tokens/s with only the matmuls of the forward and backward "
        "passes"
    )


if __name__ == "__main__":
    sys.exit(main())
