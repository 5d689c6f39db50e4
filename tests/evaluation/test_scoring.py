"""Scores of samples, compared with hand-computed values."""

import pytest

from trapo_jax.evaluation.scoring import (
    Sample,
    problem_columns,
    score_samples,
    scores_by_source,
    shares_noise,
)

RIGHT, WRONG, ERROR, TIMEOUT = (True, ""), (False, ""), (False, "ValueError"), (False, "timeout")


def group(problem_id, *verdicts, answers=None, source="s"):
    answers = answers or [None] * len(verdicts)
    return [
        Sample(problem_id, source, *verdict, False, 10, answer)
        for verdict, answer in zip(verdicts, answers, strict=True)
    ]


def test_scores_equal_hand_computed_values():
    samples = [
        *group("a", RIGHT, RIGHT, WRONG, ERROR, answers=["1", "1", "2", None]),
        *group("b", WRONG, WRONG, RIGHT, TIMEOUT, answers=["3", "3", "4", None]),
    ]
    samples[0] = samples[0]._replace(truncated=True, completion_len=18)
    scores = score_samples(samples)
    assert (scores.num_problems, scores.num_samples) == (2, 4)
    assert scores.accuracy == 3 / 8
    # a: 1 - C(2, k) / C(4, k); b: 1 - C(3, k) / C(4, k)
    assert scores.pass_at_k == pytest.approx((3 / 8, (5 / 6 + 1 / 2) / 2, (1 + 3 / 4) / 2, 1))
    assert scores.majority == 0.5
    assert (scores.error_rate, scores.timeout_rate, scores.truncated) == (1 / 8, 1 / 8, 1 / 8)
    assert scores.completion_len_mean == 11


def test_a_tie_counts_as_the_fraction_of_correct_answers():
    samples = group("a", RIGHT, WRONG, WRONG, RIGHT, answers=["1", "2", "2", "1"])
    assert score_samples(samples).majority == 0.5


def test_an_answer_is_correct_if_any_sample_with_it_is():
    verdicts, answers = [RIGHT, RIGHT, TIMEOUT, WRONG], ["7", "7", "7", "8"]
    assert score_samples(group("a", *verdicts, answers=answers)).majority == 1
    assert score_samples(group("a", *verdicts[::-1], answers=answers[::-1])).majority == 1


def test_without_answers_the_majority_is_wrong():
    assert score_samples(group("a", WRONG, WRONG)).majority == 0


def test_sources_are_scored_separately():
    samples = [*group("a", RIGHT, source="x"), *group("b", WRONG, source="y")]
    scores = scores_by_source(samples)
    assert {name: s.accuracy for name, s in scores.items()} == {"x": 1.0, "y": 0.0}
    assert list(scores_by_source([*samples, *group("c", RIGHT, source="")])) == [
        "no_source",
        "x",
        "y",
    ]


def test_different_numbers_of_samples_are_refused():
    with pytest.raises(ValueError, match=r"problems with \[1, 2\] samples each"):
        score_samples([*group("a", RIGHT), *group("b", RIGHT, WRONG)])


def test_shared_noise_is_distinguished_from_coincidence():
    short = ((1, 2), -1.0)
    long = (tuple(range(30)), -45.0)
    other = (tuple(range(30)), -45.0)
    assert not shares_noise([short, short, long])
    assert shares_noise([short, long, other])


def test_columns_are_in_the_order_of_problem_ids():
    greedy = [*group("b", RIGHT, source="y"), *group("a", ERROR, source="x")]
    sampled = [*group("b", RIGHT, WRONG), *group("a", RIGHT, RIGHT)]
    sampled[0] = sampled[0]._replace(completion_len=13)
    assert problem_columns(greedy, sampled) == {
        "id": ["a", "b"],
        "source": ["x", "y"],
        "greedy": [0, 1],
        "correct": [2, 1],
        "len": [10, 11.5],
    }
