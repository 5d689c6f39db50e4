"""Defines the actor, which samples completions from the current weights and grades them.

An `Actor` owns the rollout engine and the graders. It is independent of optimizers, checkpoints, and logging.
"""

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from statistics import fmean
from typing import Any, NamedTuple

from jax.sharding import Mesh

from trapo_jax.config import EngineConfig, GradingConfig
from trapo_jax.distributed.processes import gather, interrupt_together, my_share
from trapo_jax.methods import Method
from trapo_jax.models import PretrainedModel, TokenCost, token_cost
from trapo_jax.rewards import Grader, make_grader, special_tokens
from trapo_jax.rollouts.collection import (
    GRADE_WAIT_SECS,
    PartialRollouts,
    collect_groups,
    share_groups,
)
from trapo_jax.rollouts.guidance import Guidance
from trapo_jax.rollouts.metrics import rollout_metrics, rollout_usage
from trapo_jax.sampling.engine import EngineSpec, RolloutEngine, make_engine
from trapo_jax.types import (
    Completion,
    Grade,
    Moment,
    Problem,
    Rollout,
    RolloutRequest,
    SamplingParams,
    SamplingProgress,
    Usage,
    UserError,
)

# Used instead of the step number to derive the random keys of evaluations, so that all evaluations of a run use the
# same random numbers and differ only in the policy.
EVALUATION_STEP = 2**32 - 1

OnProgress = Callable[[SamplingProgress], None]
Sample = Callable[[Sequence[RolloutRequest], SamplingParams], Iterator[tuple[Completion, Grade]]]


class Collected(NamedTuple):
    """The rollouts of one step.

    Attributes:
      groups: the G rollouts of each problem, ordered by sample index.
      metrics: metrics of the rollouts and the engine, keyed by name.
      usage: tokens and FLOPs spent on sampling.
    """

    groups: list[list[Rollout]]
    metrics: dict[str, float]
    usage: Usage


class Actor:
    """Samples and grades completions.

    Args:
      engine: the rollout engine.
      grader: grades the text of a response; closed together with the actor.
      decode: converts token ids to text, including special tokens.
      method: determines the guidance of each problem; None for an actor that only evaluates.
      max_completion_length: maximum length of prefix plus completion, in tokens.
      max_staleness: 1 to start rollouts of the next step in idle slots; 0 otherwise.
      temperature: sampling temperature of training rollouts, > 0.
      token_cost: the model's FLOPs per token.
      on_progress: called before each engine step. Sampling ends if it raises an exception.
    """

    def __init__(
        self,
        engine: RolloutEngine,
        grader: Grader,
        decode: Callable[[Sequence[int]], str],
        method: Method | None,
        *,
        max_completion_length: int,
        max_staleness: int,
        temperature: float,
        token_cost: TokenCost,
        on_progress: OnProgress = lambda _: None,
    ):
        check_staleness(max_staleness, method)
        self.engine = engine
        self._grader = grader
        self.decode = decode
        self._method = method
        self._max_completion_length = max_completion_length
        self._max_staleness = max_staleness
        self._temperature = temperature
        self._token_cost = token_cost
        self._on_progress = on_progress
        self._partial = PartialRollouts()

    def collect(
        self,
        problems: Sequence[Problem],
        params: Any,
        moment: Moment,
        *,
        upcoming: Sequence[Problem] = (),
    ) -> Collected:
        """Samples and grades a group of rollouts for every problem, distributed over all processes.

        Args:
          problems: the distinct problems of the step.
          params: the parameters of the policy.
          moment: the current step; determines the guidance and is part of the random keys.
          upcoming: problems of the next step, which may start in otherwise idle slots if `max_staleness` is 1.

        Raises:
          Interrupted: if `on_progress` raises it in any process.
        """
        assert self._method, "an actor without a method can only evaluate"
        method, started = self._method, time.perf_counter()
        self.engine.update_weights(params)
        stats_before = self.engine.stats()
        num_stale = self._partial.num_sampled_tokens
        collected = interrupt_together(
            lambda: collect_groups(
                self.engine,
                lambda problem: guidance_at(method, moment, problem, self._max_completion_length),
                self.grade,
                my_share(problems),
                step=moment.step,
                params=SamplingParams(self._temperature),
                partial=self._partial,
                upcoming=my_share(upcoming) if self._max_staleness else (),
                on_graded=self._reporter(),
            )
        )
        self._partial = collected.partial._replace(unfinished=self.engine.release())
        groups = share_groups(collected.groups, problems)
        stats = self.engine.stats() - stats_before
        counts = gather([num_stale, stats.prefilled_tokens])
        num_stale, num_prefilled = (sum(column) for column in zip(*counts, strict=True))
        metrics = {
            **rollout_metrics(groups, num_micro_groups=len(method.micro_groups)),
            "guidance/ratio_max": fmean(max_ratio(method, moment, p) for p in problems),
            "tokens/prefilled": num_prefilled,
            "sampling/slot_utilization": stats.slot_utilization,
            "sampling/stale_tokens": num_stale,
            "time/sample_secs": time.perf_counter() - started - collected.grading_secs,
            "time/reward_secs": collected.grading_secs,
        }
        usage = rollout_usage(groups, num_prefilled=num_prefilled, cost=self._token_cost)
        return Collected(groups, metrics, usage)

    @contextlib.contextmanager
    def sampler(self, params: Any) -> Iterator[Sample]:
        """Provides a function that samples and grades unguided requests from the given parameters.

        The function takes the requests of this process and sampling parameters, and yields each completion with its
        grade as soon as it is graded. All evaluations draw the same random numbers.
        """
        self.engine.update_weights(params)
        try:
            yield self._sample
        finally:
            self.engine.release()

    def _sample(
        self, requests: Sequence[RolloutRequest], sampling: SamplingParams
    ) -> Iterator[tuple[Completion, Grade]]:
        self.engine.submit(requests, step=EVALUATION_STEP, params=sampling)
        pending: dict[Future[Grade], Completion] = {}
        report, num_graded = self._reporter(), 0
        while self.engine.is_busy or pending:
            report(num_graded)
            completions = self.engine.step()
            pending.update((self.grade(completion), completion) for completion in completions)
            if not completions and not self.engine.is_busy:
                wait(pending, GRADE_WAIT_SECS, return_when=FIRST_COMPLETED)
            done = [future for future in pending if future.done()]
            num_graded = len(done)
            for future in done:
                yield pending.pop(future), future.result()

    def _reporter(self) -> Callable[[int], None]:
        """Returns a function that takes the number of completions graded since its last call and reports progress."""
        before = self.engine.stats()

        def report(num_graded: int) -> None:
            nonlocal before
            stats = self.engine.stats()
            new, before = stats - before, stats
            is_sampling = new.decoded_tokens > 0
            phase = "sampling" if is_sampling else "prefilling"
            self._on_progress(
                SamplingProgress(
                    phase if self.engine.is_busy else "grading",
                    num_graded,
                    new.decoded_tokens,
                    new.prefilled_tokens,
                )
            )

        return report

    def grade(self, completion: Completion) -> Future[Grade]:
        """Asynchronously grades the whole response, including the expert prefix and special tokens.

        The reward is missing if the problem has no answer.
        """
        if not completion.request.problem.answer:
            ungraded: Future[Grade] = Future()
            ungraded.set_result(Grade(None, {}))
            return ungraded
        token_ids = (*completion.request.prefix_ids, *completion.token_ids)
        return self._grader.submit(self.decode(token_ids), completion.request.problem)

    def are_equal(self, first: str, second: str) -> bool:
        """Returns whether the grader considers two answers equivalent."""
        return self._grader.are_equal(first, second)

    @property
    def kv_bytes(self) -> int:
        """Size of the KV cache on each device, in bytes."""
        return self.engine.memory().kv_cache_bytes

    def close(self) -> None:
        """Terminates the grading processes."""
        self._grader.close()

    def __enter__(self) -> "Actor":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()


def guidance_at(
    method: Method, moment: Moment, problem: Problem, max_completion_length: int
) -> Guidance:
    """Returns a method's guidance for a problem at a given step."""
    return Guidance(
        method.micro_groups_at(moment, problem),
        max_completion_length,
        method.prefix_boundary,
        method.second_expert_last,
        method.always_samples,
    )


def max_ratio(method: Method, moment: Moment, problem: Problem) -> float:
    """Returns the mean guidance ratio that a problem's rollouts would have if every micro-group were guided."""
    micro_groups = method.micro_groups_at(moment, problem) if problem.experts else ()
    size = sum(group.size for group in micro_groups)
    return sum(group.size * group.ratio for group in micro_groups) / max(1, size)


def check_staleness(max_staleness: int, method: Method | None) -> None:
    """Checks that a method is compatible with `max_staleness`, which lets rollouts start a step early.

    Raises:
      UserError: if `max_staleness` is positive and the guidance of the method changes with every step.
    """
    if max_staleness and method and method.guidance_varies:
        raise UserError(
            f"sampling.max_staleness={max_staleness}: the guidance of method.name={method.name} changes with every step, "
            "so rollouts cannot be started a step early; set sampling.max_staleness=0"
        )


def grader_for(grading: GradingConfig, functions: Sequence[str], tokenizer: Any) -> Grader:
    """Builds the configured grader for the responses of a model.

    Args:
      grading: the grader section of the config.
      functions: names or import paths of the reward functions.
      tokenizer: the model's tokenizer.
    """
    return make_grader(
        functions,
        weights=grading.weights,
        by_source=grading.replacements(functions),
        eos_text=tokenizer.eos_token,
        special_tokens=special_tokens(tokenizer),
        num_workers=grading.workers,
        timeout_secs=grading.timeout_secs,
        environment=grading.environment,
    )


def make_actor(
    sampling: EngineConfig,
    grader: Grader,
    model: PretrainedModel,
    *,
    max_prompt_length: int,
    seed: int,
    mesh: Mesh | None = None,
    with_truncation: bool = False,
    method: Method | None = None,
    max_staleness: int = 0,
    temperature: float = 1.0,
    on_progress: OnProgress = lambda _: None,
) -> Actor:
    """Builds an actor for training or evaluation.

    Args:
      sampling: the rollout engine section of the config.
      grader: grades responses; closed together with the actor.
      model: the pretrained model; its parameters are not loaded.
      max_prompt_length: maximum prompt length in tokens.
      seed: random seed for sampling.
      mesh: the mesh to sample on; a single device if None.
      with_truncation: whether requests may use top-p and top-k.
      method, max_staleness, temperature, on_progress: see `Actor`.
    """
    spec = EngineSpec(
        decoder=model.decoder,
        model_folder=model.folder,
        num_slots=sampling.num_slots,
        max_prompt_length=max_prompt_length,
        max_completion_length=sampling.completion_len,
        segment_len=sampling.segment_len,
        num_contexts=sampling.num_contexts,
        prefill_tokens=sampling.prefill_tokens,
        eos_ids=model.eos_ids,
        seed=seed,
        mesh=mesh,
        with_truncation=with_truncation,
    )
    return Actor(
        make_engine(sampling.engine, spec),
        grader,
        model.tokenizer.decode,
        method,
        max_completion_length=sampling.completion_len,
        max_staleness=max_staleness,
        temperature=temperature,
        token_cost=token_cost(model.decoder),
        on_progress=on_progress,
    )
