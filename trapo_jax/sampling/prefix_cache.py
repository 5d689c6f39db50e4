"""Tracks the prompts and expert prefixes whose keys and values are cached on the device. Does not import JAX.

A context is a prompt with its expert prefix, and each row of the cache holds one context. A context that continues a
cached context extends the cached context's row; a context that shares only the beginning of a cached context starts
from a copy of that row. Therefore, each problem's prompt is prefilled only once, and if a shorter expert prefix is
cached, only the remaining tokens of a longer one are prefilled.
"""

import collections
import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

MIN_CHUNK_LEN = 16  # in tokens; chunks are padded to this length times a power of 2
MAX_PREFILL_ROWS = 8  # maximum number of chunks, from different contexts, in one batch

TokenIds = tuple[int, ...]


class PrefillChunk(NamedTuple):
    """Tokens to prefill in `row`, after the `start` tokens that the row already holds."""

    row: int
    start: int
    token_ids: TokenIds


class PrefillBatch(NamedTuple):
    """Up to U chunks of up to T tokens, as arrays passed to `prefill` or as their shapes."""

    rows: Any  # int32 [U]
    starts: Any  # int32 [U]
    token_ids: Any  # int32 [U, T]
    lens: Any  # int32 [U]; 0 for padding


class ContextCopy(NamedTuple):
    """A copy of the cache row `source` to the row `target`."""

    source: int
    target: int


ContextUpdate = ContextCopy | tuple[PrefillChunk, ...]


class ContextLookup(NamedTuple):
    """The row of a context, and the work required before it can be used.

    Attributes:
      row: the row that holds the context once `copy` and then `chunk` have been applied.
      chunk: the tokens to prefill. None if the row already holds the context.
      copy: the copy that initializes the row. None if nothing is copied.
    """

    row: int
    chunk: PrefillChunk | None
    copy: ContextCopy | None


@dataclasses.dataclass
class _Row:
    token_ids: TokenIds = ()
    problem_id: str = ""


class ContextTable:
    """Maps contexts to rows, and evicts the least recently used context.

    Args:
      num_rows: number of contexts that the cache holds.
    """

    def __init__(self, num_rows: int):
        self._rows = [_Row() for _ in range(num_rows)]
        self._recency: collections.OrderedDict[int, None] = collections.OrderedDict.fromkeys(
            range(num_rows)
        )  # the least recently used row comes first
        self._pinned: set[int] = set()

    def clear(self) -> None:
        """Removes all contexts. Must be called when the weights change."""
        for row in self._rows:
            row.token_ids, row.problem_id = (), ""

    def unpin_all(self) -> None:
        """Allows all rows to be evicted again."""
        self._pinned.clear()

    def look_up(self, problem_id: str, token_ids: TokenIds) -> ContextLookup | None:
        """Finds or assigns the row of a context and pins it until `unpin_all` is called.

        Returns:
          The lookup, or None if the context needs a new row and all rows are pinned.
        """
        best, shared = self._longest_match(problem_id, token_ids)
        copy = None
        if best is None or shared < min(len(token_ids), len(self._rows[best].token_ids)):
            # No context of this problem is cached, or the best match diverges. Use another row.
            target = self._row_to_evict(best)
            if target is None:
                return None
            if best is not None and target != best and shared:
                copy = ContextCopy(best, target)
            self._rows[target] = _Row(token_ids[:shared], problem_id)
            best = target
        self._recency.move_to_end(best)
        self._pinned.add(best)
        if shared == len(token_ids):
            return ContextLookup(best, None, copy)
        self._rows[best].token_ids = token_ids
        return ContextLookup(best, PrefillChunk(best, shared, token_ids[shared:]), copy)

    def _longest_match(self, problem_id: str, token_ids: TokenIds) -> tuple[int | None, int]:
        """Returns the row of this problem with the longest common prefix, and the length of that prefix."""
        best, shared = None, 0
        for i, row in enumerate(self._rows):
            if row.problem_id == problem_id:
                common = _common_len(row.token_ids, token_ids)
                if common > shared or best is None:
                    best, shared = i, common
        return best, shared

    def _row_to_evict(self, best: int | None) -> int | None:
        """Returns the least recently used row that is not pinned, or `best` only if there is no other such row."""
        taken = self._pinned | {best}
        target = next((i for i in self._recency if i not in taken), None)
        return best if target is None and best not in self._pinned else target


def order_updates(lookups: Iterable[ContextLookup]) -> list[ContextUpdate]:
    """Returns the updates that make the contexts available, in the required order.

    Chunks are batched and prefilled as late as possible: before a row with a pending chunk is copied, or at the end.
    """
    updates: list[ContextUpdate] = []
    chunks: dict[int, PrefillChunk] = {}
    for lookup in lookups:
        if lookup.copy is not None:
            if lookup.copy.source in chunks:
                updates.append(tuple(chunks.values()))
                chunks = {}
            updates.append(lookup.copy)
        if (chunk := lookup.chunk) is not None:
            pending = chunks.get(chunk.row)
            chunks[chunk.row] = _concatenate(pending, chunk) if pending else chunk
    if chunks:
        updates.append(tuple(chunks.values()))
    return updates


def batch_chunks(chunks: Iterable[PrefillChunk], max_tokens: int) -> Iterator[PrefillBatch]:
    """Splits and batches chunks of different rows.

    A batch has at most `max_tokens` tokens, including padding. Longer chunks are split, and their parts are yielded in
    order. To limit the number of compiled programs, lengths are rounded up to powers of 2, and a batch has either one
    row or the maximum number of rows.
    """
    max_len = max(MIN_CHUNK_LEN, max_tokens)
    remaining = list(chunks)
    while remaining:
        by_size: dict[int, list[PrefillChunk]] = {}
        rest = []
        for chunk in remaining:
            head = chunk._replace(token_ids=chunk.token_ids[:max_len])
            size = max(MIN_CHUNK_LEN, next_power_of_2(len(head.token_ids)))
            by_size.setdefault(min(max_len, size), []).append(head)
            if len(chunk.token_ids) > max_len:
                start = chunk.start + max_len
                rest.append(PrefillChunk(chunk.row, start, chunk.token_ids[max_len:]))
        for size, group in sorted(by_size.items()):
            num_rows = max(1, min(MAX_PREFILL_ROWS, max_len // size))
            while group:
                count = num_rows if len(group) > num_rows // 4 else 1
                yield _stack(group[:count], count, size)
                group = group[count:]
        remaining = rest


def next_power_of_2(number: int) -> int:
    """Returns the smallest power of 2 that is at least `number`.

    >>> [next_power_of_2(n) for n in (1, 2, 3, 8, 9)]
    [1, 2, 4, 8, 16]
    """
    return 1 << (number - 1).bit_length()


def _stack(chunks: Sequence[PrefillChunk], num_rows: int, size: int) -> PrefillBatch:
    batch = PrefillBatch(
        rows=np.zeros(num_rows, np.int32),
        starts=np.zeros(num_rows, np.int32),
        token_ids=np.zeros((num_rows, size), np.int32),
        lens=np.zeros(num_rows, np.int32),
    )
    for i, chunk in enumerate(chunks):
        batch.rows[i], batch.starts[i], batch.lens[i] = chunk.row, chunk.start, len(chunk.token_ids)
        batch.token_ids[i, : len(chunk.token_ids)] = chunk.token_ids
    return batch


def _concatenate(chunk: PrefillChunk, continuation: PrefillChunk) -> PrefillChunk:
    return chunk._replace(token_ids=chunk.token_ids + continuation.token_ids)


def _common_len(a: TokenIds, b: TokenIds) -> int:
    shorter = min(len(a), len(b))
    if a[:shorter] == b[:shorter]:
        return shorter
    return next(i for i in range(shorter) if a[i] != b[i])
