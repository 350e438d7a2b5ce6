"""One training step, written for one device of a mapped axis: batch in, new state and metrics out.

A batch whose loss or gradient is not finite changes nothing but the number of the step.
"""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from effdet_jax.detection import assignment
from effdet_jax.model import EfficientDet
from effdet_jax.training import augment
from effdet_jax.training.freeze import frozen_batch_norm, stop_gradient
from effdet_jax.training.objective import Examples, Metrics, make_objective
from effdet_jax.training.optimizer import is_kernel, squared_norm
from effdet_jax.training.state import TrainState
from effdet_jax.training.update import branch, make_rates, make_update, skip

Batch = dict[str, jax.Array]  # image uint8 [B, H, W, 3], valid_size [B, 2], boxes [B, M, 4] yxyx, labels [B, M]


def make_train_step(
    config: Any,
    model: EfficientDet,
    optimizer: optax.GradientTransformationExtraArgs,
    schedule: Callable,
    anchors_N4: Any,
) -> Callable[[TrainState, Batch, bool], tuple[TrainState, Metrics]]:
    """`step(state, batch, frozen)`, to be mapped over `model.axis_name`. `frozen` is static: training/freeze.py."""
    axis, seed = model.axis_name, config.seed
    l2, match_threshold, ema_decay = config.loss.l2, config.loss.match_threshold, config.train.ema_decay
    augment_batch = augment.make_augment(config, axis)
    gradients_of, update = make_gradients(config, model, anchors_N4), make_update(optimizer, ema_decay)

    def train_step(state: TrainState, batch: Batch, frozen: bool = False) -> tuple[TrainState, Metrics]:
        augment_key, depth_key = jax.random.split(jax.random.fold_in(jax.random.key(seed), state.step))
        batch = augment_batch(augment_key, batch)
        targets = jax.vmap(assignment.assign, (None, 0, 0, None))(
            jnp.asarray(anchors_N4), batch['boxes'], batch['labels'], match_threshold
        )
        num_positives = _sum_over_devices(axis, targets.num_positives.sum())
        examples = Examples(batch['image'], batch['valid_size'], targets)
        normalizer = num_positives + 1  # an image without objects must not divide by zero
        gradients, batch_stats, metrics = gradients_of(state.variables, examples, normalizer, depth_key, frozen)
        # Each device has divided by the positives of all: the sum is the gradient of the whole batch.
        gradients, metrics = _sum_over_devices(axis, (gradients, metrics))

        metrics['l2_loss'] = l2 * 0.5 * squared_norm(_kernels(state.variables['params']))
        metrics['loss'] += metrics['l2_loss']
        metrics |= {
            'gradient_norm': jnp.sqrt(squared_norm(gradients)),
            'learning_rate': schedule(state.optimizer[-1].count),  # the optimizer's own count leaves out skipped steps
            'positives': num_positives,
        }
        # These are sums over all devices, so every device decides alike.
        finite = jnp.isfinite(metrics['loss']) & jnp.isfinite(metrics['gradient_norm'])
        metrics['skipped_steps'] = 1.0 - finite
        rates = make_rates(metrics['learning_rate'], state.step, ema_decay)
        return branch(finite, functools.partial(update, frozen), skip, state, gradients, batch_stats, rates), metrics

    return train_step


def make_gradients(config: Any, model: EfficientDet, anchors_N4: Any) -> Callable[..., tuple[Any, Any, Metrics]]:
    """`gradients_of(variables, examples, normalizer, key, frozen)` -> (gradients, batch statistics, metrics)."""
    objective = make_objective(config, model, anchors_N4)
    num_parts, freeze = config.train.gradient_accumulation_steps, config.train.freeze

    def gradients_of(
        variables: Any, examples: Examples, normalizer: jax.Array, key: jax.Array, frozen: bool
    ) -> tuple[Any, Any, Metrics]:
        params, pattern = variables['params'], freeze if frozen else ''

        def of_part(index: Any, part: Examples) -> tuple[Any, Any, Metrics]:
            def loss(params: Any) -> tuple[jax.Array, tuple[Any, Metrics]]:
                trained = stop_gradient(params, pattern)
                return objective(trained, variables['batch_stats'], part, normalizer, jax.random.fold_in(key, index))

            gradients, (batch_stats, metrics) = jax.grad(loss, has_aux=True)(params)
            return gradients, jax.tree.map(lambda x: x / num_parts, batch_stats), metrics

        with nn.intercept_methods(frozen_batch_norm(pattern)):
            return _sum_over_parts(num_parts, of_part, examples)

    return gradients_of


def _sum_over_devices(axis: str | None, tree: Any) -> Any:
    """One device alone adds nothing up: XLA would do so for every array of the tree."""
    return jax.lax.psum(tree, axis) if axis and jax.lax.axis_size(axis) > 1 else tree


def _sum_over_parts(num_parts: int, function: Callable, batch: Any) -> Any:
    """Gradient accumulation: the sum of `function(index, part)` over equal parts of the batch, one after the other."""
    if num_parts == 1:
        return function(0, batch)
    # Parts are strided: with several devices each part then holds the same samples as it would with one.
    parts = jax.tree.map(lambda x: x.reshape(x.shape[0] // num_parts, num_parts, *x.shape[1:]).swapaxes(0, 1), batch)
    zeros = jax.tree.map(jnp.zeros_like, jax.eval_shape(function, 0, jax.tree.map(lambda x: x[0], parts)))

    def add(total: Any, x: tuple[Any, Any]) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, function(*x)), None

    return jax.lax.scan(add, zeros, (jnp.arange(num_parts), parts))[0]


def _kernels(params: Any) -> list[jax.Array]:
    return [p for p, kernel in zip(jax.tree.leaves(params), jax.tree.leaves(is_kernel(params)), strict=True) if kernel]
