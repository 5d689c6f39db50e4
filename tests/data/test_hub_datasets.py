"""Tests reading datasets by Hub id: offline from prepared caches, and from a small fake Hub."""

import io
import json

import pyarrow as pa
import pyarrow.parquet
import pytest

from support.commands import run_python
from support.hub import COMMIT, GATED, OLD_COMMIT, add_to_cache, serve_hub
from trapo_jax.data import read_rows
from trapo_jax.types import UserError

NAME = "owner/Data-set"
CARD = b"""---
configs:
- config_name: plain
  default: true
  data_files:
  - split: train
    path: plain/train-*
  - split: test
    path: plain/test-*
- config_name: hard
  data_files:
  - split: train
    path: hard/*.parquet
---
"""


def parquet(*values):
    file = io.BytesIO()
    pyarrow.parquet.write_table(pa.table({"x": list(values)}), file)
    return file.getvalue()


FILES = {
    "README.md": CARD,
    "plain/train-00000-of-00002.parquet": parquet(1, 2),
    "plain/train-00001-of-00002.parquet": parquet(3),
    "plain/test-00000-of-00001.parquet": parquet(4),
    "hard/train.parquet": parquet(5),
}
ENTRIES = [
    (NAME, [1, 2, 3]),
    (f"{NAME}#test", [4]),
    (f"{NAME}@main:plain#train", [1, 2, 3]),
    (f"{NAME}:hard", [5]),
    (f"{NAME}@{COMMIT}:hard", [5]),
]


@pytest.fixture
def home(hub_home, monkeypatch):
    """Returns an empty Hugging Face home folder for the caches of both `huggingface_hub` and `datasets`."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", hub_home / "datasets")
    return hub_home


def values(entry):
    return [row.values["x"] for row in read_rows([entry])]


def error_of(entry):
    """Returns the one-line error from reading an entry."""
    with pytest.raises(UserError) as caught:
        values(entry)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(("entry", "expected"), ENTRIES)
@pytest.mark.parametrize("listed", [None, FILES], ids=["unlisted", "listed"])
def test_files_in_the_cache_of_the_hub_are_read(entry, expected, listed, home):
    add_to_cache(home, NAME, FILES, kind="dataset", listed=listed)
    assert values(entry) == expected
    assert {row.file for row in read_rows([entry])} == {entry.partition("#")[0]}


def test_the_revision_decides_between_two_commits(home):
    old = {**FILES, "hard/train.parquet": parquet(50)}
    add_to_cache(home, NAME, FILES, kind="dataset")
    add_to_cache(home, NAME, old, kind="dataset", commit=OLD_COMMIT, refs=("v1",))
    for _ in range(2):  # The second time, `datasets` has already prepared both commits.
        assert values(f"{NAME}:hard") == [5]
        assert values(f"{NAME}@v1:hard") == [50]
        assert values(f"{NAME}@{OLD_COMMIT}:hard") == [50]


@pytest.mark.parametrize(
    ("entry", "revision"),
    [
        ("owner/other", ""),
        (f"{NAME}@v2", " --revision v2"),
        (f"{NAME}@{OLD_COMMIT}:hard", f" --revision {OLD_COMMIT}"),
    ],
)
def test_the_error_for_an_uncached_dataset_states_the_command_that_downloads_it(
    entry, revision, home
):
    add_to_cache(home, NAME, FILES, kind="dataset")
    add_to_cache(home, "owner/other", FILES, kind="model")
    name = entry.partition("@")[0]
    error = error_of(entry)
    assert error.startswith(
        f"{entry}: no such file, and it is not in the local Hugging Face Hub cache"
    )
    assert error.endswith(f"`hf download --repo-type dataset {name}{revision}`")


@pytest.mark.parametrize(
    "files",
    [
        {"README.md": CARD},
        {name: content for name, content in FILES.items() if "00001-of-00002" not in name},
    ],
    ids=["only the card", "one of two shards"],
)
@pytest.mark.parametrize("listed", [None, FILES], ids=["unlisted", "listed"])
def test_a_partially_cached_dataset_is_rejected(files, listed, home):
    add_to_cache(home, NAME, files, kind="dataset", listed=listed)
    error = error_of(NAME)
    assert "part of it is not in the local Hugging Face Hub cache" in error
    assert error.endswith(f"run `hf download --repo-type dataset {NAME}`")


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (f"{NAME}:easy", r"BuilderConfig 'easy' not found. Available: ['plain', 'hard']"),
        (f"{NAME}#dev", "Unknown split \"dev\". Should be one of ['train', 'test']"),
    ],
)
def test_a_config_or_split_that_does_not_exist_is_named(entry, message, home):
    add_to_cache(home, NAME, FILES, kind="dataset")
    assert message in error_of(entry)


@pytest.mark.parametrize("entry", ["./owner/x", "owner/x/y", "owner/x@", "owner/x:", "owner/x@a@b"])
def test_a_path_is_not_mistaken_for_a_hub_id(entry, home, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert error_of(entry) == f"{entry}: no such file or folder in {tmp_path}"


def test_a_local_file_or_folder_of_the_same_name_takes_precedence(home, tmp_path, monkeypatch):
    import datasets

    add_to_cache(home, NAME, FILES, kind="dataset")
    monkeypatch.chdir(tmp_path)
    datasets.Dataset.from_list([{"x": 9}]).save_to_disk(tmp_path / NAME)
    assert values(NAME) == [9]
    assert values(f"{NAME}:hard") == [5]  # No local folder has this name.


def test_code_in_a_dataset_never_runs(home, tmp_path):
    witness = tmp_path / "witness"
    code = f"open({str(witness)!r}, 'w')\n".encode()
    files = {**FILES, "Data-set.py": code, f"{COMMIT}.py": code, "data_set.py": code}
    add_to_cache(home, NAME, files, kind="dataset")
    assert "no longer supported" in error_of(f"{NAME}:hard")
    assert not witness.exists()


def test_a_card_that_names_a_file_on_this_machine_is_rejected(home, tmp_path):
    secret = tmp_path / "secret.jsonl"
    secret.write_text('{"x": "secret"}\n')
    for path in (str(secret), "../../../../../secret.jsonl"):
        card = f"---\nconfigs:\n- config_name: default\n  data_files: {path}\n---\n".encode()
        folder = add_to_cache(home, f"owner/{len(path)}", {"README.md": card}, kind="dataset")
        assert (folder / path).resolve() == secret
        assert "its card names" in error_of(f"owner/{len(path)}")


READ = """
import json, sys
from trapo_jax.data import read_rows
from trapo_jax.types import UserError
for entry in sys.argv[1:]:
    try:
        print(json.dumps([row.values["x"] for row in read_rows([entry])]))
    except UserError as error:
        print(json.dumps(str(error)))
"""


@pytest.fixture
def hub(tmp_path):
    """Yields a fake Hub with a dataset, and a function that reads entries in a separate process."""
    with serve_hub() as (fake, address):
        fake.repos["dataset", NAME] = FILES

        def read(*entries, **environment):
            settings = {
                "HF_HUB_OFFLINE": "0",
                "HF_ENDPOINT": address,
                "HF_HOME": str(tmp_path / "home"),
                "HF_UPDATE_DOWNLOAD_COUNTS": "0",
            }
            result = run_python("-c", READ, *entries, **settings | environment)
            assert result.returncode == 0, result.stderr
            return [json.loads(line) for line in result.stdout.splitlines()]

        yield fake, read


@pytest.mark.slow
def test_what_was_downloaded_once_is_read_from_the_cache(hub):
    fake, read = hub
    entries, expected = zip(*ENTRIES, strict=True)
    assert read(*entries) == list(expected)
    assert sorted(fake.downloads) == sorted(FILES)
    for environment in (
        {"HF_HUB_OFFLINE": "1"},
        {"HF_DATASETS_OFFLINE": "1"},
        {"HF_ENDPOINT": "http://127.0.0.1:9"},
    ):
        # The revision v1 was not downloaded. By itself, `datasets` would use the downloaded revision instead.
        *rows, error = read(*entries, f"{NAME}@v1", **environment)
        assert rows == list(expected)
        assert "it is not in the local Hugging Face Hub cache" in error


@pytest.mark.slow
def test_a_cached_config_does_not_replace_the_default_config_offline(hub):
    _, read = hub
    assert read(f"{NAME}:hard") == [[5]]
    (error,) = read(NAME, HF_HUB_OFFLINE="1")
    assert "part of it is not in the local Hugging Face Hub cache" in error


@pytest.mark.slow
def test_a_local_folder_does_not_replace_an_entry_with_a_revision(hub, tmp_path, monkeypatch):
    _, read = hub
    (tmp_path / NAME).mkdir(parents=True)
    (tmp_path / NAME / "train.jsonl").write_text('{"x": 7}\n')
    assert read(f"{NAME}@main", cwd=tmp_path) == [[1, 2, 3]]


@pytest.mark.slow
def test_errors_from_the_hub_are_reported_in_one_line(hub):
    fake, read = hub
    fake.repos["dataset", "owner/gated"] = GATED
    none, revision, gated = read("owner/none", f"{NAME}@v9", "owner/gated")
    assert "the Hub has no such dataset, or it is private; check the name, or log in" in none
    assert f"the Hub has no revision 'v9' of {NAME}" in revision
    assert gated.startswith("owner/gated: cannot be read (")
    assert not any("\n" in line or "hf download" in line for line in (none, revision, gated))
