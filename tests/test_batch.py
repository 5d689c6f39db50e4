"""Every element of every mask of hand-made rollouts."""

import numpy as np
import pytest

from trapo_jax.batch import build_batch, count_kinds
from trapo_jax.types import (
    Completion,
    Expert,
    FinishReason,
    Problem,
    Rollout,
    RolloutRequest,
    TokenKind,
    Verdict,
)

EOS = 9
P, X, T, C, _ = (
    TokenKind.PROMPT,
    TokenKind.EXPERT,
    TokenKind.EXPERT_TRAINED,
    TokenKind.COMPLETION,
    TokenKind.PAD,
)
PROBLEM = Problem("a" * 16, (1, 2), "x", (Expert((5, 6, 7, 8, EOS)), Expert((5, 6, 4, EOS))))


def rollout(index, prefix_len, tokens, *, expert=0, problem=PROBLEM, reward=0.0) -> Rollout:
    request = RolloutRequest(problem, index, 0, expert if prefix_len else -1, prefix_len)
    logprobs = tuple(-0.1 * (i + 1) for i in range(len(tokens)))
    return Rollout(
        Completion(request, tuple(tokens), logprobs, FinishReason.STOP), Verdict.WRONG, reward
    )


def build(group, advantages=None, **options):
    values = np.arange(1, len(group) + 1) / 10 if advantages is None else advantages
    return build_batch([group], [np.float32(values)], length_bucket=4, **options)


def rows(array):
    return array.reshape(-1, array.shape[-1]).tolist()


def test_every_kind_of_every_token():
    batch = build(
        [
            rollout(0, 0, [3, EOS]),  # no prefix, EOS sampled
            rollout(1, 2, [3, 3, EOS]),  # prefix, carries the expert loss
            rollout(2, 2, [EOS]),  # the same prefix: context only
            rollout(3, 5, []),  # full prefix, EOS included, nothing sampled
            rollout(4, 2, [3], expert=1),  # same ids, but another expert: its own prefix
        ]
    )
    assert rows(batch.kinds) == [
        [P, P, C, C, _, _, _, _],
        [P, P, T, T, C, C, C, _],
        [P, P, X, X, C, _, _, _],
        [P, P, T, T, T, T, T, _],
        [P, P, T, T, C, _, _, _],
    ]
    assert rows(batch.token_ids) == [
        [1, 2, 3, EOS, 0, 0, 0, 0],
        [1, 2, 5, 6, 3, 3, EOS, 0],
        [1, 2, 5, 6, EOS, 0, 0, 0],
        [1, 2, 5, 6, 7, 8, EOS, 0],
        [1, 2, 5, 6, 3, 0, 0, 0],
    ]
    np.testing.assert_allclose(
        rows(batch.advantages),
        [
            [0, 0, 0.1, 0.1, 0, 0, 0, 0],
            [0, 0, 0, 0, 0.2, 0.2, 0.2, 0],
            [0, 0, 0, 0, 0.3, 0, 0, 0],
            [0, 0, 0, 0, 0, 0, 0, 0],
            [0, 0, 0, 0, 0.5, 0, 0, 0],
        ],
        rtol=1e-6,
    )
    np.testing.assert_allclose(
        rows(batch.sampler_logprobs)[1], [0, 0, 0, 0, -0.1, -0.2, -0.3, 0], rtol=1e-6
    )
    assert rows(batch.segment_ids)[0] == [1, 1, 1, 1, 0, 0, 0, 0]
    assert rows(batch.positions)[1] == [0, 1, 2, 3, 4, 5, 6, 0]
    assert batch.num_rollouts == 5
    assert count_kinds(batch) == {
        "pad": 12,
        "prompt": 10,
        "expert": 2,
        "expert_trained": 9,
        "completion": 7,
    }


def test_pad_id_may_equal_eos():
    group = [rollout(0, 0, [3, EOS]), rollout(1, 0, [3, 3, 3, EOS])]
    padded_with_eos, padded_with_zero = build(group, pad_id=EOS), build(group, pad_id=0)
    assert rows(padded_with_eos.token_ids)[0] == [1, 2, 3, EOS, EOS, EOS, EOS, EOS]
    np.testing.assert_array_equal(padded_with_eos.kinds, padded_with_zero.kinds)
    assert rows(padded_with_eos.kinds)[0] == [P, P, C, C, _, _, _, _]


def test_eos_first_is_a_completion_of_one_token():
    assert rows(build([rollout(0, 0, [EOS])]).kinds) == [[P, P, C, _]]


def test_expert_truncated_at_the_maximum_length():
    """The scheduler cuts the prefix; the row ends without EOS and all of it is the expert's."""
    batch = build([rollout(0, 3, [])])
    assert rows(batch.kinds) == [[P, P, T, T, T, _, _, _]]
    assert rows(batch.token_ids)[0][:5] == [1, 2, 5, 6, 7]


def test_empty_rows_fill_up_shards_and_micro_batches():
    group = [rollout(i, 0, [3, EOS]) for i in range(5)]
    batch = build(group, num_micro_batches=2, rows_multiple=2)
    assert batch.kinds.shape == (2, 4, 4)
    assert (batch.kinds.reshape(8, 4)[5:] == _).all()
    assert (batch.segment_ids.reshape(8, 4)[5:] == 0).all()
    assert batch.num_rollouts == 5


def test_each_group_has_its_own_carriers():
    other = Problem("b" * 16, (1,), "x", PROBLEM.experts)
    batch = build_batch(
        [[rollout(0, 2, [3])], [rollout(0, 2, [3], problem=other)]],
        [np.zeros(1, np.float32)] * 2,
        length_bucket=8,
    )
    assert count_kinds(batch)["expert_trained"] == 4


def test_lengths_are_rounded_to_the_bucket():
    assert build([rollout(0, 0, [3] * 6)]).kinds.shape == (1, 1, 8)
    assert build([rollout(0, 0, [3] * 7)]).kinds.shape == (1, 1, 12)


def test_logprobs_must_match_the_completion():
    with pytest.raises(ValueError, match="2 tokens, but 1 logprobs"):
        Completion(RolloutRequest(PROBLEM, 0), (3, 4), (-1.0,), FinishReason.STOP)
