"""Computes the objective as a function of log-probabilities and entropies instead of parameters."""

import jax
import jax.numpy as jnp
import numpy as np

from trapo_jax.methods import TokenInputs
from trapo_jax.training.train_step import term_weights


def objective(method, batch, scores, moment, max_length):
    """Computes a batch's objective as in the train step: a sum over micro-batches, with weights for the whole batch."""
    weights = term_weights(batch, method.terms, max_length)
    coefficients = method.coefficients(moment, learning_rate=1.0)
    num_segments = 1 + batch.kinds.shape[0] * batch.kinds.shape[1]
    now, old, ref, entropies = (x[..., 1:] for x in scores)

    def total(now, entropies):
        value = 0.0
        for term in method.terms:
            for m in range(int(batch.num_micro_batches)):
                inputs = TokenInputs(
                    now[m],
                    old[m],
                    ref[m],
                    batch.advantages[m, :, 1:],
                    np.isin(batch.kinds[m, :, 1:], term.kinds),
                    entropies[m],
                    batch.segment_ids[m, :, 1:],
                    num_segments,
                )
                values = term.loss(inputs) * weights[term.name][m]
                value += coefficients[term.name] * jnp.sum(values)
        return value

    value, gradients = jax.value_and_grad(total, argnums=(0, 1))(
        jnp.asarray(now), jnp.asarray(entropies)
    )
    return float(value), gradients
