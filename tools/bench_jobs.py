"""Generates the rollout benchmark's workloads.

All lengths and rewards are drawn in advance, so they are the same for all engines.
"""

import argparse
import math
from collections.abc import Sequence

import numpy as np

import trapo_jax.distributed.log_level  # noqa: F401  silences libtpu, before JAX loads it
from bench_workers import Job
from trapo_jax.methods import make_method
from trapo_jax.rollouts.guidance import Guidance
from trapo_jax.types import Expert, MicroGroup, Problem

NUM_PROBLEMS = 32
UNGUIDED = MicroGroup(8, 0.0, -1.0)


def uniform_options(parser: argparse.ArgumentParser) -> None:
    """Adds the command-line options shared by the tools that sample rows of equal length with the trapo_jax engine."""
    parser.add_argument(
        "--prompt-len",
        type=int,
        default=32,
        help="tokens per prompt in the uniform workload (default 32)",
    )
    parser.add_argument(
        "--new-len",
        type=int,
        default=64,
        help="new tokens per row in the uniform workload (default 64)",
    )
    parser.add_argument(
        "--segment-len",
        type=int,
        default=16,
        help="trapo_jax engine: tokens decoded per segment (default 16)",
    )
    parser.add_argument(
        "--prefill-tokens",
        type=int,
        default=512,
        help="trapo_jax engine: maximum number of prompt tokens in a prefill batch (default 512)",
    )
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))


def make_jobs(args: argparse.Namespace, vocab_size: int) -> list[Job]:
    """Returns the jobs of the workload selected on the command line."""
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
    return complete_job(f"uniform {num_rows}", problems, [MicroGroup(1, 0.0, -1.0)], num_rows)


def trapo_job(rng: np.random.Generator, slots: int, median_len: int, vocab_size: int) -> Job:
    problems = []
    for _ in range(NUM_PROBLEMS):
        solve_rate = rng.beta(0.6, 0.9)  # Most problems are nearly always or nearly never solved.
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
    job = complete_job("trapo", problems, make_method("trapo").micro_groups, slots)
    for row in (row for rows in job["rounds"] for row in rows):  # Guided rollouts are shorter.
        problem, j = problems[row["problem"]], row["sample"]
        remaining = 1 - row["prefix_len"] / max(1, len(problem["expert"]))
        problem["num_new"][j] = row["num_new"] = max(1, round(problem["num_new"][j] * remaining))
    return job


def grpo_job(trapo: Job) -> Job:
    """Returns a job with eight unguided rollouts per problem and the same total number of tokens as `trapo`."""
    tokens = num_tokens(trapo)
    lens = np.array([problem["unguided_len"] for problem in trapo["problems"]], float)
    scaled = np.maximum(1, np.floor(lens * tokens / lens.sum())).astype(int)
    for i in range(tokens - int(scaled.sum())):  # distributes the tokens lost by rounding down
        scaled.flat[i % scaled.size] += 1
    problems = [
        {**problem, "num_new": row.tolist()}
        for problem, row in zip(trapo["problems"], scaled, strict=True)
    ]
    return {
        **complete_job("grpo", problems, [UNGUIDED], trapo["slots"]),
        "only": ["ours"],
    }


def complete_job(
    name: str, problems: list[dict], micro_groups: Sequence[MicroGroup], slots: int
) -> Job:
    """Returns a complete job. Its rounds are lists of the rows that the guidance requests, one list per micro-group."""
    rounds: list[list[dict]] = [[] for _ in micro_groups]
    longest = max(max(*p["num_new"], len(p["expert"])) for p in problems)
    guidance = Guidance(tuple(micro_groups), longest)
    for i, p in enumerate(problems):
        p.setdefault("unguided_len", list(p["num_new"]))
        experts = (Expert(tuple(p["expert"])),) if p["expert"] else ()
        problem = Problem(f"{i:016x}", tuple(p["prompt"]), "", experts)
        state = guidance.start(problem)
        for rows in rounds:  # The rewards in one round determine the guidance in the next round.
            for request in guidance.ready(state):
                j = request.sample_index
                state = guidance.observe(state, j, p["rewards"][j])
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
    """Returns the total number of tokens that a job decodes."""
    return sum(row["num_new"] for rows in job["rounds"] for row in rows)


def random_ids(rng: np.random.Generator, length: int, vocab_size: int) -> list[int]:
    """Draws token ids."""
    return rng.integers(3, vocab_size, length).tolist()


def log_normal(rng: np.random.Generator, median: float, sigma: float, low: int, high: int) -> int:
    """Draws an integer from a log-normal distribution, clipped to [low, high]."""
    return int(np.clip(round(rng.lognormal(math.log(median), sigma)), low, high))
