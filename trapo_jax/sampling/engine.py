"""Defines the rollout engine protocol and the registry of engines. Does not import JAX.

An engine takes token ids and returns token ids with their log-probabilities under the temperature-scaled
distribution. The training loop uses only the members of `RolloutEngine`. To use your own engine, write a callable that
takes an `EngineSpec` and select it by its import path: `sampling.engine=my_package.my_module:MyEngine`.
"""

import dataclasses
import operator
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from trapo_jax.inputs.files import reason_of
from trapo_jax.inputs.import_path import import_object, suggest
from trapo_jax.types import Completion, RolloutRequest, SamplingParams, UserError

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from trapo_jax.models import DecoderConfig

# Import paths of the engines, keyed by name, so that an engine's dependencies are imported only if it is used.
ENGINES = {"jax": "trapo_jax.sampling.jax_engine:JaxEngine"}


@dataclasses.dataclass(frozen=True)
class EngineSpec:
    """Everything needed to build an engine.

    Attributes:
      decoder: the model's shape.
      num_slots: number of completions that each replica samples at once.
      max_prompt_length: maximum length of a prompt, in tokens.
      max_completion_length: maximum length of expert prefix plus completion, in tokens.
      segment_len: maximum number of tokens decoded per slot in one call of `step`.
      num_contexts: number of prompts and expert prefixes that each replica caches.
      prefill_tokens: maximum number of tokens prefilled at once.
      eos_ids: token ids that end a completion.
      seed: the run's seed.
      model_folder: the Hugging Face folder that the run starts from; None if the weights come from elsewhere.
      with_truncation: whether requests may use top-p and top-k.
      mesh: the devices, with the axes `data`, `fsdp`, and `tp`; None for one device.
    """

    decoder: "DecoderConfig"
    num_slots: int
    max_prompt_length: int
    max_completion_length: int
    segment_len: int
    num_contexts: int
    prefill_tokens: int
    eos_ids: Sequence[int]
    seed: int
    model_folder: Path | None = None
    with_truncation: bool = False
    mesh: "Mesh | None" = None


@dataclasses.dataclass(frozen=True)
class EngineStats:
    """Counters of an engine's work since it was built. Addition and subtraction work field by field.

    Attributes:
      prefilled_tokens: number of prompt and expert-prefix tokens that were prefilled.
      decoded_tokens: number of sampled tokens.
      decode_steps: number of forward passes that sampled these tokens; each samples one token per active slot.
      slot_tokens: number of tokens that these steps would have sampled if all computed slots had been active.
    """

    prefilled_tokens: int = 0
    decoded_tokens: int = 0
    decode_steps: int = 0
    slot_tokens: int = 0

    @property
    def slot_utilization(self) -> float:
        """Share of the computed slots that were active, in [0, 1]."""
        return self.decoded_tokens / max(1, self.slot_tokens)

    def __add__(self, other: "EngineStats") -> "EngineStats":
        return self._combine(operator.add, other)

    def __sub__(self, other: "EngineStats") -> "EngineStats":
        return self._combine(operator.sub, other)

    def _combine(self, operation: Callable[[int, int], int], other: "EngineStats"):
        pairs = zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)
        return EngineStats(*(operation(a, b) for a, b in pairs))


@dataclasses.dataclass(frozen=True)
class EngineMemory:
    """Memory that an engine occupies on each device from `update_weights` to `release`.

    Attributes:
      kv_cache_bytes: size of the KV cache in bytes.
    """

    kv_cache_bytes: int


class RolloutEngine(Protocol):
    """Samples completions. This is the complete interface that the training loop uses."""

    def submit(
        self, requests: Sequence[RolloutRequest], *, step: int, params: SamplingParams
    ) -> None:
        """Queues requests.

        Args:
          requests: distinct requests.
          step: the training step; part of the random keys. Requests from earlier steps take priority.
          params: sampling parameters.
        """
        ...

    def step(self) -> list[Completion]:
        """Prefills or decodes at most one segment, and returns the finished completions, possibly none."""
        ...

    @property
    def is_busy(self) -> bool:
        """Whether any request is queued or running."""
        ...

    @property
    def num_idle_slots(self) -> int:
        """Number of additional requests that could run concurrently with the queued and running requests."""
        ...

    def update_weights(self, params: Any) -> None:
        """Replaces the weights used for sampling. No request may be queued or running."""
        ...

    def release(self) -> list[Completion]:
        """Frees the weights and the cache until the next `update_weights`.

        Returns:
          The partial completions of all queued and running requests, with `FinishReason.UNFINISHED`.
        """
        ...

    def resume(self, partial: Sequence[Completion], *, step: int, params: SamplingParams) -> None:
        """Queues partial completions from `release`; sampling continues after their last tokens."""
        ...

    def stats(self) -> EngineStats:
        """Returns the counters of the engine's work so far."""
        ...

    def memory(self) -> EngineMemory:
        """Returns the memory that the engine occupies while it has weights."""
        ...


def check_engine(name: str) -> None:
    """Checks that a name is a key of `ENGINES` or may be an import path.

    Raises:
      UserError: if it is neither.
    """
    if name not in ENGINES and ":" not in name:
        raise UserError(f"sampling.engine={name}: no such engine; {suggest(name, ENGINES)}")


def make_engine(name: str, spec: EngineSpec) -> RolloutEngine:
    """Builds an engine.

    Args:
      name: a key of `ENGINES`, or the import path `package.module:name` of a callable that takes an `EngineSpec`
        and returns a `RolloutEngine`.
      spec: the specification to pass to the engine.

    Raises:
      UserError: if the name is unknown, or the import path does not refer to a rollout engine.
    """
    check_engine(name)
    factory = import_object(ENGINES.get(name, name), "sampling.engine")
    if not callable(factory):
        raise UserError(
            f"sampling.engine={name}: an object of type {type(factory).__name__} is not callable; pass a callable "
            "that takes an EngineSpec and returns a RolloutEngine (trapo_jax.sampling.engine)"
        )
    try:
        engine: Any = factory(spec)
    except Exception as error:
        if name in ENGINES:
            raise
        raise UserError(
            f"sampling.engine={name}: cannot be built ({type(error).__name__}: {reason_of(error)})"
        ) from error
    members = [member for member in vars(RolloutEngine) if not member.startswith("_")]
    if missing := [member for member in members if not hasattr(engine, member)]:
        raise UserError(
            f"sampling.engine={name}: {type(engine).__name__} does not implement {', '.join(missing)} of RolloutEngine "
            "(trapo_jax.sampling.engine)"
        )
    return engine
