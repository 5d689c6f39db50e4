"""Reads rows of Hugging Face Hub datasets with the `datasets` library.

When offline, reads from the local cache of `datasets` or `huggingface_hub`.
"""

import os
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from trapo_jax.inputs.hub import (
    COMMIT,
    HubRepo,
    HubUnavailable,
    cached_commit,
    cached_files,
    latest_commit,
    parse_hub_id,
)
from trapo_jax.inputs.paths import did_you_mean
from trapo_jax.types import UserError

if TYPE_CHECKING:
    from datasets import DatasetBuilder

CARD = "README.md"
_CONFIG = re.compile(r"[\w.+-]+", re.ASCII)
_SHARD = re.compile(r"-\d{5}-of-(\d{5})(?=\D|$)")


class HubDataset(NamedTuple):
    """A dataset on the Hub.

    Attributes:
      repo: its repository.
      config: name of the dataset's config; None for the default.
    """

    repo: HubRepo
    config: str | None = None

    def __str__(self) -> str:
        return f"{self.repo}:{self.config}" if self.config else str(self.repo)


def parse_hub_dataset(text: str) -> HubDataset | None:
    """Parses `owner/name@revision:config`; the revision and the config are optional. Returns None for anything else."""
    name, colon, config = text.partition(":")
    repo = parse_hub_id(name, "dataset")
    if repo is None or (colon and not _CONFIG.fullmatch(config)):
        return None
    return HubDataset(repo, config or None)


def read_hub_rows(dataset: HubDataset, split: str) -> Iterator[dict[str, Any]]:
    """Yields the rows of a split.

    Raises:
      UserError: if the dataset is neither in a cache nor on the Hub, or cannot be read. The message names the dataset.
    """
    try:
        builder = _find_builder(dataset)
        _check_data_files(dataset, builder)
        builder.download_and_prepare()
        rows = builder.as_dataset(split=split)
    except HubUnavailable as error:
        hint = did_you_mean(dataset.repo.name)
        raise UserError(f"{dataset}: no such file, and {error}{hint}") from error
    except UserError:
        raise
    except Exception as error:  # raised by `datasets`, its file readers, or the HTTP library
        reason = (str(error.__cause__ or error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"{dataset}: cannot be read ({reason})") from error
    yield from rows  # type: ignore[misc]  # a `Dataset`, since `split` is given


def _find_builder(dataset: HubDataset) -> "DatasetBuilder":
    """Returns the builder of a dataset at the Hub's latest commit, or at a cached commit if the Hub is unavailable."""
    import datasets
    from datasets import config as settings
    from datasets.packaged_modules.cache.cache import Cache

    repo, config = dataset
    try:
        if settings.HF_HUB_OFFLINE:
            raise HubUnavailable("HF_HUB_OFFLINE or HF_DATASETS_OFFLINE is set")
        commit = latest_commit(repo)
    except HubUnavailable as error:
        return _cached_builder(dataset) or _snapshot_builder(dataset, error)
    # Without the prefix, a local folder with this name would be read.
    builder = datasets.load_dataset_builder(
        f"hf://datasets/{repo.name}", config, revision=repo.revision
    )
    if isinstance(builder, Cache) and builder.hash != commit:
        # `datasets` lost the connection and fell back to the newest revision in its cache.
        raise UserError(
            f"{dataset}: the connection to the Hub was lost; run the same command again"
        )
    return builder


def _cached_builder(dataset: HubDataset) -> "DatasetBuilder | None":
    """Returns the builder of a dataset already prepared by `datasets`; None if this revision is not in its cache."""
    from datasets import config as settings
    from datasets.naming import camelcase_to_snakecase
    from datasets.packaged_modules.cache.cache import Cache

    repo = dataset.repo
    commit = cached_commit(repo)
    if commit is None and repo.revision is not None:
        return None
    owner, name = repo.name.split("/")
    root = Path(settings.HF_DATASETS_CACHE) / f"{owner}___{camelcase_to_snakecase(name)}"
    config = dataset.config or _default_config(repo)
    found = [
        folder
        for folder in root.glob(f"{config or '*'}/*/{commit or '*'}")
        if COMMIT.fullmatch(folder.name) and (folder / "dataset_info.json").is_file()
    ]
    if len({folder.parts[-3] for folder in found}) != 1:  # no config, or several
        return None
    newest = max(found, key=lambda folder: folder.stat().st_mtime)
    config, version, commit = newest.parts[-3:]
    return Cache(
        repo_id=repo.name, dataset_name=name, config_name=config, version=version, hash=commit
    )


def _default_config(repo: HubRepo) -> str | None:
    """Returns the default config according to the dataset card in the `huggingface_hub` cache; None if unknown."""
    from huggingface_hub import DatasetCard

    try:
        card = cached_files(repo, HubUnavailable(), [CARD], [CARD]) / CARD
        configs = DatasetCard.load(card).data.to_dict().get("configs") or []
    except (HubUnavailable, ValueError):
        return None
    names = [config.get("config_name") for config in configs]
    marked = [config.get("config_name") for config in configs if config.get("default")]
    if marked or len(names) == 1:
        return (marked or names)[0]
    return "default" if "default" in names else None


def _snapshot_builder(dataset: HubDataset, error: HubUnavailable) -> "DatasetBuilder":
    """Returns the builder of a dataset in the `huggingface_hub` cache, where `hf download` stores datasets.

    Raises:
      HubUnavailable: if part of the dataset is not in the cache.
    """
    import datasets

    folder = cached_files(dataset.repo, error)
    try:
        builder = datasets.load_dataset_builder(str(folder), dataset.config)
    except FileNotFoundError:  # The folder contains the card, but no data files.
        raise error.missing("part of it", dataset.repo) from error
    if not _has_all_shards(_data_files(builder)):
        raise error.missing("part of it", dataset.repo) from error
    return builder


def _data_files(builder: "DatasetBuilder") -> list[str]:
    """Returns the paths and URLs of the files that a builder reads; empty if the dataset is already prepared."""
    data_files = getattr(builder.config, "data_files", None) or {}
    return [str(file) for files in data_files.values() for file in files]


def _check_data_files(dataset: HubDataset, builder: "DatasetBuilder") -> None:
    """Checks that every local file named by a dataset's card belongs to the dataset.

    Raises:
      UserError: if a local file does not belong to the dataset. The message names the file.
    """
    for file in _data_files(builder):
        path = os.path.normpath(file.split("::")[-1])
        is_local = "://" not in file.split("::")[-1]
        if is_local and not Path(path).is_relative_to(builder.base_path or "/dev/null"):
            raise UserError(
                f"{dataset}: its card names {path}, which is not one of the dataset's files"
            )


def _has_all_shards(files: Iterable[str]) -> bool:
    """Returns whether all shards are present among files with names such as `train-00000-of-00002.parquet`."""
    shards: dict[tuple[str, int], set[str]] = defaultdict(set)
    for file in files:
        if match := _SHARD.search(Path(file).name):
            pattern = file.replace(match[0], f"-of-{match[1]}")
            shards[pattern, int(match[1])].add(file)
    return all(len(found) == total for (_, total), found in shards.items())
