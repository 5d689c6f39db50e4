"""Reads and writes the weights of Hugging Face model folders."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from safetensors.numpy import save_file

from trapo_jax.models.decoder import Decoder, DecoderConfig, Params, abstract_params
from trapo_jax.models.lora import A, B, join_trained, merged, split_trained
from trapo_jax.models.side_files import CONFIG, replaced_folder, write_side_files
from trapo_jax.models.tensor_files import EMBEDDING, HEAD, INDEX, WEIGHTS, TensorReader

SHARD = "model-{:05d}-of-{:05d}.safetensors"


def init_params(config: DecoderConfig, *, seed: int) -> Params:
    """Initializes matrices randomly (normal with variance 1 / fan-in), biases to 0, and norms to a scale of 1."""
    return nnx.to_pure_dict(nnx.split(Decoder(config, rngs=nnx.Rngs(seed)))[1])


def load_params(
    folder: Path, config: DecoderConfig, shardings: Params | None = None, *, seed: int = 0
) -> Params:
    """Loads safetensors (float32, bfloat16, or float16) from `folder` as float32 arrays on the devices.

    Only one stacked parameter and one tensor are in host memory at a time. Adapters are initialized, not loaded.

    Args:
      folder: contains `model.safetensors`, or several files and their index.
      config: the shape of the model in this folder.
      shardings: the sharding of each parameter. If None, all parameters are placed on the default device.
      seed: random seed for the adapters of `config.lora`.

    Raises:
      UserError: if a tensor is missing or unexpected, has the wrong shape or dtype, cannot be read, or is not finite.
        The error names the tensor and the file. All checks of names, shapes, and dtypes run before any tensor is read.
    """
    tensors, tensor_map = _open_tensors(folder, config)

    def load(path, abstract, sharding):
        host = np.empty(abstract.shape, np.float32)
        for part in tensor_map[_name(path)]:
            ours = host[part.index]
            theirs = tensors.read(part.name)
            ours[...] = (theirs.T if part.is_linear else theirs).reshape(ours.shape)
            if not _all_finite(ours):
                raise tensors.error(part.name, "has values that are not finite (NaN or infinity)")
        if sharding is None:
            return jax.device_put(host)
        return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])

    abstract = abstract_params(config)
    if shardings is None:
        shardings = jax.tree.map(lambda _: None, abstract)
    if config.lora is None:
        return jax.tree_util.tree_map_with_path(load, abstract, shardings)
    (adapters, kept), (adapter_shardings, kept_shardings) = map(
        split_trained, (abstract, shardings)
    )
    # Under jit, parameters that are not adapters are never computed.
    init_adapters = lambda: split_trained(init_params(config, seed=seed))[0]
    adapters = jax.jit(init_adapters, out_shardings=adapter_shardings)()
    return join_trained(adapters, jax.tree_util.tree_map_with_path(load, kept, kept_shardings))


def check_weights(folder: Path, config: DecoderConfig) -> None:
    """Checks the names, shapes, and dtypes of a folder's tensors, which takes much less time than reading the tensors.

    Raises:
      UserError: see `load_params`.
    """
    _open_tensors(folder, config)


def _open_tensors(
    folder: Path, config: DecoderConfig
) -> tuple[TensorReader, dict[str, list["_TensorPart"]]]:
    """Checks the folder's tensors, and returns a reader for them and the tensors that make up each parameter."""
    tensor_map = _tensor_map(config)
    shapes = {part.name: part.shape for parts in tensor_map.values() for part in parts}
    tensors = TensorReader(folder, {*shapes, HEAD})
    if config.tied_embeddings and EMBEDDING not in tensors and HEAD in tensors:
        # As in transformers, either of two tied tensors is enough.
        tensor_map["embedding"] = [tensor_map["embedding"][0]._replace(name=HEAD)]
        shapes[HEAD] = shapes.pop(EMBEDDING)
    tensors.check(shapes, optional={HEAD: (config.vocab_size, config.width)})
    return tensors, tensor_map


def export_model(
    params: Params,
    config: DecoderConfig,
    *,
    source: Path,
    destination: Path,
    eos_ids: Sequence[int] = (),
    max_file_bytes: int = 5_000_000_000,
) -> None:
    """Writes a Hugging Face folder that `transformers` can load. The folder is created atomically.

    Args:
      params: the parameters; written in float32, with adapters merged into the matrices that they adapt.
      config: the shape of the model.
      source: the folder that the run started from, or the run's copy of its small files; its `config.json` and
        tokenizer are copied.
      destination: the folder to write; a model that it already contains is replaced.
      eos_ids: token ids that end a completion, for `generation_config.json`; if empty, this file is copied unchanged.
      max_file_bytes: models larger than this are split into several files with an index.

    Raises:
      UserError: if `source` cannot be read or `destination` cannot be written.
    """
    with replaced_folder(destination) as folder:
        write_side_files(source, folder, config, eos_ids=eos_ids)
        _write_tensors(params, config, folder, max_file_bytes)
        # safetensors creates files that only their owner can read.
        mode = (folder / CONFIG).stat().st_mode
        for path in folder.glob("*.safetensors"):
            path.chmod(mode)


def _write_tensors(
    params: Params, config: DecoderConfig, folder: Path, max_file_bytes: int
) -> None:
    """Writes the tensors in the order of `_tensor_map`, holding the tensors of one file on the host at a time."""
    tensor_map = _tensor_map(config)
    by_name = {_name(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]}
    files = _split_into_files(tensor_map, max_file_bytes)
    weight_map, total_size, pending = {}, 0, {}
    file_of = {name: i for i, names in enumerate(files) for name in names}
    for parameter, parts in tensor_map.items():
        host = _on_host(by_name[parameter])
        if config.lora and parameter + A in by_name:
            a, b = (_on_host(by_name[parameter + suffix]) for suffix in (A, B))
            host = merged(host, a, b, config.lora.scale)
        for part in parts:
            ours = host[part.index]
            theirs = ours.reshape(part.shape[::-1]).T if part.is_linear else ours
            pending[part.name] = np.array(theirs.reshape(part.shape), order="C")
            index = file_of[part.name]
            if len(pending) == len(files[index]):
                file = WEIGHTS if len(files) == 1 else SHARD.format(index + 1, len(files))
                save_file(pending, folder / file, metadata={"format": "pt"})
                weight_map |= dict.fromkeys(pending, file)
                total_size += sum(tensor.nbytes for tensor in pending.values())
                pending = {}
    if len(files) > 1:
        index_data = {"metadata": {"total_size": total_size}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index_data, indent=2) + "\n")


def _all_finite(x: np.ndarray) -> bool:
    """Returns whether all values are finite. If their sum is finite, no temporary array is needed."""
    with np.errstate(over="ignore", invalid="ignore"):
        return bool(np.isfinite(x.sum()) or np.isfinite(x).all())


def _on_host(x: jax.Array) -> np.ndarray:
    return np.asarray(jax.device_get(x), np.float32)


class _TensorPart(NamedTuple):
    """A Hugging Face tensor and the corresponding slice of one of our parameters.

    Attributes:
      name: name of the tensor.
      shape: shape of the tensor.
      index: index of the slice in the parameter.
      is_linear: whether the tensor has shape [out, in] and the slice has shape [in, ..., out].
    """

    name: str
    shape: tuple[int, ...]
    index: Any = ...
    is_linear: bool = False


def _split_into_files(tensor_map: dict[str, list[_TensorPart]], max_bytes: int) -> list[list[str]]:
    """Returns the tensor names of each file. A tensor larger than `max_bytes` is written to a separate file."""
    files: list[list[str]] = [[]]
    size = 0
    for part in (part for parts in tensor_map.values() for part in parts):
        nbytes = 4 * math.prod(part.shape)
        if files[-1] and size + nbytes > max_bytes:
            files.append([])
            size = 0
        files[-1].append(part.name)
        size += nbytes
    return files


def _tensor_map(c: DecoderConfig) -> dict[str, list[_TensorPart]]:
    """Returns the Hugging Face tensors of each of our parameters, keyed by parameter path."""
    tensor_map = {
        "embedding": [_TensorPart(EMBEDDING, (c.vocab_size, c.width))],
        "final_norm": [_TensorPart("model.norm.weight", (c.width,))],
    }
    if not c.tied_embeddings:
        tensor_map["unembedding"] = [_TensorPart(HEAD, (c.vocab_size, c.width), is_linear=True)]
    for parameter, parts in _layer_tensor_map(c).items():
        tensor_map[f"layers.{parameter}"] = [
            part._replace(name=f"model.layers.{i}.{part.name}", index=(i, *part.index))
            for i in range(c.num_layers)
            for part in parts
        ]
    return tensor_map


def _layer_tensor_map(c: DecoderConfig) -> dict[str, list[_TensorPart]]:
    """Returns the part of `_tensor_map` for a single layer, with names and indices that omit the layer number."""
    group = c.num_heads // c.num_kv_heads
    query_len, key_len = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    every = slice(None)
    heads = {"q": (query_len, slice(0, group)), "k": (key_len, group), "v": (key_len, group + 1)}
    norms = {"attention_norm": ("input_layernorm", c.width)}
    if c.post_norms:
        norms["attention_post_norm"] = ("post_attention_layernorm", c.width)
        norms["mlp_norm"] = ("pre_feedforward_layernorm", c.width)
        norms["mlp_post_norm"] = ("post_feedforward_layernorm", c.width)
    else:
        norms["mlp_norm"] = ("post_attention_layernorm", c.width)
    if c.qk_norm:
        norms["query_norm"] = ("self_attn.q_norm", c.head_dim)
        norms["key_norm"] = ("self_attn.k_norm", c.head_dim)

    def linear(name: str, shape: tuple[int, int], index: tuple = ()) -> _TensorPart:
        return _TensorPart(f"{name}.weight", shape, index, is_linear=True)

    tensor_map = {
        name: [_TensorPart(f"{n}.weight", (size,), ())] for name, (n, size) in norms.items()
    }
    tensor_map["qkv"] = [
        linear(f"self_attn.{name}_proj", (size, c.width), (every, every, part))
        for name, (size, part) in heads.items()
    ]
    if c.qkv_bias:
        tensor_map["qkv_bias"] = [
            _TensorPart(f"self_attn.{name}_proj.bias", (size,), (every, part))
            for name, (size, part) in heads.items()
        ]
    tensor_map["output"] = [linear("self_attn.o_proj", (c.width, query_len))]
    if c.output_bias:
        tensor_map["output_bias"] = [_TensorPart("self_attn.o_proj.bias", (c.width,), ())]
    tensor_map["gate_up"] = [
        linear("mlp.gate_proj", (c.mlp_width, c.width), (every, 0)),
        linear("mlp.up_proj", (c.mlp_width, c.width), (every, 1)),
    ]
    tensor_map["down"] = [linear("mlp.down_proj", (c.width, c.mlp_width))]
    return tensor_map


def _name(path: tuple) -> str:
    return ".".join(key.key for key in path)
