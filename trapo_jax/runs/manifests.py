"""Writes and reads checkpoint manifests: the checkpoint's step, run and score, and a checksum of every file."""

import hashlib
import json
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from trapo_jax.inputs.files import read_text
from trapo_jax.types import UserError

MANIFEST = "manifest.json"


class DamagedCheckpoint(Exception):
    """Raised if the files of a checkpoint do not match its manifest, or the manifest is missing or damaged.

    The message names the checkpoint and the file.
    """


def write_manifest(folder: Path, about: Mapping[str, Any]) -> None:
    """Writes the manifest after flushing everything else in the folder to disk."""
    for path in sorted(folder.rglob("*")):
        sync(path)
    content = {**about, "files": checksums(folder)}
    text = json.dumps({**content, "sha256": _checksum_of(content)}, indent=1)
    write_synced(folder / MANIFEST, text)
    sync(folder)


def write_synced(path: Path, text: str) -> None:
    with open(path, "w", encoding="ascii") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def read_manifest(folder: Path) -> dict[str, Any]:
    """Returns a dict with `step`, `run`, `score`, and `files`, which maps relative paths to SHA-256 checksums.

    Raises:
      DamagedCheckpoint: if the manifest is missing, was modified, or was written by a different version of trapo_jax.
    """
    if not (folder / MANIFEST).exists():
        raise DamagedCheckpoint(f"checkpoint {folder.name}: {MANIFEST} is missing")
    try:
        text = read_text(folder / MANIFEST)
    except UserError as error:
        raise DamagedCheckpoint(f"checkpoint {folder.name}: {MANIFEST} is damaged") from error
    try:
        content = json.loads(text)
        expected = content.pop("sha256")
        is_intact = text == json.dumps({**content, "sha256": expected}, indent=1)
    except (ValueError, AttributeError, KeyError, RecursionError):
        is_intact, content, expected = False, {}, ""
    if not is_intact or expected != _checksum_of(content):
        raise DamagedCheckpoint(f"checkpoint {folder.name}: {MANIFEST} is damaged")
    if content.keys() != {"step", "run", "score", "files"}:
        raise DamagedCheckpoint(
            f"checkpoint {folder.name}: {MANIFEST} was written by a different version of trapo_jax"
        )
    return content


def checksums(folder: Path) -> dict[str, str]:
    """Returns the SHA-256 checksum of every file except the manifest, keyed by relative path."""
    paths = sorted(p for p in folder.rglob("*") if p.is_file() and p != folder / MANIFEST)
    with ThreadPoolExecutor() as pool:
        return dict(
            zip(
                (path.relative_to(folder).as_posix() for path in paths),
                pool.map(_file_checksum, paths),
                strict=True,
            )
        )


def _file_checksum(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _checksum_of(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def sync(path: Path) -> None:
    """Flushes a file or the entries of a directory to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
