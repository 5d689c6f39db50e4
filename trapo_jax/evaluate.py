"""Scores a model on problems from files or the hub: avg@k, pass@k, majority vote, with intervals.

    python -m trapo_jax.evaluate --model DIR_OR_RUN --data valid.math.parquet --samples 32 --temperature 0.6

Every sample goes to samples.jsonl as soon as it is judged; the same command goes on where it was stopped.
"""

import argparse
import dataclasses
import hashlib
import json
import os
import time
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import jax
import numpy as np
import yaml

from trapo_jax.config import read_yaml
from trapo_jax.data import (
    COLUMN_PRESETS,
    Example,
    TemplateKind,
    encode_examples,
    examples_from_rows,
    make_template,
    read_rows,
)
from trapo_jax.evaluation.scoring import (
    Sample,
    Scores,
    make_sample,
    powers_of_2_up_to,
    score_samples,
    scores_by_source,
    shares_noise,
)
from trapo_jax.export import load_checkpoint
from trapo_jax.models import (
    DecoderConfig,
    Params,
    find_model,
    load_params,
    load_tokenizer,
    read_config,
    read_eos_ids,
    token_cost,
)
from trapo_jax.rewards import extract_choice, extract_math_answer, make_verifier
from trapo_jax.rollouts.actor import Actor
from trapo_jax.runs.command_line import EXIT_INTERRUPTED, EXIT_USER_ERROR, as_command, fail
from trapo_jax.runs.console import Console
from trapo_jax.runs.directory import check_run_folder, prepare_run_folder, write_atomically
from trapo_jax.sampling.engine import EngineSpec, make_engine
from trapo_jax.types import (
    Completion,
    Problem,
    RolloutRequest,
    SamplingParams,
    UserError,
    Verdict,
)

SAMPLES, SCORES, PLOT = "samples.jsonl", "scores.json", "pass_at_k.png"
NUM_CONTEXTS, PREFILL_TOKENS = 8, 512  # of the engine; problems come one after the other
NO_EFFECT_ON_SAMPLES = ("out", "num_slots", "segment_len", "workers")


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse(arguments)
    try:
        return run(args)
    except UserError as error:
        return fail(str(error), EXIT_USER_ERROR)
    except KeyboardInterrupt:
        return fail(
            f"stopped; what was judged is in {args.out / SAMPLES}, the same command goes on",
            EXIT_INTERRUPTED,
        )


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m trapo_jax.evaluate",
        description="Scores a model on problems from files or the hub.",
        epilog="Example: python -m trapo_jax.evaluate --model runs/mine --data math.parquet --samples 32",
    )
    add = parser.add_argument
    add("--model", required=True, metavar="DIR", help="Hugging Face folder, or a training run's")
    add("--data", required=True, nargs="+", metavar="FILE", help="parquet, JSONL, Arrow, hub id")
    add("--out", type=Path, help="folder for the results (default: evaluations/<model's name>)")
    add("--columns", choices=sorted(COLUMN_PRESETS), default="verl", help="layout of the rows")
    add(
        "--column",
        action="append",
        default=[],
        metavar="NAME=PATH",
        help="replaces one: prompt, answer, source, answer_marker",
    )
    add("--split", default="test", help="split of hub ids and saved folders (default test)")
    add("--limit", type=_positive, metavar="N", help="only the first N rows of each --data")
    add(
        "--template",
        choices=("none", "chat", "chatml", "qwen_math"),
        help="default: the run's; else the tokenizer's own, else chatml, or none for plain text",
    )
    add(
        "--verifier",
        choices=("by_source", "math", "multiple_choice", "card_shuffles"),
        default="by_source",
        help="what judges an answer (default by_source)",
    )
    add(
        "--samples",
        type=_positive,
        default=1,
        metavar="N",
        help="samples of each problem (default 1)",
    )
    add("--temperature", type=_temperature, default=0.6, help="0 is greedy (default 0.6)")
    add(
        "--top-p",
        type=_share,
        default=1.0,
        help="only the likeliest tokens that together have this probability (default 1: all)",
    )
    add("--top-k", type=_count, default=0, help="only so many of the likeliest (default 0: all)")
    add(
        "--max-prompt-length",
        type=_positive,
        default=1024,
        metavar="TOKENS",
        help="longer prompts are dropped and counted (default 1024)",
    )
    add(
        "--max-completion-length",
        type=_positive,
        default=2048,
        metavar="TOKENS",
        help="default 2048",
    )
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="of activations")
    add("--num-slots", type=_positive, default=32, help="rows decoded at once (default 32)")
    add("--segment-len", type=_positive, default=16, help="tokens between two looks at the queue")
    add("--workers", type=_positive, default=2, help="verifier processes (default 2)")
    add("--timeout-secs", type=float, default=5.0, help="limit for judging one answer (default 5)")
    add("--seed", type=int, default=0, help="of sampling (default 0)")
    args = parser.parse_args(arguments)
    if args.temperature == 0 and args.samples > 1:
        parser.error("--temperature 0 draws the same sample every time: --samples must be 1")
    args.out = args.out or Path("evaluations") / os.path.basename(os.path.abspath(args.model))
    return args


def run(args: argparse.Namespace) -> int:
    terminal = Console(1, first_step=0)
    model, run_config = resolve_model(args.model)
    settings = {k: v for k, v in vars(args).items() if k not in NO_EFFECT_ON_SAMPLES}
    settings["weights"] = weights_fingerprint(model.params)  # a run may have gone on since
    text = yaml.safe_dump(json.loads(json.dumps(settings, default=str)), sort_keys=True)
    check_run_folder(args.out, text)
    tokenizer: Any = load_tokenizer(model.folder)
    examples = read_examples(args, terminal)
    kind = args.template or run_config.get("data", {}).get("template")
    template = make_template(kind or default_template(examples, tokenizer), tokenizer)
    problems, report = encode_examples(
        examples, tokenizer, template=template, max_prompt_length=args.max_prompt_length
    )
    terminal.say(f"template {template.kind}; problems: {report}")
    prepare_run_folder(args.out, text)
    samples = sample_all(args, model, tokenizer, problems, terminal)
    by_source = scores_by_source(samples)
    overall = score_samples(samples)
    write_results(args.out, overall, by_source, settings | {"template": template.hash})
    print_table(terminal, overall, by_source)
    terminal.say(f"{args.out}: {SCORES}, {PLOT}, and {SAMPLES} to read")
    return 0


@dataclasses.dataclass(frozen=True)
class Model:
    """A model to evaluate: where its tokenizer lies, its shape and its parameters."""

    folder: Path
    decoder: DecoderConfig
    params: Params


def resolve_model(name: str) -> tuple[Model, dict[str, Any]]:
    """A Hugging Face folder, or of a training run the exported model, else its newest checkpoint; and
    the run's config if it is one."""
    folder = Path(name).expanduser()
    saved = folder / "config.yaml"
    if not saved.is_file():
        source = find_model(name)
        decoder = read_config(source)
        return Model(source, decoder, load_params(source, decoder)), {}
    run_config = read_yaml(saved)
    if (folder / "hf").is_dir():
        source = folder / "hf"
        decoder = read_config(source)
        return Model(source, decoder, load_params(source, decoder)), run_config
    steps = [p for p in folder.glob("checkpoints/*") if p.name.isdecimal()]
    if not steps:
        raise UserError(f"--model {name}: a run without a checkpoint yet")
    params, decoder, source = load_checkpoint(max(steps, key=lambda p: int(p.name)))
    return Model(source, decoder, params), run_config


def weights_fingerprint(params: Params) -> str:
    """Of a few numbers of every parameter: training changes them all."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]:
        digest.update(jax.tree_util.keystr(path).encode())
        digest.update(np.asarray(leaf[(0,) * (leaf.ndim - 1)][:64], np.float32).tobytes())
    return digest.hexdigest()[:12]


def default_template(examples: Sequence[Example], tokenizer: Any) -> TemplateKind:
    """The tokenizer's own; where it has none, ChatML for chat messages and nothing for plain text."""
    if tokenizer.chat_template:
        return "chat"
    return "none" if all(isinstance(example.prompt, str) for example in examples) else "chatml"


def read_examples(args: argparse.Namespace, terminal: Console) -> list[Example]:
    """The examples of all `--data`; says what became of the rows of each."""
    replaced = dict(_column(text) for text in args.column)
    columns = dataclasses.replace(COLUMN_PRESETS[args.columns], solutions=(), **replaced)
    examples = []
    for entry in args.data:
        rows = islice(read_rows([entry], split=args.split), args.limit)
        found, report = examples_from_rows(rows, columns, default_source=Path(entry).stem)
        examples += found
        terminal.say(f"{entry}: {dataclasses.replace(report, notes={})}")
    return examples


def sample_all(
    args: argparse.Namespace,
    model: Model,
    tokenizer: Any,
    problems: Sequence[Problem],
    terminal: Console,
) -> list[Sample]:
    """Samples and judges what is not in samples.jsonl yet; returns all of it."""
    path = args.out / SAMPLES
    records = read_records(path)
    wanted = {(p.id, j): RolloutRequest(p, j) for p in problems for j in range(args.samples)}
    done = {(r["problem_id"], r["sample_index"]) for r in records}
    requests = [request for key, request in wanted.items() if key not in done]
    if done:
        terminal.say(f"going on after {len(done)} of {len(wanted)} samples in {path}")
    spec = EngineSpec(
        decoder=dataclasses.replace(model.decoder, dtype=args.dtype),
        model_folder=model.folder,
        num_slots=min(args.num_slots, len(wanted)),
        max_prompt_length=args.max_prompt_length,
        max_completion_length=args.max_completion_length,
        segment_len=args.segment_len,
        num_contexts=NUM_CONTEXTS,
        prefill_tokens=PREFILL_TOKENS,
        eos_ids=read_eos_ids(model.folder, tokenizer.eos_token_id),
        seed=args.seed,
        with_truncation=args.top_p < 1 or args.top_k > 0,
    )
    verifier = make_verifier(
        args.verifier,
        eos_text=tokenizer.eos_token,
        num_workers=args.workers,
        timeout_secs=args.timeout_secs,
    )
    progress = Progress(len(requests), terminal)
    actor = Actor(
        make_engine("jax", spec),
        verifier,
        tokenizer.decode,
        None,
        max_completion_length=args.max_completion_length,
        temperature=1.0,
        max_error_rate=1.0,
        token_cost=token_cost(model.decoder),
    )
    with (
        actor,
        actor.sampler(model.params) as sample,
        open(path, "a", encoding="utf-8") as file,
    ):
        params = SamplingParams(args.temperature, args.top_p, args.top_k)
        for completion, verdict in sample(requests, params):
            record = make_record(completion, verdict, tokenizer)
            records.append(record)
            file.write(json.dumps(record) + "\n")
            file.flush()
            progress.advance(completion, verdict)
    warn_of_shared_noise(records, terminal)
    by_key = {(r["problem_id"], r["sample_index"]): r for r in records}
    return [sample_of(by_key[key]) for key in wanted]


def make_record(completion: Completion, verdict: Verdict, tokenizer: Any) -> dict[str, Any]:
    """A line of samples.jsonl."""
    problem = completion.request.problem
    text = tokenizer.decode(completion.token_ids)
    answer = extract_math_answer(text) or extract_choice(text)
    sample = make_sample(completion, verdict, answer)
    return {
        **sample._asdict(),
        "sample_index": completion.request.sample_index,
        "prompt": problem.prompt_text,
        "completion": text,
        "gold": problem.answer,
        "token_ids": completion.token_ids,
    }


def sample_of(record: dict[str, Any]) -> Sample:
    fields = {name: record[name] for name in Sample._fields}
    return Sample(**{**fields, "verdict": Verdict(record["verdict"])})


def read_records(path: Path) -> list[dict[str, Any]]:
    """The lines of samples.jsonl; a last one that was cut short is removed from the file."""
    if not path.is_file():
        return []
    text = path.read_bytes()
    whole = text[: text.rfind(b"\n") + 1]
    if len(whole) < len(text):
        with open(path, "r+b") as file:
            file.truncate(len(whole))
    try:
        return [json.loads(line) for line in whole.splitlines()]
    except ValueError as error:
        raise UserError(f"{path}: not the samples of an evaluation ({error})") from error


def warn_of_shared_noise(records: Sequence[dict[str, Any]], terminal: Console) -> None:
    """Every sample has its own random key; should two share one, the scores would lie."""
    groups: dict[str, list] = {}
    for record in records:
        groups.setdefault(record["problem_id"], []).append(
            (tuple(record["token_ids"]), record["logprob"])
        )
    if count := sum(map(shares_noise, groups.values())):
        terminal.say(
            f"warning: {count} of {len(groups)} problems have equal samples that are too unlikely to be "
            "drawn twice; their random keys were the same"
        )


class Progress:
    """Says how far the sampling is: a line every few percent, or every 30 seconds."""

    def __init__(self, total: int, terminal: Console):
        self._total, self._terminal = total, terminal
        self._done = self._correct = self._tokens = 0
        self._started = self._last = time.monotonic()

    def advance(self, completion: Completion, verdict: Verdict) -> None:
        self._done += 1
        self._correct += verdict is Verdict.CORRECT
        self._tokens += len(completion.token_ids)
        now = time.monotonic()
        every = max(1, self._total // 20)
        if self._done % every and self._done != self._total and now - self._last < 30:
            return
        self._last = now
        elapsed = now - self._started
        left = elapsed / self._done * (self._total - self._done)
        self._terminal.say(
            f"sample {self._done}/{self._total}  correct {self._correct / self._done:.3f}  "
            f"{self._tokens / elapsed:,.0f} tokens/s  {left:.0f} s left"
        )


def write_results(
    folder: Path, overall: Scores, by_source: dict[str, Scores], settings: dict[str, Any]
) -> None:
    data = {
        "settings": json.loads(json.dumps(settings, default=str)),
        "overall": dataclasses.asdict(overall),
        "by_source": {name: dataclasses.asdict(scores) for name, scores in by_source.items()},
        "devices": str(jax.devices()[0].device_kind),
    }
    write_atomically(folder / SCORES, json.dumps(data, indent=2) + "\n")
    plot_pass_at_k(folder / PLOT, overall, by_source)


def plot_pass_at_k(path: Path, overall: Scores, by_source: dict[str, Scores]) -> None:
    from matplotlib.figure import Figure  # seconds to import

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    curves = {"all": overall, **(by_source if len(by_source) > 1 else {})}
    for (name, scores), marker in zip(curves.items(), "osD^v<>ph*X" * len(curves), strict=False):
        k = range(1, scores.num_samples + 1)
        axes.plot(k, scores.pass_at_k, marker=marker, markersize=4, label=name)
    axes.set_xscale("log", base=2)
    ticks = powers_of_2_up_to(overall.num_samples)
    axes.set_xticks(ticks, [str(k) for k in ticks])
    axes.set(xlabel="k, samples of a problem", ylabel="pass@k (share of problems)", ylim=(0, 1))
    axes.set_title(f"One of k samples is right ({overall.num_problems} problems)")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)


def print_table(terminal: Console, overall: Scores, by_source: dict[str, Scores]) -> None:
    n = overall.num_samples
    header = [
        "",
        "problems",
        f"avg@{n}",
        "95 %",
        f"pass@{n}",
        "majority",
        "truncated",
        "no verdict",
    ]
    rows = [
        [
            name,
            f"{s.num_problems:,}",
            f"{s.accuracy:.3f}",
            f"{s.interval[0]:.3f} - {s.interval[1]:.3f}",
            f"{s.pass_at_k[-1]:.3f}",
            f"{s.majority:.3f}",
            f"{s.truncated:.3f}",
            f"{s.error_rate + s.timeout_rate:.3f}",
        ]
        for name, s in [*(by_source.items() if len(by_source) > 1 else []), ("all", overall)]
    ]
    terminal.table("scores", header, rows)


def _column(text: str) -> tuple[str, str]:
    name, equals, path = text.partition("=")
    known = ("prompt", "answer", "source", "answer_marker")
    if not equals or name not in known:
        raise UserError(f"--column {text}: not NAME=PATH with NAME one of {', '.join(known)}")
    return name, path


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number >= 1")
    return int(text)


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number >= 0")
    return int(text)


def _temperature(text: str) -> float:
    value = _number(text)
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number >= 0")
    return value


def _share(text: str) -> float:
    value = _number(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0 and up to 1")
    return value


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return float("nan")


if __name__ == "__main__":
    as_command(main)
