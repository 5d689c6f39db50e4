"""Tests the grid of a comparison: its runs and the errors for invalid options."""

from dataclasses import replace

import pytest

from support.commands import REPOSITORY
from support.comparisons import LEARNING_RATES, make_grid
from trapo_jax.comparison.grid import Trial, parse_sweep, parse_variant
from trapo_jax.types import MicroGroup, UserError


def test_all_methods_have_the_same_number_of_trials():
    trials = make_grid(
        "out", LEARNING_RATES, "trapo:learning_rate=2e-4", "trapo:expert_weight=0.5,2"
    ).trials()
    assert [t.setting for t in trials["grpo"]] == ["learning_rate=1e-4", "learning_rate=3e-4"]
    assert [t.values for t in trials["trapo"]] == [
        (("train.learning_rate", "2e-4"), ("method.expert_weight", "0.5")),
        (("train.learning_rate", "2e-4"), ("method.expert_weight", "2")),
    ]


def test_trials_are_drawn_at_random_from_all_settings(tmp_path):
    sweeps = ("learning_rate=1e-4,2e-4,4e-4", "decay_start=0.25,0.5,0.75,1")
    everything, drawn, again = (
        make_grid(tmp_path, *sweeps, trials=n).trials() for n in (None, 5, 5)
    )
    assert drawn == again
    for method, trials in drawn.items():
        assert len(everything[method]) == 12
        assert len(set(trials)) == 5
        assert trials[0] == Trial(method)
        assert set(trials[1:]) < set(everything[method])
    assert len({trial.values for trial in [*drawn["trapo"], *drawn["grpo"]]}) == 5


def test_a_sweep_may_have_any_number_of_settings_if_only_some_are_drawn(tmp_path):
    values = ",".join(map(str, range(1, 201)))
    fields = ("weight_decay", "max_grad_norm", "warmup_steps", "log_samples", "checkpoint.keep")
    sweeps = [f"{field}={values}" for field in fields]
    drawn = make_grid(tmp_path, *sweeps, trials=4).trials()
    assert {len(set(trials)) for trials in drawn.values()} == {4}
    with pytest.raises(UserError, match="has 320,000,000,000 settings; draw some of them with"):
        make_grid(tmp_path, *sweeps).trials()


def test_runs_differ_only_in_method_seed_and_swept_fields():
    grid = make_grid("out", LEARNING_RATES, overrides=(("data.num_train", "64"),))
    trials = [trial for method_trials in grid.trials().values() for trial in method_trials]
    tuning, final = (
        grid.tuning_runs(trials, grid.tuning_seeds),
        grid.final_runs([trials[1], trials[2]]),
    )
    assert len(tuning) == 4
    assert len(final) == 2 * 3
    assert {run.seed for run in tuning}.isdisjoint({run.seed for run in final})
    assert {run.config.evaluation.splits for run in tuning} == {("validation",)}
    assert {run.config.evaluation.splits for run in final} == {("validation", "test")}
    assert len({run.folder for run in (*tuning, *final)}) == 10
    assert {run.config.data.num_train for run in tuning} == {64}
    common = [run.config.model_dump() for run in (*tuning, *final)]
    for config in common:
        del config["method"]  # Methods have different hyperparameters.
        for section in ("train", "evaluation"):
            for leaf in ("learning_rate", "splits"):
                config[section].pop(leaf, None)
        del config["seed"], config["output_dir"]
    assert all(config == common[0] for config in common)
    assert [run.config.train.learning_rate for run in final[:2]] == [3e-4, 1e-4]
    assert final[0].config.train.num_steps == 20


@pytest.mark.parametrize(
    "name", ["smoke_cpu", "qwen2_5_math_1_5b_openr1", "qwen2_5_math_7b_openr1"]
)
def test_the_shipped_configs_work_in_a_comparison(name):
    file = REPOSITORY / "configs" / f"{name}.yaml"
    grid = make_grid("out", match="trained_tokens", budget=1e6)
    for run in replace(grid, config_file=file).final_runs([Trial("trapo"), Trial("sft")]):
        assert (run.config.train.budget_unit, run.config.train.budget) == ("trained_tokens", 1e6)
        assert run.config.evaluation.every == 0.2


@pytest.mark.parametrize(
    ("sweeps", "overrides", "message"),
    [
        ((LEARNING_RATES, "trapo:alpha=0.1"), (), "numbers of trials differ (trapo 1, grpo 2)"),
        (("seed=1,2",), (), "seed: set by the comparison (use --seeds)"),
        ((), (("output_dir", "x"),), "output_dir: set by the comparison (use --out)"),
        (("luffy:alpha=0.1",), (), "luffy not listed in --methods"),
        (
            ("evaluation.num_samples=4,16",),
            (),
            "evaluation.num_samples: must be the same for all runs",
        ),
    ],
)
def test_an_unfair_or_contradictory_grid_is_rejected(sweeps, overrides, message):
    with pytest.raises(UserError) as error:
        make_grid("out", *sweeps, overrides=overrides).trials()
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"methods": ("grpo", "grpo")}, "--methods: grpo listed more than once"),
        ({"methods": ("grpo", "")}, "--methods: an empty name"),
        (
            {"methods": ("grpo",), "variants": ("grpo: method.name=sft",)},
            "--variant: grpo is the name of a method",
        ),
        ({"trials": 5}, "--trials: there is nothing to tune; use --sweep"),
        ({"tuning_seeds": 3}, "--tuning-seeds: there is nothing to tune; use --sweep"),
    ],
)
def test_misleading_options_and_options_without_effect_are_rejected(options, message):
    with pytest.raises(UserError, match=message):
        make_grid("out", **options).trials()


def test_a_variant_is_a_method_with_custom_settings_and_its_own_name():
    grid = make_grid(
        "out",
        "late:learning_rate=1e-4,3e-4",
        "trapo:learning_rate=2e-4,5e-4",
        methods=("trapo", "late"),
        variants=["late: method.name=trapo method.alpha=0.5 'method.prefix_boundary=paragraph'"],
    )
    trials = grid.trials()
    assert [trial.setting for trial in trials["late"]] == [
        "learning_rate=1e-4",
        "learning_rate=3e-4",
    ]
    plain, late = grid.final_runs([trials["trapo"][0], trials["late"][1]])[:2]
    assert (late.config.method.name, late.config.method.hyperparameters["alpha"]) == ("trapo", 0.5)
    assert late.config.method.hyperparameters["prefix_boundary"] == "paragraph"
    assert late.config.train.learning_rate == 3e-4
    assert late.folder.parts[1:3] == ("late", "learning_rate=3e-4")
    assert (plain.config.method.name, plain.config.method.hyperparameters["alpha"]) == (
        "trapo",
        0.1,
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("method.name=trapo", "expected NAME: method.name=METHOD"),
        ("late: alpha=0.5", "expected NAME: method.name=METHOD"),
        ("la te: method.name=trapo", "expected NAME: method.name=METHOD"),
        ("late: method.name=trapo seed=1", "seed: set by the comparison (use --seeds)"),
        ("late: method.name=trapo data.seed=1", "data.seed: must be the same for all runs"),
        ("late: method.name=trapo model.path=x", "model.path: must be the same for all runs"),
        ("late: method.name=trapo alpha", "'alpha' is not FIELD=VALUE"),
        ("late: method.name='trapo", "No closing quotation"),
        ("late: method.name=trapo --config x.yaml", "--config applies to all runs"),
    ],
)
def test_a_malformed_variant_causes_a_one_line_error(text, message):
    with pytest.raises(UserError) as error:
        parse_variant(text)
    assert message in str(error.value)


def test_unlisted_and_repeated_variants_are_rejected():
    with pytest.raises(UserError, match="late not listed in --methods"):
        make_grid("out", variants=["late: method.name=trapo"]).trials()
    twice = ["late: method.name=trapo", "late: method.name=grpo"]
    with pytest.raises(UserError, match=r"a name is repeated \(late, late\)"):
        make_grid("out", methods=("late",), variants=twice).trials()


def test_a_sweep_over_micro_groups_has_nested_lists_as_values():
    grid = make_grid(
        "out", "micro_groups=[[8,0,-1]],[[7,0,-1],[1,1,0.5]]", methods=("trapo",), seeds=1
    )
    runs = grid.final_runs(grid.trials()["trapo"])
    assert [run.config.method.make().micro_groups[-1] for run in runs] == [
        MicroGroup(8, 0.0, -1.0),
        MicroGroup(1, 1.0, 0.5),
    ]
    assert len({run.folder for run in runs}) == 2


@pytest.mark.parametrize("text", ["learning_rate", "learning_rate=", "a b=1", "x=1,1", "x=1,,2"])
def test_a_malformed_sweep_causes_a_one_line_error(text):
    with pytest.raises(UserError, match=r"^--sweep"):
        parse_sweep(text)


def test_a_budget_in_steps_replaces_the_budget_in_the_config(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("train: {budget_unit: trained_tokens, budget: 1000}\n")
    (run,) = replace(make_grid("out", seeds=1), config_file=file).final_runs([Trial("trapo")])
    assert (run.config.train.num_steps, run.config.train.budget) == (20, None)
