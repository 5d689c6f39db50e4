"""Samples tokens with random numbers that depend only on the request and the position."""

import jax
import jax.numpy as jnp

BLOCK_LEN = 256  # number of vocabulary entries in a block of the two-level CDF


def request_key(seed: jax.Array, step: jax.Array, problem_key: jax.Array, sample_index: jax.Array):
    """Returns the random key of a rollout: fold_in(run seed, step, problem, sample index)."""
    key = jax.random.key(seed)
    for number in (step, problem_key, sample_index):
        key = jax.random.fold_in(key, number)
    return key


def draw_tokens(
    keys_S: jax.Array,
    positions_S: jax.Array,
    logits_VS: jax.Array,
    temperatures_S: jax.Array,
    top_p_and_k_S: tuple[jax.Array, jax.Array] | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Draws one token per row from `softmax(logits / temperature)`.

    Temperature 0 selects the most likely token; its log-probability is reported for temperature 1.

    The CDF is inverted in two levels: a block of the vocabulary is chosen by its probability mass, then a token within
    the block. This needs a single uniform random number per row, no sorting, and no Gumbel noise for each of the V
    tokens. Since sums have at most `BLOCK_LEN` or V / BLOCK_LEN terms, float32 rounding errors stay far below the
    smallest relevant probability.
    The vocabulary is the first axis, so sums over it process many rows at once.

    Args:
      keys_S: random keys; the position is folded into each key.
      positions_S: int32, the position of the drawn token.
      logits_VS: float32.
      temperatures_S: float32, >= 0.
      top_p_and_k_S: see `truncate`. If None, the distribution is not truncated, and no sorting is needed.

    Returns:
      The tokens, int32 `[S]`, and their log-probabilities under the distribution before truncation, float32 `[S]`.
    """
    greedy_S = temperatures_S == 0
    logits_VS = logits_VS / jnp.where(greedy_S, 1.0, temperatures_S)
    highest_S = jnp.max(logits_VS, axis=0)
    weights_VS = jnp.exp(logits_VS - highest_S)
    uniform_S = jax.vmap(
        lambda key, position: jax.random.uniform(jax.random.fold_in(key, position))
    )(keys_S, positions_S)
    if top_p_and_k_S is None:
        kept_VS = weights_VS
    else:
        kept_VS = jnp.exp(truncate(logits_VS, *top_p_and_k_S) - highest_S)
    drawn_S = inverse_cdf(kept_VS, uniform_S)
    token_S = jax.lax.cond(
        jnp.any(greedy_S),
        lambda: jnp.where(greedy_S, jnp.argmax(logits_VS, axis=0).astype(jnp.int32), drawn_S),
        lambda: drawn_S,
    )
    chosen_S = jnp.take_along_axis(logits_VS, token_S[None], axis=0)[0]
    masses = jnp.sum(_in_blocks(weights_VS), axis=1)
    total_S = jnp.cumsum(masses, axis=0)[-1]  # summed in the same order as in `inverse_cdf`
    return token_S, chosen_S - highest_S - jnp.log(total_S)


def truncate(logits_VS: jax.Array, top_p_S: jax.Array, top_k_S: jax.Array) -> jax.Array:
    """Sets the logits of unlikely tokens to -inf.

    Of the `top_k` most likely tokens, keeps the smallest set whose probabilities, normalized over these `top_k` tokens,
    sum to at least `top_p`. Tokens that are as likely as the least likely token in this set are kept as well.

    Args:
      logits_VS: float32.
      top_p_S: float32, in (0, 1].
      top_k_S: int32, >= 0; 0 selects the whole vocabulary.
    """
    descending = jnp.sort(logits_VS, axis=0, descending=True)
    vocab_size = len(logits_VS)
    among_k = jnp.arange(vocab_size)[:, None] < jnp.where(top_k_S == 0, vocab_size, top_k_S)
    probs = jax.nn.softmax(jnp.where(among_k, descending, -jnp.inf), axis=0)
    before = jnp.cumsum(probs, axis=0) - probs
    kept = among_k & (before < top_p_S)
    lowest_S = jnp.min(jnp.where(kept, descending, jnp.inf), axis=0)
    return jnp.where(logits_VS >= lowest_S, logits_VS, -jnp.inf)


def inverse_cdf(weights_VS: jax.Array, uniform_S: jax.Array) -> jax.Array:
    """Returns the index at which the cumulative sum of weights exceeds a fraction of their total, int32 `[S]`.

    The weight at this index is never 0.

    Args:
      weights_VS: float32, >= 0; need not be normalized.
      uniform_S: float32, the fraction, in [0, 1).
    """
    blocks = _in_blocks(weights_VS)
    _, block_len, num_rows = blocks.shape
    masses = jnp.sum(blocks, axis=1)
    block_cdf = jnp.cumsum(masses, axis=0)
    target_S = uniform_S * block_cdf[-1]
    block_S = _first_above(masses, block_cdf, target_S)
    row_S = jnp.arange(num_rows)
    before_S = block_cdf[block_S, row_S] - masses[block_S, row_S]
    chosen = blocks[block_S, :, row_S].T
    within_S = _first_above(chosen, jnp.cumsum(chosen, axis=0), target_S - before_S)
    return block_S * block_len + within_S


def _in_blocks(weights_VS: jax.Array) -> jax.Array:
    """Reshapes to `[N, C, S]`, with N blocks of C tokens; the last block is padded with zeros."""
    vocab_size, num_rows = weights_VS.shape
    block_len = min(BLOCK_LEN, vocab_size)
    num_blocks = -(-vocab_size // block_len)
    padded = jnp.pad(weights_VS, ((0, num_blocks * block_len - vocab_size), (0, 0)))
    return padded.reshape(num_blocks, block_len, num_rows)


def _first_above(masses: jax.Array, cdf: jax.Array, target: jax.Array) -> jax.Array:
    """Returns the first index with positive mass and `cdf > target`, int32 `[S]`.

    If rounding leaves no such index, returns the last index with positive mass. The mass is also checked because
    parallel prefix sums need not be monotone.
    """
    size = len(masses)
    positive = masses > 0
    last_positive = size - 1 - jnp.argmax(positive[::-1], axis=0)
    above = (cdf > target) | (jnp.arange(size)[:, None] == last_positive)
    return jnp.argmax(positive & above, axis=0).astype(jnp.int32)
