"""Rebuilds the built-in model, a Llama decoder with 0.35M parameters that has partially learned to shuffle cards.

    python tools/make_tiny_model.py --out DIR [--seed 2] [--steps 550] [--careless]

The training examples are 15% direct answers (programs of 1 to 6 operations), 35% clean traces of 1 to 3 operations, and
50% free chains (5 or 6 random operations without a program). Therefore, the model knows every operation and long
traces, but cannot follow programs of more than three operations. About seven examples are packed into each row. With
`--careless`, traces and chains are written in the style of the task's careless expert.
"""

import argparse
import json
import random
import shutil
import sys
import time
from pathlib import Path

import jax
import numpy as np
import optax
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

import trapo_jax.distributed.log_level  # noqa: F401  silences libtpu, before JAX loads it
from trapo_jax.data.card_shuffles import (
    OPERATIONS,
    apply_operation,
    expert_trace,
    random_digits,
    random_program,
)
from trapo_jax.losses import token_logprobs, token_mean
from trapo_jax.models import (
    apply_decoder,
    export_model,
    init_params,
    read_config,
    unembedding,
)

PAD, EOS, UNKNOWN = "<pad>", "<eos>", "<unk>"
CHARACTERS = "0123456789" + "?:=;#," + "rltsexm" + "hoku"
ROW_LEN = 256
BATCH_SIZE = 48
PEAK_LEARNING_RATE = 3e-3
# Maximum random jumps in positions. In every example, positions jump after each operation of the program and after the
# whole program. In half of the examples, they also jump after each step of the trace.
MAX_PROGRAM_JUMP, MAX_DIGITS_JUMP, MAX_STEP_JUMP = 3, 16, 2


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument(
        "--out", type=Path, required=True, help="the folder to write; it must not exist"
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=2,
        help="seed for weights and data (default 2, the built-in model's seed)",
    )
    parser.add_argument("--steps", type=int, default=550, help="optimizer steps (default 550)")
    parser.add_argument(
        "--careless", action="store_true", help="train on examples in the careless expert's style"
    )
    args = parser.parse_args()
    if args.out.exists():
        sys.exit(f"{args.out}: already exists; choose a new folder")
    source = args.out.with_name(args.out.name + ".source")
    shutil.rmtree(source, ignore_errors=True)
    source.mkdir(parents=True)
    write_side_files(source)
    config = read_config(source)
    params = train(
        config, seed=args.seed, steps=args.steps, careless=args.careless, vocabulary=vocabulary()
    )
    export_model(params, config, source=source, destination=args.out)
    shutil.rmtree(source)
    print(f"wrote {args.out} ({count_parameters(params):,} parameters)")


def vocabulary() -> dict[str, int]:
    """Returns a dict that maps each token to its id."""
    return {token: i for i, token in enumerate([PAD, EOS, UNKNOWN, *CHARACTERS])}


def write_side_files(folder: Path) -> None:
    """Writes `config.json` and a character tokenizer in the format of `transformers`."""
    ids = vocabulary()
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": len(ids),
        "hidden_size": 96,
        "intermediate_size": 256,
        "num_hidden_layers": 3,
        "num_attention_heads": 3,
        "num_key_value_heads": 3,
        "head_dim": 32,
        "hidden_act": "silu",
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": None,
        "eos_token_id": ids[EOS],
        "pad_token_id": ids[PAD],
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token=UNKNOWN))
    tokenizer.add_special_tokens([PAD, EOS, UNKNOWN])
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.save(str(folder / "tokenizer.json"))
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": EOS,
        "pad_token": PAD,
        "unk_token": UNKNOWN,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 256,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer_config, indent=2) + "\n")
    generation = {"eos_token_id": ids[EOS], "pad_token_id": ids[PAD], "do_sample": True}
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")


def draw_text(rng: random.Random, careless: bool) -> str:
    """Samples a training example, without EOS."""
    digits, kind = random_digits(rng), rng.random()
    if kind < 0.5:
        return f":{digits}=" + free_chain(rng, digits, careless)
    if kind < 0.85:
        program = random_program(rng, rng.randint(1, 3))
        return f"?{program}:{digits}=" + expert_trace(rng, program, digits, noise=careless)
    program = random_program(rng, rng.randint(1, 6))
    answer = digits
    for name in program:
        answer = apply_operation(name, answer)
    return f"?{program}:{digits}=#{answer}"


def free_chain(rng: random.Random, digits: str, careless: bool) -> str:
    """Samples a trace of random operations."""
    program = rng.choices(list(OPERATIONS), k=rng.choice((5, 6)))
    return expert_trace(rng, "".join(program), digits, noise=careless)


def make_rows(rng: random.Random, ids: dict[str, int], careless: bool) -> tuple[np.ndarray, ...]:
    """Packs examples into rows: token ids, positions, segment ids and the mask of trained tokens, each `[B, ROW_LEN]`.

    Positions contain random jumps. Otherwise, the model could find the k-th operation by its position, and would assign
    no probability to traces with more than the three steps seen in training, leaving TRAPO nothing to reinforce.
    """
    token_ids, positions, segment_ids = np.zeros((3, BATCH_SIZE, ROW_LEN), np.int32)
    trained = np.zeros((BATCH_SIZE, ROW_LEN), bool)
    for row in range(BATCH_SIZE):
        start, segment = 0, 1
        while True:
            text = draw_text(rng, careless)
            end = start + len(text) + 1
            if end > ROW_LEN:
                break
            token_ids[row, start:end] = [*(ids[c] for c in text), ids[EOS]]
            positions[row, start:end] = jumping_positions(rng, text)
            segment_ids[row, start:end] = segment
            trained[row, start + text.index("=") + 1 : end] = True
            start, segment = end, segment + 1
    return token_ids, positions, segment_ids, trained


def jumping_positions(rng: random.Random, text: str) -> np.ndarray:
    """Returns the positions of an example's characters and of the EOS token after them."""
    step_jump = MAX_STEP_JUMP if rng.random() < 0.5 else 0
    program = text.partition(":")[0]
    largest = [MAX_PROGRAM_JUMP] * len(program) + [MAX_DIGITS_JUMP]
    largest += [step_jump if c == ";" else 0 for c in text[len(largest) :]]
    return np.cumsum([0, *(1 + rng.randint(0, jump) for jump in largest)])


def train(config, *, seed: int, steps: int, careless: bool, vocabulary: dict[str, int]):
    params = init_params(config, seed=seed)
    warmup = max(1, steps // 20)
    schedule = optax.warmup_cosine_decay_schedule(0.0, PEAK_LEARNING_RATE, warmup, steps)
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(schedule, b2=0.98, weight_decay=0.01)
    )
    opt_state = optimizer.init(params)

    def loss_fn(params, token_ids, positions, segment_ids, trained):
        hidden, _ = apply_decoder(config, params, token_ids, positions, segment_ids)
        logits = hidden[:, :-1] @ unembedding(params)
        mask = trained[:, 1:]
        return token_mean(-token_logprobs(logits, token_ids[:, 1:], where=mask), where=mask)

    @jax.jit
    def step_fn(params, opt_state, *rows):
        loss, grads = jax.value_and_grad(loss_fn)(params, *rows)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss

    rng = random.Random(seed)
    started = time.monotonic()
    for step in range(1, steps + 1):
        params, opt_state, loss = step_fn(params, opt_state, *make_rows(rng, vocabulary, careless))
        if step % 50 == 0 or step == steps:
            elapsed = time.monotonic() - started
            left = elapsed / step * (steps - step)
            print(f"step {step}/{steps}  loss {loss:.3f}  {elapsed:.0f} s, {left:.0f} s left")
    return params


def count_parameters(params) -> int:
    return sum(x.size for x in jax.tree.leaves(params))


if __name__ == "__main__":
    main()
