"""The configuration of a training run: sections of typed fields with their defaults and help sentences."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import pydantic
import yaml
from pydantic import Field

from trapo_jax.methods import Method, make_method, read_constants
from trapo_jax.types import UserError

Positive = Annotated[int, Field(ge=1)]
NotNegative = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
PositiveFloat = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]
# A single string is accepted as a list of one.
_to_tuple = pydantic.BeforeValidator(
    lambda x: (x,) if isinstance(x, str) else tuple(x) if isinstance(x, list) else x
)
StringList = Annotated[tuple[str, ...], _to_tuple]
NotNegativeFloat = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]


CONFIG_FILE = "config.yaml"  # in the directory of a run or an evaluation: its resolved config


class Section(pydantic.BaseModel):
    """A section of a configuration; the docstrings of its fields are their help sentences."""

    model_config = pydantic.ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, protected_namespaces=()
    )


class PretrainedConfig(Section):
    path: str = "card_shuffles_tiny"
    """Hugging Face model folder, or `card_shuffles_tiny` for the model that ships with the package."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Data type of activations and matmul inputs. Weights, logits, losses and reductions are always float32."""


class ModelConfig(PretrainedConfig):
    remat: Literal["none", "dots", "full"] = "none"
    """What the backward pass recomputes to save memory: nothing, everything except matmuls, or whole layers."""
    attention: Literal["auto", "xla", "cudnn", "splash"] = "auto"
    """Attention implementation for training rows. auto selects the best one for the device and the shapes."""


class LoraConfig(Section):
    rank: NotNegative = 0
    """Rank of the LoRA adapters. 0 disables LoRA and trains all weights."""
    alpha: PositiveFloat = 32.0
    """Scaling factor: the output of an adapter is multiplied by alpha / rank."""
    targets: Annotated[
        tuple[Literal["qkv", "output", "gate_up", "down"], ...], _to_tuple, Field(min_length=1)
    ] = ("qkv", "output", "gate_up", "down")
    """Weight matrices of every layer that get an adapter: qkv and output of attention, gate_up and down of the MLP."""


class ColumnsConfig(Section):
    preset: Literal["trl", "verl", "gsm8k"] = "verl"
    """Column layout of the dataset: that of TRL, verl or GSM8K. The fields below override parts of it."""
    prompt: str | None = None
    """Path of the prompt, which is text or chat messages. A path is a column, or a nested field with dots in its name."""
    answer: str | None = None
    """Path of the reference answer for the grader."""
    solutions: StringList | None = None
    """Paths of the expert solutions in order of preference. A path that ends in ? may be missing from rows."""
    source: str | None = None
    """Path of the name by which results are grouped."""
    extra: StringList = ()
    """Further columns, which reward functions get as keyword arguments."""
    answer_marker: str | None = None
    """Marker in the answer column; the answer is the text after its last occurrence (#### in GSM8K)."""


class DataConfig(Section):
    source: Literal["card_shuffles", "gsm_symbolic", "files"] = "card_shuffles"
    """Source of the problems: the embedded task, gsm_symbolic of reasoning-gym (requires the extra `tasks`), or files."""
    seed: NotNegative = 0
    """Random seed of generated problems and held-out splits. It is independent of the seed of the run, so that runs with different seeds can be compared."""
    difficulty: Literal["late", "early"] = "late"
    """Card shuffles only: where a solution becomes hard, after the third operation (late) or at an unfamiliar first one (early)."""
    expert_style: Literal["careless", "clean"] = "careless"
    """Card shuffles only: whether expert solutions contain filler words and skipped steps (careless) or exactly the steps (clean)."""
    num_train: Positive = 128
    """Number of training problems of a generated task."""
    num_validation: Positive = 256
    """Number of validation problems, which are evaluated during training. With files, the number held out if there are no validation_files."""
    num_test: Positive = 256
    """Number of test problems, which are evaluated before and after training. With files, the number held out if there are no test_files."""
    train_files: StringList = ()
    """Training data: Parquet, JSON Lines or Arrow files, globs, folders written by save_to_disk, or Hub datasets such as owner/name:config#split. The default split is train."""
    validation_files: StringList = ()
    """Validation data, in the same formats. The default split is validation. If empty, problems are held out of the training data."""
    test_files: StringList = ()
    """Test data, in the same formats. The default split is test. If empty, problems are held out of the training data."""
    columns: ColumnsConfig = ColumnsConfig()
    template: str = "none"
    """Chat template of prompts: none, chat (the tokenizer's own; chat/NAME for one of several), chatml, qwen_math, or the import path `package.module:name` of a function of your own."""
    max_prompt_length: Positive = 16
    """Maximum prompt length in tokens."""
    overlong_prompts: Literal["drop", "truncate", "error"] = "error"
    """What to do with longer prompts: drop the problem, keep the end of the prompt (truncate), or stop with an error."""
    max_expert_length: Positive | None = None
    """Maximum length of an expert solution in tokens, EOS included; null for no limit. Longer solutions are dropped, but their problems stay."""


class MethodConfig(Section):
    """The name of a method and its constants, which are fields of this section."""

    model_config = pydantic.ConfigDict(extra="allow")

    name: str = "trapo"
    """Training method, or the import path `package.module:name` of your own; --print-method shows its formulas."""

    @pydantic.model_validator(mode="before")
    @classmethod
    def _fill_in_constants(cls, data: Any) -> Any:
        if not isinstance(data, dict) or not isinstance(data.get("name", ""), str):
            return data  # Validation of the fields says what is wrong.
        name = data.get("name", cls.model_fields["name"].default)
        given = {field: value for field, value in data.items() if field != "name"}
        try:
            constants = read_constants(name, given)
        except UserError as error:
            raise ValueError(str(error)) from error
        return {"name": name, **(constants.model_dump(mode="json") if constants else {})}

    def make(self) -> Method:
        """Returns the method with these constants."""
        return make_method(self.name, **self.constants)

    @property
    def constants(self) -> dict[str, Any]:
        """The constants of the method, defaults included; empty for a method without any."""
        return dict(self.model_extra or {})


class EngineConfig(Section):
    engine: str = "jax"
    """Rollout engine: jax, or the import path package.module:name of another engine."""
    max_completion_length: Positive = 64
    """Maximum length of expert prefix and completion together, in tokens."""
    num_slots: Positive = 32
    """Maximum number of rollouts that are decoded at the same time."""
    segment_len: Positive = 8
    """Maximum number of tokens that are decoded before finished rollouts are replaced by waiting ones."""
    num_contexts: Positive = 16
    """Number of prompts and expert prefixes whose keys and values are cached for the other rollouts of their problem."""
    prefill_tokens: Positive = 512
    """Maximum number of prompt and prefix tokens in one prefill. A smaller number needs less memory."""


class SamplingConfig(EngineConfig):
    temperature: PositiveFloat = 1.0
    """Sampling temperature of training rollouts. Log-probabilities are those of the scaled distribution."""
    max_staleness: Annotated[int, Field(ge=0, le=1)] = 0
    """Maximum age of a sampled token in steps. 1 lets idle slots start the problems of the next step; set method.clip_low and method.clip_high then."""


Weights = Annotated[tuple[PositiveFloat, ...], _to_tuple]
# The default of rewards.by_source for mathematics: multiple-choice benchmarks.
MULTIPLE_CHOICE: dict[str, str] = dict.fromkeys(
    ("arc", "arc[-_]*", "mmlu*", "gpqa*"), "multiple_choice"
)


class GradingConfig(Section):
    weights: Weights | None = None
    """Weights of rewards.functions in the reward, which is the weighted mean. null for equal weights."""
    by_source: dict[str, str] | None = None
    """Patterns of problem sources (`mmlu*`, case ignored) and the function that replaces the first of rewards.functions there. The first match counts. With null, `math` leaves the sources arc, arc-*, mmlu* and gpqa* to multiple_choice; {} for none."""
    workers: Positive = 2
    """Number of worker processes that grade responses."""
    timeout_secs: PositiveFloat = 5.0
    """Time limit in seconds for one call of a reward function. A worker that exceeds it is killed and replaced."""
    environment: StringList = ()
    """Names of environment variables that reward functions may read, such as a token for a judge. All others except PATH and the like are withheld."""

    def replacements(self, functions: Sequence[str]) -> dict[str, str]:
        """Returns `by_source`, or its default for these reward functions."""
        if self.by_source is not None:
            return self.by_source
        return MULTIPLE_CHOICE if functions[0] == "math" else {}


def check_weights(grading: GradingConfig, functions: Sequence[str]) -> None:
    """Checks that there is one weight for each reward function.

    Raises:
      ValueError: naming the field.
    """
    if grading.weights is not None and len(grading.weights) != len(functions):
        raise ValueError(
            f"rewards.weights={list(grading.weights)}: rewards.functions has {len(functions)} entries; give one weight "
            "for each"
        )


class RewardsConfig(GradingConfig):
    functions: Annotated[StringList, Field(min_length=1)] = ("card_shuffles",)
    """Reward functions: card_shuffles, math, math_lenient (the reward of the TRAPO authors), multiple_choice, or import paths `package.module:name` of functions of your own. The first decides whether a response is correct."""
    max_error_rate: Fraction = 0.2
    """Maximum share of the rollouts of a step on which a reward function may fail or time out; the run stops above it."""


class TrainConfig(Section):
    num_steps: Positive = 375
    """Maximum number of steps."""
    budget_unit: Literal[
        "steps", "trained_tokens", "sampled_tokens", "flops", "problems", "seconds"
    ] = "steps"
    """Unit of train.budget. flops are computed by formula; seconds are those of sampling, grading and training."""
    budget: PositiveFloat | None = None
    """The run ends after the step in which this amount is reached. null limits the run by train.num_steps alone."""
    problems_per_step: Positive = 8
    """Number of problems per step; a group of rollouts is sampled for each."""
    num_iterations: Positive = 1
    """Number of optimizer updates per batch. With more than one, set method.clip_low and method.clip_high."""
    row_length: Positive | None = None
    """Length of a training row in tokens; rollouts are packed into rows. null for data.max_prompt_length + sampling.max_completion_length."""
    per_device_rows: Positive = 4
    """Number of rows per device and micro-batch. It affects memory and speed, not the result."""
    learning_rate: PositiveFloat = 2e-4
    """Peak learning rate of AdamW."""
    warmup_steps: NotNegative = 10
    """Number of steps over which the learning rate rises linearly from 0."""
    decay_start: Fraction = 0.5
    """Share of the run, by steps or by train.budget, after which the learning rate decays linearly. 1 for no decay."""
    final_learning_rate_ratio: Fraction = 0.1
    """Final learning rate as a share of the peak."""
    adam_b1: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.9
    """Decay rate of the first moment of AdamW."""
    adam_b2: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.98
    """Decay rate of the second moment of AdamW."""
    weight_decay: NotNegativeFloat = 0.01
    """Weight decay of AdamW, applied to matrices but not to norms and biases."""
    max_grad_norm: PositiveFloat = 1.0
    """Maximum global norm of the gradient; larger gradients are clipped."""
    max_skipped_steps: Positive = 5
    """The run stops after this many consecutive updates that were skipped because of a non-finite loss or gradient."""
    logprob_chunk_size: Positive = 4096
    """Number of tokens per device whose logits are in memory at the same time."""


def _check_interval(value: Any) -> Any:
    is_steps = isinstance(value, int) and not isinstance(value, bool) and value >= 0
    is_share = isinstance(value, float) and 0 < value < 1
    if not (is_steps or is_share):
        raise ValueError(
            f"evaluation.every={value}: give a number of steps, or a share of the run between 0 and 1"
        )
    return value


class EvaluationConfig(Section):
    splits: tuple[Literal["validation", "test"], ...] = ("test",)
    """Splits that are evaluated before and after training."""
    every: Annotated[int | float, pydantic.BeforeValidator(_check_interval)] = 125
    """Interval between evaluations on the validation split: a number of steps, or a share of the run between 0 and 1, so that 0.2 evaluates at 20 %, 40 %, 60 % and 80 %. 0 for none."""
    num_samples: Positive = 8
    """Number of samples per problem at temperature 1, for the sampled accuracy and pass@k."""


class CheckpointConfig(Section):
    every: NotNegative = 75
    """Number of steps between checkpoints. One is always saved at the end of the run; 0 saves no others."""
    keep: Positive = 2
    """Number of the newest checkpoints that are kept."""
    keep_best: NotNegative = 0
    """Number of checkpoints with the highest sampled accuracy on the validation split that are kept as well. A new best is saved as soon as it is found."""


class LimitsConfig(Section):
    max_logprob_gap: PositiveFloat = 0.2
    """Maximum mean difference between the log-probabilities of the sampler and the trainer on the completions of a step; the run stops above it."""
    stuck_after_secs: PositiveFloat = 3600.0
    """The process prints a stack trace and exits if it makes no progress for this many seconds."""


class MeshConfig(Section):
    fsdp: Annotated[int, Field(ge=-1)] = 1
    """Number of devices over which the batch, the parameters and the optimizer state are sharded; -1 for all that tp leaves."""
    tp: Positive = 1
    """Number of devices over which attention heads, MLPs and the vocabulary are sharded. Over the remaining devices only the batch is sharded."""


class Config(Section):
    """Everything that a training run depends on."""

    output_dir: Annotated[str, Field(min_length=1)] = "runs/card_shuffles_trapo"
    """Run directory. A run that it contains is resumed."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Random seed of the data order and of sampling."""
    log_samples: NotNegative = 4
    """Number of problems per step whose rollouts are written to samples.jsonl."""
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
    def _check_consistency(self) -> Self:
        train, data = self.train, self.data
        if train.budget is None and train.budget_unit != "steps":
            raise ValueError(
                f"train.budget=null: train.budget_unit={train.budget_unit} needs an amount; give a number"
            )
        if data.source == "files" and not data.train_files:
            raise ValueError("data.train_files=[]: data.source=files needs at least one file")
        if data.source != "files" and train.problems_per_step > data.num_train:
            raise ValueError(
                f"train.problems_per_step={train.problems_per_step}: larger than "
                f"data.num_train={data.num_train}, so that a batch would repeat problems"
            )
        check_weights(self.rewards, self.rewards.functions)
        if self.mesh.fsdp == 0:
            raise ValueError(
                "mesh.fsdp=0: give a number of devices, or -1 for all that mesh.tp leaves"
            )
        if self.checkpoint.keep_best and not self.evaluation.every:
            raise ValueError(
                f"checkpoint.keep_best={self.checkpoint.keep_best}: evaluation.every=0 never finds a best "
                "checkpoint; give an interval"
            )
        if self.row_len < self.longest_rollout_len:
            raise ValueError(
                f"train.row_length={train.row_length}: less than data.max_prompt_length + "
                f"sampling.max_completion_length = {self.longest_rollout_len}, so that a rollout might not fit"
            )
        return self

    @property
    def run_folder(self) -> Path:
        """`output_dir` with ~ expanded."""
        return Path(os.path.expanduser(self.output_dir))

    @property
    def row_len(self) -> int:
        """Length of a training row in tokens."""
        return self.train.row_length or self.longest_rollout_len

    @property
    def longest_rollout_len(self) -> int:
        """Length of the longest possible rollout in tokens, prompt included."""
        return self.data.max_prompt_length + self.sampling.max_completion_length

    def to_yaml(self) -> str:
        """Returns every field as YAML that `load_config` reads."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)
