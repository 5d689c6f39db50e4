"""Contexts: what is computed for them, in which order, and what is never computed twice."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from trapo_jax.sampling.prefix_cache import (
    ContextLookup,
    ContextTable,
    PrefillChunk,
    batch_chunks,
)


def test_a_prompt_is_computed_once_and_extended():
    table = ContextTable(2)
    assert table.look_up("a", (1, 2, 3)) == ContextLookup(0, PrefillChunk(0, 0, (1, 2, 3)), None)
    assert table.look_up("a", (1, 2, 3)) == ContextLookup(0, None, None)
    assert table.look_up("a", (1, 2, 3, 4, 5)) == ContextLookup(0, PrefillChunk(0, 3, (4, 5)), None)
    assert table.look_up("a", (1, 2, 3, 4)) == ContextLookup(
        0, None, None
    )  # a shorter prefix is there


def test_another_expert_copies_the_prompt():
    table = ContextTable(2)
    table.look_up("a", (1, 2, 5, 6))
    assert table.look_up("a", (1, 2, 7)) == ContextLookup(1, PrefillChunk(1, 2, (7,)), (0, 1))
    assert table.look_up("a", (1, 2, 5)) == ContextLookup(0, None, None)
    assert table.look_up("a", (1, 2, 7, 8)) == ContextLookup(1, PrefillChunk(1, 3, (8,)), None)


def test_the_least_recently_used_row_makes_room_but_no_pinned_one():
    table = ContextTable(2)
    table.look_up("a", (1,))
    table.look_up("b", (1,))
    assert table.look_up("c", (1,)) is None
    table.unpin_all()
    table.look_up("a", (1,))
    assert table.look_up("c", (1,)) == ContextLookup(
        1, PrefillChunk(1, 0, (1,)), None
    )  # in place of b
    assert table.look_up("b", (1,)) is None


def test_a_single_row_goes_another_way_in_place():
    table = ContextTable(1)
    table.look_up("a", (1, 2, 3))
    assert table.look_up("a", (1, 4)) is None
    table.unpin_all()
    assert table.look_up("a", (1, 4)) == ContextLookup(0, PrefillChunk(0, 1, (4,)), None)


def test_new_weights_forget_everything():
    table = ContextTable(1)
    table.look_up("a", (1, 2))
    table.unpin_all()
    table.clear()
    assert table.look_up("a", (1, 2)) == ContextLookup(0, PrefillChunk(0, 0, (1, 2)), None)


PROBLEMS = st.tuples(st.sampled_from("ab"), st.lists(st.integers(1, 2), max_size=6).map(tuple))


@given(st.lists(st.lists(PROBLEMS, min_size=1, max_size=4), max_size=8), st.integers(1, 3))
def test_rows_hold_what_was_asked_for(waves, num_rows):
    """Carrying out the copies and chunks gives every pinned row its context."""
    table = ContextTable(num_rows)
    held = [()] * num_rows
    for wave in waves:
        table.unpin_all()
        wanted = {}
        for problem_id, context in wave:
            found = table.look_up(problem_id, context)
            if found is None:
                assert len(wanted) == num_rows
                break
            if found.copy:
                held[found.copy[1]] = held[found.copy[0]]
            if found.chunk:
                assert len(held[found.chunk.row]) >= found.chunk.start
                kept = held[found.chunk.row][: found.chunk.start]
                held[found.chunk.row] = kept + found.chunk.token_ids
            wanted.setdefault(found.row, []).append(context)
        for row, contexts in wanted.items():
            for context in contexts:
                assert held[row][: len(context)] == context


@given(st.lists(st.integers(1, 300), max_size=30), st.sampled_from([16, 64, 100]))
def test_batches_hold_every_token_once_in_order_within_the_budget(lens, max_tokens):
    chunks = [PrefillChunk(row, 7, tuple(range(length))) for row, length in enumerate(lens)]
    got = {chunk.row: () for chunk in chunks}
    for batch in batch_chunks(chunks, max_tokens):
        assert batch.token_ids.size <= max_tokens
        for row, start, ids, length in zip(
            batch.rows, batch.starts, batch.token_ids, batch.lens, strict=True
        ):
            if length:
                assert start == 7 + len(got[row])
                got[row] += tuple(ids[:length].tolist())
    assert got == {chunk.row: chunk.token_ids for chunk in chunks}


def test_batches_have_few_shapes():
    rng = np.random.default_rng(0)
    shapes = set()
    for _ in range(200):
        lens = rng.integers(1, 600, rng.integers(1, 20))
        chunks = [PrefillChunk(i, 0, (1,) * n) for i, n in enumerate(lens.tolist())]
        shapes |= {batch.token_ids.shape for batch in batch_chunks(chunks, 512)}
    assert shapes <= {(1, 16), (8, 16), (1, 32), (8, 32), (1, 64), (8, 64), (1, 128), (4, 128)} | {
        (1, 256),
        (2, 256),
        (1, 512),
    }
