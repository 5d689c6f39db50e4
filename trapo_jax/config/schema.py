"""The sections of configurations: typed fields with their defaults and help sentences."""

from collections.abc import Sequence
from typing import Annotated, Any, Literal, Self

import pydantic
from pydantic import Field

from trapo_jax.methods import Method, make_method, read_constants
from trapo_jax.types import UserError, find_by_source

# The bounds keep numbers within what int32 and float32 hold and what can be allocated; no real run comes near them.
Positive = Annotated[int, Field(ge=1, le=2**31 - 1)]
NotNegative = Annotated[int, Field(ge=0, le=2**31 - 1)]
Length = Annotated[int, Field(ge=1, le=2**20)]  # in tokens
Rows = Annotated[int, Field(ge=1, le=2**16)]
Temperature = Annotated[float, Field(ge=0.01, le=100.0)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
PositiveFloat = Annotated[float, Field(ge=1e-9, le=1e30, allow_inf_nan=False)]
# A single string is accepted as a list of one.
_to_tuple = pydantic.BeforeValidator(
    lambda x: (x,) if isinstance(x, str) else tuple(x) if isinstance(x, list) else x
)
StringList = Annotated[tuple[str, ...], _to_tuple]
NotNegativeFloat = Annotated[float, Field(ge=0.0, le=1e30, allow_inf_nan=False)]


ColumnPreset = Literal[
    "trl", "verl", "numina", "gsm8k", "qa", "prompt_completion", "messages", "sharegpt"
]

CONFIG_FILE = "config.yaml"  # in the directory of a run or an evaluation: its resolved config


class Section(pydantic.BaseModel):
    """A section of a configuration; the docstrings of its fields are their help sentences."""

    model_config = pydantic.ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, protected_namespaces=()
    )


def known_length(field: str, value: int | None) -> int:
    """Returns a length that may be left to the data.

    Raises:
      UserError: if it is null.
    """
    if value is None:
        raise UserError(
            f"{field}=null: it follows from the data, which is not read here; give a number"
        )
    return value


class PretrainedConfig(Section):
    path: str = ""
    """Hugging Face model folder, a Hub id such as owner/name or owner/name@revision, or `card_shuffles_tiny` for the model that ships with the package."""
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
    preset: Literal["auto", ColumnPreset] = "auto"
    """Column layout of the dataset: trl (prompt, answer, solution), verl, numina (problem, answer, solution), gsm8k, qa (question, answer, solution), prompt_completion, messages or sharegpt. auto selects the one that fits the first row. The fields below override parts of it."""
    prompt: str | None = None
    """Path of the prompt, which is text or chat messages. A path is a column, or a nested field with dots in its name. A path that ends in ? may be missing from every row."""
    answer: str | None = None
    """Path of the reference answer for the grader."""
    solutions: StringList | None = None
    """Paths of the expert solutions in order of preference."""
    source: str | None = None
    """Path of the name by which results are grouped."""
    extra: StringList = ()
    """Further columns, which reward functions get as keyword arguments."""
    answer_marker: str | None = None
    """Marker in the answer column; the answer is the text after its last occurrence (#### in GSM8K)."""


DATA_FILES = ("train_files", "validation_files", "test_files")  # fields of `DataConfig`


class DataConfig(Section):
    source: Literal["card_shuffles", "gsm_symbolic", "files"] = "card_shuffles"
    """Source of the problems: the embedded task, gsm_symbolic of reasoning-gym (requires the extra `tasks`), or files, which is the default if data.train_files are given or the model is not the embedded one."""
    seed: NotNegative = 0
    """Random seed of generated problems and held-out splits. It is independent of the seed of the run, so that runs with different seeds can be compared."""
    difficulty: Literal["late", "early"] = "late"
    """Card shuffles only: where a solution becomes hard, after the third operation (late) or at an unfamiliar first one (early)."""
    expert_style: Literal["careless", "clean"] = "careless"
    """Card shuffles only: whether expert solutions contain filler words and skipped steps (careless) or exactly the steps (clean)."""
    num_train: Positive | None = None
    """Number of training problems of a generated task."""
    num_validation: NotNegative | None = None
    """Number of validation problems, which are evaluated during training. With files, the number of different prompts held out if there are no validation_files, 0 for none; null for a tenth of those with an answer, at most 128."""
    num_test: NotNegative | None = None
    """Number of test problems, which are evaluated before and after training. With files, the number of different prompts held out if there are no test_files, 0 for none; null for a tenth of those with an answer, at most 128."""
    train_files: StringList = ()
    """Training data: JSON Lines, CSV, Parquet or Arrow files, globs, folders written by save_to_disk, or Hub datasets such as owner/name@revision:config#split, where each part after the name may be left out. The default split is train."""
    validation_files: StringList = ()
    """Validation data, in the same formats. The default split is validation. If empty, problems are held out of the training data."""
    test_files: StringList = ()
    """Test data, in the same formats. The default split is test. If empty, problems are held out of the training data."""
    columns: ColumnsConfig = ColumnsConfig()
    limit: Positive | None = None
    """Number of rows read from each entry of the files; null for all, at most 2 million."""
    template: str = "auto"
    """Chat template of prompts: chat (the tokenizer's own; chat/NAME for a named one), chatml, qwen_math, none, or the import path `package.module:name` of a function of your own. auto is chat if the tokenizer has a template, else chatml for chat messages and none for text."""
    template_arguments: dict[str, Any] = {}
    """Variables for the tokenizer's chat template, such as {enable_thinking: false}."""
    system_prompt: str | None = None
    """System message put before prompts that have none."""
    prompt_suffix: str | None = None
    """Text appended to the last user message on a line of its own, unless the message already ends with it. `boxed` is the request to put the final answer within \\boxed{}, as in the paper's data."""
    max_prompt_length: Length | None = None
    """Maximum prompt length in tokens. null for that of the longest prompt, at most 1024."""
    overlong_prompts: Literal["drop", "truncate", "error"] = "drop"
    """What to do with longer prompts: drop the problem, keep the end of the prompt (truncate), or stop with an error."""
    max_expert_length: Length | None = None
    """Maximum length of an expert solution in tokens, EOS included; null for no limit. Longer solutions are dropped, but their problems stay."""

    @property
    def prompt_len(self) -> int:
        """Maximum prompt length in tokens; raises as `known_length` does."""
        return known_length("data.max_prompt_length", self.max_prompt_length)


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
    max_completion_length: Length | None = None
    """Maximum length of expert prefix and completion together, in tokens. null for 1.25 times the longest expert solution, from 256 to 4096 tokens; 1024 if there is none."""
    num_slots: Rows = 32
    """Maximum number of rollouts that are decoded at the same time."""
    segment_len: Length = 8
    """Maximum number of tokens that are decoded before finished rollouts are replaced by waiting ones."""
    num_contexts: Rows = 16
    """Number of prompts and expert prefixes whose keys and values are cached for the other rollouts of their problem."""
    prefill_tokens: Length = 512
    """Maximum number of prompt and prefix tokens in one prefill. A smaller number needs less memory."""

    @property
    def completion_len(self) -> int:
        """Maximum length of expert prefix and completion in tokens; raises as `known_length` does."""
        return known_length("sampling.max_completion_length", self.max_completion_length)


class SamplingConfig(EngineConfig):
    temperature: Temperature = 1.0
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
    workers: Annotated[int, Field(ge=1, le=1024)] = 2
    """Number of worker processes that grade responses."""
    timeout_secs: PositiveFloat = 5.0
    """Time limit in seconds for one call of a reward function. A worker that exceeds it is killed and replaced."""
    environment: StringList = ()
    """Names of environment variables that reward functions may read, such as a token for a judge. All others except PATH and the like are withheld."""

    def replacements(self, functions: Sequence[str]) -> dict[str, str]:
        """Returns `by_source`, or its default for these reward functions."""
        if self.by_source is not None:
            return self.by_source
        return MULTIPLE_CHOICE if list(functions[:1]) == ["math"] else {}


class RewardsConfig(GradingConfig):
    functions: StringList = ()
    """Reward functions: card_shuffles, math, math_lenient (the reward of the TRAPO authors), multiple_choice, or import paths `package.module:name` of functions of your own. The first decides whether a response is correct. Methods that do not sample (sft) need none; without any, nothing is evaluated."""
    max_error_rate: Fraction = 0.2
    """Maximum share of the rollouts of a step on which a reward function may fail or time out; the run stops above it."""


class TrainConfig(Section):
    num_steps: Positive = 200
    """Maximum number of steps."""
    budget_unit: Literal[
        "steps", "trained_tokens", "sampled_tokens", "flops", "problems", "seconds"
    ] = "steps"
    """Unit of train.budget. flops are computed by formula; seconds are those of sampling, grading and training."""
    budget: PositiveFloat | None = None
    """The run ends after the step in which this amount is reached. null limits the run by train.num_steps alone."""
    problems_per_step: Rows = 8
    """Number of problems per step; a group of rollouts is sampled for each."""
    num_mini_batches: Rows = 1
    """Number of optimizer batches into which the rollouts of a step are divided. With more than one, set method.clip_low and method.clip_high."""
    num_iterations: Positive = 1
    """Number of passes over the rollouts of a step. With more than one, set method.clip_low and method.clip_high."""
    row_length: Length | None = None
    """Length of a training row in tokens; rollouts are packed into rows. null for data.max_prompt_length + sampling.max_completion_length."""
    per_device_rows: Rows = 4
    """Number of rows per device and micro-batch. It affects memory and speed, not the result."""
    learning_rate: PositiveFloat = 5e-6
    """Peak learning rate of AdamW. LoRA usually needs ten times as much."""
    warmup_steps: NotNegative = 0
    """Number of steps over which the learning rate rises linearly from 0. 0 for none, as in the paper."""
    decay_start: Fraction = 1.0
    """Share of the run, by steps or by train.budget, after which the learning rate decays linearly. 1 for no decay."""
    final_learning_rate_ratio: Fraction = 0.1
    """Final learning rate as a share of the peak."""
    adam_b1: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.9
    """Decay rate of the first moment of AdamW."""
    adam_b2: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.999
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


def _check_distinct(splits: tuple[str, ...]) -> tuple[str, ...]:
    if len(set(splits)) < len(splits):
        raise ValueError(f"evaluation.splits={list(splits)}: a split occurs twice; name each once")
    return splits


class ScoringConfig(Section):
    """How problems are sampled in an evaluation, during training or on its own."""

    temperature: NotNegativeFloat = 0.6
    """Sampling temperature of evaluations; 0 is greedy."""
    num_samples: Rows = 4
    """Number of samples per problem, for the sampled accuracy (avg@k) and pass@k."""
    num_samples_by_source: dict[str, Rows] = {}
    """Patterns of problem sources (`aime*`, case ignored) and the number of samples per problem there, such as {aime*: 32, amc*: 32}. The first match counts."""

    @pydantic.model_validator(mode="after")
    def _check_greedy(self) -> Self:
        samples = {"num_samples": self.num_samples}
        samples |= {f"num_samples_by_source.{x}": n for x, n in self.num_samples_by_source.items()}
        for field, number in samples.items():
            if self.temperature == 0 and number > 1:
                raise ValueError(
                    f"evaluation.{field}={number}: evaluation.temperature=0 draws the same sample every time; give "
                    f"evaluation.{field}=1"
                )
        return self

    def num_samples_of(self, source: str) -> int:
        """Returns the number of samples for each problem of a source."""
        return find_by_source(self.num_samples_by_source, source) or self.num_samples


class EvaluationConfig(ScoringConfig):
    splits: Annotated[
        tuple[Literal["validation", "test"], ...],
        _to_tuple,
        Field(min_length=1),
        pydantic.AfterValidator(_check_distinct),
    ] = ("test",)
    """Splits that are evaluated before and after training."""
    every: Annotated[int | float, pydantic.BeforeValidator(_check_interval)] = 50
    """Interval between evaluations on the validation split: a number of steps, or a share of the run between 0 and 1, so that 0.2 evaluates at 20 %, 40 %, 60 % and 80 %. 0 for none."""


class CheckpointConfig(Section):
    every: NotNegative = 25
    """Number of steps between checkpoints. One is always saved at the end of the run; 0 saves no others."""
    keep: Positive = 2
    """Number of the newest checkpoints that are kept."""
    keep_best: NotNegative = 0
    """Number of checkpoints with the highest sampled accuracy on the validation split that are kept as well. A new best is saved as soon as it is found."""
    load_best_model_at_end: bool = False
    """Whether the test split is evaluated and the model exported with the best checkpoint rather than the last one, if its sampled accuracy on the validation split is higher: early stopping. Needs keep_best of at least 1."""


class LimitsConfig(Section):
    max_logprob_gap: PositiveFloat = 0.2
    """Maximum mean difference between the log-probabilities of the sampler and the trainer on the completions of a step; the run stops above it."""
    stuck_after_secs: PositiveFloat = 3600.0
    """The process prints a stack trace and exits if it makes no progress for this many seconds."""

    @property
    def dead_after_secs(self) -> float:
        """Time after which a process of the job that does not respond counts as dead, in seconds."""
        return min(60.0, self.stuck_after_secs / 2)


class MeshConfig(Section):
    fsdp: Annotated[int, Field(ge=-1)] = 1
    """Number of devices over which the batch, the parameters and the optimizer state are sharded; -1 for all that tp leaves."""
    tp: Positive = 1
    """Number of devices over which attention heads, MLPs and the vocabulary are sharded. Over the remaining devices only the batch is sharded."""
