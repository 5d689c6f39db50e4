"""One replica of the sampler: slots on the devices of one copy of the weights, and the queue before them.

Whenever slots are free, waiting requests are admitted: a context (prompt and expert prefix) is run through the
model once, as far as no context before it began alike (`contexts.py`), and its keys and values are copied to every
slot that starts there. Then a segment of tokens is decoded for all slots at once (`decode.py`), finished rows leave,
and so on. A segment ends early once enough rows are done, as others may wait for their places; when none do, the
rows at work move to the lowest slots, so that fewer are computed. Requests of an earlier step go first: where they
lack slots, rows of a later one are put back into the queue with their tokens so far.

The last context token is not prefilled: it is the first token fed to the decode step, so that every token is
sampled by the same code.
"""

import dataclasses
import heapq
import itertools
import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from trapo_jax.models import DecoderConfig
from trapo_jax.sampling.contexts import (
    ContextTable,
    Piece,
    batches,
    power_of_2,
)
from trapo_jax.sampling.decode import (
    STARTING_DTYPES,
    Starting,
    decoder_of_slots,
    empty_state,
    make_programs,
    state_shardings,
)
from trapo_jax.types import Completion, FinishReason, SamplingParams

SHORTEST_COPY = 16  # a context is copied to a slot in this many positions, or twice, four times ...
# A decode segment computes so many slots, and looks at so many positions of the cache, or twice, four times ...
FEWEST_SLOTS, SHORTEST_VIEW = 2, 256
FETCHED_SLOTS = 8


@dataclasses.dataclass(frozen=True)
class EngineCounters:
    """What an engine has done so far.

    Attributes:
      prefilled_tokens: tokens of contexts run through the model.
      decoded_tokens: tokens sampled.
      decode_steps: passes through the model that sampled them, a token a slot each.
      slot_tokens: tokens that as many decode steps could have sampled with every slot they computed active.
    """

    prefilled_tokens: int = 0
    decoded_tokens: int = 0
    decode_steps: int = 0
    slot_tokens: int = 0

    @property
    def slot_utilization(self) -> float:
        return self.decoded_tokens / max(1, self.slot_tokens)

    def __add__(self, other: "EngineCounters") -> "EngineCounters":
        return self._by_field(operator.add, other)

    def __sub__(self, other: "EngineCounters") -> "EngineCounters":
        return self._by_field(operator.sub, other)

    def _by_field(self, operation: Callable[[int, int], int], other: "EngineCounters"):
        pairs = zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)
        return EngineCounters(*(operation(a, b) for a, b in pairs))


class Waiting(NamedTuple):
    """A request in the queue, or at work."""

    so_far: Completion  # what was sampled for it before
    step: int  # part of its random key
    params: SamplingParams
    budget: int  # tokens that may be sampled, those before among them


class Replica:
    """Samples on one group of devices.

    Args:
      config: the decoder's shape.
      mesh: the devices, along the axis `tp`.
      num_slots, max_prompt_length, max_completion_length, segment_len, num_contexts, prefill_tokens, eos_ids,
        seed, with_truncation: see `JaxEngine`.
    """

    def __init__(
        self,
        config: DecoderConfig,
        mesh: Mesh,
        *,
        num_slots: int,
        max_prompt_length: int,
        max_completion_length: int,
        segment_len: int,
        num_contexts: int,
        prefill_tokens: int,
        eos_ids: Sequence[int],
        seed: int,
        with_truncation: bool,
    ):
        self.mesh = mesh
        self.counters = EngineCounters()
        self._seed = np.uint32(seed)
        self._eos_ids = frozenset(eos_ids)
        self._prefill_tokens = prefill_tokens
        self._segment_len = segment_len
        # A heap by step, and in the order of submission.
        self._waiting: list[tuple[int, int, Waiting]] = []
        self._num_submitted = itertools.count()
        self._running: dict[int, Waiting] = {}
        self._params: Any = None
        self._decode_params: Any = None  # the same, as decoding takes them
        self._table = ContextTable(num_contexts)
        self._cached_lens = np.zeros(num_slots, np.int32)  # as on the device
        self._free = list(range(num_slots))  # a heap: the lowest is taken first
        self._capacity = capacity = max_prompt_length + max_completion_length
        # Of layers apart a slot's cache is looked at as far as it is filled.
        self._shortest_view = (
            capacity if decoder_of_slots(config, mesh).layers == "apart" else SHORTEST_VIEW
        )
        init = lambda: empty_state(
            config,
            mesh,
            num_contexts=num_contexts,
            num_slots=num_slots,
            cache_len=capacity,
            max_new=max_completion_length,
        )
        self._init = jax.jit(init, out_shardings=state_shardings(mesh))
        self._shapes = jax.eval_shape(init)
        self._contexts: Any = None
        self._slots: Any = None
        self._cache_extent: dict[str, int] | None = None  # of turned layers; None for all
        self._programs = make_programs(
            config,
            mesh,
            segment_len=segment_len,
            eos_ids=eos_ids,
            with_truncation=with_truncation,
        )

    @property
    def is_busy(self) -> bool:
        return bool(self._waiting or self._running)

    @property
    def num_requests(self) -> int:
        """Queued or running."""
        return len(self._waiting) + len(self._running)

    @property
    def num_idle_slots(self) -> int:
        return max(0, len(self._cached_lens) - self.num_requests)

    @property
    def num_compiled(self) -> int:
        return sum(program._cache_size() for program in self._programs if program)

    @property
    def cache_bytes(self) -> int:
        """Memory for keys and values on each of its devices."""
        contexts, slots = self._shapes
        leaves = jax.tree.leaves((contexts, slots.cache))
        return sum(x.size * x.dtype.itemsize for x in leaves) // self.mesh.size

    def update_weights(self, params: Any) -> None:
        """Samples from these weights, which lie on its devices; nothing cached of the old ones is used."""
        if self._contexts is None:
            self._contexts, self._slots = self._init()
            self._cache_extent = None
        self._params = params
        self._decode_params = params
        if self._programs.lay_out:
            self._decode_params = {**params, "layers": self._programs.lay_out(params["layers"])}
        self._table.clear()

    def drop_weights(self) -> None:
        self._params = self._decode_params = None

    def release(self) -> list[Completion]:
        """Lets go of the weights and the cache; returns what is unfinished, what has most tokens first."""
        self._put_back(list(self._running))
        unfinished = [waiting.so_far for _, _, waiting in sorted(self._waiting)]
        self._waiting.clear()
        self.drop_weights()
        self._contexts = self._slots = None
        return sorted(unfinished, key=lambda so_far: -len(so_far.token_ids))

    def submit(self, waiting: Waiting) -> None:
        heapq.heappush(self._waiting, (waiting.step, next(self._num_submitted), waiting))

    def advance(self) -> list[Completion]:
        """Admits who can be admitted, decodes one segment, and returns what finished."""
        self._make_room()
        while self._waiting and self._free:
            self._admit_wave()
        self._close_ranks()
        extent = self._fit_cache()
        self._slots, num_steps, num_tokens = self._programs.decode_segment(
            self._decode_params, self._slots, **extent
        )
        s = self._slots
        active, num_new, cached_lens, num_steps, num_tokens = jax.device_get(
            (s.active, s.num_new, s.cached_lens, num_steps, num_tokens)
        )
        self._cached_lens = np.array(cached_lens)
        self.counters += EngineCounters(
            decoded_tokens=int(num_tokens),
            decode_steps=int(num_steps),
            slot_tokens=int(num_steps) * extent["num_slots"],
        )
        finished = [slot for slot in self._running if not active[slot]]
        return self._leave(finished, num_new) if finished else []

    def _extent(self) -> dict[str, int]:
        """The slots at work, and the positions of the cache that the next segment can reach."""
        longest = max(int(self._cached_lens[slot]) for slot in self._running) + self._segment_len
        num_slots = _rounded_slots(max(self._running) + 1)
        return {
            "num_slots": min(len(self._cached_lens), num_slots),
            "view_len": min(self._capacity, power_of_2(max(self._shortest_view, longest))),
        }

    def _fit_cache(self) -> dict[str, int]:
        """Gives turned layers' cache the size that the next segment looks at: a CPU would copy a slice of a larger one at
        every step. Returns that size."""
        extent = self._extent()
        if self._programs.resize_cache and extent != self._cache_extent:
            self._slots = self._programs.resize_cache(self._slots, **extent)
            self._cache_extent = extent
        return extent

    def _close_ranks(self) -> None:
        """Moves those at work to the lowest slots, where that lets the decode step compute fewer of them."""
        num_slots = _rounded_slots(len(self._running))
        beyond = sorted(slot for slot in self._running if slot >= num_slots)
        if not beyond:
            return
        pairs = [(slot, heapq.heappop(self._free)) for slot in beyond]
        for old, new in pairs:
            self._running[new] = self._running.pop(old)
            self._cached_lens[new] = self._cached_lens[old]
            heapq.heappush(self._free, old)
        num_all = len(self._cached_lens)
        fill = [(0, num_all)] * (num_all - len(pairs))
        from_slots, to_slots = np.array([*pairs, *fill], np.int32).T
        self._slots = self._programs.move_slots(
            self._slots, from_slots, to_slots, np.int32(len(pairs))
        )

    def _make_room(self) -> None:
        """Takes as many slots from later steps as those waiting of the earliest lack."""
        if not self._waiting:
            return
        first, _, _ = self._waiting[0]
        later = [slot for slot, waiting in self._running.items() if waiting.step > first]
        if later:
            num_first = sum(step == first for step, _, _ in self._waiting)
            later.sort(key=lambda slot: self._cached_lens[slot])  # the least to compute anew
            self._put_back(later[: max(0, num_first - len(self._free))])

    def _put_back(self, slots: Sequence[int]) -> None:
        """Those at work in slots wait again, with the tokens so far."""
        if not slots:
            return
        were = [self._running[slot] for slot in slots]
        so_far = self._leave(slots, jax.device_get(self._slots.num_new))
        for waiting, completion in zip(were, so_far, strict=True):
            self.submit(waiting._replace(so_far=completion))

    def _leave(self, slots: Sequence[int], num_new: np.ndarray) -> list[Completion]:
        """Completions of slots, which are free again."""
        tokens, logprobs = self._fetch(slots)
        completions = []
        for i, slot in enumerate(slots):
            so_far, _, _, budget = self._running.pop(slot)
            heapq.heappush(self._free, slot)
            length = num_new[slot]
            token_ids = so_far.token_ids + tuple(tokens[i, :length].tolist())
            if token_ids and token_ids[-1] in self._eos_ids:
                reason = FinishReason.STOP
            elif len(token_ids) == budget:
                reason = FinishReason.LENGTH
            else:
                reason = FinishReason.UNFINISHED
            completions.append(
                Completion(
                    request=so_far.request,
                    token_ids=token_ids,
                    logprobs=so_far.logprobs + tuple(logprobs[i, :length].tolist()),
                    finish_reason=reason,
                )
            )
        return completions

    def _fetch(self, slots: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and logprobs of slots, so many at a time that one program does."""
        parts = []
        for start in range(0, len(slots), FETCHED_SLOTS):
            wanted = slots[start : start + FETCHED_SLOTS]
            rows = np.zeros(FETCHED_SLOTS, np.int32)
            rows[: len(wanted)] = wanted
            part = jax.device_get(self._programs.read_rows(self._slots, rows))
            parts.append([x[: len(wanted)] for x in part])
        tokens, logprobs = (np.concatenate(x) for x in zip(*parts, strict=True))
        return tokens, logprobs

    def _admit_wave(self) -> None:
        """Admits waiting requests, as many as there are free slots and rows for their contexts."""
        self._table.unpin()
        pieces: dict[int, Piece] = {}
        starting: list[Starting] = []
        rows: list[int] = []
        while self._waiting and self._free:
            _, _, waiting = self._waiting[0]
            request, params = waiting.so_far.request, waiting.params
            context = request.problem.prompt_ids + request.prefix_ids + waiting.so_far.token_ids
            # The last token of a context is the first that is decoded.
            found = self._table.find(request.problem.id, context[:-1])
            if found is None:
                break
            heapq.heappop(self._waiting)
            if found.copy is not None:
                if found.copy[0] in pieces:  # what is copied must be there
                    self._run_pieces(pieces)
                self._contexts = self._programs.copy_context(self._contexts, *found.copy)
            if found.piece is not None:
                before = pieces.get(found.row)
                pieces[found.row] = _joined(before, found.piece) if before else found.piece
            slot = heapq.heappop(self._free)
            self._running[slot] = waiting
            rows.append(found.row)
            starting.append(
                Starting(
                    slot=slot,
                    cached_len=len(context) - 1,
                    last_token=context[-1],
                    max_new=waiting.budget - len(waiting.so_far.token_ids),
                    temperature=params.temperature,
                    top_p=params.top_p,
                    top_k=params.top_k,
                    step=waiting.step,
                    problem_key=request.problem.key,
                    sample_index=request.sample_index,
                )
            )
        self._run_pieces(pieces)
        self._start_slots(rows, starting)

    def _run_pieces(self, pieces: dict[int, Piece]) -> None:
        """Computes what contexts lack, and empties `pieces`."""
        for batch in batches(pieces.values(), self._prefill_tokens):
            self._contexts = self._programs.prefill(self._params, self._contexts, batch)
            self.counters += EngineCounters(prefilled_tokens=int(batch.lens.sum()))
        pieces.clear()

    def _start_slots(self, rows: Sequence[int], starting: Sequence[Starting]) -> None:
        """Copies contexts to slots and sets these going. Shapes are fixed but for the length copied."""
        for start in starting:
            self._cached_lens[start.slot] = start.cached_len
        self._fit_cache()
        num_slots = len(self._cached_lens)
        num_idle = num_slots - len(starting)
        # Its slot is out of range: dropped.
        nobody = Starting(num_slots, 0, 0, 1, 1.0, 1.0, 0, 0, 0, 0)
        columns = zip(*starting, *[nobody] * num_idle, strict=True)
        arrays = (np.asarray(c, dtype) for c, dtype in zip(columns, STARTING_DTYPES, strict=True))
        longest = max(SHORTEST_COPY, *(s.cached_len for s in starting))
        self._slots = self._programs.start_slots(
            self._slots,
            self._contexts,
            np.array([*rows, *[0] * num_idle], np.int32),
            np.int32(len(starting)),
            self._seed,
            Starting(*arrays),
            copied_len=min(self._capacity, power_of_2(longest)),
        )


def _rounded_slots(number: int) -> int:
    """Slots that the decode step computes for so many at work: there is a program for each outcome."""
    return power_of_2(max(FEWEST_SLOTS, number))


def _joined(piece: Piece, continuation: Piece) -> Piece:
    """Two pieces of a row, one behind the other, as one."""
    return piece._replace(token_ids=piece.token_ids + continuation.token_ids)
