"""Tests that the documentation site builds without warnings and that its references are complete."""

import re
import subprocess
import sys

import pytest

from support.commands import REPOSITORY
from trapo_jax.runs.loggers import read_metrics

DOCS = REPOSITORY / "docs"
NAMES = {"LEVEL": r"\d+", "K": r"\d+", "X": r"0\.\d", "NAME": ".+"}

# Metrics that only other runs record: runs with several reward functions, with different numbers of samples per source,
# with a stage that ends when the validation loss stops improving (patience), or with ReLIFT.
IN_OTHER_RUNS = {
    *("rewards/FUNCTION", "eval/rewards/FUNCTION", "eval/num_samples/SOURCE"),
    *("eval/expert_loss", "buffer/NAME"),
}


def documented_metrics():
    """Returns a regular expression for each name in the metrics reference."""
    text = (DOCS / "reference" / "metrics.md").read_text()
    rows = [line.split("|")[1] for line in text.splitlines() if line.startswith("| `")]
    names = [name for row in rows for name in re.findall(r"`([^`]+)`", row)]
    pattern = "|".join(rf"\b{word}\b|(?<=_){word}\b" for word in (*NAMES, "[A-Z]{2,}"))
    return {
        name: re.sub(pattern, lambda found: NAMES.get(found[0], r"[\w=.:-]+"), name)
        for name in names
    }


@pytest.mark.slow
def test_the_site_builds_without_warnings(tmp_path):
    pytest.importorskip("sphinx", reason="building the site requires the `docs` extra")
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", DOCS, tmp_path]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    pages = {page.relative_to(tmp_path).as_posix() for page in tmp_path.rglob("*.html")}
    assert {"index.html", "reference/config.html", "reference/metrics.html"} <= pages
    assert "train.learning_rate" in (tmp_path / "reference" / "config.html").read_text()


def test_every_metric_of_a_run_is_documented(finished_run):
    patterns = [re.compile(pattern) for pattern in documented_metrics().values()]
    names = {name for record in read_metrics(finished_run[0]) for name in record}
    undocumented = {
        name
        for name in names - {"kind", "step", "split"}
        if not any(pattern.fullmatch(name) for pattern in patterns)
    }
    assert undocumented == set()


def test_every_documented_metric_exists(finished_run):
    names = {name for record in read_metrics(finished_run[0]) for name in record}
    absent = {
        name
        for name, pattern in documented_metrics().items()
        if not any(re.fullmatch(pattern, found) for found in names)
    }
    assert absent == IN_OTHER_RUNS


def test_every_page_is_in_the_table_of_contents():
    entries = re.findall(r"^([\w/]+)$", (DOCS / "index.md").read_text(), flags=re.MULTILINE)
    pages = {
        path.relative_to(DOCS).with_suffix("").as_posix()
        for path in DOCS.rglob("*.md")
        if path.name not in ("index.md",)
    }
    assert pages | {"reference/config"} == set(entries)
