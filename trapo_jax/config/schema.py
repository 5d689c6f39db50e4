"""The configuration of a training run: sections of typed fields with their defaults and help sentences."""

import os
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import pydantic
import yaml
from pydantic import Field

from trapo_jax.methods import read_constants
from trapo_jax.types import UserError

Positive = Annotated[int, Field(ge=1)]
NotNegative = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
PositiveFloat = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]
# One string stands for a list of one.
_to_tuple = pydantic.BeforeValidator(
    lambda x: (x,) if isinstance(x, str) else tuple(x) if isinstance(x, list) else x
)
StringList = Annotated[tuple[str, ...], _to_tuple]
NotNegativeFloat = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]


class Section(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, protected_namespaces=()
    )


class PretrainedConfig(Section):
    path: str = "card_shuffles_tiny"
    """A Hugging Face model folder, or `card_shuffles_tiny`, the one that ships with the package."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of activations and matmul inputs; weights, logits, losses and reductions are float32."""


class ModelConfig(PretrainedConfig):
    remat: Literal["none", "dots", "full"] = "none"
    """What the backward pass computes anew to save memory: nothing, all but matmuls, or whole layers."""
    attention: Literal["auto", "xla", "cudnn", "splash"] = "auto"
    """Attention over whole rows; auto takes what the device and the shapes allow."""


class LoraConfig(Section):
    rank: NotNegative = 0
    """Of the adapters; 0: none, all weights are trained."""
    alpha: PositiveFloat = 32.0
    """What an adapter adds is scaled by alpha / rank."""
    targets: Annotated[
        tuple[Literal["qkv", "output", "gate_up", "down"], ...], _to_tuple, Field(min_length=1)
    ] = ("qkv", "output", "gate_up", "down")
    """Matrices of every layer that get one: attention's two, the MLP's two."""


class ColumnsConfig(Section):
    preset: Literal["trl", "verl", "gsm8k"] = "verl"
    """Which column is what: TRL's, verl's or GSM8K's layout; the fields below replace parts of it."""
    prompt: str | None = None
    """Path of the prompt: a column, or with dots a field in it; text or chat messages."""
    answer: str | None = None
    """Path of the answer that the grader compares with."""
    solutions: StringList | None = None
    """Paths of expert solutions, in order of preference; a path that ends in ? may be missing."""
    source: str | None = None
    """Path of the name under which results are grouped."""
    answer_marker: str | None = None
    """The answer is what follows the last of these (GSM8K: ####)."""


class DataConfig(Section):
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
    """Parquet, JSONL or Arrow files, globs, saved folders or Hub ids, as in owner/name:config#split (split: train)."""
    validation_files: StringList = ()
    """The same for validation (default split: validation). Without any, problems are held out of the training data."""
    test_files: StringList = ()
    """The same for testing (default split: test). Without any, problems are held out of the training data."""
    columns: ColumnsConfig = ColumnsConfig()
    template: str = "none"
    """Chat template of prompts: none, chat (the tokenizer's own), chatml, qwen_math, or the import path `package.module:name` of a function of your own."""
    max_prompt_length: Positive = 16
    """Longest prompt, in tokens."""
    overlong_prompts: Literal["drop", "truncate", "error"] = "error"
    """What to do with a longer prompt; truncate keeps its end."""
    max_expert_length: Positive | None = None
    """Longest expert solution in tokens, EOS included; null for no limit."""


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

    @property
    def constants(self) -> dict[str, Any]:
        """The constants of the method, defaults included; empty for a method without any."""
        return dict(self.model_extra or {})


class EngineConfig(Section):
    engine: str = "jax"
    """Rollout engine: jax, or the import path `package.module:name` of your own."""
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


class SamplingConfig(EngineConfig):
    temperature: PositiveFloat = 1.0
    """Of the training distribution."""
    max_staleness: Annotated[int, Field(ge=0, le=1)] = 0
    """Steps a token may be older than its update; 1: idle slots begin with the next step's problems (set method.clip_*)."""


class GradingConfig(Section):
    workers: Positive = 2
    """Processes in which math and by_source judge."""
    timeout_secs: PositiveFloat = 5.0
    """Limit for judging one response; a worker that exceeds it is killed and replaced."""


class RewardsConfig(GradingConfig):
    grader: str = "card_shuffles"
    """Grader of responses: card_shuffles, math, multiple_choice, by_source (multiple_choice or math by the problem's source), or the import path `package.module:name` of a reward function of your own."""
    max_error_rate: Fraction = 0.2
    """Stop if a larger share of a step's rollouts gets no verdict (error or timeout)."""


class TrainConfig(Section):
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
    row_length: Positive | None = None
    """Tokens of a row; null: data.max_prompt_length + sampling.max_completion_length."""
    per_device_rows: Positive = 4
    """Rows a device computes at once; changes memory and speed, not the result."""
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
    weight_decay: NotNegativeFloat = 0.01
    """Weight decay, on matrices only."""
    max_grad_norm: PositiveFloat = 1.0
    """Global gradient norm is clipped to this."""
    max_skipped_steps: Positive = 5
    """Stop after this many steps in a row with a non-finite loss or gradient."""
    logprob_chunk_size: Positive = 4096
    """Tokens whose logits are held at once, on each device."""


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
    """What is scored before and after training."""
    every: Annotated[int | float, pydantic.BeforeValidator(_check_interval)] = 125
    """Interval between evaluations on the validation split: steps, or a share of the run below 1; 0 for none."""
    num_samples: Positive = 8
    """Samples per problem at temperature 1, for accuracy and pass@k."""


class CheckpointConfig(Section):
    every: NotNegative = 75
    """Steps between checkpoints; one is always written at the end."""
    keep: Positive = 2
    """Newest checkpoints kept."""
    keep_best: NotNegative = 0
    """Keep so many of the best by sampled accuracy on the validation split, too; each is saved when it is found."""


class LimitsConfig(Section):
    max_logprob_gap: PositiveFloat = 0.2
    """Stop if sampler and trainer differ by more in a step's mean log-probability of own tokens."""
    stuck_after_secs: PositiveFloat = 3600.0
    """End the process, showing where it stands, if nothing happens for so long."""


class MeshConfig(Section):
    fsdp: Annotated[int, Field(ge=-1)] = 1
    """Devices across which the batch and the parameters are split; -1 for all that remain."""
    tp: Positive = 1
    """Devices across which heads, MLPs and the vocabulary are split. The batch is split across the remaining devices."""


class Config(Section):
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
    def _check_consistency(self) -> Self:
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
        if self.mesh.fsdp == 0:
            raise ValueError("mesh.fsdp=0: give a number of devices, or -1 for all that remain")
        if self.checkpoint.keep_best and not self.evaluation.every:
            raise ValueError(
                f"checkpoint.keep_best={self.checkpoint.keep_best}: evaluation.every=0 never finds a best checkpoint; "
                "give an interval"
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
