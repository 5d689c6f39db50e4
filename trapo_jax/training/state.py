"""Builds the train state: parameters, optimizer states, and counters of skipped steps, with their shardings."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from trapo_jax.distributed.sharding import optimizer_shardings, param_shardings, replicated
from trapo_jax.models import split_trained


class TrainState(NamedTuple):
    """The state that an optimizer step updates. Its leaves are global arrays, their shapes, or their shardings."""

    params: Any  # float32 master weights
    opt_state: Any  # covers the trained parameters: all parameters, or only the LoRA adapters
    step: Any  # int32 [], number of optimizer steps, including skipped ones
    num_skipped_in_a_row: Any  # int32 []
    other_opt_states: Any = ()  # states of the method's other optimizers; a train step does not change them


def new_state(
    params: Any, optimizer: optax.GradientTransformation, num_optimizers: int = 1
) -> TrainState:
    """Returns the state before the first step, with `num_optimizers` optimizer states."""
    first, *others = (optimizer.init(split_trained(params)[0]) for _ in range(num_optimizers))
    return TrainState(params, first, jnp.int32(0), jnp.int32(0), tuple(others))


def init_state(
    params: Any, optimizer: optax.GradientTransformation, mesh: Mesh, num_optimizers: int = 1
) -> TrainState:
    """Returns `new_state` placed on the mesh. Parameters that are already placed there are donated."""
    shardings = state_shardings(params, optimizer, mesh, num_optimizers)
    build = lambda params: new_state(params, optimizer, num_optimizers)
    params = jax.device_put(params, shardings.params)
    return jax.jit(build, out_shardings=shardings, donate_argnums=0)(params)


def state_shardings(
    params: Any, optimizer: optax.GradientTransformation, mesh: Mesh, num_optimizers: int = 1
) -> TrainState:
    """Returns the sharding of each leaf of the state; `params` may be arrays or shapes."""
    for_params = param_shardings(params, mesh)
    trained, for_trained = (split_trained(tree)[0] for tree in (params, for_params))
    for_optimizer = optimizer_shardings(optimizer, trained, for_trained, mesh)
    everywhere = replicated(mesh)
    others = (for_optimizer,) * (num_optimizers - 1)
    return TrainState(for_params, for_optimizer, everywhere, everywhere, others)


def make_optimizer_reset(
    optimizer: optax.GradientTransformation, shardings: TrainState
) -> Callable[[TrainState], TrainState]:
    """Builds a jitted function that replaces all optimizer states with initial ones; its argument is donated.

    Args:
      optimizer: the optimizer.
      shardings: shardings of the state, from `state_shardings`.
    """

    def reset(state: TrainState) -> TrainState:
        new = optimizer.init(split_trained(state.params)[0])
        return state._replace(opt_state=new, other_opt_states=(new,) * len(state.other_opt_states))

    return jax.jit(reset, in_shardings=(shardings,), out_shardings=shardings, donate_argnums=0)


def swap_optimizer(state: TrainState, index: int) -> TrainState:
    """Exchanges the active optimizer state (index 0) with the one at `index`. A second call restores the order."""
    if index == 0:
        return state
    others = list(state.other_opt_states)
    active, others[index - 1] = others[index - 1], state.opt_state
    return state._replace(opt_state=active, other_opt_states=tuple(others))
