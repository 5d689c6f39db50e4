"""Comparisons: which runs there are, doing them, and what the report says of results that are made up here."""

import csv
import itertools
import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from support.commands import REPOSITORY
from trapo_jax import compare
from trapo_jax.comparison import (
    Comparison,
    Failure,
    Grid,
    Image,
    Interrupted,
    Trial,
    describe,
    do_runs,
    grid,
    pick_trials,
    plot_curves,
    read_result,
    read_sweep,
    read_variant,
    to_html,
    to_markdown,
    write_csv,
)
from trapo_jax.comparison.curves import common_grid
from trapo_jax.comparison.report import find_differences, find_warnings, score_rows
from trapo_jax.comparison.results import UNITS, progress
from trapo_jax.types import UserError

NUM_PROBLEMS, NUM_SAMPLES = 40, 4
LEARNING_RATES = "learning_rate=1e-4,3e-4"


def make_grid(out, *sweeps, methods=("trapo", "grpo"), seeds=3, variants=(), **options):
    options = {"match": "steps", "budget": 20.0, "overrides": (), **options}
    return Grid(
        config_file=None,
        methods=methods,
        sweeps=tuple(map(read_sweep, sweeps)),
        variants=tuple(map(read_variant, variants)),
        num_seeds=seeds,
        num_tuning_seeds=1,
        runs=Path(out),
        **options,
    )


def test_every_method_has_as_many_trials_of_its_own_fields():
    trials = make_grid(
        "out", LEARNING_RATES, "trapo:learning_rate=2e-4", "trapo:expert_weight=0.5,2"
    ).trials()
    assert [t.setting for t in trials["grpo"]] == ["learning_rate=1e-4", "learning_rate=3e-4"]
    assert [t.values for t in trials["trapo"]] == [
        (("train.learning_rate", "2e-4"), ("method.expert_weight", "0.5")),
        (("train.learning_rate", "2e-4"), ("method.expert_weight", "2")),
    ]


def test_runs_differ_in_method_seed_and_swept_fields_alone():
    asked = make_grid("out", LEARNING_RATES, overrides=(("data.num_train", "64"),))
    trials = [trial for of_method in asked.trials().values() for trial in of_method]
    tuning, final = asked.tuning_runs(trials), asked.final_runs([trials[1], trials[2]])
    assert len(tuning) == 4
    assert len(final) == 2 * 3
    assert {run.seed for run in tuning}.isdisjoint({run.seed for run in final})
    assert {run.config.evaluation.splits for run in tuning} == {("validation",)}
    assert {run.config.evaluation.splits for run in final} == {("validation", "test")}
    assert len({run.folder for run in (*tuning, *final)}) == 10
    assert {run.config.data.num_train for run in tuning} == {64}
    common = [run.config.model_dump() for run in (*tuning, *final)]
    for config in common:
        for section in ("method", "train", "evaluation"):
            for leaf in ("name", "learning_rate", "splits"):
                config[section].pop(leaf, None)
        del config["seed"], config["output_dir"]
    assert all(config == common[0] for config in common)
    assert [run.config.train.learning_rate for run in final[:2]] == [3e-4, 1e-4]
    assert final[0].config.train.num_steps == 20


@pytest.mark.parametrize(
    "name", ["smoke_cpu", "qwen2_5_math_1_5b_openr1", "qwen2_5_math_7b_openr1"]
)
def test_the_shipped_configs_can_be_compared_with(name):
    file = REPOSITORY / "configs" / f"{name}.yaml"
    asked = make_grid("out", match="trained_tokens", budget=1e6)
    for run in replace(asked, config_file=file).final_runs([Trial("trapo"), Trial("sft")]):
        assert (run.config.train.budget_unit, run.config.train.budget) == ("trained_tokens", 1e6)
        assert run.config.evaluation.every == 0.2


@pytest.mark.parametrize(
    ("sweeps", "overrides", "message"),
    [
        ((LEARNING_RATES, "trapo:alpha=0.1"), (), "numbers of trials differ (trapo 1, grpo 2)"),
        (("seed=1,2",), (), "seed: a comparison decides it (--seeds)"),
        ((), (("output_dir", "x"),), "output_dir: a comparison decides it (--out)"),
        (("luffy:alpha=0.1",), (), "luffy not among --methods"),
        (("evaluation.num_samples=4,16",), (), "evaluation.num_samples: all runs share it"),
    ],
)
def test_an_unfair_or_contradictory_grid_is_refused(sweeps, overrides, message):
    with pytest.raises(UserError) as error:
        make_grid("out", *sweeps, overrides=overrides).trials()
    assert message in str(error.value)


def test_a_variant_is_a_method_with_settings_and_a_name_of_its_own():
    asked = make_grid(
        "out",
        "late:learning_rate=1e-4,3e-4",
        "trapo:learning_rate=2e-4,5e-4",
        methods=("trapo", "late"),
        variants=[
            "late: method.name=trapo method.alpha=0.5 'method.constants.prefix_boundary=paragraph'"
        ],
    )
    trials = asked.trials()
    assert [trial.setting for trial in trials["late"]] == [
        "learning_rate=1e-4",
        "learning_rate=3e-4",
    ]
    plain, late = asked.final_runs([trials["trapo"][0], trials["late"][1]])[:2]
    assert (late.config.method.name, late.config.method.alpha) == ("trapo", 0.5)
    assert late.config.method.constants == {"prefix_boundary": "paragraph"}
    assert late.config.train.learning_rate == 3e-4
    assert late.folder.parts[1:3] == ("late", "learning_rate=3e-4")
    assert (plain.config.method.name, plain.config.method.alpha) == ("trapo", 0.1)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("method.name=trapo", "not NAME: method.name=METHOD"),
        ("late: alpha=0.5", "not NAME: method.name=METHOD"),
        ("la te: method.name=trapo", "not NAME: method.name=METHOD"),
        ("late: method.name=trapo seed=1", "seed: a comparison decides it (--seeds)"),
        ("late: method.name=trapo data.seed=1", "data.seed: all runs share it"),
        ("late: method.name=trapo model.path=x", "model.path: all runs share it"),
        ("late: method.name=trapo alpha", "'alpha' is not FIELD=VALUE"),
        ("late: method.name='trapo", "No closing quotation"),
        ("late: method.name=trapo --config x.yaml", "all runs have one --config"),
    ],
)
def test_a_malformed_variant_is_one_line(text, message):
    with pytest.raises(UserError) as error:
        read_variant(text)
    assert message in str(error.value)


def test_a_variant_that_is_not_compared_is_refused():
    with pytest.raises(UserError, match="late not among --methods"):
        make_grid("out", variants=["late: method.name=trapo"]).trials()
    twice = ["late: method.name=trapo", "late: method.name=grpo"]
    with pytest.raises(UserError, match=r"a name is given twice \(late, late\)"):
        make_grid("out", methods=("late",), variants=twice).trials()


@pytest.mark.parametrize("text", ["learning_rate", "learning_rate=", "a b=1", "x=1,1"])
def test_a_malformed_sweep_is_one_line(text):
    with pytest.raises(UserError, match=r"^--sweep"):
        read_sweep(text)


# --- doing runs, with a trainer that only leaves marks --------------------------------------------------------------

TRAINER = """
import pathlib, re, signal, sys, time
text = pathlib.Path(sys.argv[2]).read_text()
folder = pathlib.Path(re.search("output_dir: (.*)", text)[1])
seed = int(re.search("^seed: (.*)", text, re.M)[1])
folder.mkdir(exist_ok=True)
(folder / "start").write_text(str(time.time_ns()))
(folder / "config.yaml").write_text(text)
with open(folder / "started", "a") as file:
    file.write("x")
if seed == 7:
    def save(*_):
        (folder / "saved").touch()
        sys.exit(0)
    signal.signal(signal.SIGINT, save)
    (folder / "ready").touch()
    time.sleep(60)
if seed == 1 and not (folder / "mended").exists():
    sys.exit("error: <b>train.learning_rate</b>")
num_steps = re.search("num_steps: (.*)", text)[1]
(folder / "metrics.jsonl").write_text('{"step": %s, "kind": "train", "budget/progress": 1}\\n' % num_steps)
(folder / "summary.json").write_text("{}")
(folder / "end").write_text(str(time.time_ns()))
"""


@pytest.fixture
def trainer(tmp_path, monkeypatch):
    """A folder for runs by a made-up `trapo_jax.train`, which fails for seed 1 and waits for seed 7."""
    package = tmp_path / "fake" / "trapo_jax"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "train.py").write_text(TRAINER)
    monkeypatch.chdir(package.parent)
    monkeypatch.setattr(grid, "LOOK_EVERY_SECS", 0.02)
    return tmp_path


def started(runs):
    return [len((run.folder / "started").read_text()) for run in runs]


def test_a_failed_run_is_reported_and_alone_repeated(trainer):
    runs = make_grid(trainer, methods=("trapo",)).final_runs([Trial("trapo")])
    lines = []
    (failure,) = do_runs(runs, jobs=2, environment=os.environ, say=lines.append)
    assert failure.run is runs[1]
    assert failure.reason.startswith("error: <b>train.learning_rate</b> (exit code 1; ")
    assert "2 of 3 runs complete, 0 at work, 0 waiting; " in lines[-1]
    assert " runs an hour, " in lines[-1]
    assert any(line.startswith(f"trapo, seed 1 failed: {failure.reason}; ") for line in lines)
    (runs[1].folder / "mended").touch()
    assert do_runs(runs, jobs=2, environment=os.environ, say=lines.append) == []
    assert started(runs) == [1, 2, 1]


def test_no_more_runs_at_a_time_than_jobs(trainer):
    runs = make_grid(trainer, methods=("trapo", "grpo", "sft"), seeds=1).final_runs(
        [Trial("trapo"), Trial("grpo"), Trial("sft")]
    )
    assert do_runs(runs, jobs=1, environment=os.environ, say=print) == []
    read = lambda run, name: int((run.folder / name).read_text())
    for first, second in itertools.pairwise(runs):
        assert read(first, "end") < read(second, "start")


def test_runs_share_the_cores(monkeypatch):
    monkeypatch.setattr(compare, "num_cores", lambda: 8)
    assert compare.share_of_cores(3) == {"NPROC": "2", "OMP_NUM_THREADS": "2"}
    assert compare.share_of_cores(16)["NPROC"] == "1"


def test_a_folder_with_another_run_is_refused_before_anything_begins(trainer):
    runs = make_grid(trainer, methods=("trapo",), seeds=1).final_runs([Trial("trapo")])
    do_runs(runs, jobs=1, environment=os.environ, say=print)
    others = make_grid(trainer, methods=("trapo",), seeds=2, budget=30.0)
    with pytest.raises(UserError, match=r"holds a run with train\.num_steps=20, not 30"):
        do_runs(others.final_runs([Trial("trapo")]), jobs=1, environment=os.environ, say=print)
    assert started(runs) == [1]


def test_a_run_that_is_to_be_longer_goes_on(trainer):
    """What it was given may be, where nothing of it depends on its length."""
    options = {"methods": ("trapo",), "seeds": 1, "overrides": (("train.decay_start", "1"),)}
    for budget in (20.0, 30.0, 30.0):
        runs = make_grid(trainer, budget=budget, **options).final_runs([Trial("trapo")])
        assert do_runs(runs, jobs=1, environment=os.environ, say=print) == []
    assert started(runs) == [2]


def test_a_budget_of_steps_is_the_only_one(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("train: {budget_unit: trained_tokens, budget: 1000}\n")
    (run,) = replace(make_grid("out", seeds=1), config_file=file).final_runs([Trial("trapo")])
    assert (run.config.train.num_steps, run.config.train.budget) == (20, None)


@pytest.mark.parametrize("ends_it", [KeyboardInterrupt, BrokenPipeError])
def test_whatever_ends_a_comparison_lets_the_runs_save(trainer, monkeypatch, ends_it):
    (run,) = make_grid(trainer, methods=("trapo",), seeds=8).final_runs([Trial("trapo")])[7:]

    def interrupt_once_ready(_):
        if (run.folder / "ready").exists():
            raise ends_it

    monkeypatch.setattr(grid.time, "sleep", interrupt_once_ready)
    with pytest.raises(Interrupted if ends_it is KeyboardInterrupt else ends_it):
        do_runs([run], jobs=1, environment=os.environ, say=print)
    assert (run.folder / "saved").exists()


# --- results, made up ------------------------------------------------------------------------------------------------


def write_run(run, accuracy, *, entropy=0.5, overspent=0.0, problems="abc"):
    """A folder as the trainer leaves it; every third problem is harder."""
    run.folder.mkdir(parents=True)
    steps = int(20 * (1 + overspent))
    rng = np.random.default_rng([run.seed, int(1000 * accuracy)])
    chances = np.clip(accuracy + np.where(np.arange(NUM_PROBLEMS) % 3, 0.05, -0.1), 0, 1)

    def evaluation(split, step, chances):
        correct = rng.binomial(NUM_SAMPLES, chances)
        columns = {
            "id": [f"{problems}{i:02d}" for i in range(NUM_PROBLEMS)],
            "source": ["s"] * NUM_PROBLEMS,
            "greedy": [int(c > 1) for c in correct],
            "correct": correct.tolist(),
            "len": [12.0] * NUM_PROBLEMS,
        }
        (run.folder / "evaluations").mkdir(exist_ok=True)
        path = run.folder / "evaluations" / f"{split}_{step}.json"
        path.write_text(json.dumps(columns))
        mean = correct.mean() / NUM_SAMPLES
        scores = {"eval/accuracy_sampled": mean, "eval/entropy": entropy}
        return {"step": step, "kind": "eval", "split": split, **scores}

    splits = run.config.evaluation.splits
    records = [evaluation(split, 0, 0.25 + 0 * chances) for split in splits]
    for step in range(1, steps + 1):
        spent = {name: 100.0 * step for name in UNITS.values() if name != "step"}
        tokens = {"tokens/expert_trained": 25.0 * step}
        shares = {"guidance/ratio_mean": 0.5, "budget/progress": step / 20}
        records.append({"step": step, "kind": "train", **spent, **tokens, **shares})
    records += [evaluation(split, steps, chances) for split in splits]
    (run.folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    (run.folder / "summary.json").write_text("{}")


def make_comparison(out, accuracies, *, seeds=5, failures=(), **spoiled):
    asked = make_grid(
        out,
        methods=tuple(accuracies),
        seeds=seeds,
        overrides=(("evaluation.num_samples", str(NUM_SAMPLES)),),
    )
    runs = asked.final_runs([Trial(method) for method in accuracies])
    for run in runs:
        write_run(run, accuracies[run.trial.method], **spoiled.get(run.trial.method, {}))
    results = [read_result(run) for run in runs]
    failed = [Failure(runs[i], "error: <script>") for i in failures]
    return Comparison(asked, "python -m ...", results, failed, [])


def test_a_result_is_what_the_folder_says(tmp_path):
    (result,) = make_comparison(tmp_path, {"trapo": 0.6}, seeds=1).results
    assert result.spent["steps"] == 20
    assert result.spent["trained_tokens"] == 2_000
    assert [p.spent["problems"] for p in result.curve] == [0, 2_000]
    assert result.curve[1].accuracy > result.curve[0].accuracy
    assert (result.guidance, result.expert_share, result.entropy) == (0.5, 0.25, 0.5)
    assert result.after.sampled.mean() == pytest.approx(0.6, abs=0.1)
    assert result.before.sampled.mean() == pytest.approx(0.25, abs=0.1)
    # One sample of four right: it is among any four.
    assert result.after.best_of[result.after.sampled > 0].min() == 1


def test_progress_is_read_while_the_file_is_being_written(tmp_path):
    (run,) = make_grid(tmp_path, methods=("trapo",), seeds=1).final_runs([Trial("trapo")])
    assert progress(run) == 0
    write_run(run, 0.5)
    (run.folder / "summary.json").unlink()
    path = run.folder / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:12]) + lines[12][:30])
    assert progress(run) == 0.5


def test_the_best_trial_on_validation_is_chosen(tmp_path):
    asked = make_grid(tmp_path, LEARNING_RATES, seeds=1)
    trials = [trial for of_method in asked.trials().values() for trial in of_method]
    runs = asked.tuning_runs(trials)
    for run, accuracy in zip(runs[:3], (0.3, 0.7, 0.6), strict=True):
        write_run(run, accuracy)
    chosen, scores = pick_trials(runs)  # the second of GRPO failed
    assert chosen == [trials[1], trials[2]]
    assert [s.num_failed for s in scores] == [0, 0, 0, 1]


def test_clear_differences_are_significant_and_others_are_not(tmp_path):
    comparison = make_comparison(tmp_path, {"grpo": 0.3, "trapo": 0.7, "sft": 0.31})
    found = {(d.better, d.other): d for d in find_differences(comparison)}
    assert {pair for pair, d in found.items() if d.is_significant} == {
        ("trapo", "grpo"),
        ("trapo", "sft"),
    }
    clear = found["trapo", "grpo"]
    assert clear.estimate.mean == pytest.approx(0.4, abs=0.05)
    assert clear.adjusted_p == pytest.approx(
        max(3 * min(d.estimate.p_value for d in found.values()), 2 * clear.estimate.p_value)
    )
    text = to_markdown(describe(comparison, None)[0])
    significant, rest = text.split("Not significant:")
    assert "trapo over grpo" in significant
    assert "trapo over" not in rest
    assert score_rows(comparison)[0].method == "trapo"
    assert find_warnings(comparison) == []


def test_one_seed_is_a_smoke_test_and_nothing_is_significant(tmp_path):
    comparison = make_comparison(tmp_path, {"grpo": 0.1, "trapo": 0.9}, seeds=1)
    assert not any(d.is_significant for d in find_differences(comparison))
    text = to_markdown(describe(comparison, None)[0])
    assert "**Warning: a smoke test, no result: 1 seed a method, not 5**" in text


def test_a_smoke_test_is_of_seeds_that_finished(tmp_path):
    whole = make_comparison(tmp_path, {"grpo": 0.1, "trapo": 0.9})
    assert find_warnings(whole) == []
    part = [r for r in whole.results if r.run.seed < 2 or r.run.trial.method == "grpo"]
    assert "2 seeds a method, not 5" in find_warnings(replace(whole, results=part))[0]


def test_a_run_of_another_version_is_one_line(tmp_path):
    comparison = make_comparison(tmp_path, {"trapo": 0.5}, seeds=2, trapo={"entropy": None})
    assert np.isnan(comparison.results[0].entropy)
    assert "nan" in to_markdown(describe(comparison, None)[0])
    run = comparison.results[0].run
    (run.folder / "evaluations" / "test_0.json").unlink()
    with pytest.raises(UserError, match=r"seed_0: not a complete run of this version .*; delete"):
        read_result(run)


def test_budgets_that_do_not_match_are_said_loudly(tmp_path):
    comparison = make_comparison(tmp_path, {"grpo": 0.5, "trapo": 0.5}, trapo={"overspent": 0.05})
    warnings = find_warnings(comparison)
    assert len(warnings) == 5
    assert all(w.startswith("BUDGETS DO NOT MATCH: trapo, seed") for w in warnings)
    assert "5.00%" in to_markdown(describe(comparison, None)[0])


def test_methods_scored_on_other_problems_are_not_compared(tmp_path):
    with pytest.raises(UserError, match=r"seed_0: scored on different problems"):
        find_differences(
            make_comparison(tmp_path, {"grpo": 0.5, "trapo": 0.5}, trapo={"problems": "x"})
        )


def test_trials_that_did_the_same_are_not_trials(tmp_path):
    asked = make_grid(tmp_path, LEARNING_RATES, methods=("grpo",), seeds=5)
    runs = asked.tuning_runs(asked.trials()["grpo"])
    for run in runs:
        write_run(run, 0.5)
    _, scores = pick_trials(runs)
    missing, warning = find_warnings(Comparison(asked, "", [], [], scores))
    assert missing == "no run of grpo finished"
    assert "grpo did exactly the same with learning_rate=1e-4 as with learning_rate=3e-4" in warning


def test_failed_runs_and_what_they_said_are_in_the_page_and_harmless(tmp_path):
    comparison = make_comparison(tmp_path, {"grpo": 0.5}, failures=[0])
    document = describe(comparison, None)[0]
    page, text = to_html(document), to_markdown(document)
    for report in (page, text):
        assert "failed: grpo, seed 0: error: &lt;script" in report
        assert "<script" not in report


def test_report_files_hold_the_same_numbers(tmp_path):
    comparison = make_comparison(tmp_path, {"grpo": 0.4, "trapo": 0.6})
    picture = Image(tmp_path / "curves.png", "curves")
    plot_curves(picture.path, comparison.results)
    document, tables = describe(comparison, picture)
    page = to_html(document)
    assert "data:image/png;base64,iVBOR" in page
    assert page.count("<table>") == 2
    write_csv(tmp_path / "runs.csv", tables["runs.csv"])
    with open(tmp_path / "runs.csv") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 10
    of_trapo = [float(row["sampled"]) for row in rows if row["method"] == "trapo"]
    best = score_rows(comparison)[0]
    assert np.mean(of_trapo) == pytest.approx(best.sampled.mean)
    assert f"{best.sampled.mean:.3f} [{best.sampled.low:.3f}" in page
    assert best.sampled.low < best.sampled.mean < best.sampled.high


def test_curves_are_compared_where_all_seeds_have_been(tmp_path):
    results = make_comparison(tmp_path, {"trapo": 0.6}, seeds=2).results
    x, curves = common_grid(results, "flops")
    assert (x[0], x[-1]) == (0, 2_000)
    assert curves[:, -1].tolist() == [r.curve[-1].accuracy for r in results]
    middle = [(r.curve[0].accuracy + r.curve[1].accuracy) / 2 for r in results]
    assert curves[:, len(x) // 2] == pytest.approx(middle)


def test_the_command_tunes_runs_new_seeds_and_says_what_failed(tmp_path, monkeypatch, capsys):
    asked = []

    def do_made_up_runs(runs, **_):
        asked.append(runs)
        failed = [run for run in runs if (run.trial.method, run.seed) == ("grpo", 1)]
        for run in runs:
            if run not in failed:
                write_run(run, 0.7 if run.config.train.learning_rate == 3e-4 else 0.3)
        return [Failure(run, "error: no space") for run in failed]

    monkeypatch.setattr(compare, "check_steps", lambda *_: "cpu")
    monkeypatch.setattr(compare, "do_runs", do_made_up_runs)
    arguments = ["--methods", "trapo,grpo", "--seeds", "2", "--match", "steps", "--budget", "20"]
    arguments += ["--sweep", LEARNING_RATES, "--out", str(tmp_path / "out")]
    assert compare.main([*arguments, f"evaluation.num_samples={NUM_SAMPLES}"]) == 1
    tuning, final = asked
    assert [run.seed for run in tuning] == [1000] * 4
    assert {(run.trial.setting, run.seed) for run in final} == {
        ("learning_rate=3e-4", 0),
        ("learning_rate=3e-4", 1),
    }
    text = (tmp_path / "out" / "comparison.md").read_text()
    assert "failed: grpo (learning_rate=3e-4), seed 1: error: no space" in text
    assert "| grpo | learning_rate=3e-4 | 1 of 2 |" in text
    assert text.count("| chosen |") == 2
    assert f"    python -m trapo_jax.compare {' '.join(arguments)}" in text
    assert text in capsys.readouterr().out
