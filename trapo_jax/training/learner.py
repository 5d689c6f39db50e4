"""Implements the learner, which updates the parameters with the rows that a method selects.

A `Learner` owns the train state and everything that changes it. It is independent of sampling, checkpoints, and
logging.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import optax
from jax.sharding import Mesh

from trapo_jax.config import Config
from trapo_jax.config.schema import TrainConfig
from trapo_jax.distributed.sharding import abstract_like, make_mesh, num_batch_shards
from trapo_jax.methods import Method, Stage, Update, expert_row
from trapo_jax.models import (
    DecoderConfig,
    PretrainedModel,
    TokenCost,
    abstract_params,
    count_attention_pairs,
    load_params,
    supports_shared_segments,
    token_cost,
)
from trapo_jax.training.optimizer import make_learning_rate, make_optimizer
from trapo_jax.training.packing import batch_metrics, build_batch
from trapo_jax.training.state import (
    TrainState,
    init_state,
    make_optimizer_reset,
    new_state,
    state_shardings,
    swap_optimizer,
)
from trapo_jax.training.train_step import (
    TokenScorer,
    make_batch_logprobs,
    make_train_step,
    place_batch,
)
from trapo_jax.types import (
    Moment,
    Problem,
    TrainBatch,
    TrainRow,
    UpdateTrace,
    Usage,
)


class Learned(NamedTuple):
    """The outcome of the updates of one step.

    Attributes:
      metrics: metrics, keyed by name. Metrics of updates after the first are prefixed with their optimizer's name.
      usage: tokens and FLOPs spent on training.
      traces: the token trace of each optimizer batch.
    """

    metrics: dict[str, float]
    usage: Usage
    traces: list[UpdateTrace]


class Learner:
    """Updates the parameters of a policy.

    Building a learner allocates no arrays, so its programs can be compiled for devices that are not attached. `load`
    initializes the state.

    Args:
      config: the run's config. Only `train`, the lengths in `data` and `sampling`, and the temperature and maximum
        staleness in `sampling` are used.
      method: the method whose loss terms form the objective.
      decoder: the decoder's shape.
      mesh: the mesh to train on.
      optimizer: an optax transformation for a learning rate of 1; the configured optimizer if None.
    """

    def __init__(
        self,
        config: Config,
        method: Method,
        decoder: DecoderConfig,
        mesh: Mesh,
        optimizer: optax.GradientTransformation | None = None,
    ):
        train, sampling = config.train, config.sampling
        self.mesh, self.method = mesh, method
        self.optimizer = optimizer or make_optimizer(
            adam_b1=train.adam_b1,
            adam_b2=train.adam_b2,
            weight_decay=train.weight_decay,
        )
        self._learning_rates = [stage_learning_rate(stage, train) for stage in method.stages]
        self.shardings = state_shardings(
            abstract_params(decoder), self.optimizer, self.mesh, len(method.optimizers)
        )
        self._reset = make_optimizer_reset(self.optimizer, self.shardings)
        scorer = TokenScorer(
            decoder,
            temperature=sampling.temperature,
            chunk_size=train.logprob_chunk_size * num_batch_shards(self.mesh),
        )
        self.train_step = make_train_step(
            scorer,
            self.method,
            self.optimizer,
            self.mesh,
            self.shardings,
            max_completion_length=sampling.completion_len,
            ratio_to="sampler" if sampling.max_staleness else "trainer",
        )
        self._batch_logprobs = make_batch_logprobs(scorer, self.mesh, self.shardings.params)
        self._decoder = decoder
        self._token_cost = token_cost(decoder)
        self._config = config
        self._state: TrainState | None = None
        self._ref_params: Any = None

    @property
    def state(self) -> TrainState:
        """The train state; `load` must have been called."""
        assert self._state is not None, "the learner has no state; call load first"
        return self._state

    @state.setter
    def state(self, state: TrainState) -> None:
        self._state = state

    @property
    def params(self) -> Any:
        """The current parameters, in float32."""
        return self.state.params

    @property
    def num_bytes(self) -> int:
        """Total size of the state in bytes, over all devices."""
        return sum(x.nbytes for x in jax.tree.leaves(self.state))

    @property
    def micro_batch_rows(self) -> int:
        """Number of rows per micro-batch, over all devices."""
        return self._config.train.per_device_rows * num_batch_shards(self.mesh)

    @property
    def shares_prompts(self) -> bool:
        """Whether rollouts of a problem in the same row share its prompt. Not all kinds of attention support it."""
        decoder = self._decoder
        return supports_shared_segments(
            decoder.attention,
            row_len=self._config.row_len,
            head_dim=decoder.head_dim,
            dtype=decoder.dtype,
        )

    @property
    def num_iterations(self) -> int:
        """Number of passes over the rows of an update."""
        return self._config.train.num_iterations

    @property
    def _num_steps(self) -> int:
        """Number of optimizer steps in an update on the step's rollouts."""
        return self.num_iterations * self._config.train.num_mini_batches

    @property
    def max_rows(self) -> int:
        """Maximum number of rows in an optimizer batch. This number determines the shape of all batches."""
        train = self._config.train
        return self.method.max_rows(train.problems_per_step, train.num_mini_batches)

    def load(self, model: PretrainedModel, *, seed: int, with_state: bool = True) -> None:
        """Loads the parameters of a model folder and initializes the optimizer.

        Args:
          model: the model folder.
          seed: random seed for the adapters.
          with_state: False if the state is going to be restored from a checkpoint. The folder is then read only if the
            method has a reference policy.
        """
        load = lambda: load_params(model.folder, self._decoder, self.shardings.params, seed=seed)
        if with_state:
            self._state = init_state(load(), self.optimizer, self.mesh, len(self.method.optimizers))
        if self.method.needs_reference:
            self._ref_params = load()

    def abstract_state(self) -> TrainState:
        """Returns the shapes, dtypes, and shardings of the state."""
        shapes = jax.eval_shape(
            lambda params: new_state(params, self.optimizer, len(self.method.optimizers)),
            abstract_params(self._decoder),
        )
        return abstract_like(shapes, self.shardings)

    def free(self) -> None:
        """Deletes the state's arrays to free their memory for a restored state."""
        for leaf in jax.tree.leaves(self._state):
            leaf.delete()
        self._state = None

    def reset_optimizer(self) -> None:
        """Replaces the optimizer states with new ones, as at the start of a run."""
        self._state = self._reset(self.state)

    def update(self, updates: Sequence[Update], moment: Moment) -> Learned:
        """Performs the updates of a step in order.

        Args:
          updates: rows and optimizer of each update, as selected by the method.
          moment: the current step; determines the weights of the loss terms and the learning rate.
        """
        started = time.perf_counter()
        if moment.stage.index > 0 and moment.stage.step == 1:
            self.reset_optimizer()
        metrics: dict[str, float] = {}
        usage, traces = Usage(), []
        for update in updates:
            new_metrics, new_traces = self._update(update, moment)
            metrics = merge_metrics(metrics, new_metrics, update.optimizer)
            usage += self._usage_of(update.rows)
            traces += new_traces
        metrics["optimizer/skipped_in_a_row"] = int(self.state.num_skipped_in_a_row)
        metrics["time/train_secs"] = time.perf_counter() - started
        return Learned(metrics, usage, traces)

    def expert_loss(self, problems: Sequence[Problem]) -> float:
        """Returns the current policy's mean cross-entropy over the tokens of expert solutions, in nats.

        Args:
          problems: at least one must have an expert solution; problems without one are ignored.
        """
        max_len = self._config.sampling.completion_len
        rows = [expert_row(problem, max_len) for problem in problems if problem.experts]
        total, num_tokens = 0.0, 0
        for start in range(0, len(rows), self.max_rows):
            some = rows[start : start + self.max_rows]
            batch = place_batch(self._build_batch(some), self.mesh)
            total += float(self._batch_logprobs(self.params, batch).sum())
            num_tokens += sum(row.num_expert_trained for row in some)
        return -total / num_tokens

    def _update(self, update: Update, moment: Moment) -> tuple[dict[str, float], list[UpdateTrace]]:
        """Takes `num_iterations` optimizer steps on each mini-batch of the rows."""
        index = self.method.optimizers.index(update.optimizer)
        # Other updates train on buffered problems rather than on the rollouts of the step.
        parts = split_rows(update.rows, self._config.train.num_mini_batches if index == 0 else 1)
        host_batches = [self._build_batch(rows) for rows in parts]
        batches = [self._place(batch, with_old=self._num_steps > 1) for batch in host_batches]
        metrics, traces = [], []
        state = swap_optimizer(self.state, index)
        num_steps = self.num_iterations * len(batches)
        for i in range(num_steps):
            k = i % len(batches)
            coefficients = self._coefficients(update, moment, (i + 1) / num_steps)
            state, device_metrics, trace = self.train_step(state, batches[k], coefficients)
            if i >= num_steps - len(batches):  # the last pass
                metrics.append(jax.device_get(device_metrics))
                traces.append(UpdateTrace(parts[k], host_batches[k], trace))
        self._state = swap_optimizer(state, index)
        num_shards = num_batch_shards(self.mesh)
        of_batches = [
            {**batch_metrics(batch, num_shards), **{k: float(v) for k, v in values.items()}}
            for batch, values in zip(host_batches, metrics, strict=True)
        ]
        learning_rate = self._learning_rate(update, moment, 1.0)
        return {**merge_mini_batches(of_batches), "optimizer/learning_rate": learning_rate}, traces

    def _coefficients(self, update: Update, moment: Moment, share: float) -> Mapping[str, Any]:
        max_grad_norm = update.max_grad_norm
        if max_grad_norm is None:
            max_grad_norm = self._config.train.max_grad_norm
        return self.method.coefficients(
            moment,
            learning_rate=self._learning_rate(update, moment, share),
            max_grad_norm=max_grad_norm,
        )

    def _learning_rate(self, update: Update, moment: Moment, share: float) -> float:
        """Returns the learning rate of the optimizer step that completes a fraction `share` of the update."""
        stage = moment.stage
        rate = self._learning_rates[stage.index](stage.step - 1 + share, stage.progress)
        return update.learning_rate_scale * rate

    def _place(self, host_batch: TrainBatch, *, with_old: bool) -> TrainBatch:
        """Places a batch on the devices, with the log-probabilities that its update needs."""
        batch = place_batch(host_batch, self.mesh)
        if with_old:  # With a single step, the old policy is the current one.
            batch = batch._replace(old_logprobs=self._batch_logprobs(self.params, batch))
        if self._ref_params is not None:
            batch = batch._replace(ref_logprobs=self._batch_logprobs(self._ref_params, batch))
        return batch

    def _build_batch(self, rows: Sequence[TrainRow]) -> TrainBatch:
        return build_batch(
            rows,
            row_len=self._config.row_len,
            micro_batch_rows=self.micro_batch_rows,
            max_rows=self.max_rows,
            num_shards=num_batch_shards(self.mesh),
            share_prompts=self.shares_prompts,
        )

    def _usage_of(self, rows: Sequence[TrainRow]) -> Usage:
        return update_usage(
            rows,
            num_iterations=self.num_iterations,
            num_forward=(self._num_steps > 1) + (self._ref_params is not None),
            cost=self._token_cost,
        )


def make_learner(
    config: Config, method: Method, model: PretrainedModel, *, with_state: bool = True
) -> Learner:
    """Builds a learner from a config and loads the model's parameters.

    Args:
      config: the config of the run.
      method: the method of the run.
      model: the model to train.
      with_state: see `Learner.load`.
    """
    learner = Learner(
        config, method, model.decoder, make_mesh(fsdp=config.mesh.fsdp, tp=config.mesh.tp)
    )
    learner.load(model, seed=config.seed, with_state=with_state)
    return learner


def stage_learning_rate(stage: Stage, train: TrainConfig) -> Callable[[float, float], float]:
    """Returns a stage's learning-rate schedule; the config provides the settings that the stage does not set."""
    fields = ("learning_rate", "warmup_steps", "decay_start", "final_learning_rate_ratio")
    own = {name: getattr(stage, name) for name in fields}
    return make_learning_rate(
        **{name: getattr(train, name) if value is None else value for name, value in own.items()}
    )


def update_usage(
    rows: Sequence[TrainRow], *, num_iterations: int, num_forward: int, cost: TokenCost
) -> Usage:
    """Returns the tokens and FLOPs of `num_iterations` optimizer steps on the same rows.

    Args:
      rows: the rows; rows without trained tokens are skipped.
      num_iterations: number of optimizer steps.
      num_forward: number of additional forward passes that compute only log-probabilities.
      cost: the model's FLOPs per token.
    """
    rows = [row for row in rows if row.num_trained]
    num_expert = sum(row.num_expert_trained for row in rows)
    num_prompt = sum(len(row.completion.request.problem.prompt_ids) for row in rows)
    num_completion = sum(row.num_completion for row in rows)
    num_tokens = sum(row.length for row in rows)
    num_pairs = sum(count_attention_pairs(row.length) for row in rows)
    return Usage(
        tokens_trained=num_iterations * (num_expert + num_completion),
        tokens_expert_trained=num_iterations * num_expert,
        tokens_prompt=num_iterations * num_prompt,
        flops=num_iterations * cost.update(num_tokens, num_pairs)
        + num_forward * cost.forward(num_tokens, num_pairs),
    )


def split_rows(rows: Sequence[TrainRow], num_parts: int) -> list[list[TrainRow]]:
    """Deals the rows into at most `num_parts` parts, spreading each problem's rows over different parts."""
    return [list(rows[i::num_parts]) for i in range(max(1, min(num_parts, len(rows))))]


def merge_mini_batches(metrics: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Merges the metrics of an update's mini-batches: sums token counts and averages all other metrics."""
    return {
        name: sum(values[name] for values in metrics)
        / (1 if name.endswith("_tokens") else len(metrics))
        for name in metrics[0]
    }


def merge_metrics(
    first: Mapping[str, float], following: Mapping[str, float], optimizer: str
) -> dict[str, float]:
    """Merges the metrics of a step's updates. Metrics of later updates are prefixed with their optimizer's name."""
    if not first:
        return dict(following)
    skipped = max(first["optimizer/skipped"], following["optimizer/skipped"])
    named = {f"{optimizer}/{name}": value for name, value in following.items()}
    return {**first, **named, "optimizer/skipped": skipped}
