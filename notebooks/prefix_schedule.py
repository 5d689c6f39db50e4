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
# # How much of the expert a problem gets
#
# Micro-group sampling (TRAPO, arXiv 2512.17636, Section 3.1) gives each of a problem's eight rollouts an expert
# prefix or none, depending on the rewards so far. This notebook computes what that means on average for a problem
# of a given solve rate: how much guidance, in which micro-group, and how many tokens are left to sample. The
# numbers are exact: every sequence of rewards (0 or 1) goes through the library's own `Guidance`, weighted by
# its probability. Two settings are compared, `paper` and `reference` (the released code).

# %%
from collections.abc import Callable
from typing import NamedTuple

import matplotlib.pyplot as plt
import numpy as np

from trapo_jax.methods import make_method
from trapo_jax.rollouts.guidance import Guidance
from trapo_jax.types import Expert, Problem, RolloutRequest

# Okabe and Ito's palette: told apart with every kind of colour vision.
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
# An expert solution of 1,000 tokens with a paragraph end every 80: long enough that rounding does not show. The
# `reference` preset moves a cut to the next paragraph end; `paper` cuts where the ratio says.

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
    for index in range(scheduler.group_size):  # all rewards 0: every gate opens
        state = scheduler.observe(state, index, 0.0)
        lens = [request.prefix_len for request in scheduler.ready(state)]
        print(f"{preset:9} after {index + 1} failures: prefixes of the next rollouts {lens}")

# %% [markdown]
# ## Exact expectations
#
# `outcomes` walks the tree of rewards. At each step it takes a rollout that the scheduler has released, branches on
# its reward, and goes on. Success probabilities are arrays over a grid of solve rates, so one walk serves the grid.
#
# Two assumptions about what a prefix does; the whole solution (ratio 1) is right under both:
#
# - *does not help*: with a part of the solution, a rollout succeeds with the problem's solve rate s;
# - *helps in proportion*: a prefix of ratio L removes the share L of the failures, `s + L (1 - s)`.

# %%
SOLVE_RATES = np.linspace(0, 1, 101)
SuccessModel = Callable[[RolloutRequest], np.ndarray]
MODELS: dict[str, SuccessModel] = {
    "a prefix does not help": lambda x: np.where(x.ratio == 1, 1.0, SOLVE_RATES),
    "a prefix helps in proportion": lambda x: SOLVE_RATES + x.ratio * (1 - SOLVE_RATES),
}


def outcomes(scheduler, success, *, choose=0):
    """Yields (probability on the grid, requests, mean reward) for every sequence of rewards.

    `choose` says which released rollout finishes first; the expectations must not depend on it.
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
    """Tokens left to sample, if the response is as long as the expert's; none after a whole one."""
    return EXPERT_LEN - request.prefix_len


class Expectations(NamedTuple):
    """On the grid of solve rates."""

    ratio: np.ndarray  # of the prefix, mean over the rollouts
    tokens: np.ndarray  # sampled, per group
    reward: np.ndarray  # mean over the rollouts
    guided: np.ndarray  # [micro-groups, grid], probability that the micro-group is guided


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
# ## What a prefix achieves does not change the guidance
#
# The two assumptions turn out to give the same guidance. In both settings a micro-group that is guided is followed
# by guided ones only, whatever its own rewards: too few have succeeded before it for it to lift the mean over
# the next threshold. So only unguided rollouts ever decide, and one line per setting is enough below.

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
# ## What is left to sample

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
# ## What a prefix achieves shows in the rewards

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
# ## What was seen
#
# - A problem that is never solved without help gets 23.8 % of the expert per rollout in the `paper` setting and
#   25.0 % in `reference`; one solved half of the time 19.5 % and 18.5 %; one that is always solved nothing.
# - The settings differ little on average. `reference` gives more to hard problems (its first ratio is 0.25, not
#   0.2) and less to those of middling solve rate (its third micro-group has the threshold 4/6, not 0.7).
# - Sampling shrinks with guidance: to 6,100 of 8,000 tokens (`paper`) or 5,800 (`reference`, whose cuts move on to
#   a paragraph end) for a problem never solved, if a response is as long as the expert's.
# - Guidance depends on unguided rollouts only: in all 256 sequences of rewards of either setting, a guided
#   micro-group is followed by guided ones. What a prefix achieves changes the rewards, not the schedule.
# - If a prefix helps in proportion to its length, a problem never solved alone still has a mean reward of 0.24
#   or 0.25, a difference between its rollouts that the policy gradient can use. If it does not help, only the whole
#   solution is rewarded, one rollout in eight; it has no sampled token, so no completion is ever reinforced.
