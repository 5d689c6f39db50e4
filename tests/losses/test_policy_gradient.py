"""Tests policy-gradient losses against their published formulas, implemented in float64 NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from trapo_jax.losses import (
    cispo_loss,
    policy_gradient_loss,
    sequence_mean,
    sequence_policy_gradient_loss,
    shaped_policy_gradient_loss,
)

B, T, V = 4, 9, 7
CLIPS = {
    "no_clip": (None, None),
    "ppo": (0.2, 0.2),
    "clip_higher": (0.2, 0.28),
    "only_low": (0.2, None),
    "only_high": (None, 0.28),
}


@pytest.fixture(params=CLIPS)
def clips(request):
    low, high = CLIPS[request.param]
    return {"clip_low": low, "clip_high": high}


def bounds(clip_low=None, clip_high=None):
    return (-np.inf if clip_low is None else 1 - clip_low), (
        np.inf if clip_high is None else 1 + clip_high
    )


class Batch:
    """Random logits, labels, old log-probabilities, and advantages, with ratios above and below 1."""

    def __init__(self, spread):
        rng = np.random.default_rng(0)
        self.logits = rng.normal(size=(B, T, V)).astype(np.float32)
        self.labels = rng.integers(0, V, (B, T))
        self.advantages = rng.choice([-1.5, -0.25, 0.5, 2.0], (B, 1)).astype(np.float32)
        z = self.logits.astype(np.float64)
        self.probs = np.exp(z) / np.exp(z).sum(-1, keepdims=True)
        p_label = np.take_along_axis(self.probs, self.labels[..., None], -1)[..., 0]
        self.logprobs = np.log(p_label)
        # The values are rounded to float32, so that both implementations use the same old policy.
        noise = rng.normal(size=(B, T)) * spread
        self.old_logprobs = (self.logprobs + noise).astype(np.float32)
        self.onehot_minus_p = np.eye(V)[self.labels] - self.probs

    @property
    def ratio(self):
        return np.exp(self.logprobs - self.old_logprobs.astype(np.float64))

    def grad_by_logits(self, loss, *arguments, **options):
        """Returns d sum(loss) / d logits and the loss values."""

        def total(logits):
            logprobs = jax.nn.log_softmax(logits)
            picked = jnp.take_along_axis(logprobs, self.labels[..., None], -1)[..., 0]
            values = loss(picked, *arguments, **options)
            return values.sum(), values

        gradient, values = jax.grad(total, has_aux=True)(jnp.asarray(self.logits))
        return gradient, values

    def assert_gradient(self, gradient, by_logprob):
        expected = by_logprob[..., None] * self.onehot_minus_p
        np.testing.assert_allclose(
            gradient, expected, rtol=1e-6, atol=1e-6 * np.abs(expected).max()
        )


def active(ratio, advantages, low, high):
    """Returns a mask of the tokens at which min(A rho, A clip(rho)) equals A rho, so that the gradient flows."""
    return np.where(advantages >= 0, ratio <= high, ratio >= low)


# One ratio per token


@pytest.mark.parametrize(
    ("ratio", "advantage", "clip_low", "clip_high", "expected"),
    [
        (1.5, 1.0, None, None, -1.5),  # -A rho
        (1.5, -2.0, None, None, 3.0),
        (1.5, 1.0, 0.2, 0.2, -1.2),  # gains beyond 1.2 are clipped
        (1.5, -1.0, 0.2, 0.2, 1.5),  # losses beyond 1.2 are not clipped
        (0.5, 1.0, 0.2, 0.2, -0.5),
        (0.5, -1.0, 0.2, 0.2, 0.8),
        (1.25, 1.0, 0.2, 0.28, -1.25),  # clip-higher has a larger upper bound
        (1.5, 1.0, 0.2, 0.28, -1.28),
        (1.5, 1.0, 0.2, None, -1.5),  # no upper bound
        (0.5, -1.0, 0.2, None, 0.8),
        (1.5, 1.0, None, 0.2, -1.2),
        (0.5, -1.0, None, 0.2, 0.5),
        (1e-9, -1.0, None, 0.2, 1e-9),  # None disables the lower bound
        (0.5, 1.0, 0.0, 0.0, -0.5),
        (1.5, 1.0, 0.0, 0.0, -1.0),
    ],
)
def test_policy_gradient_values_by_hand(ratio, advantage, clip_low, clip_high, expected):
    loss = policy_gradient_loss(
        jnp.log(jnp.array([0.3 * ratio])),
        jnp.log(jnp.array([0.3])),
        advantage,
        clip_low=clip_low,
        clip_high=clip_high,
    )
    np.testing.assert_allclose(loss, [expected], rtol=1e-5)


def test_policy_gradient_with_respect_to_logits_equals_the_formula(clips):
    """The gradient is -A rho (onehot - p) where the unclipped argument is the minimum, and 0 otherwise."""
    batch = Batch(spread=0.4)
    gradient, values = batch.grad_by_logits(
        policy_gradient_loss, batch.old_logprobs, batch.advantages, **clips
    )
    low, high = bounds(**clips)
    clipped = np.clip(batch.ratio, low, high)
    expected = -np.minimum(batch.advantages * batch.ratio, batch.advantages * clipped)
    np.testing.assert_allclose(values, expected, rtol=2e-6)
    flows = active(batch.ratio, batch.advantages, low, high)
    if clips != {"clip_low": None, "clip_high": None}:
        assert flows.any()
        assert not flows.all()
    batch.assert_gradient(gradient, -batch.advantages * batch.ratio * flows)


def test_the_first_update_equals_reinforce():
    """With old_logprobs = stop_gradient(logprobs), the value is -A and the gradient is -A grad log p."""
    logprobs = jnp.log(jnp.array([0.2, 0.7]))
    loss = lambda x: policy_gradient_loss(x, jax.lax.stop_gradient(x), jnp.array([2.0, -1.0]))
    np.testing.assert_allclose(loss(logprobs), [-2, 1])
    np.testing.assert_allclose(jax.grad(lambda x: loss(x).sum())(logprobs), [-2, 1])


# One ratio per sequence


@pytest.mark.parametrize(
    ("clip_low", "clip_high", "expected"),
    [
        (None, None, [-2.0, -2.0, 0.0]),
        (0.2, 0.2, [-1.2, -1.2, 0.0]),
        (0.2, None, [-2.0, -2.0, 0.0]),
    ],
)
def test_the_sequence_ratio_is_the_geometric_mean_of_token_ratios(clip_low, clip_high, expected):
    """Two tokens have ratios 4 and 1; the third is masked and does not contribute."""
    loss = sequence_policy_gradient_loss(
        jnp.log(jnp.array([[0.8, 0.5, 0.9]])),
        jnp.log(jnp.array([[0.2, 0.5, 0.1]])),
        jnp.array([[1.0]]),
        clip_low=clip_low,
        clip_high=clip_high,
        where=jnp.array([[True, True, False]]),
    )
    np.testing.assert_allclose(loss, [expected], rtol=1e-6)


def test_sequence_policy_gradient_with_respect_to_logits_equals_the_formula(clips):
    """The derivative with respect to a log-probability is -A s where the unclipped argument is the minimum, else 0."""
    batch = Batch(spread=1.2)
    where = np.arange(T) < np.array([[9], [5], [1], [7]])
    loss = lambda *args, **options: sequence_policy_gradient_loss(*args, where=where, **options)
    gradient, values = batch.grad_by_logits(loss, batch.old_logprobs, batch.advantages, **clips)
    low, high = bounds(**clips)
    lengths = where.sum(-1, keepdims=True)
    log_ratio = batch.logprobs - batch.old_logprobs.astype(np.float64)
    ratio = np.exp((log_ratio * where).sum(-1, keepdims=True) / lengths)
    advantages = batch.advantages
    expected = -np.minimum(advantages * ratio, advantages * np.clip(ratio, low, high)) * where
    np.testing.assert_allclose(values, expected, rtol=2e-6)
    # Each of the |y| tokens has the same loss, whose derivative with respect to each log-probability is -A s / |y|. The
    # derivative of the sum of these losses is -A s.
    flows = active(ratio, advantages, low, high) & where
    batch.assert_gradient(gradient, -advantages * ratio * flows)
    np.testing.assert_allclose(sequence_mean(values, where=where), expected[:, 0].mean(), rtol=1e-5)


@pytest.mark.parametrize("axis", [0, -2, 1, -1])
def test_sequence_axis(axis):
    batch = Batch(spread=0.5)
    rows = jnp.float32(batch.logprobs), batch.old_logprobs
    where = np.arange(T) < np.array([[9], [5], [1], [7]])
    expected = sequence_policy_gradient_loss(*rows, batch.advantages, where=where)
    if axis in (0, -2):
        moved = [np.swapaxes(x, 0, 1) for x in (*rows, batch.advantages, where)]
        got = sequence_policy_gradient_loss(*moved[:3], where=moved[3], axis=axis)
        got = got.swapaxes(0, 1)
    else:
        got = sequence_policy_gradient_loss(*rows, batch.advantages, where=where, axis=axis)
    np.testing.assert_allclose(got, expected, rtol=1e-6)


def test_sequence_without_mask_counts_every_token():
    loss = sequence_policy_gradient_loss(
        jnp.log(jnp.array([0.8, 0.5])), jnp.log(jnp.array([0.2, 0.5])), -1.0
    )
    np.testing.assert_allclose(loss, [2.0, 2.0], rtol=1e-6)


def test_the_loss_of_a_sequence_without_tokens_is_zero():
    empty = np.zeros((1, 3), bool)
    function = lambda x: sequence_policy_gradient_loss(x, x - 1, 1.0, where=empty).sum()
    value, gradient = jax.value_and_grad(function)(jnp.full((1, 3), -1.0))
    assert value == 0
    np.testing.assert_array_equal(gradient, 0)


def test_sequence_where_of_lower_rank_broadcasts():
    batch = Batch(spread=0.5)
    where = np.arange(T) < 5
    arguments = jnp.float32(batch.logprobs), batch.old_logprobs, batch.advantages
    np.testing.assert_array_equal(
        sequence_policy_gradient_loss(*arguments, where=where),
        sequence_policy_gradient_loss(*arguments, where=np.broadcast_to(where, (B, T))),
    )


# CISPO


def test_cispo_values_by_hand():
    """The values are -clip(rho) A log p with rho = 2, 0.5, and 1.1."""
    p = jnp.array([0.6, 0.1, 0.55])
    loss = cispo_loss(
        jnp.log(p),
        jnp.log(jnp.array([0.3, 0.2, 0.5])),
        jnp.array([1.0, 2.0, -1.0]),
        clip_low=0.3,
        clip_high=0.2,
    )
    expected = [-1.2 * np.log(0.6), -0.7 * 2 * np.log(0.1), 1.1 * np.log(0.55)]
    np.testing.assert_allclose(loss, expected, rtol=1e-6)


def test_cispo_gradient_with_respect_to_logits_equals_the_formula(clips):
    """The gradient is -clip(rho) A (onehot - p), even at tokens with a clipped ratio."""
    batch = Batch(spread=0.4)
    gradient, values = batch.grad_by_logits(
        cispo_loss, batch.old_logprobs, batch.advantages, **clips
    )
    weight = np.clip(batch.ratio, *bounds(**clips)) * batch.advantages
    np.testing.assert_allclose(values, -weight * batch.logprobs, rtol=2e-6)
    batch.assert_gradient(gradient, -weight)


def test_cispo_at_probability_zero():
    """The loss is 0 if the weight or the advantage is 0, and infinite otherwise."""
    never, old = jnp.array([-jnp.inf] * 3), jnp.full(3, -1.0)
    loss = lambda x, **clips: cispo_loss(x, old, jnp.array([1.0, -1.0, 0.0]), **clips)
    np.testing.assert_array_equal(loss(never, clip_low=0.2), [np.inf, -np.inf, 0])
    np.testing.assert_array_equal(loss(never), 0)
    gradient = jax.grad(lambda x: loss(x).sum())(never)
    np.testing.assert_array_equal(gradient, 0)


# LUFFY's policy shaping


def test_shaped_values_by_hand():
    loss = shaped_policy_gradient_loss(
        jnp.log(jnp.array([0.4, 0.1, 1.0])), jnp.array([1.0, -2.0, 1.0]), gamma=0.1
    )
    np.testing.assert_allclose(loss, [-0.8, 1.0, -1 / 1.1], rtol=1e-6)


def test_shaped_gamma_is_a_tenth_by_default():
    np.testing.assert_allclose(
        shaped_policy_gradient_loss(jnp.log(jnp.array([0.1])), 1.0), [-0.5], rtol=1e-6
    )


def test_shaped_gradient_with_respect_to_logits_equals_the_formula():
    """The gradient is -A gamma p (onehot - p) / (p + gamma)^2."""
    batch = Batch(spread=0.0)
    gradient, values = batch.grad_by_logits(
        shaped_policy_gradient_loss, batch.advantages, gamma=0.25
    )
    p = np.exp(batch.logprobs)
    np.testing.assert_allclose(values, -batch.advantages * p / (p + 0.25), rtol=2e-6)
    batch.assert_gradient(gradient, -batch.advantages * 0.25 * p / (p + 0.25) ** 2)


def test_shaped_at_probability_zero():
    value, gradient = jax.value_and_grad(lambda x: shaped_policy_gradient_loss(x, 1.0))(-jnp.inf)
    assert value == 0
    assert gradient == 0


@pytest.mark.parametrize("gamma", [0.0, -0.1, float("nan")])
def test_gamma_is_checked(gamma):
    with pytest.raises(ValueError, match=f"gamma must be > 0, got {gamma}"):
        shaped_policy_gradient_loss(jnp.zeros(1), 1.0, gamma=gamma)


def test_gamma_may_be_traced():
    function = lambda gamma: shaped_policy_gradient_loss(jnp.array([-1.0]), 1.0, gamma=gamma)
    np.testing.assert_allclose(jax.jit(function)(0.3), function(0.3), rtol=1e-6)


# All losses

# Every loss as a function (logprobs, old_logprobs, advantages, where) -> values.
LOSSES = {
    "policy_gradient": lambda x, old, a, where: policy_gradient_loss(x, old, a, where=where),
    "ppo": lambda x, old, a, where: policy_gradient_loss(
        x, old, a, clip_low=0.2, clip_high=0.2, where=where
    ),
    "gspo": lambda x, old, a, where: sequence_policy_gradient_loss(
        x, old, a, clip_low=0.2, clip_high=0.2, where=where
    ),
    "cispo": lambda x, old, a, where: cispo_loss(
        x, old, a, clip_low=0.2, clip_high=0.2, where=where
    ),
    "shaped": lambda x, _, a, where: shaped_policy_gradient_loss(x, a, where=where),
}


@pytest.fixture(params=LOSSES)
def loss(request):
    return LOSSES[request.param]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["policy_gradient", "ppo", "gspo", "shaped"])
def test_gradients_match_finite_differences(name):
    """CISPO is excluded because its gradient treats the clipped ratio as a constant."""
    logprobs = jnp.array([[-0.5, -1.0, -2.0], [-0.1, -3.0, -0.7]])
    old = logprobs + jnp.array([[0.05, -0.4, 0.6], [0.3, 0.02, -0.5]])
    advantages = jnp.array([[1.0], [-0.5]])
    check_grads(lambda x: LOSSES[name](x, old, advantages, None), (logprobs,), order=2, rtol=2e-2)


def test_no_gradient_flows_into_old_logprobs_and_advantages(loss):
    logprobs, old = jnp.array([[-0.5, -1.0]]), jnp.array([[-0.6, -0.9]])
    total = lambda old, advantages: loss(logprobs, old, advantages, None).sum()
    gradients = jax.grad(total, argnums=(0, 1))(old, jnp.array([[1.0]]))
    for gradient in gradients:
        np.testing.assert_array_equal(gradient, 0)


@pytest.mark.parametrize("garbage", [np.nan, np.inf, -np.inf, 3e38])
def test_masked_elements_may_have_any_value(loss, garbage):
    batch = Batch(spread=0.3)
    where = np.arange(T) < np.array([[9], [5], [0], [7]])
    advantages = np.broadcast_to(batch.advantages, (B, T))
    clean = [np.where(where, x, 0) for x in (batch.logprobs, batch.old_logprobs, advantages)]
    dirty = [np.where(where, x, garbage).astype(np.float32) for x in clean]

    def total(logprobs, old, advantages):
        values = loss(logprobs, old, advantages, where)
        return values.sum(), values

    gradient, values = jax.grad(total, has_aux=True)(*map(jnp.asarray, dirty))
    expected = jax.grad(total, has_aux=True)(*map(jnp.float32, clean))
    np.testing.assert_array_equal(gradient, expected[0])
    np.testing.assert_array_equal(values, expected[1])
    for got in (gradient, values):
        np.testing.assert_array_equal(got[~where], 0)
        assert np.isfinite(got).all()
        assert (got[where] != 0).any()


@pytest.mark.parametrize("advantage", [0.0, 3.0, -3.0])
def test_finite_inputs_give_a_finite_value_and_gradient(loss, advantage):
    """Without limits, a log-ratio of 119 and an advantage of 0 would give inf * 0 = NaN."""
    logprobs, old = np.meshgrid([-1e4, -119.0, -21.0, -1.0, 0.0], [-1e4, -119.0, -21.0, -1.0, 0.0])
    total = lambda x: loss(x, jnp.float32(old), advantage, None).sum()
    value, gradient = jax.value_and_grad(total)(jnp.float32(logprobs))
    assert np.isfinite(value)
    assert np.isfinite(gradient).all()
    assert np.isfinite(np.linalg.norm(gradient))


def test_masking_a_token_equals_deleting_it(loss):
    batch = Batch(spread=0.3)
    where = np.array([True, False, True, True, False, False, True, True, True])
    for row in range(B):
        arguments = jnp.float32(batch.logprobs[row]), batch.old_logprobs[row]
        advantage = batch.advantages[row, 0]
        masked = loss(*arguments, advantage, where)
        deleted = loss(*(x[where] for x in arguments), advantage, None)
        np.testing.assert_allclose(masked[where], deleted, rtol=1e-6)


def test_jit_vmap_and_bfloat16(loss):
    batch = Batch(spread=0.3)
    where = np.arange(T) < np.array([[9], [5], [3], [7]])
    arguments = [
        jnp.asarray(x, jnp.bfloat16) for x in (batch.logprobs, batch.old_logprobs, batch.advantages)
    ]
    expected = loss(*(x.astype(jnp.float32) for x in arguments), where)
    assert expected.dtype == jnp.float32
    got = loss(*arguments, where)
    assert got.dtype == jnp.float32
    np.testing.assert_array_equal(got, expected)
    np.testing.assert_allclose(jax.jit(loss)(*arguments, where), expected, rtol=1e-6)
    np.testing.assert_allclose(jax.vmap(loss)(*arguments, where), expected, rtol=1e-6)


@pytest.mark.parametrize("name", ["clip_low", "clip_high"])
@pytest.mark.parametrize(
    "function", [policy_gradient_loss, sequence_policy_gradient_loss, cispo_loss]
)
def test_the_error_for_a_negative_clip_bound_names_it(function, name):
    with pytest.raises(ValueError, match=f"{name} must be >= 0, got -0.2"):
        function(jnp.zeros(1), jnp.zeros(1), 1.0, **{name: -0.2})


def test_clip_bounds_may_be_traced():
    function = lambda clip: policy_gradient_loss(
        jnp.array([0.0]), jnp.array([-1.0]), 1.0, clip_low=clip, clip_high=clip
    )
    np.testing.assert_allclose(jax.jit(function)(0.2), function(0.2), rtol=1e-6)
