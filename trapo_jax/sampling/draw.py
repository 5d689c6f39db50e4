"""Drawing one token per row, from numbers that depend on nothing but the request and the position."""

import jax
import jax.numpy as jnp

BLOCK_LEN = 256


def request_key(seed: jax.Array, step: jax.Array, problem_key: jax.Array, sample_index: jax.Array):
    """fold_in(run seed, step, problem, sample index): one rollout's random key."""
    key = jax.random.key(seed)
    for number in (step, problem_key, sample_index):
        key = jax.random.fold_in(key, number)
    return key


def draw_tokens(
    keys_S: jax.Array,
    positions_S: jax.Array,
    logits_SV: jax.Array,
    temperatures_S: jax.Array,
    top_p_and_k_S: tuple[jax.Array, jax.Array] | None = None,
) -> tuple[jax.Array, jax.Array]:
    """One token a row from `softmax(logits / temperature)`, and its log-probability there.

    Temperature 0 takes the most likely token; its log-probability is that at temperature 1.

    A two-level inverse CDF: a block of the vocabulary by its mass, then a token within it. One
    uniform number a row, no sort, no Gumbel noise over V; and sums of at most `BLOCK_LEN` and
    V / BLOCK_LEN terms keep float32's rounding far below the smallest probability that matters.

    Args:
      keys_S: random keys, one a row; the position is folded in here.
      positions_S: int32, the position the drawn token will have.
      logits_SV: float32.
      temperatures_S: float32, >= 0.
      top_p_and_k_S: see `truncate`; None for the whole distribution, which needs no sort.

    Returns:
      int32 `[S]` and float32 `[S]`; the log-probability is that of the whole distribution.
    """
    greedy_S = temperatures_S == 0
    logits_SV = logits_SV / jnp.where(greedy_S, 1.0, temperatures_S)[:, None]
    logprobs_SV = jax.nn.log_softmax(logits_SV, axis=-1)
    uniform_S = jax.vmap(
        lambda key, position: jax.random.uniform(jax.random.fold_in(key, position))
    )(keys_S, positions_S)
    if top_p_and_k_S is None:
        probs_SV = jnp.exp(logprobs_SV)
    else:
        probs_SV = jnp.exp(truncate(logprobs_SV, *top_p_and_k_S))
    drawn_S = inverse_cdf(probs_SV, uniform_S)
    token_S = jnp.where(greedy_S, jnp.argmax(logits_SV, axis=-1), drawn_S).astype(jnp.int32)
    return token_S, jnp.take_along_axis(logprobs_SV, token_S[:, None], axis=-1)[:, 0]


def truncate(logits_SV: jax.Array, top_p_S: jax.Array, top_k_S: jax.Array) -> jax.Array:
    """The logits, -inf off the most likely tokens: the `top_k` first (0: all), and of these as many as it takes
    for their probabilities to reach `top_p`. Tokens as likely as the last one stay."""
    descending = jnp.sort(logits_SV, axis=-1, descending=True)
    vocab_size = logits_SV.shape[-1]
    among_k = jnp.arange(vocab_size) < jnp.where(top_k_S == 0, vocab_size, top_k_S)[:, None]
    probs = jax.nn.softmax(jnp.where(among_k, descending, -jnp.inf), axis=-1)
    before = jnp.cumsum(probs, axis=-1) - probs
    kept = among_k & (before < top_p_S[:, None])
    lowest = jnp.min(jnp.where(kept, descending, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(logits_SV >= lowest, logits_SV, -jnp.inf)


def inverse_cdf(probs_SV: jax.Array, uniform_S: jax.Array) -> jax.Array:
    """The index at which the cumulative sum of `probs` passes `uniform` in [0, 1); int32 `[S]`.

    Never an index of probability 0.
    """
    num_rows, vocab_size = probs_SV.shape
    block_len = min(BLOCK_LEN, vocab_size)
    num_blocks = -(-vocab_size // block_len)
    padding = num_blocks * block_len - vocab_size
    blocks = jnp.pad(probs_SV, ((0, 0), (0, padding))).reshape(num_rows, num_blocks, block_len)
    masses = jnp.sum(blocks, axis=-1)
    block_cdf = jnp.cumsum(masses, axis=-1)
    target_S = uniform_S * block_cdf[:, -1]
    block_S = _first_above(masses, block_cdf, target_S)
    row_S = jnp.arange(num_rows)
    before_S = block_cdf[row_S, block_S] - masses[row_S, block_S]
    chosen = blocks[row_S, block_S]
    within_S = _first_above(chosen, jnp.cumsum(chosen, axis=-1), target_S - before_S)
    return block_S * block_len + within_S


def _first_above(masses: jax.Array, cdf: jax.Array, target: jax.Array) -> jax.Array:
    """First index of positive mass with `cdf > target`; the last of positive mass if rounding
    leaves none. (Parallel sums need not be monotone: mass is asked for explicitly.)"""
    size = masses.shape[-1]
    positive = masses > 0
    last_positive = size - 1 - jnp.argmax(positive[:, ::-1], axis=-1)
    above = (cdf > target[:, None]) | (jnp.arange(size) == last_positive[:, None])
    return jnp.argmax(positive & above, axis=-1)
