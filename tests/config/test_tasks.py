"""Tests the defaults of tasks, lengths that are derived from the data, and the default run directory of a config."""

import pytest

import trapo_jax
from trapo_jax.config import (
    Config,
    EvaluateConfig,
    load_config,
    load_evaluate_config,
    load_train_config,
)
from trapo_jax.config.tasks import TASKS
from trapo_jax.types import UserError

FILES = {
    "data.train_files": ["my/algebra.jsonl"],
    "model.path": "a/model",
    "rewards.functions": ["math"],
}


def files_config(**overrides):
    return load_train_config(overrides={**FILES, **overrides})


def test_the_defaults_of_tasks_set_only_existing_fields():
    for sections in TASKS.values():
        for section, fields in sections.items():
            known = type(Config.model_fields[section].default).model_fields
            assert fields.keys() <= known.keys()


def test_the_built_in_task_has_its_own_defaults():
    config = Config()
    assert (config.data.source, config.model.path) == ("card_shuffles", "card_shuffles_tiny")
    assert (config.data.max_prompt_length, config.sampling.max_completion_length) == (16, 64)
    assert config.rewards.functions == ("card_shuffles",)
    assert config.train.learning_rate == 2e-4
    assert (config.evaluation.temperature, config.evaluation.num_samples) == (1.0, 8)
    evaluation = EvaluateConfig(model={"path": "card_shuffles_tiny"}).evaluation
    assert (evaluation.temperature, evaluation.num_samples) == (1.0, 8)


def test_files_have_the_defaults_of_a_language_model():
    config = files_config()
    assert config.data.source == "files"
    assert (config.data.max_prompt_length, config.sampling.max_completion_length) == (None, None)
    assert (config.train.learning_rate, config.train.decay_start) == (5e-6, 1.0)
    assert config.evaluation.temperature == 0.6


def test_given_values_take_precedence_over_the_defaults_of_a_task():
    config = load_train_config(overrides={"data.max_prompt_length": 20, "train.adam_b2": 0.9})
    assert (config.data.max_prompt_length, config.train.adam_b2) == (20, 0.9)
    assert Config(data={"max_prompt_length": 20}) == load_train_config(
        overrides={"data.max_prompt_length": 20}
    )


@pytest.mark.parametrize("missing", ["model.path", "rewards.functions"])
def test_files_have_no_default_model_and_no_default_grader(missing):
    with pytest.raises(UserError, match=rf"{missing}: not set"):
        load_train_config(overrides={k: v for k, v in FILES.items() if k != missing})


def test_setting_test_files_makes_files_the_data_source():
    given = [("data.test_files", "x.jsonl"), ("model.path", "a/model")]
    with pytest.raises(UserError, match=r"rewards\.functions: not set"):
        load_config(EvaluateConfig, None, given)
    config = load_config(EvaluateConfig, None, [*given, ("rewards.functions", "math")])
    assert config.data.source == "files"


def test_lengths_that_are_derived_from_the_data_are_unknown_until_the_data_is_read():
    with pytest.raises(
        UserError,
        match=r"data\.max_prompt_length=null: this length is derived from the data",
    ):
        _ = files_config().longest_rollout_len
    config = files_config().with_lengths(prompt=48, completion=256)
    assert (config.data.prompt_len, config.sampling.completion_len) == (48, 256)
    assert config.longest_rollout_len == 304


def test_given_lengths_are_kept():
    config = files_config(**{"data.max_prompt_length": 100})
    fitted = config.with_lengths(prompt=48, completion=256)
    assert (fitted.data.prompt_len, fitted.sampling.completion_len) == (100, 256)
    with pytest.raises(UserError, match=r"^train\.row_length=200: less than"):
        files_config(**{"train.row_length": 200}).with_lengths(prompt=48, completion=256)


def test_the_run_directory_depends_on_task_method_and_changed_fields():
    folder = lambda **overrides: str(load_train_config(overrides=overrides).run_folder)
    assert folder() == "runs/card_shuffles_trapo"
    assert folder(**{"method.name": "grpo"}) == "runs/card_shuffles_grpo"
    changed = folder(seed=1)
    assert changed.startswith("runs/card_shuffles_trapo-")
    assert len({folder(), changed, folder(seed=2), folder(**{"train.learning_rate": 1e-3})}) == 4
    assert changed == folder(seed=1)
    assert folder(output_dir="mine") == "mine"


def test_fields_that_may_change_on_resuming_do_not_change_the_run_directory():
    folder = lambda **overrides: load_train_config(overrides=overrides).run_folder
    assert folder(**{"sampling.num_slots": 7, "checkpoint.every": 3, "log_samples": 0}) == folder()


def test_the_run_directory_is_named_after_the_first_training_file():
    name = files_config().run_folder.name
    assert name.startswith("algebra_trapo-")
    fitted = files_config().with_lengths(prompt=48, completion=256)
    assert fitted.run_folder == files_config().run_folder


def test_the_folder_of_an_evaluation_depends_on_the_model_and_on_changed_fields():
    config = lambda *overrides: load_evaluate_config(None, overrides)
    assert str(config().run_folder) == "evaluations/card_shuffles_tiny"
    folders = {config(("evaluation.temperature", t)).run_folder for t in ("0.3", "0.5", "0.5")}
    assert len(folders) == 2
    assert all(folder.name.startswith("card_shuffles_tiny-") for folder in folders)
    fitted = config(("seed", "1")).with_lengths(prompt=48, completion=256)
    assert fitted.run_folder == config(("seed", "1")).run_folder


def test_defaults_are_not_changed_by_overrides():
    defaults = {"data": {"num_test": 5}}
    load_config(Config, None, [("data.num_test", "7"), ("data.seed", "3")], defaults=defaults)
    assert defaults == {"data": {"num_test": 5}}


def test_load_config_is_public(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("seed: 3\n")
    config = trapo_jax.load_config(file, {"train.num_steps": 7})
    assert (config.seed, config.train.num_steps) == (3, 7)
    assert trapo_jax.load_config() == Config()
