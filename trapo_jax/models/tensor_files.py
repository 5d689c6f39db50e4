"""Reads the tensors of a Hugging Face folder from its safetensors files."""

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from trapo_jax.inputs.files import check_regular, read_json_object, shown
from trapo_jax.inputs.paths import USE_LFS, is_lfs_pointer
from trapo_jax.types import UserError

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
SAFETENSORS_NAME = re.compile(r"[\w.-]+\.safetensors", re.ASCII)
DTYPES = ("F32", "BF16", "F16")
PREFIX = "model."  # transformers' base_model_prefix
# Names of buffers that older versions of transformers exported. The decoder computes them, as newer versions do.
BUFFERS = re.compile(
    r"rotary_emb\.((original_)?inv_freq|(cos|sin)_cached)$"
    r"|(^|\.)(position_ids|masked_bias|(self_attn|attn|attention)\.bias)$"
)
ROWS_PER_READ = 4096


class TensorReader:
    """Reads named tensors from one safetensors file, or from several files with an index.

    As in transformers, names in the files may lack the prefix `model.` or have a superfluous one, and buffers are
    skipped.

    Args:
      folder: contains `model.safetensors`, or several files and their index.
      known: the names of the tensors that may be requested.

    Raises:
      UserError: if a file is unreadable, or two tensors in the files have the same name apart from the prefix.
    """

    def __init__(self, folder: Path, known: Collection[str]):
        self._path, files = _list_tensors(folder)
        self._stored: dict[str, tuple[str, Path]] = {}
        for stored, path in files.items():
            if BUFFERS.search(stored):
                continue
            name = _full_name(stored, known)
            if name in self._stored:
                other = self._stored[name][0]
                raise UserError(
                    f"{self._path}: tensors {other!r} and {stored!r} refer to the same parameter"
                )
            self._stored[name] = stored, path

    def __contains__(self, name: str) -> bool:
        return name in self._stored

    def check(
        self, expected: Mapping[str, tuple[int, ...]], optional: Mapping[str, tuple[int, ...]]
    ) -> None:
        """Checks names, shapes, and dtypes against the files' headers.

        Args:
          expected: shapes of the tensors that must exist, keyed by name.
          optional: shapes of the tensors that may exist, keyed by name.
        """
        if missing := sorted(expected.keys() - self._stored.keys()):
            raise UserError(f"{self._path}: {_listed('tensor', missing)} missing")
        shapes = {**optional, **expected}
        if surplus := sorted(self._stored.keys() - shapes.keys()):
            raise UserError(f"{self._path}: {_listed('tensor', surplus)} unexpected")
        for path in sorted({path for _, path in self._stored.values()}):
            with _open_safetensors(path) as file:
                found = set(file.keys())
                for name in sorted(n for n, (_, p) in self._stored.items() if p == path):
                    stored = self._stored[name][0]
                    if stored not in found:
                        raise UserError(
                            f"{path}: tensor {stored!r} is missing, although {INDEX} lists it"
                        )
                    _check_tensor(path, stored, file.get_slice(stored), shapes[name])

    def read(self, name: str) -> np.ndarray:
        """Returns a tensor."""
        stored, path = self._stored[name]
        with _open_safetensors(path) as file:
            try:
                return file.get_tensor(stored)
            except SafetensorError as error:
                raise UserError(f"{path}: tensor {stored!r}: {error}") from error

    def error(self, name: str, problem: str) -> UserError:
        """Returns an error that names the tensor, as stored, and its file."""
        stored, path = self._stored[name]
        return UserError(f"{path}: tensor {stored!r} {problem}")

    def are_equal(self, first: str, second: str) -> bool:
        """Returns whether two matrices are equal and have supported dtypes, without reading either as a whole."""
        (a, a_path), (b, b_path) = self._stored[first], self._stored[second]
        with _open_safetensors(a_path) as a_file, _open_safetensors(b_path) as b_file:
            try:
                return _equal_rows(a_file.get_slice(a), b_file.get_slice(b))
            except SafetensorError as error:
                raise UserError(f"{a_path}: tensors {a!r} and {b!r}: {error}") from error


def weight_files(folder: Path) -> list[str]:
    """Returns the names of the files that should contain the weights, whether or not the files exist.

    Raises:
      UserError: if the index cannot be read, or lists files other than safetensors files.
    """
    index = folder / INDEX
    if not index.exists():
        return [WEIGHTS]
    files = sorted(set(_read_weight_map(index).values()))
    for file in files:
        if not SAFETENSORS_NAME.fullmatch(file):
            raise UserError(f"{index}: {file!r} is not the name of a safetensors file")
    return files


def has_own_head(folder: Path) -> bool:
    """Returns whether a model has an output head that differs from its embedding.

    If so, transformers uses this head, even if `tie_word_embeddings` is true. Returns False if the folder has no
    readable weights; `load_params` reports why.
    """
    try:
        tensors = TensorReader(folder, {EMBEDDING, HEAD})
        has_both = EMBEDDING in tensors and HEAD in tensors
        return has_both and not tensors.are_equal(EMBEDDING, HEAD)
    except UserError:
        return False


def _equal_rows(a: Any, b: Any) -> bool:
    """Compares two tensors, given as safetensors slices, one block of rows at a time."""
    shape = a.get_shape()
    if b.get_shape() != shape or len(shape) != 2 or not {a.get_dtype(), b.get_dtype()} <= {*DTYPES}:
        return False
    for start in range(0, shape[0], ROWS_PER_READ):
        rows = slice(start, min(start + ROWS_PER_READ, shape[0]))
        if not np.array_equal(a[rows].astype(np.float32), b[rows].astype(np.float32)):
            return False
    return True


def _full_name(stored: str, known: Collection[str]) -> str:
    """Returns the name that transformers' `rename_source_key` would give to a stored tensor."""
    without_prefix = stored.removeprefix(PREFIX)
    if without_prefix in known:
        return without_prefix
    return PREFIX + stored if PREFIX + stored in known else stored


def _list_tensors(folder: Path) -> tuple[Path, dict[str, Path]]:
    """Returns the file that lists the tensors, and the file that contains each tensor, keyed by tensor name."""
    index = folder / INDEX
    if not index.exists():
        path = folder / WEIGHTS
        if not path.exists() and any(folder.glob("model-*.safetensors")):
            raise UserError(
                f"{index}: no such file; weights that are split into several files require this index"
            )
        with _open_safetensors(path) as file:
            return path, dict.fromkeys(file.keys(), path)
    return index, {name: folder / file for name, file in _read_weight_map(index).items()}


def _read_weight_map(index: Path) -> dict[str, str]:
    """Returns the file name of each tensor, keyed by tensor name."""
    weight_map = read_json_object(index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise UserError(f"{index}: field 'weight_map' is missing")
    for name, file in weight_map.items():
        if not isinstance(file, str) or Path(file).name != file:
            raise UserError(
                f"{index}: the file of tensor {name!r} must be a file name, found {shown(file)}"
            )
    return weight_map


def _check_tensor(path: Path, name: str, header: Any, shape: tuple[int, ...]) -> None:
    if tuple(header.get_shape()) != shape:
        found = tuple(header.get_shape())
        raise UserError(f"{path}: tensor {name!r} has shape {found}, expected {shape}")
    if header.get_dtype() not in DTYPES:
        raise UserError(
            f"{path}: tensor {name!r} has dtype {header.get_dtype()}, expected one of {', '.join(DTYPES)}"
        )


def _listed(what: str, names: list[str]) -> str:
    shown = ", ".join(repr(name) for name in names[:3])
    if len(names) == 1:
        return f"{what} {shown} is"
    return f"{len(names)} {what}s ({shown}{', ...' if len(names) > 3 else ''}) are"


def _open_safetensors(path: Path):
    if not path.exists():
        raise UserError(f"{path}: no such file; weights are read only from safetensors files")
    check_regular(path)
    try:
        return safe_open(path, framework="numpy")
    except (SafetensorError, OSError) as error:
        what = USE_LFS if is_lfs_pointer(path) else f"not a readable safetensors file ({error})"
        raise UserError(f"{path}: {what}") from error
