"""One optimiser step: `(TrainState, TrainBatch, coefficients) -> (TrainState, metrics, trace)`, jitted and sharded.

What changes with time, the learning rate and the weights of terms, comes in as data: `Method.coefficients`. The step
counts nothing, and nothing is compiled anew. The weights of every loss term's reduction are taken over the whole batch before the first micro-batch runs, and
gradients of micro-batches are summed. So the update does not depend on how the batch is cut.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
from jax.sharding import Mesh

from trapo_jax.distributed.sharding import (
    batch_sharding,
    on_mesh,
    optimizer_shardings,
    param_shardings,
    replicated,
)
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
from trapo_jax.types import TokenKind, TrainBatch

PROB_BINS = 10  # of the histogram of the expert tokens' probabilities

Metrics = dict[str, jax.Array]
OptimizerName = Literal["adamw", "muon"]
Coefficients = Mapping[str, Any]  # float32 [] each: term name -> weight, and "learning_rate"
TrainStep = Callable[
    ["TrainState", TrainBatch, Coefficients], tuple["TrainState", Metrics, "TokenTrace"]
]


class TrainState(NamedTuple):
    """What an optimiser step changes: global arrays, or in their place their shardings."""

    params: Any  # float32 master weights
    opt_state: Any  # of what is trained: all of them, or adapters alone
    step: Any  # int32 [], optimiser steps done, skipped ones included
    num_skipped_in_a_row: Any  # int32 []
    other_opt_states: Any = ()  # of the method's other optimisers; the step leaves them alone


class TokenTrace(NamedTuple):
    """What the update saw of every trained token, float32 `[M, B, T]` laid out like the batch; 0 elsewhere."""

    logprobs: Any
    gradient_weights: Any  # |d objective / d logprob|, of the loss terms together


def make_learning_rate(
    *,
    learning_rate: float,
    warmup_steps: int,
    num_steps: int,
    decay_start: float,
    final_learning_rate_ratio: float,
) -> Callable[[float, float], float]:
    """Linear warm-up, constant, linear decay, as a function of `(step, position)`.

    `step` counts from the start, 1 at the end of the first step. `position` is how far the run has come, in
    `num_steps`-ths: `step` itself, or more where a budget will end the run sooner.
    """
    begin = max(warmup_steps, round(decay_start * num_steps))
    warmup = jax.jit(optax.linear_schedule(0.0, learning_rate, warmup_steps))
    decay = optax.linear_schedule(
        learning_rate, learning_rate * final_learning_rate_ratio, max(1, num_steps - begin)
    )
    main = jax.jit(optax.join_schedules([optax.constant_schedule(learning_rate), decay], [begin]))

    def rate(step: float, position: float) -> float:
        now: Any = warmup(step) if step < warmup_steps else main(position)
        return float(now)

    return rate


def make_optimizer(
    *,
    adam_b1: float,
    adam_b2: float,
    weight_decay: float,
    max_grad_norm: float,
    name: OptimizerName = "adamw",
    muon_beta: float = 0.95,
) -> optax.GradientTransformation:
    """AdamW or Muon, with clipping, for a learning rate of 1: the step scales its updates. No weight decay on norms and biases.

    Muon orthogonalises the momentum of every matrix of attention (of each head) and MLP, scaled to the root mean
    square of AdamW's updates (arXiv 2502.16982), so that learning rates carry over; AdamW with
    Nesterov momentum updates the rest.
    """
    if name == "muon":  # its own weight decay could not spare the norms
        directions = optax.contrib.muon(
            1.0,
            beta=muon_beta,
            adam_b1=adam_b1,
            adam_b2=adam_b2,
            muon_weight_dimension_numbers=_muon_axes,
            consistent_rms=0.2,
        )
    else:
        directions = optax.chain(optax.scale_by_adam(b1=adam_b1, b2=adam_b2), optax.scale(-1.0))
    return optax.chain(
        optax.clip_by_global_norm(max_grad_norm),
        directions,
        optax.add_decayed_weights(-weight_decay, _is_matrix),
    )


def new_state(
    params: Any, optimizer: optax.GradientTransformation, num_optimizers: int = 1
) -> TrainState:
    """The state before the first step, with so many optimiser states."""
    first, *others = (optimizer.init(split_trained(params)[0]) for _ in range(num_optimizers))
    return TrainState(params, first, jnp.int32(0), jnp.int32(0), tuple(others))


def init_state(
    params: Any, optimizer: optax.GradientTransformation, mesh: Mesh, num_optimizers: int = 1
) -> TrainState:
    """`new_state`, placed on the mesh; arrays that lie there already are taken over."""
    shardings = state_shardings(params, optimizer, mesh, num_optimizers)
    build = lambda params: new_state(params, optimizer, num_optimizers)
    params = jax.device_put(params, shardings.params)
    return jax.jit(build, out_shardings=shardings, donate_argnums=0)(params)


def state_shardings(
    params: Any, optimizer: optax.GradientTransformation, mesh: Mesh, num_optimizers: int = 1
) -> TrainState:
    """Where each leaf of the state lies; `params` may be shapes."""
    for_params = param_shardings(params, mesh)
    trained, for_trained = (split_trained(tree)[0] for tree in (params, for_params))
    for_optimizer = optimizer_shardings(optimizer, trained, for_trained, mesh)
    everywhere = replicated(mesh)
    others = (for_optimizer,) * (num_optimizers - 1)
    return TrainState(for_params, for_optimizer, everywhere, everywhere, others)


def swap_optimizer(state: TrainState, index: int) -> TrainState:
    """Exchanges the optimiser state in use (0) with another; the same again puts it back."""
    if index == 0:
        return state
    others = list(state.other_opt_states)
    mine, others[index - 1] = others[index - 1], state.opt_state
    return state._replace(opt_state=mine, other_opt_states=tuple(others))


def make_train_step(
    config: DecoderConfig,
    method: Method,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    shardings: TrainState,
    *,
    temperature: float,
    max_completion_length: int,
    chunk_size: int,
    ratio_to: Literal["trainer", "sampler"] = "trainer",
) -> TrainStep:
    """Builds the jitted step; the state is donated.

    Args:
      config: the decoder's shape.
      method: its terms are the objective.
      optimizer: an optax transformation, for a learning rate of 1.
      mesh: where the step runs.
      shardings: of the state, from `state_shardings`.
      temperature: of the distribution that was sampled from and is trained.
      max_completion_length: L of the constant normalisers, in tokens.
      chunk_size: tokens whose logits are held at once, over all devices.
      ratio_to: the old policy of own tokens. "trainer": the one before the batch's first update; "sampler": the one
        that each was drawn from, as the sampler had its probability, where that may be an older one.
    """

    def objective(trained, kept, batch: TrainBatch, weights, *, coefficients, num_segments):
        """A micro-batch's share of the objective; sums and maxima for the metrics; the trace."""
        params = join_trained(trained, kept)
        kinds = batch.kinds[:, 1:]
        logprobs, entropies = _score_tokens(config, params, batch, temperature, chunk_size)
        now = jax.lax.stop_gradient(logprobs)
        old = now if batch.old_logprobs is None else batch.old_logprobs[:, 1:]
        own = kinds == TokenKind.COMPLETION
        inputs = TokenInputs(
            logprobs,
            old if ratio_to == "trainer" else jnp.where(own, batch.sampler_logprobs[:, 1:], old),
            None if batch.ref_logprobs is None else batch.ref_logprobs[:, 1:],
            batch.advantages[:, 1:],
            jnp.zeros_like(kinds, bool),
            entropies,
            batch.segment_ids[:, 1:],
            num_segments,
        )

        def term_losses(logprobs):
            of_term = {}
            for term in method.terms:
                seen = inputs._replace(logprobs=logprobs, where=kinds == term.kind)
                values = coefficients[term.name] * term.loss(seen) * weights[term.name]
                of_term[term.name] = jnp.sum(values)
            return of_term

        losses = term_losses(logprobs)
        pull = jnp.abs(jax.grad(lambda logprobs: sum(term_losses(logprobs).values()))(now))
        entropy = jnp.sum(entropies * weights["entropy"])
        total = sum(losses.values())
        own_sums, maxima = _own_statistics(inputs._replace(logprobs=now), old, batch, method)
        sums = {
            **{f"loss/{name}": value for name, value in losses.items()},
            "loss/total": total,
            "policy/entropy": entropy,
            **own_sums,
            **_expert_statistics(jnp.exp(now), pull, kinds, method.alpha),
        }
        at_tokens = lambda x: jnp.pad(x, ((0, 0), (1, 0)))  # no token predicts the first
        return total, (sums, maxima, TokenTrace(at_tokens(now), at_tokens(pull)))

    def train_step(
        state: TrainState, batch: TrainBatch, coefficients: Coefficients
    ) -> tuple[TrainState, Metrics, TokenTrace]:
        weights = _term_weights(batch, method.terms, max_completion_length)
        trained, kept = split_trained(state.params)
        share = partial(objective, coefficients=coefficients, num_segments=_num_segments(batch))

        def accumulate(index, carry):
            grads, sums, maxima, trace = carry
            (_, new), new_grads = jax.value_and_grad(share, has_aux=True)(
                trained, kept, *_micro_batch((batch, weights), index)
            )
            new_sums, new_maxima, new_trace = new
            grads, sums = jax.tree.map(jnp.add, (grads, sums), (new_grads, new_sums))
            maxima = jax.tree.map(jnp.maximum, maxima, new_maxima)
            write = lambda all, one: jax.lax.dynamic_update_index_in_dim(all, one, index, axis=0)
            return grads, sums, maxima, jax.tree.map(write, trace, new_trace)

        first = _micro_batch((batch, weights), 0)
        *shapes, _ = jax.eval_shape(share, trained, kept, *first)[1]
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        untraced = TokenTrace(*(jnp.zeros(batch.kinds.shape, jnp.float32) for _ in range(2)))
        initial = (jax.tree.map(jnp.zeros_like, trained), *zeros, untraced)
        # A loop whose length is data: how many micro-batches a batch fills changes no shape.
        grads, sums, maxima, trace = jax.lax.fori_loop(
            0, batch.num_micro_batches, accumulate, initial
        )
        grad_norm = optax.tree.norm(grads)
        applied = jnp.isfinite(grad_norm) & jnp.isfinite(sums["loss/total"])
        applied &= grad_norm <= method.max_applied_grad_norm
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
        return new_state, _metrics(sums, maxima, batch, grad_norm, applied), trace

    return jax.jit(
        on_mesh(train_step, mesh),
        in_shardings=(shardings, _batch_shardings(mesh), replicated(mesh)),
        out_shardings=(shardings, replicated(mesh), batch_sharding(mesh)),
        donate_argnums=0,
    )


def make_batch_logprobs(
    config: DecoderConfig,
    mesh: Mesh,
    param_shardings: Any,
    *,
    temperature: float,
    chunk_size: int,
) -> Callable[[Any, TrainBatch], jax.Array]:
    """Builds the jitted `(params, batch) -> logprobs`, for `TrainBatch.old_logprobs` and `ref_logprobs`.

    Its result is float32 `[M, B, T]`: the log-probability of every trained token, 0 elsewhere. For the
    arguments see `make_train_step`.
    """

    def batch_logprobs(params: Any, batch: TrainBatch) -> jax.Array:
        def write(index, logprobs):
            one = _micro_batch(batch, index)
            values, _ = _score_tokens(config, params, one, temperature, chunk_size)
            values = jnp.pad(values, ((0, 0), (1, 0)))  # no token predicts the first
            return jax.lax.dynamic_update_index_in_dim(logprobs, values, index, axis=0)

        zeros = jnp.zeros(batch.kinds.shape, jnp.float32)
        return jax.lax.fori_loop(0, batch.num_micro_batches, write, zeros)

    return jax.jit(
        on_mesh(batch_logprobs, mesh),
        in_shardings=(param_shardings, _batch_shardings(mesh)),
        out_shardings=batch_sharding(mesh),
    )


def place_batch(batch: TrainBatch, mesh: Mesh) -> TrainBatch:
    """The batch, which every process holds whole, on the mesh; each device gets its rows."""

    def place(x, sharding):
        return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

    return TrainBatch(
        *(
            None if x is None else place(np.asarray(x), sharding)
            for x, sharding in zip(batch, _batch_shardings(mesh), strict=True)
        )
    )


def _batch_shardings(mesh: Mesh) -> TrainBatch:
    rows, everywhere = batch_sharding(mesh), replicated(mesh)
    return TrainBatch(*(rows,) * 6, *(everywhere,) * 2, *(rows,) * 2)


def _micro_batch(tree: Any, index: jax.Array | int) -> Any:
    """The micro-batch `index` of arrays `[M, ...]`; scalars stay."""
    one = lambda x: jax.lax.dynamic_index_in_dim(x, index, keepdims=False)
    return jax.tree.map(lambda x: one(x) if x.ndim else x, tree)


def _score_tokens(
    config: DecoderConfig, params: Any, batch: TrainBatch, temperature: float, chunk_size: int
) -> tuple[jax.Array, jax.Array]:
    """Log-probability and entropy at each trained token of a micro-batch, `[B, T - 1]`; 0 elsewhere."""
    hidden, _ = apply_decoder(config, params, batch.token_ids, batch.positions, batch.segment_ids)
    kinds = batch.kinds[:, 1:]
    return linear_token_logprobs(
        hidden[:, :-1],
        unembedding(params).astype(config.dtype),
        batch.token_ids[:, 1:],
        chunk_size=chunk_size,
        temperature=temperature,
        with_entropy=True,
        where=(kinds == TokenKind.COMPLETION) | (kinds == TokenKind.EXPERT_TRAINED),
    )


def _own_statistics(
    inputs: TokenInputs, old_logprobs: jax.Array, batch: TrainBatch, method: Method
) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    """Sums and maxima over own tokens: the gap to the sampler, the ratio to the old policy, what is clipped."""
    own = batch.kinds[:, 1:] == TokenKind.COMPLETION
    # Before the first update, where both have the same weights, but for stale tokens.
    gap = jnp.where(own, jnp.abs(old_logprobs - batch.sampler_logprobs[:, 1:]), 0.0)
    ratio = jnp.exp(jnp.where(own, inputs.logprobs - inputs.old_logprobs, 0.0))
    lowest = -jnp.inf if method.clip_low is None else 1 - method.clip_low
    highest = jnp.inf if method.clip_high is None else 1 + method.clip_high
    # Only where the clipped value is the smaller one does clipping take the gradient away.
    clipped = (ratio < lowest) & (inputs.advantages < 0)
    clipped |= (ratio > highest) & (inputs.advantages > 0)
    sums = {
        "policy/logprob_gap_sum": jnp.sum(gap),
        "policy/ratio_sum": jnp.sum(jnp.where(own, ratio, 0.0)),
        "policy/num_clipped": jnp.sum(own & clipped, dtype=jnp.float32),
    }
    return sums, {"policy/logprob_gap_max": jnp.max(gap), "policy/ratio_max": jnp.max(ratio)}


def _expert_statistics(
    probs: jax.Array, pull: jax.Array, kinds: jax.Array, alpha: float
) -> dict[str, jax.Array]:
    """Sums over trained expert tokens; `pull` is the size of the gradient by each token's logprob."""
    expert = kinds == TokenKind.EXPERT_TRAINED
    pull = jnp.where(
        expert, pull * (1 - probs), 0.0
    )  # half the L1 norm of the gradient by the logits
    bins = jnp.clip((probs * PROB_BINS).astype(jnp.int32), 0, PROB_BINS - 1)
    by_bin = [jnp.sum(expert & (bins == i), dtype=jnp.float32) for i in range(PROB_BINS)]
    return {
        "expert/prob_sum": jnp.sum(jnp.where(expert, probs, 0.0)),
        "expert/num_below_alpha": jnp.sum(expert & (probs < alpha)),
        "expert/pull": jnp.sum(pull),
        "expert/pull_inside": jnp.sum(jnp.where(probs >= alpha, pull, 0.0)),
        "expert/num_by_bin": jnp.stack(by_bin),
    }


def _term_weights(
    batch: TrainBatch, terms: Sequence[Term], max_completion_length: int
) -> dict[str, jax.Array]:
    """For each term, the weight of every predicted token, `[M, B, T - 1]`; 0 off its kind."""
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

    by_term = {term.name: weights(term.normalizer, kinds == term.kind) for term in terms}
    return {**by_term, "entropy": token_mean_weights(kinds == TokenKind.COMPLETION)}


def _num_segments(batch: TrainBatch) -> int:
    """Above every segment id: a batch holds no more rollouts than it would with one a row."""
    num_micro_batches, num_rows, _ = batch.kinds.shape
    return 1 + num_micro_batches * num_rows


def _metrics(sums, maxima, batch, grad_norm, applied) -> Metrics:
    """What a step tells of itself, over the whole batch.

    `expert/prob_from_x` is the share of trained expert tokens whose probability lies in [x, x + 0.1);
    `expert/gradient_share_inside` the part of their gradient (L1 norm by the logits) that comes from tokens of
    probability alpha or more; `policy/clipped_share` the part of own tokens whose gradient is clipped away.
    """
    kinds = batch.kinds[..., 1:]
    num_own = jnp.maximum(1, jnp.sum(kinds == TokenKind.COMPLETION))
    num_expert = jnp.maximum(1, jnp.sum(kinds == TokenKind.EXPERT_TRAINED))
    return {
        **{name: value for name, value in sums.items() if name.startswith("loss/")},
        "policy/entropy": sums["policy/entropy"],
        "policy/logprob_gap_mean": sums["policy/logprob_gap_sum"] / num_own,
        "policy/ratio_mean": sums["policy/ratio_sum"] / num_own,
        "policy/clipped_share": sums["policy/num_clipped"] / num_own,
        **maxima,
        "expert/prob_mean": sums["expert/prob_sum"] / num_expert,
        "expert/share_below_alpha": sums["expert/num_below_alpha"] / num_expert,
        "expert/gradient_share_inside": sums["expert/pull_inside"]
        / jnp.where(sums["expert/pull"] == 0, 1.0, sums["expert/pull"]),
        **{
            f"expert/prob_from_{i / PROB_BINS:.1f}": count / num_expert
            for i, count in enumerate(sums["expert/num_by_bin"])
        },
        "optimizer/grad_norm": grad_norm,
        "optimizer/skipped": 1 - applied.astype(jnp.int32),
    }


# Axes of the matrices that Muon orthogonalises, (in, out); one for each index of the others: layers, heads, parts.
MUON_AXES = {"qkv": (1, 4), "output": (3, 4), "gate_up": (1, 3), "down": (1, 2)}


def _muon_axes(params: Any) -> Any:
    """Which axes make a matrix, for each parameter; None for what AdamW updates."""

    def axes(path, _):
        found = MUON_AXES.get(path[-1].key)
        return found and optax.contrib.MuonDimensionNumbers(*found)

    return jax.tree_util.tree_map_with_path(axes, params)


def _is_matrix(params: Any) -> Any:
    """True for what weight decay applies to: everything but the norms' scales and the biases."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: not path[-1].key.endswith(("norm", "bias")), params
    )
