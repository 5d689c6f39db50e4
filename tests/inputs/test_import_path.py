"""Tests importing objects by import path (`package.module:name`), and one-line errors for mistakes."""

import subprocess
import sys

import pytest

from support.commands import REPOSITORY
from trapo_jax.inputs.import_path import import_object, search_beside
from trapo_jax.types import UserError


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Returns a working directory with user modules. As with `python -m`, it is on the module search path."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend("")
    (tmp_path / "user_module.py").write_text("ANSWER = 42\n")
    (tmp_path / "user_package").mkdir()
    (tmp_path / "user_package" / "inner.py").write_text("class Engine: ...\n")
    (tmp_path / "needs_more.py").write_text("import not_installed_anywhere\n")
    (tmp_path / "raises.py").write_text("\nraise ValueError('two\\nlines')\n")
    (tmp_path / "exits.py").write_text("import sys\nsys.exit('bye')\n")
    (tmp_path / "typo.py").write_text("def f(:\n")
    modules = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - modules:
        del sys.modules[name]


def error_line(path):
    with pytest.raises(UserError) as caught:
        import_object(path, "sampling.engine")
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_an_object_is_found_in_a_module_and_in_a_package(folder):
    assert import_object("user_module:ANSWER", "sampling.engine") == 42
    assert import_object("user_package.inner:Engine", "sampling.engine").__name__ == "Engine"


@pytest.mark.parametrize(
    "path",
    [
        "user_module.py:ANSWER",
        "",
        "jaxx",
        "user_module",
        "user_module:",
        ":ANSWER",
        "a.b.c",
        "a:b:c",
        "a/b.py:c",
        "a..b:c",
    ],
)
def test_other_forms_are_rejected(folder, path):
    expected = f"sampling.engine={path}: expected an import path of the form package.module:name"
    hints = {
        "user_module.py:ANSWER": "; did you mean user_module:ANSWER?",
        "a.b.c": "; did you mean a.b:c?",
        "a/b.py:c": "; did you mean a.b:c?",
    }
    assert error_line(path) == expected + hints.get(path, "")


@pytest.mark.parametrize(
    ("path", "missing"),
    [
        ("no_such_module:x", "no_such_module"),
        ("no_such_package.inner:x", "no_such_package"),
        ("user_package.other:x", "user_package.other"),
    ],
)
def test_a_missing_module_is_named(folder, path, missing):
    line = error_line(path)
    assert line.startswith(f"sampling.engine={path}: no module {missing!r} in {folder}")


def test_a_missing_attribute_is_named_with_its_file(folder):
    line = error_line("user_module:OTHER")
    assert str(folder / "user_module.py") in line
    assert line.endswith("does not define 'OTHER'")
    assert error_line("user_module:ANWSER").endswith("'ANWSER'; did you mean ANSWER?")


def test_the_error_for_a_misspelled_module_suggests_the_existing_one(folder):
    assert error_line("user_modul:ANSWER").endswith("packages; did you mean user_module:ANSWER?")
    line = error_line("user_package.innr:Engine")
    assert line.endswith("; did you mean user_package.inner:Engine?")


def test_the_folder_of_the_config_is_searched_and_named_in_the_error(folder, monkeypatch):
    beside = folder / "conf"
    beside.mkdir()
    (beside / "my_rewards.py").write_text("")
    monkeypatch.setattr(sys, "path", [*sys.path])
    search_beside(beside / "mine.yaml")
    line = error_line("my_reward:exact")
    assert f"{folder}, " in line
    assert f"{beside}, or among the installed packages; did you mean my_rewards:exact?" in line
    assert "site-packages" not in line


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        ("needs_more", "ModuleNotFoundError: No module named 'not_installed_anywhere'"),
        ("raises", "ValueError: two lines ("),
        ("exits", "SystemExit: bye ("),
        ("typo", "SyntaxError: "),
    ],
)
def test_an_exception_raised_by_the_imported_module_is_reported(folder, module, reason):
    line = error_line(f"{module}:x")
    assert line.startswith(f"sampling.engine={module}:x: importing {module} failed: {reason}")


def test_the_location_of_the_exception_is_reported(folder):
    assert error_line("raises:x").endswith(f"({folder / 'raises.py'}, line 2)")


def test_a_module_in_the_working_directory_is_found_without_python_m(folder):
    """For a console script, `sys.path` contains the script's folder instead of the working directory."""
    script = folder / "bin" / "command.py"
    script.parent.mkdir()
    script.write_text(
        f"import sys; sys.path.insert(0, {str(REPOSITORY)!r})\n"
        "from trapo_jax.inputs.import_path import import_object\n"
        "print(import_object('user_module:ANSWER', 'sampling.engine'))\n"
    )
    result = subprocess.run(
        [sys.executable, script], cwd=folder, capture_output=True, text=True, check=False
    )
    assert result.stdout == "42\n", result.stderr
