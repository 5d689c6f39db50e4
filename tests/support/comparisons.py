"""Builds comparisons with synthetic results."""

import json
from pathlib import Path

import numpy as np

from trapo_jax.comparison.analysis import Comparison
from trapo_jax.comparison.grid import Grid, Trial, parse_sweep, parse_variant
from trapo_jax.comparison.records import collect_result
from trapo_jax.comparison.run_pool import Failure
from trapo_jax.runs.budget import USAGE_METRICS

NUM_PROBLEMS, NUM_SAMPLES = 40, 4
LEARNING_RATES = "learning_rate=1e-4,3e-4"


def make_grid(
    out,
    *sweeps,
    methods=("trapo", "grpo"),
    seeds=3,
    variants=(),
    trials=None,
    tuning_seeds=1,
    **options,
):
    options = {"match": "steps", "budget": 20.0, "overrides": (), **options}
    return Grid(
        config_file=None,
        methods=methods,
        sweeps=tuple(map(parse_sweep, sweeps)),
        variants=tuple(map(parse_variant, variants)),
        num_seeds=seeds,
        num_tuning_seeds=tuning_seeds,
        num_trials=trials,
        runs=Path(out),
        records=Path(out) / "records",
        margin=0.05,
        **options,
    )


def write_run(run, accuracy, *, entropy=0.5, overspent=0.0, problems="abc"):
    """Writes the directory of a complete run. Every third problem is harder than the others."""
    run.folder.mkdir(parents=True)
    steps = int(20 * (1 + overspent))
    rng = np.random.default_rng([run.seed, int(1000 * accuracy)])
    chances = np.clip(accuracy + np.where(np.arange(NUM_PROBLEMS) % 3, 0.05, -0.1), 0, 1)

    def evaluation(split, step, chances):
        correct = rng.binomial(NUM_SAMPLES, chances)
        columns = {
            "id": [f"{problems}{i:02d}" for i in range(NUM_PROBLEMS)],
            "source": ["easy" if i % 3 else "hard" for i in range(NUM_PROBLEMS)],
            "greedy": [int(c > 1) for c in correct],
            "correct": correct.tolist(),
            "len": [12.0] * NUM_PROBLEMS,
        }
        (run.folder / "evaluations").mkdir(exist_ok=True)
        path = run.folder / "evaluations" / f"{split}_{step}.json"
        path.write_text(json.dumps(columns))
        mean = correct.mean() / NUM_SAMPLES
        scores = {"eval/accuracy_sampled": mean, "eval/entropy": entropy}
        return {"step": step, "kind": "eval", "split": split, **scores}

    splits = run.config.evaluation.splits
    records = [evaluation(split, 0, 0.25 + 0 * chances) for split in splits]
    for step in range(1, steps + 1):
        spent = dict.fromkeys(USAGE_METRICS.values(), 100.0 * step)
        tokens = {"tokens/expert_trained": 25.0 * step}
        shares = {"guidance/ratio_mean": 0.5, "budget/progress": step / 20}
        records.append({"step": step, "kind": "train", **spent, **tokens, **shares})
    records += [evaluation(split, steps, chances) for split in splits]
    (run.folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    (run.folder / "summary.json").write_text("{}")


def make_comparison(out, accuracies, *, seeds=10, failures=(), **options):
    grid = make_grid(
        out,
        methods=tuple(accuracies),
        seeds=seeds,
        overrides=(("evaluation.num_samples", str(NUM_SAMPLES)),),
    )
    runs = grid.final_runs([Trial(method) for method in accuracies])
    for run in runs:
        write_run(run, accuracies[run.trial.method], **options.get(run.trial.method, {}))
    results = [collect_result(run) for run in runs]
    failed = [Failure(runs[i], "error: <script>") for i in failures]
    return Comparison(grid, "python -m ...", results, failed, [])
