"""Rollouts to one training batch: where every token gets its `TokenKind`, from lengths.

One rollout a row, right-padded. Kinds never come from `ids != pad_id`: the pad may be EOS.
"""

from collections.abc import Sequence

import numpy as np

from trapo_jax.types import Rollout, TokenKind, TrainBatch


def build_batch(
    groups: Sequence[Sequence[Rollout]],
    advantages: Sequence[np.ndarray],
    *,
    num_micro_batches: int = 1,
    rows_multiple: int = 1,
    length_bucket: int = 32,
    pad_id: int = 0,
) -> TrainBatch:
    """Lays rollouts out in `[M, B, T]`.

    Of the rollouts of a group that start from the same expert prefix, the first carries the expert
    loss (`EXPERT_TRAINED`); for the others the prefix is context (`EXPERT`).

    Args:
      groups: the rollouts of each problem.
      advantages: float32 `[G]` for each problem.
      num_micro_batches: M; rows are dealt out so that each micro-batch gets the same number.
      rows_multiple: B is a multiple of this (the number of data-parallel shards); empty rows fill up.
      length_bucket: T is the longest row rounded up to a multiple of this.
      pad_id: the token id in the pad; its value has no influence.
    """
    rows = [
        (rollout, carries, advantage)
        for group, group_advantages in zip(groups, advantages, strict=True)
        for rollout, carries, advantage in zip(
            group, _carries_expert_loss(group), group_advantages, strict=True
        )
    ]
    multiple = num_micro_batches * rows_multiple
    num_rows = -(-len(rows) // multiple) * multiple
    longest = max(_row_len(rollout) for rollout, _, _ in rows)
    shape = (num_rows, -(-longest // length_bucket) * length_bucket)
    token_ids = np.full(shape, pad_id, np.int32)
    positions = np.zeros(shape, np.int32)
    segment_ids = np.zeros(shape, np.int32)
    kinds = np.full(shape, TokenKind.PAD, np.int8)
    row_advantages = np.zeros(shape, np.float32)
    sampler_logprobs = np.zeros(shape, np.float32)
    for i, (rollout, carries, advantage) in enumerate(rows):
        request = rollout.request
        completion = rollout.completion
        prefix_start = len(request.problem.prompt_ids)
        start = prefix_start + request.prefix_len
        end = start + len(completion.token_ids)
        token_ids[i, :end] = (
            *request.problem.prompt_ids,
            *request.prefix_ids,
            *completion.token_ids,
        )
        positions[i, :end] = np.arange(end)
        segment_ids[i, :end] = 1
        kinds[i, :prefix_start] = TokenKind.PROMPT
        kinds[i, prefix_start:start] = TokenKind.EXPERT_TRAINED if carries else TokenKind.EXPERT
        kinds[i, start:end] = TokenKind.COMPLETION
        row_advantages[i, start:end] = advantage
        sampler_logprobs[i, start:end] = completion.logprobs
    arrays = (token_ids, positions, segment_ids, kinds, row_advantages, sampler_logprobs)
    split = (x.reshape(num_micro_batches, -1, shape[1]) for x in arrays)
    batch = TrainBatch(*split, num_rollouts=np.float32(len(rows)))
    _check(batch, rows)
    return batch


def count_kinds(batch: TrainBatch) -> dict[str, int]:
    """Tokens of each kind, by lower-case name."""
    counts = np.bincount(batch.kinds.ravel(), minlength=len(TokenKind))
    return {kind.name.lower(): int(counts[kind]) for kind in TokenKind}


def _carries_expert_loss(group: Sequence[Rollout]) -> list[bool]:
    seen: set[tuple[int, int]] = set()
    carries = []
    for rollout in group:
        prefix = (rollout.request.expert_index, rollout.request.prefix_len)
        carries.append(rollout.request.prefix_len > 0 and prefix not in seen)
        seen.add(prefix)
    return carries


def _row_len(rollout: Rollout) -> int:
    request = rollout.request
    return len(request.problem.prompt_ids) + request.prefix_len + len(rollout.completion.token_ids)


def _check(batch: TrainBatch, rows: Sequence[tuple[Rollout, bool, float]]) -> None:
    """The invariants of the kinds, on the host, for every batch."""
    counts = count_kinds(batch)
    expected = {
        "prompt": sum(len(r.request.problem.prompt_ids) for r, _, _ in rows),
        "expert_trained": sum(r.request.prefix_len for r, carries, _ in rows if carries),
        "expert": sum(r.request.prefix_len for r, carries, _ in rows if not carries),
        "completion": sum(len(r.completion.token_ids) for r, _, _ in rows),
    }
    expected["pad"] = batch.kinds.size - sum(expected.values())
    if counts != expected:
        raise AssertionError(f"token kinds {counts} differ from the rollouts' lengths {expected}")
    if ((batch.kinds == TokenKind.PAD) != (batch.segment_ids == 0)).any():
        raise AssertionError("pad kinds and segment ids disagree")
