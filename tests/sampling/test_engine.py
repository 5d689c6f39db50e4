"""Tests how an engine is chosen by name or import path, and the statistics of engines."""

import sys

import pytest

from trapo_jax.sampling.engine import EngineSpec, EngineStats, RolloutEngine, make_engine
from trapo_jax.sampling.jax_engine import JaxEngine
from trapo_jax.types import UserError


@pytest.fixture
def spec(decoder):
    return EngineSpec(
        decoder=decoder,
        num_slots=2,
        max_prompt_length=16,
        max_completion_length=16,
        segment_len=4,
        num_contexts=2,
        prefill_tokens=16,
        eos_ids=[1],
        seed=0,
    )


@pytest.fixture
def user_module(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "user_engines.py").write_text(
        "class Engine:\n"
        "    def __init__(self, spec): self.spec = spec\n"
        "    def __getattr__(self, name): return None\n"
        "class Incomplete:\n"
        "    def __init__(self, spec): pass\n"
        "    def submit(self, requests, *, step, params): pass\n"
        "    def step(self): return []\n"
        "    is_busy, num_idle_slots = False, 0\n"
        "NUMBER = 3\n"
        "def unreachable(spec): raise ConnectionError('no server at localhost:8000\\nretry')\n"
    )
    yield
    sys.modules.pop("user_engines", None)


def test_the_built_in_engine_has_a_name(spec):
    engine: RolloutEngine = make_engine("jax", spec)
    assert isinstance(engine, JaxEngine)
    assert engine.num_idle_slots == 2


def test_an_engine_with_an_import_path_receives_the_spec(spec, user_module):
    engine = make_engine("user_engines:Engine", spec)
    assert type(engine).__name__ == "Engine"
    assert engine.spec is spec


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("vllm9", "choose 'jax', or an import path of the form package.module:name"),
        ("no_such_module:Engine", "no module 'no_such_module'"),
        ("user_engines:Other", "does not define 'Other'"),
        (
            "user_engines:NUMBER",
            "an object of type int is not callable; pass a callable that takes an EngineSpec",
        ),
        (
            "user_engines:unreachable",
            "cannot be built (ConnectionError: no server at localhost:8000",
        ),
        (
            "user_engines:Incomplete",
            "Incomplete does not implement update_weights, release, resume, stats, memory of RolloutEngine",
        ),
    ],
)
def test_other_names_cause_a_one_line_error(spec, user_module, name, message):
    with pytest.raises(UserError) as caught:
        make_engine(name, spec)
    line = str(caught.value)
    assert line.startswith(f"sampling.engine={name}: ")
    assert message in line
    assert "\n" not in line


def test_stats_are_added_and_subtracted_field_by_field():
    first, second = EngineStats(1, 2, 3, 4), EngineStats(10, 20, 30, 40)
    assert second - first == EngineStats(9, 18, 27, 36)
    assert sum([first, second], EngineStats()) == EngineStats(11, 22, 33, 44)
    assert first.slot_utilization == 0.5
    assert EngineStats().slot_utilization == 0.0


def test_memory_includes_slots_and_contexts(decoder, spec):
    positions = (spec.num_slots + spec.num_contexts) * (16 + 16)
    per_position = 2 * decoder.num_layers * decoder.num_kv_heads * decoder.head_dim * 4
    assert make_engine("jax", spec).memory().kv_cache_bytes == positions * per_position
