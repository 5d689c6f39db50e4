"""Tests the collection of groups, and evaluations, with scripted engines."""

import dataclasses
import random
import threading
from concurrent.futures import Future

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from support.grades import CORRECT, ERROR, TIMEOUT, WRONG
from trapo_jax.evaluation.scoring import evaluate, pass_at_k
from trapo_jax.methods import make_method
from trapo_jax.rollouts.collection import PartialRollouts, collect_groups
from trapo_jax.rollouts.guidance import Guidance
from trapo_jax.rollouts.metrics import graded_groups, rollout_metrics
from trapo_jax.types import (
    Completion,
    Expert,
    FinishReason,
    Grade,
    Interrupted,
    Judgment,
    MicroGroup,
    Problem,
    SamplingParams,
)

EOS = 9


def problem(number):
    return Problem(
        f"{number:016x}", (1, 2), str(number), (Expert((3, 4, 5, 6, 7, 8, 3, 4, 5, EOS)),)
    )


class ScriptedEngine:
    """An engine that finishes one request per step, beginning with the newest or the oldest."""

    def __init__(self, *, newest_first):
        self.queue, self.seen, self.newest_first = [], [], newest_first

    def submit(self, requests, *, step, params):
        self.queue += requests
        self.seen += requests

    def resume(self, unfinished, *, step, params):
        assert not unfinished  # this engine never starts upcoming problems

    @property
    def is_busy(self):
        return bool(self.queue)

    def step(self):
        if not self.queue:
            return []
        request = self.queue.pop(-1 if self.newest_first else 0)
        return [Completion(request, (7, EOS), (-0.5, -0.5), FinishReason.STOP)]

    def update_weights(self, params):
        pass


class SlotEngine:
    """An engine with four slots whose tokens are the version number of the weights. Sample j has 2 + j tokens."""

    def __init__(self):
        self.queue, self.step_of, self.version = [], {}, 0

    def submit(self, requests, *, step, params):
        self.step_of |= {(r.problem.id, r.sample_index): step for r in requests}
        self.queue += [Completion(r, (), (), FinishReason.UNFINISHED) for r in requests]

    def resume(self, unfinished, *, step, params):
        self.queue += unfinished

    @property
    def is_busy(self):
        return bool(self.queue)

    def step(self):
        grown = [
            dataclasses.replace(
                c, token_ids=(*c.token_ids, self.version), logprobs=(*c.logprobs, -0.5)
            )
            for c in self.queue[:4]
        ]
        is_done = lambda c: len(c.token_ids) == self.length(c.request)
        self.queue[:4] = [c for c in grown if not is_done(c)]
        return [
            dataclasses.replace(c, finish_reason=FinishReason.STOP) for c in grown if is_done(c)
        ]

    def length(self, request):
        return 2 + request.sample_index

    def release(self):
        unfinished, self.queue = self.queue, []
        return unfinished

    @property
    def num_idle_slots(self):
        return max(0, 4 - len(self.queue))


def test_idle_slots_start_rollouts_of_the_next_step_which_finish_with_newer_weights():
    """Each step has two of seven problems, and one problem occurs in two consecutive steps."""
    steps = [[0, 1], [2, 3], [3, 4], [5, 6]]
    engine, partial, seen = SlotEngine(), PartialRollouts(), []
    micro_groups = make_method("trapo").micro_groups
    for number, step in enumerate(steps):
        engine.version = number
        collected = collect_groups(
            engine,
            lambda _: Guidance(micro_groups, 64),
            lambda c: at_once(grade_for(c.request.sample_index % 2)),
            [problem(i) for i in step],
            step=number,
            params=SamplingParams(),
            partial=partial,
            upcoming=[problem(i) for i in steps[number + 1]] if number < 3 else [],
        )
        partial = collected.partial._replace(unfinished=engine.release())
        assert [[int(r.request.problem.answer) for r in g] for g in collected.groups] == [
            [i] * 8 for i in step
        ]
        for group in collected.groups:
            assert [r.request.sample_index for r in group] == list(range(8))
            for rollout in group:
                key = rollout.request.problem.id, rollout.request.sample_index
                assert engine.step_of.get(key, number) == number
                assert set(rollout.completion.token_ids) <= {number, number - 1}
                seen.append(rollout.completion.token_ids)
        stale = partial.num_sampled_tokens
        next_problems = {int(g.state.problem.answer) for g in partial.groups.values()}
        assert next_problems <= set(steps[number + 1] if number < 3 else []) - set(step)
        assert (stale > 0) == bool(partial.groups)
    assert partial.groups == {}
    assert any(len(set(token_ids)) == 2 for token_ids in seen)  # sampled from two policies


def test_the_number_of_graded_rollouts_is_reported_and_a_report_can_end_the_collection():
    counts = []

    def collect(on_graded):
        return collect_groups(
            ScriptedEngine(newest_first=False),
            lambda _: Guidance(make_method("trapo").micro_groups, 64),
            lambda c: at_once(grade_for(c.request.sample_index % 2)),
            [problem(0), problem(1)],
            step=1,
            params=SamplingParams(),
            on_graded=on_graded,
        )

    def interrupt(num_graded):
        counts.append(num_graded)
        if sum(counts) == 3:
            raise Interrupted

    collect(counts.append)
    assert counts[0] == 0
    assert 16 - 2 <= sum(counts) < 16  # The collection ends before the last grades are reported.
    counts.clear()
    with pytest.raises(Interrupted):
        collect(interrupt)
    assert sum(counts) == 3


def test_a_verdict_takes_effect_while_other_rollouts_are_decoded():
    """One problem waits for a verdict while the engine decodes 100-token completions of the other."""
    steps, submitted, first = 0, {}, Future()

    class Engine(SlotEngine):
        def submit(self, requests, *, step, params):
            submitted.update({(r.problem.answer, r.sample_index): steps for r in requests})
            super().submit(requests, step=step, params=params)

        def step(self):
            nonlocal steps
            steps += 1
            if steps == 10:
                first.set_result(CORRECT)
            return super().step()

        def length(self, request):
            return 100 if request.problem.answer == "1" else 2

    def score(completion):
        request = completion.request
        is_first = request.problem.answer == "0" and request.sample_index == 0
        return first if is_first else at_once(CORRECT)

    collect_groups(
        Engine(),
        lambda _: Guidance((MicroGroup(1, 0.0, -1.0), MicroGroup(1, 0.5, 0.5)), 64),
        score,
        [problem(0), problem(1)],
        step=1,
        params=SamplingParams(),
    )
    assert submitted["0", 1] == 10
    assert steps == 200


def test_an_engine_that_loses_requests_causes_an_error():
    class Forgetful(ScriptedEngine):
        is_busy = False

        def step(self):
            return []

    with pytest.raises(RuntimeError, match="lost requests"):
        collect_groups(
            Forgetful(newest_first=False),
            lambda _: Guidance(make_method("grpo").micro_groups, 64),
            lambda _: at_once(WRONG),
            [problem(1)],
            step=1,
            params=SamplingParams(),
        )


def at_once(grade):
    future = Future()
    future.set_result(grade)
    return future


def grade_for(reward):
    return CORRECT if reward else WRONG


def collect(reward_of, *, newest_first=False, method="trapo", problems=3, score=None):
    method = make_method(method)
    engine = ScriptedEngine(newest_first=newest_first)
    groups, *_ = collect_groups(
        engine,
        lambda _: Guidance(method.micro_groups, 64),
        score or (lambda c: at_once(grade_for(reward_of(c.request)))),
        [problem(i) for i in range(problems)],
        step=1,
        params=SamplingParams(),
    )
    return groups, engine


@pytest.mark.parametrize("newest_first", [False, True])
def test_groups_are_complete_ordered_and_guided_by_rewards(newest_first):
    """Problem 0 is never solved, problem 1 is always solved, and two of problem 2's first four rollouts are correct."""
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
    assert len(engine.seen) == 22  # the two whole expert solutions are not submitted to the engine
    assert len({(r.problem.id, r.sample_index) for r in engine.seen}) == 22


class LateGrader:
    """A grader that delays its grades. Every submission and a background thread release random pending grades."""

    def __init__(self, reward_of, seed):
        self.reward_of, self.random, self.pending = reward_of, random.Random(seed), []
        self.lock, self.stopped = threading.Lock(), False
        self.thread = threading.Thread(target=self.run)
        self.thread.start()

    def __call__(self, completion):
        future = Future()
        with self.lock:
            self.pending.append((future, grade_for(self.reward_of(completion.request))))
            self.release()
        return future

    def release(self):
        self.random.shuffle(self.pending)
        while self.pending and self.random.random() < 0.4:
            future, value = self.pending.pop()
            future.set_result(value)

    def run(self):
        while not self.stopped:
            with self.lock:
                self.release()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.stopped = True
        self.thread.join()


@settings(max_examples=30, deadline=None)
@given(solved=st.sets(st.tuples(st.integers(0, 2), st.integers(0, 7))), seed=st.integers(0, 999))
def test_groups_do_not_depend_on_when_grades_arrive(solved, seed):
    reward = lambda r: float((int(r.problem.answer), r.sample_index) in solved)
    expected, _ = collect(reward)
    with LateGrader(reward, seed) as score:
        groups, _ = collect(reward, newest_first=bool(seed % 2), score=score)
    assert groups == expected


def test_decoding_continues_while_a_grade_is_pending():
    """The first grade of problem 0 arrives only when 19 of the 24 rollouts have been submitted for grading."""
    first, seen = Future(), []

    def score(completion):
        request = completion.request
        seen.append((request.problem.answer, request.sample_index))
        if len(seen) == 19:
            first.set_result(WRONG)
        if seen[-1] == ("0", 0):
            return first
        return at_once(CORRECT if request.problem.answer != "0" else WRONG)

    groups, _ = collect(None, score=score)
    assert [len(group) for group in groups] == [8, 8, 8]
    assert groups[0][0].grade is WRONG


@pytest.mark.parametrize("failure", [ERROR, TIMEOUT])
def test_rollouts_with_a_missing_reward_are_kept(failure):
    groups, _ = collect(None, score=lambda _: at_once(failure))
    assert {id(r.grade) for group in groups for r in group} == {id(failure)}


def test_rollouts_without_a_reward_are_neither_counted_nor_trained_on():
    groups, _ = collect(
        None,
        score=lambda c: at_once(
            ERROR if c.request.problem.answer == "1" or c.request.sample_index == 0 else CORRECT
        ),
    )
    graded = graded_groups(groups)
    assert [[r.request.sample_index for r in group] for group in graded] == [list(range(1, 8))] * 2
    metrics = rollout_metrics(groups, num_micro_groups=4)
    assert metrics["reward/mean"] == 1.0
    assert metrics["reward/missing"] == metrics["reward/error_rate"] == 10 / 24
    assert metrics["reward/groups_with_signal"] == 0


def test_the_reward_of_sampled_rollouts_does_not_include_the_whole_expert_solution():
    """The expert solutions are correct, and so is one guided rollout of problem 0."""
    right = {("0", 7), ("1", 7), ("2", 7), ("0", 6)}
    groups, _ = collect(lambda r: float((r.problem.answer, r.sample_index) in right))
    metrics = rollout_metrics(groups, num_micro_groups=4)
    assert metrics["reward/mean"] == 4 / 24
    assert metrics["reward/sampled_mean"] == metrics["reward/sampled_positive"] == 1 / 21
    assert metrics["reward/unguided_mean"] == 0


def test_sampled_rollouts_without_an_answer_are_counted():
    """Whole expert solutions and rollouts whose grading failed do not count."""

    def score(completion):
        if completion.request.sample_index == 0:
            return at_once(ERROR)
        found = completion.request.sample_index == 1
        return at_once(Grade(0.0, {"test": Judgment(0.0, found_answer=found)}))

    groups, _ = collect(None, score=score)
    assert rollout_metrics(groups, num_micro_groups=4)["reward/no_answer"] == 5 / 6
    groups, _ = collect(lambda _: 0.0)
    assert "reward/no_answer" not in rollout_metrics(groups, num_micro_groups=4)


def test_sft_samples_nothing():
    groups, engine = collect(lambda _: 1.0, method="sft")
    assert engine.seen == []
    assert [[r.completion.token_ids for r in g] for g in groups] == [[()]] * 3
    metrics = rollout_metrics(groups, num_micro_groups=1)
    assert metrics["reward/mean"] == 1.0
    assert not {"reward/sampled_mean", "reward/sampled_positive", "reward/unguided_mean"} & set(
        metrics
    )


def test_duplicate_problems_are_rejected():
    method = make_method("grpo")
    with pytest.raises(ValueError, match="same problem twice"):
        collect_groups(
            ScriptedEngine(newest_first=False),
            lambda _: Guidance(method.micro_groups, 64),
            lambda _: at_once(WRONG),
            [problem(1), problem(1)],
            step=1,
            params=SamplingParams(),
        )


def test_evaluate_computes_metrics_by_source():
    problems = [Problem(f"{i:016x}", (1,), "", (), "", f"K={i % 2}") for i in range(4)]
    # The greedy samples solve only problem 0. Of the four samples per problem, all solve problem 0 and one solves
    # problem 1.
    right = {(0, j) for j in range(4)} | {(1, 2)}
    score = lambda c: at_once(
        grade_for((int(c.request.problem.id, 16), c.request.sample_index) in right)
    )
    metrics = evaluate(
        sampler(ScriptedEngine(newest_first=True), score),
        problems,
        num_samples_of=lambda _: 4,
        temperature=0.6,
        decode=str,
    ).metrics
    assert metrics["eval/accuracy_greedy"] == 0.25
    assert metrics["eval/accuracy_sampled"] == 5 / 16
    assert metrics["eval/pass@1"] == 5 / 16
    assert metrics["eval/pass@2"] == (1 + 0.5) / 4
    assert metrics["eval/pass@4"] == 0.5
    assert metrics["eval/accuracy_sampled/K=0"] == 0.5
    assert metrics["eval/accuracy_greedy/K=1"] == 0.0
    assert metrics["eval/accuracy_sampled_mean_of_sources"] == 5 / 16
    assert metrics["eval/num_samples"] == 4
    one_source = evaluate(
        sampler(ScriptedEngine(newest_first=True), score),
        problems[::2],
        num_samples_of=lambda _: 1,
        temperature=0.6,
        decode=str,
    ).metrics
    assert not [name for name in one_source if name.startswith("eval/accuracy_greedy/")]
    assert metrics["eval/completion_len_mean"] == 2
    assert metrics["eval/truncated"] == 0
    assert metrics["eval/error_rate"] == metrics["eval/timeout_rate"] == 0


def test_evaluate_uses_the_given_temperature_and_number_of_samples_per_source():
    problems = [Problem(f"{i:016x}", (1,), "", (), "", "aime" if i else "math") for i in range(3)]
    seen = []

    def sample(requests, params):
        seen.append((params.temperature, [(r.problem.source, r.sample_index) for r in requests]))
        engine = ScriptedEngine(newest_first=False)
        score = lambda c: at_once(grade_for(c.request.problem.source == "math"))
        yield from sampler(engine, score)(requests, params)

    metrics, columns = evaluate(
        sample,
        problems,
        num_samples_of={"aime": 3, "math": 1}.__getitem__,
        temperature=0.7,
        decode=str,
    )
    greedy, sampled = seen
    assert greedy == (0.0, [("math", 0), ("aime", 0), ("aime", 0)])
    assert sampled == (0.7, [("math", 0), *[("aime", j) for j in range(3)] * 2])
    assert metrics["eval/accuracy_sampled"] == pytest.approx(1 / 3)
    assert metrics["eval/accuracy_sampled_mean_of_sources"] == 0.5
    assert metrics["eval/temperature"] == 0.7
    counts = {name: x for name, x in metrics.items() if name.startswith("eval/num_samples")}
    assert counts == {
        "eval/num_samples": 1,
        "eval/num_samples/aime": 3,
        "eval/num_samples/math": 1,
    }
    assert columns["correct"] == [1, 0, 0]
    assert [example["problem_id"] for example in columns["examples"]] == columns["id"]
    assert [example["is_correct"] for example in columns["examples"]] == [True, False, False]
    assert columns["examples"][0]["completion"] == "(7, 9)"


def sampler(engine, score):
    """Returns a function that samples completions from a scripted engine and grades them."""

    def sample(requests, params):
        engine.submit(requests, step=0, params=params)
        while engine.is_busy:
            yield from ((completion, score(completion).result()) for completion in engine.step())

    return sample


def test_evaluate_counts_completions_without_a_reward():
    failing = {0: ERROR, 1: TIMEOUT}
    score = lambda c: at_once(failing.get(c.request.sample_index, CORRECT))
    problems = [Problem(f"{i:016x}", (1,), "") for i in range(2)]
    metrics = evaluate(
        sampler(ScriptedEngine(newest_first=False), score),
        problems,
        num_samples_of=lambda _: 4,
        temperature=0.6,
        decode=str,
    ).metrics
    assert metrics["eval/error_rate"] == 4 / 10  # the greedy completion also has index 0
    assert metrics["eval/timeout_rate"] == 2 / 10
    assert metrics["eval/accuracy_greedy"] == 0
    assert metrics["eval/accuracy_sampled"] == 0.5


def test_pass_at_k_equals_the_mean_over_all_subsets():
    from itertools import combinations

    for correct in range(6):
        samples = [True] * correct + [False] * (5 - correct)
        for k in range(1, 6):
            subsets = list(combinations(samples, k))
            assert pass_at_k(5, correct, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))
