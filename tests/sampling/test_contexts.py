"""Contexts: what is computed for them, in which order, and what is never computed twice."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from test_sampling import make_engine, requests_of, sample, trainer_logprobs

from trapo_jax.sampling.contexts import ContextTable, Found, Piece, batches
from trapo_jax.types import Expert, Problem, RolloutRequest


def test_a_prompt_is_computed_once_and_extended():
    table = ContextTable(2)
    assert table.find("a", (1, 2, 3)) == Found(0, Piece(0, 0, (1, 2, 3)), None)
    assert table.find("a", (1, 2, 3)) == Found(0, None, None)
    assert table.find("a", (1, 2, 3, 4, 5)) == Found(0, Piece(0, 3, (4, 5)), None)
    assert table.find("a", (1, 2, 3, 4)) == Found(0, None, None)  # a shorter prefix is there


def test_another_expert_copies_the_prompt():
    table = ContextTable(2)
    table.find("a", (1, 2, 5, 6))
    assert table.find("a", (1, 2, 7)) == Found(1, Piece(1, 2, (7,)), (0, 1))
    assert table.find("a", (1, 2, 5)) == Found(0, None, None)
    assert table.find("a", (1, 2, 7, 8)) == Found(1, Piece(1, 3, (8,)), None)


def test_the_least_recently_used_row_makes_room_but_no_pinned_one():
    table = ContextTable(2)
    table.find("a", (1,))
    table.find("b", (1,))
    assert table.find("c", (1,)) is None
    table.unpin()
    table.find("a", (1,))
    assert table.find("c", (1,)) == Found(1, Piece(1, 0, (1,)), None)  # in place of b
    assert table.find("b", (1,)) is None


def test_a_single_row_goes_another_way_in_place():
    table = ContextTable(1)
    table.find("a", (1, 2, 3))
    assert table.find("a", (1, 4)) is None
    table.unpin()
    assert table.find("a", (1, 4)) == Found(0, Piece(0, 1, (4,)), None)


def test_new_weights_forget_everything():
    table = ContextTable(1)
    table.find("a", (1, 2))
    table.unpin()
    table.clear()
    assert table.find("a", (1, 2)) == Found(0, Piece(0, 0, (1, 2)), None)


PROBLEMS = st.tuples(st.sampled_from("ab"), st.lists(st.integers(1, 2), max_size=6).map(tuple))


@given(st.lists(st.lists(PROBLEMS, min_size=1, max_size=4), max_size=8), st.integers(1, 3))
def test_rows_hold_what_was_asked_for(waves, num_rows):
    """Carrying out the copies and pieces gives every pinned row its context."""
    table = ContextTable(num_rows)
    held = [()] * num_rows
    for wave in waves:
        table.unpin()
        wanted = {}
        for problem_id, context in wave:
            found = table.find(problem_id, context)
            if found is None:
                assert len(wanted) == num_rows
                break
            if found.copy:
                held[found.copy[1]] = held[found.copy[0]]
            if found.piece:
                assert len(held[found.piece.row]) >= found.piece.start
                kept = held[found.piece.row][: found.piece.start]
                held[found.piece.row] = kept + found.piece.token_ids
            wanted.setdefault(found.row, []).append(context)
        for row, contexts in wanted.items():
            for context in contexts:
                assert held[row][: len(context)] == context


@given(st.lists(st.integers(1, 300), max_size=30), st.sampled_from([16, 64, 100]))
def test_batches_hold_every_token_once_in_order_within_the_budget(lens, max_tokens):
    pieces = [Piece(row, 7, tuple(range(length))) for row, length in enumerate(lens)]
    got = {piece.row: () for piece in pieces}
    for batch in batches(pieces, max_tokens):
        assert batch.token_ids.size <= max_tokens
        for row, start, ids, length in zip(
            batch.rows, batch.starts, batch.token_ids, batch.lens, strict=True
        ):
            if length:
                assert start == 7 + len(got[row])
                got[row] += tuple(ids[:length].tolist())
    assert got == {piece.row: piece.token_ids for piece in pieces}


def test_batches_have_few_shapes():
    rng = np.random.default_rng(0)
    shapes = set()
    for _ in range(200):
        lens = rng.integers(1, 600, rng.integers(1, 20))
        pieces = [Piece(i, 0, (1,) * n) for i, n in enumerate(lens.tolist())]
        shapes |= {batch.token_ids.shape for batch in batches(pieces, 512)}
    assert shapes <= {(1, 16), (8, 16), (1, 32), (8, 32), (1, 64), (8, 64), (1, 128), (4, 128)} | {
        (1, 256),
        (2, 256),
        (1, 512),
    }


def test_prefilled_tokens_are_prompts_and_distinct_extensions(decoder, params, problems):
    """Whatever the number of rollouts. The last token of a context is decoded, not prefilled."""
    engine = make_engine(decoder, params, num_contexts=8)
    requests = requests_of(problems[:8], group=6, ratios=(0.0, 0.2, 0.5))
    completions = sample(engine, requests)
    expected = sum(
        len(p.prompt_ids) + int(0.5 * len(p.experts[0].token_ids)) - 1 for p in problems[:8]
    )
    assert engine.counters.prefilled_tokens == expected
    assert engine.counters.decoded_tokens == sum(len(c.token_ids) for c in completions.values())
    assert engine.counters.slot_tokens >= engine.counters.decoded_tokens
    # The same again costs the same: nothing of the weights before is used.
    engine.update_weights(params, 1)
    sample(engine, requests)
    assert engine.counters.prefilled_tokens == 2 * expected


def test_two_experts_and_long_prefixes_in_pieces(decoder, params, problems):
    """Rows that are copied, extended and cut into pieces give the logprobs of a full forward pass."""
    first = problems[0].experts[0]
    second = Expert((*first.token_ids[:3], *first.token_ids[9:30]))
    problem = Problem("e" * 16, problems[0].prompt_ids, "", (first, second))
    requests = [
        RolloutRequest(problem, j, 0, expert if length else -1, length)
        for j, (expert, length) in enumerate([(0, 0), (0, 21), (1, 5), (1, 20), (0, 8), (0, 23)])
    ]
    for options in ({"prefill_tokens": 16}, {"num_contexts": 1}, {"num_slots": 2}):
        completions = sample(make_engine(decoder, params, **options), requests)
        assert len(completions) == len(requests)
        for completion in completions.values():
            expected = trainer_logprobs(decoder, params, completion, 1.0)
            np.testing.assert_allclose(completion.logprobs, expected, atol=1e-4)


def test_a_part_of_a_long_cache_is_looked_at(decoder, params, problems):
    """Views of 256, 512 and all of 616 positions, by the longest row at work."""
    rng = np.random.default_rng(0)
    engine = make_engine(decoder, params, max_completion_length=600, num_slots=2)
    problem = problems[0]
    for prefix_len in (10, 230, 500):
        expert = Expert(tuple(rng.choice(problem.experts[0].token_ids[:-1], 590).tolist()))
        long = Problem(f"{prefix_len:016x}", problem.prompt_ids, "", (expert,))
        requests = [RolloutRequest(long, 0, 0, 0, prefix_len), RolloutRequest(problem, 0)]
        for completion in sample(engine, requests).values():
            expected = trainer_logprobs(decoder, params, completion, 1.0)
            np.testing.assert_allclose(completion.logprobs, expected, atol=1e-4)
