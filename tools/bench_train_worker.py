"""Runs jobs with one engine, as a worker process of `bench_train.py`.

python tools/bench_train_worker.py ENGINE MODEL_FOLDER DTYPE
"""

import functools
import sys
import time
from pathlib import Path
from typing import Any

from bench_workers import Job, serve

LEARNING_RATE, B1, B2, WEIGHT_DECAY, MAX_NORM = 1e-5, 0.9, 0.98, 0.01, 1.0


class Ours:
    """The train step of `trapo_jax.train` with `method.name=sft`, including batch construction."""

    def __init__(self, folder: str, dtype: str, *, packed: bool = True, share_prompts: bool = True):
        from trapo_jax.distributed.sharding import make_mesh
        from trapo_jax.methods import make_method
        from trapo_jax.models import load_params, read_config
        from trapo_jax.training.optimizer import make_optimizer
        from trapo_jax.training.state import init_state, state_shardings

        self.packed, self.share_prompts = packed, packed and share_prompts
        self.config = read_config(Path(folder), dtype=dtype, remat="dots")
        self.mesh = make_mesh(fsdp=-1, tp=1)
        self.optimizer = make_optimizer(adam_b1=B1, adam_b2=B2, weight_decay=WEIGHT_DECAY)
        params = load_params(Path(folder), self.config)
        self.shardings = state_shardings(params, self.optimizer, self.mesh)
        self.state = init_state(params, self.optimizer, self.mesh)
        self.method = make_method("sft")
        self.step: Any = None

    def run(self, job: Job) -> dict[str, Any]:
        import jax

        from trapo_jax.training.packing import build_batch
        from trapo_jax.training.train_step import TokenScorer, make_train_step, place_batch
        from trapo_jax.types import Moment

        if self.step is None:
            self.step = make_train_step(
                TokenScorer(self.config, temperature=1.0, chunk_size=512),
                self.method,
                self.optimizer,
                self.mesh,
                self.shardings,
                max_completion_length=job["row_len"],
            )
        rows = train_rows(job)
        started = time.perf_counter()
        batch = build_batch(
            rows,
            row_len=job["row_len"],
            micro_batch_rows=job["micro_batch_rows"],
            packed=self.packed,
            share_prompts=self.share_prompts,
        )
        coefficients = self.method.coefficients(
            Moment(1, 0.0, 0), learning_rate=LEARNING_RATE, max_grad_norm=MAX_NORM
        )
        self.state, metrics, _ = self.step(self.state, place_batch(batch, self.mesh), coefficients)
        loss = float(jax.device_get(metrics)["loss/total"])
        seconds = time.perf_counter() - started
        computed = int(batch.num_micro_batches) * job["micro_batch_rows"] * job["row_len"]
        return {"seconds": seconds, "loss": loss, "computed_tokens": computed}


def train_rows(job: Job) -> list:
    """Returns the rows of a job, with the responses as expert solutions."""
    from trapo_jax.types import (
        Completion,
        Expert,
        FinishReason,
        Problem,
        RolloutRequest,
        TrainRow,
    )

    rows = []
    for i, row in enumerate(job["rows"]):
        expert = Expert(tuple(row["response"]))
        problem = Problem(f"{i:016x}", tuple(row["prompt"]), "", (expert,))
        request = RolloutRequest(problem, 0, 0, 0, len(row["response"]))
        rows.append(TrainRow(Completion(request, (), (), FinishReason.STOP), 0.0, True))
    return rows


def padded_micro_batches(job: Job, *, by_length: bool = True, multiple: int = 1):
    """Yields micro-batches as lists: token ids, a mask of trained tokens, and a mask of non-padding tokens.

    Args:
      job: the job.
      by_length: whether to sort the rows by length.
      multiple: lengths are rounded up to a multiple of this.
    """
    rows = job["rows"]
    if by_length:
        rows = sorted(rows, key=lambda row: len(row["prompt"]) + len(row["response"]))
    size = job["micro_batch_rows"]
    for part in (rows[i : i + size] for i in range(0, len(rows), size)):
        longest = max(len(row["prompt"]) + len(row["response"]) for row in part)
        longest = -(-longest // multiple) * multiple
        fill = lambda x, longest=longest: x + [0] * (longest - len(x))
        yield (
            [fill(row["prompt"] + row["response"]) for row in part],
            [fill([0] * len(row["prompt"]) + [1] * len(row["response"])) for row in part],
            [fill([1] * (len(row["prompt"]) + len(row["response"]))) for row in part],
        )


class Torch:
    """A plain PyTorch loop: a forward and backward pass per micro-batch, gradient clipping, and AdamW."""

    def __init__(self, folder: str, dtype: str, *, by_length: bool = True):
        import torch
        from transformers import AutoModelForCausalLM

        self.torch, self.by_length, self.dtype = torch, by_length, getattr(torch, dtype)
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        self.model.train().to(self.device)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=LEARNING_RATE, betas=(B1, B2), weight_decay=WEIGHT_DECAY
        )

    def run(self, job: Job) -> dict[str, Any]:
        torch = self.torch
        num_trained = sum(len(row["response"]) for row in job["rows"])
        started, total, computed = time.perf_counter(), 0.0, 0
        for batch in padded_micro_batches(job, by_length=self.by_length):
            ids, trained, seen = (torch.tensor(x, device=self.device) for x in batch)
            computed += ids.numel()
            labels = ids[:, 1:].masked_fill(trained[:, 1:] == 0, -100)
            is_float = self.dtype == torch.float32
            with torch.autocast(self.device, self.dtype, enabled=not is_float):
                logits = self.model(input_ids=ids, attention_mask=seen).logits[:, :-1]
                loss = torch.nn.functional.cross_entropy(
                    logits.flatten(0, 1), labels.flatten(), reduction="sum"
                )
            (loss / num_trained).backward()
            total += float(loss.detach())
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), MAX_NORM)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        seconds = time.perf_counter() - started
        return {"seconds": seconds, "loss": total / num_trained, "computed_tokens": computed}


class Tunix:
    """The Tunix trainer's jitted step, called once per micro-batch.

    `optax.MultiSteps` updates the parameters after the last micro-batch. Tunix's own loss is the mean over a
    micro-batch, which differs from the mean over the whole batch; here, the loss sum of every micro-batch is divided by
    the same number instead. Rows are padded to one of a few lengths, because the step is compiled for each length.
    """

    def __init__(self, folder: str, dtype: str):
        from bench_rollout_worker import tunix_model

        self.model, _ = tunix_model(folder, dtype)
        self.step: Any = None

    def run(self, job: Job) -> dict[str, Any]:
        import jax.numpy as jnp

        batches = list(padded_micro_batches(job, multiple=64))
        if self.step is None:
            self.step = tunix_step(self.model, len(batches))
        num_trained = sum(len(row["response"]) for row in job["rows"])
        started, total, computed = time.perf_counter(), 0.0, 0
        for ids, trained, seen in batches:
            tokens, mask, seen = jnp.asarray(ids), jnp.asarray(trained), jnp.asarray(seen)
            computed += tokens.size
            length = tokens.shape[1]
            causal = jnp.tril(jnp.ones((length, length), bool))
            loss, *_ = self.step(
                {
                    "input_tokens": tokens,
                    "input_mask": mask,
                    "positions": jnp.broadcast_to(jnp.arange(length), tokens.shape),
                    "attention_mask": causal & (seen[:, None, :] == 1),
                    "divisor": jnp.float32(num_trained / len(batches)),
                }
            )
            total += float(loss) / len(batches)
        seconds = time.perf_counter() - started
        return {"seconds": seconds, "loss": total, "computed_tokens": computed}


def tunix_step(model, num_micro_batches: int):
    """Returns the Tunix trainer's jitted train step."""
    import jax
    import jax.numpy as jnp
    import optax
    from tunix.sft.peft_trainer import (  # pyright: ignore[reportMissingImports]
        PeftTrainer,
        TrainingConfig,
    )

    def loss(model, input_tokens, input_mask, positions, attention_mask, divisor):
        logits, _ = model(input_tokens, positions, None, attention_mask)
        logprobs = jax.nn.log_softmax(logits[:, :-1])
        target_logprobs = jnp.take_along_axis(logprobs, input_tokens[:, 1:, None], axis=-1)[..., 0]
        return -jnp.sum(target_logprobs * input_mask[:, 1:]) / divisor

    optimizer = optax.chain(
        optax.clip_by_global_norm(MAX_NORM),
        optax.adamw(LEARNING_RATE, b1=B1, b2=B2, weight_decay=WEIGHT_DECAY),
    )
    config = TrainingConfig(eval_every_n_steps=10**9, gradient_accumulation_steps=num_micro_batches)
    trainer = PeftTrainer(model, optimizer, config).with_loss_fn(loss)
    return trainer.jit_train_and_eval_step()[0]


ENGINES = {
    "ours": Ours,
    "ours, unpacked": functools.partial(Ours, packed=False),
    "ours, unshared": functools.partial(Ours, share_prompts=False),
    "torch": Torch,
    "torch, unsorted": functools.partial(Torch, by_length=False),
    "tunix": Tunix,
}


if __name__ == "__main__":
    sys.exit(serve(ENGINES))
