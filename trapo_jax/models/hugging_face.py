"""Weights of Hugging Face folders in and out."""

import json
import math
import os
import shutil
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from trapo_jax.models.decoder import Decoder, DecoderConfig, Params, abstract_params
from trapo_jax.models.json_file import read_json_object
from trapo_jax.models.lora import A, B, join_trained, merged, split_trained
from trapo_jax.types import UserError

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARD = "model-{:05d}-of-{:05d}.safetensors"
DTYPES = ("F32", "BF16", "F16")
# What belongs to a model besides its weights, copied as it is on export.
SIDE_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "generation_config.json",
)


def find_model(path: str) -> Path:
    """The model's folder: the packaged one by its name, or a local path.

    Raises:
      UserError: if there is none.
    """
    packaged = Path(str(resources.files("trapo_jax"))) / "assets" / path
    if "/" not in path and packaged.is_dir():
        return packaged
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise UserError(
            f"model.path={path!r}: no such folder; give a Hugging Face model folder or "
            "card_shuffles_tiny"
        )
    return folder


def init_params(config: DecoderConfig, *, seed: int) -> Params:
    """Freshly drawn parameters: normal with variance 1 / fan-in, norms 1."""
    return nnx.to_pure_dict(nnx.split(Decoder(config, rngs=nnx.Rngs(seed)))[1])


def load_params(
    folder: Path, config: DecoderConfig, shardings: Params | None = None, *, seed: int = 0
) -> Params:
    """Reads the safetensors of `folder` (float32, bfloat16 or float16) as float32 arrays on the devices.

    One stacked parameter is put together on the host at a time, and only one tensor read. Adapters are drawn.

    Args:
      folder: with `model.safetensors`, or several files and their index.
      config: of this folder.
      shardings: where each parameter lies; None for the default device.
      seed: of the adapters, if `config.lora` asks for them.

    Raises:
      UserError: naming tensor and file, for a missing, unexpected, misshapen or unreadable tensor,
        before any is read.
    """
    tensors = _TensorReader(folder)
    layout = _layout(config)
    tensors.check(
        {piece.name: piece.shape for pieces in layout.values() for piece in pieces},
        ignored={"lm_head.weight"} if config.tied_embeddings else set(),
    )

    def load(path, abstract, sharding):
        host = np.empty(abstract.shape, np.float32)
        for piece in layout[_name(path)]:
            ours = host[piece.index]
            theirs = tensors.read(piece.name)
            ours[...] = (theirs.T if piece.is_linear else theirs).reshape(ours.shape)
        if sharding is None:
            return jax.device_put(host)
        return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])

    abstract = abstract_params(config)
    if shardings is None:
        shardings = jax.tree.map(lambda _: None, abstract)
    if config.lora is None:
        return jax.tree_util.tree_map_with_path(load, abstract, shardings)
    (adapters, kept), (of_adapters, of_kept) = map(split_trained, (abstract, shardings))
    draw = lambda: split_trained(init_params(config, seed=seed))[0]  # the rest is never computed
    adapters = jax.jit(draw, out_shardings=of_adapters)()
    return join_trained(adapters, jax.tree_util.tree_map_with_path(load, kept, of_kept))


def export_model(
    params: Params,
    config: DecoderConfig,
    *,
    source: Path,
    destination: Path,
    max_file_bytes: int = 5_000_000_000,
) -> None:
    """Writes a Hugging Face folder that `transformers` loads; appears whole or not at all.

    `config.json` and the tokenizer are those of `source`, the folder the run began from; the
    weights are float32, adapters merged into them, in several files with an index where one would exceed
    `max_file_bytes`.
    An existing `destination` is replaced.

    Raises:
      UserError: if `source` cannot be read or `destination` not be written.
    """
    staging = destination.with_name(destination.name + ".partial")
    shutil.rmtree(staging, ignore_errors=True)
    try:
        staging.mkdir(parents=True)
        _write_tensors(params, config, staging, max_file_bytes)
        _write_side_files(source, staging)
        if destination.exists():
            shutil.rmtree(destination)
        os.rename(staging, destination)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{destination}: cannot be written ({error})") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _write_side_files(source: Path, folder: Path) -> None:
    model_config = read_json_object(source / "config.json")
    model_config.pop("torch_dtype", None)
    model_config.pop("auto_map", None)  # never point at code
    model_config["dtype"] = "float32"
    (folder / "config.json").write_text(json.dumps(model_config, indent=2) + "\n")
    for name in SIDE_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)


def _write_tensors(
    params: Params, config: DecoderConfig, folder: Path, max_file_bytes: int
) -> None:
    """Tensors in the order of `_layout`, a file's worth on the host at a time."""
    layout = _layout(config)
    by_name = {_name(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]}
    files = _split_into_files(layout, max_file_bytes)
    weight_map, total_size, pending = {}, 0, {}
    file_of = {name: i for i, names in enumerate(files) for name in names}
    for parameter, pieces in layout.items():
        host = _on_host(by_name[parameter])
        if config.lora and parameter + A in by_name:
            a, b = (_on_host(by_name[parameter + suffix]) for suffix in (A, B))
            host = merged(host, a, b, config.lora.scale)
        for piece in pieces:
            ours = host[piece.index]
            theirs = ours.reshape(piece.shape[::-1]).T if piece.is_linear else ours
            pending[piece.name] = np.array(theirs.reshape(piece.shape), order="C")
            index = file_of[piece.name]
            if len(pending) == len(files[index]):
                file = WEIGHTS if len(files) == 1 else SHARD.format(index + 1, len(files))
                save_file(pending, folder / file, metadata={"format": "pt"})
                weight_map |= dict.fromkeys(pending, file)
                total_size += sum(tensor.nbytes for tensor in pending.values())
                pending = {}
    if len(files) > 1:
        index_data = {"metadata": {"total_size": total_size}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index_data, indent=2) + "\n")


def _on_host(x: jax.Array) -> np.ndarray:
    return np.asarray(jax.device_get(x), np.float32)


class _Piece(NamedTuple):
    """A Hugging Face tensor, and the part `index` of one of our parameters that it is."""

    name: str
    shape: tuple[int, ...]
    index: Any = ...
    is_linear: bool = False  # theirs is [out, in], ours [in, ..., out]


def _split_into_files(layout: dict[str, list[_Piece]], max_bytes: int) -> list[list[str]]:
    """Tensor names by file; a tensor larger than `max_bytes` has one of its own."""
    files: list[list[str]] = [[]]
    size = 0
    for piece in (piece for pieces in layout.values() for piece in pieces):
        nbytes = 4 * math.prod(piece.shape)
        if files[-1] and size + nbytes > max_bytes:
            files.append([])
            size = 0
        files[-1].append(piece.name)
        size += nbytes
    return files


def _layout(c: DecoderConfig) -> dict[str, list[_Piece]]:
    """Each of our parameters, by its path, and the Hugging Face tensors it is made of."""
    layout = {
        "embedding": [_Piece("model.embed_tokens.weight", (c.vocab_size, c.width))],
        "final_norm": [_Piece("model.norm.weight", (c.width,))],
    }
    if not c.tied_embeddings:
        layout["unembedding"] = [_Piece("lm_head.weight", (c.vocab_size, c.width), is_linear=True)]
    for parameter, pieces in _layer_layout(c).items():
        layout[f"layers.{parameter}"] = [
            piece._replace(name=f"model.layers.{i}.{piece.name}", index=(i, *piece.index))
            for i in range(c.num_layers)
            for piece in pieces
        ]
    return layout


def _layer_layout(c: DecoderConfig) -> dict[str, list[_Piece]]:
    """The same of one layer: names and indices without the layer's number."""
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

    def linear(name: str, shape: tuple[int, int], index: tuple = ()) -> _Piece:
        return _Piece(f"{name}.weight", shape, index, is_linear=True)

    layout = {name: [_Piece(f"{n}.weight", (size,), ())] for name, (n, size) in norms.items()}
    layout["qkv"] = [
        linear(f"self_attn.{name}_proj", (size, c.width), (every, every, part))
        for name, (size, part) in heads.items()
    ]
    if c.qkv_bias:
        layout["qkv_bias"] = [
            _Piece(f"self_attn.{name}_proj.bias", (size,), (every, part))
            for name, (size, part) in heads.items()
        ]
    layout["output"] = [linear("self_attn.o_proj", (c.width, query_len))]
    if c.output_bias:
        layout["output_bias"] = [_Piece("self_attn.o_proj.bias", (c.width,), ())]
    layout["gate_up"] = [
        linear("mlp.gate_proj", (c.mlp_width, c.width), (every, 0)),
        linear("mlp.up_proj", (c.mlp_width, c.width), (every, 1)),
    ]
    layout["down"] = [linear("mlp.down_proj", (c.width, c.mlp_width))]
    return layout


def _name(path: tuple) -> str:
    return ".".join(key.key for key in path)


class _TensorReader:
    """Reads named tensors from one safetensors file or from several with an index."""

    def __init__(self, folder: Path):
        if (folder / INDEX).is_file():
            self._where = folder / INDEX
            weight_map = read_json_object(self._where).get("weight_map")
            if not isinstance(weight_map, dict):
                raise UserError(f"{self._where}: no field 'weight_map'")
            for name, file in weight_map.items():
                if not isinstance(file, str) or Path(file).name != file:
                    raise UserError(f"{self._where}: tensor {name!r} is said to be in {file!r}")
            self._files = {name: folder / file for name, file in weight_map.items()}
        else:
            self._where = folder / WEIGHTS
            with _open_safetensors(self._where) as file:
                self._files = dict.fromkeys(file.keys(), self._where)

    def check(self, expected: dict[str, tuple[int, ...]], *, ignored: set[str]) -> None:
        """Compares names, shapes and dtypes with what the files' headers say."""
        if missing := sorted(expected.keys() - self._files.keys()):
            raise UserError(f"{self._where}: {_listed('tensor', missing)} missing")
        if surplus := sorted(self._files.keys() - expected.keys() - ignored):
            raise UserError(f"{self._where}: {_listed('tensor', surplus)} not expected")
        for path in sorted(set(self._files.values())):
            with _open_safetensors(path) as file:
                held = set(file.keys())
                for name in sorted(n for n, p in self._files.items() if p == path):
                    if name not in held:
                        raise UserError(
                            f"{path}: tensor {name!r} is missing, though {INDEX} has it"
                        )
                    if name in expected:
                        _check_tensor(path, name, file.get_slice(name), expected[name])

    def read(self, name: str) -> np.ndarray:
        path = self._files[name]
        with _open_safetensors(path) as file:
            try:
                return file.get_tensor(name)
            except SafetensorError as error:
                raise UserError(f"{path}: tensor {name!r}: {error}") from error


def _check_tensor(path: Path, name: str, header: Any, shape: tuple[int, ...]) -> None:
    if tuple(header.get_shape()) != shape:
        found = tuple(header.get_shape())
        raise UserError(f"{path}: tensor {name!r} has shape {found}, expected {shape}")
    if header.get_dtype() not in DTYPES:
        raise UserError(
            f"{path}: tensor {name!r} is {header.get_dtype()}; {', '.join(DTYPES)} are covered"
        )


def _listed(what: str, names: list[str]) -> str:
    shown = ", ".join(repr(name) for name in names[:3])
    if len(names) == 1:
        return f"{what} {shown} is"
    return f"{len(names)} {what}s are ({shown}{', ...' if len(names) > 3 else ''})"


def _open_safetensors(path: Path):
    try:
        return safe_open(path, framework="numpy")
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: not a readable safetensors file ({error})") from error
