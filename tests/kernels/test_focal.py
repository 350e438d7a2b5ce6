import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effdet_jax.detection.losses import focal_loss


@pytest.mark.parametrize(('gamma', 'smoothing'), [(1.5, 0.0), (2.0, 0.1), (0.0, 0.2)])
def test_values_and_gradients_are_those_of_the_definition(gamma, smoothing):
    rng = np.random.default_rng(0)
    logits, weights = jnp.asarray(rng.normal(0, 3, (2, 50, 3)), jnp.float32)
    classes = jnp.asarray(rng.integers(-1, 3, 50))

    def value_and_gradient(function):
        value, pullback = jax.vjp(lambda x: function(x, classes, gamma=gamma, label_smoothing=smoothing), logits)
        return value, *pullback(weights)

    for ours, definition in zip(
        value_and_gradient(focal_loss), value_and_gradient(focal_loss.__wrapped__), strict=True
    ):
        np.testing.assert_allclose(ours, definition, rtol=1e-4, atol=1e-6)


def test_the_loss_and_its_gradient_are_finite_at_extreme_logits():
    logits = jnp.asarray([[60.0, -60.0], [-60.0, 60.0], [1e4, -1e4], [-1e4, 1e4], [0.0, 0.0]])

    def total(logits, label, smoothing):
        return focal_loss(logits, jnp.full(len(logits), label), label_smoothing=smoothing).sum()

    for smoothing in (0.0, 0.1):
        for label in (-1, 0, 1):
            loss, gradient = jax.value_and_grad(total)(logits, label, smoothing)
            assert np.isfinite(loss) and np.isfinite(gradient).all()
    # Sure and wrong: the loss of a background row is 0.75 x, its slope 0.75.
    loss, slope = jax.value_and_grad(total)(jnp.asarray([[60.0]]), -1, 0.0)
    np.testing.assert_allclose((loss, slope.item()), (45, 0.75), rtol=1e-6)
