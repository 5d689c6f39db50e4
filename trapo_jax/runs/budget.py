"""When a run ends: after a number of steps or when a budget is spent."""

import dataclasses
from typing import NamedTuple

from trapo_jax.types import Usage, UserError

STEPS = "steps"

# The metric that counts each field of `Usage` since the start of the run.
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
      label: what is counted, for charts.
    """

    field: str | None
    label: str

    @property
    def metric(self) -> str:
        """Name in metrics.jsonl of the amount spent since the start of the run."""
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
      amount: amount of the unit, > 0; None if the run is limited by `num_steps` alone.
      num_steps: maximum number of steps.
    """

    unit: str
    amount: float | None
    num_steps: int

    def progress(self, usage: Usage, step: int) -> float:
        """Returns the share of the run that is complete after `step` steps; 1 or more at its end."""
        share = step / self.num_steps
        if self.amount is None:
            return share
        field = UNITS[self.unit].field
        spent = getattr(usage, field) if field else step
        return max(share, spent / self.amount)

    def check_spent(self, usage: Usage, method_name: str) -> None:
        """Checks after a step that the budget can be spent.

        Raises:
          UserError: for a budget of sampled tokens if the method samples none.
        """
        if self.amount is not None and self.unit == "sampled_tokens" and not usage.tokens_sampled:
            raise UserError(
                f"train.budget_unit=sampled_tokens: method.name={method_name} samples none; give trained_tokens, "
                "flops, problems or seconds"
            )
