"""Reads fields of dataset rows, and writes problems to a Parquet file in verl's layout, for the `prepare_*` tools."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trapo_jax.data.sources import Row
from trapo_jax.types import UserError


def make_row(source: str, question: str, answer: str, *, index: int, split: str) -> dict[str, Any]:
    """Returns a row whose prompt consists of the question as the only message.

    Args:
      source: the name by which results are grouped.
      question: text of the user message.
      answer: the reference answer.
      index: index of the row in its source.
      split: "train" or "test".
    """
    return {
        "data_source": source,
        "prompt": [{"role": "user", "content": question}],
        "ability": "math",
        "reward_model": {"ground_truth": answer, "style": "rule"},
        "extra_info": {"index": index, "split": split},
    }


def check_out(out: Path) -> None:
    """Checks that `out` ends in .parquet, and that neither the file nor its report exists.

    Raises:
      UserError: if a check fails.
    """
    if out.suffix != ".parquet":
        raise UserError(f"--out {out}: the name must end in .parquet")
    for path in (out, report_path(out)):
        if path.exists():
            raise UserError(f"{path}: already exists; choose another --out")


def write_rows(out: Path, rows: Sequence[Mapping[str, Any]], report: Mapping[str, int]) -> None:
    """Writes rows to a Parquet file, and a report to the same folder.

    Raises:
      UserError: if a file cannot be written.
    """
    import pyarrow as pa
    import pyarrow.parquet as parquet

    partial = out.with_name(out.name + ".partial")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        parquet.write_table(pa.Table.from_pylist(rows), partial, row_group_size=1000)
        os.replace(partial, out)
        report_path(out).write_text(json.dumps(report, indent=2) + "\n")
    except OSError as error:
        raise UserError(f"--out {out}: {error.strerror or error}") from error
    finally:
        partial.unlink(missing_ok=True)


def show_report(out: Path, report: Mapping[str, int]) -> None:
    """Prints the counts in a report and the paths of the files that were written."""
    width = max(map(len, report))
    for name, count in report.items():
        print(f"{name:{width}}  {count:>7,}")
    print(f"wrote {out} and {report_path(out)}")


def report_path(out: Path) -> Path:
    """Returns the path of a Parquet file's report."""
    return out.with_suffix(".json")


def field_of(row: Row, name: str) -> Any:
    """Returns the value of a row's column; see `field`."""
    return field(row.values, name, row)


def field(values: Any, name: str, row: Row) -> Any:
    """Returns the field `name` of an object in a row.

    Raises:
      UserError: if there is no such field.
    """
    if not isinstance(values, dict) or name not in values:
        raise UserError(
            f"{row.file}, row {row.number}: no field {name!r}; --help describes the layouts"
        )
    return values[name]
