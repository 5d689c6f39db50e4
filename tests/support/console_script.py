"""Runs the console script defined in pyproject.toml."""

import os
import tomllib

from support.commands import REPOSITORY, run_python


def run_console_script(folder, *arguments):
    """Runs `trapo ARGUMENTS` in a folder outside the repository, as if the package were installed."""
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    module, _, function = project["scripts"]["trapo"].partition(":")
    script = folder / "bin" / "trapo"
    script.parent.mkdir(exist_ok=True)
    script.write_text(f"import sys\nfrom {module} import {function}\nsys.exit({function}())\n")
    search_path = os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])
    return run_python(script, *arguments, cwd=folder, PYTHONPATH=search_path)
