"""Tests that weight files unlike those that transformers writes today are read in the same way as by transformers."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from support.broken_models import break_config, break_tensors, write_index
from support.transformers_models import make_theirs, needs_torch, our_logits, their_logits
from trapo_jax.models import export_model, load_params, read_config
from trapo_jax.types import UserError

TOKEN_IDS = np.random.default_rng(0).integers(0, 50, (2, 9))
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def own_head(tensors):
    tensors[HEAD] = np.random.default_rng(1).normal(size=tensors[EMBEDDING].shape).astype("f")


def equal_head(tensors):
    tensors[HEAD] = tensors[EMBEDDING].copy()


def head_that_differs_in_the_last_number(tensors):
    equal_head(tensors)
    tensors[HEAD][-1, -1] += 9


def head_alone(tensors):
    tensors[HEAD] = tensors.pop(EMBEDDING)


def without_prefix(tensors):
    for name in list(tensors):
        tensors[name.removeprefix("model.")] = tensors.pop(name)


def own_head_without_prefix(tensors):
    own_head(tensors)
    without_prefix(tensors)


def prefixed_head(tensors):
    own_head(tensors)
    tensors[f"model.{HEAD}"] = tensors.pop(HEAD)


def old_buffers(tensors):
    tensors["model.rotary_emb.inv_freq"] = np.ones(2, np.float32)
    for i in range(3):
        attention = f"model.layers.{i}.self_attn"
        tensors[f"{attention}.rotary_emb.inv_freq"] = np.full(2, 7, np.float32)
        tensors[f"{attention}.rotary_emb.cos_cached"] = np.ones((1, 1, 128, 4), np.float32)
        tensors[f"{attention}.masked_bias"] = np.array(-1e9, np.float32)
        tensors[f"{attention}.bias"] = np.ones((1, 1, 8, 8), bool)
    tensors["position_ids"] = np.arange(8)


def old_buffers_without_prefix(tensors):
    old_buffers(tensors)
    without_prefix(tensors)


# Maps each change of the weights to whether transformers ties the embeddings of the changed model.
TIED = {
    own_head: False,
    equal_head: True,
    head_that_differs_in_the_last_number: False,
    head_alone: True,
    without_prefix: True,
    own_head_without_prefix: False,
    prefixed_head: False,
    old_buffers: True,
    old_buffers_without_prefix: True,
}


def write_tied_model(folder):
    make_theirs("qwen2", {"tie_word_embeddings": True}, folder)


def load_theirs(folder):
    """Loads a folder with transformers, and checks that the folder contains every parameter."""
    import torch
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert not info["missing_keys"]
    return model.eval(), info


@pytest.mark.parametrize("change", TIED, ids=lambda change: change.__name__)
def test_tensors_are_read_as_in_transformers(change, tmp_path):
    needs_torch()
    write_tied_model(tmp_path / "model")
    break_tensors(tmp_path / "model", change)
    theirs, _ = load_theirs(tmp_path / "model")
    assert (theirs.lm_head.weight is theirs.model.embed_tokens.weight) == TIED[change]
    expected = their_logits(theirs, TOKEN_IDS)
    np.testing.assert_allclose(our_logits(tmp_path / "model", TOKEN_IDS), expected, atol=1e-4)
    # The exported model has the same logits, and its config and tensors agree on whether the embeddings are tied.
    config = read_config(tmp_path / "model")
    params = load_params(tmp_path / "model", config)
    exported = tmp_path / "exported"
    export_model(params, config, source=tmp_path / "model", destination=exported)
    again, info = load_theirs(exported)
    assert not info["unexpected_keys"]
    np.testing.assert_allclose(their_logits(again, TOKEN_IDS), expected, atol=1e-5)
    tensors = load_file(exported / "model.safetensors")
    assert json.loads((exported / "config.json").read_text())["tie_word_embeddings"] == TIED[change]
    assert (HEAD in tensors) != TIED[change]
    assert EMBEDDING in tensors


@pytest.mark.parametrize("change", TIED, ids=lambda change: change.__name__)
def test_tensors_in_several_files_are_read_by_the_same_rules(change, folder):
    break_config(folder, tie_word_embeddings=True)
    break_tensors(folder, lambda t: t.pop(HEAD))
    break_tensors(folder, change)
    config = read_config(folder)
    assert config.tied_embeddings == TIED[change]
    whole = load_params(folder, config)
    tensors = load_file(folder / "model.safetensors")
    head = {name: tensor for name, tensor in tensors.items() if "lm_head" in name}
    rest = {name: tensor for name, tensor in tensors.items() if name not in head}
    save_file(head, folder / "head.safetensors")
    write_index(folder, dict.fromkeys(head, "head.safetensors"))
    save_file(rest, folder / "model.safetensors")
    assert read_config(folder) == config
    sharded = load_params(folder, config)
    np.testing.assert_array_equal(whole["embedding"], sharded["embedding"])
    assert ("unembedding" in sharded) != TIED[change]
    if not TIED[change]:
        np.testing.assert_array_equal(whole["unembedding"], sharded["unembedding"])
        (theirs,) = head.values()
        np.testing.assert_array_equal(whole["unembedding"], theirs.T)


def test_the_head_of_an_untied_model_must_exist(folder):
    break_tensors(folder, lambda t: t.pop(HEAD))
    with pytest.raises(UserError, match=r"tensor 'lm_head\.weight' is missing"):
        load_params(folder, read_config(folder))


def test_without_weights_the_config_decides_whether_embeddings_are_tied(folder):
    (folder / "model.safetensors").unlink()
    assert not read_config(folder).tied_embeddings
    break_config(folder, tie_word_embeddings=True)
    assert read_config(folder).tied_embeddings


def misshapen_head(tensors):
    tensors[HEAD] = np.zeros((7, 24), np.float32)


def integer_head(tensors):
    tensors[HEAD] = np.zeros((50, 24), np.int32)


def two_names(tensors):
    tensors["norm.weight"] = tensors["model.norm.weight"].copy()


def unknown_buffer(tensors):
    tensors["model.layers.0.self_attn.scale"] = np.ones(2, np.float32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (misshapen_head, r"'lm_head.weight' has shape \(7, 24\), expected \(50, 24\)"),
        (integer_head, "'lm_head.weight' has dtype I32, expected one of F32, BF16, F16"),
        (two_names, "'model.norm.weight' and 'norm.weight' refer to the same parameter"),
        (unknown_buffer, "'model.layers.0.self_attn.scale' is unexpected"),
    ],
)
def test_invalid_tensors_are_rejected_by_name(change, message, folder):
    break_config(folder, tie_word_embeddings=True)
    break_tensors(folder, change)
    with pytest.raises(UserError, match=message) as caught:
        load_params(folder, read_config(folder))
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)
