"""Manages a training run on disk and on screen: its directory, progress, checkpoints, logs and monitoring.

A `Run` does not sample rollouts or update parameters. It receives the results of each step, decides when the run ends,
and can resume a run that an earlier process started.
"""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax

from trapo_jax.config import Config, ScoringConfig, user_code
from trapo_jax.distributed.processes import from_main, gather, is_main
from trapo_jax.methods import Method, fingerprint
from trapo_jax.runs.budget import Budget, is_due, usage_metrics
from trapo_jax.runs.checkpoints import CheckpointStore, Retention, Trainable
from trapo_jax.runs.console import Console
from trapo_jax.runs.directory import (
    CHECKPOINTS,
    SUMMARY,
    check_shared,
    lock_folder,
    prepare_run_folder,
    record_changes,
    run_identity,
)
from trapo_jax.runs.loggers import TRAIN, open_log, read_summary, write_summary
from trapo_jax.runs.monitoring import (
    CompilationListener,
    Health,
    Interrupt,
    Watchdog,
    check_space,
)
from trapo_jax.runs.report import write_report_of_run
from trapo_jax.runs.resuming import RunStatus, check_problems, check_run, unfinished_beside
from trapo_jax.runs.samples import sample_records
from trapo_jax.runs.stages import StageTracker
from trapo_jax.types import (
    Interrupted,
    Moment,
    Problem,
    Rollout,
    SamplingProgress,
    UpdateTrace,
    Usage,
)

VALIDATION = "validation"  # The split that is evaluated during training.
EXPERT_LOSS = "eval/expert_loss"  # Mean cross-entropy of expert tokens, in nats.
LOG_BYTES = 4 * 2**20  # Generous upper bound on the size of one step's log records.


class Run:
    """One training run, new or resumed. As a context manager, it releases its resources on exit.

    Attributes:
      folder: the run directory.
      is_complete: whether the run was already complete when it was opened.
      is_new: whether the directory did not contain a run when it was opened.
      step: number of the current step, starting at 1; 0 before the first step.
      usage: tokens, problems, FLOPs and seconds spent since the start of the run.
      method_state: JSON-serializable state of the method.
      pending_splits: splits that remain to be evaluated before the next step, or after the last one.
    """

    def __init__(self, config: Config, method: Method, status: RunStatus, *, show_progress: bool):
        self.folder = config.run_folder
        self._changes, self.is_complete, self.is_new = status
        self.step = self._num_completed = 0
        self.usage = Usage()
        self.method_state: Mapping[str, Any] = {}
        self._stages = StageTracker(method.stages)
        self._config, self._method = config, method
        self._quiet = not (show_progress and is_main())
        train, keep = config.train, config.checkpoint
        self._budget = Budget(train.budget_unit, train.budget, train.num_steps)
        first = next(iter(config.rewards.functions), "none")
        self._health = Health(first, config.limits.max_logprob_gap, train.max_skipped_steps)
        self._retention = Retention(newest=keep.keep, best=keep.keep_best)
        self._stack = contextlib.ExitStack()
        self._activity = "starting"
        self._progress_before = self._progress = self._step_started = 0.0
        self.pending_splits: Sequence[str] = config.evaluation.splits
        self._score: float | None = None  # Score of the current step, used to compare checkpoints.
        self._model_step = 0  # Step of the best checkpoint if it was loaded; 0 otherwise.
        self._is_saved = True  # Whether the last checkpoint contains all results so far.

    @classmethod
    def open(cls, config: Config, method: Method, *, show_progress: bool = False) -> "Run":
        """Opens a new run, or an existing run in order to resume it. Nothing is written yet.

        Args:
          config: config of the run, including its directory.
          method: method of the run.
          show_progress: whether to print progress to the terminal.

        Raises:
          UserError: if the directory contains other files, or a run with a different config or method.
        """
        status = RunStatus(*from_main(lambda: check_run(config, method)))
        return cls(config, method, status, show_progress=show_progress)

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
          data_summary: contents of `data.json`; the `fingerprint` in it identifies the training problems.
          decode: converts token ids to text.

        Raises:
          UserError: if another process is training in the directory, the training problems have changed since the
            checkpoint, or there are checkpoints but none of them is intact.
        """
        self._decode = decode
        self._data_fingerprint = data_summary["fingerprint"]
        if is_main():
            self._stack.enter_context(lock_folder(self.folder))
            # Check again, because another process may have written to the folder since `open`.
            check_run(self._config, self._method)
            text, code = self._config.to_yaml(), user_code(self._config)
            contents = {"method": fingerprint(self._method), "data_summary": data_summary}
            prepare_run_folder(self.folder, text, **contents, code=code)
        identity = from_main(lambda: run_identity(self.folder, self._config.to_yaml()))
        check_shared(self.folder, identity["id"])
        self._store = CheckpointStore(self.folder / CHECKPOINTS, self._retention, identity=identity)
        watchdog = Watchdog(self._config.limits.stuck_after_secs)
        self._watchdog = self._stack.enter_context(contextlib.closing(watchdog))
        offsets = self._restore(learner)
        if is_main() and self._changes:
            (self.folder / SUMMARY).unlink(missing_ok=True)  # The run is no longer complete.
            record_changes(self.folder, self._config.to_yaml(), self._changes, after_step=self.step)
        log = open_log(self._config, offsets=offsets, run_id=identity["id"])
        self._log = self._stack.enter_context(contextlib.closing(log))
        self._interrupt = self._stack.enter_context(contextlib.closing(Interrupt()))
        self.console = self._stack.enter_context(
            Console(self._config.train.num_steps, first_step=self.step, quiet=self._quiet)
        )
        listener = CompilationListener(self.console.set_compiling)
        self._stack.enter_context(contextlib.closing(listener))
        self._state_bytes = sum(x.nbytes for x in jax.tree.leaves(learner.state))
        self.console.say(self._describe_start())
        if self.is_new and (other := unfinished_beside(self.folder)):
            self.console.say(
                f"{other} contains an unfinished run with other settings; --config {other}/config.yaml resumes it"
            )
        if unknown := from_main(self._store.unknown):
            self.console.say(f"{self.folder / CHECKPOINTS}: ignoring {', '.join(unknown)}")

    def begin(self, activity: str, num_samples: int = 0, what: str = "") -> None:
        """Tells the watchdog and the user which activity the process is starting.

        Args:
          activity: name of the activity, such as "evaluating test".
          num_samples: number of completions that all processes together sample and grade; 0 if nothing is sampled.
          what: description of these completions.
        """
        self._activity = activity
        self._watchdog.beat(activity)
        self.console.begin(activity, num_samples, what)

    def on_progress(self, progress: SamplingProgress) -> None:
        """Receives this process's sampling progress; the other processes are assumed to have made the same progress.

        Raises:
          Interrupted: if this or another process has received a signal.
        """
        if self._interrupt.received:
            raise Interrupted
        self._watchdog.beat(self._activity)
        phase, *numbers = progress
        self.console.advance(SamplingProgress(phase, *(jax.process_count() * n for n in numbers)))

    @property
    def moment(self) -> Moment:
        """The current step, in the form passed to methods."""
        stage = self._stages.position(self.step, self._progress_before)
        return Moment(self.step, self._progress_before, self._config.seed, stage)

    @property
    def is_over(self) -> bool:
        """Whether the last step of the run is complete."""
        return self._progress >= 1

    def steps(
        self, batches: Sequence[Sequence[Problem]]
    ) -> Iterator[tuple[Sequence[Problem], Sequence[Problem]]]:
        """Yields the problems of each remaining step, together with the problems of the step after it.

        Args:
          batches: the problems of every step of the run.

        Raises:
          Interrupted: if any process has received a signal.
        """
        while not self.is_over:
            if any(gather(self._interrupt.received)):
                raise Interrupted
            if self._stages.advance(self.step, self._progress) and self.step:
                self.console.say(f"stage {self._stages.stage.name} begins after step {self.step}")
            self.step += 1
            self._progress_before = self._progress
            from_main(lambda: check_space(self.folder, LOG_BYTES, "the log of a step"))
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
          groups: the rollouts of each problem; only those of the first `log_samples` problems are logged.
          metrics: sampling metrics (from `rollouts/actor.py` and `rollouts/metrics.py`) and training metrics (from
            `training/learner.py`, `training/diagnostics.py` and `training/packing.py`), keyed by name.
          usage: usage of the step, except for `seconds`, which is measured here.
          traces: per-token results of the updates.
          method_state: state of the method after the step.

        Raises:
          TrainingFailed: if the metrics show that training should not continue.
          UserError: if the method does not consume the budget's unit.
        """
        seconds = from_main(lambda: time.perf_counter() - self._step_started)
        self.usage += usage + Usage(seconds=seconds)
        self.method_state = method_state
        self._progress = self._budget.progress(self.usage, self.step)
        values = {
            **metrics,
            **usage_metrics(self.usage),
            "budget/progress": self._progress,
            "budget/stage": self.moment.stage.index,
            "time/tokens_per_sec": usage.tokens_trained / seconds,
        }
        self._log.metrics(TRAIN, self.step, values)
        self.record_samples(groups, traces)
        self._budget.check_spent(self.usage, self._method.name)
        self.console.step(self.step, values, secs=seconds)
        for warning in self._health.observe(self.step, values):
            self.console.say(f"warning: {warning}")
        self._num_completed = self.step
        self.pending_splits = self._due_splits()
        self._score, self._is_saved = None, False

    def record_samples(
        self, groups: Sequence[Sequence[Rollout]], traces: Sequence[UpdateTrace] = ()
    ) -> None:
        """Writes rollouts of the current step to samples.jsonl. `record` calls this method for successful steps."""
        logged = [rollout for group in groups[: self._config.log_samples] for rollout in group]
        self._log.samples(sample_records(logged, traces, decode=self._decode, step=self.step))

    def _due_splits(self) -> Sequence[str]:
        evaluation = self._config.evaluation
        if self.is_over:
            if not self._config.checkpoint.load_best_model_at_end:
                return evaluation.splits
            # The validation score decides which checkpoint is tested.
            return tuple(dict.fromkeys((VALIDATION, *evaluation.splits)))
        due = is_due(self.step, self._progress_before, self._progress, evaluation.every)
        return (VALIDATION,) if due else ()

    @property
    def scoring(self) -> ScoringConfig:
        """Sampling settings for evaluation."""
        return self._config.evaluation

    def record_evaluation(
        self, split: str, metrics: dict[str, float], problems: Mapping[str, list], seconds: float
    ) -> None:
        """Records the evaluation of a pending split.

        Args:
          split: the split that was evaluated.
          metrics: `eval/...` metrics, keyed by name.
          problems: columns with one entry per problem; see `Evaluation.problems`.
          seconds: duration of the evaluation.
        """
        self._log.evaluation(split, self.step, metrics | {"time/eval_secs": seconds}, problems)
        self.console.evaluated(self.step, split, metrics)
        for warning in self._health.observe_evaluation(metrics):
            self.console.say(f"warning: {warning}")
        self.pending_splits = [name for name in self.pending_splits if name != split]
        self._is_saved = False
        if self.step and split == VALIDATION:
            self._score = metrics["eval/accuracy_sampled"]
            if EXPERT_LOSS in metrics and not self.is_over:
                self._stages.observe(metrics[EXPERT_LOSS])

    def save_if_due(self, learner: Trainable) -> None:
        """Saves a checkpoint of the learner if one is due after the current step."""
        keep = self._config.checkpoint
        is_due = self.is_over or (keep.every > 0 and self.step % keep.every == 0)
        is_due |= keep.keep_best > 0 and self._is_best()
        if is_due and self.step and not self._is_saved:
            self._save(learner, score=self._score)

    def stop(self, learner: Trainable) -> None:
        """Saves a checkpoint after `Interrupted` was raised, unless the last checkpoint is up to date.

        A resumed run repeats the interrupted step or evaluation. Before the final evaluation, a checkpoint exists.
        """
        self.step = self._num_completed
        if not (self._is_saved or self.is_over):
            # An uninterrupted run would not save this checkpoint. Without a score, it is never the best one.
            self._save(learner, score=None)

    def _save(self, learner: Trainable, *, score: float | None) -> None:
        self.begin(f"step {self.step}: saving a checkpoint")
        from_main(lambda: check_space(self.folder, self._state_bytes + LOG_BYTES, "a checkpoint"))
        host = {
            "usage": dataclasses.asdict(self.usage),
            "method_state": self.method_state,
            "stage": self._stages.state,
            "offsets": self._log.offsets(),
            "data_fingerprint": self._data_fingerprint,
            # If `train.num_steps` is raised later, the run continues without another evaluation at this step.
            "pending_splits": [] if self.is_over else list(self.pending_splits),
        }
        self._store.save(self.step, learner.state, host, score=score)
        self._is_saved = True

    def _is_best(self) -> bool:
        best = None if self._score is None else from_main(self._store.best_score)
        return self._score is not None and (best is None or self._score > best)

    def load_best(self, learner: Trainable) -> None:
        """Loads the best checkpoint if it scores higher than the last step and `load_best_model_at_end` is set."""
        if not self._config.checkpoint.load_best_model_at_end or self._score is None:
            return
        step = from_main(lambda: self._store.best_intact(above=self._score or 0.0))
        if step is not None:
            self._load(step, learner)
            self._model_step = step
            self.console.say(
                f"loaded the checkpoint from step {step}, the best on the validation split"
            )

    def finish(self) -> None:
        """Deletes remains of interrupted saves and writes the report and the summary, which marks the run as complete."""
        self._store.clean()
        self._log.offsets()  # Flushes the logs.
        if warning := write_report_of_run(self.folder):
            self.console.say(warning)
        step = self._model_step or self.step
        write_summary(self.folder, self._config.evaluation.splits, model_step=step)

    def summary(self) -> dict[str, Any]:
        """Returns a complete run's scores before and after training, keyed by split."""
        return read_summary(self.folder)

    def _restore(self, learner: Trainable) -> dict[str, int] | None:
        """Restores the newest intact checkpoint and returns its log offsets; None if there is no checkpoint."""
        step = from_main(self._store.newest_intact)
        if step is None:
            return None
        host = self._load(step, learner)
        saved = host["data_fingerprint"]
        check_problems(self.folder, self._config.data, saved=saved, current=self._data_fingerprint)
        self.step = self._num_completed = step
        self.usage, self.method_state = Usage(**host["usage"]), host["method_state"]
        self._stages.state = host["stage"]
        self._progress = self._budget.progress(self.usage, step)
        self.pending_splits = self._due_splits() if self.is_over else host["pending_splits"]
        return host["offsets"]

    def _load(self, step: int, learner: Trainable) -> dict[str, Any]:
        """Loads a checkpoint's state into the learner and returns the checkpoint's host state."""
        abstract = learner.abstract_state()
        learner.free()
        learner.state, host = self._store.restore(step, abstract)
        return host

    def _describe_start(self) -> str:
        if not self.step:
            return f"{self._method.name}: {self._method.source}; run directory {self.folder}"
        changed = "".join(f", {x}={now} (was {was})" for x, (was, now) in self._changes.items())
        return f"resuming {self.folder} after step {self.step}{changed}"
