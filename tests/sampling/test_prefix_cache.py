"""Tests the prefix cache: the assignment of contexts to rows, and the order of prefills."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from trapo_jax.sampling.prefix_cache import (
    ContextCopy,
    ContextLookup,
    ContextTable,
    PrefillChunk,
    batch_chunks,
    order_updates,
)


def test_a_prompt_is_prefilled_once_and_extended():
    table = ContextTable(2)
    assert table.look_up("a", (1, 2, 3)) == ContextLookup(0, PrefillChunk(0, 0, (1, 2, 3)), None)
    assert table.look_up("a", (1, 2, 3)) == ContextLookup(0, None, None)
    assert table.look_up("a", (1, 2, 3, 4, 5)) == ContextLookup(0, PrefillChunk(0, 3, (4, 5)), None)
    # A shorter prefix is cached, too.
    assert table.look_up("a", (1, 2, 3, 4)) == ContextLookup(0, None, None)


def test_another_expert_copies_the_prompt():
    table = ContextTable(2)
    table.look_up("a", (1, 2, 5, 6))
    assert table.look_up("a", (1, 2, 7)) == ContextLookup(1, PrefillChunk(1, 2, (7,)), (0, 1))
    assert table.look_up("a", (1, 2, 5)) == ContextLookup(0, None, None)
    assert table.look_up("a", (1, 2, 7, 8)) == ContextLookup(1, PrefillChunk(1, 3, (8,)), None)


def test_the_least_recently_used_row_is_evicted_unless_it_is_pinned():
    table = ContextTable(2)
    table.look_up("a", (1,))
    table.look_up("b", (1,))
    assert table.look_up("c", (1,)) is None
    table.unpin_all()
    table.look_up("a", (1,))
    assert table.look_up("c", (1,)) == ContextLookup(1, PrefillChunk(1, 0, (1,)), None)  # evicts b
    assert table.look_up("b", (1,)) is None


def test_a_single_row_is_reused_for_a_diverging_context():
    table = ContextTable(1)
    table.look_up("a", (1, 2, 3))
    assert table.look_up("a", (1, 4)) is None
    table.unpin_all()
    assert table.look_up("a", (1, 4)) == ContextLookup(0, PrefillChunk(0, 1, (4,)), None)


def test_clear_forgets_all_contexts():
    table = ContextTable(1)
    table.look_up("a", (1, 2))
    table.unpin_all()
    table.clear()
    assert table.look_up("a", (1, 2)) == ContextLookup(0, PrefillChunk(0, 0, (1, 2)), None)


def test_chunks_of_a_row_are_prefilled_together_before_the_row_is_copied():
    table = ContextTable(3)
    contexts = [(1, 2, 3), (1, 2, 3, 4), (1, 2, 5), (1, 2, 5, 6)]
    updates = order_updates(table.look_up("a", context) for context in contexts)
    assert updates == [
        (PrefillChunk(0, 0, (1, 2, 3, 4)),),
        ContextCopy(0, 1),
        (PrefillChunk(1, 2, (5, 6)),),
    ]


def test_cached_contexts_need_no_updates():
    table = ContextTable(1)
    assert order_updates([table.look_up("a", (1, 2))]) == [(PrefillChunk(0, 0, (1, 2)),)]
    assert order_updates([table.look_up("a", (1, 2))]) == []


PROBLEMS = st.tuples(st.sampled_from("ab"), st.lists(st.integers(1, 2), max_size=6).map(tuple))


@given(st.lists(st.lists(PROBLEMS, min_size=1, max_size=4), max_size=8), st.integers(1, 3))
def test_rows_contain_the_contexts_that_were_looked_up(waves, num_rows):
    """After the copies and chunks have been applied, every pinned row contains the contexts assigned to it."""
    table = ContextTable(num_rows)
    rows = [()] * num_rows
    for wave in waves:
        table.unpin_all()
        wanted = {}
        for problem_id, context in wave:
            found = table.look_up(problem_id, context)
            if found is None:
                assert len(wanted) == num_rows
                break
            if found.copy:
                rows[found.copy[1]] = rows[found.copy[0]]
            if found.chunk:
                assert len(rows[found.chunk.row]) >= found.chunk.start
                kept = rows[found.chunk.row][: found.chunk.start]
                rows[found.chunk.row] = kept + found.chunk.token_ids
            wanted.setdefault(found.row, []).append(context)
        for row, contexts in wanted.items():
            for context in contexts:
                assert rows[row][: len(context)] == context


@given(st.lists(st.integers(1, 300), max_size=30), st.sampled_from([16, 64, 100]))
def test_batches_contain_every_token_once_and_in_order_within_the_limit(lens, max_tokens):
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
