"""Loads training, validation and test problems from the config's `data` section, and reports what was dropped."""

import dataclasses
import re
from collections.abc import Iterator, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from trapo_jax.config import Config, DataConfig, EvaluateConfig
from trapo_jax.data import (
    COLUMN_PRESETS,
    Columns,
    DataReport,
    Example,
    Row,
    Template,
    card_shuffles_splits,
    encode_examples,
    examples_from_rows,
    find_preset,
    fingerprint,
    hold_out,
    make_template,
    merge_rows,
    read_rows,
    reasoning_gym_splits,
)
from trapo_jax.data.encoding import Encoder
from trapo_jax.data.instructions import LAST_LINES, instructed
from trapo_jax.methods import Method
from trapo_jax.rewards import special_tokens
from trapo_jax.types import ExpertPart, Problem, UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Splits = dict[str, list[Example]]
Reports = dict[str, list[DataReport]]
C = TypeVar("C", Config, EvaluateConfig)

# Limits on lengths that are derived from the data because they are null in the config.
MAX_PROMPT_LENGTH = 1024
MIN_COMPLETION_LENGTH, MAX_COMPLETION_LENGTH = 256, 4096
COMPLETION_LENGTH_WITHOUT_EXPERTS = 1024
EVALUATED_COMPLETION_LENGTH = 2048
ROOM_BEYOND_EXPERT = 1.25
LENGTH_MULTIPLE = 16
# By default, one in HELD_OUT_DIVISOR problems is held out from the training data, but at most MAX_HELD_OUT.
HELD_OUT_DIVISOR, MAX_HELD_OUT = 10, 128
NUM_FIRST_ROWS = 100  # rows in which the columns are looked for


@dataclasses.dataclass(frozen=True)
class LoadedData:
    """The problems of a run.

    Attributes:
      splits: the problems of each split. Validation and test may be empty if no problem has an answer, or if there is
        no reward function.
      template: the template that rendered the prompts.
      reports: counts of what was read, dropped and noted at each stage, keyed by split.
      columns: the columns read from files; None for generated problems.
      tokenizer: the policy's tokenizer.
    """

    splits: dict[str, list[Problem]]
    template: Template
    reports: Reports
    columns: Columns | None
    tokenizer: Any  # PreTrainedTokenizerFast, whose type annotations do not fit how it is used

    def summary(self) -> dict[str, Any]:
        """Returns the contents of data.json."""
        return {
            "fingerprint": fingerprint(self.splits["train"]),
            "template": {"kind": self.template.kind, "sha256": self.template.hash},
            "splits": {
                name: [dataclasses.asdict(stage) for stage in stages]
                for name, stages in self.reports.items()
            },
        }

    def shown_paths(self, paths: Sequence[str]) -> str:
        """Returns the paths that some row of the training data has, for display."""
        absent = [path for stage in self.reports.get("train", []) for path in stage.absent]
        shown = [path for path in paths if path and path not in absent]
        return ", ".join(path.removesuffix("?") for path in shown) or "none"

    def fit(self, config: C, *, context_len: int | None, completion: int) -> C:
        """Returns the config with its null lengths replaced by lengths that suit this data.

        Args:
          config: the config of a run or an evaluation.
          context_len: the model's number of positions; None if unlimited.
          completion: the maximum completion length to use if the config sets none and the context leaves enough room.

        Raises:
          UserError: if prompt and completion together exceed the context.
        """
        longest = max(len(p.prompt_ids) for split in self.splits.values() for p in split)
        prompt = config.data.max_prompt_length or _rounded(longest)
        if context_len is not None:
            if prompt >= context_len:
                raise UserError(
                    f"data.max_prompt_length={prompt}: leaves no room for a completion in the {context_len} positions "
                    "of the model (max_position_embeddings); lower it"
                )
            completion = min(completion, context_len - prompt)
        fitted = config.with_lengths(prompt=prompt, completion=completion)
        if context_len is not None and fitted.longest_rollout_len > context_len:
            raise UserError(
                f"sampling.max_completion_length={fitted.sampling.max_completion_length}: with "
                f"data.max_prompt_length={fitted.data.max_prompt_length}, it exceeds the {context_len} positions of "
                "the model (max_position_embeddings); lower one of them, or extend the model's context"
            )
        return fitted


def load_data(
    config: Config,
    method: Method,
    tokenizer: "PreTrainedTokenizerFast",
    *,
    context_len: int | None,
) -> tuple[LoadedData, Config]:
    """Loads the problems of a run.

    Args:
      config: the config of the run.
      method: the run's method, which decides which part of an expert's text is trained on, and whether training
        problems need an answer. Validation and test problems always need an answer and a reward function.
      tokenizer: the policy's tokenizer.
      context_len: the model's number of positions; None if unlimited.

    Returns:
      The problems, and the config with its lengths; see `LoadedData.fit`.

    Raises:
      UserError: if the data cannot be read, or if none of it is usable.
    """
    examples, reports, columns = read_splits(
        config.data, method.expert_part, needs_answer=method.needs_rewards
    )
    template = template_for(config.data, examples["train"], tokenizer)
    splits = {}
    with Encoder(tokenizer) as encoder:
        for name, split in examples.items():
            if name != "train":
                # Examples that cannot be graded are dropped here, after the splits were held out; see `_hold_out`.
                can_grade = bool(config.rewards.functions)
                split = [example for example in split if example.answer and can_grade]
            splits[name], report = encode(config.data, name, split, encoder, template)
            reports.setdefault(name, []).append(report)
    data = LoadedData(splits, template, reports, columns, tokenizer)
    experts = [len(expert.token_ids) for p in splits["train"] for expert in p.experts]
    completion = COMPLETION_LENGTH_WITHOUT_EXPERTS
    if experts:
        completion = _rounded(ROOM_BEYOND_EXPERT * max(experts))
        completion = min(max(completion, MIN_COMPLETION_LENGTH), MAX_COMPLETION_LENGTH)
    return data, data.fit(config, context_len=context_len, completion=completion)


def load_test_data(
    config: EvaluateConfig, tokenizer: "PreTrainedTokenizerFast", *, context_len: int | None
) -> tuple[LoadedData, EvaluateConfig]:
    """Loads the problems from `data.test_files` or, if there are no such files, the test problems of a training run.

    See `load_data` for the arguments, results and errors.
    """
    if config.data.test_files:
        examples, reports, columns = _read_test_files(config.data)
    else:
        splits, _, columns = read_splits(config.data)
        examples, reports = splits["test"], []
    template = template_for(config.data, examples, tokenizer)
    without_solutions = [example._replace(solutions=()) for example in examples]
    with Encoder(tokenizer) as encoder:
        problems, report = encode(config.data, "test", without_solutions, encoder, template)
    if not problems:
        raise UserError("data.num_test=0: there are no test problems; set data.test_files")
    reports = [*reports, dataclasses.replace(report, notes={})]
    data = LoadedData({"test": problems}, template, {"test": reports}, columns, tokenizer)
    return data, data.fit(config, context_len=context_len, completion=EVALUATED_COMPLETION_LENGTH)


def template_for(
    config: DataConfig, examples: Sequence[Example], tokenizer: "PreTrainedTokenizerFast"
) -> Template:
    """Returns the template of a config; "auto" is the tokenizer's own or, without one, depends on the prompts."""
    kind = config.template
    if kind == "auto":
        is_text = all(isinstance(example.prompt, str) for example in examples)
        needs_chat = not is_text or config.system_prompt is not None
        kind = "chat" if tokenizer.chat_template else "chatml" if needs_chat else "none"
    return make_template(kind, tokenizer, config.template_arguments)


def encode(
    config: DataConfig,
    split: str,
    examples: Sequence[Example],
    encoder: Encoder,
    template: Template,
) -> tuple[list[Problem], DataReport]:
    """Renders and encodes the examples of a split, which may be empty."""
    if not examples:
        return [], DataReport(0, 0, {}, {})
    system, suffix = config.system_prompt, config.prompt_suffix
    asked = [
        e._replace(prompt=instructed(e.prompt, system=system, suffix=suffix)) for e in examples
    ]
    problems, report = encode_examples(
        asked,
        encoder,
        template=template,
        max_prompt_length=config.max_prompt_length or MAX_PROMPT_LENGTH,
        overlong_prompts=config.overlong_prompts,
        max_expert_length=config.max_expert_length,
        name=_option_of(config, split),
    )
    if num := count_special_tokens(examples, encoder.tokenizer):
        notes = {**report.notes, "prompts that contain one of the tokenizer's special tokens": num}
        report = dataclasses.replace(report, notes=notes)
    return problems, report


def _option_of(config: DataConfig, split: str) -> str:
    """Returns the option that selects the problems of a split."""
    if config.source != "files":
        return f"data.source={config.source}"
    own = f"{split}_files"
    return f"data.{own if getattr(config, own) else 'train_files'}"


def count_special_tokens(examples: Sequence[Example], tokenizer: "PreTrainedTokenizerFast") -> int:
    """Returns the number of examples whose own text contains a special token that the tokenizer would recognize."""
    tokens = sorted(filter(None, special_tokens(tokenizer)), key=len, reverse=True)
    if not tokens:
        return 0
    pattern = re.compile("|".join(map(re.escape, tokens)))
    texts = (
        [e.prompt] if isinstance(e.prompt, str) else [message.content for message in e.prompt]
        for e in examples
    )
    return sum(any(pattern.search(text) for text in of) for of in texts)


def read_splits(
    config: DataConfig, expert_part: ExpertPart = "thought", *, needs_answer: bool = True
) -> tuple[Splits, Reports, Columns | None]:
    """Returns the raw examples of every split and, if they come from files, reports on the rows, and the columns."""
    if config.source == "files":
        return _from_files(config, expert_part, needs_answer)
    sizes = {
        "num_train": config.num_train or 0,
        "num_validation": config.num_validation or 0,
        "num_test": config.num_test or 0,
    }
    if config.source == "card_shuffles":
        splits = card_shuffles_splits(
            seed=config.seed, difficulty=config.difficulty, style=config.expert_style, **sizes
        )
    else:
        last_line = LAST_LINES.get(config.prompt_suffix or "", LAST_LINES["boxed"])
        splits = reasoning_gym_splits(
            config.task, config.task_options, seed=config.seed, last_line=last_line, **sizes
        )
    return splits, {}, None


def _from_files(
    config: DataConfig, expert_part: ExpertPart, needs_answer: bool
) -> tuple[Splits, Reports, Columns]:
    """Reads splits from files or the Hub; a split without its own files is held out from the training data."""
    columns: Columns | None = None
    splits: Splits = {}
    reports: Reports = {}
    for name, files in (
        ("train", config.train_files),
        ("validation", config.validation_files),
        ("test", config.test_files),
    ):
        if files:
            rows = _read(config, files, name)
            first = list(islice(rows, NUM_FIRST_ROWS))  # `read_rows` rejects a file without rows.
            try:
                of_split = _columns_of(config, merge_rows(first), needs_answer=needs_answer)
            except UserError as error:
                if columns is None:
                    raise
                raise UserError(
                    f"{error}; data.columns applies to every split, so rename this file's columns if they differ "
                    "from those of data.train_files"
                ) from error
            columns = columns or of_split  # Only the columns of the training data are shown.
            splits[name], report = examples_from_rows(
                chain(first, rows), of_split, expert_part=expert_part, needs_answer=needs_answer
            )
            reports[name] = [report]
    assert columns is not None
    for name, size in _held_out_sizes(config, splits).items():
        splits["train"], splits[name] = _hold_out(splits["train"], size, seed=config.seed)
    return splits, reports, columns


def _held_out_sizes(config: DataConfig, splits: Splits) -> dict[str, int]:
    """Returns the number of prompts to hold out from the training data for each split without its own files.

    Raises:
      UserError: if no prompt with an answer would be left for training.
    """
    answered = [example.prompt for example in splits["train"] if example.answer]
    num_prompts = len(set(answered))
    default = min(-(-num_prompts // HELD_OUT_DIVISOR), MAX_HELD_OUT)
    sizes = {"validation": config.num_validation, "test": config.num_test}
    sizes = {name: default if n is None else n for name, n in sizes.items() if name not in splits}
    if answered and sum(sizes.values()) >= num_prompts:
        wanted = " and ".join(f"data.num_{name}={size}" for name, size in sizes.items() if size)
        raise UserError(
            f"data.train_files: the {len(answered)} rows with an answer have {num_prompts} distinct prompts, too few "
            f"to hold out {wanted}; specify separate files for these splits, or lower these numbers (0 for none)"
        )
    return sizes


def _hold_out(
    examples: Sequence[Example], size: int, *, seed: int
) -> tuple[list[Example], list[Example]]:
    """Holds out random examples with an answer; see `hold_out`.

    The choice does not depend on examples without an answer, so that `evaluate` holds out the same examples whether or
    not training dropped those without an answer.
    """
    answered = [example for example in examples if example.answer]
    if size == 0 or not answered:
        return list(examples), []
    held_out = hold_out(answered, size, seed=seed)[1]
    prompts = {example.prompt for example in held_out}
    return [example for example in examples if example.prompt not in prompts], held_out


def _read_test_files(config: DataConfig) -> tuple[list[Example], list[DataReport], Columns]:
    columns: Columns | None = None
    examples: list[Example] = []
    reports: list[DataReport] = []
    for entry in config.test_files:
        rows = _read(config, [entry], "test")
        first = list(islice(rows, NUM_FIRST_ROWS))
        columns = dataclasses.replace(_columns_of(config, merge_rows(first)), solutions=())
        found, report = examples_from_rows(
            chain(first, rows), columns, default_source=Path(entry).stem
        )
        examples += found
        reports.append(report)
    assert columns is not None
    return examples, reports, columns


def _read(config: DataConfig, files: Sequence[str], split: str) -> Iterator[Row]:
    for entry in files:
        try:
            yield from read_rows([entry], split=split, limit=config.limit)
        except UserError as error:
            raise UserError(f"data.{split}_files: {error}") from error


def _columns_of(config: DataConfig, first: Row, *, needs_answer: bool = True) -> Columns:
    """Returns the columns that hold the fields of an example, given the merged first rows."""
    given = config.columns.model_dump(exclude={"preset"}, exclude_none=True)
    preset = config.columns.preset
    if preset == "auto":
        preset = find_preset(first, given, needs_answer=needs_answer)
    return dataclasses.replace(COLUMN_PRESETS[preset], **given)


def _rounded(length: float) -> int:
    return -(-int(length) // LENGTH_MULTIPLE) * LENGTH_MULTIPLE
