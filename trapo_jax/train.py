"""Trains a policy: the one file that sees every room.

    python -m trapo_jax.train [--config FILE] [FIELD=VALUE ...]

config -> data -> scheduler -> sampler -> rewards -> advantages -> batch -> train step -> checkpoint, metrics
"""

import dataclasses
import json
import os
import signal
import sys
import time
from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path
from statistics import fmean
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import Mesh

from trapo_jax.advantages import group_advantages
from trapo_jax.batch import balance, build_batch, count_kinds
from trapo_jax.checkpoint import CheckpointStore, abstract_like
from trapo_jax.config import Config, config_from_command_line
from trapo_jax.data import load_tokenizer, problem_batches
from trapo_jax.evaluation import evaluate
from trapo_jax.methods import Method, make_method
from trapo_jax.metrics import EVAL, TRAIN, RunLog, Terminal, fail, read_metrics
from trapo_jax.models import (
    DecoderConfig,
    abstract_params,
    export_model,
    find_model,
    load_params,
    read_config,
    read_eos_ids,
)
from trapo_jax.rewards import Verifier, make_verifier
from trapo_jax.rollouts import collect_rollouts
from trapo_jax.run_folder import (
    check_run_folder,
    only_process_in,
    prepare_run_folder,
    write_atomically,
)
from trapo_jax.sampling import JaxEngine
from trapo_jax.scheduler import Scheduler
from trapo_jax.sharding import make_mesh, num_batch_shards, replicated
from trapo_jax.splits import load_splits
from trapo_jax.train_step import (
    TrainState,
    TrainStep,
    init_state,
    make_optimizer,
    make_train_step,
    state_shardings,
)
from trapo_jax.types import Completion, Problem, Rollout, SamplingParams, UserError, Verdict

ABOUT = "Trains a language model with TRAPO, GRPO or SFT; a run that is there already is resumed."
DATA = "data.json"  # what the run trains on: fingerprint, template, what was dropped
SUMMARY = "summary.json"  # written last: marks a run as complete
EXIT_USER_ERROR, EXIT_TRAINING_FAILED = 2, 1


class TrainingFailed(Exception):
    """The run cannot go on; what was committed stays."""


@dataclasses.dataclass(frozen=True)
class Parts:
    """Everything a run is made of, built once from the config."""

    config: Config
    method: Method
    model_folder: Path
    decoder: DecoderConfig
    tokenizer: Any
    splits: dict[str, list[Problem]]
    data_summary: dict[str, Any]  # goes to data.json
    scheduler: Scheduler
    engine: JaxEngine
    verifier: Verifier
    optimizer: optax.GradientTransformation
    mesh: Mesh
    shardings: TrainState
    train_step: TrainStep

    def score(self, completion: Completion) -> Future[Verdict]:
        """The verdict, now or later, on a completion's whole response, special tokens spelled out."""
        ids = (*completion.request.prefix_ids, *completion.token_ids)
        return self.verifier.submit(self.tokenizer.decode(ids), completion.request.problem)


@dataclasses.dataclass
class Counters:
    """Cumulative over the run; part of the checkpoint."""

    tokens_trained: int = 0
    tokens_sampled: int = 0
    problems_seen: int = 0


def main(arguments: Sequence[str] | None = None) -> int:
    try:
        config = config_from_command_line(
            "train", ABOUT, sys.argv[1:] if arguments is None else arguments
        )
        folder = Path(config.output_dir)
        check_run_folder(folder, config.to_yaml())
        if (folder / SUMMARY).exists():
            return show_complete(folder, config)
        parts, params = build(config)
        prepare_run_folder(folder, config.to_yaml())
        with only_process_in(folder):
            if not (folder / DATA).exists():
                write_atomically(folder / DATA, json.dumps(parts.data_summary, indent=2) + "\n")
            return run(parts, params, folder)
    except UserError as error:
        return fail(str(error), EXIT_USER_ERROR)
    except TrainingFailed as error:
        return fail(str(error), EXIT_TRAINING_FAILED)


def build(config: Config) -> tuple[Parts, Any]:
    """Builds every part from the config; returns them and the model's initial parameters."""
    model_folder = find_model(config.model.path)
    decoder = read_config(
        model_folder,
        dtype=config.model.dtype,
        remat=config.model.remat,
        attention=config.model.attention,
    )
    tokenizer: Any = load_tokenizer(model_folder)
    d, s, t, m = config.data, config.sampling, config.train, config.method
    splits, data_summary = load_splits(d, tokenizer)
    method = make_method(
        m.name,
        preset=m.preset,
        alpha=m.alpha,
        expert_weight=m.expert_weight,
        normalizer=m.normalizer,
    )
    mesh = make_mesh(data=config.mesh.data, fsdp=config.mesh.fsdp, tp=config.mesh.tp)
    optimizer = make_optimizer(
        learning_rate=t.learning_rate,
        warmup_steps=t.warmup_steps,
        num_steps=t.num_steps,
        decay_start=t.decay_start,
        final_learning_rate_ratio=t.final_learning_rate_ratio,
        adam_b1=t.adam_b1,
        adam_b2=t.adam_b2,
        weight_decay=t.weight_decay,
        max_grad_norm=t.max_grad_norm,
        name=t.optimizer,
        muon_beta=t.muon_beta,
    )
    shardings = state_shardings(abstract_params(decoder), optimizer, mesh)
    params = load_params(model_folder, decoder, shardings.params)
    parts = Parts(
        config=config,
        method=method,
        model_folder=model_folder,
        decoder=decoder,
        tokenizer=tokenizer,
        splits=splits,
        data_summary=data_summary,
        scheduler=Scheduler(
            method.micro_groups,
            s.max_completion_length,
            method.prefix_boundary,
            method.second_expert_last,
        ),
        engine=JaxEngine(
            decoder,
            num_slots=s.num_slots,
            max_prompt_length=d.max_prompt_length,
            max_completion_length=s.max_completion_length,
            segment_len=s.segment_len,
            num_contexts=s.num_contexts,
            prefill_tokens=s.prefill_tokens,
            eos_ids=read_eos_ids(model_folder, tokenizer.eos_token_id),
            seed=config.seed,
            sharding=replicated(mesh),
        ),
        verifier=make_verifier(
            config.rewards.verifier,
            eos_text=tokenizer.eos_token,
            num_workers=config.rewards.workers,
            timeout_secs=config.rewards.timeout_secs,
            max_response_chars=config.rewards.max_response_chars,
        ),
        optimizer=optimizer,
        mesh=mesh,
        shardings=shardings,
        train_step=make_train_step(
            decoder,
            method.terms,
            optimizer,
            mesh,
            shardings,
            alpha=method.alpha,
            entropy_weight=m.entropy_weight,
            temperature=s.temperature,
            max_completion_length=s.max_completion_length,
            chunk_size=t.logprob_chunk_size,
        ),
    )
    return parts, params


def run(parts: Parts, params: Any, folder: Path) -> int:
    """Trains to the end, or to an interrupt, from the newest checkpoint if there is one."""
    config = parts.config
    store = CheckpointStore(folder / "checkpoints", keep=config.checkpoint.keep)
    data_id = parts.data_summary["fingerprint"]
    state = init_state(params, parts.optimizer, parts.mesh)
    counters, offsets, first_step = Counters(), None, 0
    if steps := store.steps():
        state, host = store.restore(steps[-1], abstract_like(state, parts.shardings))
        if host["data_fingerprint"] != data_id:
            raise UserError(f"{folder}: the run's training data differ; give another output_dir")
        counters, offsets, first_step = Counters(**host["counters"]), host["offsets"], steps[-1]
    log = RunLog(folder, offsets=offsets, purge_from=first_step + 1)
    interrupt = Interrupt()
    try:
        with Terminal(config.train.num_steps, first_step=first_step) as terminal:
            if first_step:
                terminal.say(f"resuming {folder} after step {first_step}")
            else:
                terminal.say(f"{parts.method.name}: {parts.method.source}; run folder {folder}")
                terminal.say(describe_memory(parts, state))
                log_evaluation(parts, log, terminal, state, split="test", step=0)
            save = lambda step: store.save(
                step,
                state,
                {
                    "counters": dataclasses.asdict(counters),
                    "offsets": log.offsets(),
                    "data_fingerprint": data_id,
                },
            )
            batches = problem_batches(
                parts.splits["train"], batch_size=config.train.problems_per_step, seed=config.seed
            )
            for step in range(first_step + 1, config.train.num_steps + 1):
                state, values = train_one_step(parts, state, batches[step - 1], counters, log, step)
                terminal.step(step, values)
                last = step == config.train.num_steps
                if _is_due(step, config.evaluation.every) and not last:
                    log_evaluation(parts, log, terminal, state, split="validation", step=step)
                if last or interrupt.received or _is_due(step, config.checkpoint.every):
                    save(step)
                if interrupt.received and not last:
                    terminal.say(f"stopped after step {step}; the same command resumes it")
                    return 0
            finish(parts, log, terminal, state, folder)
    finally:
        log.close()
        parts.verifier.close()
    return 0


def describe_memory(parts: Parts, state: TrainState) -> str:
    """What the run holds on to, planned before it begins."""
    s = parts.config.sampling
    held = sum(x.nbytes for x in jax.tree.leaves(state))
    return (
        f"parameters and optimizer {held / 2**20:,.0f} MiB; keys and values of {s.num_slots} slots and "
        f"{s.num_contexts} contexts of {parts.config.longest_rollout_len} tokens "
        f"{parts.engine.cache_bytes / 2**20:,.0f} MiB"
    )


def train_one_step(
    parts: Parts,
    state: TrainState,
    problems: Sequence[Problem],
    counters: Counters,
    log: RunLog,
    step: int,
) -> tuple[TrainState, dict[str, float]]:
    """Samples, scores, trains, logs. Returns the new state and the step's metrics."""
    config = parts.config
    started = time.perf_counter()
    parts.engine.update_weights(state.params, step - 1)
    before = parts.engine.counters
    groups, reward_secs = collect_rollouts(
        parts.engine,
        parts.scheduler,
        parts.score,
        problems,
        step=step,
        params=SamplingParams(config.sampling.temperature),
    )
    check_verdicts(groups, step, max_error_rate=config.rewards.max_error_rate)
    sampled, engine_did = time.perf_counter(), parts.engine.counters - before
    advantages = [
        group_advantages(
            np.array([rollout.reward for rollout in group]),
            scale_by_std=config.method.scale_advantages_by_std,
        )
        for group in groups
    ]
    num_shards = num_batch_shards(parts.mesh)
    batch = build_batch(
        groups,
        advantages,
        row_len=config.row_len,
        micro_batch_rows=config.train.per_device_rows * num_shards,
        num_shards=num_shards,
        packed=config.train.packing,
        pad_id=parts.tokenizer.pad_token_id or 0,
    )
    state, device_metrics = parts.train_step(state, batch)
    device_values = {name: float(value) for name, value in jax.device_get(device_metrics).items()}
    trained = time.perf_counter()
    kinds = count_kinds(batch)
    counters.tokens_trained += kinds["completion"] + kinds["expert_trained"]
    counters.tokens_sampled += kinds["completion"]
    counters.problems_seen += len(problems)
    values = {
        **rollout_metrics(groups),
        **device_values,
        **{f"batch/{name}_tokens": count for name, count in kinds.items()},
        "batch/pad_fraction": kinds["pad"] / sum(kinds.values()),
        "batch/balance": balance(batch, num_shards),
        "tokens/trained": counters.tokens_trained,
        "tokens/sampled": counters.tokens_sampled,
        "tokens/prefilled": engine_did.prefilled_tokens,
        "problems/seen": counters.problems_seen,
        "sampling/slot_utilization": engine_did.slot_utilization,
        "time/sample_secs": sampled - started - reward_secs,
        "time/reward_secs": reward_secs,
        "time/train_secs": trained - sampled,
        "time/tokens_per_sec": (kinds["completion"] + kinds["expert_trained"])
        / (trained - started),
    }
    log.metrics(TRAIN, step, values)
    log.samples(
        [
            sample_record(parts, rollout, float(advantage), step)
            for group, group_advantages in list(zip(groups, advantages, strict=True))[
                : config.log_samples
            ]
            for rollout, advantage in zip(group, group_advantages, strict=True)
        ]
    )
    if int(state.num_skipped_in_a_row) >= config.train.max_skipped_steps:
        raise TrainingFailed(
            f"step {step}: the loss or its gradient was not finite for "
            f"{config.train.max_skipped_steps} steps in a row; lower train.learning_rate"
        )
    return state, values


def rollout_metrics(groups: Sequence[Sequence[Rollout]]) -> dict[str, float]:
    """Rewards and guidance of a step, from its rollouts."""
    rollouts = [rollout for group in groups for rollout in group]
    unguided = [r.reward for r in rollouts if r.request.prefix_len == 0]
    levels = [
        max((r.request.micro_group for r in group if r.request.prefix_len), default=0)
        for group in groups
    ]
    lens = [len(r.completion.token_ids) for r in rollouts if r.completion.token_ids]
    verdicts = [rollout.verdict for rollout in rollouts]
    finish_reasons = [rollout.completion.finish_reason for rollout in rollouts]
    return {
        "reward/mean": fmean(r.reward for r in rollouts),
        "reward/unguided_mean": fmean(unguided) if unguided else 0.0,
        "reward/error_rate": fmean(v is Verdict.ERROR for v in verdicts),
        "reward/timeout_rate": fmean(v is Verdict.TIMEOUT for v in verdicts),
        "guidance/ratio_mean": fmean(r.request.ratio for r in rollouts),
        # Share of problems by the last micro-group that needed the expert; 0: none did.
        **{f"guidance/level_{i}": fmean(level == i for level in levels) for i in range(4)},
        "completion/len_mean": fmean(lens) if lens else 0.0,
        "completion/truncated": fmean(reason == "length" for reason in finish_reasons),
    }


def check_verdicts(
    groups: Sequence[Sequence[Rollout]], step: int, *, max_error_rate: float
) -> None:
    """Stops a run whose rewards say little: a failed verdict counts as 0 in the advantages."""
    verdicts = [rollout.verdict for group in groups for rollout in group]
    errors, timeouts = verdicts.count(Verdict.ERROR), verdicts.count(Verdict.TIMEOUT)
    if errors + timeouts > max_error_rate * len(verdicts):
        raise TrainingFailed(
            f"step {step}: of {len(verdicts)} rollouts the verifier failed on {errors} and timed out "
            f"on {timeouts}, more than rewards.max_error_rate={max_error_rate}; warnings above, if "
            "any, say why"
        )


def sample_record(parts: Parts, rollout: Rollout, advantage: float, step: int) -> dict[str, Any]:
    """A line of samples.jsonl."""
    request, decode = rollout.request, parts.tokenizer.decode
    return {
        "step": step,
        "problem_id": request.problem.id,
        "sample_index": request.sample_index,
        "micro_group": request.micro_group,
        "prompt": request.problem.prompt_text,
        "prefix": decode(request.prefix_ids),
        "completion": decode(rollout.completion.token_ids),
        "answer": request.problem.answer,
        "verdict": str(rollout.verdict),
        "reward": rollout.reward,
        "advantage": advantage,
        "ratio": request.ratio,
        "finish_reason": str(rollout.completion.finish_reason),
    }


def log_evaluation(
    parts: Parts, log: RunLog, terminal: Terminal, state: TrainState, *, split: str, step: int
) -> dict[str, float]:
    """Evaluates, logs and prints one line."""
    started = time.perf_counter()
    parts.engine.update_weights(state.params, step)
    values = evaluate(
        parts.engine,
        parts.score,
        parts.splits[split],
        num_samples=parts.config.evaluation.num_samples,
    )
    seconds = time.perf_counter() - started
    log.metrics(EVAL, step, {"split": split, **values, "time/eval_secs": seconds})
    best = f"pass@{parts.config.evaluation.num_samples}"
    terminal.say(
        f"step {step}: {split} accuracy greedy {values['eval/accuracy_greedy']:.3f}, "
        f"sampled {values['eval/accuracy_sampled']:.3f}, {best} {values[f'eval/{best}']:.3f}"
    )
    return values


def finish(parts: Parts, log: RunLog, terminal: Terminal, state: TrainState, folder: Path) -> None:
    """Final evaluation, export and table; `summary.json`, written last, marks the run complete."""
    num_steps = parts.config.train.num_steps
    after = log_evaluation(parts, log, terminal, state, split="test", step=num_steps)
    params = jax.device_get(state.params)
    export_model(params, parts.decoder, source=parts.model_folder, destination=folder / "hf")
    log.offsets()
    before = next(r for r in read_metrics(folder) if r["kind"] == EVAL and r["split"] == "test")
    summary = {"before": {name: before[name] for name in after}, "after": after}
    write_atomically(folder / SUMMARY, json.dumps(summary, indent=2) + "\n")
    print_summary(terminal, summary, folder)


def print_summary(terminal: Terminal, summary: dict[str, Any], folder: Path) -> None:
    before, after = summary["before"], summary["after"]
    rows = [
        [name.removeprefix("eval/"), f"{before[name]:.3f}", f"{after[name]:.3f}"]
        for name in sorted(after)
        if "accuracy" in name or "pass@" in name
    ]
    terminal.table("test set", ["", "before", "after"], rows)
    for name, what in (
        ("hf", "the model, for transformers and vLLM"),
        ("metrics.jsonl", "every step; tb/ holds the same for TensorBoard"),
        ("samples.jsonl", "rollouts to read"),
    ):
        terminal.say(f"{folder / name}: {what}")


def show_complete(folder: Path, config: Config) -> int:
    """The results of a run that is complete; nothing is computed or written."""
    terminal = Terminal(config.train.num_steps, first_step=config.train.num_steps)
    terminal.say(f"{folder}: this run is complete; for another give another output_dir")
    print_summary(terminal, json.loads((folder / SUMMARY).read_text()), folder)
    return 0


class Interrupt:
    """SIGINT and SIGTERM let the step finish; a second one ends the process at once."""

    def __init__(self):
        self.received = False
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._receive)

    def _receive(self, number: int, _) -> None:
        if self.received:
            os._exit(128 + number)
        self.received = True
        print("finishing this step, then saving; once more to stop at once", file=sys.stderr)


def _is_due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


if __name__ == "__main__":
    sys.exit(main())
