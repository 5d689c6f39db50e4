"""Monitors a run: training health, disk space, stuck processes and termination signals."""

import faulthandler
import itertools
import math
import os
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from trapo_jax.distributed.processes import SharedFlag, from_main
from trapo_jax.runs.directory import DATA
from trapo_jax.runs.loggers import TRAIN, read_metrics
from trapo_jax.runs.system_errors import leave_lost_terminal
from trapo_jax.types import EXIT_FAILED, TrainingFailed

COMPILATION = "/jax/core/compile/backend_compile_duration"  # Name of a `jax.monitoring` event.
# Number of consecutive steps with a symptom, such as all completions being truncated, before a warning is printed. The
# second number applies if every step so far has had the symptom, because a mistake in the config has an effect from the
# first step on.
WARN_AFTER_STEPS, WARN_AFTER_FIRST_STEPS = 20, 5
NEVER_RIGHT = (
    "no sampled rollout was correct; check rewards.functions, data.template and sampling.max_completion_length: "
    "`trapo preview` shows a prompt and tries the reward functions, and samples.jsonl contains the extracted answers; "
    "if these are right, the problems are too hard for the model"
)
NO_SIGNAL = (
    "all rewards of each problem were equal, so nothing is learned from them; check rewards.functions (with "
    "`trapo preview` and samples.jsonl), or choose problems that are neither too easy nor too hard"
)
# If the accuracy is below MIN_ACCURACY and the share of responses without an answer is above MAX_UNANSWERED, the
# missing answers are reported as the cause of the low accuracy.
MAX_UNANSWERED = 0.5
MIN_ACCURACY = 0.05


def unanswered(
    section: str,
    *,
    function: str,
    accuracy: float,
    no_answer: float | None,
    truncated: float,
) -> str:
    """Returns a warning if most responses are wrong because they contain no answer; an empty string otherwise.

    Args:
      section: the config section with the temperature of the responses.
      function: the first reward function, which looks for the answers.
      accuracy: share of correct responses.
      no_answer: share of responses in which the reward function found no answer; None if it does not look for answers.
      truncated: share of responses that reached the maximum length.
    """
    if no_answer is None or no_answer <= MAX_UNANSWERED or accuracy >= MIN_ACCURACY:
        return ""
    return (
        f"the reward function {function} found no answer in {no_answer:.0%} of the responses, and {truncated:.0%} are truncated; "
        "read some responses (in samples.jsonl or evaluations/), and request the answer format with another "
        "data.prompt_suffix (answer_is suits small models), raise sampling.max_completion_length, or lower "
        f"{section}.temperature"
    )


class Health:
    """Checks the metrics of every step for signs of failure.

    Args:
      function: the first reward function.
      max_logprob_gap: maximum mean absolute difference between the sampler's and the trainer's log-probabilities.
      max_skipped_steps: number of consecutive skipped updates after which the run fails.
    """

    def __init__(self, function: str, max_logprob_gap: float, max_skipped_steps: int):
        self._function = function
        self._max_logprob_gap = max_logprob_gap
        self._max_skipped_steps = max_skipped_steps
        self._streaks = {"truncated": 0, "never right": 0, "no signal": 0}
        self._absent_before: set[str] = set()  # Symptoms that at least one step did not have.
        self._has_warned_of_answers = False

    def observe(self, step: int, values: Mapping[str, float]) -> list[str]:
        """Returns warnings about a step, one line each.

        Raises:
          TrainingFailed: if the run should not continue.
        """
        warnings = []
        if values["optimizer/skipped"]:
            reason = _skip_reason(values)
            warnings.append(f"step {step}: the update was skipped because {reason}")
            if values["optimizer/skipped_in_a_row"] >= self._max_skipped_steps:
                raise TrainingFailed(
                    f"step {step}: train.max_skipped_steps={self._max_skipped_steps} consecutive updates were skipped, "
                    f"the last one because {reason}; lower train.learning_rate"
                )
        if (gap := values["policy/logprob_gap_mean"]) > self._max_logprob_gap:
            consequence = "the completions were not sampled from the policy being trained"
            if num_stale := values["sampling/stale_tokens"]:
                consequence = (
                    f"{num_stale:.0f} tokens were sampled before the last update; set sampling.max_staleness=0 or "
                    "lower train.learning_rate"
                )
            raise TrainingFailed(
                f"step {step}: the sampler's and the trainer's log-probabilities differ by {gap:.3g} on average, more "
                f"than limits.max_logprob_gap={self._max_logprob_gap}; {consequence}"
            )
        if values["batch/completion_tokens"]:
            warnings += self._check_streak(
                step,
                "truncated",
                values["completion/truncated"] == 1,
                "every completion was truncated at sampling.max_completion_length",
            )
        if "reward/sampled_positive" in values:
            accuracy, truncated = values["reward/sampled_positive"], values["completion/truncated"]
            no_answer = values.get("reward/no_answer")
            found = self._check_answers("sampling", accuracy, no_answer, truncated)
            warnings += [f"step {step}: {warning}" for warning in found]
            is_never_right, has_no_signal = _reward_symptoms(values)
            never_right = self._check_streak(step, "never right", is_never_right, NEVER_RIGHT)
            no_signal = self._check_streak(step, "no signal", has_no_signal, NO_SIGNAL)
            warnings += never_right or no_signal
        return warnings

    def observe_evaluation(self, metrics: Mapping[str, float]) -> list[str]:
        """Returns warnings about an evaluation, one line each."""
        accuracy, truncated = metrics["eval/accuracy_sampled"], metrics["eval/truncated"]
        return self._check_answers("evaluation", accuracy, metrics.get("eval/no_answer"), truncated)

    def _check_answers(
        self, section: str, accuracy: float, no_answer: float | None, truncated: float
    ) -> list[str]:
        """Returns a warning the first time that most responses contain no answer."""
        text = unanswered(
            section,
            function=self._function,
            accuracy=accuracy,
            no_answer=no_answer,
            truncated=truncated,
        )
        if not text or self._has_warned_of_answers:
            return []
        self._has_warned_of_answers = True
        return [text]

    def _check_streak(self, step: int, name: str, is_bad: bool, text: str) -> list[str]:
        """Returns a warning once `WARN_AFTER_STEPS` or `WARN_AFTER_FIRST_STEPS` consecutive steps had a symptom."""
        self._streaks[name] = self._streaks[name] + 1 if is_bad else 0
        if not is_bad:
            self._absent_before.add(name)
        limit = WARN_AFTER_STEPS if name in self._absent_before else WARN_AFTER_FIRST_STEPS
        return [f"step {step}: for {limit} steps, {text}"] if self._streaks[name] == limit else []


def _reward_symptoms(values: Mapping[str, float]) -> tuple[bool, bool]:
    """Returns whether no sampled rollout was correct, and whether all rewards of each problem were equal."""
    return values["reward/sampled_positive"] == 0, values["reward/groups_with_signal"] == 0


def warnings_of_run(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """Returns a list with one warning if every step of a run had the same reward symptom; an empty list otherwise.

    Args:
      records: the records of metrics.jsonl.
    """
    symptoms = [_reward_symptoms(r) for r in records if "reward/sampled_positive" in r]
    found = [
        f"in all {len(symptoms)} steps, {text}"
        for text, is_bad in zip((NEVER_RIGHT, NO_SIGNAL), zip(*symptoms, strict=True), strict=False)
        if all(is_bad)
    ]
    return found[:1]


def check_learned(folder: Path, step: int, tokens_trained: int, state: Any) -> None:
    """Checks, after the last step of a run, that the run has changed the parameters.

    Args:
      folder: the run directory.
      step: the last step.
      tokens_trained: number of tokens that the run has trained on.
      state: the train state.

    Raises:
      TrainingFailed: if no token was trained on, or every update was skipped.
    """
    if not tokens_trained:
        raise TrainingFailed(
            f"step {step}: no tokens were trained on, so the model is unchanged; see {DATA} in {folder} for the number "
            "of expert solutions"
        )
    if int(state.num_skipped_in_a_row) < int(state.step):
        return
    records = from_main(lambda: read_metrics(folder))
    last = [record for record in records if record["kind"] == TRAIN][-1]
    values = {name: math.nan if value is None else value for name, value in last.items()}
    raise TrainingFailed(
        f"step {step}: every update was skipped, the last one because {_skip_reason(values)}, so the model is "
        "unchanged; check the weights and config.json in model.path, or lower train.learning_rate"
    )


def _skip_reason(values: Mapping[str, Any]) -> str:
    """Returns why an update was skipped: loss terms or the gradient were not finite, or the gradient was too large."""
    names = [name for name in values if name.startswith("loss/") and name != "loss/total"]
    if terms := [name for name in names if not math.isfinite(values[name])]:
        return f"{' and '.join(terms)} {'was' if len(terms) == 1 else 'were'} not finite"
    norm = values["optimizer/grad_norm"]
    if not math.isfinite(norm):
        return "the gradient was not finite"
    return f"the gradient norm of {norm:.3g} exceeds the method's limit"


class Watchdog:
    """Prints the stack of every thread and exits if the process makes no progress for too long.

    In a multi-process job, this ends processes that are waiting for a dead or stuck process. Time during which this
    process is stopped (`SIGSTOP`, Ctrl-Z, a suspended machine) does not count.

    Args:
      limit_secs: maximum time between two calls of `beat`.
    """

    def __init__(self, limit_secs: float):
        self._limit_secs = limit_secs
        self._closed = threading.Event()
        self._beats = itertools.count()
        self.beat("starting")
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def beat(self, activity: str) -> None:
        """Reports progress; `activity` describes what the process does next."""
        self._last = (next(self._beats), activity)

    def close(self) -> None:
        self._closed.set()

    def _watch(self) -> None:
        period = min(1.0, self._limit_secs / 4)
        last, idle_secs = self._last, 0.0
        while not self._closed.wait(period):
            # Idle time is measured in wake-ups, because the clock keeps running while the process is stopped.
            idle_secs = idle_secs + period if self._last is last else 0.0
            last = self._last
            if idle_secs > self._limit_secs:
                _, activity = last
                print(
                    f"error: no progress for limits.stuck_after_secs={self._limit_secs:g} seconds while {activity}; "
                    "another process may have died; the stacks of this process's threads follow:",
                    file=sys.stderr,
                )
                faulthandler.dump_traceback(sys.stderr)
                sys.stderr.flush()
                os._exit(EXIT_FAILED)


class CompilationListener:
    """Calls a function when the process starts compiling and when it finishes.

    Several threads may compile programs at the same time; only the first start and the last end are reported.

    Args:
      on_change: called with True when compilation starts and with False when it ends.
    """

    def __init__(self, on_change: Callable[[bool], None]):
        self._on_change = on_change
        self._lock = threading.Lock()
        self._num_active = 0
        jax.monitoring.register_scalar_listener(self._on_start)
        jax.monitoring.register_event_duration_secs_listener(self._on_end)

    def close(self) -> None:
        jax.monitoring.unregister_scalar_listener(self._on_start)
        jax.monitoring.unregister_event_duration_listener(self._on_end)

    def _on_start(self, event: str, value: float | int, **kwargs: Any) -> None:
        del value, kwargs
        self._count(event, 1)

    def _on_end(self, event: str, duration_secs: float, **kwargs: Any) -> None:
        del duration_secs, kwargs
        self._count(event, -1)

    def _count(self, event: str, change: int) -> None:
        if event != COMPILATION:
            return
        with self._lock:
            was_active = self._num_active > 0
            self._num_active = max(0, self._num_active + change)
            if was_active != (self._num_active > 0):
                self._on_change(self._num_active > 0)


class Interrupt:
    """Handles SIGINT, SIGTERM and SIGHUP: the first signal requests a stop; the second ends the process immediately.

    A closing terminal often sends SIGHUP twice, so SIGHUP is ignored after the first signal. If the process was started
    with `nohup`, SIGHUP is always ignored.
    """

    NUMBERS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    def __init__(self):
        self._received = False
        self._flag = SharedFlag("interrupt")
        self._before = {
            number: signal.signal(number, self._receive)
            for number in self.NUMBERS
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN
        }

    @property
    def received(self) -> bool:
        """Whether this or another process of the job has received a signal."""
        # The signal handler does not set the flag, because it may interrupt any code.
        if self._received:
            self._flag.set()
        return self._flag.is_set

    def close(self) -> None:
        """Restores the previous signal handlers."""
        self._flag.close()
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, *_) -> None:
        self._received = True
        # A second signal is left to the kernel, because Python handlers run only after a compiled program returns.
        for number in self._before:
            is_hangup = number == signal.SIGHUP
            signal.signal(number, signal.SIG_IGN if is_hangup else signal.SIG_DFL)
        leave_lost_terminal()
        print(
            "stopping when the current update or decode segment ends, and saving the training state; a second Ctrl-C ends "
            "the process immediately, without saving",
            file=sys.stderr,
        )


def check_space(folder: Path, needed_bytes: int, what: str) -> None:
    """Checks that the disk has enough free space for a write.

    Raises:
      TrainingFailed: if there is too little free space.
    """
    free = shutil.disk_usage(folder).free
    if free < needed_bytes:
        raise TrainingFailed(
            f"output_dir={folder}: only {free / 2**20:.1f} MiB of disk space is left, but {what} needs "
            f"{needed_bytes / 2**20:.1f} MiB; free some space and run the same command to resume from the last "
            "checkpoint"
        )
