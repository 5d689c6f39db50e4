"""Tests reading and writing model folders in the Hugging Face format, including damaged and malicious ones."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from support.broken_models import BREAKAGES, GQA, LFS_POINTER, break_config
from support.commands import TINY_MODEL
from trapo_jax.config import ModelConfig
from trapo_jax.models import (
    export_model,
    init_params,
    load_params,
    load_tokenizer,
    open_model,
    read_config,
)
from trapo_jax.types import UserError


@pytest.mark.slow
def test_exporting_and_loading_preserve_every_bit(folder, tmp_path):
    config = read_config(folder)
    params = load_params(folder, config)
    export_model(params, config, source=folder, destination=tmp_path / "again")
    for a, b in zip(
        jax.tree.leaves(load_params(tmp_path / "again", config)),
        jax.tree.leaves(params),
        strict=True,
    ):
        np.testing.assert_array_equal(a, b)
    theirs, ours = (load_file(f / "model.safetensors") for f in (folder, tmp_path / "again"))
    assert theirs.keys() == ours.keys()
    for name, tensor in theirs.items():
        np.testing.assert_array_equal(ours[name], tensor)


@pytest.mark.slow
def test_an_export_in_several_files_equals_one_in_a_single_file(folder, tmp_path):
    config = read_config(folder)
    params = load_params(folder, config)
    limit = 10_000
    again = tmp_path / "again"
    export_model(params, config, source=folder, destination=again, max_file_bytes=limit)
    files = sorted(again.glob("*.safetensors"))
    assert len(files) > 2
    assert files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
    whole = load_file(folder / "model.safetensors")
    index = json.loads((again / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == whole.keys()
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in whole.values())
    for file in files:
        tensors = load_file(file)
        assert sum(t.nbytes for t in tensors.values()) <= limit or len(tensors) == 1
        for name, tensor in tensors.items():
            assert index["weight_map"][name] == file.name
            np.testing.assert_array_equal(tensor, whole[name])


def test_a_failed_export_keeps_the_previous_folder(folder, tmp_path):
    config = read_config(folder)
    params = load_params(folder, config)
    kept = tmp_path / "kept"
    export_model(params, config, source=folder, destination=kept)
    before = (kept / "model.safetensors").read_bytes()
    (folder / "config.json").unlink()
    with pytest.raises(UserError):
        export_model(params, config, source=folder, destination=kept)
    assert (kept / "model.safetensors").read_bytes() == before


def test_another_export_keeps_files_that_others_added_to_the_folder(folder, tmp_path):
    config = read_config(folder)
    params = load_params(folder, config)
    out = tmp_path / "out"
    export_model(params, config, source=folder, destination=out, max_file_bytes=100_000)
    added = ("README.md", "model-00001-of-00009.safetensors", "model.safetensors.bak", "mine/a.txt")
    for name in added:
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_text("mine")
    export_model(params, config, source=folder, destination=out)
    names = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    export_model(params, config, source=folder, destination=tmp_path / "new")
    assert names == {*added, *(path.name for path in (tmp_path / "new").iterdir())}
    assert all((out / name).read_text() == "mine" for name in added)
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16])
def test_half_precision_weights_are_read_exactly(dtype, folder):
    config = read_config(folder)
    tensors = {
        name: tensor.astype(dtype)
        for name, tensor in load_file(folder / "model.safetensors").items()
    }
    save_file(tensors, folder / "model.safetensors")
    params = load_params(folder, config)
    assert params["embedding"].dtype == jnp.float32
    expected = tensors["model.embed_tokens.weight"].astype(np.float32)
    np.testing.assert_array_equal(params["embedding"], expected)


PEAK_OF_LOADING = """
import re, sys
from pathlib import Path
import jax
from trapo_jax.models import load_params, read_config

def memory(name):
    return 1024 * int(re.search(name + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

folder = Path(sys.argv[1])
config = read_config(folder)
jax.block_until_ready(jax.numpy.ones(3))
before = memory("VmRSS")
params = jax.block_until_ready(load_params(folder, config))
sizes = [x.nbytes for x in jax.tree.leaves(params)]
print(memory("VmHWM") - before, sum(sizes), max(sizes))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory use is read from /proc")
def test_loading_needs_little_memory_beyond_the_parameters(tmp_path):
    """Besides the parameters (on CPUs, in host memory), loading needs memory for a stacked parameter and a tensor."""
    data = {**GQA, "num_hidden_layers": 16, "hidden_size": 512, "intermediate_size": 2048}
    source = tmp_path / "source"
    source.mkdir()
    (source / "config.json").write_text(json.dumps(data))
    config = read_config(source)
    export_model(init_params(config, seed=0), config, source=source, destination=tmp_path / "model")
    result = subprocess.run(
        [sys.executable, "-c", PEAK_OF_LOADING, tmp_path / "model"],
        capture_output=True,
        text=True,
        check=True,
    )
    peak, total, largest_parameter = map(int, result.stdout.split())
    largest_tensor = 4 * 512 * 2048
    assert largest_parameter < total / 1.4
    assert peak < total + 1.3 * largest_parameter + largest_tensor
    print(
        f"peak {peak / 1e6:.0f} MB, parameters {total / 1e6:.0f}, largest {largest_parameter / 1e6:.0f}"
    )


def test_code_in_a_model_folder_never_runs(folder, tmp_path):
    witness = tmp_path / "witness"
    (folder / "evil.py").write_text(f"open({str(witness)!r}, 'w')\nclass Evil: pass\n")
    auto_map = {"AutoConfig": "evil.Evil", "AutoTokenizer": ["evil.Evil", None]}
    break_config(folder, auto_map=auto_map)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TINY_MODEL / name, folder)
    tokenizer_config = json.loads((folder / "tokenizer_config.json").read_text())
    tokenizer_config |= {"auto_map": auto_map, "tokenizer_class": "Evil"}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer_config))
    config = read_config(folder)
    params = load_params(folder, config)
    assert load_tokenizer(folder).eos_token == "<eos>"
    export_model(params, config, source=folder, destination=tmp_path / "out")
    assert not witness.exists()
    assert not list((tmp_path / "out").glob("*.py"))
    assert "auto_map" not in json.loads((tmp_path / "out" / "config.json").read_text())


def test_export_copies_named_chat_templates(folder, tmp_path):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TINY_MODEL / name, folder)
    (folder / "chat_template.jinja").write_text("D")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "rag.jinja").write_text("R")
    config = read_config(folder)
    params = load_params(folder, config)
    export_model(params, config, source=folder, destination=tmp_path / "out")
    assert load_tokenizer(tmp_path / "out").chat_template == {"default": "D", "rag": "R"}


def test_sharded_safetensors_equal_a_single_file(folder, tmp_path):
    tensors = load_file(folder / "model.safetensors")
    sharded = tmp_path / "sharded"
    sharded.mkdir()
    shutil.copy(folder / "config.json", sharded)
    weight_map = {}
    for i, name in enumerate(sorted(tensors)):
        weight_map[name] = f"model-{i % 2}.safetensors"
    for file in set(weight_map.values()):
        save_file({n: tensors[n] for n in tensors if weight_map[n] == file}, sharded / file)
    index = {"metadata": {}, "weight_map": weight_map}
    (sharded / "model.safetensors.index.json").write_text(json.dumps(index))
    config = read_config(folder)
    for a, b in zip(
        jax.tree.leaves(load_params(sharded, config)),
        jax.tree.leaves(load_params(folder, config)),
        strict=True,
    ):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("what", BREAKAGES)
def test_damaged_folders_are_rejected_with_a_one_line_error(what, folder):
    breakage, message = BREAKAGES[what]
    breakage(folder)
    with pytest.raises(UserError, match=message) as caught:
        load_params(folder, read_config(folder))
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)


GROWING = {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}


def tokenizer_with(field, parts_field, parts):
    """Returns the tiny model's `tokenizer.json` with `field` set to a sequence of normalizers or decoders."""
    content = json.loads((TINY_MODEL / "tokenizer.json").read_text())
    return json.dumps({**content, field: {"type": "Sequence", parts_field: parts}})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"cannot load the tokenizer \(no tokenizer.json\)"),
        ("{", "tokenizer.json: not valid JSON"),
        (
            LFS_POINTER,
            r"tokenizer.json: a Git-LFS pointer, not the file itself; run `git lfs pull`",
        ),
        ('{"version": "1.0"}', "cannot load the tokenizer"),
        ("[" * 100_000, r"tokenizer\.json: not valid JSON \(nested too deeply\)"),
        ('{"a": [' + "[]," * 2_000_000 + "[]]}", "more than 2,000,000 lists and objects"),
        (tokenizer_with("normalizer", "normalizers", [GROWING] * 7), "normalizer may make text"),
        (tokenizer_with("decoder", "decoders", [GROWING] * 7), "decoder may make text"),
        (
            tokenizer_with("normalizer", "normalizers", [{"type": "Replace"}]),
            "normalizer is not valid",
        ),
    ],
)
def test_a_folder_without_a_readable_tokenizer_is_rejected_with_a_one_line_error(
    content, message, folder
):
    if content is not None:
        (folder / "tokenizer.json").write_text(content)
    with pytest.raises(UserError, match=message) as caught:
        load_tokenizer(folder)
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize(
    "name",
    [
        *("config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"),
        *("special_tokens_map.json", "generation_config.json"),
    ],
)
def test_a_named_pipe_in_a_model_folder_is_rejected(name, tmp_path):
    shutil.copytree(TINY_MODEL, tmp_path / "model")
    (tmp_path / "model" / name).unlink(missing_ok=True)
    os.mkfifo(tmp_path / "model" / name)
    with pytest.raises(UserError, match=rf"{name}: a named pipe, not a regular file"):
        open_model(ModelConfig(path=str(tmp_path / "model")))
