"""Builds the jitted, sharded train step `(TrainState, TrainBatch, coefficients) -> (TrainState, metrics, trace)`.

Scheduled scalars (the learning rate, the bound on the gradient norm, and the weights of the loss terms) are traced
inputs, so changing them causes no recompilation; see `Method.coefficients`. The denominator of every loss term is
computed over the whole batch before the first micro-batch runs, and the gradients of micro-batches are summed.
Therefore, the update does not depend on how the batch is split into micro-batches.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from trapo_jax.distributed.sharding import batch_sharding, on_mesh, replicated
from trapo_jax.losses import (
    constant_mean_weights,
    constant_sum_weights,
    linear_token_logprobs,
    segment_mean_weights,
    token_mean_weights,
)
from trapo_jax.methods import Method, Normalizer, Term, TokenInputs
from trapo_jax.models import (
    DecoderConfig,
    apply_decoder,
    join_trained,
    split_trained,
    unembedding,
)
from trapo_jax.training.diagnostics import (
    Metrics,
    completion_statistics,
    expert_statistics,
    step_metrics,
)
from trapo_jax.training.state import TrainState
from trapo_jax.types import TokenKind, TrainBatch

# float32 [] scalars: the weight of each term, keyed by name, plus "learning_rate" and "max_grad_norm".
Coefficients = Mapping[str, Any]
TrainStep = Callable[
    [TrainState, TrainBatch, Coefficients], tuple[TrainState, Metrics, "TokenTrace"]
]


class TokenTrace(NamedTuple):
    """Values that an update computes for each trained token: float32 `[M, B, T]`, like the batch; 0 elsewhere."""

    logprobs: Any
    gradient_weights: Any  # |d objective / d logprob|, over all loss terms


@dataclasses.dataclass(frozen=True)
class TokenScorer:
    """Computes log-probabilities and entropies of the trained tokens of a micro-batch.

    Attributes:
      decoder: the decoder's shape.
      temperature: temperature of the distribution that is sampled from and trained, > 0.
      chunk_size: number of tokens whose logits are materialized at once, over all devices.
    """

    decoder: DecoderConfig
    temperature: float
    chunk_size: int

    def __call__(self, params: Any, batch: TrainBatch) -> tuple[jax.Array, jax.Array]:
        """Returns the log-probability and entropy at each trained token, float32 `[B, T - 1]`; 0 elsewhere."""
        hidden, _ = apply_decoder(
            self.decoder,
            params,
            batch.token_ids,
            batch.positions,
            batch.segment_ids,
            batch.context_ids,
        )
        kinds = batch.kinds[:, 1:]
        return linear_token_logprobs(
            hidden[:, :-1],
            unembedding(params).astype(self.decoder.dtype),
            batch.token_ids[:, 1:],
            chunk_size=self.chunk_size,
            temperature=self.temperature,
            with_entropy=True,
            where=(kinds == TokenKind.COMPLETION) | (kinds == TokenKind.EXPERT_TRAINED),
        )


def make_train_step(
    scorer: TokenScorer,
    method: Method,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    shardings: TrainState,
    *,
    max_completion_length: int,
    ratio_to: Literal["trainer", "sampler"] = "trainer",
) -> TrainStep:
    """Builds the jitted train step; the state is donated.

    Args:
      scorer: computes token log-probabilities.
      method: the method whose loss terms form the objective.
      optimizer: an optax transformation for a learning rate of 1.
      mesh: the mesh that the step runs on.
      shardings: shardings of the state, from `state_shardings`.
      max_completion_length: L in the constant normalizers, in tokens.
      ratio_to: the old policy of completion tokens. "trainer" is the policy before the batch's first update.
        "sampler" is the (possibly older) policy that sampled each token, with the sampler's log-probabilities.
    """
    objective = partial(_objective, scorer, method, ratio_to)

    def train_step(
        state: TrainState, batch: TrainBatch, coefficients: Coefficients
    ) -> tuple[TrainState, Metrics, TokenTrace]:
        weights = term_weights(batch, method.terms, max_completion_length)
        trained, kept = split_trained(state.params)
        loss = partial(objective, coefficients=coefficients, num_segments=_num_segments(batch))
        grads, sums, maxima, trace = _accumulate(loss, trained, kept, batch, weights)
        grad_norm = optax.tree.norm(grads)
        applied = jnp.isfinite(grad_norm) & jnp.isfinite(sums["loss/total"])
        applied &= grad_norm <= method.max_applied_grad_norm
        grads = clip_by_norm(grads, grad_norm, coefficients["max_grad_norm"])
        updates, opt_state = optimizer.update(grads, state.opt_state, trained)
        updates = jax.tree.map(lambda x: coefficients["learning_rate"] * x, updates)
        keep = lambda new, old: jnp.where(applied, new, old)
        new_trained = jax.tree.map(keep, optax.apply_updates(trained, updates), trained)
        new_state = state._replace(
            params=join_trained(new_trained, kept),
            opt_state=jax.tree.map(keep, opt_state, state.opt_state),
            step=state.step + 1,
            num_skipped_in_a_row=jnp.where(applied, 0, state.num_skipped_in_a_row + 1),
        )
        metrics = step_metrics(sums, maxima, batch, grad_norm=grad_norm, applied=applied)
        return new_state, metrics, trace

    return jax.jit(
        on_mesh(train_step, mesh),
        in_shardings=(shardings, _batch_shardings(mesh), replicated(mesh)),
        out_shardings=(shardings, replicated(mesh), batch_sharding(mesh)),
        donate_argnums=0,
    )


def clip_by_norm(grads: Any, norm: jax.Array, max_norm: jax.Array) -> Any:
    """Scales gradients down to a global norm of `max_norm` if their norm is larger."""
    scale = jnp.where(norm > max_norm, max_norm / norm, 1.0)
    return jax.tree.map(lambda x: x * scale, grads)


def make_batch_logprobs(
    scorer: TokenScorer, mesh: Mesh, param_shardings: Any
) -> Callable[[Any, TrainBatch], jax.Array]:
    """Builds a jitted function `(params, batch) -> logprobs` for `TrainBatch.old_logprobs` and `ref_logprobs`.

    The function returns the log-probability of every trained token, float32 `[M, B, T]`; 0 elsewhere.
    """

    def batch_logprobs(params: Any, batch: TrainBatch) -> jax.Array:
        def write(index, logprobs):
            values, _ = scorer(params, _micro_batch(batch, index))
            return jax.lax.dynamic_update_index_in_dim(logprobs, _at_tokens(values), index, axis=0)

        zeros = jnp.zeros(batch.kinds.shape, jnp.float32)
        return jax.lax.fori_loop(0, batch.num_micro_batches, write, zeros)

    return jax.jit(
        on_mesh(batch_logprobs, mesh),
        in_shardings=(param_shardings, _batch_shardings(mesh)),
        out_shardings=batch_sharding(mesh),
    )


def place_batch(batch: TrainBatch, mesh: Mesh) -> TrainBatch:
    """Places a batch on the mesh. Every process has the whole batch; each device receives its own rows."""

    def place(x, sharding):
        return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

    return TrainBatch(
        *(
            None if x is None else place(np.asarray(x), sharding)
            for x, sharding in zip(batch, _batch_shardings(mesh), strict=True)
        )
    )


def _objective(
    scorer: TokenScorer,
    method: Method,
    ratio_to: Literal["trainer", "sampler"],
    trained: Any,
    kept: Any,
    batch: TrainBatch,
    weights: Mapping[str, jax.Array],
    *,
    coefficients: Coefficients,
    num_segments: int,
) -> tuple[Any, tuple[Metrics, Metrics, TokenTrace]]:
    """Returns a micro-batch's contribution to the objective, the sums and maxima for the metrics, and the trace."""
    kinds = batch.kinds[:, 1:]
    logprobs, entropies = scorer(join_trained(trained, kept), batch)
    current = jax.lax.stop_gradient(logprobs)
    old = current if batch.old_logprobs is None else batch.old_logprobs[:, 1:]
    completion = kinds == TokenKind.COMPLETION
    inputs = TokenInputs(
        logprobs,
        old if ratio_to == "trainer" else jnp.where(completion, batch.sampler_logprobs[:, 1:], old),
        None if batch.ref_logprobs is None else batch.ref_logprobs[:, 1:],
        batch.advantages[:, 1:],
        jnp.zeros_like(kinds, bool),
        entropies,
        batch.segment_ids[:, 1:],
        num_segments,
    )

    def term_losses(logprobs):
        losses: Metrics = {}
        for term in method.terms:
            term_inputs = inputs._replace(logprobs=logprobs, where=_is_any(kinds, term.kinds))
            values = coefficients[term.name] * term.loss(term_inputs) * weights[term.name]
            losses[term.name] = jnp.sum(values)
        return losses

    losses = term_losses(logprobs)
    total_of = lambda logprobs: sum(term_losses(logprobs).values())
    abs_logprob_grad = jnp.abs(jax.grad(total_of)(current))
    entropy = jnp.sum(entropies * weights["entropy"])
    total: Any = sum(losses.values())
    completion_sums, maxima = completion_statistics(
        inputs._replace(logprobs=current), old, batch, method
    )
    sums: Metrics = {
        **{f"loss/{name}": value for name, value in losses.items()},
        "loss/total": total,
        "policy/entropy": entropy,
        **completion_sums,
        **expert_statistics(jnp.exp(current), abs_logprob_grad, kinds, method.alpha),
    }
    trace = TokenTrace(_at_tokens(current), _at_tokens(abs_logprob_grad))
    return total, (sums, maxima, trace)


def _accumulate(
    loss: Callable[..., Any], trained: Any, kept: Any, batch: TrainBatch, weights: Any
) -> tuple[Any, Any, Any, TokenTrace]:
    """Returns gradients and statistics accumulated over the micro-batches, and the trace of the whole batch."""

    def add_micro_batch(index, carry):
        grads, sums, maxima, trace = carry
        (_, new), new_grads = jax.value_and_grad(loss, has_aux=True)(
            trained, kept, *_micro_batch((batch, weights), index)
        )
        new_sums, new_maxima, new_trace = new
        grads, sums = jax.tree.map(jnp.add, (grads, sums), (new_grads, new_sums))
        maxima = jax.tree.map(jnp.maximum, maxima, new_maxima)
        write = lambda all, one: jax.lax.dynamic_update_index_in_dim(all, one, index, axis=0)
        return grads, sums, maxima, jax.tree.map(write, trace, new_trace)

    first = _micro_batch((batch, weights), 0)
    *shapes, _ = jax.eval_shape(loss, trained, kept, *first)[1]
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    empty_trace = TokenTrace(*(jnp.zeros(batch.kinds.shape, jnp.float32) for _ in range(2)))
    initial = (jax.tree.map(jnp.zeros_like, trained), *zeros, empty_trace)
    # The number of iterations is traced, so a batch that fills fewer micro-batches causes no recompilation.
    return jax.lax.fori_loop(0, batch.num_micro_batches, add_micro_batch, initial)


def _at_tokens(x: jax.Array) -> jax.Array:
    """Aligns values of predicted tokens, `[B, T - 1]`, with all tokens, `[B, T]`; the first token gets 0."""
    return jnp.pad(x, ((0, 0), (1, 0)))


def _batch_shardings(mesh: Mesh) -> TrainBatch:
    rows, everywhere = batch_sharding(mesh), replicated(mesh)
    return TrainBatch(*(rows,) * 6, *(everywhere,) * 2, *(rows,) * 3)


def _micro_batch(tree: Any, index: jax.Array | int) -> Any:
    """Returns micro-batch `index` of arrays `[M, ...]`; scalars are unchanged."""
    one = lambda x: jax.lax.dynamic_index_in_dim(x, index, keepdims=False)
    return jax.tree.map(lambda x: one(x) if x.ndim else x, tree)


def term_weights(
    batch: TrainBatch, terms: Sequence[Term], max_completion_length: int
) -> dict[str, jax.Array]:
    """Returns, for each term, the weight of every predicted token, `[M, B, T - 1]`; 0 for tokens of other kinds."""
    kinds = batch.kinds[..., 1:]

    def weights(normalizer: Normalizer, mask: jax.Array) -> jax.Array:
        if normalizer == "token_mean":
            return token_mean_weights(mask)
        if normalizer == "sequence_mean":
            segment_ids = batch.segment_ids[..., 1:]
            return segment_mean_weights(mask, segment_ids, num_segments=_num_segments(batch))
        if normalizer == "constant_sum":
            return constant_sum_weights(mask, length=max_completion_length)
        return constant_mean_weights(
            mask, length=max_completion_length, num_sequences=batch.num_rollouts
        )

    by_term = {term.name: weights(term.normalizer, _is_any(kinds, term.kinds)) for term in terms}
    return {**by_term, "entropy": token_mean_weights(kinds == TokenKind.COMPLETION)}


def _is_any(kinds: jax.Array, wanted: Sequence[TokenKind]) -> jax.Array:
    """Returns a mask of the tokens whose kind is in `wanted`."""
    return jnp.isin(kinds, jnp.array(wanted))


def _num_segments(batch: TrainBatch) -> int:
    """Returns an exclusive upper bound on segment ids; see `packing.build_batch`."""
    num_micro_batches, num_rows, _ = batch.kinds.shape
    return 1 + 2 * num_micro_batches * num_rows
