"""Tests the computation, training, and export of low-rank adapters."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AbstractMesh

from support.commands import TINY_MODEL, run_command
from support.short_run import JOB
from support.train_step import (
    CONFIG,
    build,
    one_device_mesh,
    ragged_groups,
    sgd_step,
)
from trapo_jax.config import LoraConfig, ModelConfig
from trapo_jax.distributed.sharding import param_shardings
from trapo_jax.methods import make_method
from trapo_jax.models import (
    Lora,
    PerLayerTransposed,
    abstract_params,
    apply_decoder,
    init_params,
    join_trained,
    load_params,
    read_config,
    split_trained,
    token_cost,
)
from trapo_jax.models.lora import SUFFIXES, A, B, merged
from trapo_jax.models.pretrained import read_decoder
from trapo_jax.runs.saved_model import load_checkpoint
from trapo_jax.training.state import init_state
from trapo_jax.types import UserError

TARGETS = ("qkv", "output", "gate_up", "down")
IDS = jnp.asarray([[3, 5, 2, 7, 7, 1]])
POSITIONS, SEGMENTS = jnp.arange(6)[None], jnp.ones((1, 6), jnp.int32)


def with_adapters(*targets):
    return dataclasses.replace(CONFIG, lora=Lora(rank=3, alpha=6.0, targets=targets))


def hidden(config, params):
    return np.asarray(apply_decoder(config, params, IDS, POSITIONS, SEGMENTS)[0])


def base_of(params):
    layers = {k: v for k, v in params["layers"].items() if not k.endswith(SUFFIXES)}
    return {**params, "layers": layers}


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_an_adapter_equals_its_merged_matrix(target):
    config = with_adapters(target)
    params = init_params(config, seed=0)
    base = base_of(params)
    np.testing.assert_array_equal(hidden(config, params), hidden(CONFIG, base))  # B is zero
    layers = params["layers"]
    b = jax.random.normal(jax.random.key(1), layers[target + B].shape)
    params = {**params, "layers": {**layers, target + B: b}}
    # The merged matrix is W + alpha / rank * A B, computed layer by layer.
    num_in = 3 if target == "output" else 1
    product = np.stack([np.tensordot(a, b, 1) for a, b in zip(layers[target + A], b, strict=True)])
    assert layers[target + A].shape[1:-1] == layers[target].shape[1 : 1 + num_in]
    whole = {**base, "layers": {**base["layers"], target: layers[target] + 6.0 / 3 * product}}
    np.testing.assert_allclose(hidden(config, params), hidden(CONFIG, whole), atol=2e-5)
    layout = PerLayerTransposed()
    transposed = hidden(
        dataclasses.replace(config, layout=layout),
        {**params, "layers": layout.convert_weights(params["layers"])},
    )
    np.testing.assert_allclose(transposed, hidden(config, params), atol=2e-5)
    assert np.abs(hidden(config, params) - hidden(CONFIG, base)).max() > 0.1
    ours = merged(*(np.asarray(x) for x in (layers[target], layers[target + A], b)), 6.0 / 3)
    np.testing.assert_allclose(ours, whole["layers"][target], atol=1e-5)


def test_a_rank_above_the_width_of_the_model_is_rejected():
    with pytest.raises(UserError, match=r"lora\.rank=100000: exceeds the model's width of 96"):
        read_decoder(TINY_MODEL, ModelConfig(), LoraConfig(rank=100_000))


@pytest.mark.slow
def test_trained_and_frozen_parameters_join_to_all_parameters():
    params = init_params(with_adapters("qkv", "down"), seed=0)
    trained, kept = split_trained(params)
    assert set(trained["layers"]) == {"qkv" + A, "qkv" + B, "down" + A, "down" + B}
    assert set(trained) == {"layers"}
    assert jax.tree.structure(kept) == jax.tree.structure(base_of(params))
    joined = join_trained(trained, kept)
    jax.tree.map(np.testing.assert_array_equal, joined, params)
    base = base_of(params)
    assert split_trained(base) == (base, {})


@pytest.mark.slow
def test_a_step_changes_only_the_adapters():
    config = with_adapters(*TARGETS)
    params = jax.device_get(init_params(config, seed=0))
    batch = build(*ragged_groups())
    difference, _, _ = sgd_step(make_method("trapo"), batch, params, config=config)
    adapters, rest = split_trained(difference)
    assert all(np.all(x == 0) for x in jax.tree.leaves(rest))
    # With B = 0, the gradient of A is 0, and the gradient of B is alpha / rank times A^T times the gradient of W.
    for name, x in adapters["layers"].items():
        assert np.any(x) == name.endswith(B), name
    gradient, _, _ = sgd_step(make_method("trapo"), batch, base_of(params))
    for name in TARGETS:
        a, by_b = params["layers"][name + A], adapters["layers"][name + B]
        by_w = np.asarray(gradient["layers"][name])
        num_layers, rank = by_b.shape[:2]
        expected = np.swapaxes(a.reshape(num_layers, -1, rank), 1, 2) @ by_w.reshape(
            num_layers, a[0, ..., 0].size, -1
        )
        expected = 6.0 / 3 * expected.reshape(by_b.shape)
        np.testing.assert_allclose(by_b, expected, atol=1e-5 * np.abs(expected).max())


def test_the_optimizer_has_no_state_for_frozen_parameters():
    params = init_params(with_adapters("down"), seed=0)
    state = init_state(params, optax.adam(1e-3), one_device_mesh(), num_optimizers=2)
    for opt_state in (state.opt_state, *state.other_opt_states):
        assert set(opt_state[0].mu["layers"]) == {"down" + A, "down" + B}


def test_adapters_are_sharded_like_their_matrices():
    shapes = abstract_params(with_adapters(*TARGETS))
    mesh = AbstractMesh((2, 2, 2), ("data", "fsdp", "tp"))
    found = {k: tuple(v.spec) for k, v in param_shardings(shapes, mesh)["layers"].items()}
    for name in TARGETS:
        num_in = 4 if name == "output" else 2  # including the layer axis
        assert found[name + A] == (*found[name][:num_in], None)
        assert found[name + B] == (None, None, *found[name][num_in:])


def test_flops_exclude_the_gradients_of_frozen_weights():
    every, adapters = token_cost(CONFIG), token_cost(with_adapters("qkv"))
    assert every.num_trained == every.num_params
    num_adapters = CONFIG.num_layers * 3 * (16 + 2 * 4 * 4)
    assert adapters.num_trained == num_adapters
    assert adapters.num_params == every.num_params + num_adapters
    assert every.update(7, 5) == 3 * every.forward(7, 5)
    assert adapters.update(7, 5) == 2 * 7 * (2 * adapters.num_params + num_adapters) + 15 * (
        adapters.per_pair
    )


@pytest.mark.slow
def test_a_run_trains_adapters_and_exports_merged_weights(tmp_path):
    run = tmp_path / "run"
    options = ["lora.rank=2", "lora.targets=[qkv,down]", "train.learning_rate=1e-2"]
    result = run_command(
        "trapo_jax.train", f"output_dir={run}", *JOB, *options, "train.num_steps=3"
    )
    assert result.returncode == 0, result.stderr
    last = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()][-2]
    assert last["policy/logprob_gap_max"] < 1e-4
    exported = tmp_path / "exported"
    result = run_command(
        "trapo_jax.export", "--checkpoint", run / "checkpoints/3", "--out", exported
    )
    assert result.returncode == 0, result.stderr
    config = read_config(TINY_MODEL)
    at_start, at_end = load_params(TINY_MODEL, config), load_params(exported, config)
    jax.tree.map(np.testing.assert_array_equal, at_end, load_params(run / "hf", config))
    changed = jax.tree.map(lambda a, b: bool(np.any(a != b)), at_start, at_end)
    assert {k for k, v in changed["layers"].items() if v} == {"qkv", "down"}
    assert not changed["embedding"]
    params, decoder, _ = load_checkpoint(run / "checkpoints" / "3")
    assert decoder.lora == Lora(rank=2, alpha=32.0, targets=("qkv", "down"))
    np.testing.assert_allclose(hidden(decoder, params), hidden(config, at_end), atol=1e-4)
