"""Defines the length of a run, in steps or as a budget, and when its recurring events are due."""

import dataclasses
from typing import NamedTuple

from trapo_jax.types import Usage, UserError

STEPS = "steps"

# Maps each field of `Usage` to the metric that reports its total since the start of the run.
USAGE_METRICS = {
    "tokens_trained": "tokens/trained",
    "tokens_expert_trained": "tokens/expert_trained",
    "tokens_prompt": "tokens/prompt",
    "tokens_sampled": "tokens/sampled",
    "problems_seen": "problems/seen",
    "flops": "budget/flops",
    "seconds": "time/budget_secs",
}


class Unit(NamedTuple):
    """A unit of a budget.

    Attributes:
      field: field of `Usage`; None for steps.
      label: the unit's name in charts and tables.
    """

    field: str | None
    label: str

    @property
    def metric(self) -> str:
        """Name of the metric that reports the amount spent since the start of the run."""
        return USAGE_METRICS[self.field] if self.field else "step"


UNITS = {
    "trained_tokens": Unit("tokens_trained", "trained tokens"),
    "sampled_tokens": Unit("tokens_sampled", "sampled tokens"),
    "flops": Unit("flops", "FLOPs"),
    "problems": Unit("problems_seen", "problems"),
    "seconds": Unit("seconds", "seconds"),
    STEPS: Unit(None, "steps"),
}


@dataclasses.dataclass(frozen=True)
class Budget:
    """Ends a run after `num_steps` steps or when `amount` of a unit is spent, whichever comes first.

    Attributes:
      unit: a key of `UNITS`.
      amount: amount to spend, > 0; None if only `num_steps` limits the run.
      num_steps: maximum number of steps.
    """

    unit: str
    amount: float | None
    num_steps: int

    def progress(self, usage: Usage, step: int) -> float:
        """Returns the fraction of the run that is complete after `step` steps; >= 1 once the run is over."""
        share = step / self.num_steps
        if self.amount is None:
            return share
        field = UNITS[self.unit].field
        spent = getattr(usage, field) if field else step
        return max(share, spent / self.amount)

    def check_spent(self, usage: Usage, method_name: str) -> None:
        """Checks after a step that the method consumes the budget's unit.

        Raises:
          UserError: if the budget is in sampled tokens and the method has sampled none.
        """
        if self.amount is not None and self.unit == "sampled_tokens" and not usage.tokens_sampled:
            raise UserError(
                f"train.budget_unit=sampled_tokens: method.name={method_name} does not sample; use trained_tokens, "
                "flops, problems or seconds"
            )


def usage_metrics(usage: Usage) -> dict[str, float]:
    """Returns the amounts spent since the start of the run, keyed by metric name."""
    return {metric: getattr(usage, field) for field, metric in USAGE_METRICS.items()}


def is_due(step: int, progress_before: float, progress: float, every: float) -> bool:
    """Returns whether a recurring event is due after a step.

    Args:
      step: number of the step, starting at 1.
      progress_before: fraction of the run that was complete before the step.
      progress: fraction of the run that is complete after the step.
      every: interval in steps if >= 1, or as a fraction of the run if in (0, 1); 0 for never.
    """
    if every >= 1:
        return step % every == 0
    num_intervals = round(1 / every) if every else 0
    return int(progress_before * num_intervals) < int(progress * num_intervals)
