"""Defines the device mesh and the sharding of arrays.

Parameters have logical axis names (`PARAM_AXES`), which `Rules` maps to mesh axes. Batch rows are sharded over `data`
and `fsdp`.

To add a mesh axis, change `MeshConfig` in `config/schema.py` (the axis sizes), `types/training.py` (the axes that shard
batches), `models/decoder.py` and `models/attention.py` (the sharding constraints on activations), and
`sampling/jax_engine.py` (the sampler's mesh). The mesh is created in `training/learner.py`,
`training/gradient_check.py` and `planning/plan.py`.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import optax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from trapo_jax.types import BATCH_AXES, UserError

# Logical axes of the decoder's parameters, keyed by name. The first axis of stacked parameters is "layers".
PARAM_AXES: dict[str, tuple[str | None, ...]] = {
    "embedding": ("vocab", "width"),
    "unembedding": ("width", "vocab"),
    "final_norm": (None,),
    "attention_norm": ("layers", None),
    "attention_post_norm": ("layers", None),
    "query_norm": ("layers", None),
    "key_norm": ("layers", None),
    "qkv": ("layers", "width", "kv_heads", None, None),
    "qkv_bias": ("layers", "kv_heads", None, None),
    "output": ("layers", "kv_heads", None, None, "width"),
    "output_bias": ("layers", None),
    "mlp_norm": ("layers", None),
    "mlp_post_norm": ("layers", None),
    "gate_up": ("layers", "width", None, "mlp"),
    "down": ("layers", "mlp", "width"),
    "qkv_lora_a": ("layers", "width", None),
    "qkv_lora_b": ("layers", None, "kv_heads", None, None),
    "output_lora_a": ("layers", "kv_heads", None, None, None),
    "output_lora_b": ("layers", None, "width"),
    "gate_up_lora_a": ("layers", "width", None),
    "gate_up_lora_b": ("layers", None, None, "mlp"),
    "down_lora_a": ("layers", "mlp", None),
    "down_lora_b": ("layers", None, "width"),
}


@dataclasses.dataclass(frozen=True)
class Rules:
    """Maps logical axes to mesh axes. Axes that map to None are replicated."""

    layers: str | None = None
    width: str | None = "fsdp"
    vocab: str | None = "tp"
    kv_heads: str | None = "tp"
    mlp: str | None = "tp"


def make_mesh(*, fsdp: int, tp: int, devices: Sequence[Any] | None = None) -> Mesh:
    """Creates a mesh with axes (data, fsdp, tp); the remaining devices are assigned to `data`.

    Args:
      fsdp: size of the mesh axis that shards the batch and the parameters; -1 for all remaining devices.
      tp: size of the mesh axis that shards heads, MLPs and the vocabulary.
      devices: the devices of the mesh; all devices if None.

    Raises:
      UserError: if the number of devices is not divisible by `fsdp * tp`.
    """
    devices = jax.devices() if devices is None else devices
    num_devices = len(devices)
    if fsdp == -1:
        fsdp = max(1, num_devices // tp)
    data, remainder = divmod(num_devices, fsdp * tp)
    if remainder or not data:
        raise UserError(
            f"mesh.fsdp={fsdp} x mesh.tp={tp}: the number of devices, {num_devices}, is not divisible by {fsdp * tp}"
        )
    return jax.make_mesh(
        (data, fsdp, tp), ("data", "fsdp", "tp"), (AxisType.Auto,) * 3, devices=devices
    )


def on_mesh(function: Callable, mesh: Mesh) -> Callable:
    """Wraps a function so that it is traced with the mesh set. The model uses the mesh to shard activations."""

    @functools.wraps(function)
    def traced(*args):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return function(*args)

    return traced


def param_shardings(params: Any, mesh: Mesh, rules: Rules = Rules()) -> Any:
    """Returns a NamedSharding for each parameter; `params` may contain arrays or shapes.

    Raises:
      UserError: if a parameter has no logical axes, or cannot be sharded evenly over the mesh.
    """

    def sharding(path, leaf):
        name = path[-1].key
        if name not in PARAM_AXES:
            raise UserError(f"parameter {jax.tree_util.keystr(path)} has no sharding axes")
        axes = [None if axis is None else getattr(rules, axis) for axis in PARAM_AXES[name]]
        for size, axis in zip(leaf.shape, axes, strict=True):
            if axis is not None and size % mesh.shape[axis]:
                raise UserError(
                    f"mesh.{axis}={mesh.shape[axis]}: parameter {name} of shape {leaf.shape} cannot be sharded evenly"
                )
        return NamedSharding(mesh, P(*axes))

    return jax.tree_util.tree_map_with_path(sharding, params)


def optimizer_shardings(
    optimizer: optax.GradientTransformation, params: Any, shardings: Any, mesh: Mesh
) -> Any:
    """Returns the shardings of the optimizer state.

    Leaves with the path and shape of a parameter are sharded like the parameter; all others are replicated. Leaves are
    matched by path because an optimizer that handles only some of the parameters, such as Muon, keeps state for only
    those.
    """
    flat, _ = jax.tree_util.tree_flatten_with_path(params)
    by_path = {
        path: (leaf.shape, sharding)
        for (path, leaf), sharding in zip(flat, jax.tree.leaves(shardings), strict=True)
    }

    def find(path, leaf):
        for start in range(len(path)):
            shape, sharding = by_path.get(path[start:], (None, None))
            if shape == leaf.shape:
                return sharding
        return replicated(mesh)

    return jax.tree_util.tree_map_with_path(find, jax.eval_shape(optimizer.init, params))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, P())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of `[M, B, T]` arrays, with rows sharded over `data` and `fsdp`."""
    return NamedSharding(mesh, P(None, BATCH_AXES, None))


def num_batch_shards(mesh: Mesh) -> int:
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def abstract_like(tree: Any, shardings: Any) -> Any:
    """Returns a tree of `ShapeDtypeStruct`s with the shapes and dtypes of `tree` and the given shardings."""
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        tree,
        shardings,
    )
