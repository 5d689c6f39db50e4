"""Compiles a run's programs ahead of time from shapes, without data."""

import dataclasses
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from trapo_jax.config import Config
from trapo_jax.distributed.sharding import abstract_like, batch_sharding, param_shardings
from trapo_jax.methods import Method
from trapo_jax.models import DecoderConfig, abstract_params, count_attention_pairs, token_cost
from trapo_jax.planning.program_cost import Traffic, matmul_flops, traffic
from trapo_jax.planning.topology import Topology
from trapo_jax.sampling.jax_engine import SAMPLING_RULES, sampling_dtypes
from trapo_jax.sampling.prefix_cache import MAX_PREFILL_ROWS, PrefillBatch
from trapo_jax.sampling.programs import (
    choose_layout,
    init_state,
    make_programs,
    state_shardings,
)
from trapo_jax.training.learner import Learner
from trapo_jax.types import TENSOR_AXIS, Moment, TrainBatch

TRAIN_STEP, PREFILL = "train step", "prefill"
PREFILL_CHUNK_LEN = 512  # Length of the planned prefill chunks.
# Ratio of backward to forward FLOPs of the flash attention kernel: the forward pass needs two matmuls, and the
# backward pass seven, because it recomputes the scores twice.
KERNEL_BACKWARD_RATIO = 7 / 2


@dataclasses.dataclass(frozen=True)
class Program:
    """The resources that a compiled program needs on one device.

    Attributes:
      name: name of the program.
      arguments: size in bytes of the arguments, and of other arrays that are in memory at the same time.
      temporaries: size in bytes of temporaries, and of results that are not stored in a donated argument.
      flops: number of executed FLOPs.
      useful_flops: number of FLOPs, excluding those of recomputation that saves memory.
      traffic: number of bytes moved.
      compile_secs: compilation time on this machine.
    """

    name: str
    arguments: float
    temporaries: float
    flops: float
    useful_flops: float
    traffic: Traffic
    compile_secs: float

    def lower_bounds(self, topology: Topology) -> dict[str, float]:
        """Returns the seconds that computation, memory traffic and communication would each take at its peak rate."""
        chip = topology.chip
        assert chip
        received = sum(self.traffic.collectives.values())
        return {
            "compute": self.flops / chip.flops,
            "memory": self.traffic.memory / chip.memory_bandwidth,
            "interconnect": received / topology.interconnect_bandwidth if received else 0.0,
        }


class OutOfMemory(Exception):
    """Raised if the compiler cannot fit a program into the memory of a device."""


def compile_train_step(
    config: Config, method: Method, decoder: DecoderConfig, mesh: Mesh
) -> Program:
    """Compiles the train step for a batch in which every row is full.

    Raises:
      OutOfMemory: if the compiler runs out of device memory.
    """
    learner = Learner(config, method, decoder, mesh)
    num_rows = learner.micro_batch_rows
    num_micro_batches = -(-learner.max_rows // num_rows)
    shape = (num_micro_batches, num_rows, config.row_len)
    batch = abstract_batch(shape, mesh, with_context=learner.shares_prompts)
    coefficients = method.coefficients(Moment(1, 0.0, config.seed), learning_rate=1.0)
    cost = token_cost(decoder)
    total_rows = num_micro_batches * num_rows
    num_pairs = total_rows * count_attention_pairs(config.row_len)
    kernel_flops = 0.0
    if decoder.attention == "splash":
        num_forward = 2 if decoder.remat == "full" else 1
        kernel_flops = (num_forward + KERNEL_BACKWARD_RATIO) * cost.forward(0, num_pairs)
    return compile_program(
        TRAIN_STEP,
        learner.train_step,
        (learner.abstract_state(), batch, coefficients),
        num_devices=mesh.size,
        kernel_flops=kernel_flops,
        useful_flops=cost.update(total_rows * config.row_len, num_pairs),
        unknown_trips=num_micro_batches,
    )


def compile_sampling(config: Config, decoder: DecoderConfig, mesh: Mesh) -> tuple[Program, Program]:
    """Compiles the prefill of full chunks, and a decode segment in which all slots are busy and the cache is full.

    Both programs run on one sampling replica.

    Raises:
      OutOfMemory: if the compiler runs out of device memory.
    """
    sampling = config.sampling
    devices = mesh.devices.reshape(-1, mesh.shape[TENSOR_AXIS])[0]
    replica = Mesh(devices, (TENSOR_AXIS,), axis_types=(AxisType.Auto,))
    layout = choose_layout(decoder, replica)
    programs = make_programs(
        decoder,
        replica,
        layout,
        segment_len=sampling.segment_len,
        eos_ids=(0,),
        with_truncation=False,
    )
    shapes = jax.eval_shape(
        lambda: init_state(
            decoder,
            layout,
            num_contexts=sampling.num_contexts,
            num_slots=sampling.num_slots,
            cache_len=config.longest_rollout_len,
            max_new=sampling.completion_len,
        )
    )
    contexts, slots = abstract_like(shapes, state_shardings(replica, layout))
    params = abstract_sampling_params(decoder, replica)
    prefill = compile_program(
        PREFILL,
        programs.prefill,
        (params, contexts, abstract_prefill_batch(sampling.prefill_tokens, replica)),
        num_devices=replica.size,
    )
    resident: list[Any] = [contexts]
    decode_params = params
    if programs.convert_weights:  # The layers are in memory in both storage layouts.
        resident.append(params["layers"])
        decode_params = {**params, "layers": programs.convert_weights.eval_shape(params["layers"])}
    decode = compile_program(
        f"decode {sampling.segment_len} tokens",
        programs.decode_segment,
        (decode_params, slots),
        {"num_slots": sampling.num_slots, "view_len": config.longest_rollout_len},
        num_devices=replica.size,
        unknown_trips=sampling.segment_len,
    )
    resident_bytes = sum(device_bytes(x) for x in jax.tree.leaves(resident))
    return prefill, dataclasses.replace(decode, arguments=decode.arguments + resident_bytes)


def compile_program(
    name: str,
    jitted: Any,
    arguments: tuple,
    options: dict[str, Any] | None = None,
    *,
    num_devices: int,
    kernel_flops: float = 0.0,
    useful_flops: float | None = None,
    unknown_trips: int = 1,
) -> Program:
    """Compiles a program for the devices on which its arguments are placed.

    Args:
      name: name of the program.
      jitted: a jitted function.
      arguments: shapes, dtypes and shardings of the function's arguments.
      options: values of the function's static arguments.
      num_devices: number of devices that run the program.
      kernel_flops: FLOPs in Pallas kernels, summed over all devices.
      useful_flops: FLOPs excluding recomputation, summed over all devices; None if there is no recomputation.
      unknown_trips: assumed number of iterations of loops whose length depends on data.

    Raises:
      OutOfMemory: if the compiler runs out of device memory.
    """
    traced = jitted.trace(*arguments, **(options or {}))
    started = time.monotonic()
    try:
        compiled = traced.lower().compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise OutOfMemory(f"{name}: {str(error).splitlines()[0]}") from error
    compile_secs = time.monotonic() - started
    memory: Any = compiled.memory_analysis()
    flops = matmul_flops(traced.jaxpr, unknown_trips=unknown_trips) + kernel_flops
    return Program(
        name=name,
        arguments=memory.argument_size_in_bytes,
        temporaries=memory.temp_size_in_bytes
        + max(0, memory.output_size_in_bytes - memory.alias_size_in_bytes),
        flops=flops / num_devices,
        useful_flops=(flops if useful_flops is None else useful_flops) / num_devices,
        traffic=traffic(compiled.as_text() or "", unknown_trips=unknown_trips),
        compile_secs=compile_secs,
    )


def abstract_batch(shape: tuple[int, int, int], mesh: Mesh, *, with_context: bool) -> TrainBatch:
    """Returns the shapes, dtypes and shardings of a training batch.

    Args:
      shape: numbers of micro-batches, rows and tokens.
      mesh: the mesh of the train step.
      with_context: whether rollouts may share prompts.
    """
    rows, everywhere = batch_sharding(mesh), NamedSharding(mesh, P())
    array = lambda dtype: jax.ShapeDtypeStruct(shape, dtype, sharding=rows)
    scalar = lambda dtype: jax.ShapeDtypeStruct((), dtype, sharding=everywhere)
    ints, floats = array(jnp.int32), array(jnp.float32)
    return TrainBatch(
        token_ids=ints,
        positions=ints,
        segment_ids=ints,
        kinds=array(jnp.int8),
        advantages=floats,
        sampler_logprobs=floats,
        num_rollouts=scalar(jnp.float32),
        num_micro_batches=scalar(jnp.int32),
        context_ids=ints if with_context else None,
    )


def abstract_sampling_params(decoder: DecoderConfig, replica: Mesh) -> Any:
    """Returns the shapes, dtypes and shardings of the parameters on a sampling replica."""
    params = abstract_params(decoder)
    dtypes = sampling_dtypes(params, decoder)
    params = jax.tree.map(lambda x, dtype: jax.ShapeDtypeStruct(x.shape, dtype), params, dtypes)
    return abstract_like(params, param_shardings(params, replica, SAMPLING_RULES))


def abstract_prefill_batch(prefill_tokens: int, replica: Mesh) -> PrefillBatch:
    """Returns the shapes, dtypes and shardings of a prefill batch of `prefill_tokens` tokens."""
    num_rows = min(MAX_PREFILL_ROWS, max(1, prefill_tokens // PREFILL_CHUNK_LEN))
    everywhere = NamedSharding(replica, P())
    ints = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.int32, sharding=everywhere)
    chunks = ints(num_rows, prefill_tokens // num_rows)
    return PrefillBatch(ints(num_rows), ints(num_rows), chunks, ints(num_rows))


def device_bytes(x: jax.ShapeDtypeStruct) -> int:
    """Returns the size in bytes of the part of an array that is on one device."""
    assert x.sharding is not None
    return int(np.prod(x.sharding.shard_shape(x.shape))) * np.dtype(x.dtype).itemsize
