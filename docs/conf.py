"""Configuration of the documentation site: `sphinx-build -W docs build/docs`.

The configuration reference is generated from the schema when the site is built.
"""

from pathlib import Path

from sphinx.application import Sphinx

from trapo_jax import __version__
from trapo_jax.config import Config, EvaluateConfig, list_fields, list_sections
from trapo_jax.config.tasks import TASKS

project = "trapo_jax"
author = "the trapo_jax authors"
version = release = __version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]
html_theme = "furo"
html_title = f"trapo_jax {version}"
html_copy_source = False
html_show_sphinx = False
exclude_patterns = ["_build"]
suppress_warnings = ["misc.highlighting_failure"]
myst_heading_anchors = 3
myst_enable_extensions = ["deflist"]
highlight_language = "none"  # of indented blocks, most of which are commands
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_format = "short"
napoleon_numpy_docstring = False
napoleon_use_ivar = True  # Attributes are documented once, in the docstring of the class.
default_role = "code"  # docstrings use Markdown's backticks

CONFIG_PAGE = Path(__file__).parent / "reference" / "config.md"


def setup(app: Sphinx) -> None:
    """Writes the generated pages before Sphinx looks for sources."""
    app.connect("builder-inited", lambda _: CONFIG_PAGE.write_text(config_reference()))


def config_reference() -> str:
    """Returns the configuration reference as Markdown."""
    tasks = ", ".join(f"`{task}`" for task in TASKS)
    parts = [
        "# Configuration reference",
        "Generated from the schema; `python -m trapo_jax.train --help all` prints the same descriptions. Defaults that "
        f"name a task apply to that `data.source` ({tasks}). [Configuration](../configuration.md) explains how to set "
        "fields.",
        "## Training",
        *_sections(Config),
        "## Evaluation",
        "These are the fields of `python -m trapo_jax.evaluate`. If a run is evaluated, its config provides the defaults.",
        *_sections(EvaluateConfig),
    ]
    return "\n\n".join(parts) + "\n"


def _sections(config_class: type) -> list[str]:
    by_section: dict[str, list[str]] = {}
    for field in list_fields(config_class):
        section, _, _ = field.name.rpartition(".")
        by_section.setdefault(section, []).append(
            f"`{field.name}` ({_escape(field.type)}; default {_escape(field.default)})\n"
            f": {_escape(field.sentence or '')}"
        )
    descriptions = list_sections(config_class)
    return [
        text
        for section, fields in by_section.items()
        for text in (f"### {section or 'The run'}", descriptions.get(section, ""), *fields)
        if text
    ]


def _escape(text: str) -> str:
    for character in "*_<`[":
        text = text.replace(character, f"\\{character}")
    return text
