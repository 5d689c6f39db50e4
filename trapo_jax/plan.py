"""What a run would need and reach on devices that are not here.

    python -m trapo_jax.plan --config FILE --topology v5p:2x2x4 [--topology v5e:4x4 ...] [--json] [FIELD=VALUE ...]

Compiles the real train step, prefill and decode segment ahead of time, for a TPU topology (extra `tpu`; no TPU is
needed) or for so many forced host devices (`cpu:8`), and holds what they take against the chips' memory and
published peaks. Of the model only its config.json is read.

The times are bounds, not forecasts: what the FLOPs, the memory traffic or the collectives alone would take at the
published peak. The train step is planned with every row full.
"""

import argparse
import contextlib
import dataclasses
import importlib.util
import json
import math
import os
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from rich.console import Console
from rich.table import Table

from trapo_jax.config import Config, load_config, parse_command_line
from trapo_jax.distributed.sharding import (
    batch_sharding,
    make_mesh,
    num_batch_shards,
    param_shardings,
)
from trapo_jax.models import DecoderConfig, Params, abstract_params, find_model, split_trained
from trapo_jax.parts import build_decoder, build_method, build_optimizer, build_train_step
from trapo_jax.planning.program_cost import Traffic, matmul_flops, traffic
from trapo_jax.runs.checkpoints import abstract_like
from trapo_jax.runs.command_line import EXIT_USER_ERROR, as_command, fail
from trapo_jax.sampling.jax_engine import SAMPLING_RULES, sampling_dtypes
from trapo_jax.sampling.prefix_cache import MAX_PREFILL_ROWS, PrefillBatch
from trapo_jax.sampling.programs import (
    choose_layout,
    init_state,
    make_programs,
    state_shardings,
)
from trapo_jax.training.state import new_state
from trapo_jax.training.state import state_shardings as train_shardings
from trapo_jax.types import TENSOR_AXIS, Moment, TrainBatch, UserError

EXIT_DOES_NOT_FIT = 1
GIB = 2**30
# libtpu compiles only: it need not look for a machine around it, nor for other processes at its TPU.
WITHOUT_A_TPU = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5p-8",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
# FLOPs of attention for a head, a pair of tokens and an entry of the head: two matmuls forward; of the flash kernel's
# backward pass seven, as it computes the scores anew, twice; what is useful of these are four.
FORWARD, KERNEL_BACKWARD, USEFUL_BACKWARD = 4, 14, 8


@dataclasses.dataclass(frozen=True)
class Chip:
    """Published figures of a device.

    Attributes:
      memory: bytes.
      flops: a second, bfloat16.
      memory_bandwidth: bytes a second.
      link_bandwidth: bytes a second, in one direction, of one link to a neighbour.
      wraps: a dimension of the topology whose size is a multiple of this is a ring, another a line.
    """

    memory: float
    flops: float
    memory_bandwidth: float
    link_bandwidth: float
    wraps: int


# cloud.google.com/tpu/docs/v5e, /v5p, /v6e: a chip's interconnect bandwidth over its 4 (v5p: 6) links.
CHIPS = {
    "v5e": Chip(16 * GIB, 197e12, 819e9, 50e9, wraps=16),
    "v5p": Chip(95 * GIB, 459e12, 2765e9, 100e9, wraps=4),
    "v6e": Chip(32 * GIB, 918e12, 1600e9, 100e9, wraps=16),
}


@dataclasses.dataclass(frozen=True)
class Topology:
    """Devices to plan for; `chip` is None for host devices, of which nothing is published."""

    name: str
    chip: Chip | None
    dims: tuple[int, ...]
    devices: Sequence[Any]

    @property
    def interconnect(self) -> float:
        """Bytes a second that a device receives, at most; of a line the end has one link only."""
        assert self.chip
        links = sum(2 if n % self.chip.wraps == 0 else 1 for n in self.dims if n > 1)
        return links * self.chip.link_bandwidth


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled program, on one device.

    Attributes:
      name: what it is.
      arguments, temporaries: bytes; results that take the place of arguments are not counted again.
      flops: that it executes.
      useful_flops: without what is computed anew to save memory.
      traffic: bytes that it moves.
      compile_secs: to compile it here.
    """

    name: str
    arguments: float
    temporaries: float
    flops: float
    useful_flops: float
    traffic: Traffic
    compile_secs: float

    def bounds(self, topology: Topology) -> dict[str, float]:
        """Seconds by what bounds it."""
        chip = topology.chip
        assert chip
        return {
            "compute": self.flops / chip.flops,
            "memory": self.traffic.memory / chip.memory_bandwidth,
            "interconnect": sum(self.traffic.collectives.values()) / topology.interconnect
            if self.traffic.collectives
            else 0.0,
        }


class DoesNotFit(Exception):
    """The compiler found no way to run a program in a device's memory."""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m trapo_jax.plan",
        description=(__doc__ or "").split("\n\n")[0],
        epilog="FIELD=VALUE replaces fields of the config, as in trapo_jax.train.",
    )
    parser.add_argument("--config", type=Path, help="YAML file of the run; the defaults without it")
    parser.add_argument(
        "--topology",
        action="append",
        required=True,
        metavar="CHIP:SHAPE",
        help="v5e:4x4, v5p:2x2x4, v6e:4x4 ..., or cpu:8 for host devices; may be given several times",
    )
    parser.add_argument("--json", action="store_true", help="one object on standard output instead")
    parser.add_argument("overrides", nargs="*", metavar="FIELD=VALUE")
    args = parser.parse_args(arguments)
    console = Console(stderr=args.json, highlight=False, width=max(110, Console().width))
    try:
        config = load_config(Config, args.config, parse_command_line(args.overrides)[1])
        plans = []
        for name in args.topology:
            plans.append(make_plan(config, find_topology(name), console))
            show_plan(plans[-1], console)
        if len(plans) > 1:
            show_comparison(plans, console)
    except UserError as error:
        return fail(str(error), EXIT_USER_ERROR)
    if args.json:
        print(json.dumps({"plans": plans}))
    return 0 if all(plan["fits"] in (True, None) for plan in plans) else EXIT_DOES_NOT_FIT


def find_topology(name: str) -> Topology:
    """The devices of `CHIP:SHAPE`.

    Raises:
      UserError: if there is no such thing, or no compiler for it here.
    """
    found = re.fullmatch(r"(\w+):(\d+(?:x\d+)*)", name)
    if not found or found[1] not in {*CHIPS, "cpu"}:
        raise UserError(f"--topology {name}: give {', '.join(CHIPS)} or cpu, a colon and a shape")
    kind, dims = found[1], tuple(int(n) for n in found[2].split("x"))
    if kind == "cpu":
        with contextlib.suppress(RuntimeError):  # devices have been counted already
            jax.config.update("jax_platforms", "cpu")
            jax.config.update("jax_num_cpu_devices", math.prod(dims))
        if jax.device_count() != math.prod(dims):
            raise UserError(f"--topology {name}: one number of host devices a command")
        return Topology(name, None, dims, jax.devices())
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(f'--topology {name}: no compiler for it; pip install "trapo_jax[tpu]"')
    os.environ.update(WITHOUT_A_TPU)
    try:
        described = topologies.get_topology_desc(name, platform="tpu")
    except Exception as error:  # libtpu raises what it likes
        reason = str(error).splitlines()[0][:200]
        raise UserError(f"--topology {name}: libtpu knows no such topology ({reason})") from error
    return Topology(name, CHIPS[kind], dims, described.devices)


def make_plan(config: Config, topology: Topology, console: Console) -> dict[str, Any]:
    """Compiles the programs of a run for the topology; plain data, sizes in bytes on one device."""
    decoder = build_decoder(config, find_model(config.model.path))
    if topology.chip and decoder.attention == "auto":  # auto looks at the devices that are here
        divides = config.row_len % 128 == 0 and decoder.head_dim % 128 == 0
        decoder = dataclasses.replace(decoder, attention="splash" if divides else "xla")
    mesh = make_mesh(
        fsdp=config.mesh.fsdp,
        tp=config.mesh.tp,
        devices=topology.devices,
    )
    console.print(f"compiling for {topology.name}, mesh {dict(mesh.shape)} ...")
    plan: dict[str, Any] = {
        "topology": topology.name,
        "mesh": dict(mesh.shape),
        "num_params": sum(math.prod(x.shape) for x in jax.tree.leaves(abstract_params(decoder))),
        "attention": decoder.attention,
        "row_len": config.row_len,
    }
    phase = "training"
    try:
        train = plan_train_step(config, decoder, mesh)
        phase = "sampling"
        prefill, decode = plan_sampling(config, decoder, mesh)
    except DoesNotFit as error:
        return plan | {"programs": {}, "fits": False, "reason": str(error), "advice": ADVICE[phase]}
    programs = [train, prefill, decode]
    state, sampler = train.arguments, decode.arguments
    plan |= {
        "programs": {p.name: dataclasses.asdict(p) for p in programs},
        "training_bytes": state + train.temporaries,
        "sampling_bytes": state + sampler + max(prefill.temporaries, decode.temporaries),
        "fits": None,
        "advice": [],
    }
    if topology.chip:
        plan["memory"] = topology.chip.memory
        needed = {name: plan[f"{name}_bytes"] for name in ("training", "sampling")}
        plan["fits"] = max(needed.values()) <= topology.chip.memory
        plan["advice"] = [
            advice
            for name, size in needed.items()
            if size > topology.chip.memory
            for advice in ADVICE[name]
        ]
        for program in programs:
            bounds = program.bounds(topology)
            plan["programs"][program.name] |= {
                "bounds_secs": bounds,
                "bound_by": max(bounds, key=bounds.__getitem__),
                "mfu_bound": program.useful_flops / topology.chip.flops / max(bounds.values()),
            }
    return plan


ADVICE = {
    "training": (
        "more devices along mesh.fsdp (parameters and optimizer)",
        "model.remat=full, train.per_device_rows=1, smaller train.logprob_chunk_size (temporaries)",
    ),
    "sampling": (
        "more devices along mesh.tp (weights and cache of a replica)",
        "smaller sampling.num_slots, sampling.num_contexts or sampling.max_completion_length (cache)",
    ),
}


def plan_train_step(config: Config, decoder: DecoderConfig, mesh: Mesh) -> Program:
    """The train step on a batch of which every row is full."""
    method, optimizer = build_method(config), build_optimizer(config)
    params = abstract_params(decoder)
    num_optimizers = len(method.optimizers)
    shardings = train_shardings(params, optimizer, mesh, num_optimizers)
    step = build_train_step(config, decoder, method, optimizer, mesh, shardings)
    state = jax.eval_shape(lambda p: new_state(p, optimizer, num_optimizers), params)
    num_rows = config.train.per_device_rows * num_batch_shards(mesh)
    num_micro_batches = -(-method.max_rows(config.train.problems_per_step) // num_rows)
    coefficients = method.coefficients(Moment(1, 0.0, config.seed), learning_rate=1.0)
    batch = abstract_batch(num_micro_batches, num_rows, config.row_len, mesh)
    tokens = num_micro_batches * num_rows * config.row_len
    products = 2 * num_matrix_params(params, decoder)
    products += num_matrix_params(split_trained(params)[0], decoder)
    pairs = decoder.num_layers * num_micro_batches * num_rows * config.row_len**2 / 2
    per_pair = decoder.num_heads * decoder.head_dim * pairs
    in_kernel = 0.0
    if decoder.attention == "splash":
        forwards = 2 if decoder.remat == "full" else 1
        in_kernel = (forwards * FORWARD + KERNEL_BACKWARD) * per_pair
    return compile_program(
        "train step",
        step,
        (abstract_like(state, shardings), batch, coefficients),
        num_devices=mesh.size,
        extra_flops=in_kernel,
        useful_flops=2 * products * tokens + (FORWARD + USEFUL_BACKWARD) * per_pair,
        unknown_trips=num_micro_batches,
    )


def num_matrix_params(params: Params, decoder: DecoderConfig) -> int:
    """Parameters that a token is multiplied with."""
    flat = jax.tree_util.tree_flatten_with_path(params)[0]
    shapes = {path[-1].key: x.shape for path, x in flat}
    return sum(
        math.prod(shape)
        for name, shape in shapes.items()
        if (len(shape) > 2 and not name.endswith("bias"))
        or name == ("embedding" if decoder.tied_embeddings else "unembedding")
    )


def plan_sampling(config: Config, decoder: DecoderConfig, mesh: Mesh) -> tuple[Program, Program]:
    """Prefill of full chunks, and a segment of decoding, all slots and all of the cache in view; of one replica."""
    s = config.sampling
    row = mesh.devices.reshape(-1, mesh.shape[TENSOR_AXIS])[0]
    replica = Mesh(row, (TENSOR_AXIS,), axis_types=(AxisType.Auto,))
    layout = choose_layout(decoder, replica)
    programs = make_programs(
        decoder, replica, layout, segment_len=s.segment_len, eos_ids=[0], with_truncation=False
    )
    capacity = config.longest_rollout_len
    shapes = jax.eval_shape(
        lambda: init_state(
            decoder,
            layout,
            num_contexts=s.num_contexts,
            num_slots=s.num_slots,
            cache_len=capacity,
            max_new=s.max_completion_length,
        )
    )
    contexts, slots = abstract_like(shapes, state_shardings(replica))
    params = abstract_params(decoder)
    params = jax.tree.map(
        lambda x, dtype: jax.ShapeDtypeStruct(x.shape, dtype),
        params,
        sampling_dtypes(params, decoder),
    )
    params = abstract_like(params, param_shardings(params, replica, SAMPLING_RULES))
    num_rows = min(MAX_PREFILL_ROWS, max(1, s.prefill_tokens // 512))
    length = s.prefill_tokens // num_rows
    everywhere = NamedSharding(replica, P())
    ints = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.int32, sharding=everywhere)
    batch = PrefillBatch(ints(num_rows), ints(num_rows), ints(num_rows, length), ints(num_rows))
    prefill = compile_program(
        "prefill", programs.prefill, (params, contexts, batch), num_devices=replica.size
    )
    held = [contexts]
    decode_params = params
    if programs.convert_weights:  # beside them
        held.append(params["layers"])
        decode_params = {**params, "layers": programs.convert_weights.eval_shape(params["layers"])}
    decode = compile_program(
        f"decode {s.segment_len} tokens",
        programs.decode_segment,
        (decode_params, slots),
        {"num_slots": s.num_slots, "view_len": capacity},
        num_devices=replica.size,
        unknown_trips=s.segment_len,
    )
    held_bytes = sum(device_bytes(x) for x in jax.tree.leaves(held))
    return prefill, dataclasses.replace(decode, arguments=decode.arguments + held_bytes)


def compile_program(
    name: str,
    jitted: Any,
    arguments: tuple,
    options: dict[str, Any] | None = None,
    *,
    num_devices: int,
    extra_flops: float = 0.0,
    useful_flops: float | None = None,
    unknown_trips: int = 1,
) -> Program:
    """Compiles for where the arguments lie.

    Args:
      extra_flops: of kernels, over all devices.
      useful_flops: over all devices; None for all that are executed.
      unknown_trips: of loops whose length is data.

    Raises:
      DoesNotFit: if the compiler says so itself.
    """
    traced = jitted.trace(*arguments, **(options or {}))
    started = time.monotonic()
    try:
        compiled = traced.lower().compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise DoesNotFit(f"{name}: {str(error).splitlines()[0]}") from error
    seconds = time.monotonic() - started
    memory: Any = compiled.memory_analysis()
    flops = matmul_flops(traced.jaxpr, unknown_trips=unknown_trips) + extra_flops
    return Program(
        name=name,
        arguments=memory.argument_size_in_bytes,
        temporaries=memory.temp_size_in_bytes
        + max(0, memory.output_size_in_bytes - memory.alias_size_in_bytes),
        flops=flops / num_devices,
        useful_flops=(flops if useful_flops is None else useful_flops) / num_devices,
        traffic=traffic(compiled.as_text() or "", unknown_trips=unknown_trips),
        compile_secs=seconds,
    )


def abstract_batch(num_micro_batches: int, num_rows: int, row_len: int, mesh: Mesh) -> TrainBatch:
    rows, everywhere = batch_sharding(mesh), NamedSharding(mesh, P())
    array = lambda dtype: jax.ShapeDtypeStruct(
        (num_micro_batches, num_rows, row_len), dtype, sharding=rows
    )
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
    )


def device_bytes(x: jax.ShapeDtypeStruct) -> float:
    assert x.sharding is not None
    return math.prod(x.sharding.shard_shape(x.shape)) * np.dtype(x.dtype).itemsize


def show_plan(plan: dict[str, Any], console: Console) -> None:
    title = (
        f"{plan['topology']}, mesh {plan['mesh']}: {plan['num_params'] / 1e9:.2f}B parameters, rows of "
        f"{plan['row_len']} tokens, attention {plan['attention']}; on one device"
    )
    if plan["programs"]:
        show_programs(title, plan, console)
    else:
        console.print(f"{title}\n{plan['reason']}")
    for advice in plan["advice"]:
        console.print(f"does not fit; try {advice}")


def show_programs(title: str, plan: dict[str, Any], console: Console) -> None:
    programs = plan["programs"]
    table = Table(title=title, title_justify="left")
    table.add_column("")
    for name in programs:
        table.add_column(name, justify="right")

    def row(name: str, text: Callable[[dict[str, Any]], str]) -> None:
        table.add_row(name, *(text(p) for p in programs.values()))

    row("arguments", lambda p: f"{p['arguments'] / GIB:,.2f} GiB")
    row("temporaries", lambda p: f"{p['temporaries'] / GIB:,.2f} GiB")
    row("FLOPs", lambda p: f"{p['flops']:.3g}")
    row("memory traffic", lambda p: f"{p['traffic']['memory'] / GIB:,.1f} GiB")
    for kind in sorted({k for p in programs.values() for k in p["traffic"]["collectives"]}):
        moved = lambda p, kind=kind: p["traffic"]["collectives"].get(kind, 0.0)
        row(kind, lambda p, moved=moved: f"{moved(p) / GIB:,.2f} GiB" if moved(p) else "")
    if "memory" in plan:
        for kind in ("compute", "memory", "interconnect"):
            row(f"{kind} alone", lambda p, kind=kind: f"{p['bounds_secs'][kind]:.3g} s")
        row("bound by", lambda p: p["bound_by"])
        row("MFU at most", lambda p: f"{p['mfu_bound']:.0%}")
    row("compiled in", lambda p: f"{p['compile_secs']:.0f} s")
    console.print(table)
    for phase in ("training", "sampling"):
        size = plan[f"{phase}_bytes"]
        of = f" of {plan['memory'] / GIB:.0f} GiB" if "memory" in plan else ""
        console.print(f"{phase}: {size / GIB:.2f}{of or ' GiB'}")


def show_comparison(plans: Sequence[dict[str, Any]], console: Console) -> None:
    table = Table(title="compared", title_justify="left")
    for i, column in enumerate(
        ("topology", "fits", "training", "sampling", "train step >=", "bound by", "MFU <=")
    ):
        table.add_column(column, justify="left" if i == 0 else "right")
    for plan in plans:
        if not plan["programs"]:
            table.add_row(plan["topology"], "no")
            continue
        step = plan["programs"]["train step"]
        bounds = step.get("bounds_secs")
        table.add_row(
            plan["topology"],
            {True: "yes", False: "no", None: "?"}[plan["fits"]],
            f"{plan['training_bytes'] / GIB:.1f} GiB",
            f"{plan['sampling_bytes'] / GIB:.1f} GiB",
            f"{max(bounds.values()):.1f} s" if bounds else "",
            step.get("bound_by", ""),
            f"{step['mfu_bound']:.0%}" if bounds else "",
        )
    console.print(table)


if __name__ == "__main__":
    as_command(main)
