"""samples.jsonl: rollouts to read, token by token, with what the update saw of each token."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from trapo_jax.distributed.processes import fetch
from trapo_jax.types import Rollout, TokenKind, UpdateTrace

TRAINED = (TokenKind.EXPERT_TRAINED, TokenKind.COMPLETION)
LONGEST_CHARACTER = 8  # tokens; after so many without a whole character, the bytes are none


class ResponseTrace(NamedTuple):
    """The tokens of a response, in order: arrays `[response length]`."""

    kinds: np.ndarray  # int8, TokenKind
    logprobs: np.ndarray  # float32; 0 where not trained
    gradient_weights: np.ndarray  # float32, |d objective / d logprob|; 0 where not trained


def sample_records(
    rollouts: Sequence[Rollout],
    traces: Sequence[UpdateTrace],
    *,
    decode: Callable[[Sequence[int]], str],
    step: int,
) -> list[dict[str, Any]]:
    """Returns a record for samples.jsonl for each rollout. All processes must call this together.

    Args:
      rollouts: rollouts of the step.
      traces: of the step's updates. A rollout that is part of several shows the first one.
      decode: turns token ids into text.
      step: number of the step.
    """
    keys = [rollout.request.key for rollout in rollouts]
    advantages = {
        row.rollout: row.advantage for trace in traces for row in trace.rows if row.rollout
    }
    responses: dict[tuple[str, int], ResponseTrace] = {}
    for trace in traces:
        responses = fetch_response_traces(trace, keys) | responses
    return [
        sample_record(rollout, advantages.get(key), responses.get(key), decode=decode, step=step)
        for key, rollout in zip(keys, rollouts, strict=True)
    ]


def fetch_response_traces(
    update: UpdateTrace, keys: Sequence[tuple[str, int]]
) -> dict[tuple[str, int], ResponseTrace]:
    """Fetches the traces of some rollouts of an update; all processes must call this together.

    Args:
      update: the update. Only the rows that are needed are copied from the devices.
      keys: keys of the rollouts; those without a trained token in the update have no trace in the result.
    """
    if not keys:
        return {}
    batch = update.batch
    numbers = {row.rollout: number for number, row in enumerate(update.rows) if row.rollout}
    segments = [1 + numbers.get(key, len(update.rows)) for key in keys]
    m, b, t = np.nonzero(batch.segment_ids)
    found, first = np.unique(batch.segment_ids[m, b, t], return_index=True)
    place = dict(zip(found.tolist(), zip(m[first], b[first], strict=True), strict=True))
    # The number of places does not depend on the batch, so that only one program is compiled.
    places = np.array([place.get(segment, (0, 0)) for segment in segments]).T
    logprobs, gradient_weights = fetch(_take_rows(tuple(update.trace), *places))
    responses = {}
    for i, (key, segment) in enumerate(zip(keys, segments, strict=True)):
        kinds = batch.kinds[tuple(places[:, i])]
        segment_ids = batch.segment_ids[tuple(places[:, i])]
        where = (segment_ids == segment) & (kinds != TokenKind.PROMPT)
        if where.any():
            responses[key] = ResponseTrace(
                kinds[where], logprobs[i, where], gradient_weights[i, where]
            )
    return responses


_take_rows = jax.jit(lambda arrays, m, b: [x[m, b] for x in arrays])


def sample_record(
    rollout: Rollout,
    advantage: float | None,
    trace: ResponseTrace | None,
    *,
    decode: Callable[[Sequence[int]], str],
    step: int,
) -> dict[str, Any]:
    """A line of samples.jsonl. Lists in `tokens` have an entry a token of the response; null: not trained.

    Without a trace the rollout took no part in the update.
    """
    request, completion_ids = rollout.request, rollout.completion.token_ids
    prefix, completion = decode(request.prefix_ids), decode(completion_ids)
    if trace is None:
        trace = _no_trace(rollout)
        trained = np.zeros(len(trace.kinds), bool)
    else:
        trained = np.isin(trace.kinds, TRAINED)
    return {
        "step": step,
        "problem_id": request.problem.id,
        "sample_index": request.sample_index,
        "micro_group": request.micro_group,
        "prompt": request.problem.prompt_text,
        "prefix": prefix,
        "completion": completion,
        "gold": request.problem.answer,
        **rollout.grade.as_record(),
        "advantage": advantage,
        "ratio": request.ratio,
        "finish_reason": str(rollout.completion.finish_reason),
        "tokens": {
            "pieces": [
                *token_pieces(request.prefix_ids, decode),
                *token_pieces(completion_ids, decode),
            ],
            "kinds": "".join(str(int(kind)) for kind in trace.kinds),  # a digit each
            "logprobs": _rounded(trace.logprobs, trained),
            "gradient_weights": _rounded(trace.gradient_weights, trained),
        },
    }


def _no_trace(rollout: Rollout) -> ResponseTrace:
    num_own = len(rollout.completion.token_ids)
    kinds = [TokenKind.EXPERT] * rollout.request.prefix_len + [TokenKind.COMPLETION] * num_own
    zeros = np.zeros(len(kinds), np.float32)
    return ResponseTrace(np.array(kinds, np.int8), zeros, zeros)


def token_pieces(ids: Sequence[int], decode: Callable[[Sequence[int]], str]) -> list[str]:
    """The text of each token; joined they are `decode(ids)`.

    A character whose bytes are several tokens belongs to the last of them, the others are "". What a token adds is
    seen beside the one before it, as decoders treat the beginning of a text in a way of its own.

    >>> token_pieces([104, 195, 164, 33], lambda ids: bytes(ids).decode(errors="replace"))
    ['h', '', 'ä', '!']
    """
    text = decode(ids)
    ends, context, whole = [], 0, 0  # ids[context:whole] is text that stands already
    end = 0
    for i in range(1, len(ids) + 1):
        before, now = decode(ids[context:whole]), decode(ids[context:i])
        if not now.endswith("\ufffd") or i - whole == LONGEST_CHARACTER:
            end += len(now) - len(before)
            context, whole = whole, i
        ends.append(min(max(end, 0), len(text)))
    ends[-1:] = [len(text)] if ends else []
    return [text[a:b] for a, b in zip([0, *ends], ends, strict=False)]


def _rounded(values: np.ndarray, where: np.ndarray) -> list[float | None]:
    """Four digits are enough to look at."""
    return [float(f"{v:.4g}") if w else None for v, w in zip(values, where, strict=True)]
