"""Writes the report of one or more runs: a self-contained HTML file that can be opened offline.

The contents of run directories are not trusted. They are embedded as JSON and inserted into the document only as text.
The page's Content-Security-Policy allows only the scripts in `assets/report` and no network requests.
"""

import base64
import hashlib
import html
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from trapo_jax.config import Config, default_settings, flatten, read_yaml, run_near
from trapo_jax.inputs.files import shown
from trapo_jax.inputs.printable import printable
from trapo_jax.runs.directory import CONFIG, METRICS, REPORT, SAMPLES, write_atomically
from trapo_jax.runs.loggers import (
    EVAL,
    TEMPERATURE,
    TRAIN,
    describe_samples,
    is_shown,
    read_records,
)
from trapo_jax.types import UserError

# Maximum number of points per curve. If there are more steps, consecutive steps are averaged.
MAX_POINTS = 400
# Maximum size in bytes of the rollouts in a report. If they are larger, whole groups are omitted.
MAX_BYTES = 3_000_000
MAX_TOKENS = 1_500  # Maximum tokens per response; the middle of longer responses is omitted.
MAX_CHARACTERS = 20_000  # Maximum characters per string; the end of longer strings is omitted.
STYLES = ("uplot.min.css", "report.css")
SCRIPTS = ("uplot.min.js", "dom.js", "charts.js", "reader.js", "page.js")
# Exceptions that may be raised if the contents of a run directory are not what a run writes.
DAMAGED = (
    *(ArithmeticError, AttributeError, LookupError),
    *(OSError, RecursionError, TypeError, ValueError),
)
REWARD_PREFIX = "rewards/"  # Followed by a reward function's name; only runs with several functions have these metrics.
LEVEL_PREFIX = "guidance/level_"  # Followed by the index of a micro-group.
PLOTTED = (
    "reward/sampled_mean",
    "reward/unguided_mean",
    "reward/no_answer",
    "policy/entropy",
    "completion/len_mean",
    "completion/truncated",
    "guidance/ratio_mean",
    "batch/expert_trained_tokens",
    "expert/gradient_share_inside",
    *(f"expert/prob_from_{i / 10:.1f}" for i in range(10)),
    "time/sample_secs",
    "time/reward_secs",
    "time/train_secs",
    "time/tokens_per_sec",
)
CORE_SETTINGS = (  # Always shown. Other settings are shown if they differ from their defaults.
    "model.path",
    "data.source",
    "method.name",
    "method.preset",
    "train.num_steps",
    "train.problems_per_step",
    "train.learning_rate",
    "seed",
)


def write_report_of_run(folder: Path) -> str:
    """Writes the report of a run to its directory.

    Returns:
      An empty string, or a warning if the report cannot be written. A run is complete even without its report.
    """
    try:
        write_report([folder], folder / REPORT)
    except (OSError, UserError) as error:
        return f"warning: {folder / REPORT} was not written ({error})"
    return ""


def write_report(folders: Sequence[Path], out: Path) -> None:
    """Writes the report of one or more runs atomically.

    Args:
      folders: the run directories.
      out: path of the HTML file.

    Raises:
      UserError: if a folder is not a run directory, or a line in its logs is damaged.
      OSError: if the file cannot be written.
    """
    names = _short_names(folders)
    runs = [
        read_run(folder, name, max_bytes=MAX_BYTES // len(folders))
        for folder, name in zip(folders, names, strict=True)
    ]
    write_atomically(out, make_page({"runs": runs}, title=", ".join(names)))


def make_page(data: Mapping[str, Any], *, title: str) -> str:
    """Returns an HTML page that shows `data`; see `read_run` for the contents of `data["runs"]`."""
    assets = resources.files("trapo_jax") / "assets" / "report"
    style = "\n".join((assets / name).read_text() for name in STYLES)
    script = "\n".join((assets / name).read_text() for name in SCRIPTS)
    policy = (
        f"default-src 'none'; script-src {_content_hash(script)}; style-src {_content_hash(style)}; "
        "base-uri 'none'; form-action 'none'"
    )
    parts = {
        "policy": policy,
        "title": html.escape(printable(title)),
        "style": style,
        "script": script,
        "data": embedded_json(data),
    }
    pieces = (assets / "report.html").read_text().split("@@")
    return "".join(parts[piece] if i % 2 else piece for i, piece in enumerate(pieces))


def embedded_json(data: Any) -> str:
    """Returns JSON that is safe inside a script element: ASCII without `<`, `>`, `&` or invisible characters.

    >>> print(embedded_json("</script>\\u2028"))
    "\\u003c/script\\u003e\\\\u2028"
    """
    text = json.dumps(
        _make_visible(data), ensure_ascii=True, allow_nan=False, separators=(",", ":")
    )
    for character in "<>&":  # These characters occur only inside JSON strings.
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _make_visible(value: Any) -> Any:
    """Escapes control characters, bidirectional overrides and other invisible characters in all strings."""
    if isinstance(value, str):
        return printable(value, keep="\n\t")
    if isinstance(value, Mapping):
        return {printable(name): _make_visible(v) for name, v in value.items()}
    return [_make_visible(v) for v in value] if isinstance(value, list) else value


def _content_hash(text: str) -> str:
    """Returns the Content-Security-Policy source expression for an inline script or style."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _short_names(folders: Sequence[Path]) -> list[str]:
    """Returns the last component of each path if they are distinct, otherwise the full paths."""
    short = [folder.absolute().name for folder in folders]
    return short if len(set(short)) == len(short) else [str(folder) for folder in folders]


def read_run(folder: Path, name: str, *, max_bytes: int) -> dict[str, Any]:
    """Returns one run's part of the report as JSON-serializable data.

    Args:
      folder: the run directory.
      name: name of the run in the report.
      max_bytes: maximum size of the rollouts as JSON, in bytes.

    Raises:
      UserError: if the folder is not a run directory, or a line in its logs is damaged.
    """
    try:
        run = _read_run(folder, name, max_bytes)
        embedded_json(run)  # Raises for non-finite numbers and deeply nested values.
        return run
    except DAMAGED as error:
        raise UserError(
            f"{folder}: not a run directory written by this version of trapo_jax; config.yaml, metrics.jsonl or "
            f"samples.jsonl is missing or damaged ({shown(error)})"
        ) from error


def _read_run(folder: Path, name: str, max_bytes: int) -> dict[str, Any]:
    try:
        settings = flatten(read_yaml(folder / CONFIG))
    except UserError as error:
        raise UserError(
            f"{folder}: not a run directory written by this version of trapo_jax ({error}){run_near(folder)}"
        ) from error
    records = list(read_records(folder / METRICS))
    steps = [r for r in records if r["kind"] == TRAIN]
    evaluations = [r for r in records if r["kind"] == EVAL]
    tests = [r for r in evaluations if r["split"] == "test"]
    last = steps[-1]["step"] if steps else 0
    # The test split is evaluated before training, and again when the run is over.
    after = tests[-1] if len(tests) > 1 and tests[-1]["step"] == last else None
    num_steps = settings.get("train.num_steps", 0)
    if after:
        num_steps = last
    elif steps and (share := steps[-1].get("budget/progress")):
        num_steps = round(last / share)
    steps_per_point, columns = downsample(steps)
    samples, num_groups = read_samples(folder / SAMPLES, max_bytes=max_bytes)
    return {
        "name": name,
        "method": settings.get("method.name", ""),
        "step": last,
        "num_steps": num_steps,
        "complete": after is not None,
        "settings": {k: str(v) for k, v in settings.items()},
        "shown_settings": shown_settings(settings),
        "steps_per_point": steps_per_point,
        "columns": columns,
        "evaluations": [
            {
                "step": r["step"],
                "split": r["split"],
                "greedy": r["eval/accuracy_greedy"],
                "sampled": r["eval/accuracy_sampled"],
            }
            for r in evaluations
        ],
        "scores": score_rows(tests[0] if tests else {}, after or {}),
        "scored_samples": describe_samples(tests[0]) if tests and TEMPERATURE in tests[0] else "",
        "seconds": {
            "sampling": _total(steps, "time/sample_secs"),
            "rewards": _total(steps, "time/reward_secs"),
            "training": _total(steps, "time/train_secs"),
            "evaluating": _total(evaluations, "time/eval_secs"),
        },
        "tokens": {
            "trained": steps[-1]["tokens/trained"] if steps else 0,
            "sampled": steps[-1]["tokens/sampled"] if steps else 0,
        },
        "samples": samples,
        "num_groups": num_groups,
    }


def shown_settings(settings: Mapping[str, Any]) -> list[str]:
    """Returns the fields to show: `CORE_SETTINGS` and all fields that differ from their defaults."""
    defaults = default_settings(Config, settings)
    changed = [
        field
        for field, value in settings.items()
        if field != "output_dir" and defaults.get(field) != value
    ]
    return list(dict.fromkeys([*(f for f in CORE_SETTINGS if f in settings), *changed]))


def score_rows(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[list[Any]]:
    """Returns rows (name, before, after) with the accuracies and pass@k on the test split."""
    return [
        [name.removeprefix("eval/"), value, after.get(name)]
        for name, value in sorted(before.items())
        if is_shown(name)
    ]


def downsample(records: Sequence[Mapping[str, Any]]) -> tuple[int, dict[str, list[float | None]]]:
    """Averages consecutive steps so that a curve has at most `MAX_POINTS` points.

    Returns:
      The number of steps per point, and columns with one entry per point: the point's last step (`step`), and the mean
      of each plotted metric, or None if none of the steps has a value.
    """
    steps_per_point = max(1, math.ceil(len(records) / MAX_POINTS))
    blocks = [records[i : i + steps_per_point] for i in range(0, len(records), steps_per_point)]
    columns: dict[str, list[float | None]] = {"step": [block[-1]["step"] for block in blocks]}
    names = {name for record in records for name in record}
    levels = [name for name in names if name.startswith(LEVEL_PREFIX)]
    rewards = [name for name in names if name.startswith(REWARD_PREFIX)]
    by_level = sorted(levels, key=lambda name: int(name.removeprefix(LEVEL_PREFIX)))
    for name in (*PLOTTED, *by_level, *sorted(rewards)):
        values = ([r[name] for r in block if _has_value(name, r)] for block in blocks)
        columns[name] = [float(f"{np.mean(v):.4g}") if v else None for v in values]
    return steps_per_point, columns


def _has_value(name: str, record: Mapping[str, Any]) -> bool:
    """Returns whether a record has a meaningful value of a metric.

    Expert metrics are meaningful only if the step trained on at least one expert token.
    """
    return record.get(name) is not None and (
        not name.startswith("expert/") or record.get("batch/expert_trained_tokens", 0) > 0
    )


def read_samples(path: Path, *, max_bytes: int) -> tuple[list[dict[str, Any]], int]:
    """Reads evenly spaced rollout groups. A group consists of the rollouts of one problem in one step.

    Args:
      path: path of a samples.jsonl file.
      max_bytes: maximum size of the rollouts as JSON, in bytes. At least one group is read, even if it is larger.

    Returns:
      The rollouts, and the number of groups in the file.
    """
    if not path.exists():
        return [], 0
    sizes: dict[tuple[int, str], int] = {}
    for record in _rollouts(path):
        group = (record["step"], record["problem_id"])
        sizes[group] = sizes.get(group, 0) + len(json.dumps(record, separators=(",", ":")))
    kept = set(_choose_groups(list(sizes), sizes, max_bytes))
    rollouts = [r for r in _rollouts(path) if (r["step"], r["problem_id"]) in kept]
    return rollouts, len(sizes)


def _choose_groups(groups: Sequence[Any], sizes: Mapping[Any, int], max_bytes: int) -> list[Any]:
    """Returns evenly spaced groups of at most `max_bytes` in total, or only the last group if two groups do not fit."""
    number = len(groups)
    while number > 1:
        chosen = [groups[i] for i in np.linspace(0, len(groups) - 1, number).astype(int)]
        total = sum(sizes[group] for group in chosen)
        if total <= max_bytes:
            return chosen
        number = min(number - 1, int(number * max_bytes / total))
    return list(groups[-1:])


def _rollouts(path: Path) -> Iterator[dict[str, Any]]:
    """Yields the records of samples.jsonl in a shorter form.

    Long values are shortened. The prefix and the completion are omitted, because `tokens` contains the same text.
    """
    omitted = ("prefix", "completion")
    for number, record in enumerate(read_records(path), start=1):
        try:
            kept = {name: value for name, value in record.items() if name not in omitted}
            kept["step"], kept["problem_id"] = record["step"], record["problem_id"]
            kept["prompt"] = _cut_end(record["prompt"])
            kept["gold"] = _cut_end(record["gold"])
            tokens = record["tokens"]
            kept["num_tokens"] = len(tokens["kinds"])
            kept["tokens"] = {name: _cut_middle(values) for name, values in tokens.items()}
            kept["tokens"]["pieces"] = [_cut_end(p) for p in kept["tokens"]["pieces"]]
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"{path}, line {number}: not a rollout written by this version of trapo_jax"
            ) from error
        yield kept


def _cut_middle(values: Any) -> Any:
    """Removes the middle of a long string or list."""
    if len(values) <= MAX_TOKENS:
        return values
    return values[: MAX_TOKENS * 2 // 3] + values[-(MAX_TOKENS // 3) :]


def _cut_end(text: str) -> str:
    """Removes the end of a long string."""
    return text if len(text) <= MAX_CHARACTERS else text[:MAX_CHARACTERS] + " …"


def _total(records: Sequence[Mapping[str, Any]], name: str) -> float:
    return round(sum(r[name] for r in records), 2)
