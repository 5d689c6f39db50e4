"""Prints the temporary memory that `linear_token_logprobs` and its gradient need for a model of realistic size.

    python tools/measure_logprob_memory.py [--tokens 8192] [--width 3584] [--vocab 152064]

The value and the gradient are compiled for abstract bfloat16 arrays, and the compiler reports the memory usage. Nothing
is executed, so a laptop can measure a model that would not fit in its memory. The program is compiled for the first JAX
device. On a CPU, the result includes float32 copies of bfloat16 operands.
"""

import argparse

import jax
import jax.numpy as jnp

import trapo_jax.distributed.log_level  # noqa: F401  silences libtpu, before JAX loads it
from trapo_jax.losses import linear_token_logprobs

GB = 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--tokens", type=int, default=8192, help="number of tokens (default 8192)")
    parser.add_argument("--width", type=int, default=3584, help="model width (default 3584)")
    parser.add_argument(
        "--vocab", type=int, default=152_064, help="vocabulary size (default 152064)"
    )
    parser.add_argument(
        "--chunk-size", type=int, default=128, help="tokens per chunk (default 128)"
    )
    args = parser.parse_args()
    analysis = compiled_memory(args.tokens, args.width, args.vocab, chunk_size=args.chunk_size)
    dense = args.tokens * args.vocab * jnp.dtype(jnp.float32).itemsize
    print(
        f"tokens {args.tokens}, width {args.width}, vocabulary {args.vocab}, bfloat16, "
        f"chunks of {args.chunk_size} tokens, {jax.devices()[0].platform}\n"
        f"arguments                     {analysis.argument_size_in_bytes / GB:7.3f} GB\n"
        f"gradients and value           {analysis.output_size_in_bytes / GB:7.3f} GB\n"
        f"temporary memory              {analysis.temp_size_in_bytes / GB:7.3f} GB\n"
        f"dense: float32 logits alone   {dense / GB:7.3f} GB"
    )


def compiled_memory(tokens: int, width: int, vocab: int, *, chunk_size: int):
    """Returns the compiler's memory analysis of a loss and its gradients for the hidden states and the unembedding."""

    def loss(hidden, unembedding, labels):
        logprobs, entropies = linear_token_logprobs(
            hidden, unembedding, labels, chunk_size=chunk_size, with_entropy=True
        )
        return -jnp.mean(logprobs) - 0.001 * jnp.mean(entropies)

    lowered = jax.jit(jax.value_and_grad(loss, argnums=(0, 1))).lower(
        jax.ShapeDtypeStruct((tokens, width), jnp.bfloat16),
        jax.ShapeDtypeStruct((width, vocab), jnp.bfloat16),
        jax.ShapeDtypeStruct((tokens,), jnp.int32),
    )
    analysis = lowered.compile().memory_analysis()
    if analysis is None:
        raise SystemExit(
            f"the compiler for {jax.devices()[0].platform} provides no memory analysis"
        )
    return analysis


if __name__ == "__main__":
    main()
