"""Tests all methods: objectives (against an independent float64 implementation), guidance, and hyperparameters."""

import dataclasses
import json
import math

import numpy as np
import pytest

from support.grades import WRONG, grade_of
from support.objective import objective
from trapo_jax.methods import (
    METHODS,
    NEVER,
    Sampled,
    Schedule,
    describe,
    fingerprint,
    make_method,
)
from trapo_jax.rollouts.guidance import Guidance, is_complete
from trapo_jax.training.packing import build_batch
from trapo_jax.types import (
    Completion,
    Expert,
    FinishReason,
    Moment,
    Problem,
    Rollout,
    StagePosition,
    UserError,
)

MAX_LENGTH = 12
NOW = Moment(step=60, progress=0.4, seed=3)

# Rewards of the rollouts of four problems, which the policy solves never, sometimes, mostly, and always.
REWARDS = ["00000001", "01000011", "11101111", "11111111"]


def problem(number):
    """Returns a problem with an expert solution of 5 + `number` tokens. Problem 3 has a second expert solution."""
    rng = np.random.default_rng(number)
    experts = [Expert(tuple(rng.integers(2, 16, 5 + number + 2 * i).tolist())) for i in range(2)]
    prompt = tuple(rng.integers(2, 16, 1 + number % 3).tolist())
    return Problem(f"{number:016x}", prompt, "", tuple(experts[: 1 + (number == 3)]))


def sample_group(method, problem, rewards, moment=NOW):
    """Returns the group that results if rollout j has the reward `rewards[j]`. Completions have random lengths."""
    rng = np.random.default_rng(problem.key)
    guidance = Guidance(
        method.micro_groups_at(moment, problem),
        MAX_LENGTH,
        method.prefix_boundary,
        method.second_expert_last,
    )
    state, rollouts = guidance.start(problem), {}
    while not state.is_complete:
        request = guidance.ready(state)[0]
        max_len = MAX_LENGTH - request.prefix_len
        count = 0 if is_complete(request, MAX_LENGTH) else int(rng.integers(1, max_len + 1))
        tokens = tuple(rng.integers(2, 16, count).tolist())
        completion = Completion(request, tokens, (-1.0,) * count, FinishReason.STOP)
        reward = float(rewards[request.sample_index])
        rollouts[request.sample_index] = Rollout(completion, grade_of(reward))
        state = guidance.observe(state, request.sample_index, reward)
    return [rollouts[j] for j in sorted(rollouts)]


def sample(method, moment=NOW, state=None):
    problems = [problem(i) for i in range(len(REWARDS))]
    groups = [sample_group(method, p, r, moment) for p, r in zip(problems, REWARDS, strict=True)]
    extra = [problem(10 + i) for i in range(method.extra_rows_per_problem)]
    by_id = {p.id: p for p in problems}
    return Sampled(groups, moment, state or {}, extra, by_id, MAX_LENGTH)


def batches_of(method, sampled):
    return [
        (update, build_batch(update.rows, row_len=40, micro_batch_rows=6))
        for update in method.select(sampled).updates
    ]


def scores_of(batch, seed=0):
    """Returns random log-probabilities (current, old, reference) and entropies of all tokens, trained or not."""
    rng = np.random.default_rng(seed)
    shape = batch.kinds.shape
    now = np.log(rng.uniform(0.01, 0.99, shape))
    old, ref = (now + rng.normal(0, 0.3, shape) for _ in range(2))
    return [np.float32(x) for x in (now, old, ref, rng.uniform(0.1, 2.0, shape))]


# ---- an independent float64 implementation; derivatives are computed with a complex step of 1e-30 i ----


class Row:
    """The arrays (logp, old, ref, H) of the completion and expert tokens of one trained row."""

    def __init__(self, completion, scores, batch, segment_id):
        place = np.argwhere(batch.segment_ids == segment_id)
        values = [np.array([x[tuple(p)] for p in place]) for x in scores]
        prompt = len(completion.request.problem.prompt_ids)
        start = prompt + completion.request.prefix_len
        self.expert = [x[prompt:start] for x in values]
        self.completion = [x[start:] for x in values]
        self.request = completion.request


def sg(x):
    return np.real(x)


def by_real(condition, a, b):
    return np.where(condition, a, b)


def policy_gradient(row, advantage, clip=None):
    logp, old, _, _ = row.completion
    ratio = np.exp(logp - sg(old))
    plain = -advantage * ratio
    if clip is None:
        return np.sum(plain)
    clipped = -advantage * by_real(
        ratio.real < 1 - clip, 1 - clip, by_real(ratio.real > 1 + clip, 1 + clip, ratio)
    )
    return np.sum(by_real(plain.real >= clipped.real, plain, clipped))


def cross_entropy(row):
    return -np.sum(row.expert[0])


def trsft(row, alpha=0.1):
    logp = row.expert[0]
    p = np.exp(logp)
    return np.sum(by_real(p.real >= alpha, -logp, 1 - np.log(alpha) - p / alpha))


def luffy_loss(row, advantage, gamma=0.1):
    p = np.exp(row.expert[0])
    return np.sum(-advantage * p / (p + gamma))


def mean_entropy(tokens):
    return sg(tokens[3]).mean()


def divergence(row):
    logp, _, ref, _ = row.completion
    return np.sum(np.exp(sg(ref) - logp) - (sg(ref) - logp) - 1)


def advantages(group, std=False):
    rewards = np.array([r.reward for r in group])
    values = rewards - rewards.mean()
    return values / (rewards.std(ddof=1) + 1e-6) if std else values


def carriers(group):
    """Returns the indices of the rollouts whose prefixes are trained on."""
    first = {}
    for j, rollout in enumerate(group):
        request = rollout.request
        if request.prefix_len:
            first.setdefault((request.expert_index, request.prefix_len), j)
    return set(first.values())


def num(rows, what):
    return sum(len(getattr(row, what)[0]) for row in rows)


def whole_rows(groups, extra=0):
    """Returns the denominator of constant_mean: the maximum length times the number of rows."""
    return MAX_LENGTH * (sum(len(group) for group in groups) + extra)


def per_group(expert_loss, groups, rows):
    """Returns the RL loss on all completion tokens plus `expert_loss` on trained prefixes, reduced by constant_mean."""
    total = 0.0
    for group in groups:
        a = advantages(group)
        for j, rollout in enumerate(group):
            row = rows[id(rollout.completion)]
            total += policy_gradient(row, a[j])
            if j in carriers(group):
                total += expert_loss(row, a[j])
    return total / whole_rows(groups)


def token_mean_of_experts(groups, rows):
    carried = [rows[id(group[j].completion)] for group in groups for j in sorted(carriers(group))]
    return sum(cross_entropy(row) for row in carried) / num(carried, "expert")


def reference_sft(groups, rows, moment):
    return token_mean_of_experts(groups, rows)


def reference_grpo(groups, rows, moment):
    return per_group(lambda row, a: 0.0, groups, rows)


def reference_sft_then_grpo(groups, rows, moment):
    stage = reference_sft if moment.stage.index == 0 else reference_grpo
    return stage(groups, rows, moment)


MICRO_BATCH_ROWS = 64 / 3  # rows per micro-batch in the released code


def reference_rl_plus_sft(groups, rows, moment):
    total = 0.0
    for group in groups:
        baseline = np.mean([r.reward for r in group[:7]])
        for rollout in group[:7]:
            total += policy_gradient(rows[id(rollout.completion)], rollout.reward - baseline)
    return total / whole_rows(groups) + token_mean_of_experts(groups, rows) / MICRO_BATCH_ROWS


def reference_hpt(groups, rows, moment):
    """Trains on the expert solutions of problems that no rollout solved, since the gate is 0."""
    rl, experts, count = 0.0, [], 0
    for group in groups:
        if sum(r.reward for r in group) <= 0:
            experts.append(rows[group[0].request.problem.id])
            count += 1
            continue
        count += len(group)
        for rollout, a in zip(group, advantages(group), strict=True):
            rl += policy_gradient(rows[id(rollout.completion)], a)
    sft = sum(cross_entropy(row) for row in experts) / num(experts, "expert") if experts else 0.0
    return rl / (MAX_LENGTH * count) + sft / MICRO_BATCH_ROWS


def reference_srft(groups, rows, moment):
    shared, supervised, carried = 0.0, 0.0, []
    for group in groups:
        a = advantages(group)
        for j, rollout in enumerate(group):
            row = rows[id(rollout.completion)]
            if j == 7:
                carried.append(row)
                shared += luffy_loss(row, a[j])
                supervised += 0.5 * np.exp(-mean_entropy(row.expert)) * cross_entropy(row)
            elif rollout.reward == 1:
                shared += -0.1 * np.exp(mean_entropy(row.completion)) * np.sum(row.completion[0])
            else:
                shared += np.sum(row.completion[0])
    supervised /= num(carried, "expert") * MICRO_BATCH_ROWS
    return shared / whole_rows(groups) + supervised


def chord_parts(groups, rows):
    """Returns the clipped GRPO loss, a mean over completion tokens with standardized advantages, and the expert rows."""
    own_rows = [rows[id(r.completion)] for group in groups for r in group]
    rl = sum(
        policy_gradient(rows[id(r.completion)], a, clip=0.2)
        for group in groups
        for r, a in zip(group, advantages(group, std=True), strict=True)
    )
    extra = [row for key, row in rows.items() if isinstance(key, str)]
    assert len(extra) == 32
    return rl / num(own_rows, "completion"), extra


def reference_chord(groups, rows, moment):
    rl, extra = chord_parts(groups, rows)
    mu = 0.05 + 0.85 * 0.5 * (1 + math.cos(math.pi * moment.step / 200))
    return (1 - mu) * rl + mu * sum(map(cross_entropy, extra)) / num(extra, "expert")


def reference_chord_phi(groups, rows, moment):
    rl, extra = chord_parts(groups, rows)
    weighted = 0.0
    for row in extra:
        p = sg(np.exp(row.expert[0]))
        weighted -= np.sum(row.expert[0] * p * (1 - p))
    return 0.9 * rl + 0.1 * weighted / num(extra, "expert")


def reference_uft(groups, rows, moment):
    own_rows = [rows[id(r.completion)] for group in groups for r in group]
    total = sum(
        policy_gradient(rows[id(r.completion)], a, clip=0.2)
        for group in groups
        for r, a in zip(group, advantages(group, std=True), strict=True)
    )
    total += 0.001 * sum(divergence(row) for row in own_rows)
    total /= num(own_rows, "completion")
    has_hints = any(carriers(group) for group in groups)
    return total + (0.001 * token_mean_of_experts(groups, rows) if has_hints else 0.0)


def prefix_rft_loss(row, advantage):
    logp, old, _, entropy = row.expert
    top = np.argsort(-sg(entropy), kind="stable")[: math.ceil(0.2 * len(logp))]
    return np.sum(-advantage * np.exp(logp - sg(old))[top])


def reference_trapo_plus(groups, rows, moment):
    """Excludes the last problem, whose rollouts are all correct, so that their advantages are 0."""
    total = per_group(lambda row, a: trsft(row), groups[:-1], rows) * whole_rows(groups[:-1])
    return total / (MAX_LENGTH * len(rows))


REFERENCES = {
    "sft": reference_sft,
    "grpo": reference_grpo,
    "sft_then_grpo": reference_sft_then_grpo,
    "micro_group_grpo": reference_grpo,
    "micro_group_sft": lambda g, r, m: per_group(lambda row, a: cross_entropy(row), g, r),
    "micro_group_luffy": lambda g, r, m: per_group(luffy_loss, g, r),
    "trapo": lambda g, r, m: per_group(lambda row, a: trsft(row), g, r),
    "trapo_plus": reference_trapo_plus,
    "luffy": lambda g, r, m: per_group(luffy_loss, g, r),
    "rl_plus_sft": reference_rl_plus_sft,
    "relift": reference_grpo,  # a separate test covers the buffer
    "hpt": reference_hpt,
    "srft": reference_srft,
    "chord": reference_chord,
    "chord_phi": reference_chord_phi,
    "uft": reference_uft,
    "prefix_rft": lambda g, r, m: per_group(prefix_rft_loss, g, r),
}


def check(method, batch, update, reference, moment):
    """Checks the objective's value and its derivative along a random direction of log-probabilities and entropies."""
    scores = scores_of(batch)
    value, (by_logprobs, by_entropies) = objective(method, batch, scores, moment, MAX_LENGTH)
    rng = np.random.default_rng(1)
    along = [np.float32(rng.normal(size=batch.kinds.shape)) for _ in range(2)]
    exact = [x.astype(complex) for x in scores]
    exact[0] += 1e-30j * along[0]
    exact[3] += 1e-30j * along[1]
    rows = {}
    for i, row in enumerate(update.rows):
        key = id(row.completion)
        if row.completion.finish_reason is FinishReason.NOT_SAMPLED:  # an expert row
            key = row.completion.request.problem.id
        rows[key] = Row(row.completion, exact, batch, 1 + i)
    expected = reference(rows)
    assert value == pytest.approx(expected.real, rel=1e-6, abs=1e-6)
    derivative = np.sum(np.float64(by_logprobs) * along[0][..., 1:])
    derivative += np.sum(np.float64(by_entropies) * along[1][..., 1:])
    assert derivative == pytest.approx(expected.imag / 1e-30, rel=1e-6, abs=1e-6)
    assert abs(derivative) > 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_objective_equals_an_independent_float64_implementation(name):
    method = make_method(name)
    for index in range(len(method.stages)):
        moment = NOW._replace(stage=StagePosition(index, 1, 0.0))
        sampled = sample(method, moment)
        ((update, batch),) = batches_of(method, sampled)
        reference = lambda rows, s=sampled, m=moment: REFERENCES[name](s.groups, rows, m)
        check(method, batch, update, reference, moment)


def test_hpt_trains_on_expert_solutions_of_problems_up_to_the_gate():
    method = make_method("hpt", gate=1)
    sampled = sample(method)
    (update,) = method.select(sampled).updates
    kinds = [(row.num_completion > 0, row.num_expert_trained) for row in update.rows]
    assert kinds == [(False, 5)] + [(True, 0)] * 24
    own = [r for group in sampled.groups[1:] for r in group]
    assert [row.completion for row in update.rows[1:]] == [r.completion for r in own]


def test_relift_buffers_unsolved_problems_until_the_buffer_is_full():
    method = make_method("relift", buffer_size=2, sft_learning_rate_scale=0.5)
    sampled = sample(method, state={"unsolved": [problem(2).id]})
    never, other = ([Rollout(r.completion, WRONG) for r in group] for group in sampled.groups[:2])
    sampled = sampled._replace(groups=[never, *sampled.groups[1:], other])
    (own, buffered), state = method.select(sampled)
    # The newest problems are trained on: the two from this step rather than the one from an earlier step.
    assert state == {"unsolved": [problem(2).id]}
    assert (own.max_grad_norm, buffered.max_grad_norm) == (0.7, None)
    assert (own.optimizer, buffered.optimizer) == ("main", "buffer")
    assert (own.learning_rate_scale, buffered.learning_rate_scale) == (1.0, 0.5)
    trained = [row.completion.request.problem.id for row in buffered.rows]
    assert trained == [problem(0).id, problem(1).id]
    assert not any(row.num_expert_trained for row in own.rows)
    # The objective of the buffered update is the mean cross-entropy minus the entropy bonus.
    batch = build_batch(buffered.rows, row_len=40, micro_batch_rows=6)

    def reference(rows):
        entropy = sum(np.sum(row.expert[3]) for row in rows.values())
        total = sum(map(cross_entropy, rows.values())) - 0.001 * entropy
        return total / num(rows.values(), "expert")

    check(method, batch, buffered, reference, NOW)
    (alone,), state = method.select(sampled._replace(groups=sampled.groups[1:3], state={}))
    assert (alone.optimizer, state) == ("main", {"unsolved": []})


# ---- guidance ----

LONG = Problem("00000007" + "0" * 8, (1,), "", (Expert(tuple(range(100))),))
FREE8 = [0] * 8
GUIDANCE = {  # prefix lengths for an expert solution of 100 tokens if all rewards are 0, and if all are 1
    "sft": ([100], [100]),
    "grpo": (FREE8, FREE8),
    "sft_then_grpo": (FREE8, FREE8),  # in the second stage
    "micro_group_grpo": ([0] * 4 + [20, 20, 50, 100], FREE8),
    "micro_group_sft": ([0] * 4 + [20, 20, 50, 100], FREE8),
    "micro_group_luffy": ([0] * 4 + [20, 20, 50, 100], FREE8),
    "trapo": ([0] * 4 + [20, 20, 50, 100], FREE8),
    "trapo_plus": ([0] * 7 + [100], FREE8),
    "luffy": ([0] * 7 + [100],) * 2,
    "rl_plus_sft": ([0] * 7 + [100],) * 2,
    "relift": (FREE8, FREE8),
    "hpt": (FREE8, FREE8),
    "srft": ([0] * 7 + [100],) * 2,
    "chord": (FREE8, FREE8),
    "chord_phi": (FREE8, FREE8),
    "uft": ([60] * 8,) * 2,  # 3 of 5 slices for seed 3, step 60, and problem 7
    "prefix_rft": ([0] * 7 + [27],) * 2,  # a quarter of the way from 5% to 95%, rounded down
}


@pytest.mark.parametrize("name", METHODS)
def test_guidance_equals_the_table(name):
    method = make_method(name)
    last_stage = StagePosition(len(method.stages) - 1, 1, 0.0)
    moment = Moment(step=60, progress=2 / 3, seed=3, stage=last_stage)
    for reward, expected in zip("01", GUIDANCE[name], strict=True):
        guidance = Guidance(method.micro_groups_at(moment, LONG), 1000)
        state, lens = guidance.start(LONG), {}
        while not state.is_complete:
            request = guidance.ready(state)[0]
            lens[request.sample_index] = request.prefix_len
            state = guidance.observe(state, request.sample_index, float(reward))
        assert [lens[j] for j in sorted(lens)] == expected


def test_trapo_plus_trains_on_rollouts_with_an_advantage_or_a_prefix():
    method = make_method("trapo_plus")
    sampled = sample(method)
    (update,) = method.select(sampled).updates
    kept = [row.completion for row in update.rows]
    first, *_, last = sampled.groups
    assert not any(rollout.completion in kept for rollout in last)  # all are correct
    # The policy never solves the first problem, so one rollout is guided. The reward of that rollout gives all rollouts
    # of the group an advantage.
    assert [rollout.completion for rollout in first] == kept[:8]
    unsolved = [Rollout(r.completion, WRONG) for r in first]
    (update,) = method.select(sampled._replace(groups=[unsolved, last])).updates
    assert [row.num_expert_trained for row in update.rows] == [5]  # only the expert solution
    (update,) = method.select(sampled._replace(groups=[last])).updates
    assert build_batch(update.rows, row_len=40, micro_batch_rows=6).num_micro_batches == 0


def test_guidance_depends_on_stage_and_progress():
    stages = make_method("sft_then_grpo", sft_share=0.25)
    prefix = make_method("prefix_rft")
    at = lambda method, progress: [
        (g.size, g.ratio) for g in method.micro_groups_at(Moment(1, progress, 0), LONG)
    ]
    in_stage = lambda index: [
        (g.size, g.ratio)
        for g in stages.micro_groups_at(Moment(9, 0.3, 0, StagePosition(index, 1, 0.0)), LONG)
    ]
    assert in_stage(0) == [(1, 1.0)]
    assert in_stage(1) == [(8, 0.0)]
    assert at(prefix, 0.0) == [(7, 0.0), (1, 0.95)]
    assert at(prefix, 1.0) == [(7, 0.0), (1, pytest.approx(0.05))]


def test_hint_lengths_of_uft_are_binomial_until_hints_end():
    method = make_method("uft")
    problems = [dataclasses.replace(LONG, id=f"{i:08x}" + "0" * 8) for i in range(400)]
    drawn = lambda step, seed=0: [
        round(5 * method.micro_groups_at(Moment(step, 0.0, seed), p)[0].ratio) for p in problems
    ]
    for step in (1, 150, 299):
        q = 0.05 + 0.45 * (1 + math.cos(math.pi * step / 300))
        expected = [math.comb(5, k) * q**k * (1 - q) ** (5 - k) for k in range(6)]
        found = np.bincount(drawn(step), minlength=6) / len(problems)
        np.testing.assert_allclose(found, expected, atol=0.07)
    assert set(drawn(301)) == {0}
    assert drawn(150) == drawn(150)
    assert drawn(150) != drawn(150, seed=1)
    assert drawn(150) != drawn(151)


def test_mu_of_chord_warms_up_and_decays():
    method = make_method("chord", mu_warmup_steps=10, mu_decay_steps=20)
    own, expert = method.terms
    for step, mu in ((5, 0.45), (10, 0.9), (20, (0.9 + 0.05) / 2), (30, 0.05), (99, 0.05)):
        numbers = method.coefficients(Moment(step, 0.0, 0), learning_rate=1.0)
        assert numbers[expert.name] == pytest.approx(mu)
        assert numbers[own.name] == pytest.approx(1 - mu)


# ---- hyperparameters ----

DEFAULTS = {  # hyperparameters specific to the method, weights of its terms in order, (clip_low, clip_high)
    "sft": ({}, [1.0], (None, None)),
    "grpo": ({"num_rollouts": 8}, [1.0], (None, None)),
    "sft_then_grpo": (
        {"num_rollouts": 8, "sft_share": 0.5, "sft_steps": None, "sft_learning_rate": None},
        [1.0, 1.0],
        (None, None),
    ),
    "trapo_plus": ({"num_rollouts": 7, "threshold": 0.5}, [1.0, 1.0], (None, None)),
    "luffy": ({"num_rollouts": 7, "gamma": 0.1}, [1.0, 1.0], (None, None)),
    "rl_plus_sft": ({"num_rollouts": 7}, [1.0, 3 / 64], (None, None)),
    "relift": (
        {
            "num_rollouts": 8,
            "buffer_size": 128,
            "expert_entropy_weight": 0.001,
            "sft_learning_rate_scale": 1.0,
            "rl_max_grad_norm": 0.7,
        },
        [1.0, 1.0, 0.001],
        (None, None),
    ),
    "hpt": (
        {"num_rollouts": 8, "gate": 0, "max_applied_grad_norm": 80 / 64},
        [1.0, 3 / 64],
        (None, None),
    ),
    "srft": (
        {"num_rollouts": 7, "gamma": 0.1, "success_weight": 0.1},
        [0.1, 1.0, 0.5 * 3 / 64, 1.0],
        (None, None),
    ),
    "chord": (
        {
            "num_rollouts": 8,
            "expert_rows_per_rollout": 256 / 64,
            "mu_peak": 0.9,
            "mu_valley": 0.05,
            "mu_warmup_steps": 0,
            "mu_decay_steps": 200,
        },
        None,
        (0.2, 0.2),
    ),
    "chord_phi": (
        {"num_rollouts": 8, "expert_rows_per_rollout": 256 / 64, "mu": 0.1},
        [0.9, 0.1],
        (0.2, 0.2),
    ),
    "uft": (
        {
            "num_rollouts": 8,
            "hint_slices": 5,
            "hint_high": 0.95,
            "hint_low": 0.05,
            "hint_steps": 300,
        },
        [1.0, 0.001, 0.001],
        (0.2, 0.2),
    ),
    "prefix_rft": (
        {"num_rollouts": 7, "prefix_start": 0.95, "prefix_end": 0.05, "top_entropy_share": 0.2},
        [1.0, 1.0],
        (None, None),
    ),
}
TABLES = {  # (size, ratio, threshold) of each micro-group in each preset
    "paper": ((4, 0, NEVER), (2, 0.2, 0.5), (1, 0.5, 0.7), (1, 1.0, 0.9)),
    "reference": ((4, 0, NEVER), (2, 0.25, 2 / 4), (1, 0.5, 4 / 6), (1, 1.0, 7 / 7)),
}


@pytest.mark.parametrize("name", METHODS)
def test_hyperparameters_have_the_expected_defaults(name):
    method = make_method(name)
    if name in DEFAULTS:
        hyperparameters, weights, clips = DEFAULTS[name]
        assert hyperparameters.items() <= method.hyperparameters.items()
        assert (method.clip_low, method.clip_high) == clips
        if weights is not None:
            assert [term.weight for term in method.terms] == pytest.approx(weights)
    else:
        for preset, table in TABLES.items():
            of_preset = make_method(name, preset=preset)
            groups = [(g.size, g.ratio, g.threshold) for g in of_preset.micro_groups]
            assert groups == list(table)
            assert of_preset.prefix_boundary == {"paper": "exact"}.get(preset, "paragraph")
            assert of_preset.second_expert_last
        assert [term.weight for term in method.terms] == [1.0] * len(method.terms)
    assert method.alpha == 0.1
    assert method.max_applied_grad_norm == (80 / 64 if name == "hpt" else math.inf)


@pytest.mark.parametrize("name", METHODS)
def test_every_hyperparameter_changes_the_description_and_the_fingerprint(name):
    other = {bool: lambda x: not x, int: lambda x: x + 1, float: lambda x: x / 2 or 0.5}
    values = {
        "micro_groups": [[1, 0.0, -1.0], [2, 0.75, 0.5]],
        "prefix_boundary": "paragraph",
        "second_expert_last": False,
        "preset": "reference",
        "normalizer": "sequence_mean",
        "clip_low": 0.1,
        "clip_high": 0.1,
        "sft_steps": 7,
        "sft_patience": 3,
        "sft_learning_rate": 1e-5,
        "sft_warmup_steps": 4,
        "sft_decay_start": 0.7,
        "sft_final_learning_rate_ratio": 0.2,
    }
    plain = make_method(name)
    for field in METHODS[name].model_fields:
        default = getattr(METHODS[name](), field)
        value = values[field] if field in values else other[type(default)](default)
        method = make_method(name, **{field: value})
        assert describe(method) != describe(plain)
        assert fingerprint(method) != fingerprint(plain)
    assert fingerprint(make_method(name)) == fingerprint(plain)


@pytest.mark.parametrize("name", METHODS)
def test_a_given_normalizer_applies_to_all_terms_except_the_entropy_bonus(name):
    method = make_method(name, normalizer="sequence_mean")
    assert {t.normalizer for t in method.terms if t.formula != "-H"} == {"sequence_mean"}


def test_a_hyperparameter_must_not_be_called_name(tmp_path, monkeypatch):
    lines = ["from trapo_jax.methods import Hyperparameters", "class Mine(Hyperparameters):"]
    (tmp_path / "with_a_name.py").write_text("\n".join([*lines, "    name: str = 'x'", ""]))
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match="the class has a hyperparameter 'name'"):
        make_method("with_a_name:Mine")


def test_only_methods_with_a_trust_region_have_alpha():
    assert make_method("trapo", alpha=0.3).alpha == 0.3
    with pytest.raises(UserError, match="grpo has no such hyperparameter"):
        make_method("grpo", alpha=0.3)


@pytest.mark.parametrize(
    ("name", "hyperparameters", "message"),
    [
        ("hpt", {"gat": 1}, "method.gat=1: hpt has no such hyperparameter; did you mean gate?"),
        (
            "sft",
            {"gamma": 1.0},
            "sft has no such hyperparameter; available: normalizer, expert_weight",
        ),
        ("hpt", {"gate": "many"}, 'method.gate="many": input should be a valid number'),
        ("luffy", {"gamma": -1.0}, "method.gamma=-1.0: input should be greater than or equal to 0"),
        ("relift", {"buffer_size": 0}, "method.buffer_size=0: input should be greater than or"),
        (
            "relift",
            {"buffer_size": True},
            "method.buffer_size=true: input should be a valid integer",
        ),
        (
            "uft",
            {"hint_high": 1.5},
            "method.hint_high=1.5: input should be less than or equal to 1",
        ),
        (
            "trapo",
            {"micro_groups": [[4, 2.0, 0.5]]},
            "method.micro_groups.0.1=2.0: input should be",
        ),
        ("trapo", {"micro_groups": 3}, "method.micro_groups=3: input should be a valid"),
        ("trapo", {"prefix_boundary": "word"}, "input should be 'exact' or 'paragraph'"),
        ("trappo", {}, "method.name='trappo': no such method; did you mean trapo?"),
        ("no_such_module:Method", {}, "method.name=no_such_module:Method"),
        ("trapo_jax.types:UserError", {}, "expected a Method, a subclass of Hyperparameters"),
        (
            "trapo_jax.methods:make_method",
            {},
            "method.name=trapo_jax.methods:make_method: building the method failed (TypeError: make_method() missing",
        ),
        (
            "trapo_jax.methods:Hyperparameters",
            {},
            "building the method failed (NotImplementedError",
        ),
    ],
)
def test_an_invalid_hyperparameter_causes_a_clear_one_line_error(name, hyperparameters, message):
    with pytest.raises(UserError) as caught:
        make_method(name, **hyperparameters)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_fingerprints_distinguish_user_defined_methods():
    method = make_method("grpo")
    other = dataclasses.replace(method, select=make_method("relift").select)
    assert fingerprint(other) != fingerprint(method)
    other = dataclasses.replace(method, terms=make_method("sft").terms)
    assert fingerprint(other) != fingerprint(method)
    assert json.loads(json.dumps(fingerprint(method))) == fingerprint(method)


WITH_PRESETS = ("trapo", "micro_group_grpo", "micro_group_sft", "micro_group_luffy")


@pytest.mark.parametrize("name", METHODS)
def test_description_contains_formulas_weights_and_source(name):
    method = make_method(name)
    text = describe(method)
    assert text.startswith(f"{name}: {method.source}")
    for term in method.terms:
        assert term.formula in text
        assert f"({term.normalizer})" in text
        if isinstance(term.weight, Schedule):
            assert term.weight.formula in text
    for hyperparameter in method.hyperparameters:
        assert f"  {hyperparameter} = " in text
    assert ("    paper: exact\n    reference: paragraph" in text) == (name in WITH_PRESETS)


def test_no_method_exceeds_its_declared_sizes():
    """The number of rows never exceeds `max_rows`, and the number of rollouts never exceeds the group size."""
    for name in METHODS:
        method = make_method(name)
        late = StagePosition(len(method.stages) - 1, 1, 0.0)
        for moment in (Moment(1, 0.0, 0), NOW, Moment(301, 0.99, 0, late)):
            sampled = sample(method, moment)
            for update in method.select(sampled).updates:
                assert len(update.rows) <= method.max_rows(4)
            assert max(map(len, sampled.groups)) <= method.group_size
