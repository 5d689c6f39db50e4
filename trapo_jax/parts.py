"""The method that a config names."""

from trapo_jax.config import Config
from trapo_jax.methods import Method, make_method


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
