"""Tests models with Hub ids, from a prepared cache without network access and from a fake Hub on this machine."""

import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load, save

from support.commands import TINY_MODEL, run_python
from support.hub import COMMIT, GATED, OLD_COMMIT, add_to_cache, folder_files, serve_hub
from trapo_jax.config import ModelConfig
from trapo_jax.models import (
    copy_model_files,
    find_model,
    load_params,
    open_model,
    with_weights,
)
from trapo_jax.types import UserError

FILES = folder_files(TINY_MODEL)
SMALL = {name: content for name, content in FILES.items() if not name.endswith(".safetensors")}
NAME = "owner/tiny"


def opened(path):
    return open_model(ModelConfig(path=path))


def error_of(path, action=opened):
    """Returns the message of the one-line error that an action raises for a path."""
    with pytest.raises(UserError) as caught:
        action(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def with_config(files, **changes):
    config = json.loads(files["config.json"]) | changes
    return {**files, "config.json": json.dumps(config).encode()}


@pytest.mark.parametrize("revision", ["", "@main", "@v1", "@refs/pr/1", f"@{COMMIT}"])
def test_a_cached_model_is_found_by_name_and_revision(revision, hub_home):
    folder = add_to_cache(hub_home, NAME, FILES, refs=("main", "v1", "refs/pr/1"))
    model = with_weights(opened(NAME + revision))
    assert model.folder == folder
    assert (model.repo.name, model.repo.revision) == (NAME, COMMIT)
    jax.tree.map(
        np.testing.assert_array_equal,
        load_params(model.folder, model.decoder),
        load_params(TINY_MODEL, model.decoder),
    )


def test_the_revision_decides_between_two_commits(hub_home):
    add_to_cache(hub_home, NAME, with_config(FILES, max_position_embeddings=77))
    old = with_config(FILES, max_position_embeddings=55)
    add_to_cache(hub_home, NAME, old, commit=OLD_COMMIT, refs=("v1",))
    assert opened(NAME).max_context_len == 77
    assert opened(f"{NAME}@v1").max_context_len == 55
    assert opened(f"{NAME}@{OLD_COMMIT}").max_context_len == 55


@pytest.mark.parametrize(
    ("path", "command"),
    [
        ("owner/other", "`hf download owner/other`"),
        (f"{NAME}@v2", f"`hf download {NAME} --revision v2`"),
        (f"{NAME}@{OLD_COMMIT}", f"`hf download {NAME} --revision {OLD_COMMIT}`"),
    ],
)
def test_the_error_for_a_model_that_is_not_cached_contains_the_download_command(
    path, command, hub_home
):
    add_to_cache(hub_home, NAME, FILES)
    for action in (opened, find_model):
        error = error_of(path, action)
        assert error.startswith(
            f"model.path='{path}': no such folder, and it is not in the local Hugging Face Hub cache"
        )
        assert "HF_HUB_OFFLINE is set" in error
        assert error.endswith(command)


@pytest.mark.parametrize(
    "path", ["./owner/tiny", "owner/tiny/extra", "tiny", "owner/tiny@", "owner/../tiny", "/tiny"]
)
def test_a_path_is_not_mistaken_for_a_hub_id(path, hub_home, tmp_path, monkeypatch):
    add_to_cache(hub_home, NAME, FILES)
    monkeypatch.chdir(tmp_path)
    where = "" if path.startswith("/") else f" in {tmp_path}"
    assert f"model.path={path!r}: no such folder{where}; pass a" in error_of(path)


def test_the_error_for_a_folder_without_a_config_suggests_a_subfolder_with_one(tmp_path):
    (tmp_path / "run" / "hf").mkdir(parents=True)
    path = f"{tmp_path}/run"
    assert f"{path!r}: the folder contains no config.json; pass a" in error_of(path)
    (tmp_path / "run" / "hf" / "config.json").write_text("{}")
    for folder in (path, str(tmp_path)):
        assert (
            f"{folder!r}: the folder contains no config.json; did you mean {path}/hf?"
            in error_of(folder)
        )
    file = f"{path}/hf/config.json"
    assert f"{file!r}: this is a file; did you mean {path}/hf?" in error_of(file)


@pytest.mark.parametrize("path", [".", "..", "report"])
def test_other_paths_are_not_mistaken_for_built_in_models(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert f"model.path={path!r}: " in error_of(path)


def test_the_error_for_a_web_address_suggests_the_hub_id():
    assert error_of(f"https://huggingface.co/{NAME}").endswith(f"; did you mean {NAME}?")


@pytest.mark.parametrize("path", [NAME, f"{NAME}@v1"])
def test_a_local_folder_of_the_same_name_takes_precedence(path, hub_home, tmp_path, monkeypatch):
    add_to_cache(hub_home, NAME, FILES)
    monkeypatch.chdir(tmp_path)
    local = tmp_path / path
    local.mkdir(parents=True)
    for name, content in with_config(FILES, max_position_embeddings=33).items():
        (local / name).write_bytes(content)
    model = with_weights(opened(path))
    assert model.max_context_len == 33
    assert model.repo is None


def test_a_plan_needs_only_the_config(hub_home):
    folder = add_to_cache(hub_home, NAME, {"config.json": FILES["config.json"]}, listed=FILES)
    assert find_model(NAME) == folder
    assert "not in the local Hugging Face Hub cache" in error_of(NAME)  # The tokenizer is missing.


@pytest.mark.parametrize("listed", [None, FILES], ids=["unlisted", "listed"])
def test_a_model_opens_without_weights_and_loading_them_names_the_download_command(
    listed, hub_home
):
    add_to_cache(hub_home, NAME, SMALL, listed=listed)
    model = opened(NAME)
    error = error_of(model, with_weights)
    assert f"model.path='{NAME}@{COMMIT}'" in error
    assert "is not in the local Hugging Face Hub cache" in error
    assert error.endswith(f"`hf download {NAME} --revision {COMMIT}`")


def test_a_listed_chat_template_that_is_not_in_the_cache_is_reported(hub_home):
    add_to_cache(hub_home, NAME, FILES, listed=[*FILES, "chat_template.jinja", "README.md"])
    assert "part of it is not in the local Hugging Face Hub cache" in error_of(NAME)


def test_a_missing_weight_file_among_several_is_reported(hub_home):
    shards = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    index = {"weight_map": {"a": shards[0], "b": shards[1]}}
    files = {**SMALL, "model.safetensors.index.json": json.dumps(index).encode(), shards[0]: b"x"}
    add_to_cache(hub_home, NAME, files)
    assert f"{shards[1]} is not in the local Hugging Face Hub cache" in error_of(
        opened(NAME), with_weights
    )


@pytest.mark.parametrize("file", ["pytorch_model.bin", "*", "code.py", "../model.safetensors"])
def test_an_index_may_only_name_safetensors_files(file, hub_home):
    index = json.dumps({"weight_map": {"a": file}}).encode()
    add_to_cache(hub_home, NAME, {**SMALL, "model.safetensors.index.json": index})
    assert "model.safetensors.index.json" in error_of(opened(NAME), with_weights)


def test_a_separate_head_is_detected_once_the_weights_are_available(hub_home):
    tied = with_config(FILES, tie_word_embeddings=True)
    tensors = load(FILES["model.safetensors"])
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1
    tied["model.safetensors"] = save(tensors, metadata={"format": "pt"})
    small = {name: content for name, content in tied.items() if name in SMALL}
    add_to_cache(hub_home, NAME, small)
    model = opened(NAME)
    assert model.decoder.tied_embeddings
    add_to_cache(hub_home, "owner/other", tied)
    model = with_weights(opened("owner/other"))
    assert not model.decoder.tied_embeddings
    head = load_params(model.folder, model.decoder)["unembedding"]
    np.testing.assert_array_equal(head, np.float32(tensors["lm_head.weight"]).T)


def test_a_run_keeps_the_commit_from_which_it_started(hub_home, tmp_path):
    add_to_cache(hub_home, NAME, FILES, commit=OLD_COMMIT)
    copy_model_files(opened(NAME), tmp_path / "copy")
    add_to_cache(hub_home, NAME, FILES)  # `main` moves to a new commit.
    again = open_model(ModelConfig(path=NAME), files=tmp_path / "copy")
    assert with_weights(again).folder.name == OLD_COMMIT
    (tmp_path / "copy" / "hub.json").write_text('{"name": "../x", "commit": 3}')
    with pytest.raises(UserError, match=r"hub\.json: expected the name and the commit"):
        open_model(ModelConfig(path=NAME), files=tmp_path / "copy")


ACTIONS = """
import sys
from trapo_jax.config import ModelConfig
from trapo_jax.models import find_model, open_model, with_weights
from trapo_jax.types import UserError
actions = {
    "find": find_model,
    "open": lambda path: open_model(ModelConfig(path=path)).folder,
    "weights": lambda path: with_weights(open_model(ModelConfig(path=path))).folder,
}
try:
    print(actions[sys.argv[1]](sys.argv[2]))
except UserError as error:
    sys.exit(str(error))
"""


@pytest.fixture
def hub(tmp_path):
    """Yields a fake Hub with a model, and a function that opens a model by its Hub id in a separate process."""
    with serve_hub() as (fake, address):
        unwanted = ["modeling.py", "pytorch_model.bin", "onnx/model.safetensors", "README.md"]
        fake.repos["model", NAME] = {**FILES, **dict.fromkeys(unwanted, b"x")}

        def run(action, path, **environment):
            settings = {
                "HF_HUB_OFFLINE": "0",
                "HF_ENDPOINT": address,
                "HF_HOME": str(tmp_path / "home"),
                "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            }
            return run_python("-c", ACTIONS, action, path, **settings | environment)

        yield fake, run


@pytest.mark.slow
def test_only_the_required_files_are_downloaded(hub):
    fake, run = hub
    run("find", NAME)
    assert fake.downloads == ["config.json"]
    run("open", NAME)
    assert sorted(fake.downloads) == sorted(SMALL)
    result = run("weights", f"{NAME}@main")
    assert result.stdout.strip().endswith(f"models--owner--tiny/snapshots/{COMMIT}")
    assert sorted(fake.downloads) == sorted(FILES)
    offline = {"HF_HUB_OFFLINE": "1"}
    unreachable = {"HF_ENDPOINT": "http://127.0.0.1:9"}
    for environment in (offline, unreachable):
        assert run("weights", NAME, **environment).stdout == result.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    ("answer", "path", "message"),
    [
        ("RepoNotFound", NAME, "the Hub has no such model, or it is private; check the name, or"),
        (GATED, NAME, f"accept its conditions at https://huggingface.co/{NAME}, and log in"),
        (FILES, f"{NAME}@v9", f"the Hub has no revision 'v9' of {NAME}"),
        ({"tokenizer_config.json": b"{}"}, NAME, f"{NAME} has no config.json on the Hub"),
        (SMALL, NAME, "has no model.safetensors on the Hub"),
    ],
)
def test_an_error_response_of_the_hub_is_reported_in_one_line(answer, path, message, hub):
    fake, run = hub
    fake.repos["model", NAME] = answer
    (line,) = run("weights", path).stderr.splitlines()
    assert line.startswith(f"model.path='{NAME}")
    assert message in line
    assert "hf download" not in line  # This command would not help.


@pytest.mark.slow
def test_an_unreachable_hub_is_reported_in_one_line_with_the_download_command(hub):
    _, run = hub
    (line,) = run("open", NAME, HF_ENDPOINT="http://127.0.0.1:9").stderr.splitlines()
    assert "the Hub cannot be reached: " in line
    assert line.endswith(f"run `hf download {NAME}`")
