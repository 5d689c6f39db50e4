"""Writes a report on one or more runs: a self-contained HTML file that can be viewed offline.

The runs may still be in progress.

    python -m trapo_jax.report RUN [RUN ...] [--out report.html]
"""

from collections.abc import Sequence
from pathlib import Path

from trapo_jax.inputs.printable import printable
from trapo_jax.runs.command_line import EXIT_USER_ERROR, ArgumentParser, command, fail, run_and_exit
from trapo_jax.runs.directory import REPORT
from trapo_jax.runs.report import write_report


@command
def main(arguments: Sequence[str]) -> int:
    parser = ArgumentParser(
        prog="python -m trapo_jax.report",
        description="Writes a report on one or more runs as an HTML file that can be viewed offline. All runs are "
        "plotted in the same charts.",
    )
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="a run directory")
    parser.add_argument(
        "--out",
        type=Path,
        help=f"the file to write (default: RUN/{REPORT}; for several runs, {REPORT} in the working directory)",
    )
    args = parser.parse_args(arguments)
    out = args.out or (args.runs[0] / REPORT if len(args.runs) == 1 else Path(REPORT))
    if out.suffix.lower() not in (".html", ".htm"):  # A typo must not overwrite another file.
        return fail(
            f"--out {out}: the report is an HTML file; choose a name that ends with .html",
            EXIT_USER_ERROR,
        )
    try:
        write_report(args.runs, out)
    except OSError as error:
        return fail(f"{out}: {error.strerror}; choose another --out", EXIT_USER_ERROR)
    print(f"wrote {printable(str(out))}")
    return 0


if __name__ == "__main__":
    run_and_exit(main)
