"""Executes a study of docs/protocol.md, or what remains of it, and writes its reports.

    python tools/run_benchmarks.py main [--jobs N] [--dry-run]

`benchmarks/studies.yaml` defines the studies: `main`, `ablation` and `map`. A run that is complete has a record in
`benchmarks/records` and is not repeated; one that was interrupted is resumed from its directory in `runs/benchmarks`.
The reports are in `benchmarks/reports`. `--dry-run` prints the commands instead.
"""

import argparse
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from trapo_jax import compare

ROOT = Path(__file__).parents[1]
STUDIES = ROOT / "benchmarks" / "studies.yaml"
RECORDS, REPORTS = Path("benchmarks/records"), Path("benchmarks/reports")
RUNS = Path("runs/benchmarks")
DEFAULT = "default"  # the comparison whose records several studies share


def load_studies(path: Path = STUDIES) -> dict[str, dict[str, list[str]]]:
    """Returns the arguments of `trapo_jax.compare` for each comparison of each study."""
    content = yaml.safe_load(path.read_text())
    return {
        study: {
            name: compare_arguments(study, name, comparison, content)
            for name, comparison in comparisons.items()
        }
        for study, comparisons in content["studies"].items()
    }


def compare_arguments(
    study: str, name: str, comparison: Mapping[str, Any], content: Mapping[str, Any]
) -> list[str]:
    """Returns the arguments of `trapo_jax.compare` for a comparison.

    Args:
      study: the name of its study.
      name: the name of the comparison, by which its records are kept.
      comparison: its methods, options and overrides.
      content: the file, with the options and overrides of all comparisons, and the sweeps of the methods.
    """
    common, methods = content["common"], comparison["methods"]
    report = REPORTS / (study if name == DEFAULT else f"{study}_{name}")
    options = {
        "methods": ",".join(methods),
        **common["options"],
        **comparison["options"],
        "records": RECORDS / name,
        "runs": RUNS / name,
        "out": report,
    }
    arguments = [text for key, value in options.items() for text in (f"--{key}", str(value))]
    for method in methods:
        for field, values in content["sweeps"][method].items():
            arguments += ["--sweep", f"{method}:{field}={','.join(map(_scalar, values))}"]
    overrides = {**common["overrides"], **comparison.get("overrides", {})}
    return [*arguments, *(f"{field}={_scalar(value)}" for field, value in overrides.items())]


def _scalar(value: Any) -> str:
    """Returns a value as YAML has it on one line."""
    return yaml.safe_dump(value).splitlines()[0]


def main(arguments: Sequence[str]) -> int:
    studies = load_studies()
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("study", choices=studies)
    parser.add_argument("--jobs", type=int, metavar="N", help="number of runs at a time")
    parser.add_argument("--dry-run", action="store_true", help="only print the commands")
    args = parser.parse_args(arguments)
    jobs = ["--jobs", str(args.jobs)] if args.jobs else []
    for command in studies[args.study].values():
        print(shlex.join(["python", "-m", "trapo_jax.compare", *command]), flush=True)
        if not args.dry_run and (code := compare.main([*command, *jobs])):
            return code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
