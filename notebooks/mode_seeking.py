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
# # Mode seeking: what a student learns from an expert that it cannot represent
#
# This notebook follows the pilot study of TRAPO (arXiv 2512.17636, Section 3.2) and has two parts. First, a mixture
# of two Gaussians learns from an expert that is a mixture of three Gaussians, with cross-entropy (forward KL), with
# TrSFT for several values of alpha, and with reverse KL. Then a distribution over 12 classes, which could represent
# its expert exactly, is trained with TrSFT and compared with the optimum that Proposition 1 predicts.

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from jax.scipy.special import ndtr

from trapo_jax.losses import (
    attenuated_cross_entropy_from_logprobs,
    trsft_loss_from_logprobs,
    trsft_optimum,
    unit_attenuation,
)

# The palette of Okabe and Ito, whose colors can be told apart with any kind of color vision.
BLACK, SKY, GREEN = "#000000", "#56B4E9", "#009E73"
BLUE, RED, PURPLE, GREY = "#0072B2", "#D55E00", "#CC79A7", "#BBBBBB"
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
# ## Expert and student
#
# The interval from -8 to 8 is divided into 64 bins of width 0.25. A policy assigns a probability to each bin, just as
# a language model assigns a probability to each token, so alpha has the same meaning as for a language model. The
# expert's largest bin probability is printed below. With an alpha above this value, every bin would be outside the
# trust region of a student that equals the expert. The *void* consists of the bins to which the expert assigns less
# than 1% of its largest bin probability.

# %%
EDGES = jnp.linspace(-8, 8, 65)
CENTRES = (EDGES[1:] + EDGES[:-1]) / 2
WIDTH = EDGES[1] - EDGES[0]


def mixture(weights, means, deviations):
    """Returns the probability of each bin under a mixture of Gaussians."""
    mass = jnp.diff(ndtr((EDGES[:, None] - means) / deviations), axis=0) @ weights
    return mass / mass.sum()


def student(params):
    return mixture(jax.nn.softmax(params["logits"]), params["means"], jnp.exp(params["log_devs"]))


expert = mixture(jnp.array([0.5, 0.35, 0.15]), jnp.array([-4.0, 0.5, 4.5]), jnp.full(3, 0.6))
void = expert < 0.01 * expert.max()
start = {
    "logits": jnp.zeros(2),
    "means": jnp.array([-1.0, 2.0]),
    "log_devs": jnp.log(jnp.array([3.0, 3.0])),
}
print(f"largest bin probability of the expert {expert.max():.3f}")
print(f"void: {void.sum()} of {void.size} bins, {expert[void].sum():.2%} of the expert's mass")

# %% [markdown]
# ## Training
#
# The losses are exact expectations, without sampling noise. All students start from the same parameters and are
# trained for 4,000 steps with Adam. The forward losses are expected values under the expert's distribution of a loss
# that depends on `log q`, where `q` is the student's probability. The reverse KL is an expected value under the
# student's own distribution. It needs the expert's probabilities, which are not available if there is only text from
# the expert.

# %%
TINY = 1e-30  # keeps the logarithm finite if a probability underflows


def expected(loss):
    return lambda q: jnp.sum(expert * loss(jnp.log(q + TINY)))


def trsft(alpha):
    return expected(lambda logprobs: trsft_loss_from_logprobs(logprobs, alpha=alpha))


def cross_entropy(logprobs):
    return attenuated_cross_entropy_from_logprobs(logprobs, attenuation=unit_attenuation())


def reverse_kl(q):
    return jnp.sum(q * (jnp.log(q + TINY) - jnp.log(expert + TINY)))


# name -> (loss of the student's bin probabilities, color, line style)
METHODS = {
    "forward KL (SFT)": (expected(cross_entropy), BLACK, "-"),
    "TrSFT, alpha = 0.003": (trsft(0.003), SKY, "--"),
    "TrSFT, alpha = 0.01": (trsft(0.01), BLUE, "-"),
    "TrSFT, alpha = 0.1": (trsft(0.1), PURPLE, "-"),
    "reverse KL": (reverse_kl, GREEN, "--"),
}
NUM_STEPS = 4000


def train(loss):
    """Returns the final parameters, and the bin probabilities before each step and after the last one."""
    optimizer = optax.adam(optax.cosine_decay_schedule(0.03, NUM_STEPS))

    def step(carry, _):
        params, state = carry
        gradient = jax.grad(lambda params: loss(student(params)))(params)
        updates, state = optimizer.update(gradient, state)
        return (optax.apply_updates(params, updates), state), student(params)

    carry = start, optimizer.init(start)
    (params, _), before = jax.lax.scan(step, carry, length=NUM_STEPS)
    return params, jnp.append(before, student(params)[None], axis=0)


results = {name: jax.jit(lambda loss=loss: train(loss))() for name, (loss, *_) in METHODS.items()}
print(
    "                      the two components: mass, mean and standard deviation (if mass >= 1 %)"
)
for name, (params, _) in results.items():
    columns = zip(
        jax.nn.softmax(params["logits"]), params["means"], jnp.exp(params["log_devs"]), strict=True
    )
    shown = [f"{w:.3f} at {m:5.2f} +- {s:4.2f}" if w >= 0.01 else f"{w:.3f}" for w, m, s in columns]
    print(f"{name:21} " + "   ".join(shown))

# %%
SHOWN = (0, 100, 300, NUM_STEPS)
figure, grid = plt.subplots(
    len(METHODS), len(SHOWN), figsize=(11, 9), sharex=True, sharey=True, layout="constrained"
)
for axes_row, (name, (_, color, _)) in zip(grid, METHODS.items(), strict=True):
    for axes, step in zip(axes_row, SHOWN, strict=True):
        axes.fill_between(CENTRES, expert / WIDTH, step="mid", color=GREY, label="expert")
        axes.step(CENTRES, results[name][1][step] / WIDTH, where="mid", color=color)
        axes.set_ylim(0, 1.1)
    axes_row[0].set_ylabel(f"{name}\ndensity (1 / unit)", fontsize=9)
for axes, step in zip(grid[0], SHOWN, strict=True):
    axes.set_title(f"step {step:,}")
for axes in grid[-1]:
    axes.set_xlabel("x (units of the line)")
grid[0, 0].step([], [], color=BLACK, label="student (a colour per row)")
handles, labels = grid[0, 0].get_legend_handles_labels()
figure.legend(handles, labels, loc="outside lower center", ncols=2)
figure.suptitle("TrSFT with alpha = 0.01 keeps the two modes that reverse KL keeps")
plt.show()

# %%
figure, axes = plt.subplots()
for name, (_, color, style) in METHODS.items():
    in_void = results[name][1][:, void].sum(-1)
    axes.plot(in_void * 100, color=color, linestyle=style, label=name)
    print(f"{name:21} {in_void[-1]:6.2%} of the student's mass in the void at the end")
axes.set(
    xscale="symlog",
    xlim=(0, NUM_STEPS),
    ylim=(0, None),
    xlabel="training step (linear to 1, then log scale)",
    ylabel="student's mass in the expert's void (%)",
    title="Covering every mode puts mass where the expert hardly goes",
)
axes.legend(loc="lower left")
plt.show()

# %% [markdown]
# ## Proposition 1 for distributions over 12 classes
#
# The experts are random distributions over 12 classes. The students have 12 free logits and start from the uniform
# distribution. `trsft_optimum` computes which classes are pruned and which probabilities the other classes have at
# the optimum. Adam reaches this optimum. Plain gradient descent can take very long, because a class whose probability
# has become tiny also has a tiny gradient, so it recovers slowly.

# %%
ALPHAS = (0.05, 0.1, 0.3)
rng = np.random.default_rng(0)
experts = jnp.asarray(
    np.concatenate([rng.dirichlet(np.full(12, c), size=8) for c in (0.3, 1.0, 3.0)]), jnp.float32
)


def descend(expert, alpha, *, num_steps=30_000):
    optimizer = optax.adam(optax.cosine_decay_schedule(0.01, num_steps))

    def loss(logits):
        logprobs = jax.nn.log_softmax(logits)
        return jnp.sum(expert * trsft_loss_from_logprobs(logprobs, alpha=alpha))

    def step(carry, _):
        logits, state = carry
        updates, state = optimizer.update(jax.grad(loss)(logits), state)
        return (logits + updates, state), None

    carry = jnp.zeros(12), optimizer.init(jnp.zeros(12))
    (logits, _), _ = jax.lax.scan(step, carry, length=num_steps)
    return jax.nn.softmax(logits)


optima, reached = {}, {}
for alpha in ALPHAS:
    optima[alpha], _ = jax.vmap(lambda e, alpha=alpha: trsft_optimum(e, alpha=alpha))(experts)
    reached[alpha] = jax.jit(jax.vmap(lambda e, alpha=alpha: descend(e, alpha)))(experts)
    distances = 0.5 * jnp.abs(optima[alpha] - reached[alpha]).sum(-1)
    pruned = jnp.where(optima[alpha] > 0, 0, experts).sum(-1)
    print(
        f"alpha {alpha:4}: {len(experts)} experts, pruned mass {pruned.min():5.1%} to {pruned.max():5.1%}, "
        f"total variation between reached and predicted at most {distances.max():.1e}"
    )

# %%
chosen = 10
order = jnp.argsort(-experts[chosen])
figure, grid = plt.subplots(1, 3, figsize=(11, 4), sharex=True, sharey=True, layout="constrained")
for axes, alpha in zip(grid, ALPHAS, strict=True):
    ranks = np.arange(1, 13)
    axes.bar(ranks, experts[chosen][order], color=GREY, label="expert")
    axes.plot(ranks, optima[alpha][chosen][order], "_", ms=15, mew=3, color=BLUE, label="predicted")
    axes.plot(ranks, reached[alpha][chosen][order], "o", ms=6, color=RED, label="reached by Adam")
    num_kept = int((optima[alpha][chosen] > 0).sum())
    axes.set(
        title=f"alpha = {alpha}: {num_kept} of 12 classes kept",
        xticks=ranks,
        xlabel="class, by the expert's probability",
    )
handles, labels = grid[0].get_legend_handles_labels()
figure.legend(handles, labels, loc="outside lower center", ncols=3)
grid[0].set_ylabel("probability")
figure.suptitle(
    "Training reaches the optimum of Proposition 1: weak modes pruned, the rest scaled up"
)
plt.show()

# %% [markdown]
# ## Findings
#
# - Forward KL uses one component for two modes and leaves 10.25% of the student's probability mass in the void. TrSFT
#   with alpha = 0.01 drops the weakest mode, as reverse KL does (the components have weights of 0.591 and 0.409,
#   compared with 0.588 and 0.412), and leaves only 0.16% of the mass in the void. TrSFT needs only samples from the
#   expert, whereas reverse KL needs the expert's probabilities.
# - The choice of alpha matters. With alpha = 0.003, the result is practically the same as with forward KL. With alpha
#   = 0.1, which is above the expert's largest bin probability of 0.081, one component takes 99.6% of the mass and is
#   narrower than the expert's mode (the standard deviation is 0.39 instead of 0.6).
# - For the distributions over 12 classes, training reached the optimum of Proposition 1 for all 24 experts and all
#   values of alpha: the total variation distance was below 1e-5. Up to 64.2% of an expert's probability mass was
#   pruned.
