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
# # How TrSFT differs from cross-entropy
#
# TrSFT (TRAPO, arXiv 2512.17636, Eq. 3) is cross-entropy on the tokens of an expert, with the gradient scaled by
# `min(1, p / alpha)`, where `p` is the policy's probability of the expert's token. This notebook plots the loss and
# the gradient scale of TrSFT and related losses. It then shows where the tokens of real expert solutions lie on this
# curve for the small model that ships with `trapo_jax`, and which tokens contribute most of the gradient.

# %%
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import trapo_jax
from trapo_jax.data import card_shuffles_splits, encode_examples
from trapo_jax.losses import (
    attenuated_cross_entropy_from_logprobs,
    probability_attenuation,
    shaped_policy_gradient_loss,
    token_logprobs,
    trsft_loss_from_logprobs,
    unit_attenuation,
    variance_attenuation,
)
from trapo_jax.models import apply_decoder, load_params, load_tokenizer, read_config, unembedding

warnings.filterwarnings("ignore", message="IProgress")  # progress bars need not be interactive

# The palette of Okabe and Ito, whose colors can be told apart with any kind of color vision.
BLACK, ORANGE, SKY, GREEN = "#000000", "#E69F00", "#56B4E9", "#009E73"
BLUE, RED, PURPLE = "#0072B2", "#D55E00", "#CC79A7"
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
# ## The losses
#
# Each loss is a function of `log p` and comes from `trapo_jax.losses`. LUFFY's loss is a policy-gradient loss. It is
# plotted for an advantage of 1 and shifted so that, like the other losses, it is 0 at p = 1.


# %%
def attenuated(attenuation):
    return lambda x: attenuated_cross_entropy_from_logprobs(x, attenuation=attenuation)


def luffy(logprobs):
    loss = lambda x: shaped_policy_gradient_loss(x, 1.0, gamma=0.1)
    return loss(logprobs) - loss(jnp.zeros(()))


# name -> (loss of log p, color, line style)
LOSSES = {
    "SFT: cross-entropy": (attenuated(unit_attenuation()), BLACK, "-"),
    "TrSFT, alpha = 0.03": (lambda x: trsft_loss_from_logprobs(x, alpha=0.03), SKY, "-"),
    "TrSFT, alpha = 0.1": (lambda x: trsft_loss_from_logprobs(x, alpha=0.1), BLUE, "-"),
    "TrSFT, alpha = 0.3": (lambda x: trsft_loss_from_logprobs(x, alpha=0.3), PURPLE, "-"),
    "DFT: 1 - p": (attenuated(probability_attenuation()), GREEN, "--"),
    "CHORD-phi: weight p (1 - p)": (attenuated(variance_attenuation()), ORANGE, "--"),
    "LUFFY, gamma = 0.1": (luffy, RED, ":"),
}


def gradient_scale(loss, logprobs):
    """Returns -d loss / d log p, the factor by which the cross-entropy gradient is multiplied."""
    return -jax.grad(lambda x: loss(x).sum())(logprobs)


p = jnp.geomspace(1e-3, 1.0, 601)

# %%
figure, axes = plt.subplots()
for name, (loss, color, style) in LOSSES.items():
    axes.plot(p, loss(jnp.log(p)), color=color, linestyle=style, label=name)
axes.set(
    xscale="log",
    xlabel="probability p of the expert's token (log scale)",
    ylabel="loss (nats; LUFFY: advantage)",
    title="TrSFT follows the cross-entropy down to alpha, then levels off",
)
axes.legend()
plt.show()

# %%
figure, axes = plt.subplots()
for name, (loss, color, style) in LOSSES.items():
    axes.plot(p, gradient_scale(loss, jnp.log(p)), color=color, linestyle=style, label=name)
axes.set(
    xscale="log",
    xlabel="probability p of the expert's token (log scale)",
    ylabel="gradient relative to cross-entropy",
    title="Only TrSFT keeps the whole gradient above alpha and lets go below",
)
axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
plt.show()

# %% [markdown]
# ## The tokens of real expert solutions
#
# The built-in model has 0.35M parameters and solves card shuffles with up to three operations. The expert solves
# three to five operations, but sometimes adds a filler word (`hm,`) or skips a step by applying two operations at
# once. `p` is the model's probability of a token of the expert solution, given the prompt and the preceding tokens of
# the solution. In the figure that shows a single solution, the number after a token is the token's position in the
# solution.

# %%
FOLDER = Path(trapo_jax.__file__).parent / "assets" / "card_shuffles_tiny"
tokenizer, config = load_tokenizer(FOLDER), read_config(FOLDER)
params = jax.device_put(load_params(FOLDER, config))
examples = card_shuffles_splits(seed=0, num_train=256, num_validation=1, num_test=1)["train"]
problems, _ = encode_examples(examples, tokenizer, max_prompt_length=16)

row_len = max(len(x.prompt_ids) + len(x.experts[0].token_ids) for x in problems)
token_ids = np.zeros((len(problems), row_len), np.int32)
is_text = np.zeros(token_ids.shape, bool)
is_expert = np.zeros(token_ids.shape, bool)
for row, problem in enumerate(problems):
    ids = problem.prompt_ids + problem.experts[0].token_ids
    token_ids[row, : len(ids)] = ids
    is_text[row, : len(ids)] = True
    is_expert[row, len(problem.prompt_ids) : len(ids)] = True


@jax.jit
def expert_logits(params, token_ids, is_text):
    """Returns the logits that predict the tokens 1, 2, ... of each row."""
    positions = jnp.broadcast_to(jnp.arange(row_len), token_ids.shape)
    hidden, _ = apply_decoder(config, params, token_ids, positions, is_text.astype(jnp.int32))
    return hidden[:, :-1] @ unembedding(params)


logits = expert_logits(params, token_ids, is_text)
labels, where = token_ids[:, 1:], is_expert[:, 1:]
logprobs = token_logprobs(logits, labels, where=where)
expert_probs = np.exp(np.asarray(logprobs))[where]
print(f"{len(problems)} solutions, {where.sum()} expert tokens")
for alpha in (0.03, 0.1, 0.3):
    print(f"p < {alpha:<4}: {(expert_probs < alpha).mean():6.1%} of the tokens")

# %%
ALPHA = 0.1
row = next(i for i, x in enumerate(examples) if "hm," in x.solutions[0])
tokens = [tokenizer.decode([i]) for i in labels[row][where[row]]]
row_probs = np.exp(np.asarray(logprobs[row]))[where[row]]
row_weights = np.asarray(
    gradient_scale(LOSSES["TrSFT, alpha = 0.1"][0], jnp.log(jnp.asarray(row_probs)))
)
outside = row_probs < ALPHA

figure, axes = plt.subplots()
lowest = 10.0 ** np.floor(np.log10(row_probs.min()) - 0.1)
curve = jnp.geomspace(lowest, 1.0, 601)
weights = gradient_scale(LOSSES["TrSFT, alpha = 0.1"][0], jnp.log(curve))
axes.plot(curve, weights, color=BLUE, label="TrSFT, alpha = 0.1")
axes.axvspan(lowest, ALPHA, color=ORANGE, alpha=0.12, label="outside the trust region (p < alpha)")
axes.plot(
    row_probs[~outside],
    row_weights[~outside],
    "o",
    color=GREEN,
    alpha=0.6,
    label=f"{(~outside).sum()} tokens inside",
)
axes.plot(
    row_probs[outside],
    row_weights[outside],
    "D",
    color=RED,
    label=f"{outside.sum()} tokens outside",
)
outside_by_p = sorted(np.flatnonzero(outside), key=lambda index: row_probs[index])
for place, index in enumerate(outside_by_p):
    axes.annotate(
        f"{tokens[index]!r} ({index + 1}.)",
        (row_probs[index], row_weights[index]),
        # Labels are on three levels, so that neighboring ones do not overlap.
        xytext=(0, 14 + 16 * (place % 3)),
        textcoords="offset points",
        ha="center",
        color=RED,
        arrowprops={"arrowstyle": "-", "color": RED, "alpha": 0.5},
    )
    print(f"token {index + 1:2} {tokens[index]!r}: p = {row_probs[index]:.1e}")
axes.set(
    xscale="log",
    xlim=(lowest, 1.5),
    ylim=(-0.04, 1.12),
    xlabel="the model's probability p of the expert's token (log scale)",
    ylabel="gradient relative to cross-entropy",
    title=f"One solution on the curve: {''.join(tokens[:-1])}",
)
axes.legend(loc="upper left")
plt.show()

# %%
figure, axes = plt.subplots()
bins = np.geomspace(1e-6, 1, 49)
clipped = np.clip(expert_probs, 1e-6, 1)
axes.hist(clipped[clipped < ALPHA], bins, color=RED, label="outside (p < 0.1)")
axes.hist(clipped[clipped >= ALPHA], bins, color=GREEN, label="inside (p >= 0.1)")
axes.axvline(ALPHA, color=BLACK, linestyle="--", label="alpha = 0.1")
axes.set(
    xscale="log",
    yscale="log",
    xlabel="the model's probability p of the expert's token (log scale)",
    ylabel="expert tokens per bin (log scale)",
    title="Most expert tokens are near p = 1; a tail lies far outside",
)
axes.legend(loc="upper left")
plt.show()

# %% [markdown]
# ## Which tokens contribute the gradient
#
# For each token, the gradient with respect to the logits has the norm `scale * |onehot - softmax|`. The bars show
# which share of the sum of these norms comes from tokens outside the trust region (`p < 0.1`). This boundary is the
# same for all losses.

# %%
softmax = np.asarray(jax.nn.softmax(logits))[where]
onehot = np.eye(softmax.shape[-1])[labels[where]]
norms = np.linalg.norm(onehot - softmax, axis=-1)
is_outside = expert_probs < ALPHA
shares = {}
for name, (loss, _, _) in LOSSES.items():
    size = np.abs(gradient_scale(loss, jnp.log(jnp.asarray(expert_probs)))) * norms
    shares[name] = size[is_outside].sum() / size.sum()
    print(f"{name:28} {shares[name]:6.1%} of the gradient from outside")
print(f"{'(tokens)':28} {is_outside.mean():6.1%}")

# %%
figure, axes = plt.subplots()
names, values = list(shares), 100 * np.array(list(shares.values()))
axes.barh(names, values, color=RED, label="from tokens outside (p < 0.1)")
axes.barh(names, 100 - values, left=values, color=GREEN, label="from tokens inside")
axes.axvline(
    100 * is_outside.mean(), color=BLACK, linestyle="--", label="share of tokens that are outside"
)
axes.invert_yaxis()
axes.grid(visible=False)
axes.set(
    xlim=(0, 100),
    xlabel="share of the summed gradient norms by logits (%)",
    title="Cross-entropy learns most from the few tokens it finds least likely",
)
axes.legend(loc="upper center", bbox_to_anchor=(0.4, -0.18), ncols=3)
plt.show()

# %% [markdown]
# ## Findings
#
# - Above alpha, TrSFT is equal to cross-entropy, in both its value and its gradient. Below alpha, the loss levels off
#   at `1 - log(alpha)`, and the gradient scale falls to 0 in proportion to p. DFT and CHORD-phi also reduce the
#   gradient of unlikely tokens, but they reduce the gradient of likely tokens as well. The gradient scale of LUFFY is
#   largest at p = gamma and never exceeds a quarter.
# - Of the tokens in the 256 expert solutions, 12.9% are outside the trust region for alpha = 0.1. In the solution
#   shown above, these are the three characters of the filler word at the start, two of which have a probability below
#   1 in 10,000, and a few other tokens.
# - These 12.9% of the tokens contribute 89.4% of the cross-entropy gradient. With TrSFT, they contribute 50.5% for
#   alpha = 0.03, 30.6% for alpha = 0.1 and 14.6% for alpha = 0.3. They contribute 8.2% with DFT, 20.1% with CHORD-phi
#   and 59.4% with LUFFY.
# - These shares were measured at the start of training, for this model and this expert. They do not yet show which
#   loss leads to the better policy.
