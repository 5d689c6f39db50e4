"""Scores a model on problems: avg@k, pass@k and majority vote, with confidence intervals.

    python -m trapo_jax.evaluate model.path=DIR_OR_RUN data.test_files=math.parquet sampling.num_samples=32

Every sample is appended to samples.jsonl as soon as it is graded; the same command resumes an evaluation that was
stopped.
"""

import dataclasses
import hashlib
import json
import time
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
import yaml

from trapo_jax.config import (
    EvaluateConfig,
    ModelConfig,
    help_text,
    load_evaluate_config,
    parse_command_line,
)
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
    SAMPLES,
    check_run_folder,
    prepare_run_folder,
    write_atomically,
)
from trapo_jax.runs.saved_model import load_checkpoint
from trapo_jax.runs.system_errors import named_in_errors
from trapo_jax.types import (
    Completion,
    Grade,
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
    """The outcome of `evaluate`.

    Attributes:
      folder: directory with samples.jsonl, scores.json and a plot.
      overall: scores over all problems.
      by_source: scores of each source's problems.
    """

    folder: Path
    overall: Scores
    by_source: dict[str, Scores]


def evaluate(config: EvaluateConfig, *, show_progress: bool = False) -> EvaluationResult:
    """Evaluates a model, or resumes an evaluation that was stopped.

    Args:
      config: the configuration of the evaluation.
      show_progress: whether to print progress to the terminal.

    Raises:
      UserError: for a mistake in the config, the model, the data or the output directory.
    """
    console = Console(quiet=not show_progress)
    model, params = load_model(config)
    settings = config.model_dump(mode="json") | {"weights": weights_fingerprint(params)}
    settings.pop("output_dir")
    text = yaml.safe_dump(settings, sort_keys=True)
    check_run_folder(config.folder, text)
    config, problems, template = load_problems(config, model, console)
    prepare_run_folder(config.folder, text)
    with named_in_errors(config.folder):
        samples = sample_all(config, model, params, problems, console)
    result = EvaluationResult(config.folder, score_samples(samples), scores_by_source(samples))
    data = {
        "settings": settings | {"template": template},
        "overall": dataclasses.asdict(result.overall),
        "by_source": {name: dataclasses.asdict(s) for name, s in result.by_source.items()},
        "devices": str(jax.devices()[0].device_kind),
    }
    write_atomically(config.folder / SCORES, json.dumps(data, indent=2) + "\n")
    plot_pass_at_k(config.folder / PLOT, result.overall, result.by_source)
    return result


def load_model(config: EvaluateConfig) -> tuple[PretrainedModel, Params]:
    """Loads a Hugging Face folder, or of a training run its exported model, else its newest checkpoint."""
    path = Path(config.model.path).expanduser()
    model = ModelConfig(path=config.model.path, dtype=config.model.dtype)
    if (path / CONFIG).is_file():
        if not (path / EXPORT).is_dir():
            steps = CheckpointStore(path / CHECKPOINTS).steps()
            if not steps:
                raise UserError(f"model.path={path}: a run without a checkpoint yet")
            params, decoder, source = load_checkpoint(path / CHECKPOINTS / str(steps[-1]))
            decoder = dataclasses.replace(decoder, dtype=config.model.dtype)
            opened = open_model(model.model_copy(update={"path": str(source)}))
            return dataclasses.replace(opened, decoder=decoder), params
        model = ModelConfig(path=str(path / EXPORT), dtype=config.model.dtype)
    opened = with_weights(open_model(model))
    return opened, load_params(opened.folder, opened.decoder)


def weights_fingerprint(params: Params) -> str:
    """Returns a hash of a few numbers of every parameter; training changes all of them."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]:
        digest.update(jax.tree_util.keystr(path).encode())
        digest.update(np.asarray(leaf[(0,) * (leaf.ndim - 1)][:64], np.float32).tobytes())
    return digest.hexdigest()[:12]


def load_problems(
    config: EvaluateConfig, model: PretrainedModel, console: Console
) -> tuple[EvaluateConfig, list[Problem], str]:
    """Returns the config with lengths for the problems, the problems, and the hash of the chat template."""
    data, config = load_test_data(config, model.tokenizer, context_len=model.max_context_len)
    functions = ", ".join(config.rewards.functions)
    console.say(f"template {data.template.kind}; reward functions {functions}")
    for stage in data.reports["test"]:
        console.say(f"problems: {stage}")
    return config, data.splits["test"], data.template.hash


def sample_all(
    config: EvaluateConfig,
    model: PretrainedModel,
    params: Params,
    problems: Sequence[Problem],
    console: Console,
) -> list[Sample]:
    """Samples and grades what is not in samples.jsonl yet, and returns all samples."""
    path, sampling = config.folder / SAMPLES, config.sampling
    records = read_samples(path)
    wanted = {
        (request.problem.id, request.sample_index): request
        for problem in problems
        for request in (RolloutRequest(problem, j) for j in range(sampling.num_samples))
    }
    done = set(map(key_of, records))
    requests = [request for key, request in wanted.items() if key not in done]
    if done:
        console.say(f"resuming after {len(done)} of {len(wanted)} samples in {path}")
    with make_evaluation_actor(config, model, num_samples=len(wanted)) as actor:
        sampling_params = SamplingParams(sampling.temperature, sampling.top_p, sampling.top_k)
        progress = Progress(len(requests), console)
        with actor.sampler(params) as sample, open(path, "a", encoding="utf-8") as file:
            for completion, grade in sample(requests, sampling_params):
                text = model.tokenizer.decode(completion.token_ids)
                record = make_record(completion, grade, text=text)
                records.append(record)
                file.write(json.dumps(record) + "\n")
                file.flush()
                progress.advance(completion, grade)
        by_key = {key_of(record): record for record in records}
        samples = [sample_of(by_key[key]) for key in wanted]
        samples = merge_equal_answers(samples, actor.are_equal)
    num_shared, num_problems = count_shared_noise(records)
    if num_shared:
        console.say(
            f"warning: {num_shared} of {num_problems} problems have equal samples that are too unlikely to be drawn "
            "twice; their random keys were the same"
        )
    return samples


def make_evaluation_actor(
    config: EvaluateConfig, model: PretrainedModel, *, num_samples: int
) -> Actor:
    """Builds the actor of an evaluation, with no more slots than there are samples."""
    sampling = config.sampling
    num_slots = min(sampling.num_slots, num_samples)
    return make_actor(
        sampling.model_copy(update={"num_slots": num_slots}),
        grader_for(config.rewards, config.rewards.functions, model.tokenizer),
        model,
        max_prompt_length=config.data.prompt_len,
        seed=config.seed,
        with_truncation=sampling.top_p < 1 or sampling.top_k > 0,
    )


class Progress:
    """Prints how far sampling is: a line every few percent or every 30 seconds.

    Args:
      total: number of samples to be drawn.
      console: where to print.
    """

    def __init__(self, total: int, console: Console):
        self._total, self._console = total, console
        self._num_done = self._num_correct = self._num_tokens = 0
        self._started = self._last = time.monotonic()

    def advance(self, completion: Completion, grade: Grade) -> None:
        """Counts a graded completion."""
        self._num_done += 1
        self._num_correct += grade.is_correct
        self._num_tokens += len(completion.token_ids)
        now = time.monotonic()
        every = max(1, self._total // 20)
        is_last = self._num_done == self._total
        if self._num_done % every and not is_last and now - self._last < 30:
            return
        self._last = now
        elapsed = now - self._started
        left = elapsed / self._num_done * (self._total - self._num_done)
        self._console.say(
            f"sample {self._num_done}/{self._total}  correct {self._num_correct / self._num_done:.3f}  "
            f"{self._num_tokens / elapsed:,.0f} tokens/s  {left:.0f} s left"
        )


@command
def main(arguments: Sequence[str]) -> int:
    if "--help" in arguments or "-h" in arguments:
        print(help_text(EvaluateConfig, "evaluate", ABOUT))
        return 0
    folder = None
    try:
        config = load_evaluate_config(*parse_command_line(arguments))
        folder = config.folder
        result = evaluate(config, show_progress=True)
    except KeyboardInterrupt:
        if folder is None:
            raise
        return fail(
            f"stopped; graded samples are in {folder / SAMPLES}, and the same command resumes",
            EXIT_INTERRUPTED,
        )
    console = Console()
    title = f"test split, {result.overall.num_problems} problems, {config.sampling.num_samples} samples each at temperature {config.sampling.temperature:g}"
    console.table(title, *table_of(result.overall, result.by_source))
    console.say(f"{result.folder}: {SCORES}, {PLOT} and {SAMPLES}")
    return 0


if __name__ == "__main__":
    run_and_exit(main)
