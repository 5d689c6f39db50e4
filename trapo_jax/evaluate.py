"""Scores a model on problems: avg@k, pass@k and majority vote per source, with confidence intervals.

    python -m trapo_jax.evaluate model.path=DIR_OR_RUN data.test_files=math.parquet evaluation.num_samples=32

Every sample is appended to samples.jsonl as soon as it is graded. To resume an evaluation that was stopped, run the
same command again.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import yaml

from trapo_jax.config import (
    EvaluateConfig,
    ModelConfig,
    help_if_requested,
    is_training_config,
    load_evaluate_config,
    parse_command_line,
    read_yaml,
    user_code,
)
from trapo_jax.data.mistakes import warnings_of_patterns
from trapo_jax.data.splits import load_test_data
from trapo_jax.evaluation.records import (
    count_shared_noise,
    key_of,
    make_record,
    read_samples,
    sample_of,
)
from trapo_jax.evaluation.results import plot_pass_at_k, table_of
from trapo_jax.evaluation.scoring import (
    Sample,
    Scores,
    mean_of_sources,
    merge_equal_answers,
    score_samples,
    scores_by_source,
)
from trapo_jax.models import (
    Params,
    PretrainedModel,
    load_params,
    open_model,
    with_weights,
)
from trapo_jax.rollouts.actor import Actor, grader_for, make_actor
from trapo_jax.runs.checkpoints import CheckpointStore
from trapo_jax.runs.command_line import EXIT_INTERRUPTED, command, fail, run_and_exit
from trapo_jax.runs.console import Console
from trapo_jax.runs.directory import (
    CHECKPOINTS,
    CONFIG,
    EXPORT,
    METHOD,
    SAMPLES,
    SUMMARY,
    lock_folder,
    prepare_run_folder,
    write_atomically,
)
from trapo_jax.runs.monitoring import CompilationListener, unanswered
from trapo_jax.runs.progress import counted
from trapo_jax.runs.resuming import check_run_folder
from trapo_jax.runs.saved_model import load_checkpoint
from trapo_jax.types import (
    Problem,
    RolloutRequest,
    SamplingParams,
    UserError,
)

ABOUT = (
    "Scores a model on problems from files or the Hub, or a training run on its own test problems."
)
SCORES, PLOT = "scores.json", "pass_at_k.png"


@dataclasses.dataclass(frozen=True)
class EvaluationResult:
    """The result of `evaluate`.

    Attributes:
      folder: directory with samples.jsonl, scores.json and a plot.
      overall: scores over all problems.
      by_source: scores of each source's problems, keyed by source.
    """

    folder: Path
    overall: Scores
    by_source: dict[str, Scores]

    @property
    def mean_of_sources(self) -> Scores:
        """The unweighted mean of the scores of all sources, as papers report it for several benchmarks."""
        return mean_of_sources(self.by_source)


def evaluate(config: EvaluateConfig, *, show_progress: bool = False) -> EvaluationResult:
    """Evaluates a model, or resumes an evaluation that was stopped.

    Args:
      config: the configuration of the evaluation.
      show_progress: whether to print progress to the terminal.

    Raises:
      UserError: for a mistake in the config, the model, the data or the output directory.
    """
    console = Console(quiet=not show_progress)
    if os.path.isfile(config.run_folder / METHOD):
        raise UserError(
            f"output_dir={config.run_folder}: contains a training run, not an evaluation; choose a different output_dir"
        )
    model, params = load_model(config, console)
    settings = config.model_dump(mode="json") | {"weights": weights_fingerprint(params)}
    settings.pop("output_dir")
    text = yaml.safe_dump(settings, sort_keys=True)
    code = user_code(config)
    check_run_folder(config.run_folder, text, code=code)
    config, problems, template = load_problems(config, model, console)
    with lock_folder(config.run_folder):
        # Another process may have written to the folder before it was locked.
        check_run_folder(config.run_folder, text, code=code)
        prepare_run_folder(config.run_folder, text, code=code)
        samples = sample_all(config, model, params, problems, console)
        result = EvaluationResult(
            config.run_folder, score_samples(samples), scores_by_source(samples)
        )
        write_result(result, settings | {"template": template})
    return result


def write_result(result: EvaluationResult, settings: Mapping[str, Any]) -> None:
    """Writes the scores and the plot of an evaluation."""
    data = {
        "settings": settings,
        "overall": dataclasses.asdict(result.overall),
        "mean_of_sources": dataclasses.asdict(result.mean_of_sources),
        "by_source": {name: dataclasses.asdict(s) for name, s in result.by_source.items()},
        "devices": str(jax.devices()[0].device_kind),
    }
    write_atomically(result.folder / SCORES, json.dumps(data, indent=2) + "\n")
    plot_pass_at_k(result.folder / PLOT, result.overall, result.by_source)


def load_model(config: EvaluateConfig, console: Console) -> tuple[PretrainedModel, Params]:
    """Loads a model from a Hugging Face folder, the Hub, or a training run.

    For a completed run, the exported model is loaded, otherwise the latest checkpoint. A run that is being extended is
    not complete: it still has the model exported at its previous end, but its checkpoints are newer.
    """
    path = Path(config.model.path).expanduser()
    model = ModelConfig(path=config.model.path, dtype=config.model.dtype)
    if (path / CONFIG).is_file():
        steps = CheckpointStore(path / CHECKPOINTS).steps()
        if not (path / EXPORT).is_dir() or (steps and not (path / SUMMARY).exists()):
            if not steps:
                raise UserError(f"model.path={path}: this run has no checkpoint yet")
            console.say(f"{path}: this run is not complete; evaluating it after step {steps[-1]}")
            params, decoder, source = load_checkpoint(path / CHECKPOINTS / str(steps[-1]))
            decoder = dataclasses.replace(decoder, dtype=config.model.dtype)
            opened = open_model(model.model_copy(update={"path": str(source)}))
            return dataclasses.replace(opened, decoder=decoder), params
        model = ModelConfig(path=str(path / EXPORT), dtype=config.model.dtype)
    opened = with_weights(open_model(model))
    return opened, load_params(opened.folder, opened.decoder)


def weights_fingerprint(params: Params) -> str:
    """Returns a hash of a few elements of every parameter. These suffice, because training changes all parameters."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]:
        digest.update(jax.tree_util.keystr(path).encode())
        digest.update(np.asarray(leaf[(0,) * (leaf.ndim - 1)][:64], np.float32).tobytes())
    return digest.hexdigest()[:12]


def load_problems(
    config: EvaluateConfig, model: PretrainedModel, console: Console
) -> tuple[EvaluateConfig, list[Problem], str]:
    """Returns the config with its null lengths filled in, the problems, and the hash of the chat template."""
    data, config = load_test_data(config, model.tokenizer, context_len=model.max_context_len)
    functions = ", ".join(config.rewards.functions)
    console.say(f"template {data.template.kind}; reward functions {functions}")
    for stage in data.reports["test"]:
        console.say(f"problems: {stage}")
    for warning in warnings_of_patterns(data.splits["test"], config):
        console.say(f"warning: {warning}")
    return config, data.splits["test"], data.template.hash


def sample_all(
    config: EvaluateConfig,
    model: PretrainedModel,
    params: Params,
    problems: Sequence[Problem],
    console: Console,
) -> list[Sample]:
    """Draws and grades the samples that are not yet in samples.jsonl, and returns all samples."""
    path, scoring = config.run_folder / SAMPLES, config.evaluation
    records = read_samples(path)
    wanted = {
        (request.problem.id, request.sample_index): request
        for problem in problems
        for request in (
            RolloutRequest(problem, j) for j in range(scoring.num_samples_of(problem.source))
        )
    }
    done = set(map(key_of, records))
    requests = [request for key, request in wanted.items() if key not in done]
    if done:
        console.say(f"resuming after {len(done)} of {len(wanted)} samples in {path}")
    listener = CompilationListener(console.set_compiling)
    with (
        contextlib.closing(listener),
        make_evaluation_actor(config, model, console, num_samples=len(wanted)) as actor,
    ):
        sampling_params = SamplingParams(scoring.temperature, scoring.top_p, scoring.top_k)
        console.begin("evaluating test", num_samples=len(requests))
        with actor.sampler(params) as sample, open(path, "a", encoding="utf-8") as file:
            for completion, grade in sample(requests, sampling_params):
                text = model.tokenizer.decode(completion.token_ids)
                record = make_record(completion, grade, text=text)
                records.append(record)
                file.write(json.dumps(record) + "\n")
                file.flush()
        by_key = {key_of(record): record for record in records}
        samples = [sample_of(by_key[key]) for key in wanted]
        samples = merge_equal_answers(samples, actor.are_equal)
    num_shared, num_problems = count_shared_noise(records)
    if num_shared:
        console.say(
            f"warning: {num_shared} of {num_problems} problems have identical samples, which is very unlikely to be a "
            "coincidence; they were probably drawn with the same random key"
        )
    return samples


def make_evaluation_actor(
    config: EvaluateConfig, model: PretrainedModel, console: Console, *, num_samples: int
) -> Actor:
    """Creates an actor that shows its progress and has at most as many slots as there are samples."""
    sampling, scoring = config.sampling, config.evaluation
    num_slots = min(sampling.num_slots, num_samples)
    return make_actor(
        sampling.model_copy(update={"num_slots": num_slots}),
        grader_for(config.rewards, config.rewards.functions, model.tokenizer),
        model,
        max_prompt_length=config.data.prompt_len,
        seed=config.seed,
        with_truncation=scoring.top_p < 1 or scoring.top_k > 0,
        on_progress=console.advance,
    )


@command
def main(arguments: Sequence[str]) -> int:
    if text := help_if_requested(arguments, EvaluateConfig, "evaluate", ABOUT):
        print(text)
        return 0
    folder = None
    try:
        file, overrides = parse_command_line(arguments)
        config = load_evaluate_config(file, overrides)
        if file and is_training_config(read_yaml(file)):
            Console().say(
                f"{file}: this is a training config; an evaluation uses only model.path, model.dtype, data, rewards, "
                "sampling.max_completion_length, evaluation.temperature, evaluation.num_samples and "
                "evaluation.num_samples_by_source"
            )
        folder = config.run_folder
        result = evaluate(config, show_progress=True)
    except KeyboardInterrupt:
        if folder is None:
            raise
        return fail(
            f"stopped; graded samples are in {folder / SAMPLES}; the same command resumes the evaluation",
            EXIT_INTERRUPTED,
        )
    console = Console()
    numbers = sorted({scores.num_samples for scores in result.by_source.values()})
    title = (
        f"test split, {counted(result.overall.num_problems, 'problem')}, {' or '.join(map(str, numbers))} "
        f"sample{'' if numbers == [1] else 's'} each at "
        f"temperature {config.evaluation.temperature:g}"
    )
    console.table(title, *table_of(result.overall, result.by_source))
    scores = result.overall
    warning = unanswered(
        "evaluation",
        function=config.rewards.functions[0],
        accuracy=scores.accuracy,
        no_answer=scores.no_answer,
        truncated=scores.truncated,
    )
    if warning:
        console.say(f"warning: {warning}")
    console.say(f"{result.folder}: {SCORES}, {PLOT} and {SAMPLES}")
    return 0


if __name__ == "__main__":
    run_and_exit(main)
