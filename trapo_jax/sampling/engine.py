"""The protocol of rollout engines, and engines by name. Imports no jax.

An engine takes token ids and returns token ids with their log-probabilities under the temperature-scaled
distribution. The training loop uses the members of `RolloutEngine` and nothing else. An engine of your own is a
callable that takes an `EngineSpec`, named by its import path: `sampling.engine=my_package.my_module:MyEngine`.
"""

import dataclasses
import operator
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from trapo_jax.import_path import import_object
from trapo_jax.types import Completion, RolloutRequest, SamplingParams, UserError

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from trapo_jax.models import DecoderConfig

# Engines by name, as import paths, so that an engine's libraries are imported only if it is used.
ENGINES = {"jax": "trapo_jax.sampling.jax_engine:JaxEngine"}


@dataclasses.dataclass(frozen=True)
class EngineSpec:
    """Everything that an engine may be built from.

    Attributes:
      decoder: the shape of the model.
      num_slots: completions sampled at once by each replica of the weights.
      max_prompt_length: longest prompt, in tokens.
      max_completion_length: longest expert prefix and completion together, in tokens.
      segment_len: maximum number of tokens decoded per call of `step`.
      num_contexts: number of prompts and expert prefixes whose keys and values each replica keeps.
      prefill_tokens: maximum number of tokens prefilled at once.
      eos_ids: token ids that end a completion.
      seed: the seed of the run.
      model_folder: the Hugging Face folder from which the run starts; None if the weights are from elsewhere.
      with_truncation: whether requests may use top-p and top-k.
      mesh: the devices, with the axes `data`, `fsdp` and `tp`; None for one device.
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
    """What an engine has done since it was built. Differences and sums are taken field by field.

    Attributes:
      prefilled_tokens: tokens of prompts and expert prefixes that were run through the model.
      decoded_tokens: sampled tokens.
      decode_steps: forward passes that sampled them, one token per active slot each.
      slot_tokens: tokens that these steps would have sampled if every slot that they computed had been active.
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
    """Memory that an engine holds on each device from `update_weights` to `release`.

    Attributes:
      kv_cache_bytes: keys and values.
    """

    kv_cache_bytes: int


class RolloutEngine(Protocol):
    """Samples completions. Everything that the training loop uses."""

    def submit(
        self, requests: Sequence[RolloutRequest], *, step: int, params: SamplingParams
    ) -> None:
        """Queues requests.

        Args:
          requests: distinct requests.
          step: the training step, which is part of their random keys. Earlier steps are sampled first.
          params: how their tokens are drawn.
        """
        ...

    def step(self) -> list[Completion]:
        """Decodes at most one segment and returns the completions that are finished, possibly none."""
        ...

    @property
    def is_busy(self) -> bool:
        """Whether any request is queued or running."""
        ...

    @property
    def num_idle_slots(self) -> int:
        """Number of further requests that could run at once with those that are queued or running."""
        ...

    def update_weights(self, params: Any) -> None:
        """Samples with these weights from now on. No request may be queued or running."""
        ...

    def release(self) -> list[Completion]:
        """Frees the weights and the cache until the next `update_weights`.

        Returns:
          The partial completions of all queued and running requests, with `FinishReason.UNFINISHED`.
        """
        ...

    def resume(self, partial: Sequence[Completion], *, step: int, params: SamplingParams) -> None:
        """Queues partial completions from `release`; sampling continues after the tokens that they have."""
        ...

    def stats(self) -> EngineStats:
        """What the engine has done so far."""
        ...

    def memory(self) -> EngineMemory:
        """What the engine holds while it has weights."""
        ...


def make_engine(name: str, spec: EngineSpec) -> RolloutEngine:
    """Builds an engine.

    Args:
      name: a key of `ENGINES`, or the import path `package.module:name` of a callable that takes an `EngineSpec`
        and returns a `RolloutEngine`.
      spec: what to build it from.

    Raises:
      UserError: if the name is unknown, or the import path does not lead to a rollout engine.
    """
    if name not in ENGINES and ":" not in name:
        raise UserError(
            f"sampling.engine={name}: give {', '.join(ENGINES)}, or the import path package.module:name of an engine"
        )
    factory = import_object(ENGINES.get(name, name), "sampling.engine")
    if not callable(factory):
        raise UserError(
            f"sampling.engine={name}: an object of type {type(factory).__name__} is not callable; give a callable that takes an "
            "EngineSpec and returns a RolloutEngine (trapo_jax.sampling.engine)"
        )
    engine: Any = factory(spec)
    members = [member for member in vars(RolloutEngine) if not member.startswith("_")]
    if missing := [member for member in members if not hasattr(engine, member)]:
        raise UserError(
            f"sampling.engine={name}: {type(engine).__name__} lacks {', '.join(missing)} of RolloutEngine "
            "(trapo_jax.sampling.engine)"
        )
    return engine
