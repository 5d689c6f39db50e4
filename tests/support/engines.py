"""Builds engines for the built-in model, and computes the expected log-probabilities of their samples."""

import numpy as np

from trapo_jax.losses import token_logprobs
from trapo_jax.models import apply_decoder, unembedding
from trapo_jax.sampling.engine import EngineSpec
from trapo_jax.sampling.jax_engine import JaxEngine
from trapo_jax.types import RolloutRequest, SamplingParams

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
    """Computes a completion's log-probabilities with a forward pass over a batch that contains only this row."""
    request = completion.request
    context = request.problem.prompt_ids + request.prefix_ids
    ids = np.array([context + completion.token_ids])
    hidden, _ = apply_decoder(
        decoder, params, ids, np.arange(ids.shape[1])[None], np.ones_like(ids)
    )
    logits = hidden[:, :-1] @ unembedding(params) / temperature
    return token_logprobs(logits, ids[:, 1:])[0, len(context) - 1 :]


def tokens_of(completions):
    return {key: completion.token_ids for key, completion in completions.items()}
