"""Parses ids of Hugging Face Hub repositories, and provides the files of these repositories from the local cache.

`huggingface_hub` downloads files to its cache. If the Hub cannot be reached, or `HF_HUB_OFFLINE=1` is set, only files
that are already in the cache are used.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

TIMEOUT_SECS = 10.0  # maximum time to wait for the Hub's first response
COMMIT = re.compile(r"[0-9a-f]{40}")
_ID = re.compile(r"([\w.-]+/[\w.-]+)(?:@([\w.+-]+(?:/[\w.+-]+)*))?", re.ASCII)


class HubRepo(NamedTuple):
    """A repository on the Hub at a revision.

    Attributes:
      kind: type of the repository.
      name: `owner/name`.
      revision: a branch, a tag or a commit; None for the default branch.
    """

    kind: Literal["model", "dataset"]
    name: str
    revision: str | None = None

    def __str__(self) -> str:
        return f"{self.name}@{self.revision}" if self.revision else self.name

    @property
    def download_command(self) -> str:
        """The shell command that downloads the repository to the cache."""
        kind = "--repo-type dataset " if self.kind == "dataset" else ""
        revision = f" --revision {self.revision}" if self.revision else ""
        return f"hf download {kind}{self.name}{revision}"


class HubUnavailable(Exception):
    """The Hub cannot be reached, or does not provide a repository. The message is a clause that states the reason."""

    def missing(self, what: str, repo: HubRepo) -> "HubUnavailable":
        """Returns the error to raise if files of `repo` are not in the cache either."""
        return HubUnavailable(
            f"{what} is not in the local Hugging Face Hub cache ({self}); with network access, run "
            f"`{repo.download_command}`"
        )


class HubRefusal(HubUnavailable):
    """The Hub responded that it does not provide a repository."""

    def missing(self, what: str, repo: HubRepo) -> HubUnavailable:  # noqa: ARG002
        return self


def parse_hub_id(text: str, kind: Literal["model", "dataset"]) -> HubRepo | None:
    """Parses `owner/name` or `owner/name@revision`; returns None for other text, such as a path."""
    from huggingface_hub.utils import validate_repo_id

    match = _ID.fullmatch(text)
    if match is None or ".." in text:
        return None
    try:
        validate_repo_id(match[1])
    except ValueError:
        return None
    return HubRepo(kind, match[1], match[2])


def latest_commit(repo: HubRepo) -> str:
    """Asks the Hub for the commit of a revision. Failed connections are not retried.

    Raises:
      HubUnavailable: if the Hub cannot be reached or does not provide the revision.
    """
    from huggingface_hub import HfApi

    try:
        info = HfApi().repo_info(
            repo.name, repo_type=repo.kind, revision=repo.revision, timeout=TIMEOUT_SECS
        )
    # Transport errors come from different libraries in different versions of huggingface_hub.
    except Exception as error:
        raise _explain(error, repo) from error
    assert info.sha is not None, repo
    return info.sha


def cached_commit(repo: HubRepo) -> str | None:
    """Returns the commit that a revision had when it was last downloaded; None if it was never downloaded."""
    from huggingface_hub.constants import DEFAULT_REVISION, HF_HUB_CACHE

    revision = repo.revision or DEFAULT_REVISION
    if COMMIT.fullmatch(revision):
        return revision
    folder = f"{repo.kind}s--{repo.name.replace('/', '--')}"
    try:
        return (Path(HF_HUB_CACHE) / folder / "refs" / revision).read_text().strip()
    except (OSError, UnicodeDecodeError):
        return None


def fetch_files(repo: HubRepo, patterns: Sequence[str], required: Sequence[str] = ()) -> Path:
    """Downloads those files of a repository that are not yet in the cache.

    Args:
      repo: the repository.
      patterns: glob patterns of the files to download. No other files are downloaded.
      required: names of the files that must exist.

    Returns:
      The revision's folder in the cache, named after the commit. The folder may also contain other files.

    Raises:
      HubUnavailable: if a file is neither in the cache nor provided by the Hub.
    """
    try:
        latest_commit(repo)
        folder = _snapshot(repo, patterns)
    except HubUnavailable as error:
        return cached_files(repo, error, patterns, required)
    except Exception as error:  # a transport error; see `latest_commit`
        return cached_files(repo, _explain(error, repo), patterns, required)
    if absent := _absent(folder, required):
        raise HubRefusal(f"{repo} has no {absent} on the Hub")
    return folder


def cached_files(
    repo: HubRepo,
    error: HubUnavailable,
    patterns: Sequence[str] = ("*",),
    required: Sequence[str] = (),
) -> Path:
    """Returns a revision's folder in the cache without downloading anything.

    Args:
      repo: the repository.
      error: the reason why nothing can be downloaded.
      patterns, required: see `fetch_files`.

    Raises:
      HubUnavailable: if the cache does not contain the repository, a required file, or a file that is in the cached
        listing of the repository.
    """
    try:
        folder = _snapshot(repo, patterns, local_files_only=True)
    except OSError as not_found:  # LocalEntryNotFoundError, or the cache cannot be read
        is_partial = getattr(not_found, "snapshot_path", None) is not None
        raise error.missing("part of it" if is_partial else "it", repo) from error
    if absent := _absent(folder, required):
        raise error.missing(absent, repo) from error
    return folder


def _snapshot(repo: HubRepo, patterns: Sequence[str], *, local_files_only: bool = False) -> Path:
    from huggingface_hub import snapshot_download

    folder = snapshot_download(
        repo.name,
        repo_type=repo.kind,
        revision=repo.revision,
        allow_patterns=list(patterns),
        local_files_only=local_files_only,
    )
    return Path(folder)


def _absent(folder: Path, names: Sequence[str]) -> str | None:
    return next((name for name in names if not (folder / name).is_file()), None)


def _explain(error: Exception, repo: HubRepo) -> HubUnavailable:
    """Converts an exception to an error whose message is a clause that states why the Hub provides nothing."""
    from huggingface_hub import errors

    page = f"https://huggingface.co/{'datasets/' if repo.kind == 'dataset' else ''}{repo.name}"
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    match error:
        case errors.OfflineModeIsEnabled():
            return HubUnavailable("HF_HUB_OFFLINE is set")
        case errors.GatedRepoError():
            return HubRefusal(
                f"the Hub restricts access to it; accept its conditions at {page}, and log in with `hf auth login`"
            )
        case errors.RevisionNotFoundError():
            return HubRefusal(f"the Hub has no revision {repo.revision or 'main'!r} of {repo.name}")
        case errors.RepositoryNotFoundError():
            return HubRefusal(
                f"the Hub has no such {repo.kind}, or it is private; check the name, or log in with `hf auth login`"
            )
        case errors.HfHubHTTPError() if error.response.status_code in (401, 403):
            return HubRefusal(
                f"the Hub denies access; check your token with `hf auth whoami` ({reason})"
            )
        case errors.HfHubHTTPError():
            return HubUnavailable(f"the Hub responded with an error: {reason}")
        case OSError() if error.errno is not None:
            return HubUnavailable(f"a file cannot be written: {reason}")
    return HubUnavailable(f"the Hub cannot be reached: {reason}")
