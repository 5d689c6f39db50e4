"""Tracks the stages of a run: which stage a step belongs to, and when the next stage begins. Does not use JAX."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from trapo_jax.methods import Stage
from trapo_jax.types import StagePosition


@dataclasses.dataclass(frozen=True)
class StageState:
    """A run's position within its stages. Checkpoints store it as a JSON-serializable dict.

    Attributes:
      index: number of the current stage, starting at 0.
      start_step: number of completed steps when the stage began.
      start: fraction of the run that was complete when the stage began.
      best_loss: lowest validation expert loss in the stage so far; None before the first validation.
      num_not_better: number of validations since the one with the lowest loss.
    """

    index: int = 0
    start_step: int = 0
    start: float = 0.0
    best_loss: float | None = None
    num_not_better: int = 0


class StageTracker:
    """Follows a run through the stages of its method.

    Args:
      stages: the stages, in order; the last one ends with the run.
    """

    def __init__(self, stages: Sequence[Stage]):
        self._stages = stages
        self._state = StageState()

    @property
    def state(self) -> dict[str, Any]:
        """The state to save in a checkpoint."""
        return dataclasses.asdict(self._state)

    @state.setter
    def state(self, state: Mapping[str, Any]) -> None:
        self._state = StageState(**state)

    @property
    def stage(self) -> Stage:
        """The current stage."""
        return self._stages[self._state.index]

    def position(self, step: int, progress: float) -> StagePosition:
        """Returns the position of a step within the current stage.

        Args:
          step: number of the step within the run, starting at 1.
          progress: fraction of the run that was complete before the step.
        """
        state = self._state
        completed = self._completed(step - 1, progress)
        return StagePosition(state.index, step - state.start_step, min(1.0, completed))

    def advance(self, num_steps: int, progress: float) -> bool:
        """Moves to the next stage if the current one is over, and returns whether the stage changed.

        Args:
          num_steps: number of completed steps of the run.
          progress: fraction of the run that is complete.
        """
        state = self._state
        while not self._is_last and self._is_over(num_steps, progress):
            self._state = StageState(self._state.index + 1, num_steps, progress)
        return self._state.index > state.index

    def observe(self, expert_loss: float) -> None:
        """Records the expert loss of an evaluation on the validation split."""
        state = self._state
        if state.best_loss is None or expert_loss < state.best_loss:
            self._state = dataclasses.replace(state, best_loss=expert_loss, num_not_better=0)
        else:
            self._state = dataclasses.replace(state, num_not_better=state.num_not_better + 1)

    @property
    def _is_last(self) -> bool:
        return self._state.index == len(self._stages) - 1

    def _is_over(self, num_steps: int, progress: float) -> bool:
        patience = self.stage.patience
        is_exhausted = patience is not None and self._state.num_not_better >= patience
        return is_exhausted or self._completed(num_steps, progress) >= 1

    def _completed(self, num_steps: int, progress: float) -> float:
        """Returns the fraction of the current stage that is complete."""
        state = self._state
        end = 1.0 if self._is_last else min(1.0, state.start + self.stage.share)
        by_share = (progress - state.start) / (end - state.start) if end > state.start else 1.0
        limit = None if self._is_last else self.stage.num_steps
        by_steps = (num_steps - state.start_step) / limit if limit else 0.0
        return max(by_share, by_steps)
