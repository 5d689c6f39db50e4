"""Builds the paper's test set: one Parquet file with several benchmarks, which are scored separately.

    python tools/prepare_benchmarks.py --out data/benchmarks.parquet
    python -m trapo_jax.evaluate model.path=DIR data.test_files=data/benchmarks.parquet data.template=qwen_math \
        rewards.functions=math 'evaluation.num_samples_by_source={aime*: 32, amc*: 32}'

    name            problems  default data, read from the Hub or from the local cache of `datasets`
    aime24                30  HuggingFaceH4/aime_2024#train
    aime25                30  math-ai/aime25#test
    amc                   83  AI-MO/aimo-validation-amc#train
    math500              500  HuggingFaceH4/MATH-500#test
    minerva              272  math-ai/minervamath#test
    olympiadbench        674  Hothan/OlympiadBench:OE_TO_maths_en_COMP#train
    arc_c              1,172  allenai/ai2_arc:ARC-Challenge#test
    mmlu_pro          12,032  TIGER-Lab/MMLU-Pro#test

`--benchmarks` selects a subset. `--data NAME=DATA` replaces a benchmark's default data with a local Parquet, JSONL or
Arrow file or a Hub id (`owner/name@revision:config#split`) in the same layout:

  aime24, aime25, amc, math500   problem, answer (text or a number)
  minerva                        question, answer
  olympiadbench                  question, final_answer (list of strings), context (optional)
  arc_c                          question, choices.text and choices.label (lists), answerKey
  mmlu_pro                       question, options (list), answer (letter)

The output is in verl's layout. The field `data_source` contains the name of the benchmark. Results are grouped by this
name, and the grader uses it to recognize multiple-choice problems (arc_c, mmlu_pro), which are graded by letter. A
multiple-choice prompt lists the options as A, B, ... and asks for the letter. The instruction to use \boxed{} must come
from the chat template (`data.template=qwen_math`) or from `data.prompt_suffix`. A report (`.json`) in the same folder
counts the problems that were kept and those that were dropped.
"""

import argparse
import string
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from trapo_jax.data.sources import Row, read_rows
from trapo_jax.runs.command_line import fail
from trapo_jax.types import UserError
from verl_rows import check_out, field, field_of, make_row, show_report, write_rows

LETTERS = string.ascii_uppercase[:10]  # the letters that the multiple-choice grader accepts
ASK_FOR_LETTER = "Answer with the letter of the correct option."


class Item(NamedTuple):
    """A benchmark problem. Problems with an empty question or answer are dropped."""

    question: str
    answer: str


class Benchmark(NamedTuple):
    """A benchmark's default data, and the function that reads its rows."""

    data: str
    read: Callable[[Row], Item]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=(__doc__ or ""), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--out", type=Path, required=True, help="the Parquet file to write; it must not exist")
    add(
        "--benchmarks",
        default=",".join(BENCHMARKS),
        metavar="NAME,...",
        help="benchmarks to include (default: all)",
    )
    add(
        "--data",
        action="append",
        default=[],
        metavar="NAME=DATA",
        help="file or Hub id to use instead of a benchmark's default; may be repeated",
    )
    args = parser.parse_args()
    try:
        report = prepare(args.out, args.benchmarks.split(","), parse_data(args.data))
    except UserError as error:
        return fail(str(error), 2)
    show_report(args.out, report)
    return 0


def parse_data(texts: Sequence[str]) -> dict[str, str]:
    """Parses arguments of the form `NAME=DATA` into a dict.

    Raises:
      UserError: if an argument does not have this form.
    """
    data = {}
    for text in texts:
        name, equals, entry = text.partition("=")
        if not (name and equals and entry):
            raise UserError(f"--data {text}: expected NAME=FILE or NAME=HUB_ID")
        data[name] = entry
    return data


def prepare(out: Path, names: Sequence[str], data: Mapping[str, str]) -> dict[str, int]:
    """Writes the problems of the given benchmarks and a report, and returns the report.

    Args:
      out: the Parquet file.
      names: names of the benchmarks, in the order of the output.
      data: files or Hub ids that replace the defaults, keyed by benchmark.

    Raises:
      UserError: if a name is unknown, or the data is missing, damaged or in another layout.
    """
    check_out(out)
    for option, given in (("--benchmarks", names), ("--data", data)):
        if unknown := [name for name in given if name not in BENCHMARKS]:
            raise UserError(
                f"{option} {unknown[0]}: unknown benchmark; choose from {', '.join(BENCHMARKS)}"
            )
    if unused := [name for name in data if name not in names]:
        raise UserError(
            f"--data {unused[0]}: not listed in --benchmarks {','.join(names)}; add it there"
        )
    counts: Counter[str] = Counter()
    rows: list[dict[str, Any]] = []
    for name in names:
        benchmark = BENCHMARKS[name]
        rows += read_benchmark(name, data.get(name, benchmark.data), benchmark.read, counts)
    write_rows(out, rows, counts)
    return dict(counts)


def read_benchmark(
    name: str, data: str, read: Callable[[Row], Item], counts: Counter[str]
) -> list[dict[str, Any]]:
    """Returns a benchmark's problems in verl's layout, and updates the counts of kept and dropped problems.

    Raises:
      UserError: if no problem remains.
    """
    rows = []
    seen: set[Item] = set()
    for row in read_rows([data], split="test"):
        item = read(row)
        if not (item.question and item.answer):
            counts[f"{name}: dropped, no question or answer"] += 1
        elif item in seen:
            counts[f"{name}: dropped, duplicate"] += 1
        else:
            rows.append(make_row(name, *item, index=len(rows), split="test"))
        seen.add(item)
    if not rows:
        raise UserError(f"{data}: no row has a question and an answer")
    counts[name] = len(rows)
    return rows


def read_problem(row: Row) -> Item:
    """Reads a row in the layout of AIME, AMC and MATH-500."""
    return Item(text_of(field_of(row, "problem")), text_of(field_of(row, "answer")))


def read_question(row: Row) -> Item:
    """Reads a row in the layout of Minerva."""
    return Item(text_of(field_of(row, "question")), text_of(field_of(row, "answer")))


def read_olympiad(row: Row) -> Item:
    """Reads a row in the layout of OlympiadBench, in which a problem may have a context and several answers."""
    answers = list_of(row, "final_answer", field_of(row, "final_answer"))
    parts = [text_of(row.values.get("context")), text_of(field_of(row, "question"))]
    return Item("\n\n".join(filter(None, parts)), ", ".join(map(text_of, answers)))


def read_arc(row: Row) -> Item:
    """Reads a row in the layout of ARC, in which options are labeled A, B, ... or 1, 2, ..."""
    choices = field_of(row, "choices")
    texts, labels = (
        list_of(row, f"choices.{name}", field(choices, name, row)) for name in ("text", "label")
    )
    key = field_of(row, "answerKey")
    if key not in labels or len(texts) != len(labels):
        raise wrong(row, "answerKey", "one of choices.label")
    return choose(row, texts, labels.index(key))


def read_mmlu_pro(row: Row) -> Item:
    """Reads a row in the layout of MMLU-Pro, in which the answer is an option's letter."""
    options, letter = list_of(row, "options", field_of(row, "options")), field_of(row, "answer")
    if not isinstance(letter, str) or letter not in tuple(LETTERS[: len(options)]):
        raise wrong(row, "answer", "the letter of one of the options")
    return choose(row, options, LETTERS.index(letter))


def choose(row: Row, options: Sequence[str], right: int) -> Item:
    """Returns a multiple-choice problem. Its prompt lists the options and asks for a letter.

    Args:
      row: the row, which contains the question.
      options: the options, at most ten.
      right: index of the correct option.
    """
    if len(options) > len(LETTERS):
        raise wrong(row, "options", f"a list of at most {len(LETTERS)} options")
    listed = [f"{letter}. {text_of(x)}" for letter, x in zip(LETTERS, options, strict=False)]
    question = text_of(field_of(row, "question"))
    return Item(question and "\n".join([question, "", *listed, "", ASK_FOR_LETTER]), LETTERS[right])


def text_of(value: Any) -> str:
    """Returns a string or number as a stripped string, and None as "".

    Whole numbers are written without a decimal point, because AMC's answers are floats such as 142.0.

    >>> text_of(142.0), text_of(2.5), text_of(" x "), text_of(None)
    ('142', '2.5', 'x', '')
    """
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return "" if value is None else str(value).strip()


def list_of(row: Row, name: str, value: Any) -> list[Any]:
    """Returns `value` if it is a list; otherwise, raises a `UserError` that names the field."""
    if not isinstance(value, list):
        raise wrong(row, name, "a list")
    return value


def wrong(row: Row, name: str, expected: str) -> UserError:
    """Returns the error for a field whose value is not as expected."""
    return UserError(
        f"{row.file}, row {row.number}: {name!r} is not {expected}; --help describes the layouts"
    )


BENCHMARKS: Mapping[str, Benchmark] = {
    "aime24": Benchmark("HuggingFaceH4/aime_2024#train", read_problem),
    "aime25": Benchmark("math-ai/aime25#test", read_problem),
    "amc": Benchmark("AI-MO/aimo-validation-amc#train", read_problem),
    "math500": Benchmark("HuggingFaceH4/MATH-500#test", read_problem),
    "minerva": Benchmark("math-ai/minervamath#test", read_question),
    "olympiadbench": Benchmark("Hothan/OlympiadBench:OE_TO_maths_en_COMP#train", read_olympiad),
    "arc_c": Benchmark("allenai/ai2_arc:ARC-Challenge#test", read_arc),
    "mmlu_pro": Benchmark("TIGER-Lab/MMLU-Pro#test", read_mmlu_pro),
}


if __name__ == "__main__":
    sys.exit(main())
