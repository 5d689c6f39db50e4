"""Tests the commands of docs/paper_tables.md without training: each command is parsed, and its runs are planned."""

import re
import shlex
import sys

import pytest

import prepare_benchmarks
import prepare_openr1
from support.commands import REPOSITORY
from trapo_jax.compare import make_grid, parse
from trapo_jax.config import Config, load_config, load_evaluate_config, parse_command_line

TEXT = (REPOSITORY / "docs" / "paper_tables.md").read_text()
COMMANDS = re.findall(r"^    ((?:python|hf) (?:.*\\\n)*.*)$", TEXT, flags=re.MULTILINE)
SIZES = {"1_5b": "models/qwen2_5_math_1_5b", "7b": "models/qwen2_5_math_7b"}


def arguments_of(program, size):
    """Returns the arguments of each command that runs a program, split as a shell would split them."""
    commands = [command for command in COMMANDS if command.startswith(program)]
    texts = [command.replace("${SIZE}", size).replace("\\\n", " ") for command in commands]
    return [shlex.split(text)[len(program.split()) :] for text in texts]


def grids_of(size):
    """Returns the grid of each comparison, keyed by the name of its table."""
    grids = {}
    for arguments in arguments_of("python -m trapo_jax.compare", size):
        args = parse(arguments)
        grids[args.out.name.removesuffix(f"_{size}")] = make_grid(args)
    return grids


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch):
    monkeypatch.chdir(REPOSITORY)


@pytest.mark.slow
@pytest.mark.parametrize("size", SIZES)
def test_every_comparison_plans_its_runs(size):
    grids = grids_of(size)
    assert list(grids) == ["table1", "table2", "alpha", "ratios", "thresholds"]
    folders = set()
    for grid in grids.values():
        trials = [trial for trials in grid.trials().values() for trial in trials]
        runs = grid.final_runs(trials)
        assert len(runs) == 10 * len(grid.methods)
        folders |= {run.folder for run in runs}
        for run in runs:
            scoring = run.config.evaluation
            samples = {x: scoring.num_samples_of(x) for x in prepare_benchmarks.BENCHMARKS}
            assert samples.pop("aime24") == samples.pop("aime25") == samples.pop("amc") == 32
            assert set(samples.values()) == {1}
            assert scoring.temperature == 0.6
            assert scoring.splits == ("validation", "test")
            assert run.config.model.path == SIZES[size]
            assert run.config.data.test_files == ("data/benchmarks.parquet",)
            assert run.config.train.num_steps == 500
        made = {method: grid.final_runs(trials)[i] for i, method in enumerate(grid.methods)}
        hyperparameters = [
            (run.config.method.name, run.config.method.hyperparameters) for run in made.values()
        ]
        assert all(x not in hyperparameters[:i] for i, x in enumerate(hyperparameters))
    assert len(folders) == 10 * (6 + 4 + 7 + 6 + 5)


def method_of(grid, name):
    """Returns the config section of a method or variant."""
    (run,) = [
        run
        for run in grid.final_runs([trial for x in grid.trials().values() for trial in x])
        if (run.trial.method, run.seed) == (name, 0)
    ]
    return run.config.method


@pytest.mark.slow
def test_the_methods_are_those_of_the_tables():
    grids = grids_of("7b")
    assert grids["table1"].methods == (
        *("sft", "grpo", "sft_then_grpo", "relift", "luffy", "trapo"),
    )
    assert grids["table2"].methods == (
        *("micro_group_grpo", "micro_group_sft", "micro_group_luffy", "trapo"),
    )
    alphas = {name: method_of(grids["alpha"], name) for name in grids["alpha"].methods}
    assert [method.hyperparameters["alpha"] for method in alphas.values()] == [
        *(1e-6, 0.01, 0.05, 0.1, 0.2, 0.5, 1.0),
    ]
    # The variant with the default alpha is the same method as `trapo` in table1.
    of_table = method_of(grids["table1"], "trapo")
    assert alphas["alpha_0_1"] == of_table


@pytest.mark.slow
@pytest.mark.parametrize("table", ["ratios", "thresholds"])
def test_the_guidance_ablations_have_groups_of_eight_and_contain_the_settings_of_the_paper(table):
    grid = grids_of("7b")[table]
    of_paper = method_of(grids_of("7b")["table1"], "trapo").make()
    methods = {name: method_of(grid, name).make() for name in grid.methods}
    assert {method.group_size for method in methods.values()} == {8}
    assert methods["paper"].micro_groups == of_paper.micro_groups
    tables = [method.micro_groups for method in methods.values()]
    assert len(set(tables)) == len(tables)


@pytest.mark.parametrize("size", SIZES)
def test_a_run_on_several_hosts_is_the_one_that_the_comparison_looks_for(size):
    (arguments,) = arguments_of("python -m trapo_jax.train", size)
    config = load_config(Config, *parse_command_line(arguments))
    grid = grids_of(size)["table1"]
    trials = [trial for trials in grid.trials().values() for trial in trials]
    (planned,) = [
        run.config
        for run in grid.final_runs(trials)
        if (run.trial.method, run.seed) == ("trapo", 0)
    ]
    assert config == planned


def test_a_run_is_evaluated_on_other_benchmarks_with_the_settings_of_its_own_config(
    tmp_path, monkeypatch
):
    (arguments,) = arguments_of("python -m trapo_jax.evaluate", "7b")
    file, overrides = parse_command_line(arguments)
    assert file is None
    folder = dict(overrides)["model.path"]
    (run,) = [
        run
        for run in grids_of("7b")["table1"].final_runs(grids_of("7b")["table1"].trials()["trapo"])
        if run.seed == 0
    ]
    assert str(run.folder) == folder
    monkeypatch.chdir(tmp_path)
    run.folder.mkdir(parents=True)
    (run.folder / "config.yaml").write_text(run.config.to_yaml())
    config = load_evaluate_config(None, overrides)
    assert config.data.test_files == ("data/general.parquet",)
    assert (config.data.template, config.rewards.functions) == ("qwen_math", ("math",))
    assert config.evaluation.temperature == 0.6
    assert config.evaluation.num_samples_of("mmlu_pro") == 1
    assert config.sampling.max_completion_length == 8192


def test_the_data_tools_accept_the_options_on_the_page(monkeypatch):
    seen = []
    monkeypatch.setattr(
        prepare_benchmarks,
        "prepare",
        lambda out, names, data: seen.append((out.name, names)) or {"": 1},
    )
    monkeypatch.setattr(
        prepare_openr1, "prepare", lambda out, *rest: seen.append((out.name, None)) or {"": 1}
    )
    for tool in (prepare_openr1, prepare_benchmarks):
        for arguments in arguments_of(f"python tools/{tool.__name__}.py", "7b"):
            monkeypatch.setattr(sys, "argv", ["tool", *arguments])
            assert tool.main() == 0
    assert seen == [
        ("openr1_46k_two_experts.parquet", None),
        ("benchmarks.parquet", ["aime24", "amc", "math500", "minerva", "olympiadbench"]),
        ("general.parquet", ["arc_c", "mmlu_pro"]),
    ]


def test_every_command_on_the_page_is_tested():
    tested = [
        *("python -m trapo_jax.compare", "python -m trapo_jax.train"),
        *("python -m trapo_jax.evaluate", "python tools/", "hf download Qwen/Qwen2.5-Math-7B"),
    ]
    assert all(command.startswith(tuple(tested)) for command in COMMANDS)
    assert len(COMMANDS) == 5 + 1 + 1 + 3 + 1
