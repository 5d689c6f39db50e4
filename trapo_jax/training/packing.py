"""Builds a training batch from rows and assigns every token its `TokenKind`.

Rollouts are packed into rows of a fixed length to minimize padding, and the packed rows are distributed so that all
devices have about the same amount of work in each micro-batch. Token kinds are derived from lengths and never from
`ids != pad_id`, since the padding token may be EOS.
"""

from collections.abc import Sequence

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
    packs = [[i] for i in members]
    if packed:
        packs = [[members[j] for j in group] for group in pack([lens[i] for i in members], row_len)]
    batch = _empty_batch(-(-max_rows // micro_batch_rows), micro_batch_rows, row_len, pad_id)
    costs = [sum(lens[i] ** 2 for i in together) for together in packs]
    places = deal(costs, micro_batch_rows, num_shards)
    for together, place in zip(packs, places, strict=True):
        start = 0
        for i in together:
            _write(batch, (*place, slice(start, start + lens[i])), rows[i], segment_id=1 + i)
            start += lens[i]
    batch = batch._replace(
        num_rollouts=np.float32(max(1, len(rows))),  # a denominator, so not 0
        num_micro_batches=np.int32(-(-len(packs) // micro_batch_rows)),
    )
    _check(batch, [rows[i] for i in members])
    return batch


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


def _write(batch: TrainBatch, place: tuple, row: TrainRow, *, segment_id: int) -> None:
    """Writes a row to the position `place` of a batch: micro-batch, row, and slice of tokens."""
    request, completion = row.completion.request, row.completion
    prefix_start = len(request.problem.prompt_ids)
    start = request.start_len
    batch.token_ids[place] = (
        *request.problem.prompt_ids,
        *request.prefix_ids,
        *completion.token_ids,
    )
    batch.positions[place] = np.arange(row.length)
    batch.segment_ids[place] = segment_id
    kinds = batch.kinds[place]  # a view, as are the indexed arrays below
    kinds[:prefix_start] = TokenKind.PROMPT
    kinds[prefix_start:start] = TokenKind.EXPERT_TRAINED if row.trains_expert else TokenKind.EXPERT
    kinds[start:] = TokenKind.COMPLETION
    batch.advantages[place][prefix_start if row.trains_expert else start :] = row.advantage
    batch.sampler_logprobs[place][start:] = completion.logprobs


def _check(batch: TrainBatch, rows: Sequence[TrainRow]) -> None:
    """Checks on the host that token kinds agree with the lengths of the rows and with segment ids."""
    expected = {
        "prompt": sum(len(row.completion.request.problem.prompt_ids) for row in rows),
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
