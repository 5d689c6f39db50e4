"""Executes the remaining runs of a study described in docs/protocol.md, and writes its reports.

    python tools/run_benchmarks.py main [--jobs N] [--dry-run]

`benchmarks/studies.yaml` defines the studies: `main`, `ablation` and `map`. A completed run has a record in
`benchmarks/records` and is not repeated; an interrupted run is resumed from its directory in `runs/benchmarks`. The
reports are written to `benchmarks/reports`. `--dry-run` prints the commands instead of executing them.
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
DEFAULT = "default"  # name of the comparison whose records are shared by several studies


def load_studies(path: Path = STUDIES) -> dict[str, dict[str, list[str]]]:
    """Returns the `trapo_jax.compare` arguments for each comparison of each study."""
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
    """Returns the `trapo_jax.compare` arguments for a comparison.

    Args:
      study: name of the study.
      name: name of the comparison, which is also the name of the folder with its records.
      comparison: methods, options and overrides of the comparison.
      content: contents of `studies.yaml`: the options and overrides shared by all comparisons, and the sweeps of each
        method.
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
    """Returns a value as one line of YAML."""
    return yaml.safe_dump(value).splitlines()[0]


def main(arguments: Sequence[str]) -> int:
    studies = load_studies()
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("study", choices=studies)
    parser.add_argument("--jobs", type=int, metavar="N", help="maximum number of concurrent runs")
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
