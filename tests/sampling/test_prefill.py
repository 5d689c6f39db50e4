"""Tests prefills and cached prefixes on the device by running an engine."""

import numpy as np
import pytest

from support.engines import make_engine, requests_of, sample, tokens_of, trainer_logprobs
from trapo_jax.types import Expert, Problem, RolloutRequest, SamplingParams


@pytest.mark.slow
def test_prefilled_tokens_are_prompts_and_distinct_extensions(decoder, params, problems):
    """The count does not depend on the number of rollouts. A context's last token is decoded, not prefilled."""
    engine = make_engine(decoder, params, num_contexts=8)
    requests = requests_of(problems[:8], group=6, ratios=(0.0, 0.2, 0.5))
    completions = sample(engine, requests)
    expected = sum(
        len(p.prompt_ids) + int(0.5 * len(p.experts[0].token_ids)) - 1 for p in problems[:8]
    )
    assert engine.stats().prefilled_tokens == expected
    assert engine.stats().decoded_tokens == sum(len(c.token_ids) for c in completions.values())
    assert engine.stats().slot_tokens >= engine.stats().decoded_tokens
    # New weights invalidate the prefix cache, so the same requests are prefilled again.
    engine.update_weights(params)
    sample(engine, requests)
    assert engine.stats().prefilled_tokens == 2 * expected


@pytest.mark.slow
def test_two_expert_solutions_and_long_prefixes_are_prefilled_in_chunks(decoder, params, problems):
    """Rows that are copied, extended, and prefilled in chunks yield the logprobs of a full forward pass."""
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


@pytest.mark.slow
def test_a_view_of_a_long_cache_gives_the_same_logprobs(decoder, params, problems):
    """The views have 256, 512, or all 616 positions, depending on the longest running row."""
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


@pytest.mark.slow
def test_a_long_prefill_takes_several_steps_and_can_be_released(decoder, params, problems):
    """The first step only prefills. Requests released at that point still get the same tokens later."""
    options = {"prefill_tokens": 16, "num_slots": 16}
    requests = requests_of(problems[:8])
    expected = sample(make_engine(decoder, params, **options), requests)
    engine = make_engine(decoder, params, **options)
    engine.submit(requests, step=1, params=SamplingParams())
    assert engine.step() == []
    stats = engine.stats()
    assert stats.prefilled_tokens > 0
    assert stats.decoded_tokens == 0
    released = engine.release()
    assert {c.request for c in released} == set(requests)
    assert all(c.token_ids == () for c in released)
    engine.update_weights(params)
    engine.resume(released, step=1, params=SamplingParams())
    completions = sample(engine, [])
    assert tokens_of(completions) == tokens_of(expected)
