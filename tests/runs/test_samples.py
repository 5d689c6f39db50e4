"""Checks that samples.jsonl contains the per-token values that the update computed."""

import jax.numpy as jnp
import pytest
from hypothesis import given
from hypothesis import strategies as st

from support.grades import CORRECT
from trapo_jax.runs.samples import (
    fetch_response_traces,
    sample_record,
    sample_records,
    token_pieces,
)
from trapo_jax.training.packing import build_batch
from trapo_jax.types import (
    Completion,
    Expert,
    FinishReason,
    Problem,
    Rollout,
    RolloutRequest,
    TokenKind,
    TrainRow,
    UpdateTrace,
)

PROBLEM = Problem("0" * 16, (10, 11), "7", (Expert((20, 21, 22)),), prompt_text="?")


def rollout(sample_index, prefix_len, token_ids):
    request = RolloutRequest(PROBLEM, sample_index, 1, 0 if prefix_len else -1, prefix_len, 0.5)
    logprobs = (-1.0,) * len(token_ids)
    return Rollout(Completion(request, token_ids, logprobs, FinishReason.STOP), CORRECT)


GROUP = [
    rollout(0, 0, (30,)),
    rollout(1, 2, (31, 32, 33, 34)),
    rollout(2, 2, (35, 36)),
    rollout(3, 3, ()),
]

# Only the first of the two rollouts with the same prefix trains on that prefix.
ROWS = [
    TrainRow(r.completion, advantage, trains_expert, r.request.key)
    for r, advantage, trains_expert in zip(
        GROUP, (0.5, -0.5, 0.25, 0.0), (False, True, False, True), strict=True
    )
]


def decode(ids):
    return " ".join(f"<{i}>" for i in ids)


@pytest.mark.parametrize("packed", [True, False])
def test_the_tokens_of_a_response_are_found_in_the_batch(packed):
    """The trace arrays contain the token ids, so the result must be the token ids of the response."""
    batch = build_batch(ROWS, row_len=9, micro_batch_rows=2, packed=packed)
    trace = (jnp.asarray(batch.token_ids, jnp.float32), jnp.asarray(batch.token_ids, jnp.float32))
    update = UpdateTrace(ROWS, batch, trace)
    keys = [r.request.key for r in GROUP]
    traces = fetch_response_traces(update, keys[:3])
    assert list(traces) == keys[:3]
    for r, seen in zip(GROUP, traces.values(), strict=False):
        response = [*r.request.prefix_ids, *r.completion.token_ids]
        assert seen.logprobs.tolist() == seen.gradient_weights.tolist() == response
    assert [kinds.tolist() for kinds, _, _ in traces.values()] == [
        [TokenKind.COMPLETION],
        [TokenKind.EXPERT_TRAINED] * 2 + [TokenKind.COMPLETION] * 4,
        [TokenKind.EXPERT] * 2 + [TokenKind.COMPLETION] * 2,
    ]
    assert fetch_response_traces(update, []) == {}
    last = fetch_response_traces(update, [keys[3], ("another problem", 0)])
    assert [seen.kinds.tolist() for seen in last.values()] == [[TokenKind.EXPERT_TRAINED] * 3]


def test_a_record_has_one_entry_per_token_and_null_for_untrained_tokens():
    batch = build_batch(ROWS, row_len=9, micro_batch_rows=2)
    logprobs = jnp.where(batch.kinds > TokenKind.EXPERT, -0.123456, 0.0)
    update = UpdateTrace(ROWS, batch, (logprobs, -logprobs))
    (record,) = sample_records([GROUP[2]], [update], decode=decode, step=5)
    assert record["tokens"] == {
        "pieces": ["<20>", " <21>", "<35>", " <36>"],
        "kinds": "2244",
        "logprobs": [None, None, -0.1235, -0.1235],
        "gradient_weights": [None, None, 0.1235, 0.1235],
    }
    assert (record["step"], record["sample_index"], record["advantage"]) == (5, 2, 0.25)
    assert (record["prefix"], record["completion"]) == ("<20> <21>", "<35> <36>")


def test_a_row_with_only_an_expert_solution_is_not_mistaken_for_a_rollout():
    """ReLIFT's buffer may contain a rollout's problem. The expert row then has the same sample index as the rollout."""
    expert = TrainRow(GROUP[0].completion, 0.0, True)
    batch = build_batch([expert, ROWS[0]], row_len=9, micro_batch_rows=2)
    values = jnp.asarray(batch.token_ids, jnp.float32)
    update = UpdateTrace([expert, ROWS[0]], batch, (values, values))
    (record,) = sample_records([GROUP[0]], [update], decode=decode, step=5)
    assert record["advantage"] == 0.5
    only_expert = UpdateTrace(
        [expert], build_batch([expert], row_len=9, micro_batch_rows=2), (values, values)
    )
    (record,) = sample_records([GROUP[0]], [only_expert], decode=decode, step=5)
    assert record["advantage"] is None


def test_an_untrained_rollout_has_pieces_and_kinds():
    tokens = sample_record(GROUP[1], None, None, decode=decode, step=5)["tokens"]
    assert tokens["kinds"] == "224444"
    assert tokens["logprobs"] == tokens["gradient_weights"] == [None] * 6


def decode_bytes(ids):
    return bytes(ids).decode(errors="replace")


def test_a_character_belongs_to_the_token_that_completes_it():
    assert token_pieces("aä€😀b".encode(), decode_bytes) == [
        *("a", "", "ä", "", "", "€", "", "", "", "😀", "b")
    ]


@given(st.lists(st.integers(0, 255), max_size=40))
def test_pieces_join_to_the_text_for_arbitrary_bytes(ids):
    pieces = token_pieces(ids, decode_bytes)
    assert "".join(pieces) == decode_bytes(ids)
    assert len(pieces) == len(ids)


def test_pieces_with_a_decoder_that_drops_the_first_space():
    words = ["▁to", "▁be", ",", "▁or"]

    def like_sentencepiece(ids):
        return "".join(words[i] for i in ids).replace("▁", " ").removeprefix(" ")

    assert token_pieces(range(4), like_sentencepiece) == ["to", " be", ",", " or"]
