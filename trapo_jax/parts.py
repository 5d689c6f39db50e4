"""Pieces of a run that `plan` and the gradient check build by hand; to be replaced by `Learner`."""

from pathlib import Path

import optax
from jax.sharding import Mesh

from trapo_jax.config import Config
from trapo_jax.distributed.sharding import num_batch_shards
from trapo_jax.methods import Method, make_method
from trapo_jax.models import DecoderConfig, read_decoder
from trapo_jax.training.optimizer import make_optimizer
from trapo_jax.training.state import TrainState
from trapo_jax.training.train_step import TokenScorer, TrainStep, make_train_step


def build_decoder(config: Config, model_folder: Path) -> DecoderConfig:
    return read_decoder(model_folder, config.model, config.lora)


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
    )


def build_train_step(
    config: Config,
    decoder: DecoderConfig,
    method: Method,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    shardings: TrainState,
) -> TrainStep:
    chunk_size = config.train.logprob_chunk_size * num_batch_shards(mesh)
    return make_train_step(
        TokenScorer(decoder, config.sampling.temperature, chunk_size),
        method,
        optimizer,
        mesh,
        shardings,
        max_completion_length=config.sampling.max_completion_length,
        ratio_to="sampler" if config.sampling.max_staleness else "trainer",
    )
