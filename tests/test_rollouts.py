"""The loop over problems, with an engine that answers from a script; and evaluation."""

import pytest

from trapo_jax.evaluate import evaluate, pass_at_k
from trapo_jax.methods import make_method
from trapo_jax.rollouts import collect_rollouts
from trapo_jax.scheduler import Scheduler
from trapo_jax.types import (
    Completion,
    Expert,
    FinishReason,
    Problem,
    SamplingParams,
    Verdict,
)

EOS = 9


def problem(number):
    return Problem(
        f"{number:016x}", (1, 2), str(number), (Expert((3, 4, 5, 6, 7, 8, 3, 4, 5, EOS)),)
    )


class ScriptedEngine:
    """Finishes one request a poll, the newest or the oldest first."""

    def __init__(self, *, newest_first):
        self.queue, self.seen, self.newest_first = [], [], newest_first

    def submit(self, requests, *, step, params):
        self.queue += requests
        self.seen += requests

    def poll(self):
        if not self.queue:
            return []
        request = self.queue.pop(-1 if self.newest_first else 0)
        return [Completion(request, (7, EOS), (-0.5, -0.5), FinishReason.STOP)]

    def update_weights(self, params, version):
        pass


def collect(reward_of, *, newest_first=False, method="trapo", problems=3):
    method = make_method(method)
    engine = ScriptedEngine(newest_first=newest_first)
    groups = collect_rollouts(
        engine,
        Scheduler(method.micro_groups, 64),
        lambda c: (Verdict.CORRECT, reward_of(c.request)),
        [problem(i) for i in range(problems)],
        step=1,
        params=SamplingParams(),
    )
    return groups, engine


@pytest.mark.parametrize("newest_first", [False, True])
def test_groups_are_whole_in_order_and_guided_by_reward(newest_first):
    """Problem 0 is never solved, problem 1 always, problem 2 twice of the first four."""
    solved = {0: set(), 1: set(range(8)), 2: {0, 1, 7}}
    reward = lambda r: float(r.sample_index in solved[int(r.problem.answer)])
    groups, engine = collect(reward, newest_first=newest_first)
    assert [[r.request.sample_index for r in g] for g in groups] == [list(range(8))] * 3
    assert [[r.request.prefix_len for r in g] for g in groups] == [
        [0, 0, 0, 0, 2, 2, 5, 10],
        [0] * 8,
        [0, 0, 0, 0, 0, 0, 5, 10],
    ]
    assert [r.finish_reason for g in groups for r in [g[7].completion]] == [
        FinishReason.NOT_SAMPLED,
        FinishReason.STOP,
        FinishReason.NOT_SAMPLED,
    ]
    assert len(engine.seen) == 22  # the two whole solutions never reach the engine
    assert len({(r.problem.id, r.sample_index) for r in engine.seen}) == 22


def test_sft_samples_nothing():
    groups, engine = collect(lambda _: 1.0, method="sft")
    assert engine.seen == []
    assert [[r.completion.token_ids for r in g] for g in groups] == [[()]] * 3


def test_same_problem_twice_is_refused():
    method = make_method("grpo")
    with pytest.raises(ValueError, match="same problem twice"):
        collect_rollouts(
            ScriptedEngine(newest_first=False),
            Scheduler(method.micro_groups, 64),
            lambda _: (Verdict.WRONG, 0.0),
            [problem(1), problem(1)],
            step=1,
            params=SamplingParams(),
        )


def test_evaluate_counts_by_source():
    problems = [Problem(f"{i:016x}", (1,), "", (), "", f"K={i % 2}") for i in range(4)]
    # Greedy solves problem 0 alone; of four samples problem 0 gets 4, problem 1 gets 1.
    right = {(0, j) for j in range(4)} | {(1, 2)}
    is_correct = lambda c: (int(c.request.problem.id, 16), c.request.sample_index) in right
    metrics = evaluate(ScriptedEngine(newest_first=True), is_correct, problems, num_samples=4)
    assert metrics["eval/accuracy_greedy"] == 0.25
    assert metrics["eval/accuracy_sampled"] == 5 / 16
    assert metrics["eval/pass@1"] == 5 / 16
    assert metrics["eval/pass@2"] == (1 + 0.5) / 4
    assert metrics["eval/pass@4"] == 0.5
    assert metrics["eval/accuracy_sampled/K=0"] == 0.5
    assert metrics["eval/accuracy_greedy/K=1"] == 0.0
    assert metrics["eval/completion_len_mean"] == 2
    assert metrics["eval/truncated"] == 0


def test_pass_at_k_is_unbiased_by_enumeration():
    from itertools import combinations

    for correct in range(6):
        samples = [True] * correct + [False] * (5 - correct)
        for k in range(1, 6):
            subsets = list(combinations(samples, k))
            assert pass_at_k(5, correct, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))
