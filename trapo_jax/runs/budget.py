"""When a run ends: after a number of steps or when a budget is spent."""

import dataclasses

from trapo_jax.types import Usage, UserError

# Field of `Usage` that each unit of a budget refers to.
UNITS = {
    "trained_tokens": "tokens_trained",
    "sampled_tokens": "tokens_sampled",
    "flops": "flops",
    "problems": "problems_seen",
    "seconds": "seconds",
}


@dataclasses.dataclass(frozen=True)
class Budget:
    """Ends a run after `num_steps` steps or when `amount` of a unit is spent, whichever comes first.

    Attributes:
      unit: a key of `UNITS`, or "steps".
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
        spent = step if self.unit == "steps" else getattr(usage, UNITS[self.unit])
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
