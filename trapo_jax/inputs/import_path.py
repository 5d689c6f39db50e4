"""Imports the objects that users specify by import paths of the form `package.module:name`."""

import difflib
import importlib
import os
import pkgutil
import re
import sys
import sysconfig
import traceback
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

from trapo_jax.types import UserError

IDENTIFIER = r"[^\W\d]\w*"
IMPORT_PATH = re.compile(rf"({IDENTIFIER}(?:\.{IDENTIFIER})*):({IDENTIFIER})")


def import_object(path: str, field: str) -> Any:
    """Imports the object at an import path.

    Modules in the working directory can also be imported, regardless of whether the command was started as
    `python -m trapo_jax.train` or through the console script. Importing a module runs its code, so never pass a path
    that was read from a model folder or a dataset.

    Args:
      path: `package.module:name`.
      field: the config field or option that contains the path, such as `sampling.engine`, for error messages.

    Returns:
      The attribute `name` of the module `package.module`.

    Raises:
      UserError: if `path` does not have this form, or the module cannot be found, raises an exception when imported,
        or has no such attribute. The message is one line.

    >>> import_object("math:hypot", "sampling.engine")(3, 4)
    5.0
    """
    match = IMPORT_PATH.fullmatch(path)
    if match is None or match[1].endswith(".py"):
        meant = did_you_mean_import(path)
        raise UserError(
            f"{field}={path}: expected an import path of the form package.module:name"
            + (f"; {meant}" if meant else "")
        )
    module = _import_module(match[1], f"{field}={path}")
    try:
        return getattr(module, match[2])
    except AttributeError as error:
        location = getattr(module, "__file__", None) or "built in"
        close = difflib.get_close_matches(match[2], vars(module), n=1)
        raise UserError(
            f"{field}={path}: module {match[1]} ({location}) does not define {match[2]!r}"
            + (f"; did you mean {close[0]}?" if close else "")
        ) from error


def suggest(name: str, known: Iterable[str]) -> str:
    """Returns a hint for an unknown value of a setting that accepts known names and import paths.

    >>> suggest("chatlm", ["none", "chat", "chatml"])
    'did you mean chatml?'
    >>> suggest("x", ["none", "chat"])
    "choose 'none', 'chat', or an import path of the form package.module:name"
    """
    known = list(known)
    close = difflib.get_close_matches(name, known, n=1)
    if hint := f"did you mean {close[0]}?" if close else did_you_mean_import(name):
        return hint
    return (
        f"choose {', '.join(map(repr, known))}, or an import path of the form package.module:name"
    )


def did_you_mean_import(name: str) -> str:
    """Returns a hint for a name that may be a misspelled import path, or "" if it does not resemble one.

    >>> did_you_mean_import("rewards.exact")
    'did you mean rewards:exact?'
    >>> did_you_mean_import("my/rewards.py:exact")
    'did you mean my.rewards:exact?'
    >>> did_you_mean_import("rewards.py")
    'did you mean rewards:NAME?'
    """
    module, colon, attribute = name.rpartition(":")
    if name.endswith(".py"):
        module, attribute = name, "NAME"
    elif not colon:
        module, _, attribute = name.rpartition(".")
    meant = f"{module.removesuffix('.py').replace('/', '.')}:{attribute}"
    return f"did you mean {meant}?" if IMPORT_PATH.fullmatch(meant) else ""


def search_beside(file: Path | None) -> None:
    """Appends the working directory and a config file's folder to the module search path, for `import_object`."""
    _search_working_directory()
    if file is not None and (folder := str(file.parent.resolve())) not in sys.path:
        sys.path.append(folder)


def _search_working_directory() -> None:
    folder = os.getcwd()
    if not {"", folder} & set(sys.path):
        sys.path.append(folder)  # at the end, so that it cannot shadow installed packages


def _searched_folders() -> list[str]:
    """Returns the folders of the module search path that are not part of the Python installation."""
    folders = dict.fromkeys([os.getcwd(), *filter(os.path.isdir, sys.path)])
    installed = sysconfig.get_paths()["stdlib"]
    return [
        folder
        for folder in folders
        if not folder.startswith(installed)
        and os.path.basename(folder) not in ("site-packages", "dist-packages")
    ]


def _did_you_mean_module(missing: str, setting: str) -> str:
    """Returns a hint that names the module or package closest to a missing one, or "" if none is close."""
    package, dot, leaf = missing.rpartition(".")
    folders = [os.path.join(folder, *package.split(".")) for folder in _searched_folders()]
    names = [module.name for module in pkgutil.iter_modules(folders)]
    close = difflib.get_close_matches(leaf, names, n=1, cutoff=0.75)
    if not close:
        return ""
    path = setting.partition("=")[2]
    return f"; did you mean {path.replace(missing, f'{package}{dot}{close[0]}', 1)}?"


def _import_module(name: str, setting: str) -> ModuleType:
    _search_working_directory()
    try:
        return importlib.import_module(name)
    except (Exception, SystemExit) as error:
        if isinstance(error, ModuleNotFoundError) and _is_or_contains(error.name, name):
            raise UserError(
                f"{setting}: no module {error.name!r} in {', '.join(_searched_folders())}, or among the installed "
                f"packages{_did_you_mean_module(error.name or name, setting)}"
            ) from error
        raise UserError(f"{setting}: importing {name} failed: {_describe(error)}") from error


def _is_or_contains(package: str | None, module: str) -> bool:
    """Returns whether `package` is the module or one of its parent packages."""
    return package is not None and f"{module}.".startswith(f"{package}.")


def _describe(error: BaseException) -> str:
    """Describes an exception on one line, including where it was raised."""
    message = " ".join(str(error).split())
    frame = traceback.extract_tb(error.__traceback__)[-1]
    text = f"{type(error).__name__}: {message}"
    # The message of a syntax error already contains the location.
    is_frozen = frame.filename.startswith("<frozen ")
    return text if is_frozen else f"{text} ({frame.filename}, line {frame.lineno})"
