"""The decoder against transformers, and Hugging Face folders in and out."""

import json
import shutil

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from trapo_jax.data import load_tokenizer
from trapo_jax.models import (
    apply_decoder,
    export_model,
    init_params,
    load_params,
    read_config,
    unembedding,
)
from trapo_jax.types import UserError

from conftest import TINY_MODEL  # isort: skip

GQA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 50,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "hidden_act": "silu",
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 5000.0,
    "tie_word_embeddings": False,
}


@pytest.fixture
def folder(tmp_path):
    """A random small model with grouped queries, untied embeddings and its own rope base."""
    source = tmp_path / "source"
    source.mkdir()
    (source / "config.json").write_text(json.dumps(GQA))
    config = read_config(source)
    params = jax.device_get(init_params(config, seed=0))
    export_model(params, config, source=source, destination=tmp_path / "model")
    return tmp_path / "model"


def our_logits(folder, token_ids, segment_ids=None, positions=None):
    config = read_config(folder)
    params = load_params(folder, config)
    if positions is None:
        positions = np.broadcast_to(np.arange(token_ids.shape[1]), token_ids.shape)
    segment_ids = np.ones_like(token_ids) if segment_ids is None else segment_ids
    hidden, _ = apply_decoder(config, params, token_ids, positions, segment_ids)
    return np.asarray(hidden @ unembedding(params))


@pytest.mark.parametrize("which", ["grouped_untied", "tiny"])
def test_logits_equal_transformers(which, folder):
    torch = pytest.importorskip("torch", reason="torch is not installed (parity with transformers)")
    from transformers import AutoModelForCausalLM

    folder = TINY_MODEL if which == "tiny" else folder
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    token_ids = np.random.default_rng(0).integers(0, 30, (3, 17))
    with torch.no_grad():
        theirs = model(torch.tensor(token_ids)).logits.numpy()
    np.testing.assert_allclose(our_logits(folder, token_ids), theirs, atol=1e-4)


def test_packed_and_padded_rows_equal_rows_alone(folder):
    rng = np.random.default_rng(0)
    first, second = rng.integers(0, 50, (1, 5)), rng.integers(0, 50, (1, 7))
    packed = np.concatenate([first, second, np.full((1, 4), 33)], axis=1)
    segments = np.array([[1] * 5 + [2] * 7 + [0] * 4])
    positions = np.array([[*range(5), *range(7), 0, 0, 0, 0]])
    together = our_logits(folder, packed, segments, positions)
    np.testing.assert_allclose(together[:, :5], our_logits(folder, first), atol=1e-5)
    np.testing.assert_allclose(together[:, 5:12], our_logits(folder, second), atol=1e-5)
    assert np.isfinite(together).all()


def test_export_and_import_are_bit_identical(folder, tmp_path):
    config = read_config(folder)
    params = load_params(folder, config)
    export_model(params, config, source=folder, destination=tmp_path / "again")
    for a, b in zip(
        jax.tree.leaves(load_params(tmp_path / "again", config)),
        jax.tree.leaves(params),
        strict=True,
    ):
        np.testing.assert_array_equal(a, b)


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


def break_config(folder, **changes):
    data = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**data, **changes}))


def break_tensors(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


BREAKAGES = {
    "no config": (lambda f: (f / "config.json").unlink(), r"config\.json: cannot be read"),
    "bad JSON": (lambda f: (f / "config.json").write_text("{"), "config.json: not valid JSON"),
    "JSON list": (lambda f: (f / "config.json").write_text("[]"), "expected a JSON object"),
    "field missing": (lambda f: break_config(f, hidden_size=None), "no field 'hidden_size'"),
    "architecture": (lambda f: break_config(f, model_type="mamba"), "'mamba' is not covered"),
    "rope type": (
        lambda f: break_config(f, rope_scaling={"rope_type": "yarn"}),
        "rope type 'yarn' is not covered",
    ),
    "biases": (lambda f: break_config(f, attention_bias=True), "attention_bias is not covered"),
    "activation": (lambda f: break_config(f, hidden_act="gelu"), "hidden_act 'gelu'"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "not a readable safetensors"),
    "LFS pointer": (
        lambda f: (f / "model.safetensors").write_text("version https://git-lfs.github.com"),
        "not a readable safetensors",
    ),
    "truncated": (
        lambda f: (f / "model.safetensors").write_bytes(
            (f / "model.safetensors").read_bytes()[:-40]
        ),
        "not a readable safetensors",
    ),
    "tensor missing": (
        lambda f: break_tensors(f, lambda t: t.pop("model.norm.weight")),
        "tensor 'model.norm.weight' is missing",
    ),
    "tensor too many": (
        lambda f: break_tensors(f, lambda t: t.update(extra=np.zeros(2, np.float32))),
        "1 unexpected tensors: extra",
    ),
    "misshapen": (
        lambda f: break_tensors(
            f, lambda t: t.update({"model.norm.weight": np.zeros(7, np.float32)})
        ),
        r"'model.norm.weight' has shape \(7,\), expected \(24,\)",
    ),
}


@pytest.mark.parametrize("what", BREAKAGES)
def test_broken_folders_are_named(what, folder):
    breakage, message = BREAKAGES[what]
    breakage(folder)
    with pytest.raises(UserError, match=message) as caught:
        load_params(folder, read_config(folder))
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)


def test_folder_without_tokenizer_is_named(folder):
    with pytest.raises(UserError, match="no tokenizer that can be loaded"):
        load_tokenizer(folder)
