"""Defines ways to break a Hugging Face model folder, each with the expected error message."""

import json

import numpy as np
from safetensors.numpy import load_file, save_file

# The config of the small model to which the breakages are applied.
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


LFS_POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12345\n"


def break_config(folder, **changes):
    data = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**data, **changes}))


def break_tensors(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def write_index(folder, changes, move=None):
    """Writes an index for a folder with a single tensor file.

    Args:
      folder: the model folder.
      changes: index entries to change; None omits a tensor from the index.
      move: a tensor to remove from the file, although the index lists it.
    """
    tensors = load_file(folder / "model.safetensors")
    weight_map = {**dict.fromkeys(tensors, "model.safetensors"), **changes}
    weight_map = {name: file for name, file in weight_map.items() if file is not None}
    if move:
        tensors.pop(move)
        save_file(tensors, folder / "model.safetensors")
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


BREAKAGES = {
    "no config": (lambda f: (f / "config.json").unlink(), r"config\.json: cannot be read"),
    "bad JSON": (lambda f: (f / "config.json").write_text("{"), "config.json: not valid JSON"),
    "JSON list": (lambda f: (f / "config.json").write_text("[]"), "expected a JSON object"),
    "field missing": (
        lambda f: break_config(f, hidden_size=None),
        "field 'hidden_size' is missing",
    ),
    "architecture": (lambda f: break_config(f, model_type="mamba"), "'mamba' is not supported"),
    "rope type": (
        lambda f: break_config(f, rope_scaling={"rope_type": "yarn"}),
        "rope type 'yarn' is not supported",
    ),
    "rope type dynamic": (
        lambda f: break_config(f, rope_scaling={"type": "dynamic", "factor": 2.0}),
        "rope type 'dynamic' is not supported",
    ),
    "rope type longrope": (
        lambda f: break_config(f, rope_parameters={"rope_type": "longrope", "rope_theta": 1e4}),
        "rope type 'longrope' is not supported",
    ),
    "rope with missing fields": (
        lambda f: break_config(f, rope_scaling={"rope_type": "llama3", "factor": 8.0}),
        "rope type 'llama3' needs a number 'low_freq_factor'",
    ),
    "partial rotation": (
        lambda f: break_config(f, partial_rotary_factor=0.5),
        "partial_rotary_factor 0.5 is not supported",
    ),
    "MLP biases": (lambda f: break_config(f, mlp_bias=True), "mlp_bias is not supported"),
    "quantized": (
        lambda f: break_config(f, quantization_config={"bits": 4}),
        "quantization_config is not supported",
    ),
    "biases missing": (
        lambda f: break_config(f, attention_bias=True),
        r"8 tensors \('model.layers.0.self_attn.k_proj.bias'.*\) are missing",
    ),
    "string instead of a number": (
        lambda f: break_config(f, hidden_size="24"),
        "field 'hidden_size' must be an integer >= 1 and <= 1048576, found '24'",
    ),
    "heads": (
        lambda f: break_config(f, num_key_value_heads=4),
        "num_attention_heads 6 is not divisible by num_key_value_heads 4",
    ),
    "layer types": (
        lambda f: break_config(
            f, model_type="mistral", sliding_window=4, layer_types=["linear_attention"] * 2
        ),
        "layer_types must be a list of 2 entries, each one of",
    ),
    "layer types that are lists": (
        lambda f: break_config(f, model_type="mistral", sliding_window=4, layer_types=[[], {}]),
        "layer_types must be a list of 2 entries, each one of",
    ),
    "a million layers": (
        lambda f: break_config(f, num_hidden_layers=10**6),
        "field 'num_hidden_layers' must be an integer >= 1 and <= 4096, found 1000000",
    ),
    "odd head_dim": (lambda f: break_config(f, head_dim=9), "head_dim 9 is odd"),
    "rope parameters of layers that are not objects": (
        lambda f: break_config(
            f,
            model_type="gemma3_text",
            hidden_activation="gelu_pytorch_tanh",
            rope_parameters={"full_attention": [1]},
        ),
        r"field 'full_attention' must be an object, found \[1\]",
    ),
    "rope type llama3 with equal factors": (
        lambda f: break_config(
            f,
            rope_scaling={
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 4.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            },
        ),
        "rope type 'llama3' needs low_freq_factor < high_freq_factor",
    ),
    "activation": (lambda f: break_config(f, hidden_act="gelu"), "hidden_act 'gelu'"),
    "no weights": (
        lambda f: (f / "model.safetensors").unlink(),
        r"model\.safetensors: no such file; weights are read only from safetensors files",
    ),
    "weights in several files without their index": (
        lambda f: (f / "model.safetensors").rename(f / "model-00001-of-00002.safetensors"),
        r"model\.safetensors\.index\.json: no such file; weights that are split into several files require this",
    ),
    "LFS pointer": (
        lambda f: (f / "model.safetensors").write_text(LFS_POINTER),
        r"model\.safetensors: a Git-LFS pointer, not the file itself; run `git lfs pull`",
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
    "additional tensor": (
        lambda f: break_tensors(f, lambda t: t.update(extra=np.zeros(2, np.float32))),
        "tensor 'extra' is unexpected",
    ),
    "wrong shape": (
        lambda f: break_tensors(
            f, lambda t: t.update({"model.norm.weight": np.zeros(7, np.float32)})
        ),
        r"'model.norm.weight' has shape \(7,\), expected \(24,\)",
    ),
    "integers": (
        lambda f: break_tensors(
            f, lambda t: t.update({"model.norm.weight": np.zeros(24, np.int32)})
        ),
        "'model.norm.weight' has dtype I32, expected one of F32, BF16, F16",
    ),
    **{
        f"{value} in the weights": (
            lambda f, value=value: break_tensors(
                f,
                lambda t: t.update({"model.norm.weight": np.array([1.0] * 23 + [value], "f4")}),
            ),
            r"model.safetensors: tensor 'model.norm.weight' has values that are not finite",
        )
        for value in (np.nan, np.inf)
    },
    **{
        f"{field} {value:.0g}": (
            lambda f, change={field: value}: break_config(f, **change),
            f"config.json: field '{field}' must be a number > 0 .*, found",
        )
        for field in ("rms_norm_eps", "rope_theta")
        for value in (np.nan, np.inf, 10**300, 1e-300)
    },
    "rope factor NaN": (
        lambda f: break_config(f, rope_scaling={"rope_type": "linear", "factor": np.nan}),
        "rope type 'linear' needs a number 'factor' > 0 .*, found nan",
    ),
    "index with a missing file": (
        lambda f: write_index(f, {"model.norm.weight": "model-2.safetensors"}),
        r"model-2.safetensors: no such file",
    ),
    "index without a tensor": (
        lambda f: write_index(f, {"model.norm.weight": None}),
        "tensor 'model.norm.weight' is missing",
    ),
    "index that leaves the folder": (
        lambda f: write_index(f, {"model.norm.weight": "../model.safetensors"}),
        "the file of tensor 'model.norm.weight' must be a file name, found '../model.safetensors'",
    ),
    "index with a tensor that is not in the file": (
        lambda f: write_index(f, {}, move="model.norm.weight"),
        "'model.norm.weight' is missing, although",
    ),
}
