"""Contexts: the keys and values of prompts and expert prefixes, computed once and copied to whoever starts there.

A row holds one context. A context that continues one already held extends that row; one that shares only its
beginning copies it. So a prompt is run through the model once a problem, and of an expert solution only what no
earlier prefix of it had.
"""

import collections
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from trapo_jax.models import DecoderConfig, KVCache, apply_decoder

SHORTEST_PIECE = 16  # pieces of a context are padded to this, or twice, four times ... this
COPIED_AT_ONCE = 8  # rows of a cache whose layers are apart
MAX_PIECE_ROWS = 8  # pieces of different contexts run through the model at once

TokenIds = tuple[int, ...]


class Piece(NamedTuple):
    """Tokens to be run through the model for a row, behind the `start` it holds."""

    row: int
    start: int
    token_ids: TokenIds


class PieceBatch(NamedTuple):
    """Up to U pieces of at most T tokens; arrays for `prefill`, or in their place their shapes."""

    rows: Any  # int32 [U]
    starts: Any  # int32 [U]
    token_ids: Any  # int32 [U, T]
    lens: Any  # int32 [U]; 0 for none


class Found(NamedTuple):
    """Where a context is, and what is to be done for it first.

    Attributes:
      row: that holds it, once `copy` and `piece` are done.
      piece: what is to be computed; None for nothing.
      copy: (from, to): the row to copy before that; None for none.
    """

    row: int
    piece: Piece | None
    copy: tuple[int, int] | None


@dataclasses.dataclass
class _Row:
    token_ids: TokenIds = ()
    problem_id: str = ""


class ContextTable:
    """Which row holds which context: the host's side. The least recently used row makes room.

    Args:
      num_rows: contexts held at once.
    """

    def __init__(self, num_rows: int):
        self._rows = [_Row() for _ in range(num_rows)]
        self._used: collections.OrderedDict[int, None] = collections.OrderedDict.fromkeys(
            range(num_rows)
        )  # the least recently used first
        self._pinned: set[int] = set()

    def clear(self) -> None:
        """Forgets everything: the weights have changed."""
        for row in self._rows:
            row.token_ids, row.problem_id = (), ""

    def unpin(self) -> None:
        """Rows that were found until now may make room again."""
        self._pinned.clear()

    def find(self, problem_id: str, token_ids: TokenIds) -> Found | None:
        """A row for a context, pinned until `unpin`; None if every row is pinned."""
        best, shared = None, 0
        for i, row in enumerate(self._rows):
            if row.problem_id == problem_id:
                common = _common_len(row.token_ids, token_ids)
                if common > shared or best is None:
                    best, shared = i, common
        copy = None
        if best is None or shared < min(len(token_ids), len(self._rows[best].token_ids)):
            # Nothing of this problem, or it goes another way: a row of its own.
            taken = self._pinned | {best}
            target = next((i for i in self._used if i not in taken), None)
            if target is None and best not in self._pinned:
                target = best
            if target is None:
                return None
            if best is not None and target != best and shared:
                copy = (best, target)
            self._rows[target] = _Row(token_ids[:shared], problem_id)
            best = target
        self._used.move_to_end(best)
        self._pinned.add(best)
        row = self._rows[best]
        if shared == len(token_ids):
            return Found(best, None, copy)
        row.token_ids = token_ids
        return Found(best, Piece(best, shared, token_ids[shared:]), copy)


def batches(pieces: Iterable[Piece], max_tokens: int) -> Iterator[PieceBatch]:
    """Cuts and groups pieces of different rows so that a batch holds at most `max_tokens`, padding included.

    A long piece is cut into several, in order. Shapes are few: lengths are powers of two, and a batch has
    one row or as many as there may be.
    """
    longest = max(SHORTEST_PIECE, max_tokens)
    waiting = list(pieces)
    while waiting:
        by_size: dict[int, list[Piece]] = {}
        rest = []
        for piece in waiting:
            head = piece._replace(token_ids=piece.token_ids[:longest])
            size = max(SHORTEST_PIECE, power_of_2(len(head.token_ids)))
            by_size.setdefault(min(longest, size), []).append(head)
            if len(piece.token_ids) > longest:
                start = piece.start + longest
                rest.append(Piece(piece.row, start, piece.token_ids[longest:]))
        for size, group in sorted(by_size.items()):
            num_rows = max(1, min(MAX_PIECE_ROWS, longest // size))
            while group:
                count = num_rows if len(group) > num_rows // 4 else 1
                yield _stack(group[:count], count, size)
                group = group[count:]
        waiting = rest


def prefill(config: DecoderConfig, params: Any, contexts: KVCache, batch: PieceBatch) -> KVCache:
    """Runs pieces through the model and puts their keys and values behind what their rows hold.

    Args:
      config: the decoder's shape.
      params: the decoder's parameters.
      contexts: the rows' keys and values, `[L, R, K, H, C]` and `[L, R, K, C, H]`.
      batch: the pieces.
    """
    index = jnp.arange(batch.token_ids.shape[1])
    positions = batch.starts[:, None] + index
    cached = KVCache(contexts.keys[:, batch.rows], contexts.values[:, batch.rows])
    _, (keys, values) = apply_decoder(
        config, params, batch.token_ids, positions, cache=cached, cached_lens_S=batch.starts
    )
    capacity = contexts.keys.shape[-1]
    where = jnp.where(index < batch.lens[:, None], positions, capacity)  # beyond: dropped
    rows = jnp.broadcast_to(batch.rows[:, None], where.shape)
    by_token = lambda new: new.transpose(1, 2, 0, 3, 4)  # [U, T, L, K, H]
    return KVCache(
        contexts.keys.at[:, rows, :, :, where].set(by_token(keys), mode="drop"),
        contexts.values.at[:, rows, :, where].set(by_token(values), mode="drop"),
    )


def copy_rows(
    cache: KVCache, from_rows: jax.Array, to_rows: jax.Array, count: jax.Array
) -> KVCache:
    """The first `count` pairs of rows, of which none is both copied and written; of the others `to_rows` is out of
    range."""
    if isinstance(cache.keys, list):

        def several(pair, cache: KVCache) -> KVCache:
            rows, targets = pair
            return jax.tree.map(lambda x: x.at[targets].set(x[rows], mode="drop"), cache)

        return _in_chunks(several, (from_rows, to_rows), count, cache)

    def one(i, cache: KVCache) -> KVCache:
        take = lambda x: jax.lax.dynamic_slice_in_dim(x, from_rows[i], 1, axis=1)
        put = lambda x: jax.lax.dynamic_update_slice_in_dim(x, take(x), to_rows[i], axis=1)
        return jax.tree.map(put, cache)

    return jax.lax.fori_loop(0, count, one, cache)


def copy_contexts(
    config: DecoderConfig,
    contexts: KVCache,
    cache: KVCache,
    rows: jax.Array,
    slots: jax.Array,
    count: jax.Array,
    *,
    length: int,
) -> KVCache:
    """The first `length` positions of rows of `contexts`, into slots of a cache that lies as decoding wants it.

    The first `count` pairs; of the others `slots` is out of range.
    """
    if config.layers == "apart":

        def several(pair, cache: KVCache) -> KVCache:
            rows, targets = pair
            put = lambda old, new: old.at[targets, :length].set(new, mode="drop")
            keys = (x[rows, :, :, :length].transpose(0, 3, 1, 2) for x in contexts.keys)
            values = (x[rows, :, :length].transpose(0, 2, 1, 3) for x in contexts.values)
            return KVCache([*map(put, cache.keys, keys)], [*map(put, cache.values, values)])

        return _in_chunks(several, (rows, slots), count, cache)

    def one(i, cache: KVCache) -> KVCache:
        take = lambda x: jax.lax.dynamic_index_in_dim(x, rows[i], axis=1, keepdims=False)
        keys, values = take(contexts.keys)[..., :length], take(contexts.values)[..., :length, :]
        if config.layers == "stacked":
            put = lambda old, new: jax.lax.dynamic_update_slice(
                old, new[:, None], (0, slots[i], 0, 0, 0)
            )
            return KVCache(put(cache.keys, keys), put(cache.values, values))
        put = lambda old, new: jax.lax.dynamic_update_slice(old, new[None], (slots[i], 0, 0, 0))
        return KVCache([*map(put, cache.keys, keys)], [*map(put, cache.values, values)])

    return jax.lax.fori_loop(0, count, one, cache)


def _in_chunks(
    several: Callable[[Any, KVCache], KVCache],
    pairs: tuple[jax.Array, jax.Array],
    count: jax.Array,
    cache: KVCache,
) -> KVCache:
    """`several` pairs at a time: of layers apart, copying one by one would take longer to start than to do."""
    size = min(COPIED_AT_ONCE, len(pairs[0]))

    def chunk(i, cache: KVCache) -> KVCache:
        # The last begins where it ends in range: copying a pair twice changes nothing.
        take = lambda x: jax.lax.dynamic_slice_in_dim(x, i * size, size)
        return several(jax.tree.map(take, pairs), cache)

    return jax.lax.fori_loop(0, (count + size - 1) // size, chunk, cache)


def empty_cache(config: DecoderConfig, num_rows: int, length: int) -> KVCache:
    c = config
    keys, values = (c.num_kv_heads, c.head_dim, length), (c.num_kv_heads, length, c.head_dim)
    if c.layers == "stacked":
        zeros = lambda shape: jnp.zeros((c.num_layers, num_rows, *shape), c.dtype)
        return KVCache(zeros(keys), zeros(values))
    if c.layers == "apart":
        keys = values = length, c.num_kv_heads, c.head_dim
    zeros = lambda shape: [jnp.zeros((num_rows, *shape), c.dtype) for _ in range(c.num_layers)]
    return KVCache(zeros(keys), zeros(values))


def power_of_2(number: int) -> int:
    """The smallest that is not less."""
    return 1 << (number - 1).bit_length()


def _stack(pieces: Sequence[Piece], num_rows: int, size: int) -> PieceBatch:
    batch = PieceBatch(
        rows=np.zeros(num_rows, np.int32),
        starts=np.zeros(num_rows, np.int32),
        token_ids=np.zeros((num_rows, size), np.int32),
        lens=np.zeros(num_rows, np.int32),
    )
    for i, piece in enumerate(pieces):
        batch.rows[i], batch.starts[i], batch.lens[i] = piece.row, piece.start, len(piece.token_ids)
        batch.token_ids[i, : len(piece.token_ids)] = piece.token_ids
    return batch


def _common_len(a: TokenIds, b: TokenIds) -> int:
    shorter = min(len(a), len(b))
    if a[:shorter] == b[:shorter]:
        return shorter
    return next(i for i in range(shorter) if a[i] != b[i])
