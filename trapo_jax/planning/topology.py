"""Finds the devices to plan for: TPU topologies described by libtpu, and simulated host devices."""

import contextlib
import dataclasses
import importlib.util
import math
import os
import re
from collections.abc import Sequence
from typing import Any

import jax
from jax.experimental import topologies

from trapo_jax.distributed.log_level import LIBTPU_ENVIRONMENT
from trapo_jax.types import UserError

GIB = 2**30
HOST = "cpu"
MAX_DEVICES = 2**14  # More than the largest slice of a TPU pod.


@dataclasses.dataclass(frozen=True)
class Chip:
    """Published specifications of a device.

    Attributes:
      memory: size in bytes.
      flops: bfloat16 FLOPs per second.
      memory_bandwidth: bytes per second.
      link_bandwidth: bytes per second over one link to a neighbor, in one direction.
      ring_multiple: a topology dimension is a ring if its size is a multiple of this, otherwise a line.
    """

    memory: float
    flops: float
    memory_bandwidth: float
    link_bandwidth: float
    ring_multiple: int


# From cloud.google.com/tpu/docs/v5e, /v5p and /v6e. The link bandwidth is a chip's interconnect bandwidth divided by
# its number of links, which is 6 on v5p and 4 on the others.
CHIPS = {
    "v5e": Chip(16 * GIB, 197e12, 819e9, 50e9, ring_multiple=16),
    "v5p": Chip(95 * GIB, 459e12, 2765e9, 100e9, ring_multiple=4),
    "v6e": Chip(32 * GIB, 918e12, 1600e9, 100e9, ring_multiple=16),
}


@dataclasses.dataclass(frozen=True)
class Topology:
    """Devices to plan for.

    Attributes:
      name: `CHIP:SHAPE`.
      chip: specifications of a device; None for host devices, which have no published specifications.
      dims: number of devices along each dimension.
      devices: the devices, or device descriptions to compile for.
    """

    name: str
    chip: Chip | None
    dims: tuple[int, ...]
    devices: Sequence[Any]

    @property
    def interconnect_bandwidth(self) -> float:
        """The bytes per second that a device can receive.

        Along a ring, a device has two links. A device at the end of a line has only one.
        """
        assert self.chip
        links = sum(2 if n % self.chip.ring_multiple == 0 else 1 for n in self.dims if n > 1)
        return links * self.chip.link_bandwidth


def find_topology(name: str) -> Topology:
    """Returns the topology named `CHIP:SHAPE`, for example `v5p:2x2x4` or `cpu:8`.

    Raises:
      UserError: if the name does not have this form, or there is no compiler for these devices.
    """
    found = re.fullmatch(r"(\w+):(\d+(?:x\d+)*)", name)
    if not found or found[1] not in {*CHIPS, HOST}:
        raise UserError(
            f"--topology {name}: expected {', '.join(CHIPS)} or {HOST}, a colon and a shape"
        )
    kind, dims = found[1], tuple(int(n) for n in found[2].split("x"))
    if not all(dims):
        raise UserError(f"--topology {name}: every number in the shape must be at least 1")
    if math.prod(dims) > MAX_DEVICES:
        raise UserError(f"--topology {name}: more than {MAX_DEVICES:,} devices")
    if kind == HOST:
        return Topology(name, None, dims, _host_devices(name, math.prod(dims)))
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(
            f'--topology {name}: needs the TPU compiler; install it with pip install "trapo_jax[tpu]"'
        )
    os.environ.update(LIBTPU_ENVIRONMENT)
    try:
        described = topologies.get_topology_desc(name, platform="tpu")
    except Exception as error:  # libtpu raises exceptions of several types.
        reason = str(error).splitlines()[0][:200]
        raise UserError(
            f"--topology {name}: libtpu does not know this topology ({reason})"
        ) from error
    return Topology(name, CHIPS[kind], dims, described.devices)


def _host_devices(name: str, count: int) -> Sequence[Any]:
    with contextlib.suppress(RuntimeError):  # Raised if JAX has already created its devices.
        jax.config.update("jax_platforms", HOST)
        jax.config.update("jax_num_cpu_devices", count)
    if jax.device_count() != count:
        raise UserError(
            f"--topology {name}: JAX already uses a different number of host devices ({jax.device_count()}); run the "
            "command once per topology"
        )
    return jax.devices()
