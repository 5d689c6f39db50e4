"""Configuration: the defaults are the shipped file; every mistake is one clear line."""

from pathlib import Path

import pytest
import yaml

from trapo_jax.config import (
    Config,
    help_text,
    list_fields,
    load_config,
    parse_command_line,
    read_yaml,
)
from trapo_jax.types import UserError

from conftest import REPOSITORY, run_command  # isort: skip


def load(*arguments):
    return load_config(*parse_command_line(arguments))


def test_defaults_are_the_shipped_file():
    file = REPOSITORY / "configs" / "smoke_cpu.yaml"
    assert load_config(file, []) == Config()
    # ... and every field stands in it, so that it can be read and copied.
    assert yaml.safe_load(file.read_text()) == yaml.safe_load(Config().to_yaml())


def test_three_ways_to_override():
    for arguments in (
        ["train.num_steps=7"],
        ["--train.num_steps", "7"],
        ["--train.num_steps=7"],
    ):
        assert load(*arguments).train.num_steps == 7


def test_overrides_win_over_the_file(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("seed: 3\ntrain: {num_steps: 5, warmup_steps: 1}\n")
    config = load("--config", str(file), "train.num_steps=9")
    assert (config.seed, config.train.num_steps, config.train.warmup_steps) == (3, 9, 1)


def test_scientific_notation_is_a_number(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("train:\n  learning_rate: 1e-6\n")
    assert load("--config", str(file)).train.learning_rate == 1e-6
    assert load("train.learning_rate=2.5E-5").train.learning_rate == 2.5e-5


def test_resolved_yaml_loads_again(tmp_path):
    config = load("method.name=grpo", "method.expert_weight=0.25", "mesh.tp=1")
    file = tmp_path / "config.yaml"
    file.write_text(config.to_yaml())
    assert load_config(file, []) == config


def test_help_lists_every_field_with_type_default_and_sentence():
    text = help_text("train", "about")
    fields = list(list_fields())
    assert len(fields) > 35
    for name, kind, default, sentence in fields:
        assert f"  {name}  ({kind}, {default})\n      {sentence}" in text
        assert sentence.endswith("."), name


MISTAKES = [
    (["train.num_step=3"], "train.num_step: unknown field; did you mean train.num_steps?"),
    (["trian.num_steps=3"], "trian: unknown field; did you mean train"),
    (["learning_rate=1"], "did you mean train.learning_rate?"),
    (["zzz=1"], "zzz: unknown field; --help lists all fields"),
    (["train.num_steps=many"], 'train.num_steps="many": input should be a valid integer'),
    (["train.num_steps=1.5"], "train.num_steps=1.5: input should be a valid integer"),
    (["train.num_steps=true"], "train.num_steps=true: input should be a valid integer"),
    (["train.num_steps=0"], "train.num_steps=0: input should be greater than or equal to 1"),
    (["method.alpha=0"], "method.alpha=0: input should be greater than 0"),
    (["method.alpha=1.5"], "method.alpha=1.5: input should be less than or equal to 1"),
    (["method.name=ppo"], "method.name=\"ppo\": input should be 'trapo', 'grpo', 'sft', "),
    (["method.constants=3"], "method.constants=3: "),
    (["train.budget_unit=flops"], "train.budget=null: train.budget_unit=flops needs a number"),
    (["train.budget=0"], "train.budget=0: input should be greater than 0"),
    (["train.learning_rate=-1e-4"], "train.learning_rate=-0.0001: input should be greater than 0"),
    (["train.learning_rate=.inf"], "train.learning_rate"),
    (["seed=-1"], "seed=-1: input should be greater than or equal to 0"),
    (["output_dir="], "output_dir=null: input should be a valid string"),
    (["train=3"], "train=3: "),
    (["train.num_steps.x=3"], "train.num_steps={"),
    (["data.num_train=4"], "more than data.num_train=4"),
    (["--seed"], "--seed has no value"),
    (["seed"], "'seed' is not FIELD=VALUE"),
    (["configs/smoke_cpu.yaml"], "did you mean --config configs/smoke_cpu.yaml?"),
    (["--config", "missing.yaml"], "missing.yaml: cannot be read (No such file or directory)"),
    (["=3"], "names no field"),
    (["seed=[1"], "'[1' is not a YAML value"),
]


@pytest.mark.parametrize(("arguments", "message"), MISTAKES)
def test_mistaken_command_line_is_one_clear_line(arguments, message):
    with pytest.raises(UserError) as caught:
        load(*arguments)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


BAD_FILES = [
    ("seed: 1\ntrain: [3\n", "line 3: not valid YAML"),
    ("seed: 1\nseed: 2\n", "line 2: not valid YAML (duplicate key 'seed')"),
    ("- 1\n", "expected fields such as 'seed: 0', found [1]"),
    ("", "expected fields such as 'seed: 0', found null"),
    ("train:\n  num_step: 3\n", "train.num_step: unknown field; did you mean train.num_steps?"),
    ("seed: '3'\n", 'seed="3": input should be a valid integer'),
]


@pytest.mark.parametrize(("text", "message"), BAD_FILES)
def test_mistaken_file_is_one_clear_line_with_its_name(tmp_path, text, message):
    file = tmp_path / "c.yaml"
    file.write_text(text)
    with pytest.raises(UserError) as caught:
        load("--config", str(file))
    assert str(caught.value).startswith(str(file))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_not_utf8_is_named(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_bytes(b"seed: \xff")
    with pytest.raises(UserError, match="not UTF-8 text"):
        read_yaml(file)


def test_several_mistakes_are_several_lines():
    with pytest.raises(UserError) as caught:
        load("train.num_step=3", "seed=-1")
    assert len(str(caught.value).splitlines()) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train.num_step=3"], "did you mean train.num_steps?"),
        (["model.path=/nowhere"], "model.path='/nowhere': no such folder"),
        (["data.max_prompt_length=3"], "raise data.max_prompt_length"),
        (["mesh.tp=3"], "is not the number of devices"),
    ],
)
def test_command_exits_with_2_and_creates_nothing(tmp_path, arguments, message):
    result = run_command("trapo_jax.train", f"output_dir={tmp_path}/run", *arguments)
    assert result.returncode == 2
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert not Path(tmp_path / "run").exists()


def test_a_file_in_the_way_and_a_foreign_folder_are_refused(tmp_path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "thesis.txt").write_text("mine")
    for name, message in (("file", "a file is in the way"), ("folder", "not empty and not a run")):
        result = run_command("trapo_jax.train", f"output_dir={tmp_path / name}")
        assert (result.returncode, message in result.stderr) == (2, True)
    assert (tmp_path / "folder" / "thesis.txt").read_text() == "mine"


def test_help_command():
    result = run_command("trapo_jax.train", "--help")
    assert result.returncode == 0
    assert "train.learning_rate  (float, 0.0002)" in result.stdout
