"""Tests that the notebooks match the sources next to them, and that they were executed."""

import json
import re

import pytest

from support.commands import REPOSITORY

SOURCES = sorted((REPOSITORY / "notebooks").glob("*.py"))


def percent_cells(text):
    """Yields the kind and source of each cell in a jupytext `py:percent` file."""
    body = text.split("# ---\n", 2)[-1]
    for cell in re.split(r"^# %%", body, flags=re.MULTILINE)[1:]:
        header, _, source = cell.partition("\n")
        if "[markdown]" in header:
            lines = (line.removeprefix("#").removeprefix(" ") for line in source.splitlines())
            yield "markdown", "\n".join(lines).strip()
        else:
            yield "code", source.strip()


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_notebook_has_the_cells_of_its_source_and_was_executed(source):
    notebook = json.loads(source.with_suffix(".ipynb").read_text())
    cells = [(c["cell_type"], "".join(c["source"]).strip()) for c in notebook["cells"]]
    assert cells == list(percent_cells(source.read_text()))
    code = [c for c in notebook["cells"] if c["cell_type"] == "code"]
    assert [c["execution_count"] for c in code] == list(range(1, len(code) + 1))
    outputs = [output for c in code for output in c["outputs"]]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert not any(output["output_type"] == "error" for output in outputs)


def test_the_expected_notebooks_exist():
    assert {path.stem for path in SOURCES} == {"mode_seeking", "prefix_schedule", "trsft_loss"}
