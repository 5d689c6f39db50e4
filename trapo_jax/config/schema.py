"""Defines the sections of a configuration: typed fields with defaults and help texts."""

from collections.abc import Sequence
from typing import Annotated, Any, Literal, Self

import pydantic
from pydantic import Field

from trapo_jax.methods import Method, make_method, read_hyperparameters
from trapo_jax.types import UserError, find_by_source

# The bounds keep values within the range of int32 and float32 and small enough to allocate. No real run comes close to
# the bounds.
Positive = Annotated[int, Field(ge=1, le=2**31 - 1)]
NotNegative = Annotated[int, Field(ge=0, le=2**31 - 1)]
Length = Annotated[int, Field(ge=1, le=2**20)]  # in tokens
Rows = Annotated[int, Field(ge=1, le=2**16)]
Temperature = Annotated[float, Field(ge=0.01, le=100.0)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
PositiveFloat = Annotated[float, Field(ge=1e-9, le=1e30, allow_inf_nan=False)]
# A single string is accepted as a list with one entry.
_to_tuple = pydantic.BeforeValidator(
    lambda x: (x,) if isinstance(x, str) else tuple(x) if isinstance(x, list) else x
)
StringList = Annotated[tuple[str, ...], _to_tuple]
NotNegativeFloat = Annotated[float, Field(ge=0.0, le=1e30, allow_inf_nan=False)]


ColumnPreset = Literal[
    "trl", "verl", "numina", "gsm8k", "qa", "prompt_completion", "messages", "sharegpt"
]

CONFIG_FILE = "config.yaml"  # the resolved config in the directory of a run or evaluation


class Section(pydantic.BaseModel):
    """A section of a configuration. The docstrings of its fields are the help texts."""

    model_config = pydantic.ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, protected_namespaces=()
    )


def known_length(field: str, value: int | None) -> int:
    """Returns a length from a config, which is null until it has been derived from the data.

    Args:
      field: the name of the field, for the error message.
      value: the length.

    Raises:
      UserError: if the length is null.
    """
    if value is None:
        raise UserError(
            f"{field}=null: this length is derived from the data, which this command does not read; set a number"
        )
    return value


class PretrainedConfig(Section):
    path: str = ""
    """Hugging Face model folder, Hub id such as owner/name or owner/name@revision, or `card_shuffles_tiny` for the model that ships with the package."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Data type of activations and matmul inputs. Weights, logits, losses and reductions are always float32."""


class ModelConfig(PretrainedConfig):
    remat: Literal["none", "dots", "full"] = "none"
    """What the backward pass recomputes to save memory: nothing (none), everything except matmuls (dots), or whole layers (full)."""
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
    """Weight matrices of every layer that receive an adapter: qkv and output of attention, gate_up and down of the MLP."""


class ColumnsConfig(Section):
    preset: Literal["auto", ColumnPreset] = "auto"
    """Column layout of the dataset: trl (prompt, answer, solution), verl, numina (problem, answer, solution), gsm8k, qa (question, answer, solution), prompt_completion, messages or sharegpt. auto selects the layout that matches the first row. The fields below override parts of the layout."""
    prompt: str | None = None
    """Path of the prompt, which is either text or chat messages. A path is the name of a column, or a dotted path to a field inside a column. A column whose path ends in ? may be missing from every row."""
    answer: str | None = None
    """Path of the reference answer for the grader."""
    solutions: StringList | None = None
    """Paths of the expert solutions, in order of preference."""
    source: str | None = None
    """Path of the source name by which results are grouped."""
    extra: StringList = ()
    """Additional columns to pass to reward functions as keyword arguments."""
    answer_marker: str | None = None
    """Marker in the answer column; the answer is the text after the last occurrence of the marker (#### in GSM8K)."""


DATA_FILES = ("train_files", "validation_files", "test_files")  # the file lists in `DataConfig`


class DataConfig(Section):
    source: Literal["card_shuffles", "reasoning_gym", "files"] = "card_shuffles"
    """Source of the problems: card_shuffles (the built-in task), reasoning_gym (the reasoning-gym task named by data.task; requires the extra `tasks`), or files. The default is files if data.train_files is set or the model is not the built-in one."""
    seed: NotNegative = 0
    """Random seed for generated problems and held-out splits. It is independent of the run's seed, so that runs with different seeds have the same problems."""
    difficulty: Literal["late", "early"] = "late"
    """Card shuffles only: where a solution becomes hard, either after the third operation (late) or at an unfamiliar first operation (early)."""
    expert_style: Literal["careless", "clean"] = "careless"
    """Card shuffles only: whether expert solutions contain filler words and skipped steps (careless) or only the exact steps (clean)."""
    task: str = "gsm_symbolic"
    """Name of the reasoning-gym task. Only chain_sum, gsm_symbolic and spell_backward come with expert solutions; for the other tasks, choose a method that needs none, such as method.name=grpo."""
    task_options: dict[str, Any] = {}
    """Options of the reasoning-gym task that set its difficulty, such as {min_terms: 3, max_terms: 3} for chain_sum."""
    num_train: Positive | None = None
    """Number of training problems of a generated task."""
    num_validation: NotNegative | None = None
    """Number of validation problems, evaluated during training. If the problems come from files and data.validation_files is empty, this is the number of distinct prompts to hold out: 0 for none, null for a tenth of the prompts with an answer, but at most 128."""
    num_test: NotNegative | None = None
    """Number of test problems, evaluated before and after training. If the problems come from files and data.test_files is empty, this is the number of distinct prompts to hold out: 0 for none, null for a tenth of the prompts with an answer, but at most 128."""
    train_files: StringList = ()
    """Training data: JSON Lines, CSV, Parquet or Arrow files, globs, folders written by save_to_disk, or Hub datasets such as owner/name@revision:config#split, where each part after the name may be omitted. The default split is train."""
    validation_files: StringList = ()
    """Validation data, in the same formats. The default split is validation. If empty, problems are held out from the training data."""
    test_files: StringList = ()
    """Test data, in the same formats. The default split is test. If empty, problems are held out from the training data."""
    columns: ColumnsConfig = ColumnsConfig()
    limit: Positive | None = None
    """Maximum number of rows to read from each entry in the file lists; null for all rows, up to 2 million."""
    template: str = "auto"
    """Chat template for prompts: chat (the tokenizer's own template; chat/NAME if it has several), chatml, qwen_math, none, or the import path `package.module:name` of your own function. auto selects chat if the tokenizer has a template; otherwise, auto selects chatml for chat messages and none for text."""
    template_arguments: dict[str, Any] = {}
    """Variables for the tokenizer's chat template, such as {enable_thinking: false}."""
    system_prompt: str | None = None
    """System message to prepend to prompts that have none."""
    prompt_suffix: str | None = None
    """Text to append on its own line to the last user message, unless the message already ends with this text. Two instructions have short names: boxed is the instruction in the paper's data, which asks for the final answer within \\boxed{}; answer_is asks for "The answer is" before the result, and small models follow it more often."""
    max_prompt_length: Length | None = None
    """Maximum prompt length in tokens. null for the length of the longest prompt, but at most 1024."""
    overlong_prompts: Literal["drop", "truncate", "error"] = "drop"
    """What to do with longer prompts: drop the problem (drop), keep only the end of the prompt (truncate), or stop with an error (error)."""
    max_expert_length: Length | None = None
    """Maximum length of an expert solution in tokens, including EOS; null for no limit. Longer solutions are dropped, but their problems are kept."""

    @property
    def prompt_len(self) -> int:
        """Maximum prompt length in tokens; see `known_length` for the error."""
        return known_length("data.max_prompt_length", self.max_prompt_length)


class MethodConfig(Section):
    """The name of a method, and the method's hyperparameters as fields of this section."""

    model_config = pydantic.ConfigDict(extra="allow")

    name: str = "trapo"
    """Training method, or the import path `package.module:name` of your own method. --print-method shows its formulas."""

    @pydantic.model_validator(mode="before")
    @classmethod
    def _fill_in_hyperparameters(cls, data: Any) -> Any:
        if not isinstance(data, dict) or not isinstance(data.get("name", ""), str):
            return data  # Field validation reports the mistake.
        name = data.get("name", cls.model_fields["name"].default)
        given = {field: value for field, value in data.items() if field != "name"}
        try:
            hyperparameters = read_hyperparameters(name, given)
        except UserError as error:
            raise ValueError(str(error)) from error
        return {
            "name": name,
            **(hyperparameters.model_dump(mode="json") if hyperparameters else {}),
        }

    def make(self) -> Method:
        """Returns the method with these hyperparameters."""
        return make_method(self.name, **self.hyperparameters)

    @property
    def hyperparameters(self) -> dict[str, Any]:
        """The hyperparameters of the method, including defaults; empty if the method has none."""
        return dict(self.model_extra or {})


class EngineConfig(Section):
    engine: str = "jax"
    """Rollout engine: jax, or the import path `package.module:name` of your own engine."""
    max_completion_length: Length | None = None
    """Maximum combined length of expert prefix and completion, in tokens. null for 1.25 times the length of the longest expert solution, clipped to the range 256 to 4096; 1024 if there are no expert solutions."""
    num_slots: Rows = 32
    """Maximum number of rollouts to decode at once."""
    segment_len: Length = 8
    """Maximum number of tokens to decode before finished rollouts are replaced by pending ones."""
    num_contexts: Rows = 16
    """Number of prompts and expert prefixes whose keys and values are cached for other rollouts of the same problem."""
    prefill_tokens: Length = 512
    """Maximum number of prompt and prefix tokens in one prefill. A smaller number uses less memory."""

    @property
    def completion_len(self) -> int:
        """Maximum combined length of expert prefix and completion, in tokens; see `known_length` for the error."""
        return known_length("sampling.max_completion_length", self.max_completion_length)


class SamplingConfig(EngineConfig):
    temperature: Temperature = 1.0
    """Sampling temperature of training rollouts. Log-probabilities are computed from the scaled distribution."""
    max_staleness: Annotated[int, Field(ge=0, le=1)] = 0
    """Maximum age of a sampled token in steps. With 1, idle slots start to sample the next step's problems; in that case, set method.clip_low and method.clip_high."""


Weights = Annotated[tuple[PositiveFloat, ...], _to_tuple]
# Default of rewards.by_source if `math` is the first reward function: the sources with multiple-choice problems.
MULTIPLE_CHOICE: dict[str, str] = dict.fromkeys(
    ("arc", "arc[-_]*", "mmlu*", "gpqa*"), "multiple_choice"
)


class GradingConfig(Section):
    weights: Weights | None = None
    """Weights of rewards.functions; the reward is the weighted mean. null for equal weights."""
    by_source: dict[str, str] | None = None
    """Maps patterns for problem sources (such as `mmlu*`; case-insensitive) to functions that replace the first of rewards.functions. The first match wins. null replaces `math` with multiple_choice for the sources arc, arc-*, arc_*, mmlu* and gpqa*; {} replaces nothing."""
    workers: Annotated[int, Field(ge=1, le=1024)] = 2
    """Number of worker processes that grade responses."""
    timeout_secs: PositiveFloat = 5.0
    """Time limit in seconds for one call to a reward function. A worker that exceeds it is killed and replaced."""
    environment: StringList = ()
    """Names of environment variables that reward functions may read, such as the API token of a judge. All others are withheld, except for basic ones such as PATH."""

    def replacements(self, functions: Sequence[str]) -> dict[str, str]:
        """Returns `by_source`, or its default for these reward functions."""
        if self.by_source is not None:
            return self.by_source
        return MULTIPLE_CHOICE if list(functions[:1]) == ["math"] else {}


class RewardsConfig(GradingConfig):
    functions: StringList = ()
    """Reward functions: card_shuffles, math, math_lenient (the reward of the TRAPO authors), multiple_choice, reasoning_gym, or import paths `package.module:name` of your own functions. The first one decides whether a response is correct. Methods that do not sample (sft) need none; without reward functions, nothing is evaluated."""
    max_error_rate: Fraction = 0.2
    """Maximum fraction of a step's rollouts on which a reward function may fail or time out. If it is exceeded, the run stops."""


class TrainConfig(Section):
    num_steps: Positive = 200
    """Maximum number of steps."""
    budget_unit: Literal[
        "steps", "trained_tokens", "sampled_tokens", "flops", "problems", "seconds"
    ] = "steps"
    """Unit of train.budget. FLOPs are computed from a formula; seconds include sampling, grading and training."""
    budget: PositiveFloat | None = None
    """The run ends after the step that reaches this amount. With null, only train.num_steps limits the run."""
    problems_per_step: Rows = 8
    """Number of problems per step; a group of rollouts is sampled for each."""
    num_mini_batches: Rows = 1
    """Number of mini-batches into which the rollouts of a step are divided, with one optimizer update each. With more than one, set method.clip_low and method.clip_high."""
    num_iterations: Positive = 1
    """Number of passes over the rollouts of a step. With more than one, set method.clip_low and method.clip_high."""
    row_length: Length | None = None
    """Length of a training row in tokens. Rollouts are packed into rows, and rollouts of the same problem in a row share its prompt. null for data.max_prompt_length + sampling.max_completion_length; if completions are short, a value several times as large is faster."""
    per_device_rows: Rows = 4
    """Per-device micro-batch size in rows. It affects memory and speed, not the result."""
    learning_rate: PositiveFloat = 5e-6
    """Peak learning rate of AdamW. LoRA usually needs a value about ten times as high."""
    warmup_steps: NotNegative = 0
    """Number of steps over which the learning rate rises linearly from 0. 0 for no warmup, as in the paper."""
    decay_start: Fraction = 1.0
    """Fraction of the run after which the learning rate decays linearly. Progress is measured in units of train.budget if it is set, otherwise in steps. 1 for no decay."""
    final_learning_rate_ratio: Fraction = 0.1
    """Final learning rate as a fraction of the peak."""
    adam_b1: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.9
    """Decay rate of the first moment of AdamW."""
    adam_b2: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.999
    """Decay rate of the second moment of AdamW."""
    weight_decay: NotNegativeFloat = 0.01
    """Weight decay of AdamW, applied to matrices but not to norms and biases."""
    max_grad_norm: PositiveFloat = 1.0
    """Maximum global norm of the gradient; larger gradients are clipped."""
    max_skipped_steps: Positive = 5
    """Number of consecutive skipped updates after which the run stops. Updates with a non-finite loss or gradient are skipped."""
    logprob_chunk_size: Positive = 4096
    """Number of tokens per device whose logits are kept in memory at once."""


def _check_interval(value: Any) -> Any:
    is_steps = isinstance(value, int) and not isinstance(value, bool) and value >= 0
    is_share = isinstance(value, float) and 0 < value < 1
    if not (is_steps or is_share):
        raise ValueError(
            f"evaluation.every={value}: set a number of steps, or a fraction of the run between 0 and 1"
        )
    return value


def _check_distinct(splits: tuple[str, ...]) -> tuple[str, ...]:
    if not splits:
        raise ValueError(
            "evaluation.splits=[]: list at least one split; to skip the evaluation of the test split, set data.num_test=0"
        )
    if len(set(splits)) < len(splits):
        raise ValueError(
            f"evaluation.splits={list(splits)}: a split is listed twice; list each split once"
        )
    return splits


class ScoringConfig(Section):
    """Sampling settings for evaluation, both during training and in `trapo_jax.evaluate`."""

    temperature: Annotated[float, Field(ge=0.0, le=100.0)] = 0.6
    """Sampling temperature for evaluation; 0 for greedy decoding, otherwise at least 0.01."""
    num_samples: Rows = 4
    """Number of samples per problem, for the sampled accuracy (avg@k) and pass@k."""
    num_samples_by_source: dict[str, Rows] = {}
    """Maps patterns for problem sources (case-insensitive) to the number of samples per problem, such as {aime*: 32, amc*: 32}. The first match wins."""

    @pydantic.model_validator(mode="after")
    def _check_temperature(self) -> Self:
        if 0 < self.temperature < 0.01:
            raise ValueError(
                f"evaluation.temperature={self.temperature:g}: must be 0, for greedy decoding, or at least 0.01"
            )
        samples = {"num_samples": self.num_samples}
        samples |= {f"num_samples_by_source.{x}": n for x, n in self.num_samples_by_source.items()}
        for field, number in samples.items():
            if self.temperature == 0 and number > 1:
                raise ValueError(
                    f"evaluation.{field}={number}: with evaluation.temperature=0, all samples would be the same; set "
                    f"evaluation.{field}=1"
                )
        return self

    def num_samples_of(self, source: str) -> int:
        """Returns the number of samples per problem of a source."""
        return find_by_source(self.num_samples_by_source, source) or self.num_samples


class EvaluationConfig(ScoringConfig):
    splits: Annotated[
        tuple[Literal["validation", "test"], ...],
        _to_tuple,
        pydantic.AfterValidator(_check_distinct),
    ] = ("test",)
    """Splits to evaluate before and after training."""
    every: Annotated[int | float, pydantic.BeforeValidator(_check_interval)] = 50
    """Interval between evaluations on the validation split: a number of steps, or a fraction of the run between 0 and 1; 0.2 evaluates at 20%, 40%, 60% and 80%. 0 for none."""


class CheckpointConfig(Section):
    every: NotNegative = 25
    """Number of steps between checkpoints. A checkpoint is always saved at the end of the run; 0 for no others."""
    keep: Positive = 2
    """Number of most recent checkpoints to keep."""
    keep_best: NotNegative = 0
    """Number of checkpoints with the highest sampled accuracy on the validation split to keep in addition to the most recent ones. A new best checkpoint is saved as soon as it is found."""
    load_best_model_at_end: bool = False
    """Whether the final test evaluation and the exported model use the best checkpoint if its sampled accuracy on the validation split is higher than that of the last checkpoint (early stopping). Requires checkpoint.keep_best of at least 1."""


class LimitsConfig(Section):
    max_logprob_gap: PositiveFloat = 0.2
    """Maximum mean difference between the sampler's and the trainer's log-probabilities for the completions of a step. If it is exceeded, the run stops."""
    stuck_after_secs: PositiveFloat = 3600.0
    """Time in seconds without progress after which the process prints a stack trace and exits."""

    @property
    def dead_after_secs(self) -> float:
        """Time in seconds after which an unresponsive process of the job is considered dead."""
        return min(60.0, self.stuck_after_secs / 2)


class MeshConfig(Section):
    fsdp: Annotated[int, Field(ge=-1)] = 1
    """Number of devices over which the batch, the parameters and the optimizer state are sharded; -1 to use all devices that remain after mesh.tp."""
    tp: Positive = 1
    """Number of devices over which attention heads, MLPs and the vocabulary are sharded. Only the batch is sharded over the remaining devices."""
