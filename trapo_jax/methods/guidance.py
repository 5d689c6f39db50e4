"""How much of the expert a group's rollouts start from. Host only, no jax.

A group is a tuple of micro-groups (see `Guidance`); a `vary` function changes it with the moment and the problem.
"""

import dataclasses
import math

import numpy as np

from trapo_jax.types import MicroGroup, Moment, Problem

ALWAYS, NEVER = 2.0, -1.0  # thresholds that every mean of rewards in [0, 1] is below, above

MicroGroups = tuple[MicroGroup, ...]


def unguided(size: int) -> MicroGroups:
    """`size` rollouts from the prompt alone."""
    return (MicroGroup(size, 0.0, NEVER),)


def rollouts_and_expert(num_rollouts: int) -> MicroGroups:
    """`num_rollouts` unguided rollouts, and the whole expert solution as one more."""
    return (*unguided(num_rollouts), *whole_expert())


def whole_expert() -> MicroGroups:
    """The expert's whole solution; nothing is sampled."""
    return (MicroGroup(1, 1.0, ALWAYS),)


def cosine(progress: float, *, start: float, end: float) -> float:
    """From `start` at 0 along half a cosine wave to `end` at 1, and constant outside.

    >>> cosine(0.5, start=0.9, end=0.1)
    0.5
    """
    share = 0.5 * (1 + math.cos(math.pi * min(1.0, max(0.0, progress))))
    return end + (start - end) * share


@dataclasses.dataclass(frozen=True)
class BinomialHints:
    """UFT: all rollouts of a problem start from k of `num_slices` equal slices of the expert.

    `k ~ Binomial(num_slices, q)`, q from `high` at step 0 along a cosine to `low` at `num_steps`; no slice after
    that. Drawn anew for each problem and step, by the run's seed.
    """

    num_slices: int
    high: float
    low: float
    num_steps: int

    def probability(self, step: int) -> float:
        if step > self.num_steps:
            return 0.0
        return cosine(step / max(1, self.num_steps), start=self.high, end=self.low)

    def __call__(self, groups: MicroGroups, moment: Moment, problem: Problem) -> MicroGroups:
        random = np.random.default_rng([moment.seed, moment.step, problem.key])
        num_slices = int(random.binomial(self.num_slices, self.probability(moment.step)))
        ratio = num_slices / max(1, self.num_slices)
        return tuple(dataclasses.replace(group, ratio=ratio) for group in groups)


@dataclasses.dataclass(frozen=True)
class CosinePrefix:
    """Prefix-RFT: the last micro-group's ratio goes from `start` along a cosine to `end` over the run."""

    start: float
    end: float

    def __call__(self, groups: MicroGroups, moment: Moment, problem: Problem) -> MicroGroups:
        del problem
        ratio = cosine(moment.progress, start=self.start, end=self.end)
        return (*groups[:-1], dataclasses.replace(groups[-1], ratio=ratio))


@dataclasses.dataclass(frozen=True)
class ExpertFirst:
    """SFT, then RL: the whole expert until `until` of the run is over, the given micro-groups afterwards."""

    until: float

    def __call__(self, groups: MicroGroups, moment: Moment, problem: Problem) -> MicroGroups:
        del problem
        return whole_expert() if moment.progress < self.until else groups
