"""Tests guidance against handwritten tables, and that early decisions equal those made with all rewards."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trapo_jax.methods import ALWAYS, NEVER, make_method
from trapo_jax.rollouts.guidance import Guidance, is_complete, is_guided
from trapo_jax.types import Expert, MicroGroup, Problem

EXPERT = Expert(tuple(range(100, 110)))  # 10 tokens, ending with EOS
PROBLEM = Problem("0" * 16, (1, 2, 3), "42", (EXPERT,))


def scheduler(name="trapo", *, preset=None, **overrides) -> Guidance:
    method = make_method(name, **({"preset": preset} if preset else {}))
    arguments = {
        "micro_groups": method.micro_groups,
        "max_completion_length": 64,
        "prefix_boundary": method.prefix_boundary,
        "second_expert_last": method.second_expert_last,
    }
    return Guidance(**{**arguments, **overrides})


def guidance(plan: Guidance, rewards, problem=PROBLEM) -> list[tuple[int, int]]:
    """Returns the (expert_index, prefix_len) of each rollout if rollout j gets `rewards[j]`, observed one by one."""
    state, plans = plan.start(problem), {}
    while not state.is_complete:
        ready = plan.ready(state)
        plans |= {r.sample_index: (r.expert_index, r.prefix_len) for r in ready}
        index = ready[0].sample_index
        state = plan.observe(state, index, float(rewards[index]))
    return [plans[j] for j in range(plan.group_size)]


FREE = (-1, 0)
# Rewards of the eight rollouts, and prefix lengths of rollouts 4 to 7, for a 10-token expert solution. The comments
# give the mean rewards that are compared with the thresholds.
PAPER = [
    ("0000 00 0 0", (2, 2, 5, 10)),
    ("1000 00 0 0", (2, 2, 5, 10)),  # 1/4
    ("1100 00 0 0", (0, 0, 5, 10)),  # mean exactly 0.5 is not below 0.5; then 2/6
    ("1100 11 0 0", (0, 0, 5, 10)),  # 4/6 = 0.667 < 0.7, then 4/7
    ("1110 11 0 0", (0, 0, 0, 10)),  # 5/6, then 5/7
    ("1111 11 0 0", (0, 0, 0, 10)),  # 6/7 = 0.857 < 0.9
    ("1111 11 1 0", (0, 0, 0, 0)),  # 7/7
    ("1111 00 1 0", (0, 0, 5, 10)),  # 4/6, then 5/7
    ("0000 11 1 0", (2, 2, 5, 10)),
]
REFERENCE = [
    ("0000 00 0 0", (2, 2, 5, 10)),  # floor(0.25 * 10) = 2
    ("1100 00 0 0", (0, 0, 5, 10)),  # 2/4
    ("1100 11 0 0", (0, 0, 0, 10)),  # mean exactly 4/6 is not below 4/6; then 4/7
    ("1110 00 0 0", (0, 0, 5, 10)),  # 3/6
    ("1111 11 0 0", (0, 0, 0, 10)),  # 6/7 < 7/7
    ("1111 11 1 0", (0, 0, 0, 0)),  # mean exactly 1.0 is not below 7/7
]
CASES = [("paper", *row) for row in PAPER] + [("reference", *row) for row in REFERENCE]


@pytest.mark.parametrize(("preset", "rewards", "prefix_lens"), CASES)
def test_guidance_follows_the_table(preset, rewards, prefix_lens):
    expected = [FREE] * 4 + [(0, n) if n else FREE for n in prefix_lens]
    assert guidance(scheduler(preset=preset), rewards.replace(" ", "")) == expected


@pytest.mark.parametrize("mean_at", [(0.5, 4), (4 / 6, 6), (0.7, 10), (6 / 7, 7), (1.0, 7)])
def test_mean_equal_to_the_threshold_is_unguided(mean_at):
    threshold, count = mean_at
    ones = round(threshold * count)
    assert is_guided([1.0] * ones + [0.0] * (count - ones), threshold) is False
    assert is_guided([1.0] * (ones - 1) + [0.0] * (count - ones + 1), threshold) is True


def test_grpo_never_uses_the_expert_and_sft_always_does():
    assert guidance(scheduler("grpo"), [0.0] * 8) == [FREE] * 8
    assert guidance(scheduler("sft"), [1.0]) == [(0, 10)]


def test_sizes_and_ratios_of_the_presets():
    paper = [(m.size, m.ratio) for m in make_method("trapo").micro_groups]
    reference = [(m.size, m.ratio) for m in make_method("trapo", preset="reference").micro_groups]
    assert paper == [(4, 0.0), (2, 0.2), (1, 0.5), (1, 1.0)]
    assert reference == [(4, 0.0), (2, 0.25), (1, 0.5), (1, 1.0)]


def test_problems_without_an_expert_are_unguided():
    problem = Problem("1" * 16, (1,), "x")
    assert guidance(scheduler(), [0.0] * 8, problem) == [FREE] * 8


def test_the_reference_preset_gives_the_second_expert_to_the_last_micro_group():
    second = Expert(tuple(range(200, 220)))
    problem = Problem("2" * 16, (1,), "x", (EXPERT, second))
    plans = guidance(scheduler(preset="reference"), [0.0] * 8, problem)
    assert plans[4:] == [(0, 2), (0, 2), (0, 5), (1, 20)]
    assert guidance(scheduler(), [0.0] * 8, problem)[7] == (1, 20)
    assert guidance(scheduler(second_expert_last=False), [0.0] * 8, problem)[7] == (0, 10)


def test_a_completion_follows_even_the_whole_expert_solution():
    """If every prefix must be followed by a completion, ratios apply to the tokens before EOS."""
    ratios = [(MicroGroup(1, ratio, 2.0),) for ratio in (0.2, 0.6, 1.0)]
    for always, lens in ((True, [1, 5, 9]), (False, [2, 6, 10])):
        plans = [Guidance(groups, 20, always_samples=always) for groups in ratios]
        requests = [plan.ready(plan.start(PROBLEM))[0] for plan in plans]
        assert [request.prefix_len for request in requests] == lens
        assert is_complete(requests[-1], 20) != always
    short = Guidance(ratios[-1], 4, always_samples=True)
    (request,) = short.ready(short.start(PROBLEM))
    assert request.prefix_len == 3
    assert not is_complete(request, 4)


@pytest.mark.parametrize(
    ("paragraph_ends", "prefix_len"),
    [
        # The last token of the paragraph must have an index greater than 2 (the exact boundary) and less than 5.5.
        ((4,), 4),
        ((2, 3, 5), 5),
        ((6,), 6),
        ((7,), 2),
        ((4, 5), 4),  # the first of two paragraph ends
        ((), 2),
    ],
)
def test_paragraph_boundary(paragraph_ends, prefix_len):
    expert = Expert(EXPERT.token_ids, paragraph_ends)
    problem = Problem("3" * 16, (1,), "x", (expert,))
    plans = guidance(scheduler(preset="reference"), [0.0] * 8, problem)
    assert plans[4] == (0, prefix_len)


def test_prefix_is_truncated_at_the_maximum_length():
    assert guidance(scheduler(max_completion_length=4), [0.0] * 8)[6:] == [(0, 4), (0, 4)]


def test_empty_prefix_is_unguided():
    problem = Problem("4" * 16, (1,), "x", (Expert((1, 2, 3)),))
    assert guidance(scheduler(), [0.0] * 8, problem)[4:] == [FREE, FREE, (0, 1), (0, 3)]


def test_observing_a_reward_returns_a_new_state():
    plan = scheduler()
    state = plan.observe(plan.start(PROBLEM), 2, 0.5)
    assert plan.start(PROBLEM).rewards == (None,) * 8
    assert state.rewards == (None, None, 0.5, None, None, None, None, None)


@pytest.mark.parametrize("reward", [-0.1, 1.1, float("nan")])
def test_reward_out_of_range_is_rejected(reward):
    plan = scheduler()
    with pytest.raises(ValueError, match=r"reward must be in \[0, 1\]"):
        plan.observe(plan.start(PROBLEM), 0, reward)


def test_missing_rewards_do_not_affect_guidance():
    """Two unguided rollouts are followed by one that is guided if their mean reward is below 0.5."""
    groups = (MicroGroup(2, 0.0, -1.0), MicroGroup(1, 1.0, 0.5))
    plan = Guidance(groups, 64)
    state = plan.observe(plan.observe(plan.start(PROBLEM), 0, None), 1, 0.7)
    (request,) = plan.ready(state)
    assert (
        request.prefix_len == 0
    )  # If the missing reward counted as 0, this rollout would be guided.
    state = plan.observe(plan.observe(plan.start(PROBLEM), 0, None), 1, 0.4)
    (request,) = plan.ready(state)
    assert request.prefix_len > 0
    state = plan.observe(state, 2, None)
    assert state.is_complete
    with pytest.raises(ValueError, match="already been observed"):
        plan.observe(state, 2, 1.0)


def test_second_observation_is_rejected():
    plan = scheduler()
    state = plan.observe(plan.start(PROBLEM), 0, 1.0)
    with pytest.raises(ValueError, match="already been observed"):
        plan.observe(state, 0, 1.0)


def test_guidance_is_decided_before_the_last_reward():
    plan = scheduler()
    state = plan.start(PROBLEM)
    for index in (0, 1, 3):
        state = plan.observe(state, index, 0.0)  # the mean of the four is at most 1/4 < 0.5
    assert [r.sample_index for r in plan.ready(state)][:3] == [2, 4, 5]


groups = st.lists(
    st.builds(
        MicroGroup,
        size=st.integers(1, 4),
        ratio=st.sampled_from([0.0, 0.2, 0.5, 1.0]),
        threshold=st.sampled_from([NEVER, 0.25, 0.5, 2 / 3, 0.9, 1.0, ALWAYS]),
    ),
    min_size=1,
    max_size=5,
)


@given(groups, st.data())
def test_deciding_early_gives_the_same_guidance_as_waiting(micro_groups, data):
    plan = Guidance(tuple(micro_groups), 64)
    size = plan.group_size
    rewards = data.draw(
        st.lists(st.sampled_from([0.0, 0.1, 1 / 3, 0.7, 1.0, None]), min_size=size, max_size=size)
    )
    # Waiting: decide each micro-group based on all earlier rewards that are not missing.
    expected, first = [], 0
    for group in micro_groups:
        mean_is_below = first == 0 and group.threshold > 0
        if first:
            earlier = [reward for reward in rewards[:first] if reward is not None]
            mean_is_below = is_guided(earlier, group.threshold)
        expected += [floor_prefix(group) if mean_is_below else FREE] * group.size
        first += group.size
    # Deciding early: observe the rewards of ready rollouts in an arbitrary order.
    state, plans = plan.start(PROBLEM), {}
    while not state.is_complete:
        ready = plan.ready(state)
        for request in ready:
            seen = (request.expert_index, request.prefix_len)
            assert plans.setdefault(request.sample_index, seen) == seen
        index = data.draw(st.sampled_from(ready)).sample_index
        state = plan.observe(state, index, rewards[index])
    assert [plans[j] for j in range(size)] == expected


def floor_prefix(group: MicroGroup) -> tuple[int, int]:
    length = int(group.ratio * len(EXPERT.token_ids))
    return (0, length) if length else FREE


@given(st.permutations([0.1, 0.2, 0.3, 0.7, 0.05, 1 / 3]))
def test_order_of_rewards_does_not_matter(rewards):
    mean = sum(sorted([0.1, 0.2, 0.3, 0.7, 0.05, 1 / 3])) / 6
    decisions = {is_guided(rewards, t) for t in (mean - 1e-12,)}
    assert decisions == {False}


def test_every_reward_sequence_gives_a_complete_group():
    plan = scheduler()
    for rewards in itertools.product([0.0, 1.0], repeat=8):
        assert len(guidance(plan, rewards)) == 8
