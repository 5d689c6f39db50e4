"""Tests that the JAX engine's log-probabilities are correct, and that completions depend only on their requests."""

import dataclasses
import gc
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from support.engines import EOS, make_engine, requests_of, sample, tokens_of, trainer_logprobs
from trapo_jax.models import PerLayer, PerLayerTransposed, apply_decoder, unembedding
from trapo_jax.types import (
    Completion,
    Expert,
    FinishReason,
    Problem,
    RolloutRequest,
    SamplingParams,
    UserError,
)


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [0.6, 1.0])
def test_logprobs_equal_those_of_a_full_forward_pass(decoder, params, problems, temperature):
    """The requests involve padding, prefixes, shared prefills, and reused slots."""
    requests = requests_of(problems[:10], group=4)
    completions = sample(make_engine(decoder, params), requests, temperature=temperature)
    assert len(completions) == 40
    for completion in completions.values():
        expected = trainer_logprobs(decoder, params, completion, temperature)
        np.testing.assert_allclose(completion.logprobs, expected, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("layout", [PerLayer(), PerLayerTransposed()])
def test_all_layouts_sample_the_same_tokens(
    decoder, params, problems, reference, monkeypatch, layout
):
    """The requests involve several cache and decode sizes, prefixes, and reused slots."""
    monkeypatch.setattr("trapo_jax.sampling.replica.choose_layout", lambda config, mesh: layout)
    monkeypatch.setattr("trapo_jax.sampling.replica.MIN_VIEW_LEN", 16)
    engine = make_engine(decoder, params)
    completions = sample(engine, requests_of(problems[:8], group=4))
    assert isinstance(engine._replicas[0]._decode_params["layers"][0], dict)
    assert tokens_of(completions) == tokens_of(reference)
    for completion in completions.values():
        expected = trainer_logprobs(decoder, params, completion, 1.0)
        np.testing.assert_allclose(completion.logprobs, expected, atol=1e-4)


@pytest.mark.slow
def test_greedy_sampling_takes_the_argmax_of_a_full_forward_pass(decoder, params, problems):
    completions = sample(make_engine(decoder, params), requests_of(problems[:4]), temperature=0.0)
    for completion in completions.values():
        request = completion.request
        ids = np.array([request.problem.prompt_ids + request.prefix_ids + completion.token_ids])
        hidden, _ = apply_decoder(
            decoder, params, ids, np.arange(ids.shape[1])[None], np.ones_like(ids)
        )
        best = np.asarray(jnp.argmax(hidden[0] @ unembedding(params), axis=-1))
        start = ids.shape[1] - len(completion.token_ids)
        np.testing.assert_array_equal(best[start - 1 : -1], completion.token_ids)


@pytest.fixture(scope="module")
def reference(decoder, params, problems):
    return sample(make_engine(decoder, params, num_slots=4), requests_of(problems[:8], group=4))


@pytest.mark.slow
@pytest.mark.parametrize("num_slots", [16, 64])
def test_tokens_do_not_depend_on_slots_or_order(decoder, params, problems, reference, num_slots):
    requests = requests_of(problems[:8], group=4)
    np.random.default_rng(num_slots).shuffle(requests)
    other = sample(make_engine(decoder, params, num_slots=num_slots), requests)
    assert tokens_of(other) == tokens_of(reference)


@pytest.mark.slow
def test_tokens_do_not_depend_on_when_requests_are_submitted(decoder, params, problems, reference):
    """Requests are submitted in two waves, and then one by one while other requests are decoded."""
    requests = requests_of(problems[:8], group=4)
    engine = make_engine(decoder, params, num_slots=16)
    waves = {**sample(engine, requests[::2]), **sample(engine, requests[1::2])}
    assert tokens_of(waves) == tokens_of(reference)
    completions = []
    while requests:
        engine.submit([requests.pop()], step=1, params=SamplingParams())
        completions += engine.step()
    while engine.is_busy:
        completions += engine.step()
    trickled = {(c.request.problem.id, c.request.sample_index): c for c in completions}
    assert tokens_of(trickled) == tokens_of(reference)


@pytest.mark.slow
def test_an_earlier_step_preempts_a_later_one(decoder, params, problems):
    """Four requests of step 1 preempt the four of step 2 that occupy all slots, without changing any tokens."""
    early, late = requests_of(problems[:1], group=4), requests_of(problems[1:2], group=4)
    alone = {
        step: sample(make_engine(decoder, params), requests, step=step)
        for step, requests in ((1, early), (2, late))
    }
    engine = make_engine(decoder, params, num_slots=4, segment_len=2)
    engine.submit(late, step=2, params=SamplingParams())
    assert engine.step() == []
    engine.submit(early, step=1, params=SamplingParams())
    first_decode_step, num_finished = engine.stats().decode_steps, 0
    while engine.is_busy:
        for c in engine.step():
            num_finished += 1
            is_early = c.request.problem.id == problems[0].id
            if is_early:
                assert engine.stats().decode_steps - first_decode_step == len(c.token_ids)
            expected = alone[1 if is_early else 2]
            assert c.token_ids == expected[c.request.problem.id, c.request.sample_index].token_ids
    assert num_finished == 8


@pytest.mark.slow
def test_released_and_resumed_requests_get_the_same_tokens(decoder, params, problems, reference):
    """The weights are unchanged; the released requests are queued, just started, or nearly finished."""
    requests = requests_of(problems[:8], group=4)
    engine = make_engine(decoder, params, num_slots=16, prefill_tokens=512)
    engine.submit(requests, step=1, params=SamplingParams())
    completions, partial_lens = [], set()
    for _ in range(4):
        completions += engine.step()
        partial = engine.release()
        assert {c.finish_reason for c in partial} <= {FinishReason.UNFINISHED}
        partial_lens |= {len(c.token_ids) for c in partial}
        engine.update_weights(params)
        assert engine.num_idle_slots == 16
        engine.resume(partial, step=1, params=SamplingParams())
        assert engine.num_idle_slots == max(0, 16 - len(partial))
    while engine.is_busy:
        completions += engine.step()
    assert 0 in partial_lens
    assert len(partial_lens) > 3
    assert len(completions) == len(reference)
    for c in completions:
        expected = reference[c.request.problem.id, c.request.sample_index]
        assert (c.token_ids, c.finish_reason) == (expected.token_ids, expected.finish_reason)
        np.testing.assert_allclose(c.logprobs, expected.logprobs, atol=1e-5)


def test_seed_step_and_sample_index_change_the_draw(decoder, params, problems):
    request = [RolloutRequest(problems[0], j) for j in range(16)]
    draws = sample(make_engine(decoder, params), request)
    assert len({c.token_ids for c in draws.values()}) > 8
    other_step = sample(make_engine(decoder, params), request, step=2)
    other_seed = sample(make_engine(decoder, params, seed=1), request)
    for other in (other_step, other_seed):
        assert [c.token_ids for c in other.values()] != [c.token_ids for c in draws.values()]


@pytest.mark.slow
def test_a_completion_stops_at_its_maximum_length(decoder, params, problems):
    engine = make_engine(decoder, params, max_completion_length=5)
    request = RolloutRequest(problems[0], 0, 0, 0, 3)
    (completion,) = sample(engine, [request]).values()
    assert completion.finish_reason is FinishReason.LENGTH
    assert len(completion.token_ids) == 2  # 3 prefix tokens + 2 sampled tokens = maximum length 5


def test_eos_is_part_of_the_completion(decoder, params, problems):
    for completion in sample(make_engine(decoder, params), requests_of(problems[:4])).values():
        assert completion.finish_reason is FinishReason.STOP
        assert completion.token_ids[-1] == EOS
        assert EOS not in completion.token_ids[:-1]


@pytest.mark.slow
def test_every_eos_id_ends_a_completion(decoder, params, problems, tokenizer):
    semicolon = tokenizer.convert_tokens_to_ids(";")
    engine = make_engine(decoder, params, eos_ids=[EOS, semicolon])
    completions = sample(engine, requests_of(problems[:8], ratios=(0.0,)), temperature=1.0)
    assert {c.token_ids[-1] for c in completions.values()} == {EOS, semicolon}


def test_a_completion_may_consist_of_eos_alone(decoder, params, problems):
    """After a whole expert solution without its EOS, the most likely token is EOS."""
    problem = problems[0]
    length = len(problem.experts[0].token_ids) - 1
    (completion,) = sample(
        make_engine(decoder, params), [RolloutRequest(problem, 0, 0, 0, length)], temperature=0.0
    ).values()
    assert completion.token_ids == (EOS,)


def test_invalid_requests_are_rejected(decoder, params):
    engine = make_engine(decoder, params, max_prompt_length=4)
    too_long = Problem("a" * 16, (3,) * 5, "")
    empty = Problem("b" * 16, (), "")
    full = Problem("c" * 16, (3,), "", (Expert((4,) * 64),))
    for request, message in (
        (RolloutRequest(too_long, 0), "exceeds max_prompt_length 4"),
        (RolloutRequest(empty, 0), "the prompt is empty"),
        (RolloutRequest(full, 0, 0, 0, 64), "nothing to sample"),
    ):
        with pytest.raises(ValueError, match=message):
            engine.submit([request], step=0, params=SamplingParams())
    assert engine.step() == []


def test_a_cache_larger_than_the_memory_is_rejected_before_it_is_allocated(decoder, params):
    message = (
        r"sampling\.num_slots=65536: the keys and values of 65,536 slots .* need .* GiB; lower"
    )
    with pytest.raises(UserError, match=message):
        make_engine(decoder, params, num_slots=65536, max_completion_length=1_000_000)


def test_finished_completions_are_not_resumed(decoder, params, problems):
    engine = make_engine(decoder, params)
    request = RolloutRequest(problems[0], 0)
    whole = tuple([1] * engine.max_tokens(request))
    for completion, message in (
        (
            Completion(request, (1,), (0.0,), FinishReason.STOP),
            "the completion is already finished",
        ),
        (
            Completion(request, whole, (0.0,) * len(whole), FinishReason.UNFINISHED),
            "nothing to sample",
        ),
    ):
        valid = Completion(request, (), (), FinishReason.UNFINISHED)
        with pytest.raises(ValueError, match=message):
            engine.resume([valid, completion], step=0, params=SamplingParams())
    assert not engine.is_busy  # a rejected call queues nothing


def test_weights_cannot_change_while_completions_are_running(decoder, params, problems):
    engine = make_engine(decoder, params)
    engine.submit([RolloutRequest(problems[0], 0)], step=0, params=SamplingParams())
    with pytest.raises(RuntimeError, match="update_weights"):
        engine.update_weights(params)


@pytest.mark.slow
def test_a_long_run_neither_recompiles_nor_leaks(decoder, params, problems):
    """After a warm-up of 100 steps with varying lengths, 50 steps compile nothing, and 50 more do not leak memory."""
    rng = np.random.default_rng(0)
    engine = make_engine(decoder, params, max_completion_length=24)

    def one_step(step):
        engine.update_weights(params)
        chosen = rng.choice(len(problems), 3, replace=False)
        ratios = rng.uniform(0, 0.9, 4)
        requests = requests_of([problems[i] for i in chosen], group=4, ratios=ratios)
        sample(engine, [r for r in requests if r.prefix_len < 24], step=step)

    for step in range(100):
        one_step(step)
    compiled, arrays = engine.num_compiled, len(jax.live_arrays())
    for step in range(100, 150):
        one_step(step)
    assert engine.num_compiled == compiled
    resident = resident_bytes()
    for step in range(150, 200):
        one_step(step)
    assert len(jax.live_arrays()) == arrays
    assert resident_bytes() - resident < 10 * 2**20


def test_weights_are_cast_by_a_single_compiled_program(decoder, params):
    engine = make_engine(dataclasses.replace(decoder, dtype="bfloat16"), params)
    for _ in range(3):
        engine.update_weights(params)
    assert engine._cast._cache_size() == 1
    assert engine._replicas[0]._params["embedding"].dtype == jnp.bfloat16


@pytest.mark.slow
def test_top_k_of_one_is_greedy_with_logprobs_of_the_whole_distribution(decoder, params, problems):
    requests = requests_of(problems[:4])
    engine = make_engine(decoder, params, with_truncation=True)
    engine.submit(requests, step=1, params=SamplingParams(1.0, top_k=1))
    completions = []
    while engine.is_busy:
        completions += engine.step()
    greedy = sample(make_engine(decoder, params), requests, temperature=0.0)
    for c in completions:
        assert c.token_ids == greedy[c.request.problem.id, c.request.sample_index].token_ids
        expected = trainer_logprobs(decoder, params, c, 1.0)
        np.testing.assert_allclose(c.logprobs, expected, atol=1e-4)


def test_an_engine_without_truncation_rejects_top_p(decoder, params, problems):
    with pytest.raises(ValueError, match="with_truncation"):
        make_engine(decoder, params).submit(
            [RolloutRequest(problems[0], 0)], step=0, params=SamplingParams(top_p=0.9)
        )


def resident_bytes():
    gc.collect()
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
