"""Tests that every comparison in docs/protocol.md is valid and tunes all methods equally."""

import math
import re

import pytest

import run_benchmarks
from support.commands import REPOSITORY
from trapo_jax.compare import make_grid, parse

STUDIES = run_benchmarks.load_studies()
COMPARISONS = [(study, name) for study, found in STUDIES.items() for name in found]


def grid_of(study, name, *more):
    return make_grid(parse([*STUDIES[study][name], *more]))


@pytest.mark.slow
@pytest.mark.parametrize(("study", "name"), COMPARISONS)
def test_all_trials_are_valid_and_all_methods_have_the_same_number_of_trials(study, name):
    # The built-in model suffices for counting trials. The base models of some studies would have to be trained first.
    built_in = ["model.path=card_shuffles_tiny", "data.source=card_shuffles"]
    grid = grid_of(study, name, *built_in)
    trials = grid.trials()
    for found in trials.values():
        assert grid.tuning_runs(found, [0])  # loads the configs
    (num_trials,) = {len(found) for found in trials.values()}
    assert num_trials in (8, 16)
    everything = grid_of(study, name, *built_in, "--trials", "1000").trials()
    assert {len(found) for found in everything.values()} == {144}


def test_the_protocol_states_the_number_of_runs():
    text = (REPOSITORY / "docs" / "protocol.md").read_text()
    for study in STUDIES:
        name, *_ = STUDIES[study]
        grid = grid_of(study, name)
        trials = len(next(iter(grid.trials().values())))
        per_method = trials + math.ceil(trials / 4) * (grid.num_tuning_seeds - 1) + grid.num_seeds
        count = per_method * len(grid.methods)
        assert re.search(rf"run_benchmarks.py {study} .*\b{count} runs", text), count


def test_studies_share_records_only_under_the_same_conditions():
    arguments = {key: STUDIES[key[0]][key[1]] for key in COMPARISONS}
    main, ablation = arguments["main", "default"], arguments["ablation", "default"]
    records = [found[found.index("--records") + 1] for found in arguments.values()]
    assert len(set(records)) == len(records) - 1  # main and ablation share records
    assert main[main.index("--budget") :][:2] == ablation[ablation.index("--budget") :][:2]


def test_a_dry_run_prints_commands(capsys):
    assert run_benchmarks.main(["ablation", "--dry-run"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("python -m trapo_jax.compare --methods micro_group_grpo,")
