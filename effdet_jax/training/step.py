"""One training step, written for one device of a mapped axis: batch in, new state and metrics out.

A batch whose loss or gradient is not finite changes nothing but the number of the step.
"""

import dataclasses
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax import traverse_util

from effdet_jax.detection import assignment
from effdet_jax.model import EfficientDet
from effdet_jax.model.batch_norm import BatchNorm
from effdet_jax.records.console import warn
from effdet_jax.runtime import devices, process, xla
from effdet_jax.training import augment
from effdet_jax.training.objective import Examples, Metrics, make_objective
from effdet_jax.training.optimizer import is_kernel, make_optimizer, path_matches, squared_norm
from effdet_jax.training.state import BATCH_STATS_DECAY, TrainState, Variables, averaging_weight, moving_average

Batch = dict[str, jax.Array]  # image uint8 [B, H, W, 3], valid_size [B, 2], boxes [B, M, 4] yxyx, labels [B, M]


class Rates(NamedTuple):
    """Numbers of a step that whole trees are scaled by.

    They come from outside of the branch that scales: XLA would compute a cosine anew in the loop of every array.
    """

    of_learning: jax.Array
    of_statistics: jax.Array  # weight of the new ones in the moving averages
    of_average: jax.Array


class MappedStep:
    """A training step on every device, for arrays with a leading axis of devices. It takes the state over.

    Compiled when it is first called, and once more where `frozen` changes; batches must be of one shape.
    """

    def __init__(self, step: Callable) -> None:
        self._mapped = devices.map_devices(step, donate=(0,), static=(2,))
        self._compiled: dict[bool, jax.stages.Compiled] = {}

    def __call__(self, state: TrainState, batch: Mapping[str, Any], frozen: bool) -> tuple[TrainState, Metrics]:
        if not xla.options(xla.TRAINING) or jax.process_count() > 1:
            return self._mapped(state, batch, frozen)  # of several hosts, a compiled program would want all arrays
        if frozen not in self._compiled:
            self._compiled[frozen] = compile_step(self.lower(state, batch, frozen))
            process.give_back_memory()
        return self._compiled[frozen](state, batch)

    def lower(self, state: TrainState, batch: Mapping[str, Any], frozen: bool) -> jax.stages.Lowered:
        """Arrays, or shapes of arrays."""
        return self._mapped.lower(state, batch, frozen)


def compile_step(lowered: jax.stages.Lowered, options: Mapping[str, Any] = MappingProxyType({})) -> jax.stages.Compiled:
    """With the options that are best for a training step on this platform, and with these."""
    options = {**xla.options(xla.TRAINING), **options}
    try:
        return lowered.compile(options or None)
    except jax.errors.JaxRuntimeError as error:
        if 'deterministic implementation' not in str(error):  # XLA's words for an operation that has none, on GPU
            raise
        warn('an operation of this network rounds otherwise in every run on this device: steps will not repeat exactly')
        return lowered.compile({name: value for name, value in options.items() if 'nondeterministic' not in name})


def map_train_step(
    config: Any, model: EfficientDet, anchors_N4: Any, steps_per_epoch: int, total_steps: int
) -> tuple[MappedStep, optax.GradientTransformation]:
    """(the step on every device, its optimiser)."""
    optimizer, schedule = make_optimizer(config, steps_per_epoch, total_steps)
    return MappedStep(make_train_step(config, model, optimizer, schedule, anchors_N4)), optimizer


def make_train_step(
    config: Any,
    model: EfficientDet,
    optimizer: optax.GradientTransformationExtraArgs,
    schedule: Callable,
    anchors_N4: Any,
) -> Callable[[TrainState, Batch, bool], tuple[TrainState, Metrics]]:
    """`step(state, batch, frozen)`, to be mapped over `model.axis_name`. Static `frozen`: whether the regex holds."""
    axis, seed = model.axis_name, config.seed
    augment_batch = augment.make_augment(config, axis)
    objective, learn = make_objective(config, model, anchors_N4), make_learn(optimizer, config.train.ema_decay)
    parts, freeze = config.train.accumulate, config.train.freeze
    l2, match_threshold, ema_decay = config.loss.l2, config.loss.match_threshold, config.train.ema_decay

    def train_step(state: TrainState, batch: Batch, frozen: bool = False) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        augment_key, depth_key = jax.random.split(key)
        batch = augment_batch(augment_key, batch)
        targets = jax.vmap(assignment.assign, (None, 0, 0, None))(
            jnp.asarray(anchors_N4), batch['boxes'], batch['labels'], match_threshold
        )
        num_positives = _sum_over(axis, targets.num_positives.sum())
        normalizer = num_positives + 1  # an image without objects must not divide by zero
        examples = Examples(batch['image'], batch['valid_size'], targets)

        params, batch_stats = state.variables['params'], state.variables['batch_stats']
        with nn.intercept_methods(_frozen_batch_norm(freeze if frozen else '')):

            def gradients_of(index: Any, part: Examples) -> tuple[Any, Any, Metrics]:
                def loss(params: Any) -> tuple[jax.Array, tuple[Any, Metrics]]:
                    # No gradient reaches what is frozen, so XLA drops that part of the backward pass.
                    kept = _stop_gradient(params, freeze) if frozen else params
                    return objective(kept, batch_stats, part, normalizer, jax.random.fold_in(depth_key, index))

                gradients, (part_stats, metrics) = jax.grad(loss, has_aux=True)(params)
                return gradients, jax.tree.map(lambda x: x / parts, part_stats), metrics

            gradients, new_stats, metrics = _sum_of_parts(parts, gradients_of, examples)
        # Each device has divided by the positives of all: the sum is the gradient of the whole batch.
        gradients, metrics = _sum_over(axis, (gradients, metrics))

        metrics['l2_loss'] = l2 * 0.5 * squared_norm(_kernels(params))
        metrics['loss'] += metrics['l2_loss']
        metrics |= {
            'gradient_norm': jnp.sqrt(squared_norm(gradients)),
            'learning_rate': schedule(state.optimizer[-1].count),  # the optimizer's own count skips what is skipped
            'positives': num_positives,
        }
        # Of all devices: these are sums over the axis, so every device decides alike.
        finite = jnp.isfinite(metrics['loss']) & jnp.isfinite(metrics['gradient_norm'])
        metrics['skipped_steps'] = 1.0 - finite
        rates = Rates(
            metrics['learning_rate'], averaging_weight(BATCH_STATS_DECAY, state.step),
            averaging_weight(ema_decay, state.step),
        )  # fmt: skip

        return either(finite, learn, skip, state, gradients, new_stats, rates), metrics

    return train_step


def make_learn(optimizer: optax.GradientTransformationExtraArgs, ema_decay: float) -> Callable[..., TrainState]:
    """`learn(state, gradients, new_stats, rates)`: what a step makes of the state; `new_stats` are the batch's."""

    def learn(state: TrainState, gradients: Any, new_stats: Any, rates: Rates) -> TrainState:
        params, batch_stats = state.variables['params'], state.variables['batch_stats']
        updates, optimizer_state = optimizer.update(gradients, state.optimizer, params, learning_rate=rates.of_learning)
        variables: Variables = {
            'params': optax.apply_updates(params, updates),
            'batch_stats': moving_average(batch_stats, new_stats, rates.of_statistics),
        }
        ema = moving_average(state.ema, variables, rates.of_average) if ema_decay else state.ema
        return TrainState(state.step + 1, variables, ema, optimizer_state)

    return learn


def skip(state: TrainState, *_: Any) -> TrainState:
    """In the place of `learn`, where there is nothing to learn from."""
    return dataclasses.replace(state, step=state.step + 1)


def either(condition: jax.Array, yes: Callable, no: Callable, *operands: Any) -> Any:
    """What one of two functions makes of the operands, the cheaper way on each platform (experiments/reliability).

    On CPU a branch: nothing is copied. Elsewhere a selection, because a branch would ask the host which way to go.
    """
    return (jax.lax.cond if jax.default_backend() == 'cpu' else select)(condition, yes, no, *operands)


def select(condition: jax.Array, yes: Callable, no: Callable, *operands: Any) -> Any:
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), yes(*operands), no(*operands))


def _sum_over(axis: str | None, tree: Any) -> Any:
    """Over the devices. Of one alone nothing is asked: XLA would do so for every array of the tree."""
    return jax.lax.psum(tree, axis) if axis and jax.lax.axis_size(axis) > 1 else tree


def _sum_of_parts(parts: int, function: Callable, batch: Any) -> Any:
    """The sum of `function(index, part)` over equal parts of the batch, one after the other."""
    if parts == 1:
        return function(0, batch)
    # Parts are strided: with several devices each part then holds the same samples as it would with one.
    sliced = jax.tree.map(lambda x: x.reshape(x.shape[0] // parts, parts, *x.shape[1:]).swapaxes(0, 1), batch)
    zeros = jax.tree.map(jnp.zeros_like, jax.eval_shape(function, 0, jax.tree.map(lambda x: x[0], sliced)))

    def add(total: Any, x: tuple[Any, Any]) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, function(*x)), None

    return jax.lax.scan(add, zeros, (jnp.arange(parts), sliced))[0]


def _frozen_batch_norm(pattern: str) -> Callable:
    """A Flax interceptor: batch norm whose path matches uses its stored statistics and leaves them alone."""

    def intercept(method: Callable, args: tuple, kwargs: dict, context: nn.module.InterceptorContext) -> Any:
        if isinstance(context.module, BatchNorm) and path_matches(pattern, context.module.path):
            args = (args[0], False)  # not in training
        return method(*args, **kwargs)

    return intercept


def _stop_gradient(params: Any, pattern: str) -> Any:
    return traverse_util.path_aware_map(
        lambda path, p: jax.lax.stop_gradient(p) if path_matches(pattern, path) else p, params
    )


def _kernels(params: Any) -> list[jax.Array]:
    return [p for p, kernel in zip(jax.tree.leaves(params), jax.tree.leaves(is_kernel(params)), strict=True) if kernel]
