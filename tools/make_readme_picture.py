"""Plots docs/idea.png: the TrSFT gradient, and guidance as a function of a problem's solve rate.

python tools/make_readme_picture.py        # requires the `notebooks` extra
"""

import itertools
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import trapo_jax.distributed.log_level  # noqa: F401  silences libtpu, before JAX loads it
from trapo_jax.losses import clip_attenuation, trsft_loss_from_logprobs
from trapo_jax.methods import make_method
from trapo_jax.rollouts.guidance import Guidance
from trapo_jax.types import Expert, Problem

BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#777777"  # Okabe-Ito
OUTPUT = Path(__file__).parents[1] / "docs" / "idea.png"


def guided_probability(solve_rates: np.ndarray) -> np.ndarray:
    """Returns the probability that each micro-group is guided, as an array of shape `[rates, micro-groups]`.

    The probabilities are exact: all possible outcomes of the rollouts are enumerated.
    """
    method = make_method("trapo")
    guidance = Guidance(method.micro_groups, 1000)
    problem = Problem("0" * 16, (1,), "", (Expert(tuple(range(100))),))
    result = np.zeros((len(solve_rates), len(method.micro_groups)))
    for outcome in itertools.product((0.0, 1.0), repeat=guidance.group_size):
        state, guided = guidance.start(problem), np.zeros(len(method.micro_groups))
        while not state.is_complete:
            request = guidance.ready(state)[0]
            guided[request.micro_group] = request.prefix_len > 0
            state = guidance.observe(state, request.sample_index, outcome[request.sample_index])
        solved = sum(outcome)
        chance = solve_rates**solved * (1 - solve_rates) ** (guidance.group_size - solved)
        result += chance[:, None] * guided
    return result


def main() -> None:
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), dpi=130)
    p = jnp.linspace(0.002, 1, 500)
    alpha = 0.1
    left.plot(p, -jnp.log(p), color=GREY, ls="--", label="cross-entropy")
    left.plot(p, trsft_loss_from_logprobs(jnp.log(p), alpha=alpha), color=BLUE, label="TrSFT")
    left.plot(p, jax.vmap(clip_attenuation(alpha))(p), color=ORANGE, label="TrSFT gradient weight")
    left.axvspan(0, alpha, color=GREY, alpha=0.15, lw=0)
    left.text(alpha + 0.01, 5.2, "< outside the\n   trust region", ha="left", va="top", fontsize=8)
    left.set(
        xlabel="probability p of the expert's token",
        ylabel="loss (nats) or gradient weight",
        title="The expert is followed inside the trust region",
        ylim=(0, 6),
        xlim=(0, 1),
    )
    left.legend(frameon=False)
    rates = np.linspace(0, 1, 101)
    guided = guided_probability(rates)
    groups = make_method("trapo").micro_groups
    for i, color in zip((1, 2, 3), (GREEN, BLUE, ORANGE), strict=True):
        label = f"micro-group {i + 1}: {groups[i].ratio:.0%} of the expert"
        right.plot(100 * rates, 100 * guided[:, i], color=color, label=label)
    right.set(
        xlabel="how often the model solves the problem alone (%)",
        ylabel="chance of guidance (%)",
        title="... and helps only as much as needed",
        xlim=(0, 100),
        ylim=(0, 103),
    )
    right.legend(frameon=False, loc="lower left", fontsize=7.5)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(OUTPUT)
    print(f"wrote {OUTPUT}")


if __name__ == "__main__":
    main()
