"""Tests the token ids, EOS ids, and context length that are read from a model folder."""

import json
import resource
import shutil
import time

import numpy as np
import pytest

from support.broken_models import break_config
from support.commands import TINY_MODEL
from support.transformers_models import needs_torch
from trapo_jax.config import ModelConfig
from trapo_jax.models import export_model, load_params, open_model, read_max_context_len
from trapo_jax.types import UserError

VOCAB_SIZE = json.loads((TINY_MODEL / "config.json").read_text())["vocab_size"]
EOS = json.loads((TINY_MODEL / "tokenizer.json").read_text())["model"]["vocab"]["<eos>"]


@pytest.fixture
def tiny(tmp_path):
    """Returns a copy of the built-in model without a generation config and without EOS ids in `config.json`."""
    folder = shutil.copytree(TINY_MODEL, tmp_path / "tiny")
    (folder / "generation_config.json").unlink(missing_ok=True)
    break_config(folder, eos_token_id=None)
    return folder


def opened(folder):
    return open_model(ModelConfig(path=str(folder)))


def edit_tokenizer(folder, change):
    path = folder / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    change(tokenizer)
    path.write_text(json.dumps(tokenizer))


def add_token(tokenizer, token_id, content="<new>"):
    token = {**tokenizer["added_tokens"][0], "id": token_id, "content": content}
    tokenizer["added_tokens"].append(token)


def add_to_vocabulary(tokenizer, token_id):
    tokenizer["model"]["vocab"]["zzz"] = token_id


def add_by_template(tokenizer, token_id):
    """Adds a token that is not part of the vocabulary but is prepended to every text."""
    tokenizer["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [
            {"SpecialToken": {"id": "<s>", "type_id": 0}},
            {"Sequence": {"id": "A", "type_id": 0}},
        ],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [token_id], "tokens": ["<s>"]}},
    }


@pytest.mark.parametrize("token_id", [VOCAB_SIZE, 3_000_000_000])
@pytest.mark.parametrize("add", [add_token, add_to_vocabulary, add_by_template])
def test_a_token_beyond_the_embedding_is_rejected_quickly(add, token_id, tiny):
    opened(tiny)  # imports all modules before memory is measured
    edit_tokenizer(tiny, lambda tokenizer: add(tokenizer, token_id))
    memory, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    message = f"the largest token id is {token_id}, but vocab_size in config.json is {VOCAB_SIZE}"
    with pytest.raises(UserError, match=message) as caught:
        opened(tiny)
    assert str(tiny / "tokenizer.json") in str(caught.value)
    assert "\n" not in str(caught.value)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 500_000  # KiB
    assert time.process_time() - started < 30


def test_tokens_added_by_tokenizer_config_are_counted(tiny):
    path = tiny / "tokenizer_config.json"
    tokens = {
        str(VOCAB_SIZE + i): {"content": f"<new{i}>", "special": True} for i in range(VOCAB_SIZE)
    }
    path.write_text(json.dumps({**json.loads(path.read_text()), "added_tokens_decoder": tokens}))
    with pytest.raises(UserError, match="the largest token id is"):
        opened(tiny)


def test_an_embedding_larger_than_the_tokenizer_is_accepted(tiny):
    break_config(tiny, vocab_size=VOCAB_SIZE + 100)
    assert opened(tiny).decoder.vocab_size == VOCAB_SIZE + 100


def test_an_id_that_the_tokenizers_library_would_change_is_rejected(tiny):
    break_config(tiny, vocab_size=VOCAB_SIZE + 100)
    edit_tokenizer(tiny, lambda tokenizer: add_token(tokenizer, VOCAB_SIZE + 50))
    message = (
        f"added token '<new>' has the id {VOCAB_SIZE + 50}, but the tokenizers library assigns"
    )
    with pytest.raises(UserError, match=message):
        opened(tiny)


@pytest.mark.parametrize("token_id", [-1, 2**40, "7"])
def test_an_invalid_token_id_is_rejected(token_id, tiny):
    edit_tokenizer(tiny, lambda tokenizer: add_to_vocabulary(tokenizer, token_id))
    with pytest.raises(UserError, match="cannot load the tokenizer") as caught:
        opened(tiny)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("in_generation_config", "in_config", "expected"),
    [
        ("no file", None, []),
        ("no file", 5, [5]),
        ("no file", [5, 7, 5], [5, 7]),
        ("no file", [EOS], []),
        (None, 5, [5]),
        ([], [5], [5]),
        (7, 5, [7]),
        ([7, VOCAB_SIZE - 1], [5, "ignored"], [7, VOCAB_SIZE - 1]),
        (0, None, [0]),
    ],
)
def test_eos_ids_come_from_the_tokenizer_and_the_model(
    in_generation_config, in_config, expected, tiny
):
    break_config(tiny, eos_token_id=in_config)
    if in_generation_config != "no file":
        content = {"eos_token_id": in_generation_config}
        (tiny / "generation_config.json").write_text(json.dumps(content))
    assert opened(tiny).eos_ids == [EOS, *expected]


@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
@pytest.mark.parametrize(
    ("given", "found"),
    [
        (-1, "-1"),
        (VOCAB_SIZE, str(VOCAB_SIZE)),
        (10**30, str(10**30)),
        (True, "True"),
        (2.0, "2.0"),
        ("<eos>", "'<eos>'"),
        ([1, "2"], "'2'"),
        ([1, None], "None"),
        ([[1]], r"\[1\]"),
        ({"id": 1}, r"\{'id': 1\}"),
        (False, "False"),
    ],
)
def test_invalid_eos_ids_are_rejected(file, given, found, tiny):
    content = json.loads((tiny / "config.json").read_text()) if file == "config.json" else {}
    (tiny / file).write_text(json.dumps({**content, "eos_token_id": given}))
    message = rf"< vocab_size \({VOCAB_SIZE}\), found {found}$"
    with pytest.raises(UserError, match=message) as caught:
        opened(tiny)
    assert str(caught.value).startswith(f"{tiny / file}: field 'eos_token_id' must be")
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_transformers_generation_stops_at_every_eos_id_of_an_export(tiny, tmp_path):
    torch = needs_torch()
    from transformers import AutoModelForCausalLM

    def generate(folder):
        theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        prompt = torch.tensor([[5, 6, 7, 8]])
        output = theirs.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=8, do_sample=False
        )
        return output[0, 4:].tolist()

    # This model counts: after each token, it generates the token with the next id.
    break_config(tiny, tie_word_embeddings=False)
    model = opened(tiny)
    params = {**load_params(TINY_MODEL, opened(TINY_MODEL).decoder)}
    params["layers"] = {k: v * ("norm" in k) for k, v in params["layers"].items()}
    params["embedding"] = np.eye(VOCAB_SIZE, model.decoder.width, dtype=np.float32)
    params["unembedding"] = np.roll(params["embedding"], 1, axis=0).T
    counting = tmp_path / "counting"
    export_model(params, model.decoder, source=tiny, destination=counting)
    assert generate(counting) == list(range(9, 17))
    break_config(counting, eos_token_id=[3, 12])
    again = opened(counting)
    assert again.eos_ids == [EOS, 3, 12]
    export_model(
        params,
        again.decoder,
        source=counting,
        destination=tmp_path / "exported",
        eos_ids=again.eos_ids,
    )
    assert generate(tmp_path / "exported") == [9, 10, 11, 12]


LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
LINEAR = {"rope_type": "linear", "factor": 2.5}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, 128),
        ({"max_position_embeddings": None}, None),
        ({"rope_scaling": LLAMA3}, 128),
        ({"rope_scaling": LINEAR}, 320),
        ({"rope_parameters": {**LINEAR, "rope_theta": 1e4}}, 320),
        ({"model_type": "gemma3_text", "rope_scaling": LINEAR}, 128),
    ],
)
def test_the_context_length_includes_the_extension_by_rope_scaling(changes, expected, folder):
    break_config(folder, **changes)
    assert read_max_context_len(folder) == expected


@pytest.mark.slow
@pytest.mark.parametrize("value", [0, -5, True, "2048", 1.5, [2048]])
def test_an_invalid_context_length_is_rejected(value, folder):
    break_config(folder, max_position_embeddings=value)
    message = "field 'max_position_embeddings' must be an integer >= 1"
    with pytest.raises(UserError, match=message):
        read_max_context_len(folder)


def test_an_opened_model_has_the_context_length_of_its_config(tiny):
    break_config(tiny, max_position_embeddings=77)
    assert opened(tiny).max_context_len == 77
