"""Tests the scores of samples against values computed by hand."""

import pytest

from trapo_jax.evaluation.results import table_of
from trapo_jax.evaluation.scoring import (
    Sample,
    mean_of_sources,
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
    # pass@k of problem a is 1 - C(2, k) / C(4, k); of problem b, 1 - C(3, k) / C(4, k).
    assert scores.pass_at_k == pytest.approx((3 / 8, (5 / 6 + 1 / 2) / 2, (1 + 3 / 4) / 2, 1))
    assert scores.majority == 0.5
    assert (scores.error_rate, scores.timeout_rate, scores.truncated) == (1 / 8, 1 / 8, 1 / 8)
    assert scores.completion_len_mean == 11


def test_a_tied_majority_scores_the_fraction_of_tied_answers_that_are_correct():
    samples = group("a", RIGHT, WRONG, WRONG, RIGHT, answers=["1", "2", "2", "1"])
    assert score_samples(samples).majority == 0.5


def test_an_answer_is_correct_if_any_sample_with_that_answer_is_correct():
    verdicts, answers = [RIGHT, RIGHT, TIMEOUT, WRONG], ["7", "7", "7", "8"]
    assert score_samples(group("a", *verdicts, answers=answers)).majority == 1
    assert score_samples(group("a", *verdicts[::-1], answers=answers[::-1])).majority == 1


def test_without_answers_the_majority_is_wrong():
    assert score_samples(group("a", WRONG, WRONG)).majority == 0


def test_the_no_answer_rate_is_a_share_of_the_judged_samples():
    right, wrong, error, silent = group("a", RIGHT, WRONG, ERROR, WRONG)
    judged = [right._replace(found_answer=True), wrong._replace(found_answer=True), error]
    assert score_samples([*judged, silent._replace(found_answer=False)]).no_answer == 1 / 3


def test_the_no_answer_rate_is_unknown_if_the_reward_function_does_not_look_for_answers():
    scores = score_samples(group("a", RIGHT, WRONG))
    assert scores.no_answer is None
    header, _ = table_of(scores, {"s": scores})
    assert "no answer" not in header


def test_the_table_shows_missing_answers_and_grader_errors_separately():
    samples = [sample._replace(found_answer=False) for sample in group("a", WRONG, ERROR)]
    scores = score_samples(samples)
    header, (row,) = table_of(scores, {"s": scores})
    shown = dict(zip(header, row, strict=True))
    assert (shown["no answer"], shown["grader errors"], shown["truncated"]) == ("1.000", "0.500", "0.000")  # fmt: skip


def test_sources_are_scored_separately():
    samples = [*group("a", RIGHT, source="x"), *group("b", WRONG, source="y")]
    scores = scores_by_source(samples)
    assert {name: s.accuracy for name, s in scores.items()} == {"x": 1.0, "y": 0.0}
    assert list(scores_by_source([*samples, *group("c", RIGHT, source="")])) == [
        "no_source",
        "x",
        "y",
    ]


def test_every_problem_has_the_same_weight_whatever_its_number_of_samples():
    scores = score_samples([*group("a", RIGHT), *group("b", RIGHT, WRONG, WRONG, WRONG)])
    assert scores.accuracy == (1 + 1 / 4) / 2
    assert (scores.num_samples, scores.pass_at_k) == (1, ((1 + 1 / 4) / 2,))


def test_without_samples_there_are_no_scores():
    with pytest.raises(ValueError, match="no samples"):
        score_samples([])


def benchmarks(num_samples=2):
    """Returns samples of two sources: `large`, with 1 of 4 problems solved, and `small`, with 1 of 1 problem solved."""
    large = [group(f"l{i}", RIGHT if i == 0 else WRONG, source="large") for i in range(4)]
    small = group("s", *[RIGHT] * num_samples, source="small")
    return [*small, *(sample for samples in large for sample in samples)]


def test_the_mean_of_sources_does_not_pool_their_problems():
    by_source = scores_by_source(benchmarks())
    assert {name: s.num_samples for name, s in by_source.items()} == {"large": 1, "small": 2}
    mean = mean_of_sources(by_source)
    assert mean.accuracy == (1 / 4 + 1) / 2
    assert score_samples(benchmarks()).accuracy == (1 + 1) / 5
    assert (mean.num_problems, mean.num_samples) == (5, 1)
    assert mean.pass_at_k == ((1 / 4 + 1) / 2,)
    low, high = mean.interval
    assert 0 < low < mean.accuracy < high <= 1


def test_the_mean_of_one_source_is_its_score():
    samples = group("a", RIGHT, WRONG)
    mean, score = mean_of_sources(scores_by_source(samples)), score_samples(samples)
    assert mean.accuracy == score.accuracy
    assert mean.interval == pytest.approx(score.interval)


def test_the_table_has_avg_at_k_of_each_source_and_their_mean():
    samples = benchmarks(num_samples=32)
    header, rows = table_of(score_samples(samples), scores_by_source(samples))
    table = {row[0]: dict(zip(header, row, strict=True)) for row in rows}
    assert list(table) == ["large", "small", "mean", "all"]
    assert [row["k"] for row in table.values()] == ["1", "32", "", ""]
    assert [row["avg@k"] for row in table.values()] == ["0.250", "1.000", "0.625", "0.400"]
    assert [row["pass@k"] for row in table.values()] == ["0.250", "1.000", "", ""]


def test_the_table_header_states_the_number_of_samples_if_it_is_the_same_for_all_sources():
    samples = [*group("a", RIGHT, WRONG, source="x"), *group("b", RIGHT, RIGHT, source="y")]
    header, rows = table_of(score_samples(samples), scores_by_source(samples))
    assert header[2:6] == ["avg@2", "95% CI", "pass@2", "maj@2"]
    assert [row[2] for row in rows] == ["0.500", "1.000", "0.750", "0.750"]
    header, rows = table_of(score_samples(samples[:2]), scores_by_source(samples[:2]))
    assert [row[0] for row in rows] == ["all"]


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
