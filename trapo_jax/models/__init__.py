"""Provides one decoder for all supported models, configured and loaded from Hugging Face model folders."""

from trapo_jax.models.attention import is_for_cudnn, supports_shared_segments
from trapo_jax.models.decoder import (
    Decoder,
    DecoderConfig,
    Params,
    abstract_params,
    apply_decoder,
    init_cache,
    output_projection,
    unembedding,
)
from trapo_jax.models.flops import TokenCost, count_attention_pairs, token_cost
from trapo_jax.models.generation_config import read_eos_ids
from trapo_jax.models.hugging_face import (
    check_weights,
    export_model,
    init_params,
    load_params,
)
from trapo_jax.models.hugging_face_config import (
    ARCHITECTURES,
    read_config,
    read_max_context_len,
)
from trapo_jax.models.kv_layouts import (
    KVCache,
    PerLayer,
    PerLayerTransposed,
    Stacked,
    StorageLayout,
)
from trapo_jax.models.location import find_model
from trapo_jax.models.lora import Lora, join_trained, split_trained
from trapo_jax.models.pretrained import (
    PretrainedModel,
    copy_model_files,
    open_model,
    read_decoder,
    with_weights,
)
from trapo_jax.models.rope import Rope
from trapo_jax.models.tokenizer import load_tokenizer

__all__ = [
    "ARCHITECTURES",
    "Decoder",
    "DecoderConfig",
    "KVCache",
    "Lora",
    "Params",
    "PerLayer",
    "PerLayerTransposed",
    "PretrainedModel",
    "Rope",
    "Stacked",
    "StorageLayout",
    "TokenCost",
    "abstract_params",
    "apply_decoder",
    "check_weights",
    "copy_model_files",
    "count_attention_pairs",
    "export_model",
    "find_model",
    "init_cache",
    "init_params",
    "is_for_cudnn",
    "join_trained",
    "load_params",
    "load_tokenizer",
    "open_model",
    "output_projection",
    "read_config",
    "read_decoder",
    "read_eos_ids",
    "read_max_context_len",
    "split_trained",
    "supports_shared_segments",
    "token_cost",
    "unembedding",
    "with_weights",
]
