"""Compares methods at equal budgets: checks train steps, tunes methods, executes runs, and writes the report."""

import contextlib
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from trapo_jax.comparison.analysis import Comparison
from trapo_jax.comparison.curves import plot_curves
from trapo_jax.comparison.document import Image, to_html, to_markdown, write_csv
from trapo_jax.comparison.grid import Grid, PlannedRun, Trial
from trapo_jax.comparison.records import collect_result, is_done
from trapo_jax.comparison.report import make_report
from trapo_jax.comparison.run_pool import Failure, Say, execute_runs
from trapo_jax.comparison.tuning import TrialScore, best_trials, score_trials
from trapo_jax.runs.command_line import EXIT_USER_ERROR
from trapo_jax.runs.directory import METHOD, lock_folder, write_atomically
from trapo_jax.types import UserError

CURVES, MARKDOWN, HTML = "curves.png", "comparison.md", "comparison.html"
FINALISTS = 0.25  # Fraction of a method's trials that are repeated with more seeds.
CURVES_TEXT = "Validation accuracy as a function of trained tokens, sampled tokens, FLOPs, problems and seconds"


@dataclasses.dataclass(frozen=True)
class Resources:
    """The resources available to the runs.

    Attributes:
      jobs: maximum number of concurrent runs.
      environment: environment variables of the runs' processes.
      say: function that prints a line about the progress.
    """

    jobs: int
    environment: Mapping[str, str]
    say: Say


def compare(grid: Grid, out: Path, *, command: str, jobs: int | None, say: Say) -> Comparison:
    """Executes the runs of a comparison that are not yet complete. `write_report` writes the report.

    Args:
      grid: the comparison.
      out: directory of the report; created before any run starts.
      command: the command line, for the report.
      jobs: maximum number of concurrent runs; None for one per core on CPU, and one on an accelerator.
      say: function that prints a line about the progress.

    Raises:
      UserError: if the options are invalid, or the gradient of a method depends on how a batch is split into
        micro-batches.
      Interrupted: if a signal interrupts the comparison; raised after the active runs have saved checkpoints.
    """
    trials = grid.trials()
    # Plan all runs first, so that a trial's invalid config is reported before any run starts.
    planned = grid.tuning_runs(
        [trial for method_trials in trials.values() for trial in method_trials], grid.tuning_seeds
    )
    examples = list({run.trial.method: run for run in planned}.values())
    check_comparison(grid, examples, out)
    # The two options may name the same folder, which must be locked only once.
    folders = {out.absolute(): "--out"}
    folders.setdefault(grid.runs.absolute(), "--runs")
    with contextlib.ExitStack() as stack:
        for folder, option in folders.items():
            stack.enter_context(lock_folder(folder, option))
        return execute(grid, trials, examples, command=command, jobs=jobs, say=say)


def check_comparison(grid: Grid, examples: Sequence[PlannedRun], out: Path) -> None:
    """Checks, before any run starts, that the results of the runs can be compared and written.

    Args:
      grid, out: see `compare`.
      examples: one run of each method.

    Raises:
      UserError: if there are no problems to choose settings or to compare methods with, a method never reaches the
        budget, or a folder is the wrong one.
    """
    if (out / METHOD).is_file():
        raise UserError(f"--out {out}: contains a training run; choose a different directory")
    for option, folder in (("--records", grid.records), ("--runs", grid.runs)):
        if folder.exists() and not folder.is_dir():
            raise UserError(f"{option} {folder}: not a directory")
    for split in ("validation", "test") if grid.sweeps else ("test",):
        purpose = "settings are chosen" if split == "validation" else "methods are compared"
        for data in (run.config.data for run in examples):
            if getattr(data, f"num_{split}") == 0 and not getattr(data, f"{split}_files"):
                raise UserError(
                    f"data.num_{split}=0: {purpose} by the accuracy on this split; set a larger number"
                )
    for run in examples:
        if grid.match == "sampled_tokens" and not run.config.method.make().needs_rewards:
            raise UserError(
                f"--match sampled_tokens: {run.trial.method} samples nothing; choose another unit"
            )


def execute(
    grid: Grid,
    trials: Mapping[str, Sequence[Trial]],
    examples: Sequence[PlannedRun],
    *,
    command: str,
    jobs: int | None,
    say: Say,
) -> Comparison:
    """Checks one run of each method, tunes the methods, and executes the final runs; see `compare`."""
    # All runs share a compilation cache, because the runs of a method compile the same programs.
    cache = str(grid.runs.absolute() / "compiled")
    # Let the runs find modules in the folder of the comparison's config file.
    search_path = os.pathsep.join(path or os.getcwd() for path in sys.path)
    environment = {"JAX_COMPILATION_CACHE_DIR": cache, **os.environ, "PYTHONPATH": search_path}
    device = check_train_steps(examples, environment, say)
    jobs = jobs or (num_cores() if device == "cpu" else 1)
    resources = Resources(jobs, {**environment, **core_limits(jobs)}, say)
    chosen, scores, failures = tune(grid, trials, resources)
    final = grid.final_runs(chosen)
    failures += _execute("final", final, resources)
    results = [collect_result(run) for run in final if is_done(run)]
    return Comparison(grid, command, results, failures, scores)


def check_train_steps(runs: Sequence[PlannedRun], environment: Mapping[str, str], say: Say) -> str:
    """Checks the problems and the train step of each run, and returns the device type; see `trapo_jax.check_step`.

    The check runs in a separate process, because this process must not occupy the devices that the runs need.

    Raises:
      UserError: if a check fails.
    """
    say(
        "checking the problems, and that no gradient depends on how a batch is split into micro-batches"
    )
    with tempfile.TemporaryDirectory() as folder:
        files = []
        for run in runs:
            files.append(Path(folder) / f"{run.trial.method}.yaml")
            files[-1].write_text(run.config.to_yaml())
        command = [sys.executable, "-m", "trapo_jax.check_step", *map(str, files)]
        process = subprocess.run(command, env=environment, capture_output=True, text=True)
    if process.returncode:
        lines = process.stderr.splitlines() or [f"exit code {process.returncode}"]
        errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
        if process.returncode == EXIT_USER_ERROR and errors:
            raise UserError(*errors)
        raise UserError(f"train step check: {lines[-1].removeprefix('error: ')}")
    report = json.loads(process.stdout.splitlines()[-1])
    largest = max(report["largest_differences"].values())
    say(f"checked: no gradient differs by more than {largest:.1g} of its norm")
    return report["device"]


def num_cores() -> int:
    """Returns the number of CPU cores available to this process."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def core_limits(jobs: int) -> dict[str, str]:
    """Returns environment variables that limit each run to its share of the cores."""
    threads = str(max(1, num_cores() // jobs))
    return {"NPROC": threads, "OMP_NUM_THREADS": threads}


def tune(
    grid: Grid, trials: Mapping[str, Sequence[Trial]], resources: Resources
) -> tuple[list[Trial], list[TrialScore], list[Failure]]:
    """Returns the best trial of each method, the scores of all trials, and the runs that failed."""
    if not grid.sweeps:
        return [method_trials[0] for method_trials in trials.values()], [], []
    first, *others = grid.tuning_seeds
    all_trials = [trial for method_trials in trials.values() for trial in method_trials]
    runs = grid.tuning_runs(all_trials, [first])
    failures = _execute("tuning", runs, resources)
    scores = score_trials(runs)
    if others:
        finalists = [s.trial for s in best_trials(scores, share=FINALISTS)]
        more = grid.tuning_runs(finalists, others)
        failures += _execute("tuning the best quarter", more, resources)
        scores = score_trials([*runs, *more])
    chosen = [s.trial for s in best_trials(scores)]
    for trial in chosen:
        resources.say(f"tuned {trial.method}: {trial.setting}")
    return chosen, scores, failures


def _execute(what: str, runs: Sequence[PlannedRun], resources: Resources) -> list[Failure]:
    resources.say(f"{what}: {len(runs)} runs, {resources.jobs} at a time")
    return execute_runs(
        runs, jobs=resources.jobs, environment=resources.environment, say=resources.say
    )


def write_report(comparison: Comparison, out: Path) -> tuple[str, list[str]]:
    """Writes the report as Markdown and HTML, the learning curves as an image, and the tables as CSV files.

    Returns:
      The report as Markdown, and the names of the files.
    """
    curves = Image(out / CURVES, CURVES_TEXT) if comparison.results else None
    with lock_folder(out, "--out"):
        if curves:
            plot_curves(curves.path, comparison.results)
        document, tables = make_report(comparison, curves)
        markdown = to_markdown(document)
        write_atomically(out / MARKDOWN, markdown)
        write_atomically(out / HTML, to_html(document))
        for name, table in tables.items():
            write_csv(out / name, table)
    return markdown, [MARKDOWN, HTML, *([CURVES] if curves else []), *tables]
