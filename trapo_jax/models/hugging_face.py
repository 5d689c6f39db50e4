"""Hugging Face folders in and out: `config.json` and safetensors."""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from trapo_jax.models.decoder import Decoder, DecoderConfig, Params, abstract_params
from trapo_jax.types import UserError

ARCHITECTURES = ("llama",)
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
# What belongs to a model besides its weights, copied as it is on export.
SIDE_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "generation_config.json",
)


def read_config(folder: Path, *, dtype: str = "float32") -> DecoderConfig:
    """Reads the decoder's shape from `folder/config.json`.

    Raises:
      UserError: naming file and field, for anything this decoder would not compute exactly.
    """
    path = folder / "config.json"
    data = _read_json(path)

    def field(name: str) -> Any:
        if data.get(name) is None:
            raise UserError(f"{path}: no field {name!r}; is this a Hugging Face model folder?")
        return data[name]

    if data.get("model_type") not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise UserError(
            f"{path}: model_type {data.get('model_type')!r} is not covered ({known} is)"
        )
    rope = data.get("rope_parameters") or data.get("rope_scaling") or {}
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    uncovered = {
        f"rope type {rope_type!r}": rope_type != "default",
        "attention_bias": data.get("attention_bias"),
        "mlp_bias": data.get("mlp_bias"),
        f"hidden_act {data.get('hidden_act')!r}": data.get("hidden_act", "silu") != "silu",
    }
    for name, is_set in uncovered.items():
        if is_set:
            raise UserError(f"{path}: {name} is not covered by this decoder")
    theta = rope.get("rope_theta") or data.get("rope_theta") or 10_000.0
    return DecoderConfig(
        vocab_size=field("vocab_size"),
        num_layers=field("num_hidden_layers"),
        width=field("hidden_size"),
        mlp_width=field("intermediate_size"),
        num_heads=field("num_attention_heads"),
        num_kv_heads=data.get("num_key_value_heads") or field("num_attention_heads"),
        head_dim=data.get("head_dim") or field("hidden_size") // field("num_attention_heads"),
        rope_theta=float(theta),
        norm_epsilon=field("rms_norm_eps"),
        tied_embeddings=bool(data.get("tie_word_embeddings", False)),
        dtype=dtype,
    )


def init_params(config: DecoderConfig, *, seed: int) -> Params:
    """Freshly drawn parameters: normal with variance 1 / fan-in, norms 1."""
    return nnx.to_pure_dict(nnx.split(Decoder(config, rngs=nnx.Rngs(seed)))[1])


def load_params(folder: Path, config: DecoderConfig) -> Params:
    """Reads the safetensors of `folder` into the decoder's layout, as float32 NumPy arrays.

    Raises:
      UserError: naming tensor and file, for a missing, unexpected or misshapen tensor.
    """
    tensors = _TensorReader(folder)
    abstract = abstract_params(config)
    params = jax.tree.map(lambda x: np.empty(x.shape, np.float32), abstract)
    for name, shape, ours in _layout(config, params):
        theirs = tensors.read(name, shape)
        ours[...] = (theirs.T if _is_linear(name) else theirs).reshape(ours.shape)
    tensors.check_all_read(ignore={"lm_head.weight"} if config.tied_embeddings else set())
    return params


def export_model(params: Params, config: DecoderConfig, *, source: Path, destination: Path) -> None:
    """Writes a Hugging Face folder that `transformers` loads; appears whole or not at all.

    `config.json` and the tokenizer are those of `source`, the folder the run began from; the
    weights are float32. An existing `destination` is replaced.
    """
    staging = destination.with_name(destination.name + ".partial")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    host_params = jax.tree.map(lambda x: np.asarray(x, np.float32), params)
    tensors = {}
    for name, shape, ours in _layout(config, host_params):
        theirs = ours.reshape(shape[::-1]).T if _is_linear(name) else ours
        tensors[name] = np.ascontiguousarray(theirs)
    save_file(tensors, staging / WEIGHTS, metadata={"format": "pt"})
    model_config = _read_json(source / "config.json")
    model_config.pop("torch_dtype", None)
    model_config["dtype"] = "float32"
    (staging / "config.json").write_text(json.dumps(model_config, indent=2) + "\n")
    for name in SIDE_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, staging / name)
    if destination.exists():
        shutil.rmtree(destination)
    os.rename(staging, destination)


def _layout(c: DecoderConfig, params: Params) -> Iterator[tuple[str, tuple[int, ...], np.ndarray]]:
    """Each Hugging Face tensor's name and shape, and the view of `params` (NumPy) that it fills.

    Their linear weights are `[out, in]`, ours `[in, ..., out]` with q, k, v and gate, up fused.
    """
    group = c.num_heads // c.num_kv_heads
    yield "model.embed_tokens.weight", (c.vocab_size, c.width), params["embedding"]
    yield "model.norm.weight", (c.width,), params["final_norm"]
    if not c.tied_embeddings:
        yield "lm_head.weight", (c.vocab_size, c.width), params["unembedding"]
    query_shape = (c.num_heads * c.head_dim, c.width)
    key_shape = (c.num_kv_heads * c.head_dim, c.width)
    for i in range(c.num_layers):
        layer = {name: stacked[i] for name, stacked in params["layers"].items()}
        qkv, gate_up = layer["qkv"], layer["gate_up"]
        prefix = f"model.layers.{i}."
        yield prefix + "input_layernorm.weight", (c.width,), layer["attention_norm"]
        yield prefix + "self_attn.q_proj.weight", query_shape, qkv[:, :, :group]
        yield prefix + "self_attn.k_proj.weight", key_shape, qkv[:, :, group]
        yield prefix + "self_attn.v_proj.weight", key_shape, qkv[:, :, group + 1]
        yield prefix + "self_attn.o_proj.weight", query_shape[::-1], layer["output"]
        yield prefix + "post_attention_layernorm.weight", (c.width,), layer["mlp_norm"]
        yield prefix + "mlp.gate_proj.weight", (c.mlp_width, c.width), gate_up[:, 0]
        yield prefix + "mlp.up_proj.weight", (c.mlp_width, c.width), gate_up[:, 1]
        yield prefix + "mlp.down_proj.weight", (c.width, c.mlp_width), layer["down"]


def _is_linear(name: str) -> bool:
    return name == "lm_head.weight" or name.endswith("_proj.weight")


class _TensorReader:
    """Reads named tensors from one safetensors file or from several with an index."""

    def __init__(self, folder: Path):
        if (folder / INDEX).is_file():
            weight_map = _read_json(folder / INDEX).get("weight_map", {})
            self._files = {name: folder / file for name, file in weight_map.items()}
            self._where = folder / INDEX
        else:
            self._where = folder / WEIGHTS
            with _open_safetensors(self._where) as file:
                self._files = dict.fromkeys(file.keys(), self._where)
        self._unread = set(self._files)

    def read(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        if name not in self._files:
            raise UserError(f"{self._where}: tensor {name!r} is missing")
        path = self._files[name]
        with _open_safetensors(path) as file:
            try:
                tensor = file.get_tensor(name)
            except SafetensorError as error:
                raise UserError(f"{path}: tensor {name!r}: {error}") from error
        if tensor.shape != shape:
            raise UserError(f"{path}: tensor {name!r} has shape {tensor.shape}, expected {shape}")
        self._unread.discard(name)
        return tensor

    def check_all_read(self, *, ignore: set[str]) -> None:
        unexpected = sorted(self._unread - ignore)
        if unexpected:
            names = ", ".join(unexpected[:3]) + (", ..." if len(unexpected) > 3 else "")
            raise UserError(f"{self._where}: {len(unexpected)} unexpected tensors: {names}")


def _open_safetensors(path: Path):
    try:
        return safe_open(path, framework="numpy")
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: not a readable safetensors file ({error})") from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(data, dict):
        raise UserError(f"{path}: expected a JSON object")
    return data
