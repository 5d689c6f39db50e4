"""Schedules slots: decides which requests run, in which slots, and from which cached contexts.

The scheduler makes the decisions, and the replica executes them. Between two decode segments, the scheduler tells the
replica which running requests to preempt, which pending requests to admit (in waves), how to compact running requests
into the lowest slots, and how many slots and cache positions the next segment must process. After the segment, the
replica reports the lengths and the sampled tokens. This module does not import JAX.

Requests from earlier training steps take priority: if there are too few slots for them, requests from later steps are
preempted. A preempted request is queued again with the tokens sampled so far, and sampling later continues after these
tokens.
"""

import heapq
import itertools
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from trapo_jax.sampling.prefix_cache import (
    ContextTable,
    ContextUpdate,
    next_power_of_2,
    order_updates,
)
from trapo_jax.types import Completion, FinishReason, SamplingParams

# The number of slots that a decode segment computes is this number times a power of 2. A program is compiled for each
# number of slots.
MIN_DECODE_SLOTS = 2

Sampled = tuple[Sequence[int], Sequence[float]]  # token ids and logprobs of one slot


class PendingRequest(NamedTuple):
    """A request that is queued or running.

    Attributes:
      partial: the tokens sampled before the request was assigned its slot.
      step: the training step; part of the random key.
      params: sampling parameters.
      max_tokens: maximum number of sampled tokens, including the tokens in `partial`.
    """

    partial: Completion
    step: int
    params: SamplingParams
    max_tokens: int


class SlotStart(NamedTuple):
    """The initial state of a slot. On the device, each field is an array."""

    slot: Any
    cached_len: Any
    last_token: Any  # the input of the first decode step
    max_new: Any
    temperature: Any
    top_p: Any
    top_k: Any
    step: Any
    problem_key: Any
    sample_index: Any


class Admission(NamedTuple):
    """A wave of requests that are assigned to slots together.

    Attributes:
      context_updates: updates of the prefix cache, to be applied first, in order.
      context_rows: for each start, the row of the prefix cache to copy to its slot.
      starts: the slots and their initial states.
    """

    context_updates: list[ContextUpdate]
    context_rows: list[int]
    starts: list[SlotStart]


class CacheExtent(NamedTuple):
    """The part of the cache that a decode segment accesses: the first `view_len` positions of `num_slots` slots."""

    num_slots: int
    view_len: int


class SlotScheduler:
    """Assigns requests to the slots of one replica.

    Args:
      num_slots: number of slots.
      num_contexts: number of rows in the prefix cache.
      cache_len: number of cache positions per slot.
      segment_len: maximum number of tokens that a decode segment samples per slot.
      min_view_len: smallest `view_len` of an extent. Larger values are powers of 2, but at most `cache_len`.
      eos_ids: token ids that end a completion.
    """

    def __init__(
        self,
        *,
        num_slots: int,
        num_contexts: int,
        cache_len: int,
        segment_len: int,
        min_view_len: int,
        eos_ids: Iterable[int],
    ):
        self.num_slots = num_slots
        self._cache_len = cache_len
        self._segment_len = segment_len
        self._min_view_len = min_view_len
        self._eos_ids = frozenset(eos_ids)
        self._contexts = ContextTable(num_contexts)
        # A heap, ordered by training step, then by submission.
        self._pending: list[tuple[int, int, PendingRequest]] = []
        self._submission_count = itertools.count()
        self._running: dict[int, PendingRequest] = {}
        self._free = list(range(num_slots))  # a heap: the lowest slot is used first
        self._cached_lens = np.zeros(num_slots, np.int32)  # a copy of the values on the device

    @property
    def num_requests(self) -> int:
        """Number of queued or running requests."""
        return len(self._pending) + len(self._running)

    @property
    def is_busy(self) -> bool:
        return self.num_requests > 0

    @property
    def num_idle_slots(self) -> int:
        """Number of slots needed by neither running nor queued requests."""
        return max(0, self.num_slots - self.num_requests)

    @property
    def running_slots(self) -> list[int]:
        return list(self._running)

    def submit(self, request: PendingRequest) -> None:
        heapq.heappush(self._pending, (request.step, next(self._submission_count), request))

    def clear_contexts(self) -> None:
        """Invalidates the prefix cache. Must be called when the weights change."""
        self._contexts.clear()

    def slots_to_preempt(self) -> list[int]:
        """Returns the slots of requests from later steps that must be freed for queued requests from the earliest step.

        Slots with the fewest tokens come first, since preempting them discards the least work.
        """
        if not self._pending:
            return []
        earliest, _, _ = self._pending[0]
        later = [slot for slot, request in self._running.items() if request.step > earliest]
        num_earliest = sum(step == earliest for step, _, _ in self._pending)
        later.sort(key=lambda slot: self._cached_lens[slot])
        return later[: max(0, num_earliest - len(self._free))]

    def preempt(self, slots: Sequence[int], sampled: Sequence[Sampled]) -> None:
        """Frees slots and queues their requests again, with the tokens sampled so far."""
        requests = [self._running[slot] for slot in slots]
        for request, partial in zip(requests, self.retire(slots, sampled), strict=True):
            self.submit(request._replace(partial=partial))

    def admit(self) -> Admission | None:
        """Admits queued requests while there are free slots and rows for their contexts.

        A wave ends early once it has used all rows of the prefix cache, so the caller must call this method until it
        returns None.
        """
        if not (self._pending and self._free):
            return None
        self._contexts.unpin_all()
        lookups, starts = [], []
        while self._pending and self._free:
            _, _, request = self._pending[0]
            target = request.partial.request
            context = target.problem.prompt_ids + target.prefix_ids + request.partial.token_ids
            # The last token is fed to the first decode step instead of being prefilled, so that the same code samples
            # all tokens.
            lookup = self._contexts.look_up(target.problem.id, context[:-1])
            if lookup is None:
                break
            heapq.heappop(self._pending)
            lookups.append(lookup)
            starts.append(self._start(request, context))
        return Admission(order_updates(lookups), [lookup.row for lookup in lookups], starts)

    def _start(self, request: PendingRequest, context: tuple[int, ...]) -> SlotStart:
        slot = heapq.heappop(self._free)
        self._running[slot] = request
        self._cached_lens[slot] = len(context) - 1
        return SlotStart(
            slot=slot,
            cached_len=len(context) - 1,
            last_token=context[-1],
            max_new=request.max_tokens - len(request.partial.token_ids),
            temperature=request.params.temperature,
            top_p=request.params.top_p,
            top_k=request.params.top_k,
            step=request.step,
            problem_key=request.partial.request.problem.key,
            sample_index=request.partial.request.sample_index,
        )

    def compact(self) -> list[tuple[int, int]]:
        """Moves running requests to the lowest slots if that reduces the number of slots that a segment computes.

        Returns:
          Pairs (from, to) of slots. The caller moves their contents on the device.
        """
        num_slots = _round_up_slots(len(self._running))
        beyond = sorted(slot for slot in self._running if slot >= num_slots)
        moves = [(slot, heapq.heappop(self._free)) for slot in beyond]
        for old, new in moves:
            self._running[new] = self._running.pop(old)
            self._cached_lens[new] = self._cached_lens[old]
            heapq.heappush(self._free, old)
        return moves

    def extent(self) -> CacheExtent:
        """Returns the part of the cache that the next segment accesses. At least one request must be running."""
        max_len = max(int(self._cached_lens[slot]) for slot in self._running) + self._segment_len
        return CacheExtent(
            num_slots=min(self.num_slots, _round_up_slots(max(self._running) + 1)),
            view_len=min(self._cache_len, next_power_of_2(max(self._min_view_len, max_len))),
        )

    def update_lens(self, cached_lens: np.ndarray) -> None:
        """Records the number of filled positions of each slot after a decode segment."""
        self._cached_lens = np.array(cached_lens)

    def retire(self, slots: Sequence[int], sampled: Sequence[Sampled]) -> list[Completion]:
        """Frees slots and returns the completions of their requests.

        Args:
          slots: running slots.
          sampled: for each slot, the tokens and log-probabilities sampled since its request was admitted.
        """
        completions = []
        for slot, (token_ids, logprobs) in zip(slots, sampled, strict=True):
            partial, _, _, max_tokens = self._running.pop(slot)
            heapq.heappush(self._free, slot)
            token_ids = partial.token_ids + tuple(token_ids)
            completions.append(
                Completion(
                    request=partial.request,
                    token_ids=token_ids,
                    logprobs=partial.logprobs + tuple(logprobs),
                    finish_reason=self._finish_reason(token_ids, max_tokens),
                )
            )
        return completions

    def _finish_reason(self, token_ids: tuple[int, ...], max_tokens: int) -> FinishReason:
        if token_ids and token_ids[-1] in self._eos_ids:
            return FinishReason.STOP
        return FinishReason.LENGTH if len(token_ids) == max_tokens else FinishReason.UNFINISHED

    def drain(self) -> list[Completion]:
        """Empties the queue and returns its partial completions, longest first. No request may be running."""
        if self._running:
            raise RuntimeError("cannot drain while requests are running; preempt them first")
        partials = [request.partial for _, _, request in sorted(self._pending)]
        self._pending.clear()
        return sorted(partials, key=lambda partial: -len(partial.token_ids))


def _round_up_slots(number: int) -> int:
    """Returns the number of slots that a decode segment computes for `number` running requests."""
    return next_power_of_2(max(MIN_DECODE_SLOTS, number))
