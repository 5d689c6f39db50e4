"""Tests the data of reports, and the report page of a real run in a browser."""

import json
import shutil

import pytest
import yaml

from support.browser import opened
from trapo_jax.config import Config, flatten
from trapo_jax.report import main
from trapo_jax.runs.loggers import read_records
from trapo_jax.runs.report import downsample, read_run, read_samples, shown_settings, write_report
from trapo_jax.types import UserError


def step_record(step, **values):
    return {
        "step": step,
        "batch/expert_trained_tokens": 1,
        "reward/sampled_mean": step / 1000,
        **values,
    }


def test_few_steps_are_not_averaged():
    steps_per_point, columns = downsample(
        [step_record(1), step_record(2, **{"reward/sampled_mean": None})]
    )
    assert steps_per_point == 1
    assert columns["step"] == [1, 2]
    assert columns["reward/sampled_mean"] == [0.001, None]


def test_many_steps_are_averaged_and_the_last_step_is_kept():
    steps_per_point, columns = downsample([step_record(step) for step in range(1, 1002)])
    assert steps_per_point == 3
    assert len(columns["step"]) == 334
    assert columns["step"][:2] == [3, 6]
    assert columns["reward/sampled_mean"][:2] == [0.002, 0.005]
    assert columns["step"][-1] == 1001


def test_steps_without_expert_tokens_have_no_expert_metrics():
    without = {"batch/expert_trained_tokens": 0, "expert/gradient_share_inside": 0.0}
    _, columns = downsample(
        [step_record(1, **{"expert/gradient_share_inside": 0.5}), step_record(2, **without)]
    )
    assert columns["expert/gradient_share_inside"] == [0.5, None]


def test_all_guidance_levels_of_the_records_are_kept():
    levels = {f"guidance/level_{i}": i / 66 for i in range(12)}
    _, columns = downsample([step_record(1, **levels)])
    assert [name for name in columns if name.startswith("guidance/level")] == list(levels)


def sample(step, problem, num_tokens=3):
    return {
        **{"step": step, "problem_id": problem, "prompt": "?", "gold": "7"},
        **{"prefix": "", "completion": "a" * num_tokens},
        "tokens": {
            "pieces": [str(i) for i in range(num_tokens)],
            "kinds": "4" * num_tokens,
            "logprobs": [-1.0] * num_tokens,
            "gradient_weights": [0.0] * num_tokens,
        },
    }


def write_lines(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def test_evenly_spaced_complete_groups_are_kept_within_the_limit(tmp_path):
    path = tmp_path / "samples.jsonl"
    write_lines(path, [sample(step, f"{step}") for step in range(100) for _ in range(2)])
    everything, num_groups = read_samples(path, max_bytes=10**9)
    assert (len(everything), num_groups) == (200, 100)
    some, num_groups = read_samples(path, max_bytes=8_000)
    assert num_groups == 100
    assert 4_000 < len(json.dumps(some, separators=(",", ":"))) <= 8_000
    steps = [rollout["step"] for rollout in some]
    assert steps[::2] == steps[1::2]
    assert (steps[0], steps[-1]) == (0, 99)
    gaps = {b - a for a, b in zip(steps[::2], steps[2::2], strict=False)}
    assert max(gaps) - min(gaps) <= 1
    one, _ = read_samples(path, max_bytes=1)
    assert [rollout["step"] for rollout in one] == [99, 99]


def test_the_middle_of_a_long_response_is_omitted(tmp_path):
    write_lines(tmp_path / "samples.jsonl", [sample(1, "p", num_tokens=5_000)])
    (rollout,), _ = read_samples(tmp_path / "samples.jsonl", max_bytes=10**9)
    pieces = rollout["tokens"]["pieces"]
    assert pieces == [str(i) for i in [*range(1000), *range(4500, 5000)]]
    assert all(len(values) == 1500 for values in rollout["tokens"].values())
    assert rollout["num_tokens"] == 5_000
    assert "completion" not in rollout


def test_an_incomplete_last_line_is_ignored_and_a_damaged_line_is_reported(tmp_path):
    path = tmp_path / "samples.jsonl"
    write_lines(path, [sample(1, "p")])
    path.write_text(path.read_text() + '{"step": 2, "prob')
    assert read_samples(path, max_bytes=10**9)[1] == 1
    path.write_text(path.read_text() + "\n")
    with pytest.raises(UserError, match=r"samples\.jsonl, line 2: not a JSON object"):
        read_samples(path, max_bytes=10**9)
    write_lines(path, [{"step": 1, "problem_id": "p"}])
    with pytest.raises(
        UserError, match=r"samples\.jsonl, line 1: not a rollout written by this version"
    ):
        read_samples(path, max_bytes=10**9)


def test_settings_that_differ_from_the_defaults_are_shown():
    settings = flatten(yaml.safe_load(Config().to_yaml()))
    assert "train.weight_decay" not in shown_settings(settings)
    assert "method.name" in shown_settings(settings)
    assert shown_settings({**settings, "train.weight_decay": 0.5})[-1] == "train.weight_decay"


@pytest.mark.parametrize("name", ["absent", "other"])
def test_a_folder_that_is_not_a_run_gives_a_one_line_error_and_exit_code_2(name, tmp_path, capsys):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.yaml").write_text("- 1\n")
    assert main([str(tmp_path / name)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert f"{name}: not a run directory written by this version" in error
    assert not list(tmp_path.rglob("report.html"))


def test_a_report_that_cannot_be_written_gives_a_one_line_error_and_exit_code_2(tmp_path, capsys):
    (tmp_path / "config.yaml").write_text(Config().to_yaml())
    (tmp_path / "metrics.jsonl").write_text("")
    assert main([str(tmp_path), "--out", str(tmp_path / "absent" / "report.html")]) == 2
    expected = (
        f"error: {tmp_path}/absent/report.html: No such file or directory; choose another --out"
    )
    assert capsys.readouterr().err == expected + "\n"


def test_a_report_does_not_replace_a_file_of_another_kind(tmp_path, capsys):
    (tmp_path / "config.yaml").write_text(Config().to_yaml())
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text("")
    assert main([str(tmp_path), "--out", str(metrics)]) == 2
    assert (
        f"--out {metrics}: the report is an HTML file; choose a name that"
        in capsys.readouterr().err
    )
    assert metrics.read_text() == ""


def test_a_run_whose_budget_is_spent_is_complete(finished_run, tmp_path):
    for name in ("config.yaml", "metrics.jsonl"):
        shutil.copy(finished_run[0] / name, tmp_path)
    config = tmp_path / "config.yaml"
    config.write_text(config.read_text().replace("num_steps: 12\n", "num_steps: 1000000000\n"))
    run = read_run(tmp_path, "r", max_bytes=10**6)
    assert (run["complete"], run["step"], run["num_steps"]) == (True, 12, 12)
    assert all(after is not None for _, _, after in run["scores"])
    records = (tmp_path / "metrics.jsonl").read_text().splitlines(keepends=True)
    half = [r for r in records if json.loads(r)["step"] <= 6]
    (tmp_path / "metrics.jsonl").write_text("".join(half))
    run = read_run(tmp_path, "r", max_bytes=10**6)
    assert (run["complete"], run["step"], run["num_steps"]) == (False, 6, 12)


def test_a_run_writes_its_report_at_the_end(finished_run):
    """The report command writes an identical page."""
    folder, output = finished_run
    page = (folder / "report.html").read_text()
    assert f"{folder / 'report.html'}: " in output
    write_report([folder], folder.parent / "again.html")
    assert (folder.parent / "again.html").read_text() == page


@pytest.fixture(scope="module")
def two_runs(finished_run, tmp_path_factory):
    """Writes a report on a finished run and an unfinished run with the same name, and returns the report's path."""
    folder = finished_run[0]
    unfinished = tmp_path_factory.mktemp("unfinished") / folder.name
    unfinished.mkdir()
    (unfinished / "config.yaml").write_text((folder / "config.yaml").read_text())
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)[:5]
    (unfinished / "metrics.jsonl").write_text("".join(lines))
    out = unfinished.parent / "report.html"
    assert main([str(folder), str(unfinished), "--out", str(out)]) == 0
    return out


@pytest.mark.slow
def test_the_page_of_two_runs_makes_no_requests_and_passes_axe(two_runs):
    axe = pytest.importorskip(
        "axe_playwright_python.sync_playwright", reason="axe is not installed"
    )
    for scheme, width in (("light", 1280), ("dark", 390)):
        options = {"viewport": {"width": width, "height": 800}, "color_scheme": scheme}
        with opened(two_runs, **options) as seen:
            page = seen.page
            background = page.evaluate("getComputedStyle(document.body).backgroundColor")
            assert (background == "rgb(255, 255, 255)") == (scheme == "light")
            assert page.evaluate("document.documentElement.scrollWidth") == width
            for title in ("All settings", "Data table", "Tokens as a table"):
                for summary in page.get_by_text(title).all()[:2]:
                    summary.click()
            assert page.get_by_role("application").count() == page.locator("canvas").count() > 10
            found = axe.Axe().run(page)
            assert found.violations_count == 0, found.generate_report()
            assert (seen.complaints, seen.requests) == ([], [])


@pytest.mark.slow
def test_filters_keyboard_and_tables_show_the_contents_of_the_files(two_runs, finished_run):
    """Elements are located by accessible name and operated by keyboard, as with a screen reader."""
    folder = finished_run[0]
    samples = list(read_records(folder / "samples.jsonl"))
    with opened(two_runs, color_scheme="light") as seen:
        page, main_part = seen.page, seen.page.locator("main")
        status = page.get_by_role("status")
        assert status.text_content() == f"1 to 8 of {len(samples)} rollouts"
        page.get_by_role("combobox", name="Reward").select_option("1")
        page.get_by_role("combobox", name="Micro-group").select_option("3")
        right = [s for s in samples if s["reward"] == 1 and s["micro_group"] == 2]
        assert status.text_content().endswith(f" of {len(right)} rollouts")
        last = min(
            (s for s in right if s["step"] == max(s["step"] for s in right)),
            key=lambda s: s["problem_id"],
        )
        card = main_part.locator("article").first
        assert card.locator(".text-of-rollout").text_content() == (
            last["prompt"] + last["prefix"] + last["completion"]
        )
        card.locator(".text-of-rollout").focus()
        page.keyboard.press("ArrowRight")
        piece = json.dumps(last["tokens"]["pieces"][0])
        assert f"token 1, {piece}: " in card.locator(".token").text_content()
        chart = main_part.locator("figure").first
        chart.get_by_role("application").focus()
        page.keyboard.press("End")
        assert chart.locator(".readout").text_content().startswith("step 12")
        chart.locator("summary").click()
        # The page builds the table when the user opens it.
        chart.get_by_role("row").nth(12).wait_for()
        assert chart.get_by_role("row").count() == 13
        page.get_by_role("button", name="Theme").click()
        page.get_by_role("button", name="Theme").click()
        assert page.evaluate("document.documentElement.dataset.theme") == "dark"
        assert "step 4 of 12" in main_part.text_content()
        assert seen.complaints == []
