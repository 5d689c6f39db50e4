"""Converts a Hugging Face `config.json` to a `DecoderConfig`, or rejects it.

`ARCHITECTURES` lists the supported model families; `read_config` and `_local_layers` handle the differences between
their configs. Adding a family may also require changes to the tensor names in `hugging_face.py`, the operations in
`decoder.py`, and the parameter axes in `distributed/sharding.py`.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np

from trapo_jax.inputs.files import read_json_object, shown
from trapo_jax.models.attention import Implementation
from trapo_jax.models.decoder import DecoderConfig, Remat
from trapo_jax.models.lora import Lora
from trapo_jax.models.rope import Rope
from trapo_jax.models.tensor_files import has_own_head
from trapo_jax.types import UserError

ARCHITECTURES = ("llama", "qwen2", "qwen3", "mistral", "gemma3_text")
ROPE_TYPES = ("default", "linear", "llama3")
DEFAULT_THETA = 10_000.0
MIN_FLOAT32, MAX_FLOAT32 = (float(x) for x in (np.finfo(np.float32).tiny, np.finfo(np.float32).max))
# Sanity limits, far above the values of any real model. All parameters are enumerated before the weights are checked,
# so an absurd config must be rejected first.
MAX_LAYERS, MAX_DIMENSION, MAX_VOCAB_SIZE, MAX_POSITIONS = 2**12, 2**20, 2**24, 2**31 - 1
ORIGINAL_LEN = "original_max_position_embeddings"
# Any of these fields would change the result, and the decoder supports none of them.
UNSUPPORTED = (
    "mlp_bias",
    "quantization_config",
    "attn_logit_softcapping",
    "final_logit_softcapping",
    "use_bidirectional_attention",
)


def read_config(
    folder: Path,
    *,
    dtype: str = "float32",
    remat: Remat = "none",
    attention: Implementation = "auto",
    lora: Lora | None = None,
) -> DecoderConfig:
    """Reads a decoder's shape from `folder/config.json`, and checks whether the weights have a separate output head.

    Args:
      folder: the model folder.
      dtype, remat, attention, lora: compute options and adapters; see `DecoderConfig`.

    Raises:
      UserError: if the decoder cannot reproduce the model exactly. The error names the file and the field.
    """
    fields = _Fields(folder / "config.json")
    family = fields.get("model_type")
    is_gemma = family == "gemma3_text"
    _check_supported(fields, family, is_gemma=is_gemma)
    width, num_heads = fields.integer("hidden_size"), fields.integer("num_attention_heads")
    num_kv_heads = fields.integer("num_key_value_heads", num_heads)
    if num_heads % num_kv_heads:
        raise fields.error(
            f"num_attention_heads {num_heads} is not divisible by num_key_value_heads {num_kv_heads}"
        )
    head_dim = fields.integer("head_dim", width // num_heads)
    if head_dim % 2:
        raise fields.error(f"head_dim {head_dim} is odd; rotary embeddings need an even number")
    num_layers = fields.integer("num_hidden_layers", maximum=MAX_LAYERS)
    local_layers = _local_layers(fields, family, num_layers)
    rope, local_rope = _read_ropes(fields, is_gemma=is_gemma)
    has_bias = fields.flag("attention_bias", False)
    return DecoderConfig(
        vocab_size=fields.integer("vocab_size", maximum=MAX_VOCAB_SIZE),
        num_layers=num_layers,
        width=width,
        mlp_width=fields.integer("intermediate_size"),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        rope=rope,
        norm_epsilon=fields.number("rms_norm_eps"),
        # By default, transformers ties the embeddings of Gemma only.
        tied_embeddings=fields.flag("tie_word_embeddings", is_gemma) and not has_own_head(folder),
        activation="gelu_tanh" if is_gemma else "silu",
        qkv_bias=has_bias or family == "qwen2",
        output_bias=has_bias and family != "qwen2",
        qk_norm=family in ("qwen3", "gemma3_text"),
        post_norms=is_gemma,
        norm_offset=1.0 if is_gemma else 0.0,
        embedding_scale=width**0.5 if is_gemma else 1.0,
        attention_scale=fields.number("query_pre_attn_scalar") ** -0.5 if is_gemma else None,
        window=fields.integer("sliding_window", maximum=MAX_POSITIONS)
        if any(local_layers)
        else None,
        local_layers=local_layers,
        local_rope=local_rope,
        dtype=dtype,
        remat=remat,
        attention=attention,
        lora=lora,
    )


def _check_supported(fields: "_Fields", family: Any, *, is_gemma: bool) -> None:
    """Raises a `UserError` for models that the decoder does not support."""
    if family not in ARCHITECTURES:
        raise fields.error(
            f"model_type {shown(family)} is not supported; expected one of {', '.join(ARCHITECTURES)}"
        )
    for name in UNSUPPORTED:
        if fields.get(name):
            raise fields.error(f"{name} is not supported")
    activation_field, activation = (
        ("hidden_activation", "gelu_pytorch_tanh") if is_gemma else ("hidden_act", "silu")
    )
    if (found := fields.get(activation_field, activation)) != activation:
        raise fields.error(
            f"{activation_field} {shown(found)} is not supported; expected {activation!r}"
        )


def read_max_context_len(folder: Path) -> int | None:
    """Returns the maximum length of prompt plus completion in tokens; None if `config.json` does not state it.

    This is `max_position_embeddings`, multiplied by the scaling factor if the rotary embeddings have type "linear". In
    models with type "llama3" and in Gemma, `max_position_embeddings` already includes the factor.

    Args:
      folder: the model folder.

    Raises:
      UserError: if the field is not a positive integer. The error names the file and the field.
    """
    fields = _Fields(folder / "config.json")
    if fields.get("max_position_embeddings") is None:
        return None
    max_len = fields.integer("max_position_embeddings", maximum=MAX_POSITIONS)
    if fields.get("model_type") == "gemma3_text":
        return max_len
    rope, _ = _read_ropes(fields, is_gemma=False)
    return int(max_len * rope.factor) if rope.scaling == "linear" else max_len


def _local_layers(fields: "_Fields", family: str, num_layers: int) -> tuple[bool, ...]:
    """Returns whether each layer has a sliding window; an empty tuple if no layer has one."""
    switched_off = family.startswith("qwen") and not fields.flag("use_sliding_window", False)
    if family == "llama" or switched_off or fields.get("sliding_window") is None:
        return ()
    if (types := fields.get("layer_types")) is not None:
        known = {"sliding_attention": True, "full_attention": False}
        if (
            not isinstance(types, list)
            or len(types) != num_layers
            or any(not isinstance(name, str) or name not in known for name in types)
        ):
            raise fields.error(
                f"layer_types must be a list of {num_layers} entries, each one of {', '.join(known)}"
            )
        layers = tuple(known[name] for name in types)
    elif family == "gemma3_text":
        pattern = fields.integer("sliding_window_pattern", 6)
        layers = tuple((i + 1) % pattern != 0 for i in range(num_layers))
    elif family == "mistral":
        layers = (True,) * num_layers
    else:
        first = fields.integer("max_window_layers", 28, minimum=0)
        layers = tuple(i >= first for i in range(num_layers))
    return layers if any(layers) else ()


def _read_ropes(fields: "_Fields", *, is_gemma: bool) -> tuple[Rope, Rope | None]:
    """Returns the rotary embeddings of full-attention and of local layers; the latter is None except for Gemma.

    transformers 5 writes `rope_parameters`; older files have `rope_theta` and `rope_scaling`.
    """
    given = fields.mapping("rope_parameters")
    scaling = fields.mapping("rope_scaling")
    if not is_gemma:
        data = {**scaling, **given}
        if (original_len := fields.get(ORIGINAL_LEN)) is not None:
            data[ORIGINAL_LEN] = original_len  # takes precedence in transformers
        return _read_rope(fields, data, fields.number("rope_theta", DEFAULT_THETA)), None
    full = {**scaling, **fields.mapping("full_attention", given)}
    local = fields.mapping("sliding_attention", given)
    return (
        _read_rope(fields, full, fields.number("rope_theta", 1_000_000.0)),
        _read_rope(fields, local, fields.number("rope_local_base_freq", DEFAULT_THETA)),
    )


def _read_rope(fields: "_Fields", data: dict[str, Any], theta: float) -> Rope:
    kind = data.get("rope_type", data.get("type", "default"))
    if kind not in ROPE_TYPES:
        raise fields.error(
            f"rope type {shown(kind)} is not supported; expected one of {', '.join(ROPE_TYPES)}"
        )
    partial = data.get("partial_rotary_factor", fields.get("partial_rotary_factor", 1.0))
    if partial != 1.0:
        raise fields.error(f"partial_rotary_factor {shown(partial)} is not supported; expected 1.0")

    def number(name: str) -> float:
        value = data.get(name)
        if not _is_positive(value):
            raise fields.error(
                f"rope type {kind!r} needs a number {name!r} > 0 in the range of float32, found {shown(value)}"
            )
        return float(value)

    theta = number("rope_theta") if "rope_theta" in data else theta
    if kind == "default":
        return Rope(theta)
    if kind == "linear":
        return Rope(theta, "linear", number("factor"))
    low, high, original_len = map(number, ("low_freq_factor", "high_freq_factor", ORIGINAL_LEN))
    if low >= high or original_len > MAX_POSITIONS:
        raise fields.error(
            f"rope type 'llama3' needs low_freq_factor < high_freq_factor and {ORIGINAL_LEN} <= {MAX_POSITIONS}, found "
            f"{low:g}, {high:g} and {original_len:g}"
        )
    return Rope(
        theta,
        "llama3",
        factor=number("factor"),
        low_freq_factor=low,
        high_freq_factor=high,
        original_len=int(original_len),
    )


def _is_positive(value: Any) -> TypeGuard[float]:
    """Returns whether a JSON value is a number > 0 that float32 can represent.

    Python's JSON parser also accepts NaN and infinity.
    """
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and MIN_FLOAT32 <= value <= MAX_FLOAT32


class _Fields:
    """The fields of a JSON file. Error messages name the file and the field."""

    def __init__(self, path: Path):
        self._path = path
        self._data = read_json_object(path)

    def error(self, message: str) -> UserError:
        return UserError(f"{self._path}: {message}")

    def get(self, name: str, default: Any = None) -> Any:
        value = self._data.get(name)
        return default if value is None else value

    def integer(
        self,
        name: str,
        default: int | None = None,
        *,
        minimum: int = 1,
        maximum: int = MAX_DIMENSION,
    ) -> int:
        value = self._required(name, default)
        is_integer = isinstance(value, int) and not isinstance(value, bool)
        if not is_integer or not minimum <= value <= maximum:
            raise self.error(
                f"field {name!r} must be an integer >= {minimum} and <= {maximum}, found {shown(value)}"
            )
        return value

    def number(self, name: str, default: float | None = None) -> float:
        value = self._required(name, default)
        if not _is_positive(value):
            raise self.error(
                f"field {name!r} must be a number > 0 in the range of float32, found {shown(value)}"
            )
        return float(value)

    def flag(self, name: str, default: bool) -> bool:
        value = self.get(name, default)
        if not isinstance(value, bool):
            raise self.error(f"field {name!r} must be true or false, found {shown(value)}")
        return value

    def mapping(self, name: str, container: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Returns a JSON object in the file, or in `container`; empty if there is none."""
        value = (self._data if container is None else container).get(name)
        if value is None:
            return {}
        if not isinstance(value, dict):
            raise self.error(f"field {name!r} must be an object, found {shown(value)}")
        return value

    def _required(self, name: str, default: Any) -> Any:
        value = self.get(name, default)
        if value is None:
            raise self.error(f"field {name!r} is missing; is this a Hugging Face model folder?")
        return value
