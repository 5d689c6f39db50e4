"""Trains a language model with TRAPO or a related method.

    python -m trapo_jax.train [--config FILE] [FIELD=VALUE ...]

At each step, the actor samples and grades a group of rollouts for each problem, the method selects what to train on,
and the learner updates the parameters. The run decides when to stop and writes the output files.

A group is divided into micro-groups, each with an expert-prefix length and a threshold. The rollouts of a micro-group
start from a prefix of that length only if the mean reward of the problem's earlier rollouts is below the threshold.

To change something, start with the file in this table, whose docstring names the others that may be involved:

    an option, its default or its help text          config/schema.py (one class per section) and config/training.py
    how many rollouts are guided, and how much       methods/micro_grouped.py
    a method, or what a method trains on             methods/method.py; its loss terms: methods/terms.py
    a loss function                                  losses/
    a reward function                                rewards/grader.py
    a preset of data columns                         data/layouts.py; a chat template: data/templates.py
    when a rollout is requested                      rollouts/collection.py; when it is sampled: sampling/slots.py
    a rollout engine                                 sampling/engine.py
    the optimizer or the learning rate               training/optimizer.py; the train step: training/train_step.py
    a model family                                   models/hugging_face_config.py; its operations: models/decoder.py
    the mesh, or how parameters are sharded          distributed/sharding.py
    what a step logs                                 runs/run.py, `Run.record`, which lists where metrics are computed
    which checkpoints are kept                       runs/checkpoints.py; when they are saved: runs/run.py
    the metrics of an evaluation                     evaluation/scoring.py
"""

import trapo_jax.distributed.log_level  # noqa: F401  must be imported before JAX

# isort: split
import dataclasses
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trapo_jax.config import Config, help_if_requested, load_config, parse_command_line
from trapo_jax.data import draw_problems, fingerprint, problem_batches
from trapo_jax.data.mistakes import MIN_EVALUATED, standard_error
from trapo_jax.data.preflight import check_data
from trapo_jax.data.splits import LoadedData, load_data
from trapo_jax.distributed.failures import fail_together
from trapo_jax.distributed.launch import check_equal, join_processes
from trapo_jax.distributed.processes import fetch, from_main, gather, is_main, wait_for_all
from trapo_jax.evaluation.scoring import evaluate
from trapo_jax.methods import Method, Sampled, describe
from trapo_jax.models import (
    PretrainedModel,
    copy_model_files,
    export_model,
    open_model,
    with_weights,
)
from trapo_jax.rewards import Grader
from trapo_jax.rollouts.actor import Actor, grader_for, make_actor
from trapo_jax.rollouts.metrics import check_grades, graded_groups
from trapo_jax.runs.command_line import command, run_and_exit
from trapo_jax.runs.console import Console
from trapo_jax.runs.directory import EXPORT, METRICS, MODEL, REPORT, SAMPLES
from trapo_jax.runs.loggers import describe_samples, is_shown, read_metrics
from trapo_jax.runs.monitoring import check_learned, warnings_of_run
from trapo_jax.runs.progress import counted
from trapo_jax.runs.run import EXPERT_LOSS, VALIDATION, Run
from trapo_jax.runs.saved_model import saved_model_files
from trapo_jax.runs.started_with import started_with
from trapo_jax.training.learner import Learner, make_learner
from trapo_jax.types import Interrupted, Problem, Rollout, TrainingFailed, UserError

ABOUT = "Trains a language model with TRAPO or another method, or resumes the run in output_dir."
PRINT_METHOD = "--print-method"
OPTIONS = (
    f"  {PRINT_METHOD}    prints the method's formulas, hyperparameters and origin, and exits\n"
)

Splits = Mapping[str, Sequence[Problem]]


@dataclasses.dataclass(frozen=True)
class TrainResult:
    """The result of `train`.

    Attributes:
      folder: the run directory.
      step: number of completed steps; 0 if the run was already complete when it was opened.
      summary: the scores before and after training, keyed by split; None if the run was interrupted or this is not
        process 0.
      warnings: at most one warning, about a problem that the rewards had in every step of a complete run.
      was_complete: whether the run was already complete, in which case nothing was done.
      is_trained: whether the run was interrupted after its last step, during the final evaluation or the export.
    """

    folder: Path
    step: int
    summary: dict[str, Any] | None
    warnings: Sequence[str] = ()
    was_complete: bool = False
    is_trained: bool = False


def train(
    config: Config, method: Method | None = None, *, show_progress: bool = False
) -> TrainResult:
    """Starts or resumes a run, and trains until the run is complete or a signal interrupts it.

    Args:
      config: the configuration of the run.
      method: a custom method; None for the method specified in the config.
      show_progress: whether to print progress to the terminal.

    Raises:
      UserError: for a mistake in the config, the model folder, the data or the run directory.
      TrainingFailed: if training cannot continue; a later call resumes from the last checkpoint.
    """
    method = method or config.method.make()
    dead_after_secs = config.limits.dead_after_secs
    join_processes(started_with(config, method), dead_after_secs=dead_after_secs)
    with fail_together(dead_after_secs):
        return train_in_this_process(config, method, show_progress=show_progress)


def train_in_this_process(config: Config, method: Method, *, show_progress: bool) -> TrainResult:
    """Trains in one process of the job; see `train`."""
    console = Console(quiet=not (show_progress and is_main()))
    files = find_saved_model_files(config.run_folder)  # None if there is no checkpoint yet
    model = open_model(config.model, config.lora, files=files)
    check_same_model(model)
    # In the returned config, null lengths are replaced by lengths derived from the data.
    data, config = load_data(config, method, model.tokenizer, context_len=model.max_context_len)
    check_same_problems(data)
    with Run.open(config, method, show_progress=show_progress) as run:
        if run.is_complete:
            return complete_result(run, was_complete=True)
        with grader_for(config.rewards, config.rewards.functions, model.tokenizer) as grader:
            data_summary = check_problems(config, method, data, grader, run, console)
            # Otherwise, the checkpoint has the weights.
            if files is None or method.needs_reference:
                model = with_weights(model)
            learner = make_learner(config, method, model, with_state=files is None)
            actor = make_actor(
                config.sampling,
                grader,
                model,
                max_prompt_length=config.data.prompt_len,
                seed=config.seed,
                mesh=learner.mesh,
                method=method,
                max_staleness=config.sampling.max_staleness,
                temperature=config.sampling.temperature,
                on_progress=run.on_progress,
            )
            run.start(learner, data_summary, model.tokenizer.decode)
            if files is None and is_main():
                copy_model_files(model, run.folder / MODEL)
            return train_to_the_end(config, method, model, data.splits, run, actor, learner)


def find_saved_model_files(run_folder: Path) -> Path | None:
    """Returns the folder with the run's copy of the model config and tokenizer; None if the run has no checkpoint."""
    found = from_main(lambda: str(saved_model_files(run_folder) or ""))
    return Path(found) if found else None


def check_same_model(model: PretrainedModel) -> None:
    """Checks that all processes have opened the same commit of a Hub model.

    Raises:
      UserError: if their caches have different commits.
    """
    if len(set(gather(str(model.repo)))) > 1:
        raise UserError(
            "model.path: the hosts have different commits of this model in their caches; specify one, as in "
            f"owner/name@{model.repo.revision if model.repo else 'COMMIT'}"
        )


def check_same_problems(data: LoadedData) -> None:
    """Checks that all processes have read the same problems.

    Raises:
      UserError: if the hosts have different files.
    """
    prints = {f"the {name} problems": fingerprint(x) for name, x in data.splits.items()}
    prints["the chat template"] = data.template.hash
    check_equal(gather(prints), "use the same files on all hosts")


def check_problems(
    config: Config,
    method: Method,
    data: LoadedData,
    grader: Grader,
    run: Run,
    console: Console,
) -> dict[str, Any]:
    """Checks the problems of a new run, shows the findings, and returns the contents of data.json."""
    summary = data.summary()
    if not run.is_new:
        return summary
    found: list[str] = []
    if is_main():
        preflight = check_data(data, config, method, grader)
        preflight.show(console)
        summary["preflight"] = preflight.summary()
        found = preflight.errors
    if errors := from_main(lambda: found):
        raise UserError(*errors)
    return summary


def train_to_the_end(
    config: Config,
    method: Method,
    model: PretrainedModel,
    splits: Splits,
    run: Run,
    actor: Actor,
    learner: Learner,
) -> TrainResult:
    """Runs the remaining steps of a run that has been started, evaluates the result, and exports the model."""
    if run.step == 0:
        run.console.say(describe_memory(actor, learner))
    try:
        # Evaluate the initial parameters before the first step, or repeat an evaluation that was interrupted.
        finish_step(splits, run, actor, learner)
        train_loop(config, method, splits, run, actor, learner)
        check_learned(run.folder, run.step, run.usage.tokens_trained, learner.state)
        evaluate_pending(splits, run, actor, learner)
    except Interrupted:
        run.stop(learner)
        return TrainResult(run.folder, run.step, None, is_trained=run.is_over)
    run.begin("exporting the model")
    params = fetch(learner.params)
    if is_main():
        source, destination = run.folder / MODEL, run.folder / EXPORT
        export_model(params, model.decoder, source=source, destination=destination)
        run.finish()
    wait_for_all("run finished")  # At exit, JAX kills processes that wait too long.
    return complete_result(run)


def complete_result(run: Run, *, was_complete: bool = False) -> TrainResult:
    """Returns the result of a complete run."""
    if not is_main():
        return TrainResult(run.folder, run.step, None, was_complete=was_complete)
    warnings = warnings_of_run(read_metrics(run.folder))
    return TrainResult(run.folder, run.step, run.summary(), warnings, was_complete)


def train_loop(
    config: Config, method: Method, splits: Splits, run: Run, actor: Actor, learner: Learner
) -> None:
    """Runs the remaining steps of a run, with evaluations and checkpoints."""
    batches = problem_batches(
        splits["train"], batch_size=config.train.problems_per_step, seed=config.seed
    )
    by_id = {problem.id: problem for problem in splits["train"]}
    for problems, upcoming in run.steps(batches):
        moment = run.moment
        run.begin(f"step {run.step}", num_samples=len(problems) * method.group_size)
        collected = actor.collect(problems, learner.params, moment, upcoming=upcoming)
        check_rewards(collected.groups, config, run)
        num_extra = method.extra_rows_per_problem * config.train.problems_per_step
        selection = method.select(
            Sampled(
                groups=graded_groups(collected.groups)
                if method.needs_rewards
                else collected.groups,
                moment=moment,
                state=run.method_state,
                extra_problems=draw_problems(
                    splits["train"], count=num_extra, seed=config.seed, step=run.step
                ),
                problems=by_id,
                max_completion_length=config.sampling.completion_len,
            )
        )
        run.begin(f"step {run.step}: updating the parameters")
        learned = learner.update(selection.updates, moment)
        run.record(
            collected.groups,
            {**collected.metrics, **learned.metrics},
            collected.usage + learned.usage,
            learned.traces,
            selection.state,
        )
        finish_step(splits, run, actor, learner)


def check_rewards(groups: Sequence[Sequence[Rollout]], config: Config, run: Run) -> None:
    """Checks that every reward function judged enough rollouts of a step; if not, saves samples of the step.

    Raises:
      TrainingFailed: see `check_grades`.
    """
    try:
        check_grades(groups, run.step, max_error_rate=config.rewards.max_error_rate)
    except TrainingFailed:
        run.record_samples(groups)
        raise


def finish_step(splits: Splits, run: Run, actor: Actor, learner: Learner) -> None:
    """Runs the evaluations that are due after the current step, and saves a checkpoint if one is due."""
    if not run.is_over:  # The last checkpoint is saved before the final evaluation.
        evaluate_pending(splits, run, actor, learner)
    run.save_if_due(learner)


def evaluate_pending(splits: Splits, run: Run, actor: Actor, learner: Learner) -> None:
    """Evaluates the current parameters on the splits that are due.

    With `checkpoint.load_best_model_at_end`, the validation split comes first at the end of a run (see
    `Run.pending_splits`), so that the best checkpoint is evaluated on the other splits.
    """
    for name in run.pending_splits:
        if not splits[name]:
            continue
        started = time.perf_counter()
        scoring = run.scoring
        numbers = [scoring.num_samples_of(problem.source) for problem in splits[name]]
        each = " or ".join(map(str, sorted(set(numbers))))
        # Each problem has a greedy sample in addition to the others.
        what = f"{counted(len(numbers), 'problem')}, 1 + {each} samples each"
        run.begin(f"evaluating {name}", sum(numbers) + len(numbers), what)
        with actor.sampler(learner.params) as sample:
            result = evaluate(
                sample,
                splits[name],
                num_samples_of=scoring.num_samples_of,
                temperature=scoring.temperature,
                decode=actor.decode,
            )
        metrics = result.metrics
        if name == VALIDATION and learner.method.needs_expert_loss:
            metrics = metrics | {EXPERT_LOSS: learner.expert_loss(splits[name])}
        run.record_evaluation(name, metrics, result.problems, time.perf_counter() - started)
        if run.is_over and name == VALIDATION:
            run.load_best(learner)


def describe_memory(actor: Actor, learner: Learner) -> str:
    """Returns a description of what the run keeps in memory."""
    return (
        f"parameters and optimizer {learner.num_bytes / 2**20:,.0f} MiB in total; KV cache of the rollout engine "
        f"{actor.kv_bytes / 2**20:,.0f} MiB per device; gradients, activations and compiled programs need "
        "additional memory"
    )


def show_result(result: TrainResult) -> None:
    """Prints the scores before and after training, then lists the files of the run."""
    console = Console()
    if result.was_complete:
        console.say(
            f"{result.folder}: this run is complete; for a new run, set a different output_dir"
        )
    if result.summary is None:
        when = f"after step {result.step}" if result.step else "before the first step"
        missing = "; the final evaluation and the export are missing" if result.is_trained else ""
        console.say(f"stopped {when}{missing}; the same command resumes it")
        return
    for split, scores in result.summary.items():
        before, after = scores["before"], scores["after"]
        rows = [
            [name.removeprefix("eval/"), f"{before[name]:.3f}", f"{after[name]:.3f}"]
            for name in sorted(after)
            if is_shown(name) and name != "eval/pass@1"
        ]
        num_problems = counted(after["eval/num_problems"], "problem")
        title = (
            f"{split} split, {num_problems}, {describe_samples(after)}, and 1 greedy sample each"
        )
        console.table(title, ["", "before", "after"], rows)
        if (number := int(after["eval/num_problems"])) < MIN_EVALUATED:
            console.say(f"warning: {split}: {standard_error(number)}; do not rely on this table")
    for warning in result.warnings:
        console.say(f"warning: {warning}")
    for name, description in (
        (EXPORT, "the model, for transformers and vLLM"),
        (REPORT, "training curves and a rollout viewer; open it in a browser"),
        (METRICS, "metrics of every step"),
        (SAMPLES, "rollouts, token by token"),
    ):
        console.say(f"{result.folder / name}: {description}")


@command
def main(arguments: Sequence[str]) -> int:
    if text := help_if_requested(arguments, Config, "train", ABOUT, options=OPTIONS):
        print(text)
        return 0
    rest = [argument for argument in arguments if argument != PRINT_METHOD]
    config = load_config(Config, *parse_command_line(rest))
    if PRINT_METHOD in arguments:
        print(describe(config.method.make()))
        return 0
    result = train(config, show_progress=True)
    if is_main():
        show_result(result)
    return 0


if __name__ == "__main__":
    run_and_exit(main)
