"""Tests every array of batches built from handwritten rollouts, bin packing, and the assignment of rows to devices."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from support.grades import grade_of
from trapo_jax.methods.selection import first_of_each_prefix, rows_of_group
from trapo_jax.training.packing import balance, build_batch, count_kinds, deal, pack
from trapo_jax.types import (
    Completion,
    Expert,
    FinishReason,
    Problem,
    Rollout,
    RolloutRequest,
    TokenKind,
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
        Completion(request, tuple(tokens), logprobs, FinishReason.STOP), grade_of(reward)
    )


def build(group, advantages=None, **options):
    values = np.arange(1, len(group) + 1) / 10 if advantages is None else advantages
    options = {"row_len": 8, "micro_batch_rows": len(group), "packed": False, **options}
    rows = rows_of_group(group, np.float32(values), first_of_each_prefix(group))
    return build_batch(rows, **options)


def rows(array):
    return array.reshape(-1, array.shape[-1]).tolist()


def in_order(batch):
    """Returns an unpacked batch with rows in the order of their rollouts."""
    order = np.argsort(np.where(batch.segment_ids[0, :, 0] == 0, 99, batch.segment_ids[0, :, 0]))
    arrays = (x[:, order] if np.ndim(x) else x for x in batch)
    return type(batch)(*arrays)


EVERY_KIND = [
    rollout(0, 0, [3, EOS]),  # no prefix, EOS sampled
    rollout(1, 2, [3, 3, EOS]),  # prefix with an expert loss
    rollout(2, 2, [EOS]),  # the same prefix, as context only
    rollout(3, 5, []),  # whole expert solution including EOS, nothing sampled
    rollout(4, 2, [3], expert=1),  # the same token ids, but from another expert solution
]


def test_arrays_for_tokens_of_every_kind():
    batch = in_order(build(EVERY_KIND))
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
            [0, 0, 0.2, 0.2, 0.2, 0.2, 0.2, 0],
            [0, 0, 0, 0, 0.3, 0, 0, 0],
            [0, 0, 0.4, 0.4, 0.4, 0.4, 0.4, 0],
            [0, 0, 0.5, 0.5, 0.5, 0, 0, 0],
        ],
        rtol=1e-6,
    )
    np.testing.assert_allclose(
        rows(batch.sampler_logprobs)[1], [0, 0, 0, 0, -0.1, -0.2, -0.3, 0], rtol=1e-6
    )
    assert rows(batch.segment_ids)[:2] == [[1, 1, 1, 1, 0, 0, 0, 0], [2] * 7 + [0]]
    assert rows(batch.positions)[1] == [0, 1, 2, 3, 4, 5, 6, 0]
    assert batch.num_rollouts == 5
    assert count_kinds(batch) == {
        "pad": 12,
        "prompt": 10,
        "expert": 2,
        "expert_trained": 9,
        "completion": 7,
    }


def test_packed_arrays_for_tokens_of_every_kind():
    batch = build(EVERY_KIND, packed=True, row_len=12, micro_batch_rows=2)
    assert batch.kinds.shape == (3, 2, 12)  # five rollouts never need more than five rows
    assert batch.num_micro_batches == 2
    assert rows(batch.segment_ids) == [
        [2] * 7 + [3] * 5,
        [4] * 7 + [5] * 5,
        [1] * 4 + [0] * 8,
        *[[0] * 12] * 3,
    ]
    assert rows(batch.positions)[0] == [*range(7), *range(5)]
    assert rows(batch.kinds) == [
        [P, P, T, T, C, C, C, P, P, X, X, C],
        [P, P, T, T, T, T, T, P, P, T, T, C],
        [P, P, C, C, *[_] * 8],
        *[[_] * 12] * 3,
    ]
    assert rows(batch.token_ids)[0] == [1, 2, 5, 6, 3, 3, EOS, 1, 2, 5, 6, EOS]
    assert rows(batch.advantages)[1] == pytest.approx([0, 0, *[0.4] * 5, 0, 0, *[0.5] * 3])
    assert rows(batch.sampler_logprobs)[0] == pytest.approx(
        [0] * 4 + [-0.1, -0.2, -0.3] + [0] * 4 + [-0.1]
    )


def test_rollouts_of_a_problem_in_one_row_share_its_prompt():
    """The last prompt token is repeated, because it predicts the first token of every response."""
    other = Problem("b" * 16, (7, 8, 6), "x")
    group = [
        rollout(0, 0, [3, EOS]),
        rollout(1, 2, [3, EOS]),
        rollout(2, 0, [5, 5, EOS], problem=other),
        rollout(3, 0, [4], problem=other),
    ]
    batch = build(group, packed=True, share_prompts=True, row_len=16, micro_batch_rows=4)
    assert rows(batch.token_ids)[0] == [1, 2, 5, 6, 3, EOS, 2, 3, EOS, *[0] * 7]
    assert rows(batch.positions)[0] == [0, 1, 2, 3, 4, 5, 1, 2, 3, *[0] * 7]
    assert rows(batch.kinds)[0] == [P, P, T, T, C, C, P, C, C, *[_] * 7]
    first, second = 1 + 4 + 1, 1 + 4 + 2  # larger than the ids of all rollouts
    assert rows(batch.segment_ids)[0] == [first, *[2] * 5, *[1] * 3, *[0] * 7]
    assert rows(batch.context_ids)[0] == [first] * 9 + [0] * 7
    assert rows(batch.token_ids)[1] == [7, 8, 6, 5, 5, EOS, 6, 4, *[0] * 8]
    assert rows(batch.segment_ids)[1] == [second] * 2 + [3] * 4 + [4] * 2 + [0] * 8
    assert rows(batch.advantages)[1] == pytest.approx([0] * 3 + [0.3] * 3 + [0, 0.4] + [0] * 8)
    assert count_kinds(batch)["prompt"] == 3 + 4


def test_rollouts_of_a_problem_in_different_rows_have_their_own_prompts():
    group = [rollout(i, 0, [3, 3, 3, EOS]) for i in range(3)]
    batch = build(group, packed=True, share_prompts=True, row_len=11, micro_batch_rows=3)
    assert batch.num_micro_batches == 1
    assert rows(batch.token_ids)[1] == [1, 2, 3, 3, 3, EOS, *[0] * 5]
    assert rows(batch.context_ids)[1] == rows(batch.segment_ids)[1] == [3] * 6 + [0] * 5
    assert rows(batch.segment_ids)[0] == [4, *[1] * 5, *[2] * 5]


def test_sharing_prompts_saves_rows():
    problem = Problem("c" * 16, tuple(range(10)), "x")
    group = [rollout(i, 0, [3] * 5, problem=problem) for i in range(8)]
    options = {"packed": True, "row_len": 60, "micro_batch_rows": 1}
    assert build(group, **options).num_micro_batches == 2
    assert build(group, **options, share_prompts=True).num_micro_batches == 1


def test_rollouts_of_a_problem_are_split_if_fewer_rows_suffice():
    """A row of 64 tokens has room for the 39 tokens of one problem's rollouts and for 2 of another's, but not for all 4."""
    group = []
    for number in range(3):
        problem = Problem(f"{number:016x}", (50 + number, *range(11)), "x")
        group += [rollout(len(group) + i, 0, [3] * 6, problem=problem) for i in range(4)]
    options = {"packed": True, "row_len": 64, "micro_batch_rows": 1, "share_prompts": True}
    assert build(group[:4], **options).num_micro_batches == 1
    batch = build(group, **options)
    assert batch.num_micro_batches == 2
    assert count_kinds(batch)["prompt"] == 4 * 11 + 12  # One prompt is in both rows.


@given(
    st.lists(
        st.tuples(st.integers(1, 12), st.lists(st.integers(1, 12), min_size=1, max_size=8)),
        min_size=1,
        max_size=6,
    )
)
def test_every_rollout_is_in_one_row_with_its_prompt(problems):
    group = []
    for number, (prompt_len, lens) in enumerate(problems):
        problem = Problem(f"{number:016x}", (100 + number, *range(prompt_len)), "x")
        group += [
            rollout(len(group) + i, 0, [i] * length, problem=problem)
            for i, length in enumerate(lens)
        ]
    batch = build(group, packed=True, row_len=32, micro_batch_rows=1, share_prompts=True)
    for i, member in enumerate(group):
        where = batch.segment_ids == 1 + i
        (row,) = {int(x) for x in np.where(where)[0]}
        seen = where | (batch.segment_ids == batch.context_ids[where][0])
        order = np.argsort(batch.positions[seen])
        tokens = (*member.completion.request.problem.prompt_ids, *member.completion.token_ids)
        assert batch.token_ids[seen][order].tolist() == list(tokens)
        assert seen[row].sum() == len(tokens)


def test_pad_id_may_equal_eos():
    group = [rollout(0, 0, [3, EOS]), rollout(1, 0, [3, 3, 3, EOS])]
    padded_with_eos = in_order(build(group, pad_id=EOS))
    padded_with_zero = in_order(build(group, pad_id=0))
    assert rows(padded_with_eos.token_ids)[0] == [1, 2, 3, EOS, EOS, EOS, EOS, EOS]
    np.testing.assert_array_equal(padded_with_eos.kinds, padded_with_zero.kinds)
    assert rows(padded_with_eos.kinds)[0] == [P, P, C, C, _, _, _, _]


def test_an_immediate_eos_is_a_completion_of_one_token():
    assert rows(build([rollout(0, 0, [EOS])], row_len=4).kinds) == [[P, P, C, _]]


def test_an_expert_solution_truncated_at_the_maximum_length():
    """The guidance truncates the prefix. The row ends without EOS, and all its expert tokens are trained on."""
    batch = build([rollout(0, 3, [])])
    assert rows(batch.kinds) == [[P, P, T, T, T, _, _, _]]
    assert rows(batch.token_ids)[0][:5] == [1, 2, 5, 6, 7]


def test_empty_rows_fill_the_last_micro_batch():
    group = [rollout(i, 0, [3, EOS]) for i in range(5)]
    batch = build(group, micro_batch_rows=4, num_shards=2)
    assert batch.kinds.shape == (2, 4, 8)
    assert batch.num_micro_batches == 2
    assert (batch.kinds[1, 1:] == _).all()
    assert (batch.segment_ids[1, 1:] == 0).all()
    assert batch.num_rollouts == 5


def test_one_rollout_per_group_and_prefix_has_the_expert_loss():
    assert first_of_each_prefix(EVERY_KIND) == [False, True, False, True, True]
    other = Problem("b" * 16, (1,), "x", PROBLEM.experts)
    groups = [[rollout(0, 2, [3])], [rollout(0, 2, [3], problem=other)]]
    assert [first_of_each_prefix(group) for group in groups] == [[True], [True]]


def test_missing_rows_are_padding():
    rows = rows_of_group(EVERY_KIND[:1], np.ones(1), [False])
    batch = build_batch(rows, row_len=8, micro_batch_rows=2, max_rows=5)
    assert batch.kinds.shape == (3, 2, 8)
    assert (batch.num_micro_batches, batch.num_rollouts) == (1, 1)
    none = build_batch([], row_len=8, micro_batch_rows=2, max_rows=5)
    assert none.kinds.shape == (3, 2, 8)
    assert (none.num_micro_batches, count_kinds(none)["pad"], balance(none, 2)) == (0, 0, 1.0)
    with pytest.raises(ValueError, match="5 rows exceed max_rows=4"):
        build(EVERY_KIND, max_rows=4)


def test_shape_does_not_depend_on_lengths():
    short = build([rollout(i, 0, [3]) for i in range(6)], packed=True, micro_batch_rows=2)
    long = build([rollout(i, 0, [3] * 6) for i in range(6)], packed=True, micro_batch_rows=2)
    assert short.kinds.shape == long.kinds.shape == (3, 2, 8)
    assert (short.num_micro_batches, long.num_micro_batches) == (2, 3)
    # Padding in skipped micro-batches is not counted.
    assert count_kinds(short)["pad"] == 2 * 2 * 8 - 6 * 3


def test_a_rollout_longer_than_a_row_raises_an_error():
    with pytest.raises(ValueError, match="a rollout of 9 tokens exceeds row_len=8"):
        build([rollout(0, 0, [3] * 7)])


def test_shards_must_divide_the_rows():
    with pytest.raises(ValueError, match="micro_batch_rows=3 is not divisible by num_shards=2"):
        build([rollout(0, 0, [3])], micro_batch_rows=3, num_shards=2)


@given(st.lists(st.integers(1, 20), min_size=1, max_size=60))
def test_packing_places_every_item_once_and_never_overfills_a_row(lens):
    packed = pack(lens, 20)
    assert sorted(itertools.chain.from_iterable(packed)) == list(range(len(lens)))
    loads = [sum(lens[i] for i in row) for row in packed]
    assert max(loads) <= 20
    # No two rows could be merged.
    assert all(a + b > 20 for a, b in itertools.combinations(loads, 2))


def test_packing_wastes_little_on_log_normal_lengths():
    lens = np.clip(np.random.default_rng(0).lognormal(6.5, 0.7, 1024).astype(int), 1, 9216)
    rows_used = len(pack(lens.tolist(), 9216))
    assert 1 - lens.sum() / (rows_used * 9216) < 0.02


@given(st.lists(st.integers(1, 50), min_size=1, max_size=40), st.integers(1, 4), st.integers(1, 3))
def test_rows_are_assigned_to_distinct_places(costs, num_shards, rows_per_shard):
    size = num_shards * rows_per_shard
    places = deal(costs, size, num_shards)
    assert len(set(places)) == len(costs)
    assert max(m for m, _ in places) == (len(costs) - 1) // size
    assert all(0 <= row < size for _, row in places)


def test_shards_of_a_micro_batch_have_similar_attention_costs():
    rng = np.random.default_rng(0)
    lens = np.clip(rng.lognormal(3, 0.8, 256).astype(int), 1, 197)
    group = [rollout(i, 0, [3] * n) for i, n in enumerate(lens.tolist())]
    options = {"packed": True, "row_len": 200, "micro_batch_rows": 32, "num_shards": 8}
    batch = build(group, **options)
    full = batch._replace(segment_ids=batch.segment_ids[:1])  # the last micro-batch has few rows
    assert balance(full, 8) > 0.85
    shuffled = rng.permutation(full.segment_ids, axis=1)
    assert balance(full._replace(segment_ids=shuffled), 8) < balance(full, 8)


def test_balance_by_hand():
    """Two shards have one row each; their segments of 4 and 3 tokens cost 16 and 9."""
    group = [rollout(0, 0, [3, EOS]), rollout(1, 0, [EOS])]
    batch = build(group, micro_batch_rows=2, num_shards=2)
    assert balance(batch, 2) == pytest.approx((16 + 9) / 2 / 16)
    assert balance(batch, 1) == 1.0


def test_logprobs_must_match_the_completion():
    with pytest.raises(ValueError, match="2 tokens, but 1 logprobs"):
        Completion(RolloutRequest(PROBLEM, 0), (3, 4), (-1.0,), FinishReason.STOP)
