"""The check that a comparison begins with catches what it is there for."""

import jax
import numpy as np
import pytest

from trapo_jax.check_step import BrokenStep, check_step, compare_gradients
from trapo_jax.config import load_config

fori_loop = jax.lax.fori_loop


def short(method):
    return load_config(None, [("method.name", method), ("data.num_train", "8")])


def test_the_step_of_a_method_with_all_kinds_of_tokens_passes():
    assert 0 < check_step(short("trapo")) < 1e-5


def test_dropped_gradients_of_micro_batches_are_caught(monkeypatch):
    """The bug of published baselines: of several micro-batches only the last one's gradient is applied."""

    def last_alone(lower, upper, body, initial):
        if body.__name__ != "accumulate":
            return fori_loop(lower, upper, body, initial)
        return body(upper - 1, initial)

    monkeypatch.setattr(jax.lax, "fori_loop", last_alone)
    with pytest.raises(BrokenStep, match="sft: the gradient of a batch cut into micro-batches"):
        check_step(short("sft"))


def test_difference_is_a_share_of_the_gradient_s_norm():
    whole = {"a": np.array([3.0, 0.0]), "b": np.array([[4.0]])}
    close = {"a": np.array([3.0, 3e-4]), "b": np.array([[4.0 + 4e-4]])}
    assert compare_gradients(whole, close, "m") == pytest.approx(1e-4)
    half = jax.tree.map(lambda x: x / 2, whole)
    with pytest.raises(
        BrokenStep, match=r"m: .* differs from that of the whole by 0\.5 of its norm"
    ):
        compare_gradients(whole, half, "m")


def test_a_gradient_that_is_zero_or_not_a_number_proves_nothing():
    for value in (0.0, np.nan, np.inf):
        gradient = {"a": np.array([value])}
        with pytest.raises(BrokenStep, match="the gradient of the checked batch has norm"):
            compare_gradients(gradient, gradient, "m")
