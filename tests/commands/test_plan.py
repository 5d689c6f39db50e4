"""Tests `trapo_jax.plan`, which compiles the programs of a run for devices that are not available."""

import importlib.util
import json
import shutil

import jax
import pytest

from support.commands import REPOSITORY, run_process
from trapo_jax.plan import main
from trapo_jax.planning.topology import find_topology
from trapo_jax.types import UserError

ARCHITECTURE = REPOSITORY / "configs" / "architectures" / "qwen2_5_math_7b"
SMALL = {
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 2048,
}


@pytest.fixture(scope="module")
def small_model(tmp_path_factory):
    """Returns the folder of a smaller model with the 7B model's head width of 128, which the TPU kernel requires."""
    folder = tmp_path_factory.mktemp("small")
    config = json.loads((ARCHITECTURE / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **SMALL}))
    return folder


def plan(model, topology, *arguments):
    # A separate process is needed because the number of simulated host devices in a process is fixed.
    result = run_process(
        "trapo_jax.plan",
        *("--config", "qwen2_5_math_7b_openr1", "--json"),
        *("--topology", topology, f"model.path={model}"),
        *("data.max_prompt_length=256", "sampling.max_completion_length=768"),
        *("train.problems_per_step=4", "sampling.num_slots=4", "sampling.prefill_tokens=512"),
        *arguments,
    )
    return result, (json.loads(result.stdout)["plans"][0] if result.stdout else None)


@pytest.mark.slow
def test_a_plan_for_simulated_host_devices(small_model):
    result, found = plan(small_model, "cpu:4", "mesh.tp=2")
    assert result.returncode == 0, result.stderr
    assert found["mesh"] == {"data": 1, "fsdp": 2, "tp": 2}
    layer = 512 * 8 * 128 + 8 * 128 + 4 * 128 * 512 + 3 * 512 * 1024 + 2 * 512
    num_params = 3 * layer + 2 * 2048 * 512 + 512
    assert found["num_params"] == num_params
    step = found["programs"]["train step"]
    # Parameters and two moments in float32, sharded over four devices (except norms), plus the batch.
    assert step["arguments"] == pytest.approx(12 * num_params / 4, rel=0.05)
    multiplied = num_params - 2048 * 512  # all parameters except the input embedding
    tokens = 4 * 8 * 1024
    pairs = 3 * tokens * 1025 / 2 * 4 * 128
    assert step["useful_flops"] == pytest.approx((6 * multiplied * tokens + 12 * pairs) / 4)
    # Full rematerialization adds a forward pass, and attention computes full score matrices instead of triangles.
    assert 8 / 6 * 0.9 < step["flops"] / step["useful_flops"] < 8 / 6 * 1.6
    assert step["traffic"]["collectives"]["all-gather"] > 0
    assert found["fits"] is None  # The memory size of simulated host devices is unknown.


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed (extra tpu)"
)
def test_a_plan_for_a_tpu_topology(small_model):
    result, found = plan(small_model, "v5e:2x2")
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("\n") == 1
    assert found["fits"] is True
    assert found["attention"] == "splash"
    step = found["programs"]["train step"]
    scores = 4 * 1024 * 1024 * 4  # bytes of one row's attention scores in float32
    # If attention scores were stored, three layers would need 12 such arrays.
    assert step["temporaries"] < 16 * scores + 2**25
    # All parameters are gathered in bfloat16, in each of three passes over eight micro-batches.
    gathered = 2 * found["num_params"] * 8 * 3
    moved = sum(step["traffic"]["collectives"].values())
    assert 0.5 * gathered < moved < 2 * gathered
    assert 0 < step["mfu_bound"] < 1
    assert set(step["bounds_secs"]) == {"compute", "memory", "interconnect"}


@pytest.mark.parametrize("name", ["v5e", "v9:2x2", "v5e:2xa", "v5p:", "gpu:8"])
def test_an_unknown_topology_is_rejected(name):
    with pytest.raises(UserError, match=f"--topology {name}: expected v5e, v5p, v6e or cpu"):
        find_topology(name)


def test_an_absurd_number_of_devices_is_rejected():
    with pytest.raises(UserError, match="--topology cpu:0: every number in the shape must be at"):
        find_topology("cpu:0")
    with pytest.raises(UserError, match="--topology cpu:1000000000: more than 16,384 devices"):
        find_topology("cpu:1000000000")


@pytest.mark.slow
def test_a_mesh_that_does_not_divide_the_devices_causes_a_one_line_error(small_model):
    result, _ = plan(small_model, "cpu:4", "mesh.tp=3")
    assert result.returncode == 2
    assert "mesh.tp=3" in result.stderr.splitlines()[-1]
    assert "Traceback" not in result.stderr


def test_the_architectures_of_the_shipped_configs_can_be_read(tmp_path):
    from trapo_jax.config import Config, load_config
    from trapo_jax.models import read_config

    for config in sorted((REPOSITORY / "configs").glob("qwen*.yaml")):
        name = config.stem.removesuffix("_openr1")
        folder = tmp_path / name
        shutil.copytree(REPOSITORY / "configs" / "architectures" / name, folder)
        assert load_config(Config, config, []).row_len == 9216
        assert read_config(folder).num_layers in (28, 36)


def test_a_plan_does_not_fit_if_the_compiler_runs_out_of_memory(monkeypatch, capsys):
    message = "RESOURCE_EXHAUSTED: Ran out of memory on HBM, 53.42G exceeds 31.25G"

    def compile_program(*_, **__):
        raise jax.errors.JaxRuntimeError(message)

    monkeypatch.setattr(jax.stages.Lowered, "compile", compile_program)
    assert main(["--topology", f"cpu:{jax.device_count()}", "--json"]) == 1
    output = capsys.readouterr()
    (plan,) = json.loads(output.out)["plans"]
    assert plan["fits"] is False
    assert plan["reason"] == f"train step: {message}"
    assert "does not fit; try more devices along mesh.fsdp" in output.err
