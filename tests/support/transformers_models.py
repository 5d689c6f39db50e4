"""Creates small random transformers models for parity tests."""

import numpy as np
import pytest

from trapo_jax.models import apply_decoder, load_params, read_config, unembedding

SMALL = {
    "vocab_size": 50,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rope_theta": 5000.0,
}


def needs_torch():
    return pytest.importorskip("torch", reason="torch is not installed (parity with transformers)")


def make_theirs(kind, changes, folder):
    """Saves and returns a random transformers model. Noise is added to all parameters, so none is exactly 0 or 1."""
    torch = needs_torch()
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**SMALL, **changes}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    model.eval().save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def their_logits(model, token_ids, mask=None):
    import torch

    mask = None if mask is None else torch.tensor(mask)
    with torch.no_grad():
        return model(torch.tensor(token_ids), attention_mask=mask).logits.numpy()


def our_logits(folder, token_ids):
    """Returns the logits of whole rows, computed by our decoder with a folder's weights."""
    config = read_config(folder)
    params = load_params(folder, config)
    positions = np.broadcast_to(np.arange(token_ids.shape[1]), token_ids.shape)
    hidden = apply_decoder(config, params, token_ids, positions, np.ones_like(token_ids))[0]
    return np.asarray(hidden @ unembedding(params))
