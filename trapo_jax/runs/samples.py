"""samples.jsonl: rollouts to read, token by token, with what the update saw of each token."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from trapo_jax.distributed.processes import fetch
from trapo_jax.types import Rollout, TokenKind, TrainBatch

TRAINED = (TokenKind.EXPERT_TRAINED, TokenKind.COMPLETION)
LONGEST_CHARACTER = 8  # tokens; after so many without a whole character, the bytes are none


class ResponseTrace(NamedTuple):
    """The tokens of a response, in order: arrays `[response length]`."""

    kinds: np.ndarray  # int8, TokenKind
    logprobs: np.ndarray  # float32; 0 where not trained
    gradient_weights: np.ndarray  # float32, |d objective / d logprob|; 0 where not trained


def fetch_response_traces(
    trace: Any, batch: TrainBatch, numbers: Sequence[int]
) -> list[ResponseTrace | None]:
    """Of some of the batch's rollouts, None for those that are not in it; every process must ask, and each gets all.

    Args:
      trace: the train step's `TokenTrace`; of its rows only those that are needed leave the devices.
      batch: as it was built, on the host.
      numbers: of the rollouts, as `build_batch` was given them, from 0.
    """
    if not numbers:
        return []
    m, b, t = np.nonzero(batch.segment_ids)
    found, first = np.unique(batch.segment_ids[m, b, t], return_index=True)
    place = dict(zip(found.tolist(), zip(m[first], b[first], strict=True), strict=True))
    # As many places whatever is in the batch: a program for each number would be compiled.
    places = np.array([place.get(1 + number, (0, 0)) for number in numbers]).T
    logprobs, gradient_weights = fetch(_take_rows(tuple(trace), *places))
    of_responses = []
    for i, number in enumerate(numbers):
        kinds = batch.kinds[tuple(places[:, i])]
        segment_ids = batch.segment_ids[tuple(places[:, i])]
        response = (segment_ids == 1 + number) & (kinds != TokenKind.PROMPT)
        seen = ResponseTrace(kinds[response], logprobs[i, response], gradient_weights[i, response])
        of_responses.append(seen if response.any() else None)
    return of_responses


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
        "answer": request.problem.answer,
        "verdict": str(rollout.verdict),
        "reward": rollout.reward,
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
