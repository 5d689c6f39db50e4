"""Finds model folders: built-in models, local folders, and models on the Hugging Face Hub."""

from collections.abc import Sequence
from importlib import resources
from pathlib import Path

from trapo_jax.inputs.hub import HubRepo, HubUnavailable, fetch_files, parse_hub_id
from trapo_jax.inputs.paths import did_you_mean, working_directory
from trapo_jax.models.side_files import CONFIG, SIDE_FILES
from trapo_jax.models.tensor_files import INDEX, weight_files
from trapo_jax.types import UserError

TOKENIZER = "tokenizer.json"
# The files that are downloaded from a Hub model before its weights.
SMALL_FILES = (CONFIG, *SIDE_FILES, INDEX)


def find_model(path: str, *, weights: bool = False) -> Path:
    """Returns the folder of a model, downloading the required files of a Hub model.

    Args:
      path: the name of a built-in model, a local path, or a Hub id.
      weights: whether a Hub model needs its weights. If False, only its `config.json` is downloaded.

    Raises:
      UserError: if there is no such folder, and no such model in the cache or on the Hub.
    """
    folder, repo = locate_model(path)
    if repo is None:
        return folder
    return fetch_weights(fetch_small_files(repo)[1]) if weights else _fetch(repo, [CONFIG])


def locate_model(path: str, *, must_exist: bool = True) -> tuple[Path, HubRepo | None]:
    """Returns the local path of a model, and its repository if it must come from the Hub.

    Args:
      path: see `find_model`.
      must_exist: whether to raise a `UserError` if the path is neither a model folder nor a Hub id.
    """
    packaged = Path(str(resources.files("trapo_jax"))) / "assets" / path
    if "/" not in path and (packaged / CONFIG).is_file():
        return packaged, None
    folder = Path(path).expanduser()
    if folder.is_dir() and must_exist:
        _check_model_folder(folder, path)
    if folder.is_dir() or not must_exist:
        return folder, None
    if folder.is_file():
        is_inside = (folder.parent / CONFIG).is_file()
        hint = (
            f"did you mean {folder.parent}?"
            if is_inside
            else f"pass the folder that contains {CONFIG}"
        )
        raise UserError(f"model.path={path!r}: this is a file; {hint}")
    if repo := parse_hub_id(path, "model"):
        return folder, repo
    way_out = did_you_mean(path) or (
        "; pass a Hugging Face model folder, a Hub id such as owner/name, or card_shuffles_tiny"
    )
    raise UserError(f"model.path={path!r}: no such folder{working_directory(folder)}{way_out}")


def _check_model_folder(folder: Path, path: str) -> None:
    if not (folder / CONFIG).exists():
        patterns = f"*/{CONFIG}", f"*/*/{CONFIG}"  # for hf/ in a run, and for a folder of runs
        inside = [file.parent for pattern in patterns for file in sorted(folder.glob(pattern))]
        hint = f"; did you mean {inside[0]}?" if inside else "; pass a Hugging Face model folder"
        raise UserError(f"model.path={path!r}: the folder contains no {CONFIG}{hint}")


def fetch_small_files(repo: HubRepo) -> tuple[Path, HubRepo]:
    """Downloads the config and the tokenizer of a Hub model.

    Returns:
      The folder in the cache, and the repository pinned to the commit of this folder.

    Raises:
      UserError: if a file is neither in the cache nor on the Hub.
    """
    folder = _fetch(repo, SMALL_FILES, [CONFIG, TOKENIZER])
    return folder, repo._replace(revision=folder.name)


def fetch_weights(repo: HubRepo) -> Path:
    """Downloads the files of a Hub model, including its weights, and returns their folder in the cache.

    Raises:
      UserError: if a file is neither in the cache nor on the Hub.
    """
    files = weight_files(_fetch(repo, SMALL_FILES, [CONFIG, TOKENIZER]))
    return _fetch(repo, [*SMALL_FILES, *files], files)


def _fetch(repo: HubRepo, patterns: Sequence[str], required: Sequence[str] = (CONFIG,)) -> Path:
    try:
        return fetch_files(repo, patterns, required)
    except HubUnavailable as error:
        hint = did_you_mean(repo.name)
        raise UserError(f"model.path={str(repo)!r}: no such folder, and {error}{hint}") from error
