"""What a run is made of, built once from its config; the commands work with it."""

import dataclasses
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import jax
import optax
from jax.sharding import Mesh

from trapo_jax.config import Config
from trapo_jax.data.splits import load_splits
from trapo_jax.distributed.sharding import make_mesh, num_batch_shards
from trapo_jax.methods import Method, make_method
from trapo_jax.models import (
    DecoderConfig,
    Lora,
    TokenCost,
    abstract_params,
    find_model,
    load_params,
    load_tokenizer,
    read_config,
    read_eos_ids,
    token_cost,
)
from trapo_jax.rewards import Verifier, make_verifier
from trapo_jax.rollouts.guidance import Guidance
from trapo_jax.runs.monitoring import Watchdog
from trapo_jax.sampling import JaxEngine
from trapo_jax.training.budget import Budget
from trapo_jax.training.train_step import (
    TrainState,
    TrainStep,
    init_state,
    make_batch_logprobs,
    make_learning_rate,
    make_optimizer,
    make_train_step,
    state_shardings,
)
from trapo_jax.types import Completion, Moment, Problem, TrainBatch, UserError, Verdict


@dataclasses.dataclass(frozen=True)
class Parts:
    """Everything a run is made of, built once from the config."""

    config: Config
    method: Method
    model_folder: Path
    decoder: DecoderConfig
    tokenizer: Any
    splits: dict[str, list[Problem]]
    problems: dict[str, Problem]  # those of training, by id
    data_summary: dict[str, Any]  # goes to data.json
    engine: JaxEngine
    verifier: Verifier
    optimizer: optax.GradientTransformation
    mesh: Mesh
    shardings: TrainState
    train_step: TrainStep
    learning_rate: Callable[[float, float], float]
    budget: Budget
    token_cost: TokenCost
    batch_logprobs: Callable[[Any, TrainBatch], jax.Array]
    ref_params: Any  # of the model the run began with; None if no loss needs them
    watchdog: Watchdog

    def scheduler_at(self, moment: Moment) -> Callable[[Problem], Guidance]:
        """What decides the guidance of each problem of a step."""
        method, longest = self.method, self.config.sampling.max_completion_length
        return lambda problem: Guidance(
            method.micro_groups_at(moment, problem),
            longest,
            method.prefix_boundary,
            method.second_expert_last,
        )

    def score(self, completion: Completion) -> Future[Verdict]:
        """The verdict, now or later, on a completion's whole response, special tokens spelled out."""
        self.watchdog.beat("sampling")
        ids = (*completion.request.prefix_ids, *completion.token_ids)
        return self.verifier.submit(self.tokenizer.decode(ids), completion.request.problem)


def build(config: Config, method: Method) -> tuple[Parts, TrainState]:
    """Builds every part; returns them and the state before the first step."""
    if config.sampling.max_staleness and method.guidance_varies:
        raise UserError(
            f"sampling.max_staleness=1: method.name={method.name} guides every step in another way, and a rollout "
            "begun a step early would be guided as the step before; give sampling.max_staleness=0"
        )
    model_folder = find_model(config.model.path)
    decoder = build_decoder(config, model_folder)
    tokenizer: Any = load_tokenizer(model_folder)
    d, s, t = config.data, config.sampling, config.train
    splits, data_summary = load_splits(d, tokenizer)
    mesh = make_mesh(data=config.mesh.data, fsdp=config.mesh.fsdp, tp=config.mesh.tp)
    optimizer = build_optimizer(config)
    num_optimizers = len(method.optimizers)
    shardings = state_shardings(abstract_params(decoder), optimizer, mesh, num_optimizers)
    load = lambda: load_params(model_folder, decoder, shardings.params, seed=config.seed)
    state = init_state(load(), optimizer, mesh, num_optimizers)
    parts = Parts(
        config=config,
        method=method,
        model_folder=model_folder,
        decoder=decoder,
        tokenizer=tokenizer,
        splits=splits,
        problems={problem.id: problem for problem in splits["train"]},
        data_summary=data_summary,
        engine=JaxEngine(
            decoder,
            num_slots=s.num_slots,
            max_prompt_length=d.max_prompt_length,
            max_completion_length=s.max_completion_length,
            segment_len=s.segment_len,
            num_contexts=s.num_contexts,
            prefill_tokens=s.prefill_tokens,
            eos_ids=read_eos_ids(model_folder, tokenizer.eos_token_id),
            seed=config.seed,
            mesh=mesh,
        ),
        verifier=make_verifier(
            config.rewards.verifier,
            eos_text=tokenizer.eos_token,
            num_workers=config.rewards.workers,
            timeout_secs=config.rewards.timeout_secs,
            max_response_chars=config.rewards.max_response_chars,
        ),
        optimizer=optimizer,
        mesh=mesh,
        shardings=shardings,
        train_step=build_train_step(config, decoder, method, optimizer, mesh, shardings),
        learning_rate=build_learning_rate(config),
        budget=Budget(t.budget_unit, t.budget, t.num_steps),
        token_cost=token_cost(decoder),
        batch_logprobs=make_batch_logprobs(
            decoder,
            mesh,
            shardings.params,
            temperature=s.temperature,
            chunk_size=t.logprob_chunk_size * num_batch_shards(mesh),
        ),
        ref_params=load() if method.needs_reference else None,
        watchdog=Watchdog(config.limits.stuck_after_secs),
    )
    return parts, state


def build_decoder(config: Config, model_folder: Path) -> DecoderConfig:
    m = config.model
    return read_config(
        model_folder,
        dtype=m.dtype,
        remat=m.remat,
        attention=m.attention,
        lora=build_lora(config),
    )


def build_lora(config: Config) -> Lora | None:
    c = config.lora
    return Lora(c.rank, c.alpha, c.targets) if c.rank else None


def build_method(config: Config) -> Method:
    m = config.method
    return make_method(
        m.name,
        preset=m.preset,
        constants=m.constants,
        alpha=m.alpha,
        expert_weight=m.expert_weight,
        normalizer=m.normalizer,
        clip_low=m.clip_low,
        clip_high=m.clip_high,
        kl_weight=m.kl_weight,
        scale_by_std=m.scale_advantages_by_std,
        entropy_weight=m.entropy_weight,
    )


def build_optimizer(config: Config) -> optax.GradientTransformation:
    t = config.train
    return make_optimizer(
        adam_b1=t.adam_b1,
        adam_b2=t.adam_b2,
        weight_decay=t.weight_decay,
        max_grad_norm=t.max_grad_norm,
        name=t.optimizer,
        muon_beta=t.muon_beta,
    )


def build_learning_rate(config: Config) -> Callable[[float, float], float]:
    t = config.train
    return make_learning_rate(
        learning_rate=t.learning_rate,
        warmup_steps=t.warmup_steps,
        num_steps=t.num_steps,
        decay_start=t.decay_start,
        final_learning_rate_ratio=t.final_learning_rate_ratio,
    )


def build_train_step(
    config: Config,
    decoder: DecoderConfig,
    method: Method,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    shardings: TrainState,
) -> TrainStep:
    return make_train_step(
        decoder,
        method,
        optimizer,
        mesh,
        shardings,
        temperature=config.sampling.temperature,
        max_completion_length=config.sampling.max_completion_length,
        chunk_size=config.train.logprob_chunk_size * num_batch_shards(mesh),
        ratio_to="sampler" if config.sampling.max_staleness else "trainer",
    )
