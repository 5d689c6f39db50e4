"""Runs jobs with one engine, as a worker process of `bench_rollout.py`.

    python tools/bench_rollout_worker.py ENGINE MODEL_FOLDER DTYPE

The script imports only the dependencies of the selected engine, because Tunix runs in an environment without
trapo_jax.
"""

import dataclasses
import functools
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench_workers import Job, serve


class Ours:
    """The trapo_jax engine; `run_rollouts(engine, job)` determines the order of requests.

    The measured time includes `update_weights`, which every training step calls.
    """

    def __init__(self, folder: str, dtype: str, run_rollouts: Callable[[Any, Job], None]):
        from trapo_jax.models import load_params, read_config

        self.config = read_config(Path(folder), dtype=dtype)
        self.params = load_params(Path(folder), self.config)
        self.run_rollouts = run_rollouts
        self.job_name = ""
        self.engine: Any = None

    def run(self, job: Job) -> dict[str, Any]:
        if job["name"] != self.job_name:
            self.engine = None  # frees the engine's memory before the next engine is created
            self.job_name, self.engine = job["name"], scripted_engine(self.config, job)
        engine = self.engine
        before, compiled = engine.stats(), engine.num_compiled
        started = time.perf_counter()
        engine.update_weights(self.params)
        self.run_rollouts(engine, job)
        seconds = time.perf_counter() - started
        done = engine.stats() - before
        return {
            "seconds": seconds,
            "decoded_tokens": done.decoded_tokens,
            "decode_steps": done.decode_steps,
            "slot_utilization": done.slot_utilization,
            "prefilled_tokens": done.prefilled_tokens,
            "compiles": engine.num_compiled - compiled,
        }


def scripted_engine(config, job: Job):
    """Returns a `JaxEngine` that samples the number of tokens specified by the job for each rollout."""
    from trapo_jax.sampling.engine import EngineSpec
    from trapo_jax.sampling.jax_engine import JaxEngine

    problems = job["problems"]
    new = {(f"{i:016x}", j): n for i, p in enumerate(problems) for j, n in enumerate(p["num_new"])}

    class ScriptedEngine(JaxEngine):
        def max_tokens(self, request) -> int:
            return new[request.problem.id[:16], request.sample_index]

    spec = EngineSpec(
        decoder=config,
        num_slots=job["slots"],
        max_prompt_length=max(len(p["prompt"]) for p in problems),
        max_completion_length=max(*new.values(), *(len(p["expert"]) for p in problems)),
        num_contexts=len(problems),
        eos_ids=[],
        seed=0,
        **job["engine"],
    )
    return ScriptedEngine(spec)


def make_problems(job: Job) -> list:
    """Returns the problems of a job."""
    from trapo_jax.types import Expert, Problem

    return [
        Problem(
            f"{i:016x}",
            tuple(p["prompt"]),
            "",
            (Expert(tuple(p["expert"])),) if p["expert"] else (),
        )
        for i, p in enumerate(job["problems"])
    ]


def run_freely(engine, job: Job) -> None:
    """Collects rollouts as in training, where each problem advances independently."""
    from concurrent.futures import Future

    from trapo_jax.rollouts.collection import collect_groups
    from trapo_jax.rollouts.guidance import Guidance
    from trapo_jax.types import Grade, Judgment, MicroGroup, SamplingParams

    def grade(completion):
        request, grade = completion.request, Future()
        solved = job["problems"][int(request.problem.id, 16)]["rewards"][request.sample_index]
        reward = float(solved)
        grade.set_result(Grade(reward, {"scripted": Judgment(reward)}))
        return grade

    micro_groups = tuple(MicroGroup(*group) for group in job["micro_groups"])
    longest = max(max(*p["num_new"], len(p["expert"])) for p in job["problems"])
    collect_groups(
        engine,
        lambda _: Guidance(micro_groups, longest),
        grade,
        make_problems(job),
        step=1,
        params=SamplingParams(),
    )


def run_in_rounds(engine, job: Job, *, shared_prompts: bool = True) -> None:
    """Completes each micro-group for all problems before starting the next one.

    Args:
      engine: the engine.
      job: the job.
      shared_prompts: whether the rollouts of a problem share its prompt in the prefix cache.
    """
    from trapo_jax.types import RolloutRequest, SamplingParams

    problems = make_problems(job)
    for rows in job["rounds"]:
        requests = []
        for row in rows:
            problem = problems[row["problem"]]
            if (
                not shared_prompts
            ):  # The prefix cache is keyed by problem id, so distinct ids prevent sharing.
                problem = dataclasses.replace(problem, id=f"{problem.id}/{row['sample']}")
            requests.append(RolloutRequest(problem, row["sample"], 0, 0, row["prefix_len"]))
        engine.submit(requests, step=1, params=SamplingParams())
        while engine.is_busy:
            engine.step()


def batches(job: Job):
    """Yields batches for engines that cannot refill rows: contexts, and the number of tokens to sample for each."""
    for rows in job["rounds"]:
        for start in range(0, len(rows), job["slots"]):
            batch = rows[start : start + job["slots"]]
            experts = [job["problems"][row["problem"]]["expert"] for row in batch]
            yield (
                [
                    job["problems"][row["problem"]]["prompt"] + expert[: row["prefix_len"]]
                    for row, expert in zip(batch, experts, strict=True)
                ],
                [row["num_new"] for row in batch],
            )


class Transformers:
    """The `generate` method of transformers, with its KV cache. Finished rows are padded until all rows finish."""

    def __init__(self, folder: str, dtype: str):
        import torch
        from transformers import AutoModelForCausalLM

        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.torch = torch
        self.model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
        self.model = self.model.eval().to(device)
        self.model.generation_config.eos_token_id = None  # The job specifies the lengths.

    def run(self, job: Job) -> dict[str, Any]:
        prefilled, decoded, started = 0, 0, time.perf_counter()
        for contexts, num_new in batches(job):
            length = self.generate(contexts, max(num_new))
            prefilled += sum(map(len, contexts))
            decoded += sum(min(length, n) for n in num_new)
        seconds = time.perf_counter() - started
        return {"seconds": seconds, "prefilled_tokens": prefilled, "decoded_tokens": decoded}

    def generate(self, contexts: list[list[int]], num_new: int) -> int:
        """Samples tokens and returns the number of new tokens per row."""
        longest = max(map(len, contexts))
        pad = lambda ids, fill: [fill] * (longest - len(ids)) + ids
        tensor = lambda rows: self.torch.tensor(rows, device=self.model.device)
        with self.torch.inference_mode():
            rows = self.model.generate(
                input_ids=tensor([pad(ids, 0) for ids in contexts]),
                attention_mask=tensor([pad([1] * len(ids), 0) for ids in contexts]),
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                max_new_tokens=num_new,
                pad_token_id=0,
            )
        return rows.shape[1] - longest


class Tunix:
    """The Tunix sampler.

    The sampler recompiles for every batch length. Therefore, prompts are padded to one of a few lengths, and the token
    buffer always has the length of the longest batch. Decoding still ends when the current batch is finished.
    """

    def __init__(self, folder: str, dtype: str):
        self.model, self.config = tunix_model(folder, dtype)

    def run(self, job: Job) -> dict[str, Any]:
        from tunix.generate.sampler import (  # pyright: ignore[reportMissingImports]
            CacheConfig,
            Sampler,
        )

        work = [
            (contexts, round_up(max(map(len, contexts))), num_new)
            for contexts, num_new in batches(job)
        ]
        if getattr(self, "job_name", None) != job["name"]:
            self.job_name = job["name"]
            cache = CacheConfig(
                cache_size=max(prompt + max(num_new) for _, prompt, num_new in work),
                num_layers=self.config.num_layers,
                num_kv_heads=self.config.num_kv_heads,
                head_dim=self.config.head_dim,
            )
            self.sampler = fixed_buffer(Sampler)(self.model, TokenIds(), cache)
        prefilled, decoded, started = 0, 0, time.perf_counter()
        for contexts, prompt_len, num_new in work:
            rows = self.sampler(
                [" ".join(map(str, ids)) for ids in contexts],
                max_generation_steps=max(num_new),
                max_prompt_length=prompt_len,
                temperature=1.0,
                top_p=1.0,
                eos_tokens=[TokenIds.NEVER],
            )
            prefilled += sum(map(len, contexts))
            decoded += sum(min(len(ids), n) for ids, n in zip(rows.tokens, num_new, strict=True))
        seconds = time.perf_counter() - started
        return {"seconds": seconds, "prefilled_tokens": prefilled, "decoded_tokens": decoded}


def tunix_model(folder: str, dtype: str) -> tuple[Any, Any]:
    """Returns the Tunix Llama model with the weights from a Hugging Face folder, and its config."""
    import jax.numpy as jnp
    from tunix.models.llama3 import model, params  # pyright: ignore[reportMissingImports]

    shape = json.loads((Path(folder) / "config.json").read_text())
    rope = shape.get("rope_parameters") or shape
    config = model.ModelConfig(
        num_layers=shape["num_hidden_layers"],
        vocab_size=shape["vocab_size"],
        embed_dim=shape["hidden_size"],
        hidden_dim=shape["intermediate_size"],
        num_heads=shape["num_attention_heads"],
        head_dim=shape.get("head_dim") or shape["hidden_size"] // shape["num_attention_heads"],
        num_kv_heads=shape["num_key_value_heads"],
        rope_theta=rope["rope_theta"],
        norm_eps=shape["rms_norm_eps"],
        weight_tying=shape["tie_word_embeddings"],
    )
    # The attention in Tunix 0.1.7 ignores the config's `rope_theta`.
    model.apply_rope = functools.partial(model.apply_rope, rope_theta=config.rope_theta)
    return params.create_model_from_safe_tensors(folder, config, dtype=getattr(jnp, dtype)), config


def fixed_buffer(sampler_class):
    """Returns a subclass of the sampler whose token buffer has the same length for all batches."""

    class FixedBuffer(sampler_class):
        def init_sample_state(self, *args, total_sampling_steps: int, **kwargs):
            longest = self.cache_config.cache_size
            state = super().init_sample_state(*args, total_sampling_steps=longest, **kwargs)
            return dataclasses.replace(state, total_sampling_steps=total_sampling_steps)

    return FixedBuffer


class TokenIds:
    """A tokenizer that represents token ids as decimal numbers, for an API that expects text."""

    NEVER = -1

    def encode(self, text: str, **_) -> list[int]:
        return [int(word) for word in text.split()]

    def decode(self, ids, **_) -> str:
        return " ".join(map(str, ids))

    def bos_id(self) -> int:
        return 0  # The sampler interprets 0 as "no BOS token" and prepends nothing to prompts.

    def eos_id(self) -> int:
        return self.NEVER

    def pad_id(self) -> int:
        return 0


def round_up(length: int) -> int:
    """Rounds a length up to a multiple of 32."""
    return -(-length // 32) * 32


ENGINES = {
    "ours": functools.partial(Ours, run_rollouts=run_freely),
    "barrier": functools.partial(Ours, run_rollouts=run_in_rounds),
    "unshared": functools.partial(
        Ours, run_rollouts=functools.partial(run_in_rounds, shared_prompts=False)
    ),
    "transformers": Transformers,
    "tunix": Tunix,
}


if __name__ == "__main__":
    sys.exit(serve(ENGINES))
