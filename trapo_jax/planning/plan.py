"""Plans a run on given devices: its programs, whether they fit in memory, and bounds on their execution times."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from trapo_jax.config import Config
from trapo_jax.distributed.sharding import make_mesh
from trapo_jax.models import DecoderConfig, abstract_params, find_model, read_decoder
from trapo_jax.planning.programs import (
    OutOfMemory,
    Program,
    compile_sampling,
    compile_train_step,
)
from trapo_jax.planning.topology import Topology

TRAINING, SAMPLING = "training", "sampling"
ADVICE = {
    TRAINING: (
        "more devices along mesh.fsdp, to shard the parameters and the optimizer state further",
        "model.remat=full, train.per_device_rows=1 or a smaller train.logprob_chunk_size, to reduce temporaries",
    ),
    SAMPLING: (
        "more devices along mesh.tp, to shard the weights and the cache of a replica further",
        "a smaller sampling.num_slots, sampling.num_contexts or sampling.max_completion_length, to reduce the cache",
    ),
}


@dataclasses.dataclass(frozen=True)
class Plan:
    """The resources that a run needs on each device of a topology.

    Attributes:
      topology: the devices.
      mesh: size of each mesh axis.
      decoder: config of the decoder, with the attention implementation that the devices would use.
      row_len: length of a training row.
      programs: the train step, the prefill and a decode segment; empty if the compiler ran out of memory.
      out_of_memory: the phase in which the compiler ran out of memory, and the error message; None if it did not.
    """

    topology: Topology
    mesh: Mapping[str, int]
    decoder: DecoderConfig
    row_len: int
    programs: Sequence[Program] = ()
    out_of_memory: tuple[str, str] | None = None

    @property
    def num_params(self) -> int:
        """The number of model parameters."""
        return sum(math.prod(x.shape) for x in jax.tree.leaves(abstract_params(self.decoder)))

    @property
    def needed_bytes(self) -> dict[str, float]:
        """The bytes per device needed by training and by sampling. The train state stays in memory during sampling."""
        if not self.programs:
            return {}
        train_step, prefill, decode = self.programs
        return {
            TRAINING: train_step.arguments + train_step.temporaries,
            SAMPLING: train_step.arguments
            + decode.arguments
            + max(prefill.temporaries, decode.temporaries),
        }

    @property
    def phases_without_memory(self) -> list[str]:
        """The phases that need more memory than a device has."""
        if self.out_of_memory:
            return [self.out_of_memory[0]]
        if not self.topology.chip:
            return []
        memory = self.topology.chip.memory
        return [phase for phase, size in self.needed_bytes.items() if size > memory]

    @property
    def fits(self) -> bool | None:
        """Whether the run fits in memory; None if the memory size is unknown."""
        if self.out_of_memory:
            return False
        return not self.phases_without_memory if self.topology.chip else None

    @property
    def advice(self) -> list[str]:
        """Config changes that reduce the memory use of the phases that do not fit."""
        return [advice for phase in self.phases_without_memory for advice in ADVICE[phase]]

    def mfu_bound(self, program: Program) -> float:
        """Returns an upper bound on the model FLOPs utilization (MFU) of a program."""
        assert self.topology.chip
        seconds = max(program.lower_bounds(self.topology).values())
        return program.useful_flops / self.topology.chip.flops / seconds

    def to_json(self) -> dict[str, Any]:
        """Returns the plan as JSON-serializable data. Sizes are in bytes per device."""
        plan: dict[str, Any] = {
            "topology": self.topology.name,
            "mesh": dict(self.mesh),
            "num_params": self.num_params,
            "attention": self.decoder.attention,
            "row_len": self.row_len,
            "programs": {p.name: self._program_to_json(p) for p in self.programs},
            **{f"{phase}_bytes": size for phase, size in self.needed_bytes.items()},
            "fits": self.fits,
            "advice": self.advice,
        }
        if self.out_of_memory:
            plan["reason"] = self.out_of_memory[1]
        elif self.topology.chip:
            plan["memory"] = self.topology.chip.memory
        return plan

    def _program_to_json(self, program: Program) -> dict[str, Any]:
        data = dataclasses.asdict(program)
        if not self.topology.chip:
            return data
        bounds = program.lower_bounds(self.topology)
        return {
            **data,
            "bounds_secs": bounds,
            "bound_by": max(bounds, key=bounds.__getitem__),
            "mfu_bound": self.mfu_bound(program),
        }


def make_plan(config: Config, topology: Topology) -> Plan:
    """Compiles the programs of a run for a topology, without loading weights.

    Args:
      config: the run's config.
      topology: the devices.

    Raises:
      UserError: if the model folder or the mesh cannot be used.
    """
    method = config.method.make()
    folder = find_model(config.model.path)
    decoder = read_decoder(folder, config.model, config.lora)
    if topology.chip and decoder.attention == "auto":  # "auto" would inspect the local devices.
        is_divisible = config.row_len % 128 == 0 and decoder.head_dim % 128 == 0
        decoder = dataclasses.replace(decoder, attention="splash" if is_divisible else "xla")
    axes = config.mesh
    mesh = make_mesh(fsdp=axes.fsdp, tp=axes.tp, devices=topology.devices)
    plan = Plan(topology, dict(mesh.shape), decoder, config.row_len)
    phase = TRAINING
    try:
        train_step = compile_train_step(config, method, decoder, mesh)
        phase = SAMPLING
        prefill, decode = compile_sampling(config, decoder, mesh)
    except OutOfMemory as error:
        return dataclasses.replace(plan, out_of_memory=(phase, str(error)))
    return dataclasses.replace(plan, programs=(train_step, prefill, decode))
