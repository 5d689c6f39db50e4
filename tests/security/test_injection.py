"""Tests hostile strings in all outputs: logs remain valid, and the console and the report show the strings as text."""

import json
from html.parser import HTMLParser

import pytest
import yaml

from support.browser import opened
from support.event_files import all_scalars
from support.injection_corpus import CORPUS
from trapo_jax.config import Config, load_config
from trapo_jax.inputs.printable import printable
from trapo_jax.runs.command_line import fail
from trapo_jax.runs.console import Console
from trapo_jax.runs.loggers import EVAL, TRAIN, RunLog
from trapo_jax.runs.report import write_report
from trapo_jax.types import UserError

NUMBERS = {
    "reward/sampled_mean": 0.5,
    "tokens/trained": 10,
    "tokens/sampled": 10,
    "batch/expert_trained_tokens": 1,
    "expert/prob_from_0.0": 1.0,
    "time/sample_secs": 1.0,
    "time/reward_secs": 1.0,
    "time/train_secs": 1.0,
}


def rollout(text, step=1):
    """Returns a record of samples.jsonl in which all strings are `text`."""
    return {
        "step": step,
        "problem_id": text,
        "sample_index": 0,
        "micro_group": 0,
        "prompt": text,
        "prefix": "",
        "completion": text,
        "gold": text,
        "answer": text,
        "is_correct": False,
        "reward": None,
        "rewards": {text: None, "second": 0.5},
        "missing": {text: text},
        "advantage": -0.5,
        "ratio": 0.0,
        "finish_reason": text,
        "tokens": {"pieces": [text], "kinds": "4", "logprobs": [-1.0], "gradient_weights": [0.1]},
    }


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Returns a run folder written by the run log, in which every string is hostile, including the folder's name."""
    folder = tmp_path_factory.mktemp("runs") / "<img src=x onerror=attacked=1>\u202e"
    folder.mkdir()
    config = Config().model_dump(mode="json")
    config["data"]["train_files"] = [c for c in CORPUS if c.isprintable()]
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    log = RunLog(folder, offsets=None, run_id="1a")
    scores = {"eval/accuracy_greedy": 0.1, "eval/accuracy_sampled": 0.2, "time/eval_secs": 1.0}
    scores |= {"eval/num_samples": 2, "eval/temperature": 0.6}
    by_source = {f"eval/accuracy_greedy/{text}": 0.5 for text in CORPUS}
    by_source |= {f"eval/num_samples/{text}": 2 for text in CORPUS}
    log.metrics(EVAL, 0, {"split": "test", **scores, **by_source})
    log.metrics(TRAIN, 1, {**NUMBERS, **{f"loss/{text}": 0.5 for text in CORPUS}})
    log.samples([rollout(text) for text in CORPUS])
    log.close()
    write_report([folder], folder / "report.html")
    return folder


def test_the_corpus_has_no_duplicates():
    assert len(set(CORPUS)) == len(CORPUS) > 30


def test_every_jsonl_line_is_a_valid_object_with_the_original_texts(run):
    lines = (run / "samples.jsonl").read_bytes().split(b"\n")
    assert lines.pop() == b""
    assert [json.loads(line) for line in lines] == [rollout(text) for text in CORPUS]
    assert all(32 <= byte < 127 for line in lines for byte in line)
    first, second = (run / "metrics.jsonl").read_bytes().splitlines()
    assert {f"eval/accuracy_greedy/{text}" for text in CORPUS} < set(json.loads(first))
    assert json.loads(second)["kind"] == "train"


def test_tensorboard_tags_are_printable_and_the_file_is_complete(run):
    tags = [tag for tag, *_ in all_scalars(run)]
    assert len(tags) == 3 * len(CORPUS) + 5 + len(NUMBERS)
    assert all(tag.isprintable() for tag in tags)


def test_any_text_is_shown_on_one_printable_line_on_the_console(capsys):
    terminal = Console()
    for text in CORPUS:
        terminal.say(text)
        assert capsys.readouterr().out == printable(text) + "\n"
        assert printable(text).isprintable()


@pytest.mark.parametrize("place", ["name", "value"])
def test_an_invalid_config_causes_one_printable_error_line(place, capsys):
    for text in CORPUS:
        with pytest.raises(UserError) as error:
            load_config(
                Config, None, [("train.num_steps", text) if place == "value" else (text, "1")]
            )
        fail(str(error.value), 2)
        assert capsys.readouterr().err.removesuffix("\n").isprintable(), repr(text[:80])


def test_table_cells_contain_no_control_sequences_and_no_markup(capsys):
    terminal = Console()
    terminal.table("scores", ["[red]name[/]"], [[text[:200]] for text in CORPUS])
    output = capsys.readouterr().out
    assert output.replace("\n", "").isprintable()
    assert "[red]name[/]" in output
    assert "[bold red]markup" in output


class Elements(HTMLParser):
    """Lists the elements of a page."""

    def __init__(self, text):
        super().__init__()
        self.found = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, [name for name, _ in attrs]))


def test_the_elements_of_the_page_do_not_depend_on_the_data(run, tmp_path):
    harmless = tmp_path / "harmless"
    harmless.mkdir()
    (harmless / "config.yaml").write_text(Config().to_yaml())
    (harmless / "metrics.jsonl").write_text("")
    write_report([harmless], tmp_path / "report.html")
    pages = [p.read_text() for p in (run / "report.html", tmp_path / "report.html")]
    hostile, expected = (Elements(page).found for page in pages)
    assert hostile == expected
    assert ("script", ["type", "id"]) in hostile
    data = pages[0].split('id="data">')[1].split("</script>")[0]
    assert data.isascii()
    assert data.isprintable()
    assert "<" not in data


@pytest.mark.slow
def test_a_browser_treats_the_texts_as_text(run):
    """Whatever is clicked, the strings run no scripts, open no dialogs, make no requests, and remain readable."""
    with opened(run / "report.html") as seen:
        page = seen.page
        for details in page.locator("summary").all():
            details.click()
        shown = ""
        for coloring in ("kind", "probability", "advantage", "gradient"):
            page.get_by_label("Color by").select_option(coloring)
        while True:
            page.locator("article summary").last.click()
            page.keyboard.press("Tab")
            shown += page.locator("#rollouts").text_content()
            if page.get_by_role("button", name="Next").is_disabled():
                break
            page.get_by_role("button", name="Next").click()
        assert page.evaluate("globalThis.attacked") is None
        assert page.evaluate("({}).attacked") is None
        assert (seen.complaints, seen.requests) == ([], [])
        for text in CORPUS:
            assert printable(text, keep="\n\t")[:10_000] in shown, repr(text[:80])
        assert page.title().startswith("<img src=x onerror=attacked=1>\\u202e")


@pytest.mark.slow
def test_the_content_security_policy_blocks_other_scripts_and_requests(run):
    with opened(run / "report.html") as seen:
        seen.page.evaluate("""() => {
            const script = document.createElement("script");
            script.textContent = "globalThis.attacked = 1";
            const image = document.createElement("img");
            image.setAttribute("onerror", "globalThis.attacked = 1");
            image.src = "https://attacker.invalid/pixel.png";
            document.body.append(script, image);
            return new Promise((resolve) => setTimeout(resolve, 100));
        }""")
        assert seen.page.evaluate("globalThis.attacked") is None
        assert len(seen.complaints) >= 2  # from the Content Security Policy
        assert all("Content Security Policy" in text for text in seen.complaints)
