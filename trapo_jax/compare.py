"""Compares methods at an equal budget: runs the grid, or what is left of it, and writes the report.

    python -m trapo_jax.compare --methods trapo,grpo,sft_then_grpo --seeds 5 --match trained_tokens \\
        --budget 400000 --sweep learning_rate=1e-4,2e-4,4e-4 --out comparisons/first [FIELD=VALUE ...]

First each method's train step is checked: the gradient of one batch must not depend on how the batch is cut. Then
every method is tuned with equally many trials on the validation split, then run with new seeds, then scored on the
test split, once. Rerunning goes on where it stopped.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from trapo_jax.comparison import (
    Comparison,
    Failure,
    Grid,
    Image,
    Interrupted,
    Run,
    Trial,
    describe,
    do_runs,
    pick_trials,
    plot_curves,
    read_result,
    read_sweep,
    read_variant,
    to_html,
    to_markdown,
    write_csv,
)
from trapo_jax.comparison.results import UNITS, TrialScore, is_complete
from trapo_jax.config import parse_command_line
from trapo_jax.runs.command_line import EXIT_INTERRUPTED, EXIT_USER_ERROR, as_command, fail
from trapo_jax.runs.console import Console
from trapo_jax.runs.directory import write_atomically
from trapo_jax.types import UserError

EXIT_RUN_FAILED = 1
CURVES, MARKDOWN, HTML = "curves.png", "comparison.md", "comparison.html"
CURVES_TEXT = "Validation accuracy against tokens trained and sampled, FLOPs, problems and seconds"


def main(arguments: Sequence[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        return compare(
            parse(arguments), shlex.join(["python", "-m", "trapo_jax.compare", *arguments])
        )
    except UserError as error:
        return fail(str(error), EXIT_USER_ERROR)
    except (Interrupted, KeyboardInterrupt):
        return fail("stopped; the same command goes on", EXIT_INTERRUPTED)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m trapo_jax.compare",
        description=(__doc__ or "").split("\n\n")[0],
        epilog="FIELD=VALUE replaces fields of the config for all runs, as in trapo_jax.train.",
    )
    add = parser.add_argument
    add("--config", type=Path, help="YAML file of all runs; the defaults without it")
    add("--methods", required=True, metavar="NAME,...", help="what to compare, as in method.name")
    add(
        "--variant",
        action="append",
        default=[],
        metavar="'NAME: method.name=METHOD FIELD=VALUE ...'",
        help="a method with other settings, under a name of its own that --methods may list; may be given several times",
    )
    add("--seeds", type=_positive, default=5, metavar="N", help="runs of each (default 5)")
    add(
        "--match",
        choices=sorted(UNITS),
        default="trained_tokens",
        help="what every run may spend as much of (default trained_tokens)",
    )
    add("--budget", type=_amount, required=True, metavar="AMOUNT", help="how much of it")
    add(
        "--sweep",
        action="append",
        default=[],
        metavar="[METHOD,...:]FIELD=VALUE,...",
        help="tune this field, on the validation split; may be given several times. With methods named, "
        "for them alone, in place of the other sweeps. All methods must come to equally many trials",
    )
    add("--tuning-seeds", type=_positive, default=1, metavar="N", help="of each trial (default 1)")
    add(
        "--jobs",
        type=_positive,
        metavar="N",
        help="runs at a time (default: a core each; 1 on an accelerator)",
    )
    add("--out", type=Path, required=True, metavar="DIR", help="folder of the report")
    add(
        "--runs",
        type=Path,
        metavar="DIR",
        help="folder of the runs; comparisons that share it share runs (default OUT/runs)",
    )
    add("overrides", nargs="*", metavar="FIELD=VALUE")
    return parser.parse_intermixed_args(arguments)


def compare(args: argparse.Namespace, command: str) -> int:
    terminal = Console(1, first_step=0)
    runs = args.runs or args.out / "runs"
    grid = Grid(
        config_file=args.config,
        overrides=tuple(parse_command_line(args.overrides)[1]),
        methods=tuple(dict.fromkeys(args.methods.split(","))),
        variants=tuple(map(read_variant, args.variant)),
        sweeps=tuple(map(read_sweep, args.sweep)),
        num_seeds=args.seeds,
        num_tuning_seeds=args.tuning_seeds,
        match=args.match,
        budget=args.budget,
        runs=runs,
    )
    trials = grid.trials()
    # Complains of a trial's config before anything is begun.
    planned = grid.tuning_runs([trial for of_method in trials.values() for trial in of_method])
    examples = list({run.trial.method: run for run in planned}.values())
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        runs.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {args.out}, --runs {runs}: {error.strerror}") from error
    # The runs of a method compile the same programs.
    environment = {"JAX_COMPILATION_CACHE_DIR": str(runs.absolute() / "compiled"), **os.environ}
    device = check_steps(examples, environment, terminal)
    jobs = args.jobs or (num_cores() if device == "cpu" else 1)
    environment |= share_of_cores(jobs)
    chosen, tuned, failures = tune(grid, trials, jobs, environment, terminal)
    final = grid.final_runs(chosen)
    terminal.say(f"{len(final)} runs, {jobs} at a time")
    failures += do_runs(final, jobs=jobs, environment=environment, say=terminal.say)
    results = [read_result(run) for run in final if is_complete(run)]
    comparison = Comparison(grid, command, results, failures, tuned)
    write_report(comparison, args.out, terminal)
    return EXIT_RUN_FAILED if failures else 0


def check_steps(runs: Sequence[Run], environment: Mapping[str, str], terminal: Console) -> str:
    """Refuses a comparison in which a method's gradient depends on how a batch is cut; the kind of device.

    In a process of its own: this one leaves the devices to the runs.

    Raises:
      UserError: with what the check said.
    """
    terminal.say("checking that no gradient depends on how a batch is cut into micro-batches")
    with tempfile.TemporaryDirectory() as folder:
        files = []
        for run in runs:
            files.append(Path(folder) / f"{run.trial.method}.yaml")
            files[-1].write_text(run.config.to_yaml())
        command = [sys.executable, "-m", "trapo_jax.check_step", *map(str, files)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        said = done.stderr.splitlines() or [f"it ended with exit code {done.returncode}"]
        raise UserError(f"check of the train steps: {said[-1].removeprefix('error: ')}")
    found = json.loads(done.stdout.splitlines()[-1])
    largest = max(found["largest_differences"].values())
    terminal.say(f"checked: no gradient differs by more than {largest:.1g} of its norm")
    return found["device"]


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def share_of_cores(jobs: int) -> dict[str, str]:
    """Variables that leave a run its share of the cores: XLA's threads, and those of other libraries."""
    threads = str(max(1, num_cores() // jobs))
    return {"NPROC": threads, "OMP_NUM_THREADS": threads}


def tune(
    grid: Grid,
    trials: Mapping[str, Sequence[Trial]],
    jobs: int,
    environment: Mapping[str, str],
    terminal: Console,
) -> tuple[list[Trial], list[TrialScore], list[Failure]]:
    """Each method's best trial; how all did; the runs that failed."""
    if not grid.sweeps:
        return [of_method[0] for of_method in trials.values()], [], []
    runs = grid.tuning_runs([trial for of_method in trials.values() for trial in of_method])
    terminal.say(f"tuning: {len(runs)} runs, {jobs} at a time")
    failures = do_runs(runs, jobs=jobs, environment=environment, say=terminal.say)
    chosen, scores = pick_trials(runs)
    for trial in chosen:
        terminal.say(f"tuned: {trial.method}: {trial.setting}")
    return chosen, scores, failures


def write_report(comparison: Comparison, out: Path, terminal: Console) -> None:
    """comparison.md and .html, the curves, and the tables as CSV; the text on the terminal too."""
    curves = None
    if comparison.results:
        curves = Image(out / CURVES, CURVES_TEXT)
        plot_curves(curves.path, comparison.results)
    document, tables = describe(comparison, curves)
    text = to_markdown(document)
    write_atomically(out / MARKDOWN, text)
    write_atomically(out / HTML, to_html(document))
    for name, table in tables.items():
        write_csv(out / name, table)
    for line in text.splitlines():
        terminal.say(line)
    terminal.say(
        f"{out}: {MARKDOWN}, {HTML}, {CURVES}, {', '.join(tables)}; "
        f"{comparison.grid.runs} has a folder of each run"
    )


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number >= 1")
    return int(text)


def _amount(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = float("nan")
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return number


if __name__ == "__main__":
    as_command(main)
