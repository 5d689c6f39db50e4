# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # How much of the expert solution a problem gets
#
# In micro-group sampling (TRAPO, arXiv 2512.17636, Section 3.1), each of a problem's eight rollouts starts either
# from a prefix of the expert solution or without one, depending on the rewards of earlier rollouts. This notebook
# computes what this means on average for a problem with a given solve rate: how much guidance there is, in which
# micro-groups, and how many tokens are left to sample. The numbers are exact: every possible sequence of rewards (0
# or 1) is passed through the package's own `Guidance` class and weighted by its probability. Two settings are
# compared: the presets `paper` and `reference` (the released code).

# %%
from collections.abc import Callable
from typing import NamedTuple

import matplotlib.pyplot as plt
import numpy as np

from trapo_jax.methods import make_method
from trapo_jax.rollouts.guidance import Guidance
from trapo_jax.types import Expert, Problem, RolloutRequest

# The palette of Okabe and Ito, whose colors can be told apart with any kind of color vision.
BLACK, ORANGE, SKY = "#000000", "#E69F00", "#56B4E9"
BLUE, RED, PURPLE = "#0072B2", "#D55E00", "#CC79A7"
COLORS = {"paper": BLUE, "reference": RED}
plt.rcParams.update(
    {
        "figure.dpi": 90,
        "figure.figsize": (7.5, 4.2),
        "font.size": 11,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "grid.alpha": 0.3,
        "lines.linewidth": 2,
        "legend.frameon": False,
    }
)

# %% [markdown]
# ## A problem and the two settings
#
# The expert solution has 1,000 tokens, with the end of a paragraph after every 80 tokens. It is long enough that
# rounding has no visible effect. In the `reference` preset, a prefix is extended to the next end of a paragraph; in
# the `paper` preset, it ends exactly where the ratio specifies.

# %%
EXPERT_LEN = 1_000
expert = Expert(tuple(range(EXPERT_LEN)), paragraph_ends=tuple(range(80, EXPERT_LEN, 80)))
problem = Problem(id="0" * 16, prompt_ids=(1, 2, 3), answer="", experts=(expert,))


def make_scheduler(preset):
    method = make_method("trapo", preset=preset)
    return Guidance(
        method.micro_groups,
        max_completion_length=2 * EXPERT_LEN,
        prefix_boundary=method.prefix_boundary,
        second_expert_last=method.second_expert_last,
    )


schedulers = {preset: make_scheduler(preset) for preset in COLORS}
for preset, scheduler in schedulers.items():
    state = scheduler.start(problem)
    # All rewards are 0, so all later micro-groups are guided.
    for index in range(scheduler.group_size):
        state = scheduler.observe(state, index, 0.0)
        lens = [request.prefix_len for request in scheduler.ready(state)]
        print(f"{preset:9} after {index + 1} failures: prefixes of the next rollouts {lens}")

# %% [markdown]
# ## Exact expectations
#
# `outcomes` walks through the tree of possible rewards. At each node, it takes a rollout that the scheduler has
# released, branches on the reward of this rollout, and continues. Success probabilities are arrays over a grid of
# solve rates, so a single walk covers the whole grid.
#
# There are two assumptions about the effect of a prefix. Under both, the whole solution (ratio 1) is correct.
#
# - *does not help*: with only a part of the solution, a rollout succeeds with the problem's solve rate s.
# - *helps in proportion*: a prefix of ratio L removes a fraction L of the failures, so a rollout succeeds with
#   probability `s + L (1 - s)`.

# %%
SOLVE_RATES = np.linspace(0, 1, 101)
SuccessModel = Callable[[RolloutRequest], np.ndarray]
MODELS: dict[str, SuccessModel] = {
    "a prefix does not help": lambda x: np.where(x.ratio == 1, 1.0, SOLVE_RATES),
    "a prefix helps in proportion": lambda x: SOLVE_RATES + x.ratio * (1 - SOLVE_RATES),
}


def outcomes(scheduler, success, *, choose=0):
    """Yields (probability on the grid, requests, mean reward) for every sequence of rewards.

    `choose` is the index of the released rollout that finishes first. The expectations must not depend on it.
    """

    def walk(state, probability, done):
        released = scheduler.ready(state)
        if not released:
            yield probability, done, np.mean(state.rewards)
            return
        request = released[choose]
        p = success(request)
        for reward, chance in ((1.0, p), (0.0, 1 - p)):
            after = scheduler.observe(state, request.sample_index, reward)
            yield from walk(after, probability * chance, (*done, request))

    yield from walk(scheduler.start(problem), np.ones_like(SOLVE_RATES), ())


def sampled_tokens(request):
    """Returns the number of tokens left to sample if the response is as long as the expert solution."""
    return EXPERT_LEN - request.prefix_len


class Expectations(NamedTuple):
    """Expected values for every solve rate of the grid."""

    ratio: np.ndarray  # ratio of the prefix; mean over the rollouts
    tokens: np.ndarray  # number of sampled tokens per group
    reward: np.ndarray  # reward; mean over the rollouts
    guided: np.ndarray  # [micro-groups, grid]; probability that the micro-group is guided


def expectations(scheduler, success, *, choose=0):
    total = np.zeros_like(SOLVE_RATES)
    sums = Expectations(*np.zeros((3, SOLVE_RATES.size)), np.zeros((4, SOLVE_RATES.size)))
    for probability, requests, reward in outcomes(scheduler, success, choose=choose):
        assert len(requests) == scheduler.group_size
        total += probability
        sums.ratio[:] += probability * np.mean([x.ratio for x in requests])
        sums.tokens[:] += probability * sum(map(sampled_tokens, requests))
        sums.reward[:] += probability * reward
        sums.guided[list({x.micro_group for x in requests if x.prefix_len})] += probability
    np.testing.assert_allclose(total, 1, rtol=1e-12)
    return sums


results = {
    (preset, model): expectations(scheduler, success)
    for preset, scheduler in schedulers.items()
    for model, success in MODELS.items()
}
for (preset, model), values in results.items():
    other_order = expectations(schedulers[preset], MODELS[model], choose=-1)
    for got, again in zip(values, other_order, strict=True):
        np.testing.assert_allclose(got, again, atol=1e-9)
print("Whichever released rollout finishes first, the expectations are the same.")

# %% [markdown]
# ## The effect of a prefix does not change the guidance
#
# The two assumptions lead to the same guidance. In both settings, once a micro-group is guided, all later
# micro-groups are guided as well, whatever their rewards are: so few of the earlier rollouts have succeeded that even
# a perfect micro-group cannot raise the mean reward to the next threshold. The guidance therefore depends only on the
# rewards of the unguided rollouts, and the following figures need only one line per setting.

# %%
for preset, scheduler in schedulers.items():
    num_sequences = 0
    for _, requests, _ in outcomes(scheduler, MODELS["a prefix does not help"]):
        flags = [x.prefix_len > 0 for x in sorted(requests, key=lambda x: x.sample_index)]
        assert flags == sorted(flags), "an unguided rollout after a guided one"
        num_sequences += 1
    first, second = (results[preset, model] for model in MODELS)
    for name in ("ratio", "tokens", "guided"):
        np.testing.assert_allclose(getattr(first, name), getattr(second, name), atol=1e-9)
    print(
        f"{preset}: in all {num_sequences} sequences of rewards, guided once means guided from then on"
    )

# %% [markdown]
# ## Guidance

# %%
AT = (0, 25, 50, 75, 90, 100)
figure, axes = plt.subplots()
for preset, color in COLORS.items():
    ratio = 100 * results[preset, "a prefix does not help"].ratio
    axes.plot(100 * SOLVE_RATES, ratio, color=color, label=preset)
    shown = ", ".join(f"{ratio[i]:.1f} % at {SOLVE_RATES[i]:.0%}" for i in AT)
    print(f"{preset:9}: mean prefix {shown}")
axes.set(
    xlim=(0, 100),
    ylim=(0, None),
    xlabel="solve rate without guidance (%)",
    ylabel="expert prefix, mean over 8 rollouts (%)",
    title="Hard problems get a quarter of the expert, easy ones little",
)
axes.legend(title="setting")
plt.show()

# %%
figure, grid = plt.subplots(1, 2, figsize=(11, 5), sharey=True, layout="constrained")
for axes, (preset, scheduler) in zip(grid, schedulers.items(), strict=True):
    for index, color, style in ((1, SKY, ":"), (2, ORANGE, "--"), (3, PURPLE, "-")):
        group = scheduler.micro_groups[index]
        rollouts = f"{group.size} rollout{'s' if group.size > 1 else ''}"
        axes.plot(
            100 * SOLVE_RATES,
            100 * results[preset, "a prefix does not help"].guided[index],
            color=color,
            linestyle=style,
            label=f"{rollouts}, ratio {group.ratio:g}, if mean < {group.threshold:.2g}",
        )
    axes.set(title=preset, xlabel="solve rate without guidance (%)", xlim=(0, 100))
    axes.legend(title="micro-groups 2, 3, 4", loc="upper center", bbox_to_anchor=(0.5, -0.18))
grid[0].set_ylabel("probability of being guided (%)")
figure.suptitle(
    "Later micro-groups, with more of the expert, are still guided at higher solve rates"
)
plt.show()

# %% [markdown]
# ## Number of tokens left to sample

# %%
figure, axes = plt.subplots()
unguided = 8 * EXPERT_LEN
for preset, color in COLORS.items():
    tokens = results[preset, "a prefix does not help"].tokens
    axes.plot(100 * SOLVE_RATES, tokens, color=color, label=preset)
    shown = ", ".join(f"{tokens[i]:,.0f} at {SOLVE_RATES[i]:.0%}" for i in AT)
    print(f"{preset:9}: sampled tokens {shown}")
axes.axhline(unguided, color=BLACK, linestyle=":", label="8 unguided rollouts")
axes.set(
    xlim=(0, 100),
    ylim=(0, 1.05 * unguided),
    xlabel="solve rate without guidance (%)",
    ylabel="expected sampled tokens per group",
    title="Guidance saves about a quarter of the sampling where problems are hard",
)
axes.legend(loc="lower right")
plt.show()

# %% [markdown]
# ## The effect of a prefix on the rewards

# %%
figure, axes = plt.subplots()
for preset, color in COLORS.items():
    for model, style in zip(MODELS, (":", "-"), strict=True):
        reward = results[preset, model].reward
        axes.plot(
            100 * SOLVE_RATES, reward, color=color, linestyle=style, label=f"{preset}, {model}"
        )
        shown = ", ".join(f"{reward[i]:.2f} at {SOLVE_RATES[i]:.0%}" for i in AT)
        print(f"{preset:9} {model:28}: mean reward {shown}")
axes.set(
    xlim=(0, 100),
    ylim=(0, 1.02),
    xlabel="solve rate without guidance (%)",
    ylabel="mean reward of the group, expected",
    title="A prefix that helps gives hopeless problems a reward to learn from",
)
axes.legend(loc="lower right")
plt.show()

# %% [markdown]
# ## Findings
#
# - For a problem that is never solved without help, the mean prefix over the rollouts is 23.8% of the expert solution
#   in the `paper` setting and 25.0% in the `reference` setting. For a problem that is solved half of the time, it is
#   19.5% and 18.5%, respectively. For a problem that is always solved, it is 0%.
# - On average, the two settings differ little. `reference` gives more guidance for hard problems (the ratio of its
#   first guided micro-group is 0.25 rather than 0.2) and less for problems with a medium solve rate (the threshold of
#   its third micro-group is 4/6 rather than 0.7).
# - Guidance reduces the number of tokens to sample. If a response is as long as the expert solution, it falls from
#   8,000 tokens to 6,100 (`paper`) or 5,800 (`reference`, in which prefixes are extended to the end of a paragraph)
#   for a problem that is never solved.
# - The guidance depends only on the unguided rollouts: in all 256 sequences of rewards in either setting, every
#   micro-group after a guided one is guided as well. The effect of a prefix changes the rewards, but not the
#   guidance.
# - If a prefix helps in proportion to its length, a problem that is never solved without help still has a mean reward
#   of 0.24 or 0.25. The rewards of its rollouts therefore differ, which the policy gradient can use. If a prefix does
#   not help, only one rollout in eight is rewarded: the one that consists of the whole solution. It has no sampled
#   tokens, so no completion is ever reinforced.
