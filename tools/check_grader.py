r"""Evaluates the math grader on the public data of QwenLM/Qwen2.5-Math.

    git clone https://github.com/QwenLM/Qwen2.5-Math
    python tools/check_grader.py --data Qwen2.5-Math/evaluation/data

The tool makes three measurements, and lists the cases with unexpected verdicts for each:

  forms     every gold answer of AIME 2024, AMC 2023, Minerva, OlympiadBench and (with --math500) MATH-500, written in
            ten or more forms (LaTeX, e-notation, units, a final period, a sentence, Unicode ...), all of them correct
  crossed   every gold answer, with 50 other gold answers from the same dataset as responses that should be judged wrong
  verdicts  the 800 responses with public verdicts in `eval_rm_maj_example`
"""

import argparse
import json
import random
import re
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from trapo_jax.rewards import GraderPool, grade_math
from trapo_jax.rewards.extraction import last_boxed
from trapo_jax.types import Problem, Verdict

NUM_OTHERS = 50
UNICODE = {
    **{r"\pi": "π", r"\times": "×", "-": "−", r"\infty": "∞", r"\leq": "≤"},
    **{"^{\\circ}": "°", "^\\circ": "°", r"\sqrt": "√"},
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=(__doc__ or ""), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--data", type=Path, required=True, help="the repository's folder evaluation/data"
    )
    parser.add_argument("--math500", type=Path, help="MATH-500 as a Parquet file in verl's layout")
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args()
    golds = read_golds(args.data)
    if args.math500:
        golds["math500"] = read_math500(args.math500)
    with GraderPool(grade_math, num_workers=args.workers, timeout_secs=30.0) as pool:
        for name, answers in golds.items():
            pairs = [(gold, form) for gold in answers for form in forms(gold)]
            report(
                f"{name}: {len(answers)} gold answers in several forms",
                grade(pool, pairs),
                Verdict.CORRECT,
            )
        for name, answers in golds.items():
            pairs = [(gold, rf"\boxed{{{other}}}") for gold, other in crossed(answers)]
            report(
                f"{name}: {NUM_OTHERS} other gold answers as responses",
                grade(pool, pairs),
                Verdict.WRONG,
            )
        check_verdicts(pool, args.data / "eval_rm_maj_example" / "math_cot_100.jsonl")


def read_golds(folder: Path) -> dict[str, list[str]]:
    """Reads the gold answers of each dataset."""
    rows = {
        name: read_lines(folder / name / "test.jsonl")
        for name in ("aime24", "amc23", "minerva_math", "olympiadbench")
    }
    return {
        "aime24": [str(row["answer"]) for row in rows["aime24"]],
        "amc23": [str(row["answer"]) for row in rows["amc23"]],
        "minerva_math": [
            (last_boxed(row["solution"]) or "").strip() for row in rows["minerva_math"]
        ],
        "olympiadbench": [row["final_answer"][0].strip("$") for row in rows["olympiadbench"]],
    }


def read_math500(file: Path) -> list[str]:
    import pyarrow.parquet as parquet

    return [row["reward_model"]["ground_truth"] for row in parquet.read_table(file).to_pylist()]


def read_lines(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def forms(gold: str) -> Iterator[str]:
    """Yields responses that state a gold answer in different ways."""
    yield rf"\boxed{{{gold}}}"
    yield rf"Thus $x = \boxed{{{gold}.}}$."
    yield f"so\n#### {gold}"
    yield rf"The answer is \({gold}\)."
    yield f"**Answer:** \\({gold}\\)"
    yield rf"\[\boxed{{\displaystyle {gold}}}\]"
    yield rf"\boxed{{ {gold.replace(chr(92) + 'frac', chr(92) + 'dfrac')} }}"
    yield rf"\boxed{{{gold.replace(' ', '')}}}" if "\\" not in gold else rf"\boxed{{{gold}}}"
    yield rf"The final answer is \boxed{{{in_unicode(gold)}}}. I hope it is correct."
    yield rf"\boxed{{{in_latex_notation(gold)}}}"
    if re.fullmatch(r"-?[\d.]+(e-?\d+)?", gold):
        yield rf"\boxed{{{gold} \text{{ cm}}}}"
        yield f"The answer is {gold} meters, which we round."


def in_unicode(gold: str) -> str:
    for latex, character in UNICODE.items():
        gold = gold.replace(latex, character)
    return gold


def in_latex_notation(gold: str) -> str:
    """Rewrites a gold answer: 2e5 as 2 x 10^5, a simple fraction with a slash, other single values as equations."""
    if match := re.fullmatch(r"(-?[\d.]+)e(-?\+?\d+)", gold):
        return rf"{match[1]} \times 10^{{{int(match[2])}}}"
    if match := re.fullmatch(r"\\frac\{(-?\d+)\}\{(\d+)\}", gold):
        return f"{match[1]}/{match[2]}"
    is_value = not re.search(r"[=,<>:]|\\in|\\le|\\ge|\\text", gold)
    return f"x = {gold}" if is_value else gold


def crossed(golds: list[str]) -> Iterator[tuple[str, str]]:
    """Yields pairs of different gold answers; every call yields the same pairs."""
    rng = random.Random(0)
    for gold in golds:
        others = [other for other in golds if other != gold]
        yield from ((gold, other) for other in rng.sample(others, min(NUM_OTHERS, len(others))))


def grade(pool: GraderPool, pairs: Iterable[tuple[str, str]]) -> list[tuple[str, str, Verdict]]:
    """Grades (gold answer, response) pairs."""
    futures = [(gold, text, pool.submit(text, Problem("", (), gold))) for gold, text in pairs]
    return [(gold, text, future.result().verdict) for gold, text, future in futures]


def report(title: str, graded: list[tuple[str, str, Verdict]], expected: Verdict) -> None:
    """Prints the number of expected verdicts, and all cases with unexpected verdicts."""
    others = [case for case in graded if case[2] is not expected]
    print(f"{title}: {len(graded) - len(others)} of {len(graded)} {expected}")
    for gold, text, verdict in sorted(set(others)):
        print(f"    {verdict}: gold {gold!r}, response {text!r}")


def check_verdicts(pool: GraderPool, file: Path) -> None:
    started = time.perf_counter()
    cases = [
        (row["gt"], code, bool(right))
        for row in read_lines(file)
        for code, right in zip(row["code"], row["score"], strict=True)
    ]
    graded = grade(pool, [(gold, text) for gold, text, _ in cases])
    differing = [
        (gold, text, right)
        for (gold, text, right), (_, _, verdict) in zip(cases, graded, strict=True)
        if (verdict is Verdict.CORRECT) != right
    ]
    seconds = time.perf_counter() - started
    print(f"public verdicts: {len(cases) - len(differing)} of {len(cases)} agree ({seconds:.1f} s)")
    for gold, text, right in differing:
        print(f"    public verdict {right}: gold {gold!r}, response ends {text[-120:]!r}")


if __name__ == "__main__":
    main()
