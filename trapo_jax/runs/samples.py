"""Builds records for samples.jsonl: rollouts with per-token log-probabilities and gradient weights from the update."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from trapo_jax.distributed.processes import fetch
from trapo_jax.types import Rollout, TokenKind, UpdateTrace

TRAINED = (TokenKind.EXPERT_TRAINED, TokenKind.COMPLETION)
# If this many consecutive tokens do not complete a character, their bytes are considered invalid.
MAX_CHARACTER_TOKENS = 8


class ResponseTrace(NamedTuple):
    """Per-token results of an update for one response, as arrays of shape `[response length]`."""

    kinds: np.ndarray  # int8 TokenKind values.
    logprobs: np.ndarray  # float32; 0 for untrained tokens.
    gradient_weights: np.ndarray  # float32 |d objective / d logprob|; 0 for untrained tokens.


def sample_records(
    rollouts: Sequence[Rollout],
    traces: Sequence[UpdateTrace],
    *,
    decode: Callable[[Sequence[int]], str],
    step: int,
) -> list[dict[str, Any]]:
    """Returns one record per rollout. All processes must call this together.

    Args:
      rollouts: rollouts of the step.
      traces: traces of the step's updates. If several updates contain a rollout, the first one is used.
      decode: converts token ids to text.
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
    """Fetches the traces of rollouts from the devices. All processes must call this together.

    Args:
      update: the trace of an update. Only the batch rows that contain the rollouts are fetched.
      keys: keys of the rollouts. The result omits rollouts without a trained token in the update.
    """
    if not keys:
        return {}
    batch = update.batch
    numbers = {row.rollout: number for number, row in enumerate(update.rows) if row.rollout}
    segments = [1 + numbers.get(key, len(update.rows)) for key in keys]
    m, b, t = np.nonzero(batch.segment_ids)
    found, first = np.unique(batch.segment_ids[m, b, t], return_index=True)
    row_of = dict(zip(found.tolist(), zip(m[first], b[first], strict=True), strict=True))
    # Fetch one row per key, even for keys that are not in the batch, so that `_take_rows` is compiled only once.
    rows = np.array([row_of.get(segment, (0, 0)) for segment in segments]).T
    logprobs, gradient_weights = fetch(_take_rows(tuple(update.trace), *rows))
    responses = {}
    for i, (key, segment) in enumerate(zip(keys, segments, strict=True)):
        kinds = batch.kinds[tuple(rows[:, i])]
        segment_ids = batch.segment_ids[tuple(rows[:, i])]
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
    """Returns a record for samples.jsonl. The values in `tokens` have one entry per token of the response.

    Args:
      rollout: the rollout.
      advantage: advantage of the rollout; None if no update trained on the rollout.
      trace: trace of the response; None if no update trained on the rollout.
      decode: converts token ids to text.
      step: number of the step.
    """
    request, completion_ids = rollout.request, rollout.completion.token_ids
    prefix, completion = decode(request.prefix_ids), decode(completion_ids)
    if trace is None:
        trace = _untrained(rollout)
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
            "kinds": "".join(str(int(kind)) for kind in trace.kinds),  # One digit per token.
            "logprobs": _rounded(trace.logprobs, trained),
            "gradient_weights": _rounded(trace.gradient_weights, trained),
        },
    }


def _untrained(rollout: Rollout) -> ResponseTrace:
    """Returns the trace of a rollout that was not part of any update."""
    completion_len = len(rollout.completion.token_ids)
    kinds = [TokenKind.EXPERT] * rollout.request.prefix_len
    kinds += [TokenKind.COMPLETION] * completion_len
    zeros = np.zeros(len(kinds), np.float32)
    return ResponseTrace(np.array(kinds, np.int8), zeros, zeros)


def token_pieces(ids: Sequence[int], decode: Callable[[Sequence[int]], str]) -> list[str]:
    """Returns the text of each token; their concatenation is `decode(ids)`.

    A character that spans several tokens is assigned to the last one, and the text of the others is empty. Each token
    is decoded together with the tokens before it, because decoders treat the start of a string specially.

    >>> token_pieces([104, 195, 164, 33], lambda ids: bytes(ids).decode(errors="replace"))
    ['h', '', 'ä', '!']
    """
    text = decode(ids)
    # ids[context:done] precede the current character and have already been assigned.
    ends, context, done = [], 0, 0
    end = 0
    for i in range(1, len(ids) + 1):
        before, after = decode(ids[context:done]), decode(ids[context:i])
        if not after.endswith("\ufffd") or i - done == MAX_CHARACTER_TOKENS:
            end += len(after) - len(before)
            context, done = done, i
        ends.append(min(max(end, 0), len(text)))
    ends[-1:] = [len(text)] if ends else []
    return [text[a:b] for a, b in zip([0, *ends], ends, strict=False)]


def _rounded(values: np.ndarray, where: np.ndarray) -> list[float | None]:
    """Rounds the values where `where` is true to four significant digits, and replaces all others with None."""
    return [float(f"{v:.4g}") if w else None for v, w in zip(values, where, strict=True)]
