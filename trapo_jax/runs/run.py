"""A training run on disk and on screen: its directory, progress, checkpoints, logs and monitoring.

A `Run` does not sample rollouts or update parameters. It receives the results of each step, decides when the run ends,
and resumes a run that an earlier process started.
"""

import contextlib
import dataclasses
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import jax

from trapo_jax.config import Config, DataConfig
from trapo_jax.distributed.processes import from_main, gather, is_main, wait_for_all
from trapo_jax.methods import Method, fingerprint
from trapo_jax.runs.budget import USAGE_METRICS, Budget, is_due
from trapo_jax.runs.checkpoints import CheckpointStore, DamagedCheckpoint, Retention
from trapo_jax.runs.console import Console
from trapo_jax.runs.directory import (
    CHECKPOINTS,
    CONFIG,
    DATA,
    NUM_STEPS,
    SUMMARY,
    Changes,
    check_run_folder,
    evaluation_file,
    lock_run_folder,
    prepare_run_folder,
    record_changes,
    write_atomically,
)
from trapo_jax.runs.loggers import EVAL, TRAIN, NoLog, RunLog, read_metrics
from trapo_jax.runs.monitoring import (
    CompilationListener,
    Health,
    Interrupt,
    Watchdog,
    check_space,
)
from trapo_jax.runs.report import REPORT, write_report
from trapo_jax.runs.samples import sample_records
from trapo_jax.types import (
    Moment,
    Problem,
    Rollout,
    SamplingProgress,
    UpdateTrace,
    Usage,
    UserError,
)

LOG_BYTES = 4 * 2**20  # generous upper bound on the size of the records of one step


class Trainable(Protocol):
    """The part of a learner that a run saves and restores."""

    state: Any

    def abstract_state(self) -> Any: ...

    def free(self) -> None: ...


class Run:
    """One training run, new or resumed. As a context manager, it releases its resources on exit.

    Attributes:
      folder: the run directory.
      is_complete: whether the run was already complete when it was opened.
      is_new: whether the run directory was empty when it was opened.
      step: number of the current step, starting at 1; 0 before the first step.
      moment: the current step as methods see it.
      usage: tokens, problems, FLOPs and seconds spent since the start of the run.
      method_state: JSON-serializable state of the method.
    """

    def __init__(
        self,
        config: Config,
        method: Method,
        changes: Changes,
        *,
        is_complete: bool,
        is_new: bool,
        show_progress: bool,
    ):
        self.folder = config.run_folder
        self.is_complete = is_complete
        self.is_new = is_new
        self.step = 0
        self.usage = Usage()
        self.method_state: Mapping[str, Any] = {}
        self._config, self._method, self._changes = config, method, changes
        self._quiet = not (show_progress and is_main())
        train, keep = config.train, config.checkpoint
        self._budget = Budget(train.budget_unit, train.budget, train.num_steps)
        self._health = Health(
            max_logprob_gap=config.limits.max_logprob_gap,
            max_skipped_steps=train.max_skipped_steps,
        )
        retention = Retention(newest=keep.keep, best=keep.keep_best)
        self._store = CheckpointStore(self.folder / CHECKPOINTS, retention)
        self._stack = contextlib.ExitStack()
        self._activity = "starting"
        self._progress_before = self._progress = 0.0
        self._step_started = 0.0
        self._is_interrupted = False

    @classmethod
    def open(cls, config: Config, method: Method, *, show_progress: bool = False) -> "Run":
        """Opens a new run, or an existing one to resume it. Nothing is written yet.

        Args:
          config: config of the run, including its directory.
          method: method of the run.
          show_progress: whether to print progress to the terminal.

        Raises:
          UserError: if the directory contains something else, or a run with a different config or method.
        """

        def check() -> tuple[Changes, bool, bool]:
            changes = check_run_folder(
                config.run_folder,
                config.to_yaml(),
                method=fingerprint(method),
                depends_on_length=method.depends_on_length,
            )
            folder = config.run_folder
            is_complete = (folder / SUMMARY).exists() and NUM_STEPS not in changes
            return changes, is_complete, not (folder / CONFIG).exists()

        changes, is_complete, is_new = from_main(check() if is_main() else None)
        return cls(
            config,
            method,
            changes,
            is_complete=is_complete,
            is_new=is_new,
            show_progress=show_progress,
        )

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, *exception: Any) -> None:
        self._stack.__exit__(*exception)

    def start(
        self,
        learner: Trainable,
        data_summary: Mapping[str, Any],
        decode: Callable[[Sequence[int]], str],
    ) -> None:
        """Creates and locks the run directory, restores the newest intact checkpoint, and opens the logs.

        Args:
          learner: the learner; its state is restored if there is a checkpoint.
          data_summary: contents of `data.json`; its `fingerprint` identifies the training problems.
          decode: converts token ids to text.

        Raises:
          UserError: if another process is training in the directory, the training problems have changed since the
            checkpoint, or there are checkpoints but none is intact.
        """
        self._decode = decode
        self._data_fingerprint = data_summary["fingerprint"]
        if is_main():
            self._stack.enter_context(lock_run_folder(self.folder))
            prepare_run_folder(
                self.folder, self._config.to_yaml(), method=fingerprint(self._method)
            )
            if not (self.folder / DATA).exists():
                write_atomically(self.folder / DATA, json.dumps(data_summary, indent=2) + "\n")
        wait_for_all("run directory prepared")
        watchdog = Watchdog(self._config.limits.stuck_after_secs)
        self._watchdog = self._stack.enter_context(contextlib.closing(watchdog))
        offsets = self._restore(learner)
        if is_main() and self._changes:
            (self.folder / SUMMARY).unlink(missing_ok=True)  # The run is no longer complete.
            record_changes(self.folder, self._config.to_yaml(), self._changes, after_step=self.step)
        log = RunLog(self.folder, offsets=offsets) if is_main() else NoLog()
        self._log = self._stack.enter_context(contextlib.closing(log))
        self._interrupt = self._stack.enter_context(contextlib.closing(Interrupt()))
        self.console = self._stack.enter_context(
            Console(self._config.train.num_steps, first_step=self.step, quiet=self._quiet)
        )
        listener = CompilationListener(self.console.set_compiling)
        self._stack.enter_context(contextlib.closing(listener))
        self._state_bytes = sum(x.nbytes for x in jax.tree.leaves(learner.state))
        self._progress = self._budget.progress(self.usage, self.step)
        self.console.say(self._describe_start())

    def begin(self, activity: str, num_samples: int = 0) -> None:
        """Tells the watchdog and the user what the process does next.

        Args:
          activity: such as "evaluating test".
          num_samples: number of completions that all processes sample and grade for it; 0 if nothing is sampled.
        """
        self._activity = activity
        self._watchdog.beat(activity)
        self.console.begin(activity, num_samples)

    def on_progress(self, progress: SamplingProgress) -> None:
        """Receives the progress of sampling in this process; the other processes are assumed to be as far."""
        self._watchdog.beat(self._activity)
        phase, *numbers = progress
        self.console.advance(SamplingProgress(phase, *(jax.process_count() * n for n in numbers)))

    @property
    def moment(self) -> Moment:
        """The current step as methods see it."""
        return Moment(self.step, self._progress_before, self._config.seed)

    @property
    def is_over(self) -> bool:
        """Whether the last step is complete."""
        return self._progress >= 1

    @property
    def is_interrupted(self) -> bool:
        """Whether a signal stopped the run before its last step."""
        return self._is_interrupted and not self.is_over

    def steps(
        self, batches: Sequence[Sequence[Problem]]
    ) -> Iterator[tuple[Sequence[Problem], Sequence[Problem]]]:
        """Yields the problems of each remaining step and those of the step after it, until the run is over or interrupted.

        Args:
          batches: the problems of every step of the run.
        """
        while not (self.is_over or self._is_interrupted):
            self.step += 1
            self._progress_before = self._progress
            check_space(self.folder, LOG_BYTES, "the log of a step")
            self._step_started = time.perf_counter()
            is_last = self.step >= self._config.train.num_steps
            yield batches[self.step - 1], () if is_last else batches[self.step]

    def record(
        self,
        groups: Sequence[Sequence[Rollout]],
        metrics: Mapping[str, float],
        usage: Usage,
        traces: Sequence[UpdateTrace],
        method_state: Mapping[str, Any],
    ) -> None:
        """Records the results of the current step in the logs and on screen.

        Args:
          groups: the rollouts of each problem; those of the first `log_samples` problems are logged.
          metrics: metrics of sampling and training, by name.
          usage: usage of the step, except for the seconds, which are measured here.
          traces: per-token results of the updates.
          method_state: state of the method after the step.

        Raises:
          TrainingFailed: if the metrics show that training should not continue.
          UserError: if the method does not spend the unit of the budget.
        """
        seconds = from_main(time.perf_counter() - self._step_started)
        self.usage += usage + Usage(seconds=seconds)
        self.method_state = method_state
        self._progress = self._budget.progress(self.usage, self.step)
        values = {
            **metrics,
            **self._usage_metrics(),
            "time/tokens_per_sec": usage.tokens_trained / seconds,
        }
        self._log.metrics(TRAIN, self.step, values)
        logged = [rollout for group in groups[: self._config.log_samples] for rollout in group]
        self._log.samples(sample_records(logged, traces, decode=self._decode, step=self.step))
        self._budget.check_spent(self.usage, self._method.name)
        self.console.step(self.step, values)
        for warning in self._health.observe(self.step, values):
            self.console.say(f"warning: {warning}")
        self._is_interrupted = any(gather(self._interrupt.received))

    @property
    def splits_before_and_after(self) -> Sequence[str]:
        """The splits to evaluate before the first step and after the last one."""
        return self._config.evaluation.splits

    @property
    def due_splits(self) -> Sequence[str]:
        """The splits to evaluate after the current step, unless it is the last one."""
        every = self._config.evaluation.every
        due = is_due(self.step, self._progress_before, self._progress, every)
        return ("validation",) if due and not self.is_over else ()

    @property
    def num_evaluation_samples(self) -> int:
        """Number of samples per problem in evaluations."""
        return self._config.evaluation.num_samples

    def record_evaluation(
        self, split: str, metrics: Mapping[str, float], problems: Mapping[str, list], seconds: float
    ) -> float:
        """Records an evaluation and returns the sampled accuracy.

        Args:
          split: the split that was evaluated.
          metrics: `eval/...` metrics by name.
          problems: columns with one entry per problem; see `Evaluation.problems`.
          seconds: duration of the evaluation.
        """
        if is_main():
            path = evaluation_file(self.folder, split, self.step)
            path.parent.mkdir(exist_ok=True)
            write_atomically(path, json.dumps(problems) + "\n")
        self._log.metrics(EVAL, self.step, {"split": split, **metrics, "time/eval_secs": seconds})
        self.console.evaluated(split, metrics["eval/accuracy_sampled"])
        num_samples = self._config.evaluation.num_samples
        self.console.say(
            f"step {self.step}: {split} split, {metrics['eval/num_problems']} problems: greedy accuracy "
            f"{metrics['eval/accuracy_greedy']:.3f} (1 sample each), sampled {metrics['eval/accuracy_sampled']:.3f}, "
            f"pass@{num_samples} {metrics[f'eval/pass@{num_samples}']:.3f} ({num_samples} samples each)"
        )
        return metrics["eval/accuracy_sampled"]

    def save_if_due(self, learner: Trainable, score: float | None) -> None:
        """Saves a checkpoint if one is due after the current step.

        Args:
          learner: the learner whose state is saved.
          score: sampled accuracy on the validation split; None if it was not evaluated after this step.
        """
        keep = self._config.checkpoint
        must_save = self.is_over or self._is_interrupted
        must_save |= keep.every > 0 and self.step % keep.every == 0
        if not (must_save or (keep.keep_best and self._is_best(score))):
            return
        self.begin(f"step {self.step}: saving a checkpoint")
        check_space(self.folder, self._state_bytes + LOG_BYTES, "a checkpoint")
        host = {
            "usage": dataclasses.asdict(self.usage),
            "method_state": self.method_state,
            "offsets": self._log.offsets(),
            "data_fingerprint": self._data_fingerprint,
        }
        self._store.save(self.step, learner.state, host, score=score)

    def _is_best(self, score: float | None) -> bool:
        best = self._store.best_score() if score is not None else None
        return score is not None and (best is None or score > best)

    def finish(self) -> dict[str, Any]:
        """Writes the report and the summary, which marks the run as complete, and returns the summary."""
        self._log.offsets()  # Flushes the logs.
        write_report([self.folder], self.folder / REPORT)
        evaluations = [r for r in read_metrics(self.folder) if r["kind"] == EVAL]
        first = {record["split"]: record for record in reversed(evaluations)}
        last = {record["split"]: record for record in evaluations}
        summary = {
            split: {"before": _scores(first[split]), "after": _scores(last[split])}
            for split in self._config.evaluation.splits
            if split in first  # A split without answers is not evaluated.
        }
        write_atomically(self.folder / SUMMARY, json.dumps(summary, indent=2) + "\n")
        return summary

    def summary(self) -> dict[str, Any]:
        """Returns the scores of a complete run before and after training, by split."""
        return json.loads((self.folder / SUMMARY).read_text())

    def _restore(self, learner: Trainable) -> dict[str, int] | None:
        """Restores the newest intact checkpoint and returns the log offsets saved in it; None if there is none."""
        step = from_main(self._newest_intact() if is_main() else None)
        if step is None:
            return None
        abstract = learner.abstract_state()
        learner.free()
        state, host = self._store.restore(step, abstract)
        if host["data_fingerprint"] != self._data_fingerprint:
            raise UserError(
                f"output_dir={self.folder}: the problems of {_name_data(self._config.data)} are not those that the run "
                f"started with ({DATA}); restore the data or choose a different output_dir"
            )
        learner.state = state
        self.step = step
        self.usage, self.method_state = Usage(**host["usage"]), host["method_state"]
        return host["offsets"]

    def _newest_intact(self) -> int | None:
        """Returns the step of the newest intact checkpoint, None if there are none; damaged ones are renamed."""
        for step in reversed(self._store.steps()):
            try:
                self._store.verify(step)
                return step
            except DamagedCheckpoint as error:
                renamed = self._store.mark_damaged(step)
                print(f"warning: {error}; it was renamed to {renamed}", file=sys.stderr)
        if damaged := self._store.damaged():
            names = ", ".join(path.name for path in damaged)
            raise UserError(
                f"output_dir={self.folder}: all checkpoints are damaged ({names}); choose a different output_dir"
            )
        return None

    def _describe_start(self) -> str:
        if not self.step:
            return f"{self._method.name}: {self._method.source}; run directory {self.folder}"
        changed = "".join(
            f", {name}={now} (was {was})" for name, (was, now) in self._changes.items()
        )
        return f"resuming {self.folder} after step {self.step}{changed}"

    def _usage_metrics(self) -> dict[str, float]:
        spent = {metric: getattr(self.usage, field) for field, metric in USAGE_METRICS.items()}
        return {**spent, "budget/progress": self._progress}


def _scores(record: Mapping[str, Any]) -> dict[str, float]:
    return {name: value for name, value in record.items() if name.startswith("eval/")}


def _name_data(data: DataConfig) -> str:
    """Returns the config field that selects the training data, with its value."""
    if data.source == "files":
        return f"data.train_files={', '.join(data.train_files)}"
    return f"data.source={data.source}"
