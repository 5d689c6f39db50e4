"""Determines how much of the expert solution a group's rollouts start from. Runs on the host, without JAX.

A group is a tuple of micro-groups (see `Guidance`). A `vary` function adapts the micro-groups to the position in
the run and to the problem.
"""

import dataclasses
import math

import numpy as np

from trapo_jax.types import MicroGroup, Moment, Problem

ALWAYS, NEVER = 2.0, -1.0  # thresholds above and below every mean reward in [0, 1]

MicroGroups = tuple[MicroGroup, ...]


def unguided(size: int) -> MicroGroups:
    """Returns one micro-group of `size` rollouts that start from the prompt alone."""
    return (MicroGroup(size, 0.0, NEVER),)


def rollouts_and_expert(num_rollouts: int) -> MicroGroups:
    """Returns micro-groups of `num_rollouts` unguided rollouts, plus the whole expert solution as one more rollout."""
    return (*unguided(num_rollouts), *whole_expert())


def whole_expert() -> MicroGroups:
    """Returns one micro-group that consists of the whole expert solution; nothing is sampled."""
    return (MicroGroup(1, 1.0, ALWAYS),)


def cosine(progress: float, *, start: float, end: float) -> float:
    """Returns a half-cosine interpolation from `start` at progress 0 to `end` at 1; constant outside [0, 1].

    >>> cosine(0.5, start=0.9, end=0.1)
    0.5
    """
    share = 0.5 * (1 + math.cos(math.pi * min(1.0, max(0.0, progress))))
    return end + (start - end) * share


@dataclasses.dataclass(frozen=True)
class BinomialHints:
    """UFT: all rollouts of a problem start from the first k of `num_slices` equal slices of the expert solution.

    `k ~ Binomial(num_slices, q)`, where q follows a cosine from `high` at step 0 to `low` at step `num_steps` and is 0
    afterward. A new k is drawn for each problem in each step; the draws depend on the run's seed.
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
    """Prefix-RFT: the last micro-group's ratio follows a cosine from `start` to `end` over the run."""

    start: float
    end: float

    def __call__(self, groups: MicroGroups, moment: Moment, problem: Problem) -> MicroGroups:
        del problem
        ratio = cosine(moment.progress, start=self.start, end=self.end)
        return (*groups[:-1], dataclasses.replace(groups[-1], ratio=ratio))


def expert_in_first_stage(groups: MicroGroups, moment: Moment, problem: Problem) -> MicroGroups:
    """Returns the whole expert solution in the first stage (SFT), and `groups` in later stages (RL)."""
    del problem
    return whole_expert() if moment.stage.index == 0 else groups
