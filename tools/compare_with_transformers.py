"""Compares the decoder and the sampler with transformers (PyTorch, float32, CPU), for any model folder.

    python tools/compare_with_transformers.py --model models/smollm2_135m [--tokens 64]

Prints the largest deviations of both implementations' logits from the same model's logits in float64, for 20 prompts in
one padded batch, and the number of greedy continuations that agree token by token. The exit code is 1 if trapo_jax's
logits deviate by more than 1e-5 of the largest logit, or if a continuation differs.

The reference is computed in float64 because float32 logits have rounding errors of up to about 1e-4: the logits of
SmolLM2-135M reach 40, and the float32 logits of transformers deviate from the float64 logits by 9e-5.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import torch
from transformers import AutoModelForCausalLM

import trapo_jax.distributed.log_level  # noqa: F401  silences libtpu, before JAX loads it
from trapo_jax.data import make_template
from trapo_jax.models import (
    apply_decoder,
    find_model,
    load_params,
    load_tokenizer,
    read_config,
    read_eos_ids,
    unembedding,
)
from trapo_jax.sampling.engine import EngineSpec, make_engine
from trapo_jax.types import Problem, RolloutRequest, SamplingParams

QUESTIONS = (
    "What is 17 times 23?",
    "Name three prime numbers larger than 50.",
    "Who wrote Hamlet?",
    "Explain photosynthesis in two sentences.",
    "Write a haiku about the sea.",
    "What is the capital of Australia?",
    "Translate 'good morning' into French.",
    "How many legs does a spider have?",
    "A train goes 60 km in 45 minutes. How fast is it?",
    "List the planets of the solar system.",
    "What does HTTP stand for?",
    "Why is the sky blue?",
    "Give me a recipe for pancakes.",
    "What is the derivative of x squared?",
    "Sort these numbers: 9, 4, 7, 1.",
    "Who was Marie Curie?",
    "What is the boiling point of water in Fahrenheit?",
    "Complete the sequence: 2, 4, 8, 16,",
    "Is a tomato a fruit or a vegetable?",
    "Tell me a joke about computers.",
)
TOLERANCE = 1e-5  # relative to the largest logit


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--model", required=True, help="Hugging Face model folder")
    parser.add_argument(
        "--tokens", type=int, default=64, help="length of each continuation (default 64)"
    )
    args = parser.parse_args()
    folder = find_model(args.model, weights=True)
    tokenizer: Any = load_tokenizer(folder)
    template = make_template("chat" if tokenizer.chat_template else "none", tokenizer)
    prompts = [
        tokenizer.encode(text, add_special_tokens=False) for text in template.render_all(QUESTIONS)
    ]
    theirs: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ours_off, theirs_off, largest = compare_logits(folder, theirs, prompts)
    print(
        f"logits of {sum(map(len, prompts))} tokens, largest {largest:.0f}; largest deviation from float64: "
        f"trapo_jax {ours_off:.1e}, transformers {theirs_off:.1e}"
    )
    same = compare_greedy(folder, theirs, prompts, tokenizer, args.tokens)
    print(f"greedy: {same} of {len(prompts)} continuations of {args.tokens} tokens agree")
    return int(ours_off > TOLERANCE * largest or same < len(prompts))


def compare_logits(
    folder: Path, theirs: Any, prompts: list[list[int]]
) -> tuple[float, float, float]:
    """Compares the float32 logits of trapo_jax and of transformers with float64 logits.

    trapo_jax processes all prompts in one right-padded batch, and transformers processes one prompt at a time.

    Returns:
      The largest deviation of trapo_jax, the largest deviation of transformers, and the largest logit.
    """
    config = read_config(folder)
    params = load_params(folder, config)
    longest = max(map(len, prompts))
    token_ids = np.array([ids + [0] * (longest - len(ids)) for ids in prompts], np.int32)
    positions = np.broadcast_to(np.arange(longest), token_ids.shape)
    valid = positions < np.array([len(ids) for ids in prompts])[:, None]
    hidden, _ = jax.jit(lambda *args: apply_decoder(config, *args))(
        params, token_ids, positions, valid.astype(np.int32)
    )
    ours = np.asarray(hidden @ unembedding(params))
    exact: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    distances = []
    for row, ids in zip(ours, prompts, strict=True):
        with torch.no_grad():
            reference, single = (m(torch.tensor([ids])).logits[0].numpy() for m in (exact, theirs))
        distances.append([np.abs(x - reference).max() for x in (row[: len(ids)], single)])
        distances[-1].append(np.abs(reference).max())
    ours_off, theirs_off, largest = np.max(distances, axis=0).tolist()
    return ours_off, theirs_off, largest


def compare_greedy(
    folder: Path, theirs: Any, prompts: list[list[int]], tokenizer: Any, num_tokens: int
) -> int:
    """Returns the number of greedy continuations that agree. The transformers model processes one prompt at a time."""
    config = read_config(folder)
    eos_ids = read_eos_ids(folder, tokenizer.eos_token_id, vocab_size=config.vocab_size)
    spec = EngineSpec(
        decoder=config,
        num_slots=8,
        max_prompt_length=max(map(len, prompts)),
        max_completion_length=num_tokens,
        segment_len=16,
        num_contexts=len(prompts),
        prefill_tokens=512,
        eos_ids=eos_ids,
        seed=0,
    )
    engine = make_engine("jax", spec)
    engine.update_weights(load_params(folder, config))
    problems = [Problem(f"{i:016x}", tuple(ids), "") for i, ids in enumerate(prompts)]
    engine.submit(
        [RolloutRequest(p, 0) for p in problems], step=0, params=SamplingParams(temperature=0.0)
    )
    ours = {}
    while engine.is_busy:
        ours |= {c.request.problem.id: list(c.token_ids) for c in engine.step()}
    same = 0
    for problem, ids in zip(problems, prompts, strict=True):
        output = theirs.generate(
            torch.tensor([ids]),
            attention_mask=torch.ones(1, len(ids), dtype=torch.long),
            max_new_tokens=num_tokens,
            do_sample=False,
            eos_token_id=eos_ids,
            pad_token_id=eos_ids[0],
        )
        same += output[0, len(ids) :].tolist() == ours[problem.id]
    return same


if __name__ == "__main__":
    sys.exit(main())
