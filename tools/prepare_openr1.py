"""Builds the paper's training set: OpenR1-Math-46k-8192 with second solutions from OpenR1-Math-220k.

    python tools/prepare_openr1.py --out data/openr1_46k_two_experts.parquet
    python -m trapo_jax.train data.source=files data.train_files=data/openr1_46k_two_experts.parquet \\
        data.columns.preset=verl data.template=qwen_math rewards.functions=[math] ...

Every solution is graded with the grader used in training. Only the part that is trained on (`--expert-part`) is graded:
the thought for TRAPO, or the whole text for LUFFY, ReLIFT and HPT. A problem keeps at most two correct solutions,
preferably from the first dataset. Problems without a correct solution are dropped. The output is a Parquet file in
verl's layout, with a report (`.json`) in the same folder that counts the dropped problems and solutions by reason.

`--problems` and `--solutions` are Hub ids (a download of 12 GB in total) or local Parquet, JSONL or Arrow files in
these layouts:

  problems   prompt (chat messages), target (chat messages), reward_model.ground_truth, data_source
  solutions  problem, generations (list of strings), is_reasoning_complete (list of booleans)
"""

import argparse
import dataclasses
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, wait
from pathlib import Path
from typing import Any, get_args

from trapo_jax.data.columns import expert_text
from trapo_jax.data.sources import Row, read_rows
from trapo_jax.rewards import Grader, make_grader
from trapo_jax.runs.command_line import fail
from trapo_jax.types import ExpertPart, Grade, Problem, UserError, Verdict
from verl_rows import check_out, field, field_of, make_row, show_report, write_rows

PROBLEMS = "Elliott/Openr1-Math-46k-8192"
SOLUTIONS = "open-r1/OpenR1-Math-220k:all"
SOLUTIONS_SPLITS = ("default", "extended")
MAX_EXPERTS = 2
MAX_PENDING = 256  # maximum number of solutions graded concurrently
PROGRESS_SECS = 10.0


@dataclasses.dataclass
class Entry:
    """A problem and its candidate solutions."""

    question: str
    answer: str
    source: str
    candidates: list[str]  # solutions in order of preference
    num_first: int  # number of candidates from the first dataset


def main() -> int:
    parser = argparse.ArgumentParser(
        description=(__doc__ or ""), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", type=Path, required=True, help="the Parquet file to write; it must not exist"
    )
    parser.add_argument("--problems", default=PROBLEMS, help=f"first dataset (default {PROBLEMS})")
    parser.add_argument(
        "--solutions", default=SOLUTIONS, help=f"second dataset (default {SOLUTIONS})"
    )
    parser.add_argument(
        "--workers", type=int, default=os.cpu_count(), help="number of grader processes"
    )
    parser.add_argument(
        "--expert-part",
        choices=get_args(ExpertPart),
        default="thought",
        help="the part of a solution to train on and to grade (default thought)",
    )
    parser.add_argument(
        "--timeout-secs", type=float, default=5.0, help="time limit for grading a solution"
    )
    args = parser.parse_args()
    try:
        report = prepare(
            args.out,
            args.problems,
            args.solutions,
            args.workers,
            args.timeout_secs,
            args.expert_part,
        )
    except UserError as error:
        return fail(str(error), 2)
    show_report(args.out, report)
    return 0


def prepare(
    out: Path,
    problems: str,
    solutions: str,
    num_workers: int,
    timeout_secs: float,
    expert_part: ExpertPart = "thought",
) -> dict[str, int]:
    """Writes the dataset and its report, and returns the report.

    Raises:
      UserError: if the data is missing, damaged or in another layout, or if no problem remains.
    """
    check_out(out)
    counts: Counter[str] = Counter()
    entries = read_problems(problems, counts)
    add_solutions(entries, solutions, counts)
    with make_grader(
        ["math"],
        num_workers=num_workers,
        timeout_secs=timeout_secs,
    ) as grader:
        verdicts = grade(grader, entries.values(), expert_part)
    num_correct = sum(verdict is Verdict.CORRECT for verdict in verdicts.values())
    counts["solutions graded"] = len(verdicts)
    counts["solutions graded: correct"] = num_correct
    rows = list(finished_rows(entries.values(), verdicts, counts))
    if not rows:
        raise UserError(f"no problem has a correct solution: {json.dumps(counts)}")
    counts["problems written"] = len(rows)
    write_rows(out, rows, counts)
    return dict(counts)


def read_problems(data: str, counts: Counter[str]) -> dict[str, Entry]:
    """Reads the first dataset. Returns its problems, keyed by their questions without whitespace."""
    entries: dict[str, Entry] = {}
    for row in read_rows([data]):
        counts["problems read"] += 1
        question = last_content(row, "prompt")
        answer = field(field_of(row, "reward_model"), "ground_truth", row)
        solution = last_content(row, "target") if row.values.get("target") else ""
        if not question or not isinstance(answer, str) or not answer.strip():
            counts["problems dropped: empty question or answer"] += 1
        elif key(question) in entries:
            counts["problems dropped: duplicate question"] += 1
        else:
            source = row.values.get("data_source") or "openr1"
            candidates = [solution] if solution else []
            entries[key(question)] = Entry(question, answer, source, candidates, len(candidates))
    return entries


def add_solutions(entries: dict[str, Entry], data: str, counts: Counter[str]) -> None:
    """Appends the complete solutions from the second dataset, in dataset order, to the candidates for the matching problems."""
    matched: set[str] = set()
    for row in second_set(data):
        question = field_of(row, "problem")
        entry = entries.get(key(question)) if isinstance(question, str) else None
        if entry is None:
            continue
        matched.add(key(entry.question))
        generations = field_of(row, "generations") or []
        complete = row.values.get("is_reasoning_complete") or [True] * len(generations)
        for text, is_complete in zip(generations, complete, strict=False):
            if not is_complete or not text:
                counts["second solutions dropped: incomplete"] += 1
            elif expert_text(text) in map(expert_text, entry.candidates):
                counts["second solutions dropped: duplicate"] += 1
            else:
                entry.candidates.append(text)
    counts["problems in both sets"] = len(matched)


def second_set(data: str) -> Iterator[Row]:
    """Yields the rows of the second dataset."""
    if data != SOLUTIONS:
        yield from read_rows([data])
        return
    for split in SOLUTIONS_SPLITS:
        yield from read_rows([data], split=split)


def grade(grader: Grader, entries: Iterable[Entry], expert_part: ExpertPart) -> dict[str, Verdict]:
    """Grades the candidates of each problem in order, until two of them are correct."""
    verdicts: dict[str, Verdict] = {}
    remaining = list(entries)
    total, started, last_report = len(remaining), time.monotonic(), time.monotonic()
    pending: dict[Future[Grade], tuple[Entry, int, int]] = {}
    remaining.reverse()

    def submit(entry: Entry, index: int, num_correct: int) -> None:
        if num_correct < MAX_EXPERTS and index < len(entry.candidates):
            problem = Problem("", (), entry.answer)
            text = expert_text(entry.candidates[index], expert_part)
            pending[grader.submit(text, problem)] = (entry, index, num_correct)

    while remaining or pending:
        while remaining and len(pending) < MAX_PENDING:
            submit(remaining.pop(), 0, 0)
        done = wait(pending, return_when=FIRST_COMPLETED).done if pending else ()
        for future in done:
            entry, index, num_correct = pending.pop(future)
            judgment = future.result().judgments["math"]
            verdict = verdicts[entry.candidates[index]] = judgment.verdict
            submit(entry, index + 1, num_correct + (verdict is Verdict.CORRECT))
        if time.monotonic() - last_report > PROGRESS_SECS:
            last_report = time.monotonic()
            rate = (total - len(remaining)) / (last_report - started)
            left = len(remaining) / rate
            print(
                f"graded {total - len(remaining)} of {total} problems, {rate:.0f}/s, {left:.0f} s left"
            )
    return verdicts


def finished_rows(
    entries: Iterable[Entry], verdicts: dict[str, Verdict], counts: Counter[str]
) -> Iterator[dict[str, Any]]:
    """Yields rows in verl's layout for problems with a correct solution, and counts what is kept and dropped."""
    for index, entry in enumerate(entries):
        correct = []
        for i, text in enumerate(entry.candidates):
            verdict = verdicts.get(text)
            if verdict is Verdict.CORRECT and len(correct) < MAX_EXPERTS:
                correct.append(text)
            elif verdict not in (None, Verdict.CORRECT):
                which = "first" if i < entry.num_first else "second"
                counts[f"{which} solutions dropped: {verdict}"] += 1
        if not correct:
            counts["problems dropped: no correct solution"] += 1
            continue
        counts[f"problems with {len(correct)} solution{'s' * (len(correct) > 1)}"] += 1
        row = make_row(entry.source, entry.question, entry.answer, index=index, split="train")
        row["target"] = [{"role": "assistant", "content": correct[0]}]
        row["extra_info"]["answer_list"] = correct
        yield row


def key(question: str) -> str:
    """Returns the question without whitespace."""
    return "".join(question.split())


def last_content(row: Row, name: str) -> str:
    """Returns the text of the last message in a chat."""
    messages = field_of(row, name)
    if not isinstance(messages, list) or not messages:
        raise UserError(f"{row.file}, row {row.number}: {name!r} is not a list of chat messages")
    content = field(messages[-1], "content", row)
    if not isinstance(content, str):
        raise UserError(
            f"{row.file}, row {row.number}: {name!r}: the content of the last message is not text"
        )
    return content.strip()


if __name__ == "__main__":
    sys.exit(main())
