"""Configuration: pydantic models, filled from YAML and `a.b=c` overrides, validated once.

The YAML file and the overrides are merged as plain data first; then one strict validation. Every mistake
becomes one line that names the field, where it was set, the value and the way out.
"""

import difflib
import json
import os
import re
import sys
from collections.abc import Hashable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args, get_origin

import pydantic
import yaml
from pydantic import Field

from trapo_jax.types import UserError

Positive = Annotated[int, Field(ge=1)]
NotNegative = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
PositiveFloat = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]
# One string stands for a list of one.
_as_tuple = pydantic.BeforeValidator(
    lambda x: (x,) if isinstance(x, str) else tuple(x) if isinstance(x, list) else x
)
StringList = Annotated[tuple[str, ...], _as_tuple]
NotNegativeFloat = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]


class _Section(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, protected_namespaces=()
    )


class ModelConfig(_Section):
    path: str = "card_shuffles_tiny"
    """A Hugging Face model folder, or `card_shuffles_tiny`, the one that ships with the package."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of activations and matmul inputs; weights, logits, losses and reductions are float32."""
    remat: Literal["none", "dots", "full"] = "none"
    """What the backward pass computes anew to save memory: nothing, all but matmuls, or whole layers."""
    attention: Literal["auto", "xla", "cudnn", "splash"] = "auto"
    """Attention over whole rows; auto takes what the device and the shapes allow."""


class LoraConfig(_Section):
    rank: NotNegative = 0
    """Of the adapters; 0: none, all weights are trained."""
    alpha: PositiveFloat = 32.0
    """What an adapter adds is scaled by alpha / rank."""
    targets: Annotated[
        tuple[Literal["qkv", "output", "gate_up", "down"], ...], _as_tuple, Field(min_length=1)
    ] = ("qkv", "output", "gate_up", "down")
    """Matrices of every layer that get one: attention's two, the MLP's two."""


class ColumnsConfig(_Section):
    preset: Literal["trl", "verl", "gsm8k"] = "verl"
    """Which column is what: TRL's, verl's or GSM8K's layout; the fields below replace parts of it."""
    prompt: str | None = None
    """Path of the prompt: a column, or with dots a field in it; text or chat messages."""
    answer: str | None = None
    """Path of the answer that the verifier compares with."""
    solutions: StringList | None = None
    """Paths of expert solutions, in order of preference; a path that ends in ? may be missing."""
    source: str | None = None
    """Path of the name under which results are grouped."""
    answer_marker: str | None = None
    """The answer is what follows the last of these (GSM8K: ####)."""


class DataConfig(_Section):
    source: Literal["card_shuffles", "gsm_symbolic", "files"] = "card_shuffles"
    """Where problems come from: the embedded task, reasoning-gym's gsm_symbolic (extra tasks), or files."""
    seed: NotNegative = 0
    """Of procedural problems and of held-out splits; independent of the run's seed, so that runs compare."""
    difficulty: Literal["late", "early"] = "late"
    """Card shuffles: hard after the third operation, or at the (unfamiliar) first."""
    expert_style: Literal["careless", "clean"] = "careless"
    """Card shuffles: whether the expert mumbles and leaps, or writes each step and nothing else."""
    num_train: Positive = 128
    """Training problems of a procedural source."""
    num_validation: Positive = 256
    """Validation problems, for evaluation during training; of a source of files, how many are held out."""
    num_test: Positive = 256
    """Test problems, for evaluation before and after training; of a source of files, as above."""
    train_files: StringList = ()
    """Parquet, JSONL or Arrow files, globs, saved folders or hub ids (owner/name or owner/name:config)."""
    validation_files: StringList = ()
    """The same for validation; none: held out of the training data."""
    test_files: StringList = ()
    """The same for testing; none: held out of the training data."""
    train_split: str = "train"
    """Split of a hub id or saved folder among train_files."""
    validation_split: str = "validation"
    """Split of a hub id or saved folder among validation_files."""
    test_split: str = "test"
    """Split of a hub id or saved folder among test_files."""
    columns: ColumnsConfig = ColumnsConfig()
    template: Literal["none", "chat", "chatml", "qwen_math"] = "none"
    """How a prompt becomes text, for training and evaluation alike: as it stands, or by a chat template."""
    max_prompt_length: Positive = 16
    """Longest prompt, in tokens."""
    overlong_prompts: Literal["drop", "truncate", "error"] = "error"
    """What to do with a longer prompt; truncate keeps its end."""
    max_expert_length: Positive | None = None
    """Longest expert solution in tokens, EOS included; null for no limit."""
    overlong_experts: Literal["drop", "truncate"] = "drop"
    """Leave a longer solution out (its problem stays), or cut it; a cut one ends without EOS."""


class MethodConfig(_Section):
    name: Literal[
        "trapo",
        "trapo_plus",
        "grpo",
        "sft",
        "sft_then_grpo",
        "micro_group_grpo",
        "micro_group_sft",
        "micro_group_luffy",
        "luffy",
        "rl_plus_sft",
        "relift",
        "hpt",
        "srft",
        "chord",
        "chord_phi",
        "uft",
        "prefix_rft",
    ] = "trapo"
    """Training method; --print-method shows its formulas and constants."""
    preset: Literal["paper", "reference"] = "paper"
    """Guidance of TRAPO and its ablations (micro_group_*) as in the paper or as in its released code."""
    constants: dict[str, Any] = {}
    """Constants of the method that differ from its own; --print-method lists them."""
    alpha: Annotated[float, Field(gt=0.0, le=1.0)] = 0.1
    """TrSFT's trust-region bound: expert tokens below this probability get a reduced gradient."""
    expert_weight: NotNegativeFloat | None = None
    """Weight of the loss on expert tokens; null for the method's own."""
    normalizer: Literal["token_mean", "sequence_mean", "constant_sum", "constant_mean"] | None = (
        None
    )
    """What sums of token losses are divided by; null for the method's own."""
    clip_low: Fraction | None = None
    """Clip the ratio of new to old policy below 1 - clip_low; null for the method's own, mostly no bound."""
    clip_high: NotNegativeFloat | None = None
    """Clip the ratio above 1 + clip_high; null for the method's own, mostly no bound."""
    kl_weight: NotNegativeFloat | None = None
    """Weight of the divergence (k3) from the model the run began with, which is then held in memory too; null for the method's own, mostly 0."""
    scale_advantages_by_std: bool | None = None
    """Divide a group's advantages by their standard deviation; null for the method's own, mostly false."""
    entropy_weight: NotNegativeFloat = 0.0
    """Weight of the entropy bonus on own tokens."""


class SamplingConfig(_Section):
    engine: str = "jax"
    """Rollout engine: jax, or the import path `package.module:name` of your own."""
    temperature: PositiveFloat = 1.0
    """Of the training distribution."""
    max_completion_length: Positive = 64
    """Longest expert prefix + completion, in tokens."""
    num_slots: Positive = 32
    """Rows decoded at once."""
    segment_len: Positive = 8
    """Tokens decoded between two looks at the queue, at most."""
    num_contexts: Positive = 16
    """Prompts and expert prefixes whose keys and values are kept for the other rollouts of their problem."""
    prefill_tokens: Positive = 512
    """Tokens of prompts and prefixes run through the model at once, at most; bounds memory."""
    max_staleness: Annotated[int, Field(ge=0, le=1)] = 0
    """Steps a token may be older than its update; 1: idle slots begin with the next step's problems (set method.clip_*)."""


class RewardsConfig(_Section):
    verifier: Literal["card_shuffles", "math", "multiple_choice", "by_source"] = "card_shuffles"
    """What judges a response; by_source is multiple_choice or math by the problem's source."""
    workers: Positive = 2
    """Processes in which math and by_source judge."""
    timeout_secs: PositiveFloat = 5.0
    """Limit for judging one response; a worker that exceeds it is killed and replaced."""
    max_response_chars: Positive = 100_000
    """Of a longer response only so many characters at its end are judged."""
    max_error_rate: Fraction = 0.2
    """Stop if a larger share of a step's rollouts gets no verdict (error or timeout)."""


class TrainConfig(_Section):
    num_steps: Positive = 375
    """Optimiser steps, at most."""
    budget_unit: Literal[
        "steps", "trained_tokens", "sampled_tokens", "flops", "problems", "seconds"
    ] = "steps"
    """What train.budget counts; flops by formula, seconds of sampling, judging and training."""
    budget: PositiveFloat | None = None
    """The run ends after the first step at which so much is spent; null for train.num_steps alone."""
    problems_per_step: Positive = 8
    """Problems in one optimiser batch; each gets a group of rollouts."""
    num_iterations: Positive = 1
    """Updates on each optimiser batch; with more than one, set method.clip_low and method.clip_high."""
    packing: bool = True
    """Several rollouts a row; false: one a row, the rest of it pad."""
    row_length: Positive | None = None
    """Tokens of a row; null: data.max_prompt_length + sampling.max_completion_length."""
    per_device_rows: Positive = 4
    """Rows a device computes at once; changes memory and speed, not the result."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """muon orthogonalises the updates of attention and MLP matrices; AdamW updates the rest."""
    learning_rate: PositiveFloat = 2e-4
    """Peak learning rate, of Muon too: its updates are scaled to the size of AdamW's."""
    warmup_steps: NotNegative = 10
    """Linear warm-up from 0; a shorter run ends within it."""
    decay_start: Fraction = 0.5
    """Share of the run, by steps or by train.budget, after which the learning rate falls linearly."""
    final_learning_rate_ratio: Fraction = 0.1
    """Learning rate at the end, as a share of the peak."""
    adam_b1: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.9
    """AdamW's decay of the first moment."""
    adam_b2: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.98
    """AdamW's decay of the second moment."""
    muon_beta: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.95
    """Muon's decay of the momentum."""
    weight_decay: NotNegativeFloat = 0.01
    """Weight decay, on matrices only."""
    max_grad_norm: PositiveFloat = 1.0
    """Global gradient norm is clipped to this."""
    max_skipped_steps: Positive = 5
    """Stop after this many steps in a row with a non-finite loss or gradient."""
    logprob_chunk_size: Positive = 4096
    """Tokens whose logits are held at once, on each device."""


class EvaluationConfig(_Section):
    splits: tuple[Literal["validation", "test"], ...] = ("test",)
    """What is scored before and after training."""
    every: NotNegative = 125
    """Steps between evaluations on the validation split; 0 for none during training."""
    times: NotNegative = 0
    """Evaluations on the validation split at equal shares of the run, besides; 0 for none."""
    num_samples: Positive = 8
    """Samples per problem at temperature 1, for accuracy and pass@k."""


class CheckpointConfig(_Section):
    every: NotNegative = 75
    """Steps between checkpoints; one is always written at the end."""
    keep: Positive = 2
    """Newest checkpoints kept."""
    keep_every: NotNegative = 0
    """Keep those of every so many steps, too; 0 for none."""
    keep_best: NotNegative = 0
    """Keep so many of the best by sampled accuracy on the validation split, too; each is saved when it is found."""


class LimitsConfig(_Section):
    max_logprob_gap: PositiveFloat = 0.2
    """Stop if sampler and trainer differ by more in a step's mean log-probability of own tokens."""
    warn_after_steps: Positive = 20
    """Warn if for so many steps all completions were cut off, or no problem had unequal rewards."""
    stuck_after_secs: PositiveFloat = 3600.0
    """End the process, showing where it stands, if nothing happens for so long."""


class MeshConfig(_Section):
    data: Annotated[int, Field(ge=-1)] = -1
    """Devices along which the batch is split; -1 for all that are left."""
    fsdp: Annotated[int, Field(ge=-1)] = 1
    """Devices along which batch and parameters are split; -1 for all that are left."""
    tp: Positive = 1
    """Devices along which heads, MLP and vocabulary are split."""


class Config(_Section):
    """Everything a run depends on."""

    output_dir: Annotated[str, Field(min_length=1)] = "runs/card_shuffles_trapo"
    """The run folder; a run that is there already is resumed."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Of data order and sampling."""
    log_samples: NotNegative = 4
    """Problems a step whose rollouts go to samples.jsonl."""
    model: ModelConfig = ModelConfig()
    lora: LoraConfig = LoraConfig()
    data: DataConfig = DataConfig()
    method: MethodConfig = MethodConfig()
    sampling: SamplingConfig = SamplingConfig()
    rewards: RewardsConfig = RewardsConfig()
    train: TrainConfig = TrainConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    limits: LimitsConfig = LimitsConfig()
    mesh: MeshConfig = MeshConfig()

    @pydantic.model_validator(mode="after")
    def _fields_agree(self) -> Self:
        train, data = self.train, self.data
        if train.budget is None and train.budget_unit != "steps":
            raise ValueError(
                f"train.budget=null: train.budget_unit={train.budget_unit} needs a number"
            )
        if data.source == "files" and not data.train_files:
            raise ValueError("data.train_files=[]: data.source=files needs them")
        if data.source != "files" and train.problems_per_step > data.num_train:
            raise ValueError(
                f"train.problems_per_step={train.problems_per_step}: more than "
                f"data.num_train={data.num_train}; a batch would repeat problems"
            )
        if self.lora.rank and train.optimizer == "muon":
            raise ValueError(
                f"train.optimizer=muon: it updates whole matrices, and lora.rank={self.lora.rank} trains none; "
                "give train.optimizer=adamw"
            )
        if 0 in (self.mesh.data, self.mesh.fsdp) or self.mesh.data == self.mesh.fsdp == -1:
            raise ValueError(
                f"mesh.data={self.mesh.data}, mesh.fsdp={self.mesh.fsdp}: give numbers of devices, or -1 "
                "for one of them"
            )
        if self.checkpoint.keep_best and not (self.evaluation.every or self.evaluation.times):
            raise ValueError(
                f"checkpoint.keep_best={self.checkpoint.keep_best}: evaluation.every=0 and "
                "evaluation.times=0 find none"
            )
        if self.row_len < self.longest_rollout_len:
            raise ValueError(
                f"train.row_length={train.row_length}: less than data.max_prompt_length + "
                f"sampling.max_completion_length = {self.longest_rollout_len}; a rollout might not fit"
            )
        return self

    @property
    def run_folder(self) -> Path:
        """`output_dir`, a ~ in it expanded."""
        return Path(os.path.expanduser(self.output_dir))

    @property
    def row_len(self) -> int:
        """Tokens of a training row."""
        return self.train.row_length or self.longest_rollout_len

    @property
    def longest_rollout_len(self) -> int:
        """Tokens of the longest possible rollout."""
        return self.data.max_prompt_length + self.sampling.max_completion_length

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)


def load_config(file: Path | None, overrides: Sequence[tuple[str, str]]) -> Config:
    """Merges file and overrides (`("train.num_steps", "10")`) and validates the result.

    Raises:
      UserError: one line for each mistake.
    """
    data = read_yaml(file) if file else {}
    for name, text in overrides:
        _set(data, name, _parse_scalar(name, text))
    try:
        text = json.dumps(data, default=str)
    except (
        TypeError,
        ValueError,
        RecursionError,
    ) as error:  # a date for a key, a list within itself
        raise UserError(
            f"{file or 'command line'}: not plain fields and values ({error})"
        ) from error
    try:
        # Strict JSON mode: no "3" for 3, no true for 1; lists and dicts as YAML gives them.
        return Config.model_validate_json(text, strict=True)
    except pydantic.ValidationError as error:
        given = {name for name, _ in overrides}
        lines = [_explain(e, file=file, overrides=given) for e in error.errors()]
        raise UserError("\n".join(lines)) from error


def read_yaml(file: Path) -> dict[str, Any]:
    """A YAML mapping from a file.

    Raises:
      UserError: naming the file, and the line of a syntax error.
    """
    try:
        text = file.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: not UTF-8 text (byte {error.start})") from error
    try:
        data = yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise UserError(f"{file}{line}: not valid YAML ({problem})") from error
    except (ValueError, RecursionError) as error:  # a number of 5,000 digits, the 31st of February
        raise UserError(f"{file}: not valid YAML ({error})") from error
    if not isinstance(data, dict):
        raise UserError(f"{file}: expected fields such as 'seed: 0', found {_short(data)}")
    return data


def list_fields(section: type[pydantic.BaseModel] = Config, prefix: str = "") -> Iterator[tuple]:
    """(name, type, default, sentence) of every field, for `--help`."""
    for name, field in section.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, pydantic.BaseModel):
            yield from list_fields(field.annotation, f"{prefix}{name}.")
        else:
            default = yaml.safe_dump(field.default, default_flow_style=True).split("\n")[0]
            yield f"{prefix}{name}", _type_name(field), default, field.description


class _Loader(yaml.SafeLoader):
    """YAML 1.2's floats (`1e-6` is a number), and no duplicate keys."""

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, Hashable):
                raise yaml.constructor.ConstructorError(
                    problem=f"{_short(key)} cannot be a field", problem_mark=key_node.start_mark
                )
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    problem=f"duplicate key {key!r}", problem_mark=key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+\Z"),
    "-+.0123456789",
)


def _parse_scalar(name: str, text: str) -> Any:
    try:
        return yaml.load(text, _Loader)
    except (yaml.YAMLError, ValueError, TypeError, RecursionError) as error:
        raise UserError(f"command line: {name}={text!r:.200}: not a YAML value") from error


def _set(data: dict[str, Any], name: str, value: Any) -> None:
    *sections, leaf = name.split(".")
    for section in sections:
        inner = data.setdefault(section, {})
        if inner is None:
            inner = data[section] = {}
        if not isinstance(inner, dict):
            raise UserError(f"command line: {name}: {section!r} is not a section")
        data = inner
    data[leaf] = value


def _explain(error: Any, *, file: Path | None, overrides: set[str]) -> str:
    """One line: where, field, value, what is wrong, what to do."""
    name = ".".join(str(part) for part in error["loc"]).replace("\n", "\\n")
    from_command_line = any(name == o or name.startswith(o + ".") for o in overrides)
    where = "command line" if from_command_line or file is None else str(file)
    if error["type"] == "extra_forbidden":
        return f"{where}: {name}: unknown field{_did_you_mean(name)}"
    if error["type"] == "value_error":
        return f"{where}: {error['ctx']['error']}"
    message = error["msg"][0].lower() + error["msg"][1:]
    return f"{where}: {name}={_short(error['input'])}: {message}"


def _did_you_mean(name: str) -> str:
    names = [field[0] for field in list_fields()]
    sections = sorted({n.rsplit(".", 1)[0] for n in names if "." in n})
    matches = difflib.get_close_matches(name, names + sections, n=1, cutoff=0.6)
    if not matches:  # the right name in the wrong section?
        leaf = name.rsplit(".", 1)[-1]
        leaves = {n.rsplit(".", 1)[-1]: n for n in names}
        close = difflib.get_close_matches(leaf, leaves, n=1, cutoff=0.8)
        matches = [leaves[m] for m in close]
    return f"; did you mean {matches[0]}?" if matches else "; --help lists all fields"


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else text[:57] + "..."


def _type_name(field: Any) -> str:
    def name(annotation: Any) -> str:
        if annotation is type(None):
            return "null"
        arguments = get_args(annotation)
        if not arguments:
            return getattr(annotation, "__name__", str(annotation))
        if hasattr(annotation, "__metadata__"):  # Annotated[int, ...]
            return name(arguments[0])
        if get_origin(annotation) in (tuple, list):
            return f"list of {name(arguments[0])}"
        if get_origin(annotation) is dict:
            return f"{name(arguments[1])} by name"
        if all(isinstance(a, str) for a in arguments):  # Literal["a", "b"]
            return "|".join(arguments)
        return "|".join(name(a) for a in arguments)

    return name(field.annotation)


USAGE = """\
usage: python -m trapo_jax.{command} [--config FILE] [FIELD=VALUE ...]

{about}

  --config FILE     YAML file; without it, the defaults below (= configs/smoke_cpu.yaml)
  --print-method    shows the method's formulas, constants and source, and does nothing else
  FIELD=VALUE       overrides a field; also --FIELD VALUE and --FIELD=VALUE
  --help            this text

Fields (type, default):
"""


def help_text(command: str, about: str) -> str:
    """The `--help` text: usage and every field with type, default and one sentence."""
    lines = [USAGE.format(command=command, about=about)]
    for name, kind, default, sentence in list_fields():
        lines.append(f"  {name}  ({kind}, {default})\n      {sentence}")
    return "\n".join(lines)


def parse_command_line(arguments: Sequence[str]) -> tuple[Path | None, list[tuple[str, str]]]:
    """Splits a command line into the config file and overrides, in order.

    Raises:
      UserError: for anything that is neither.
    """
    file: Path | None = None
    overrides: list[tuple[str, str]] = []
    rest = list(arguments)
    while rest:
        argument = rest.pop(0)
        is_option = argument.startswith("--")
        name, equals, value = argument.removeprefix("--").partition("=")
        if not is_option and not equals:
            hint = f"; did you mean --config {argument}?" if argument.endswith(".yaml") else ""
            raise UserError(f"command line: {argument!r} is not FIELD=VALUE{hint}")
        if not equals:
            if not rest or rest[0].startswith("--"):
                raise UserError(f"command line: --{name} has no value")
            value = rest.pop(0)
        if not name:
            raise UserError(f"command line: {argument!r} names no field")
        if is_option and name == "config":
            if file is not None:
                raise UserError(f"command line: --config twice, {file} and {value}; give one file")
            file = Path(value)
        else:
            overrides.append((name, value))
    return file, overrides


def config_from_command_line(command: str, about: str, arguments: Sequence[str]) -> Config:
    """Parses, validates, or prints the help and exits."""
    if "--help" in arguments or "-h" in arguments:
        print(help_text(command, about))
        sys.exit(0)
    return load_config(*parse_command_line(arguments))
