"""Builds a training batch from rows and assigns every token its `TokenKind`.

Rollouts are packed into rows of a fixed length to minimize padding, and the packed rows are distributed so that all
devices have about the same amount of work in each micro-batch. Rollouts of the same problem in the same row can share
one copy of its prompt::

    token ids    p0 p1  p2 a b c  p2 d e      rollouts p0 p1 p2 a b c and p0 p1 p2 d e
    positions    0  1   2  3 4 5  2  3 4
    segment ids  9  9   1  1 1 1  2  2 2      segment 9 is the shared part of the prompt
    context ids  9  9   9  9 9 9  9  9 9      so tokens of segments 1 and 2 also attend to segment 9

The last prompt token is repeated, because it predicts the first token of every response. Token kinds are derived from
lengths and never from `ids != pad_id`, since the padding token may be EOS.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from trapo_jax.types import TokenKind, TrainBatch, TrainRow


def build_batch(
    rows: Sequence[TrainRow],
    *,
    row_len: int,
    micro_batch_rows: int,
    max_rows: int | None = None,
    num_shards: int = 1,
    packed: bool = True,
    share_prompts: bool = False,
    pad_id: int = 0,
) -> TrainBatch:
    """Builds a batch of shape `[M, B, T]`, where M = ceil(max_rows / B) does not depend on the rows.

    A row without trained tokens is dropped from the batch but counts toward `num_rollouts`.

    Args:
      rows: rollouts and expert solutions; if empty, the batch consists of padding.
      row_len: T, the length of a batch row in tokens; at least the length of the longest rollout.
      micro_batch_rows: B, the global number of rows per micro-batch; a multiple of `num_shards`.
      max_rows: maximum number of rows; `len(rows)` if None.
      num_shards: number of batch shards; each holds an equal block of a micro-batch's rows.
      packed: whether a batch row may contain several rollouts.
      share_prompts: whether rollouts of the same problem in the same batch row share one copy of its prompt; requires
        `packed`.
      pad_id: the token id used for padding; it does not affect the result.

    Raises:
      ValueError: if a rollout is longer than `row_len`, there are more than `max_rows` rows, or `micro_batch_rows` is
        not divisible by `num_shards`.
    """
    if micro_batch_rows % num_shards:
        raise ValueError(
            f"micro_batch_rows={micro_batch_rows} is not divisible by num_shards={num_shards}"
        )
    max_rows = len(rows) if max_rows is None else max_rows
    if len(rows) > max_rows:
        raise ValueError(f"{len(rows)} rows exceed max_rows={max_rows}")
    lens = [row.length if row.num_trained else 0 for row in rows]
    if max(lens, default=0) > row_len:
        raise ValueError(f"a rollout of {max(lens)} tokens exceeds row_len={row_len}")
    members = [i for i, length in enumerate(lens) if length]
    packs = [[_Bundle((i,), 0, lens[i])] for i in members]
    if share_prompts:
        packs = _pack_bundles(members, rows, lens, row_len, micro_batch_rows)
    elif packed:
        together = pack([lens[i] for i in members], row_len)
        packs = [[bundle for j in group for bundle in packs[j]] for group in together]
    batch = _empty_batch(-(-max_rows // micro_batch_rows), micro_batch_rows, row_len, pad_id)
    if share_prompts:
        batch = batch._replace(context_ids=np.zeros_like(batch.segment_ids))
    costs = [sum(lens[i] ** 2 for bundle in group for i in bundle.members) for group in packs]
    places = deal(costs, micro_batch_rows, num_shards)
    for group, place in zip(packs, places, strict=True):
        start = 0
        for bundle in group:
            _write_bundle(batch, place, start, bundle, rows)
            start += bundle.length
    batch = batch._replace(
        num_rollouts=np.float32(max(1, len(rows))),  # a denominator, so not 0
        num_micro_batches=np.int32(-(-len(packs) // micro_batch_rows)),
    )
    _check(batch, [rows[i] for i in members], sum(x.num_saved for group in packs for x in group))
    return batch


class _Bundle(NamedTuple):
    """Rollouts that occupy consecutive tokens of a batch row.

    Attributes:
      members: indices of the rollouts.
      num_shared: number of prompt tokens that they share.
      length: number of tokens that they occupy together.
    """

    members: tuple[int, ...]
    num_shared: int
    length: int

    @property
    def num_saved(self) -> int:
        """The number of prompt tokens that sharing saves."""
        return self.num_shared * (len(self.members) - 1)


def _pack_bundles(
    members: Sequence[int],
    rows: Sequence[TrainRow],
    lens: Sequence[int],
    row_len: int,
    micro_batch_rows: int,
) -> list[list[_Bundle]]:
    """Bundles the rollouts of each prompt and packs the bundles into rows.

    Bundles that are as large as possible need the fewest tokens, but may leave much room in every row. If fewer
    micro-batches suffice that way, rollouts of a prompt are distributed over the room in several rows.
    """
    by_prompt: dict[tuple[int, ...], list[int]] = {}
    for i in members:
        by_prompt.setdefault(rows[i].completion.request.problem.prompt_ids, []).append(i)
    # Every response needs the last token of the prompt, which predicts its first token.
    groups = [(len(prompt) - 1, group) for prompt, group in by_prompt.items()]
    bundles = [
        _make_bundle([group[j] for j in together], num_shared, lens)
        for num_shared, group in groups
        for together in pack([lens[i] - num_shared for i in group], row_len - num_shared)
    ]
    together = pack([bundle.length for bundle in bundles], row_len)
    packs = [[bundles[j] for j in chosen] for chosen in together]
    num_micro_batches = lambda number: -(-number // micro_batch_rows)
    least = -(-sum(bundle.length for bundle in bundles) // row_len)
    if num_micro_batches(len(packs)) == num_micro_batches(least):
        return packs
    filled = _fill_rows(groups, lens, row_len)
    return min(packs, filled, key=lambda found: num_micro_batches(len(found)))


def _fill_rows(
    groups: Sequence[tuple[int, list[int]]], lens: Sequence[int], row_len: int
) -> list[list[_Bundle]]:
    """Packs the rollouts of one prompt after the other, each time into the row that takes the most of them.

    Args:
      groups: for each prompt, the number of tokens that its rollouts can share, and the indices of the rollouts.
      lens, row_len: see `_pack_bundles`.
    """
    packs: list[list[_Bundle]] = []
    room: list[int] = []
    for num_shared, group in sorted(groups, key=lambda group: -sum(lens[i] for i in group[1])):
        left = sorted(group, key=lambda i: (-lens[i], i))
        while left:
            options = [
                (_fitting(left, num_shared, lens, space), r)
                for r, space in enumerate(room)
                if space >= lens[left[-1]]
            ]
            chosen, row = max(options, key=lambda option: len(option[0]), default=([], 0))
            if not chosen:
                packs.append([])
                room.append(row_len)
                chosen, row = _fitting(left, num_shared, lens, row_len), len(packs) - 1
            bundle = _make_bundle(chosen, num_shared, lens)
            packs[row].append(bundle)
            room[row] -= bundle.length
            left = [i for i in left if i not in chosen]
    return packs


def _fitting(
    candidates: Sequence[int], num_shared: int, lens: Sequence[int], space: int
) -> list[int]:
    """Returns those of a prompt's rollouts that fit into a space together, tried in the given order."""
    chosen: list[int] = []
    for i in candidates:
        added = lens[i] - (num_shared if chosen else 0)
        if added <= space:
            chosen.append(i)
            space -= added
    return chosen


def _make_bundle(members: Sequence[int], num_shared: int, lens: Sequence[int]) -> _Bundle:
    """Returns the bundle of a prompt's rollouts, which share the prompt if there are several."""
    shared = num_shared if len(members) > 1 else 0
    length = sum(lens[i] for i in members) - shared * (len(members) - 1)
    return _Bundle(tuple(members), shared, length)


def pack(lens: Sequence[int], row_len: int) -> list[list[int]]:
    """Returns the indices packed into each row, by first-fit-decreasing bin packing.

    >>> pack([2, 5, 3, 4], row_len=7)
    [[1, 0], [3, 2]]
    """
    rows: list[list[int]] = []
    room: list[int] = []
    for i in sorted(range(len(lens)), key=lambda i: (-lens[i], i)):
        row = next((r for r, left in enumerate(room) if left >= lens[i]), len(rows))
        if row == len(rows):
            rows.append([])
            room.append(row_len)
        rows[row].append(i)
        room[row] -= lens[i]
    return rows


def deal(costs: Sequence[float], micro_batch_rows: int, num_shards: int) -> list[tuple[int, int]]:
    """Returns `(micro-batch, row)` for each packed row, balancing work across the shards of each micro-batch.

    Rows of similar cost share a micro-batch. Within a micro-batch, rows are assigned in order of decreasing cost to the
    shard with the lowest total cost so far. Since all rows have the same length, their costs differ only in attention:
    the sum of squared segment lengths, for kernels that skip masked blocks.

    >>> deal([9, 1, 4, 8], micro_batch_rows=4, num_shards=2)
    [(0, 0), (0, 1), (0, 3), (0, 2)]
    """
    rows_per_shard = micro_batch_rows // num_shards
    order = sorted(range(len(costs)), key=lambda i: (-costs[i], i))
    places: list[tuple[int, int]] = [(0, 0)] * len(costs)
    for start in range(0, len(order), micro_batch_rows):
        loads, counts = [0.0] * num_shards, [0] * num_shards
        for i in order[start : start + micro_batch_rows]:
            shard = min(
                (s for s in range(num_shards) if counts[s] < rows_per_shard),
                key=lambda s: (loads[s], s),
            )
            places[i] = (start // micro_batch_rows, shard * rows_per_shard + counts[shard])
            loads[shard] += costs[i]
            counts[shard] += 1
    return places


def count_kinds(batch: TrainBatch) -> dict[str, int]:
    """Returns the number of tokens of each kind, keyed by lowercase name. Skipped micro-batches are not counted."""
    kinds = batch.kinds[: batch.num_micro_batches]
    counts = np.bincount(kinds.ravel(), minlength=len(TokenKind))
    return {kind.name.lower(): int(counts[kind]) for kind in TokenKind}


def balance(batch: TrainBatch, num_shards: int) -> float:
    """Returns the average attention work per shard divided by that of the busiest shard; 1 means perfect balance."""
    lens = np.bincount(batch.segment_ids.ravel())
    lens[0] = 0
    work = lens[batch.segment_ids].sum(axis=-1)  # each token contributes its segment's length
    if batch.context_ids is not None:
        has_context = batch.context_ids != batch.segment_ids
        work += (lens[batch.context_ids] * has_context).sum(axis=-1)
    by_shard = work.reshape(len(work), num_shards, -1).sum(axis=-1)
    busiest = by_shard.max(axis=-1).sum()
    return float(by_shard.mean(axis=-1).sum() / busiest) if busiest else 1.0


def batch_metrics(batch: TrainBatch, num_shards: int) -> dict[str, float]:
    """Returns token counts by kind, the fraction of padding, and the balance between shards."""
    kinds = count_kinds(batch)
    return {
        **{f"batch/{name}_tokens": count for name, count in kinds.items()},
        "batch/pad_fraction": kinds["pad"] / max(1, sum(kinds.values())),
        "batch/balance": balance(batch, num_shards),
    }


def _empty_batch(num_micro_batches: int, num_rows: int, row_len: int, pad_id: int) -> TrainBatch:
    shape = (num_micro_batches, num_rows, row_len)
    return TrainBatch(
        token_ids=np.full(shape, pad_id, np.int32),
        positions=np.zeros(shape, np.int32),
        segment_ids=np.zeros(shape, np.int32),
        kinds=np.full(shape, TokenKind.PAD, np.int8),
        advantages=np.zeros(shape, np.float32),
        sampler_logprobs=np.zeros(shape, np.float32),
        num_rollouts=np.float32(0),
        num_micro_batches=np.int32(0),
    )


def _write_bundle(
    batch: TrainBatch, place: tuple[int, int], start: int, bundle: _Bundle, rows: Sequence[TrainRow]
) -> None:
    """Writes the rollouts of a bundle to a batch row, from the token `start` on."""
    num_shared, context_id = bundle.num_shared, None
    if num_shared:
        # A larger id than those of all rollouts, of which a batch has at most as many as rows.
        context_id = batch.kinds.shape[0] * batch.kinds.shape[1] + 1 + bundle.members[0]
        shared = (*place, slice(start, start + num_shared))
        prompt = rows[bundle.members[0]].completion.request.problem.prompt_ids
        batch.token_ids[shared] = prompt[:num_shared]
        batch.positions[shared] = np.arange(num_shared)
        batch.segment_ids[shared] = batch.context_ids[shared] = context_id
        batch.kinds[shared] = TokenKind.PROMPT
        start += num_shared
    for i in bundle.members:
        length = rows[i].length - num_shared
        where = (*place, slice(start, start + length))
        _write(batch, where, rows[i], num_shared, segment_id=1 + i, context_id=context_id)
        start += length


def _write(
    batch: TrainBatch,
    place: tuple,
    row: TrainRow,
    num_shared: int,
    *,
    segment_id: int,
    context_id: int | None,
) -> None:
    """Writes a row, without its first `num_shared` tokens, to `place`: micro-batch, row, and slice of tokens."""
    request, completion = row.completion.request, row.completion
    prefix_start = len(request.problem.prompt_ids) - num_shared
    start = request.start_len - num_shared
    batch.token_ids[place] = (
        *request.problem.prompt_ids[num_shared:],
        *request.prefix_ids,
        *completion.token_ids,
    )
    batch.positions[place] = np.arange(num_shared, row.length)
    batch.segment_ids[place] = segment_id
    if batch.context_ids is not None:
        batch.context_ids[place] = context_id or segment_id
    kinds = batch.kinds[place]  # a view, as are the indexed arrays below
    kinds[:prefix_start] = TokenKind.PROMPT
    kinds[prefix_start:start] = TokenKind.EXPERT_TRAINED if row.trains_expert else TokenKind.EXPERT
    kinds[start:] = TokenKind.COMPLETION
    batch.advantages[place][prefix_start if row.trains_expert else start :] = row.advantage
    batch.sampler_logprobs[place][start:] = completion.logprobs


def _check(batch: TrainBatch, rows: Sequence[TrainRow], num_saved: int) -> None:
    """Checks on the host that token kinds agree with segment ids and with the lengths of the rows.

    Args:
      batch: the batch.
      rows: the rows with trained tokens.
      num_saved: number of prompt tokens that are not in the batch because other rows have them.
    """
    num_prompt = sum(len(row.completion.request.problem.prompt_ids) for row in rows)
    expected = {
        "prompt": num_prompt - num_saved,
        "expert_trained": sum(row.num_expert_trained for row in rows),
        "expert": sum(row.completion.request.prefix_len - row.num_expert_trained for row in rows),
        "completion": sum(row.num_completion for row in rows),
    }
    used = batch.kinds[: batch.num_micro_batches]
    expected["pad"] = used.size - sum(expected.values())
    counts = count_kinds(batch)
    if counts != expected or (batch.kinds[batch.num_micro_batches :] != TokenKind.PAD).any():
        raise AssertionError(f"token kinds {counts} do not match the row lengths {expected}")
    if ((batch.kinds == TokenKind.PAD) != (batch.segment_ids == 0)).any():
        raise AssertionError("token kinds and segment ids disagree about padding")
