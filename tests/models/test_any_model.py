"""Tests that any config, tokenizer, or safetensors file is either read or rejected with a one-line error."""

import json
import shutil
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from support.any_input import VALUES, changed, value_or_user_error
from support.broken_models import GQA
from support.commands import TINY_MODEL
from trapo_jax.models import load_tokenizer, read_config, read_eos_ids, read_max_context_len
from trapo_jax.models.tensor_files import INDEX, WEIGHTS, TensorReader, weight_files

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
GEMMA = {
    **GQA,
    "model_type": "gemma3_text",
    "hidden_activation": "gelu_pytorch_tanh",
    "query_pre_attn_scalar": 8,
    "sliding_window": 8,
    "layer_types": ["sliding_attention", "full_attention"],
    "rope_parameters": {
        "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    },
}
CONFIGS = [GQA, GEMMA, {**GQA, "rope_parameters": LLAMA3}, {**GQA, "rope_scaling": LLAMA3}]
CONFIGS += [{**GQA, "model_type": "mistral", "sliding_window": 8, "eos_token_id": [1, 2]}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("model")


@pytest.mark.slow
@settings(max_examples=300)
@given(config=st.sampled_from(CONFIGS).flatmap(changed))
def test_any_config_is_read_or_rejected(config, folder):
    (folder / "config.json").write_text(json.dumps(config))
    with value_or_user_error():
        decoder = read_config(folder)
        for rope in filter(None, (decoder.rope, decoder.local_rope)):
            assert (rope.frequencies(8) > 0).all()
    with value_or_user_error():
        read_max_context_len(folder)


@given(
    ids=VALUES | st.lists(st.integers(-1, 60)), of=st.sampled_from(["config", "generation_config"])
)
def test_any_eos_ids_are_in_the_vocabulary_or_rejected(ids, of, folder):
    (folder / "generation_config.json").unlink(missing_ok=True)
    (folder / f"{of}.json").write_text(json.dumps({"eos_token_id": ids}))
    with value_or_user_error():
        assert all(0 <= i < 50 for i in read_eos_ids(folder, 1, vocab_size=50))


TOKENIZER = json.loads((TINY_MODEL / "tokenizer.json").read_text())
TOKENIZER["normalizer"] = {
    "type": "Sequence",
    "normalizers": [
        {"type": "Replace", "pattern": {"String": "a"}, "content": "b"},
        {"type": "Prepend", "prepend": "_"},
    ],
}
TOKENIZER_CONFIG = json.loads((TINY_MODEL / "tokenizer_config.json").read_text())


@settings(max_examples=60)
@given(tokenizer=changed(TOKENIZER), config=st.just(TOKENIZER_CONFIG) | changed(TOKENIZER_CONFIG))
def test_any_tokenizer_is_loaded_or_rejected(tokenizer, config, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    with value_or_user_error():
        load_tokenizer(folder, vocab_size=30)
    shutil.rmtree(folder)


HEADER = {
    "__metadata__": {"format": "pt"},
    "model.norm.weight": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]},
    "lm_head.weight": {"dtype": "BF16", "shape": [2, 2], "data_offsets": [16, 24]},
}


def write_safetensors(path, header, length=None):
    """Writes a safetensors file with the given header and, if `length` is given, a wrong header length."""
    content = header if isinstance(header, bytes) else json.dumps(header).encode()
    length = len(content) if length is None else length
    path.write_bytes(struct.pack("<Q", length) + content + bytes(24))


@settings(max_examples=300)
@given(
    header=changed(HEADER) | st.binary(max_size=8) | st.just(HEADER),
    length=st.none() | st.integers(0, 2**64 - 1) | st.sampled_from([2**63, 100_000_001]),
)
def test_any_safetensors_header_is_read_or_rejected(header, length, folder):
    write_safetensors(folder / WEIGHTS, header, length)
    (folder / INDEX).unlink(missing_ok=True)
    with value_or_user_error():
        tensors = TensorReader(folder, {"model.norm.weight", "lm_head.weight"})
        tensors.check({"model.norm.weight": (4,)}, {"lm_head.weight": (2, 2)})
        assert tensors.read("model.norm.weight").shape == (4,)
        tensors.are_equal("model.norm.weight", "lm_head.weight")


@given(
    index=changed({"metadata": {}, "weight_map": {"model.norm.weight": WEIGHTS, "x": "y"}}) | VALUES
)
def test_any_tensor_index_is_read_or_rejected(index, folder):
    write_safetensors(folder / WEIGHTS, HEADER)
    (folder / INDEX).write_text(json.dumps(index))
    with value_or_user_error():
        assert all("/" not in name for name in weight_files(folder))
    with value_or_user_error():
        TensorReader(folder, {"model.norm.weight"}).check({"model.norm.weight": (4,)}, {})
