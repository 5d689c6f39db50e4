"""The engine: its logprobs, its independence of everything but the request, its distribution."""

import dataclasses
import gc
import os
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from trapo_jax.losses import token_logprobs
from trapo_jax.models import (
    PerLayer,
    PerLayerTransposed,
    Stacked,
    apply_decoder,
    unembedding,
)
from trapo_jax.sampling.engine import EngineSpec
from trapo_jax.sampling.jax_engine import JaxEngine
from trapo_jax.sampling.programs import choose_layout
from trapo_jax.types import (
    Completion,
    Expert,
    FinishReason,
    Problem,
    RolloutRequest,
    SamplingParams,
)

EOS = 1


def make_engine(decoder, params, **options):
    arguments = {
        "num_slots": 8,
        "max_prompt_length": 16,
        "max_completion_length": 64,
        "segment_len": 4,
        "num_contexts": 8,
        "prefill_tokens": 64,
        "eos_ids": [EOS],
        "seed": 0,
    }
    engine = JaxEngine(EngineSpec(decoder=decoder, **{**arguments, **options}))
    engine.update_weights(params)
    return engine


def sample(engine, requests, *, temperature=1.0, step=1):
    engine.submit(requests, step=step, params=SamplingParams(temperature))
    completions = []
    while engine.is_busy:
        completions += engine.step()
    return {(c.request.problem.id, c.request.sample_index): c for c in completions}


def requests_of(problems, *, group=2, ratios=(0.0, 0.3)):
    return [
        RolloutRequest(p, j, 0, 0, int(ratios[j % len(ratios)] * len(p.experts[0].token_ids)))
        for p in problems
        for j in range(group)
    ]


def trainer_logprobs(decoder, params, completion, temperature):
    """The completion's logprobs by a full forward pass of its row, alone."""
    request = completion.request
    context = request.problem.prompt_ids + request.prefix_ids
    ids = np.array([context + completion.token_ids])
    hidden, _ = apply_decoder(
        decoder, params, ids, np.arange(ids.shape[1])[None], np.ones_like(ids)
    )
    logits = hidden[:, :-1] @ unembedding(params) / temperature
    return token_logprobs(logits, ids[:, 1:])[0, len(context) - 1 :]


@pytest.mark.parametrize("temperature", [0.6, 1.0])
def test_logprobs_equal_a_full_forward_pass(decoder, params, problems, temperature):
    """With pads, prefixes, shared prefills and slots used several times."""
    requests = requests_of(problems[:10], group=4)
    completions = sample(make_engine(decoder, params), requests, temperature=temperature)
    assert len(completions) == 40
    for completion in completions.values():
        expected = trainer_logprobs(decoder, params, completion, temperature)
        np.testing.assert_allclose(completion.logprobs, expected, atol=1e-4)


@pytest.mark.parametrize("layout", [PerLayer(), PerLayerTransposed()])
def test_all_layouts_sample_the_same_tokens(
    decoder, params, problems, reference, monkeypatch, layout
):
    """With several sizes of the cache and of the decode step, prefixes, and slots that are used several times."""
    monkeypatch.setattr("trapo_jax.sampling.replica.choose_layout", lambda config, mesh: layout)
    monkeypatch.setattr("trapo_jax.sampling.replica.MIN_VIEW_LEN", 16)
    engine = make_engine(decoder, params)
    completions = sample(engine, requests_of(problems[:8], group=4))
    assert isinstance(engine._replicas[0]._decode_params["layers"][0], dict)
    assert tokens_of(completions) == tokens_of(reference)
    for completion in completions.values():
        expected = trainer_logprobs(decoder, params, completion, 1.0)
        np.testing.assert_allclose(completion.logprobs, expected, atol=1e-4)


def test_a_cpu_decodes_large_layers_with_transposed_weights(decoder, monkeypatch):
    mesh = jax.sharding.Mesh(jax.devices()[:1], ("tp",))
    assert choose_layout(decoder, mesh) == Stacked()
    monkeypatch.setattr("trapo_jax.sampling.programs.MIN_TRANSPOSED_LAYER_BYTES", 2**18)
    assert choose_layout(decoder, mesh) == PerLayerTransposed()


def test_a_gpu_decodes_with_one_cache_per_layer_where_cudnn_supports_it(decoder):
    device = types.SimpleNamespace(platform="gpu")
    mesh: Any = types.SimpleNamespace(devices=np.array([device]), size=1)
    half = dataclasses.replace(decoder, dtype="bfloat16")
    assert choose_layout(half, mesh) == PerLayer()
    assert choose_layout(decoder, mesh) == Stacked()
    for other in ({"attention": "xla"}, {"head_dim": 256}, {"window": 8, "local_layers": (True,)}):
        assert choose_layout(dataclasses.replace(half, **other), mesh) == Stacked()


def test_greedy_is_argmax_of_the_full_forward_pass(decoder, params, problems):
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


@pytest.mark.parametrize("num_slots", [16, 64])
def test_same_request_same_tokens_whatever_slots_and_order(
    decoder, params, problems, reference, num_slots
):
    requests = requests_of(problems[:8], group=4)
    np.random.default_rng(num_slots).shuffle(requests)
    other = sample(make_engine(decoder, params, num_slots=num_slots), requests)
    assert tokens_of(other) == tokens_of(reference)


def test_same_request_same_tokens_in_waves(decoder, params, problems, reference):
    """As with a barrier between micro-groups, or requests that come while others are decoded."""
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


def test_an_earlier_step_takes_slots_from_a_later_one(decoder, params, problems):
    """Four of step 1 come when four of step 2 fill all slots: they do not wait, and all get the tokens they get alone."""
    early, late = requests_of(problems[:1], group=4), requests_of(problems[1:2], group=4)
    alone = {
        step: sample(make_engine(decoder, params), requests, step=step)
        for step, requests in ((1, early), (2, late))
    }
    engine = make_engine(decoder, params, num_slots=4, segment_len=2)
    engine.submit(late, step=2, params=SamplingParams())
    assert engine.step() == []
    engine.submit(early, step=1, params=SamplingParams())
    begun_at, num_finished = engine.stats().decode_steps, 0
    while engine.is_busy:
        for c in engine.step():
            num_finished += 1
            is_early = c.request.problem.id == problems[0].id
            if is_early:
                assert engine.stats().decode_steps - begun_at == len(c.token_ids)
            expected = alone[1 if is_early else 2]
            assert c.token_ids == expected[c.request.problem.id, c.request.sample_index].token_ids
    assert num_finished == 8


def test_released_and_resumed_requests_get_the_same_tokens(decoder, params, problems, reference):
    """Unless the weights change in between: queued, begun and nearly finished ones alike."""
    requests = requests_of(problems[:8], group=4)
    engine = make_engine(decoder, params, num_slots=16)
    engine.submit(requests, step=1, params=SamplingParams())
    completions, lens = [], set()
    for _ in range(4):
        completions += engine.step()
        unfinished = engine.release()
        assert {c.finish_reason for c in unfinished} <= {FinishReason.UNFINISHED}
        lens |= {len(c.token_ids) for c in unfinished}
        engine.update_weights(params)
        assert engine.num_idle_slots == 16
        engine.resume(unfinished, step=1, params=SamplingParams())
        assert engine.num_idle_slots == max(0, 16 - len(unfinished))
    while engine.is_busy:
        completions += engine.step()
    assert 0 in lens
    assert len(lens) > 3
    assert len(completions) == len(reference)
    for c in completions:
        expected = reference[c.request.problem.id, c.request.sample_index]
        assert (c.token_ids, c.finish_reason) == (expected.token_ids, expected.finish_reason)
        np.testing.assert_allclose(c.logprobs, expected.logprobs, atol=1e-5)


def tokens_of(completions):
    return {key: completion.token_ids for key, completion in completions.items()}


def test_seed_step_and_sample_index_change_the_draw(decoder, params, problems):
    request = [RolloutRequest(problems[0], j) for j in range(16)]
    draws = sample(make_engine(decoder, params), request)
    assert len({c.token_ids for c in draws.values()}) > 8
    other_step = sample(make_engine(decoder, params), request, step=2)
    other_seed = sample(make_engine(decoder, params, seed=1), request)
    for other in (other_step, other_seed):
        assert [c.token_ids for c in other.values()] != [c.token_ids for c in draws.values()]


def test_max_length_stops_with_reason(decoder, params, problems):
    engine = make_engine(decoder, params, max_completion_length=5)
    request = RolloutRequest(problems[0], 0, 0, 0, 3)
    (completion,) = sample(engine, [request]).values()
    assert completion.finish_reason is FinishReason.LENGTH
    assert len(completion.token_ids) == 2  # prefix 3 + 2 = 5


def test_eos_is_part_of_the_completion(decoder, params, problems):
    for completion in sample(make_engine(decoder, params), requests_of(problems[:4])).values():
        assert completion.finish_reason is FinishReason.STOP
        assert completion.token_ids[-1] == EOS
        assert EOS not in completion.token_ids[:-1]


def test_several_eos_ids(decoder, params, problems, tokenizer):
    semicolon = tokenizer.convert_tokens_to_ids(";")
    engine = make_engine(decoder, params, eos_ids=[EOS, semicolon])
    completions = sample(engine, requests_of(problems[:8], ratios=(0.0,)), temperature=1.0)
    assert {c.token_ids[-1] for c in completions.values()} == {EOS, semicolon}


def test_empty_completion_is_eos_alone(decoder, params, problems):
    """After a whole expert but for its EOS, the model has nothing more to say."""
    problem = problems[0]
    length = len(problem.experts[0].token_ids) - 1
    (completion,) = sample(
        make_engine(decoder, params), [RolloutRequest(problem, 0, 0, 0, length)], temperature=0.0
    ).values()
    assert completion.token_ids == (EOS,)


def test_mistaken_requests_are_refused(decoder, params):
    engine = make_engine(decoder, params, max_prompt_length=4)
    too_long = Problem("a" * 16, (3,) * 5, "")
    empty = Problem("b" * 16, (), "")
    full = Problem("c" * 16, (3,), "", (Expert((4,) * 64),))
    for request, message in (
        (RolloutRequest(too_long, 0), "exceeds max_prompt_length 4"),
        (RolloutRequest(empty, 0), "empty prompt"),
        (RolloutRequest(full, 0, 0, 0, 64), "nothing to sample"),
    ):
        with pytest.raises(ValueError, match=message):
            engine.submit([request], step=0, params=SamplingParams())
    assert engine.step() == []


def test_what_is_finished_is_not_resumed(decoder, params, problems):
    engine = make_engine(decoder, params)
    request = RolloutRequest(problems[0], 0)
    whole = tuple([1] * engine.max_tokens(request))
    for completion, message in (
        (Completion(request, (1,), (0.0,), FinishReason.STOP), "the completion is finished"),
        (
            Completion(request, whole, (0.0,) * len(whole), FinishReason.UNFINISHED),
            "nothing to sample",
        ),
    ):
        begun = Completion(request, (), (), FinishReason.UNFINISHED)
        with pytest.raises(ValueError, match=message):
            engine.resume([begun, completion], step=0, params=SamplingParams())
    assert not engine.is_busy  # of a refused call nothing is queued


def test_weights_cannot_change_under_running_completions(decoder, params, problems):
    engine = make_engine(decoder, params)
    engine.submit([RolloutRequest(problems[0], 0)], step=0, params=SamplingParams())
    with pytest.raises(RuntimeError, match="update_weights"):
        engine.update_weights(params)


def test_a_long_run_compiles_nothing_new_and_holds_on_to_nothing(decoder, params, problems):
    """50 ragged steps without a new program after 100 of warm-up; then 50 without a new array or byte."""
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


def test_weights_are_cast_by_one_program(decoder, params):
    engine = make_engine(dataclasses.replace(decoder, dtype="bfloat16"), params)
    for _ in range(3):
        engine.update_weights(params)
    assert engine._cast._cache_size() == 1
    assert engine._replicas[0]._params["embedding"].dtype == jnp.bfloat16


def resident_bytes():
    gc.collect()
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_top_k_of_one_is_greedy_with_the_whole_distribution_s_logprob(decoder, params, problems):
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


def test_an_engine_without_truncation_refuses_it(decoder, params, problems):
    with pytest.raises(ValueError, match="with_truncation"):
        make_engine(decoder, params).submit(
            [RolloutRequest(problems[0], 0)], step=0, params=SamplingParams(top_p=0.9)
        )


def test_prefilled_tokens_are_prompts_and_distinct_extensions(decoder, params, problems):
    """Whatever the number of rollouts. The last token of a context is decoded, not prefilled."""
    engine = make_engine(decoder, params, num_contexts=8)
    requests = requests_of(problems[:8], group=6, ratios=(0.0, 0.2, 0.5))
    completions = sample(engine, requests)
    expected = sum(
        len(p.prompt_ids) + int(0.5 * len(p.experts[0].token_ids)) - 1 for p in problems[:8]
    )
    assert engine.stats().prefilled_tokens == expected
    assert engine.stats().decoded_tokens == sum(len(c.token_ids) for c in completions.values())
    assert engine.stats().slot_tokens >= engine.stats().decoded_tokens
    # The same again costs the same: nothing of the weights before is used.
    engine.update_weights(params)
    sample(engine, requests)
    assert engine.stats().prefilled_tokens == 2 * expected


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
