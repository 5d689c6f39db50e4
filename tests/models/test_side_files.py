"""Tests which of the small files in a model folder are copied, and how they are written."""

import json
import os
import shutil

import pytest

from support.commands import TINY_MODEL
from trapo_jax.config import ModelConfig
from trapo_jax.models import copy_model_files, export_model, load_params, open_model
from trapo_jax.types import UserError


@pytest.fixture
def source(tmp_path):
    folder = shutil.copytree(TINY_MODEL, tmp_path / "source")
    templates = folder / "additional_chat_templates"
    templates.mkdir()
    (templates / "tool_use.jinja").write_text("{{ tools }}")
    (templates / "evil.py").write_text("raise SystemExit")
    (folder / "modeling_evil.py").write_text("raise SystemExit")
    content = {"eos_token_id": 5, "temperature": 0.6, "pad_token_id": 0}
    (folder / "generation_config.json").write_text(json.dumps(content))
    for path in folder.rglob("*.*"):
        path.chmod(0o400)
    return folder


def opened(folder):
    return open_model(ModelConfig(path=str(folder)))


def files_in(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_a_copy_has_everything_but_weights_and_code(source, tmp_path):
    copy_model_files(opened(source), tmp_path / "copy")
    expected = {
        "config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "generation_config.json",
        "additional_chat_templates/tool_use.jinja",
    }
    assert files_in(tmp_path / "copy") == expected
    assert files_in(source) == expected | {
        "model.safetensors",
        "modeling_evil.py",
        "additional_chat_templates/evil.py",
    }


def test_a_copy_opens_without_the_original_folder(source, tmp_path):
    model = opened(source)
    copy_model_files(model, tmp_path / "copy")
    shutil.rmtree(source)
    copy = open_model(ModelConfig(path=str(source)), files=tmp_path / "copy")
    assert copy.folder == source
    assert copy.files == tmp_path / "copy"
    assert copy.decoder == model.decoder
    assert copy.eos_ids == model.eos_ids
    assert copy.tokenizer.get_vocab() == model.tokenizer.get_vocab()
    with pytest.raises(UserError, match=r"source/model\.safetensors: no such file"):
        load_params(copy.folder, copy.decoder)


def test_export_from_a_copy_equals_export_from_the_folder(source, tmp_path):
    model = opened(source)
    params = load_params(source, model.decoder)
    copy_model_files(model, tmp_path / "copy")
    for name, files in (("a", source), ("b", tmp_path / "copy")):
        export_model(
            params,
            model.decoder,
            source=files,
            destination=tmp_path / name,
            eos_ids=model.eos_ids,
        )
    assert files_in(tmp_path / "a") == files_in(tmp_path / "b")
    for name in files_in(tmp_path / "a"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_every_eos_id_is_written_alongside_the_other_fields(source, tmp_path):
    model = opened(source)
    copy_model_files(model, tmp_path / "copy")
    content = json.loads((tmp_path / "copy" / "generation_config.json").read_text())
    eos = model.tokenizer.eos_token_id
    assert content == {"eos_token_id": [eos, 5], "temperature": 0.6, "pad_token_id": 0}


def test_a_generation_config_is_created_with_the_ids_of_the_config(source, tmp_path):
    (source / "generation_config.json").unlink()
    (source / "config.json").chmod(0o600)
    config = json.loads((source / "config.json").read_text())
    ids = {"bos_token_id": 3, "pad_token_id": None, "eos_token_id": [9]}
    (source / "config.json").write_text(json.dumps({**config, **ids}))
    model = opened(source)
    copy_model_files(model, tmp_path / "copy")
    content = json.loads((tmp_path / "copy" / "generation_config.json").read_text())
    assert content == {**ids, "eos_token_id": [model.tokenizer.eos_token_id, 9]}


@pytest.mark.parametrize("mask", [0o022, 0o027])
def test_exported_files_have_ordinary_permissions(mask, source, tmp_path):
    model = opened(source)
    params = load_params(source, model.decoder)
    before = os.umask(mask)
    try:
        export_model(
            params,
            model.decoder,
            source=source,
            destination=tmp_path / "out",
            max_file_bytes=100_000,
        )
    finally:
        os.umask(before)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    for name in files_in(tmp_path / "out"):
        assert (tmp_path / "out" / name).stat().st_mode & 0o777 == 0o666 & ~mask, name


def test_a_copy_that_cannot_be_written_causes_a_one_line_error(source, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file/copy: cannot be written") as caught:
        copy_model_files(opened(source), tmp_path / "file" / "copy")
    assert "\n" not in str(caught.value)
