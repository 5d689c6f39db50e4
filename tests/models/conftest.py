"""Provides a small model folder that tests read, corrupt, and export."""

import json

import jax
import pytest

from support.broken_models import GQA
from trapo_jax.models import export_model, init_params, read_config


@pytest.fixture
def folder(tmp_path):
    """Returns a folder with a random model with grouped-query attention, an untied head, and an unusual RoPE base."""
    source = tmp_path / "source"
    source.mkdir()
    (source / "config.json").write_text(json.dumps(GQA))
    config = read_config(source)
    params = jax.device_get(init_params(config, seed=0))
    export_model(params, config, source=source, destination=tmp_path / "model")
    return tmp_path / "model"
