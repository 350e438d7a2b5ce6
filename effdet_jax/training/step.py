"""One training step, written for one device of a mapped axis: batch in, new state and metrics out.

A batch whose loss or gradient is not finite changes nothing but the number of the step.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax import traverse_util

from effdet_jax.detection import assignment
from effdet_jax.model import EfficientDet
from effdet_jax.model.batch_norm import BatchNorm
from effdet_jax.training import augment, parallel
from effdet_jax.training.objective import Examples, Metrics, make_objective
from effdet_jax.training.optimizer import is_kernel, make_optimizer, path_matches
from effdet_jax.training.state import BATCH_STATS_DECAY, TrainState, Variables, moving_average

Batch = dict[str, jax.Array]  # image uint8 [B, H, W, 3], valid_size [B, 2], boxes [B, M, 4] yxyx, labels [B, M]


# On CPU. XLA's older way of making loops of what it fuses: compiling takes half as long again, and a step of D0 0.84 of
# the time (experiments/benchmarks). Inference gains nothing.
CPU_OPTIONS = {'xla_cpu_use_fusion_emitters': False}


class MappedStep:
    """A training step on every device, for arrays with a leading axis of devices. It takes the state over.

    Compiled when it is first called, and once more where `frozen` changes; batches must be of one shape.
    """

    def __init__(self, step: Callable) -> None:
        self._mapped = parallel.map_devices(step, donate=(0,), static=(2,))
        self._programs: dict[bool, Callable] = {}

    def __call__(self, state: TrainState, batch: Mapping[str, Any], frozen: bool) -> tuple[TrainState, Metrics]:
        if not _options() or jax.process_count() > 1:  # then a compiled program would ask for the arrays of all hosts
            return self._mapped(state, batch, frozen)
        if frozen not in self._programs:
            self._programs[frozen] = compile_step(self.lower(state, batch, frozen))
        return self._programs[frozen](state, batch)

    def lower(self, state: TrainState, batch: Mapping[str, Any], frozen: bool) -> jax.stages.Lowered:
        """Arrays, or shapes of arrays."""
        return self._mapped.lower(state, batch, frozen)


def compile_step(lowered: jax.stages.Lowered, options: dict[str, Any] | None = None) -> jax.stages.Compiled:
    """With the options that are best for a training step on this platform, and with these."""
    ours = _options()
    try:
        return lowered.compile(ours | (options or {}) or None)
    except jax.errors.JaxRuntimeError as error:
        if not any(name in str(error) for name in ours):
            raise
        return lowered.compile(options)  # another version of XLA, which has no such option


def _options() -> dict[str, Any]:
    return CPU_OPTIONS if jax.default_backend() == 'cpu' else {}


def map_train_step(
    config: Any, model: EfficientDet, anchors_N4: Any, steps_per_epoch: int, total_steps: int
) -> tuple[MappedStep, optax.GradientTransformation]:
    """(the step on every device, its optimiser).

    Raises:
      UserError: as `make_optimizer` and `make_train_step`.
    """
    optimizer, schedule = make_optimizer(config, steps_per_epoch, total_steps)
    return MappedStep(make_train_step(config, model, optimizer, schedule, anchors_N4)), optimizer


def make_train_step(
    config: Any,
    model: EfficientDet,
    optimizer: optax.GradientTransformation,
    schedule: Callable,
    anchors_N4: Any,
) -> Callable[[TrainState, Batch, bool], tuple[TrainState, Metrics]]:
    """`step(state, batch, frozen)`, to be mapped over `model.axis_name`. `frozen` is static: whether the regex holds.

    Raises:
      UserError: where the config's values do not go together.
    """
    axis, seed = model.axis_name, config.seed
    augment_batch = augment.make_augment(config, axis)
    objective = make_objective(config, model, anchors_N4)
    parts, freeze, ema_decay = config.train.accumulate, config.train.freeze, config.train.ema_decay
    l2, match_threshold = config.loss.l2, config.loss.match_threshold

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

        updates, optimizer_state = optimizer.update(gradients, state.optimizer, params)
        batch_stats = moving_average(batch_stats, new_stats, BATCH_STATS_DECAY, state.step)
        variables: Variables = {'params': optax.apply_updates(params, updates), 'batch_stats': batch_stats}
        ema = moving_average(state.ema, variables, ema_decay, state.step) if ema_decay else state.ema

        metrics['l2_loss'] = l2 * 0.5 * sum(jnp.vdot(k, k) for k in _kernels(params))
        metrics['loss'] += metrics['l2_loss']
        metrics |= {
            'gradient_norm': optax.tree.norm(gradients),
            'learning_rate': schedule(state.optimizer[-1].count),  # the optimizer's own count skips what is skipped
            'positives': num_positives,
        }
        # Of all devices: these are sums over the axis, so every device decides alike.
        finite = jnp.isfinite(metrics['loss']) & jnp.isfinite(metrics['gradient_norm'])
        metrics['skipped_steps'] = 1.0 - finite
        learned = TrainState(state.step + 1, variables, ema, optimizer_state)
        return either(finite, learned, dataclasses.replace(state, step=state.step + 1)), metrics

    return train_step


def either(condition: jax.Array, yes: Any, no: Any) -> Any:
    """One of two trees of arrays, the cheaper way on each platform (experiments/reliability).

    On CPU a branch: nothing is copied. Elsewhere a selection, because a branch would ask the host which way to go.
    """
    return jax.lax.platform_dependent(condition, yes, no, cpu=branch, default=select)


def branch(condition: jax.Array, yes: Any, no: Any) -> Any:
    return jax.lax.cond(condition, lambda: yes, lambda: no)


def select(condition: jax.Array, yes: Any, no: Any) -> Any:
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), yes, no)


def _sum_over(axis: str | None, tree: Any) -> Any:
    return jax.lax.psum(tree, axis) if axis else tree


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
