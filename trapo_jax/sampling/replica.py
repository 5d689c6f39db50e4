"""Implements one replica of the sampler: the devices that hold one copy of the weights, and their slots.

The slot scheduler (`slots.py`) decides which requests run in which slots. The replica executes these decisions on the
devices, one segment of tokens at a time: it prefills contexts, copies them to slots, decodes, and reads the sampled
tokens.
"""

import os
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from trapo_jax.sampling.engine import EngineSpec, EngineStats
from trapo_jax.sampling.prefix_cache import ContextCopy, batch_chunks, next_power_of_2
from trapo_jax.sampling.programs import choose_layout, init_state, make_programs, state_shardings
from trapo_jax.sampling.slots import (
    Admission,
    CacheExtent,
    PendingRequest,
    Sampled,
    SlotScheduler,
    SlotStart,
)
from trapo_jax.types import Completion, UserError

# Minimum number of positions copied from a context to a slot; larger numbers are this times a power of 2.
MIN_COPY_LEN = 16
# Minimum number of cache positions read by a decode segment; larger numbers are this times a power of 2.
MIN_VIEW_LEN = 256
SLOTS_PER_READ = 8
# `step` returns after this many prefills of `prefill_tokens` tokens, so that the caller can report progress or stop.
PREFILLS_PER_STEP = 4
SLOT_START_DTYPES = SlotStart(
    slot=np.int32,
    cached_len=np.int32,
    last_token=np.int32,
    max_new=np.int32,
    temperature=np.float32,
    top_p=np.float32,
    top_k=np.int32,
    step=np.uint32,
    problem_key=np.uint32,
    sample_index=np.uint32,
)


class Replica:
    """Samples on one group of devices.

    Args:
      spec: the engine's specification. Its mesh is not used.
      mesh: the devices of this replica, along the axis `tp`.
    """

    def __init__(self, spec: EngineSpec, mesh: Mesh):
        self.mesh = mesh
        self.stats = EngineStats()
        self._seed = np.uint32(spec.seed)
        self._prefill_tokens = spec.prefill_tokens
        self._cache_len = cache_len = spec.max_prompt_length + spec.max_completion_length
        self._params: Any = None
        self._decode_params: Any = None  # the same weights in the layout for decoding
        self._layout = layout = choose_layout(spec.decoder, mesh)
        self._scheduler = SlotScheduler(
            num_slots=spec.num_slots,
            num_contexts=spec.num_contexts,
            cache_len=cache_len,
            segment_len=spec.segment_len,
            min_view_len=cache_len if layout.reads_filled_only else MIN_VIEW_LEN,
            eos_ids=spec.eos_ids,
        )
        # `init` does not capture `self`: the reference cycle would keep the arrays of a deleted engine alive.
        init = lambda: init_state(
            spec.decoder,
            layout,
            num_contexts=spec.num_contexts,
            num_slots=spec.num_slots,
            cache_len=cache_len,
            max_new=spec.max_completion_length,
        )
        self._shapes = jax.eval_shape(init)
        self._check_memory(spec)
        self._init = jax.jit(init, out_shardings=state_shardings(mesh, layout))
        self._contexts: Any = None
        self._slots: Any = None
        self._cache_extent: CacheExtent | None = None  # None if the cache has its full size
        self._admission: Admission | None = None  # the wave whose slots have not been started
        self._prefills: Iterator[int] | None = None  # the prefills that precede the next segment
        self._programs = make_programs(
            spec.decoder,
            mesh,
            layout,
            segment_len=spec.segment_len,
            eos_ids=tuple(spec.eos_ids),
            with_truncation=spec.with_truncation,
        )

    def _check_memory(self, spec: EngineSpec) -> None:
        """Checks that keys and values fit in device memory, before anything is allocated."""
        needed, available = self.kv_cache_bytes, _memory_bytes(self.mesh.devices.flat[0])
        if available is not None and needed > available:
            raise UserError(
                f"sampling.num_slots={spec.num_slots}: the keys and values of {spec.num_slots:,} slots and "
                f"{spec.num_contexts:,} contexts of {self._cache_len:,} tokens need {needed / 2**30:,.1f} GiB on each "
                f"device, but a device has only {available / 2**30:,.1f} GiB; lower sampling.num_slots, "
                "sampling.num_contexts, or sampling.max_completion_length"
            )

    @property
    def is_busy(self) -> bool:
        return self._scheduler.is_busy

    @property
    def num_requests(self) -> int:
        """Number of queued or running requests."""
        return self._scheduler.num_requests

    @property
    def num_idle_slots(self) -> int:
        return self._scheduler.num_idle_slots

    @property
    def num_compiled(self) -> int:
        return sum(program._cache_size() for program in self._programs if program)

    @property
    def kv_cache_bytes(self) -> int:
        """Size of the keys and values on each device, in bytes."""
        contexts, slots = self._shapes
        leaves = jax.tree.leaves((contexts, slots.cache))
        return sum(x.size * x.dtype.itemsize for x in leaves) // self.mesh.size

    def update_weights(self, params: Any) -> None:
        """Replaces the weights, which must be on the replica's devices, and invalidates the prefix cache."""
        if self._contexts is None:
            self._contexts, self._slots = self._init()
            self._cache_extent = None
        self._params = params
        self._decode_params = params
        if self._programs.convert_weights:
            layers = self._programs.convert_weights(params["layers"])
            self._decode_params = {**params, "layers": layers}
        self._scheduler.clear_contexts()

    def drop_weights(self) -> None:
        self._params = self._decode_params = None

    def release(self) -> list[Completion]:
        """Frees the weights and the cache, and returns the partial completions, longest first."""
        if self._admission:
            slots = [start.slot for start in self._admission.starts]
            self._scheduler.preempt(slots, [((), ())] * len(slots))
        self._admission = self._prefills = None
        self._preempt(self._scheduler.running_slots)
        self.drop_weights()
        self._contexts = self._slots = None
        return self._scheduler.drain()

    def submit(self, request: PendingRequest) -> None:
        self._scheduler.submit(request)

    def step(self) -> list[Completion]:
        """Admits requests, decodes one segment, and returns the finished completions.

        If the prefill is long, later calls complete it and decode the segment.
        """
        if self._prefills is None:
            self._preempt(self._scheduler.slots_to_preempt())
            self._prefills = self._admit()
        num_tokens = 0
        for num_prefilled in self._prefills:
            num_tokens += num_prefilled
            if num_tokens >= PREFILLS_PER_STEP * self._prefill_tokens:
                jax.block_until_ready(self._contexts)
                return []
        self._prefills = None
        self._move_slots(self._scheduler.compact())
        extent = self._resize_cache()
        self._slots, num_steps, num_tokens = self._programs.decode_segment(
            self._decode_params, self._slots, **extent._asdict()
        )
        s = self._slots
        active, num_new, cached_lens, num_steps, num_tokens = jax.device_get(
            (s.active, s.num_new, s.cached_lens, num_steps, num_tokens)
        )
        self._scheduler.update_lens(cached_lens)
        self.stats += EngineStats(
            decoded_tokens=int(num_tokens),
            decode_steps=int(num_steps),
            slot_tokens=int(num_steps) * extent.num_slots,
        )
        finished = [slot for slot in self._scheduler.running_slots if not active[slot]]
        return self._scheduler.retire(finished, self._read_sampled(finished, num_new))

    def _preempt(self, slots: Sequence[int]) -> None:
        if slots:
            num_new = jax.device_get(self._slots.num_new)
            self._scheduler.preempt(slots, self._read_sampled(slots, num_new))

    def _read_sampled(self, slots: Sequence[int], num_new: np.ndarray) -> list[Sampled]:
        """Reads the sampled tokens of a fixed number of slots at a time, so that one compiled program suffices."""
        sampled: list[Sampled] = []
        for start in range(0, len(slots), SLOTS_PER_READ):
            group = slots[start : start + SLOTS_PER_READ]
            rows = np.zeros(SLOTS_PER_READ, np.int32)
            rows[: len(group)] = group
            tokens, logprobs = jax.device_get(self._programs.read_slots(self._slots, rows))
            for i, slot in enumerate(group):
                length = num_new[slot]
                sampled.append((tokens[i, :length].tolist(), logprobs[i, :length].tolist()))
        return sampled

    def _admit(self) -> Iterator[int]:
        """Admits requests, updates the prefix cache, and starts the requests' slots.

        Yields the size of every prefill in tokens, including padding.
        """
        while admission := self._scheduler.admit():
            self._admission = admission
            for update in admission.context_updates:
                if isinstance(update, ContextCopy):
                    self._contexts = self._programs.copy_context(self._contexts, *update)
                    continue
                for batch in batch_chunks(update, self._prefill_tokens):
                    self._contexts = self._programs.prefill(self._params, self._contexts, batch)
                    self.stats += EngineStats(prefilled_tokens=int(batch.lens.sum()))
                    yield batch.token_ids.size
            self._start(admission)
            self._admission = None

    def _start(self, admission: Admission) -> None:
        """Copies contexts to slots and starts the slots.

        Array shapes are constant; only the static `copied_len` varies.
        """
        self._resize_cache()
        starts, num_slots = admission.starts, self._scheduler.num_slots
        num_padding = num_slots - len(starts)
        padding = SlotStart(num_slots, 0, 0, 1, 1.0, 1.0, 0, 0, 0, 0)  # out of range, so dropped
        columns = zip(*starts, *[padding] * num_padding, strict=True)
        arrays = map(np.asarray, columns, SLOT_START_DTYPES)
        max_len = max(MIN_COPY_LEN, *(start.cached_len for start in starts))
        self._slots = self._programs.start_slots(
            self._slots,
            self._contexts,
            np.array([*admission.context_rows, *[0] * num_padding], np.int32),
            np.int32(len(starts)),
            self._seed,
            SlotStart(*arrays),
            copied_len=min(self._cache_len, next_power_of_2(max_len)),
        )

    def _move_slots(self, moves: Sequence[tuple[int, int]]) -> None:
        if not moves:
            return
        num_slots = self._scheduler.num_slots
        padding = [(0, num_slots)] * (num_slots - len(moves))
        from_slots, to_slots = np.array([*moves, *padding], np.int32).T
        self._slots = self._programs.move_slots(
            self._slots, from_slots, to_slots, np.int32(len(moves))
        )

    def _resize_cache(self) -> CacheExtent:
        """Returns the cache extent of the next segment, after resizing the cache to it if the layout requires that."""
        extent = self._scheduler.extent()
        if self._layout.needs_resize and extent != self._cache_extent:
            self._slots = self._programs.resize_cache(self._slots, **extent._asdict())
            self._cache_extent = extent
        return extent


def _memory_bytes(device: Any) -> int | None:
    """Returns a device's memory size in bytes; for a CPU, the machine's memory size. Returns None if it is unknown."""
    if device.platform == "cpu":
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return (device.memory_stats() or {}).get("bytes_limit")
