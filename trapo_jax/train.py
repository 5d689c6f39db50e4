"""Trains a policy.

    python -m trapo_jax.train [--config FILE] [FIELD=VALUE ...]

config -> data -> scheduler -> sampler -> rewards -> advantages -> batch -> train step -> checkpoint, metrics
"""

import contextlib
import dataclasses
import errno
import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import jax

from trapo_jax.config import Config, DataConfig, config_from_command_line
from trapo_jax.data import draw_problems, problem_batches
from trapo_jax.distributed.processes import (
    fetch,
    from_main,
    gather,
    is_main,
    join_processes,
    my_share,
    wait_for_all,
)
from trapo_jax.distributed.sharding import num_batch_shards
from trapo_jax.evaluation.scoring import evaluate
from trapo_jax.methods import Method, Sampled, Update, describe
from trapo_jax.models import (
    export_model,
)
from trapo_jax.parts import Parts, build, build_method
from trapo_jax.report import REPORT, write_report
from trapo_jax.rollouts.collection import (
    PartialRollouts,
    collect_groups,
    share_groups,
)
from trapo_jax.runs.checkpoints import CheckpointStore, DamagedCheckpoint, Retention, abstract_like
from trapo_jax.runs.command_line import EXIT_USER_ERROR, as_command, fail
from trapo_jax.runs.console import Console
from trapo_jax.runs.directory import (
    NUM_STEPS,
    Changes,
    check_run_folder,
    only_process_in,
    prepare_run_folder,
    record_changes,
    write_atomically,
)
from trapo_jax.runs.loggers import EVAL, TRAIN, NoLog, RunLog, read_metrics
from trapo_jax.runs.monitoring import (
    EXIT_TRAINING_FAILED,
    Health,
    Interrupt,
    TrainingFailed,
    check_space,
)
from trapo_jax.runs.samples import fetch_response_traces, sample_record
from trapo_jax.training.budget import Counters
from trapo_jax.training.packing import balance, build_batch, count_kinds
from trapo_jax.training.train_step import (
    TokenTrace,
    TrainState,
    place_batch,
    swap_optimizer,
)
from trapo_jax.types import (
    Moment,
    Problem,
    Rollout,
    SamplingParams,
    TrainBatch,
    TrainRow,
    UserError,
    Verdict,
)

ABOUT = (
    "Trains a language model with TRAPO or another method; a run that is there already is resumed."
)
PRINT_METHOD = "--print-method"
DATA = "data.json"  # what the run trains on: fingerprint, template, what was dropped
SUMMARY = "summary.json"  # written last: marks a run as complete
EVALUATIONS = "evaluations"  # folder: each problem's results, a file an evaluation
LOG_BYTES = 4 * 2**20  # room that a step's records need on the disk, generously
NO_SPACE = (errno.ENOSPC, errno.EDQUOT)


@dataclasses.dataclass
class Progress:
    """What a run carries from step to step besides the policy; part of the checkpoint.

    Not so what has been begun of the next batch: how far it came depends on the clock, and a resumed run begins
    it anew.
    """

    counters: Counters
    method_state: Mapping[str, Any]
    begun: PartialRollouts = dataclasses.field(default_factory=PartialRollouts)


def main(arguments: Sequence[str] | None = None) -> int:
    given = sys.argv[1:] if arguments is None else arguments
    rest = [argument for argument in given if argument != PRINT_METHOD]
    try:
        config = config_from_command_line("train", ABOUT, rest)
        method = build_method(config)
    except UserError as error:
        return fail(str(error), EXIT_USER_ERROR)
    if PRINT_METHOD in given:
        print(describe(method))
        return 0
    return train(config, method)


def train(config: Config, method: Method) -> int:
    """Trains by a method, one of the family or your own; returns the exit code."""
    folder = config.run_folder
    try:
        join_processes()
        changes, is_complete = from_main(look_into(folder, config) if is_main() else None)
        if is_complete:
            return show_complete(folder, config)
        parts, state = build(config, method)
        with contextlib.ExitStack() as stack:
            if is_main():
                stack.enter_context(only_process_in(folder))
                prepare_run_folder(folder, config.to_yaml())
                if not (folder / DATA).exists():
                    write_atomically(folder / DATA, json.dumps(parts.data_summary, indent=2) + "\n")
            wait_for_all("run folder prepared")
            return run(parts, state, folder, changes)
    except UserError as error:
        return fail(str(error), EXIT_USER_ERROR)
    except TrainingFailed as error:
        return fail(str(error), EXIT_TRAINING_FAILED)
    except OSError as error:
        if error.errno not in NO_SPACE:
            raise
        return fail(
            f"output_dir={folder}: {error.strerror}; make room, and the same command resumes from the "
            "last checkpoint",
            EXIT_TRAINING_FAILED,
        )


def look_into(folder: Path, config: Config) -> tuple[Changes, bool]:
    """What is new about a run that is there already, and whether it has nothing left to do."""
    changes = check_run_folder(folder, config.to_yaml())
    return changes, (folder / SUMMARY).exists() and NUM_STEPS not in changes


def run(parts: Parts, state: TrainState, folder: Path, changes: Changes) -> int:
    """Trains to the end, or to an interrupt, from the newest intact checkpoint if there is one."""
    config, watchdog = parts.config, parts.watchdog
    keep = config.checkpoint
    store = CheckpointStore(
        folder / "checkpoints", Retention(keep.keep, keep.keep_every, keep.keep_best)
    )
    state, host, first_step = resume(parts, store, state, folder)
    if is_main() and changes:
        (folder / SUMMARY).unlink(missing_ok=True)  # of a run that goes on
        record_changes(folder, config.to_yaml(), changes, after_step=first_step)
    progress = (
        Progress(Counters(**host["counters"]), host["method_state"])
        if host
        else Progress(Counters(), {})
    )
    log = RunLog(folder, offsets=host and host["offsets"]) if is_main() else NoLog()
    health = Health(
        max_logprob_gap=config.limits.max_logprob_gap,
        max_skipped_steps=config.train.max_skipped_steps,
        warn_after_steps=config.limits.warn_after_steps,
    )
    interrupt = Interrupt()
    state_bytes = sum(x.nbytes for x in jax.tree.leaves(state))
    try:
        with Console(
            config.train.num_steps, first_step=first_step, quiet=not is_main()
        ) as terminal:
            if first_step:
                new = "".join(f", {name}={now} (was {was})" for name, (was, now) in changes.items())
                terminal.say(f"resuming {folder} after step {first_step}{new}")
            else:
                terminal.say(f"{parts.method.name}: {parts.method.source}; run folder {folder}")
                terminal.say(describe_memory(parts, state))
                for split in config.evaluation.splits:
                    log_evaluation(parts, log, terminal, state, split=split, step=0)

            def save(step: int, score: float | None) -> None:
                watchdog.beat(f"saving step {step}")
                check_space(folder, state_bytes + LOG_BYTES, "a checkpoint")
                of_host = {
                    "counters": dataclasses.asdict(progress.counters),
                    "method_state": progress.method_state,
                    "offsets": log.offsets(),
                    "data_fingerprint": parts.data_summary["fingerprint"],
                }
                store.save(step, state, of_host, score=score)

            batches = problem_batches(
                parts.splits["train"], batch_size=config.train.problems_per_step, seed=config.seed
            )
            step, share = first_step, parts.budget.progress(progress.counters, first_step)
            while share < 1:
                step += 1
                watchdog.beat(f"working on step {step}")
                check_space(folder, LOG_BYTES, "a step's record")
                is_ahead = config.sampling.max_staleness and step < config.train.num_steps
                ahead = batches[step] if is_ahead else ()
                state, values = train_one_step(
                    parts, state, batches[step - 1], ahead, progress, log, step
                )
                check_budget(config, values)
                terminal.step(step, values)
                for warning in health.observe(step, values):
                    terminal.say(f"warning: {warning}")
                share_before, share = share, values["budget/progress"]
                last, score = share >= 1, None
                interrupted = any(gather(interrupt.received))
                is_time = _passes(share_before, share, config.evaluation.times)
                if (is_time or _is_due(step, config.evaluation.every)) and not last:
                    found = log_evaluation(
                        parts, log, terminal, state, split="validation", step=step
                    )
                    score = found["eval/accuracy_sampled"]
                due = last or interrupted or _is_due(step, config.checkpoint.every)
                if due or (keep.keep_best and is_better(score, store.best_score())):
                    save(step, score)
                if interrupted and not last:
                    terminal.say(f"stopped after step {step}; the same command resumes it")
                    return 0
            finish(parts, log, terminal, state, folder, step)
    finally:
        interrupt.close()
        watchdog.close()
        log.close()
        parts.verifier.close()
    return 0


def check_budget(config: Config, values: Mapping[str, float]) -> None:
    """Refuses a budget of tokens that the method does not sample: it would never be spent."""
    t = config.train
    if t.budget is not None and t.budget_unit == "sampled_tokens" and not values["tokens/sampled"]:
        raise UserError(
            f"train.budget_unit=sampled_tokens: method.name={config.method.name} samples none; give trained_tokens, "
            "flops, problems or seconds"
        )


def resume(
    parts: Parts, store: CheckpointStore, state: TrainState, folder: Path
) -> tuple[TrainState, dict[str, Any] | None, int]:
    """The newest intact checkpoint's state, host state and step; those at the start if there is none.

    Raises:
      UserError: if the run's data were others, or there are checkpoints but none is intact.
    """
    step = from_main(newest_intact(store, folder) if is_main() else None)
    if step is None:
        return state, None, 0
    abstract = abstract_like(state, parts.shardings)
    for leaf in jax.tree.leaves(state):
        leaf.delete()  # not both in memory
    state, host = store.restore(step, abstract)
    if host["data_fingerprint"] != parts.data_summary["fingerprint"]:
        raise UserError(
            f"output_dir={folder}: {name_data(parts.config.data)} does not give the problems that the run began "
            "with (data.json); put them back or give another output_dir"
        )
    return state, host, step


def name_data(data: DataConfig) -> str:
    """The field that says what is trained on."""
    if data.source == "files":
        return f"data.train_files={', '.join(data.train_files)}"
    return f"data.source={data.source}"


def newest_intact(store: CheckpointStore, folder: Path) -> int | None:
    """The step of the newest checkpoint without a fault, None if there are none; the damaged are put aside."""
    for step in reversed(store.steps()):
        try:
            store.verify(step)
            return step
        except DamagedCheckpoint as error:
            aside = store.put_aside(step)
            print(f"warning: {error}; it is kept as {aside}", file=sys.stderr)
    if damaged := store.damaged():
        raise UserError(
            f"{folder}: none of its checkpoints is intact ({', '.join(p.name for p in damaged)}); give "
            "another output_dir"
        )
    return None


def is_better(score: float | None, best: float | None) -> bool:
    return score is not None and (best is None or score > best)


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
    ahead: Sequence[Problem],
    progress: Progress,
    log: RunLog,
    step: int,
) -> tuple[TrainState, dict[str, float]]:
    """Samples, scores, trains, logs; problems `ahead` may be begun. Returns the new state and the step's metrics."""
    config, counters = parts.config, progress.counters
    started = time.perf_counter()
    moment = Moment(step, parts.budget.progress(counters, step - 1), config.seed)
    parts.engine.update_weights(state.params, step - 1)
    before = parts.engine.counters
    num_stale = sum(gather(progress.begun.num_sampled_tokens))
    mine, reward_secs, begun = collect_groups(
        parts.engine,
        parts.scheduler_at(moment),
        parts.score,
        my_share(problems),
        step=step,
        params=SamplingParams(config.sampling.temperature),
        partial=progress.begun,
        upcoming=my_share(ahead),
    )
    progress.begun = begun._replace(unfinished=parts.engine.release())
    groups = share_groups(mine, problems)
    check_verdicts(groups, step, max_error_rate=config.rewards.max_error_rate)
    sampled, engine_did = time.perf_counter(), parts.engine.counters - before
    prefilled_tokens = sum(gather(engine_did.prefilled_tokens))
    logged = [rollout for group in groups[: config.log_samples] for rollout in group]
    counters.count_rollouts(groups, prefilled_tokens=prefilled_tokens, cost=parts.token_cost)
    selected = parts.method.select(what_was_sampled(parts, groups, moment, progress.method_state))
    progress.method_state = selected.state
    trained_before = counters.tokens_trained
    values, traces = {}, [None] * len(logged)
    for chosen in selected.updates:
        state, of_update, trace, host_batch = update(parts, state, chosen, moment, counters)
        values = merge_updates(values, of_update, chosen.optimizer)
        seen = fetch_response_traces(trace, host_batch, row_numbers(logged, chosen.rows))
        traces = [old or new for old, new in zip(traces, seen, strict=True)]
    trained = time.perf_counter()
    counters.seconds += from_main(trained - started)
    values = {
        **rollout_metrics(groups),
        **values,
        "tokens/trained": counters.tokens_trained,
        "tokens/expert_trained": counters.tokens_expert_trained,
        "tokens/prompt": counters.tokens_prompt,
        "tokens/sampled": counters.tokens_sampled,
        "tokens/prefilled": prefilled_tokens,
        "problems/seen": counters.problems_seen,
        "budget/flops": counters.flops,
        "budget/progress": parts.budget.progress(counters, step),
        "sampling/slot_utilization": engine_did.slot_utilization,
        "sampling/stale_tokens": num_stale,
        "time/sample_secs": sampled - started - reward_secs,
        "time/reward_secs": reward_secs,
        "time/train_secs": trained - sampled,
        "time/budget_secs": counters.seconds,
        "optimizer/skipped_in_a_row": int(state.num_skipped_in_a_row),
        "time/tokens_per_sec": (counters.tokens_trained - trained_before) / (trained - started),
    }
    log.metrics(TRAIN, step, values)
    rows = [row for chosen in selected.updates for row in chosen.rows]
    advantages = {id(row.completion): row.advantage for row in rows}
    log.samples(
        [
            sample_record(
                rollout,
                advantages.get(id(rollout.completion)),
                trace,
                decode=parts.tokenizer.decode,
                step=step,
            )
            for rollout, trace in zip(logged, traces, strict=True)
        ]
    )
    return state, values


def what_was_sampled(
    parts: Parts,
    groups: Sequence[Sequence[Rollout]],
    moment: Moment,
    method_state: Mapping[str, Any],
) -> Sampled:
    """What the method decides by."""
    config = parts.config
    num_extra = parts.method.extra_rows_per_problem * config.train.problems_per_step
    return Sampled(
        groups=groups,
        moment=moment,
        state=method_state,
        extra_problems=draw_problems(
            parts.splits["train"], count=num_extra, seed=config.seed, step=moment.step
        ),
        problems=parts.problems,
        max_completion_length=config.sampling.max_completion_length,
    )


def update(
    parts: Parts, state: TrainState, chosen: Update, moment: Moment, counters: Counters
) -> tuple[TrainState, dict[str, float], TokenTrace, TrainBatch]:
    """Updates the policy `train.num_iterations` times from the chosen rows.

    Returns the new state, the last update's metrics and trace, and the batch on the host.
    """
    config, method = parts.config, parts.method
    num_iterations = config.train.num_iterations
    host_batch = build_rows(parts, chosen.rows)
    batch = place_batch(host_batch, parts.mesh)
    if num_iterations > 1:  # a single update is made from the old policy itself
        batch = batch._replace(old_logprobs=parts.batch_logprobs(state.params, batch))
    if parts.ref_params is not None:
        batch = batch._replace(ref_logprobs=parts.batch_logprobs(parts.ref_params, batch))
    counters.count_update(
        chosen.rows,
        num_iterations=num_iterations,
        num_forward=(num_iterations > 1) + (parts.ref_params is not None),
        cost=parts.token_cost,
    )
    index = method.optimizers.index(chosen.optimizer)
    state = swap_optimizer(state, index)
    device_metrics, learning_rate, trace = {}, 0.0, TokenTrace(None, None)
    for i in range(num_iterations):
        steps = moment.step - 1 + (i + 1) / num_iterations
        position = max(steps, moment.progress * config.train.num_steps)
        learning_rate = chosen.learning_rate_scale * parts.learning_rate(steps, position)
        coefficients = method.coefficients(moment, learning_rate=learning_rate)
        state, device_metrics, trace = parts.train_step(state, batch, coefficients)
    state = swap_optimizer(state, index)
    values = {name: float(value) for name, value in jax.device_get(device_metrics).items()}
    values["optimizer/learning_rate"] = learning_rate
    values |= batch_metrics(host_batch, num_batch_shards(parts.mesh))
    return state, values, trace, host_batch


def row_numbers(rollouts: Sequence[Rollout], rows: Sequence[TrainRow]) -> list[int]:
    """The number of each rollout among an update's rows; one past the end where it is none of them."""
    numbers = {id(row.completion): number for number, row in enumerate(rows)}
    return [numbers.get(id(rollout.completion), len(rows)) for rollout in rollouts]


def build_rows(parts: Parts, rows: Sequence[TrainRow]) -> TrainBatch:
    """The rows in the shape that every update has."""
    config, num_shards = parts.config, num_batch_shards(parts.mesh)
    return build_batch(
        rows,
        row_len=config.row_len,
        micro_batch_rows=config.train.per_device_rows * num_shards,
        max_rows=parts.method.max_rows(config.train.problems_per_step),
        num_shards=num_shards,
        packed=config.train.packing,
        pad_id=parts.tokenizer.pad_token_id or 0,
    )


def batch_metrics(batch: TrainBatch, num_shards: int) -> dict[str, float]:
    """What a batch is made of."""
    kinds = count_kinds(batch)
    return {
        **{f"batch/{name}_tokens": count for name, count in kinds.items()},
        "batch/pad_fraction": kinds["pad"] / max(1, sum(kinds.values())),
        "batch/balance": balance(batch, num_shards),
    }


def merge_updates(
    first: Mapping[str, float], following: Mapping[str, float], optimizer: str
) -> dict[str, float]:
    """Metrics of a step's updates: the first's as they are, the others' by the name of their optimiser."""
    if not first:
        return dict(following)
    skipped = max(first["optimizer/skipped"], following["optimizer/skipped"])
    named = {f"{optimizer}/{name}": value for name, value in following.items()}
    return {**first, **named, "optimizer/skipped": skipped}


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
        "reward/groups_with_signal": fmean(len({r.reward for r in group}) > 1 for group in groups),
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


def log_evaluation(
    parts: Parts, log: RunLog, terminal: Console, state: TrainState, *, split: str, step: int
) -> dict[str, float]:
    """Evaluates, logs and prints one line; each problem's results go to a file of their own."""
    started = time.perf_counter()
    parts.watchdog.beat(f"evaluating after step {step}")
    parts.engine.update_weights(state.params, step)
    values, of_problems = evaluate(
        parts.engine,
        parts.score,
        parts.splits[split],
        num_samples=parts.config.evaluation.num_samples,
    )
    parts.engine.release()  # its weights may be a copy
    if is_main():
        write_evaluation(parts.config.run_folder, split, step, of_problems)
    seconds = time.perf_counter() - started
    log.metrics(EVAL, step, {"split": split, **values, "time/eval_secs": seconds})
    terminal.evaluated(values["eval/accuracy_sampled"])
    best = f"pass@{parts.config.evaluation.num_samples}"
    terminal.say(
        f"step {step}: {split} accuracy greedy {values['eval/accuracy_greedy']:.3f}, "
        f"sampled {values['eval/accuracy_sampled']:.3f}, {best} {values[f'eval/{best}']:.3f}"
    )
    return values


def write_evaluation(folder: Path, split: str, step: int, problems: dict[str, list]) -> None:
    """`evaluations/<split>_<step>.json`: columns, an entry a problem; see `Evaluation.problems`."""
    path = folder / EVALUATIONS / f"{split}_{step}.json"
    path.parent.mkdir(exist_ok=True)
    write_atomically(path, json.dumps(problems) + "\n")


def finish(
    parts: Parts, log: RunLog, terminal: Console, state: TrainState, folder: Path, step: int
) -> None:
    """Final evaluations, export, report and tables; `summary.json`, written last, marks the run complete."""
    after = {
        split: log_evaluation(parts, log, terminal, state, split=split, step=step)
        for split in parts.config.evaluation.splits
    }
    params = fetch(state.params)
    if not is_main():
        return
    export_model(params, parts.decoder, source=parts.model_folder, destination=folder / "hf")
    log.offsets()
    write_report([folder], folder / REPORT)
    first = {r["split"]: r for r in reversed(read_metrics(folder)) if r["kind"] == EVAL}
    summary = {
        split: {"before": {name: first[split][name] for name in values}, "after": values}
        for split, values in after.items()
    }
    write_atomically(folder / SUMMARY, json.dumps(summary, indent=2) + "\n")
    print_summary(terminal, summary, folder)


def print_summary(terminal: Console, summary: dict[str, Any], folder: Path) -> None:
    for split, values in summary.items():
        before, after = values["before"], values["after"]
        rows = [
            [name.removeprefix("eval/"), f"{before[name]:.3f}", f"{after[name]:.3f}"]
            for name in sorted(after)
            if "accuracy" in name or "pass@" in name
        ]
        terminal.table(f"{split} set", ["", "before", "after"], rows)
    for name, what in (
        ("hf", "the model, for transformers and vLLM"),
        (REPORT, "curves, and a reader for rollouts; open it in a browser"),
        ("metrics.jsonl", "every step; tb/ holds the same for TensorBoard"),
        ("samples.jsonl", "rollouts, token by token"),
    ):
        terminal.say(f"{folder / name}: {what}")


def show_complete(folder: Path, config: Config) -> int:
    """The results of a run that is complete; nothing is computed or written."""
    terminal = Console(config.train.num_steps, first_step=config.train.num_steps)
    terminal.say(f"{folder}: this run is complete; for another give another output_dir")
    print_summary(terminal, json.loads((folder / SUMMARY).read_text()), folder)
    return 0


def _is_due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _passes(before: float, after: float, times: int) -> bool:
    """Whether one of the moments that cut a run into `times + 1` equal parts lies between two of its shares."""
    return int(before * (times + 1)) < int(after * (times + 1))


if __name__ == "__main__":
    as_command(main)
