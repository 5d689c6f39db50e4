"""Tests the slot scheduler without JAX, on a simulated device."""

import dataclasses
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trapo_jax.sampling.prefix_cache import ContextCopy
from trapo_jax.sampling.slots import CacheExtent, PendingRequest, SlotScheduler
from trapo_jax.types import (
    Completion,
    Expert,
    FinishReason,
    Problem,
    RolloutRequest,
    SamplingParams,
)

EOS = 1
CACHE_LEN, MAX_LEN = 40, 30


def make_scheduler(**options):
    arguments = {
        "num_slots": 4,
        "num_contexts": 4,
        "cache_len": CACHE_LEN,
        "segment_len": 3,
        "min_view_len": 8,
        "eos_ids": [EOS],
    }
    return SlotScheduler(**{**arguments, **options})


def problem(number):
    prompt = tuple(range(10, 13 + number % 3))
    return Problem(f"{number:08x}" * 2, prompt, "", (Expert((7, 8, 9, 7, 8, 9, EOS)),))


def request(number=0, sample_index=0, prefix_len=0):
    return RolloutRequest(problem(number), sample_index, 0, 0, prefix_len)


def pending(target, *, step=1, token_ids=()):
    partial = Completion(target, token_ids, (-0.5,) * len(token_ids), FinishReason.UNFINISHED)
    return PendingRequest(partial, step, SamplingParams(), MAX_LEN - target.prefix_len)


def sampled(*token_ids):
    return token_ids, (-0.25,) * len(token_ids)


def key_of(target):
    return target.problem.id, target.sample_index, target.prefix_len


def submit_all(scheduler, steps):
    """Submits one request for each of the given steps, all for the same problem, and admits them together."""
    for j, step in enumerate(steps):
        scheduler.submit(pending(request(sample_index=j), step=step))
    return scheduler.admit()


def test_the_lowest_slots_are_taken_first():
    scheduler = make_scheduler()
    admission = submit_all(scheduler, [1, 1, 1])
    assert [start.slot for start in admission.starts] == [0, 1, 2]
    assert (scheduler.num_requests, scheduler.num_idle_slots) == (3, 1)
    assert scheduler.admit() is None


def test_a_start_contains_what_the_device_needs():
    scheduler = make_scheduler()
    params = SamplingParams(0.5, 0.9, 7)
    target = request(3, sample_index=2, prefix_len=2)
    scheduler.submit(pending(target, step=5, token_ids=(20, 21))._replace(params=params))
    (start,) = scheduler.admit().starts
    # The context is the prompt (10, 11, 12), the prefix (7, 8), and the tokens (20, 21); the last token is decoded.
    assert start == (0, 6, 21, MAX_LEN - 2 - 2, 0.5, 0.9, 7, 5, target.problem.key, 2)


def test_earlier_steps_are_admitted_first_and_then_in_order_of_submission():
    scheduler = make_scheduler(num_slots=8)
    admission = submit_all(scheduler, [2, 1, 2, 1])
    assert [(s.step, s.sample_index) for s in admission.starts] == [(1, 1), (1, 3), (2, 0), (2, 2)]


def test_a_wave_ends_when_all_context_rows_are_in_use():
    scheduler = make_scheduler(num_contexts=2)
    for number in range(3):
        scheduler.submit(pending(request(number)))
    waves = [scheduler.admit(), scheduler.admit()]
    assert [len(wave.starts) for wave in waves] == [2, 1]
    assert scheduler.admit() is None


def test_later_steps_are_preempted_with_the_fewest_tokens_first():
    scheduler = make_scheduler()
    submit_all(scheduler, [2, 2, 2, 2])
    scheduler.update_lens(np.array([9, 5, 7, 6]))
    assert scheduler.slots_to_preempt() == []
    for j in range(2):
        scheduler.submit(pending(request(1, j), step=1))
    assert scheduler.slots_to_preempt() == [1, 3]


def test_free_slots_are_used_before_any_request_is_preempted():
    scheduler = make_scheduler()
    submit_all(scheduler, [2, 2, 2])
    scheduler.submit(pending(request(1), step=1))
    assert scheduler.slots_to_preempt() == []


def test_the_same_or_an_earlier_step_is_never_preempted():
    scheduler = make_scheduler(num_slots=2)
    submit_all(scheduler, [1, 2])
    scheduler.submit(pending(request(1), step=2))
    assert scheduler.slots_to_preempt() == []


def test_a_preempted_request_continues_after_its_tokens():
    scheduler = make_scheduler(num_slots=1)
    submit_all(scheduler, [2])
    scheduler.submit(pending(request(1), step=1))
    scheduler.preempt(scheduler.slots_to_preempt(), [sampled(20, 21)])
    (first,) = scheduler.admit().starts
    assert first.step == 1
    (done,) = scheduler.retire([0], [sampled(EOS)])
    assert (done.token_ids, done.finish_reason) == ((EOS,), FinishReason.STOP)
    (again,) = scheduler.admit().starts
    assert (again.step, again.last_token, again.max_new) == (2, 21, MAX_LEN - 2)
    (done,) = scheduler.retire([0], [sampled(22, EOS)])
    assert done.token_ids == (20, 21, 22, EOS)
    assert done.logprobs == (-0.25,) * 4


def test_running_requests_are_compacted_into_the_lowest_slots():
    scheduler = make_scheduler()
    submit_all(scheduler, [1, 1, 1, 1])
    scheduler.retire([0, 1], [sampled(EOS)] * 2)
    assert scheduler.compact() == [(2, 0), (3, 1)]
    assert scheduler.extent().num_slots == 2
    assert sorted(scheduler.running_slots) == [0, 1]


def test_nothing_is_moved_if_the_decode_step_would_not_shrink():
    scheduler = make_scheduler()
    submit_all(scheduler, [1, 1, 1, 1])
    scheduler.retire([0], [sampled(EOS)])
    assert scheduler.compact() == []
    assert scheduler.extent().num_slots == 4


@pytest.mark.parametrize(
    ("num_running", "cached_len", "expected"),
    [
        (1, 3, CacheExtent(2, 8)),  # the smallest extent
        (3, 5, CacheExtent(4, 8)),  # 5 + 3 positions
        (3, 6, CacheExtent(4, 16)),
        (5, 20, CacheExtent(6, 32)),  # at most all 6 slots
        (1, 36, CacheExtent(2, CACHE_LEN)),
    ],
)
def test_the_extent_covers_what_the_next_segment_can_reach(num_running, cached_len, expected):
    scheduler = make_scheduler(num_slots=6)
    submit_all(scheduler, [1] * num_running)
    scheduler.update_lens(np.array([cached_len] * num_running + [39] * (6 - num_running)))
    assert scheduler.extent() == expected


def test_a_completion_ends_with_eos_or_at_its_maximum_length():
    scheduler = make_scheduler()
    submit_all(scheduler, [1, 1, 1])
    sampled_tokens = [sampled(5, EOS), sampled(*[5] * MAX_LEN), sampled(5)]
    reasons = [c.finish_reason for c in scheduler.retire([0, 1, 2], sampled_tokens)]
    assert reasons == [FinishReason.STOP, FinishReason.LENGTH, FinishReason.UNFINISHED]


def test_drain_returns_the_longest_partial_completions_first():
    scheduler = make_scheduler()
    for number, count in enumerate([0, 3, 1]):
        scheduler.submit(pending(request(number), token_ids=(5,) * count))
    assert [len(partial.token_ids) for partial in scheduler.drain()] == [3, 1, 0]
    assert not scheduler.is_busy


def test_drain_refuses_to_drop_running_requests():
    scheduler = make_scheduler()
    submit_all(scheduler, [1])
    with pytest.raises(RuntimeError, match="preempt them first"):
        scheduler.drain()


@pytest.mark.parametrize("module", ["slots", "prefix_cache", "engine"])
def test_the_host_side_does_not_import_jax(module):
    code = f"import sys, trapo_jax.sampling.{module}; assert 'jax' not in sys.modules"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


@dataclasses.dataclass
class DeviceSlot:
    context: tuple[int, ...]
    start: tuple
    new: list[int] = dataclasses.field(default_factory=list)
    active: bool = True


class ListDevice:
    """Executes the decisions of a scheduler as a replica does, and checks each of them."""

    def __init__(self, scheduler, num_contexts):
        self.scheduler = scheduler
        self.contexts = [()] * num_contexts
        self.slots = [None] * scheduler.num_slots

    def step(self):
        scheduler = self.scheduler
        earliest = scheduler._pending[0][0] if scheduler._pending else None
        self.preempt(scheduler.slots_to_preempt())
        while admission := scheduler.admit():
            self.start(admission)
        self.check_priority(earliest)
        for old, new in scheduler.compact():
            assert self.slots[new] is None
            self.slots[old], self.slots[new] = None, self.slots[old]
        self.decode(scheduler.extent())
        lens = [len(s.context) - 1 + len(s.new) if s else 0 for s in self.slots]
        scheduler.update_lens(np.array(lens))
        finished = [slot for slot in scheduler.running_slots if not self.slots[slot].active]
        return scheduler.retire(finished, self.take(finished))

    def check_priority(self, earliest):
        running = [request.step for request in self.scheduler._running.values()]
        if any(step == earliest for step, _, _ in self.scheduler._pending):
            assert max(running) <= earliest

    def start(self, admission):
        for update in admission.context_updates:
            if isinstance(update, ContextCopy):
                self.contexts[update.target] = self.contexts[update.source]
                continue
            for chunk in update:
                assert len(self.contexts[chunk.row]) >= chunk.start
                kept = self.contexts[chunk.row][: chunk.start]
                self.contexts[chunk.row] = kept + chunk.token_ids
        for row, start in zip(admission.context_rows, admission.starts, strict=True):
            assert self.slots[start.slot] is None
            context = (*self.contexts[row][: start.cached_len], start.last_token)
            assert len(context) == start.cached_len + 1
            self.slots[start.slot] = DeviceSlot(context, start)

    def decode(self, extent):
        running = self.scheduler.running_slots
        assert 0 < len(running) <= self.scheduler.num_slots
        assert {i for i, slot in enumerate(self.slots) if slot} == set(running)
        assert max(running) < extent.num_slots
        for slot in (self.slots[i] for i in running):
            for _ in range(3):
                position = len(slot.context) + len(slot.new)
                assert position <= extent.view_len
                slot.new.append(next_token(slot.start, position))
                slot.active = slot.new[-1] != EOS and len(slot.new) < slot.start.max_new
                if not slot.active:
                    break

    def take(self, slots):
        taken = [sampled(*self.slots[slot].new) for slot in slots]
        for slot in slots:
            self.slots[slot] = None
        return taken

    def preempt(self, slots):
        self.scheduler.preempt(slots, self.take(slots))

    def release(self):
        """Preempts and drains all requests and clears the cache, as an update of the weights requires."""
        self.preempt(self.scheduler.running_slots)
        self.contexts = [()] * len(self.contexts)
        self.scheduler.clear_contexts()
        return self.scheduler.drain()


def next_token(start, position):
    """Returns a token that depends only on the request and the position, as in the JAX engine."""
    number = hash((start.step, start.problem_key, start.sample_index, position)) % 12
    return EOS if number == 0 else 20 + number


def expected_tokens(target, step):
    prompt_len = len(target.problem.prompt_ids) + target.prefix_len
    scheduler = make_scheduler(num_slots=1)
    scheduler.submit(pending(target, step=step))
    (start,) = scheduler.admit().starts
    token_ids = []
    while len(token_ids) < start.max_new and EOS not in token_ids:
        token_ids.append(next_token(start, prompt_len + len(token_ids)))
    return tuple(token_ids)


SUBMISSIONS = st.tuples(
    st.integers(1, 3),  # step
    st.lists(st.tuples(st.integers(0, 3), st.integers(0, 2)), min_size=1, max_size=6),
)
ACTIONS = st.one_of(SUBMISSIONS, st.sampled_from(["step", "step", "release"]))


@settings(deadline=None, max_examples=200)
@given(st.lists(ACTIONS, max_size=12), st.integers(1, 5), st.integers(1, 4))
def test_every_request_finishes_once_with_the_tokens_it_gets_alone(
    actions, num_slots, num_contexts
):
    """The actions cause queueing, preemption, compaction, shared contexts, and released and resubmitted requests."""
    scheduler = make_scheduler(num_slots=num_slots, num_contexts=num_contexts)
    device = ListDevice(scheduler, num_contexts)
    step_of, completions, count = {}, [], 0
    for action in actions:
        if action == "step":
            completions += device.step() if scheduler.is_busy else []
        elif action == "release":
            partials = device.release()
            assert {c.finish_reason for c in partials} <= {FinishReason.UNFINISHED}
            lens = [len(c.token_ids) for c in partials]
            assert lens == sorted(lens, reverse=True)
            for partial in partials:
                step = step_of[key_of(partial.request)]
                scheduler.submit(pending(partial.request, step=step)._replace(partial=partial))
        else:
            step, targets = action
            for number, prefix_len in targets:
                target = request(number, count, prefix_len)
                count += 1
                step_of[key_of(target)] = step
                scheduler.submit(pending(target, step=step))
    while scheduler.is_busy:
        completions += device.step()
    assert sorted(key_of(c.request) for c in completions) == sorted(step_of)
    for c in completions:
        assert c.token_ids == expected_tokens(c.request, step_of[key_of(c.request)])
        assert c.finish_reason is not FinishReason.UNFINISHED
