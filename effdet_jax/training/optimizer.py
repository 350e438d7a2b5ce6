"""Optimiser, learning rate and freezing, from the config (docs/reference.md, Optimization)."""

import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import traverse_util
from jaxtyping import Array, Float

from effdet_jax.errors import UserError

REFERENCE_BATCH = 64  # official learning rates are stated for this batch size


def check_freeze(pattern: str, variables: Any) -> None:
    """Raises UserError where the regex of config.train.freeze matches no parameter."""
    paths = traverse_util.flatten_dict(variables['params'])
    if pattern and not any(path_matches(pattern, path) for path in paths):
        raise UserError(
            f'config.train.freeze={pattern!r} matches no parameter: paths look like {"/".join(next(iter(paths)))}'
        )


def path_matches(pattern: str, path: Sequence[Any]) -> bool:
    """Whether `pattern`, a regex, matches the parameter path 'backbone/stem/conv/kernel' from its start."""
    return bool(pattern) and re.match(pattern, '/'.join(path)) is not None


def make_optimizer(
    config: Any, steps_per_epoch: int, total_steps: int
) -> tuple[optax.GradientTransformationExtraArgs, Callable]:
    """(optimiser, schedule: step -> learning rate).

    L2 of the loss, then zero for what is frozen, then clipping, then the optimiser proper, then the learning rate.
    What is frozen keeps an optimiser state of its own, untouched until it thaws; the rest's survives the switch.
    """
    c = config.optimizer
    schedule = make_schedule(config.schedule, config.train.batch_size, steps_per_epoch, total_steps)
    thaw_at, pattern = thaw_step(config, steps_per_epoch), config.train.freeze

    def thawed(step: Any, **_: Any) -> jax.Array:
        return jnp.asarray(step) >= thaw_at

    def labels(params: Any) -> Any:
        return traverse_util.path_aware_map(lambda path, _: 'late' if path_matches(pattern, path) else 'always', params)

    core = OPTIMIZERS[c.name](c.momentum, c.weight_decay)
    optimizer = optax.chain(
        optax.add_decayed_weights(config.loss.l2, mask=is_kernel),
        # The decay above also reaches frozen parameters: take it back before it counts in the clipping norm.
        optax.partition(
            {'always': optax.identity(), 'late': optax.transforms.conditionally_mask(optax.identity(), thawed)}, labels
        ),
        clip(c.clip_norm, c.clip_each) if c.clip_norm else optax.identity(),
        optax.partition({'always': core, 'late': optax.transforms.conditionally_mask(core, thawed)}, labels),
        scale_by_learning_rate(schedule),
    )
    return optimizer, schedule


def thaw_step(config: Any, steps_per_epoch: int) -> float:
    """The step from which everything is trained: 0 where nothing is frozen, infinity where it is for good."""
    pattern, epoch = config.train.freeze, config.train.unfreeze_epoch
    if not pattern:
        return 0
    return math.inf if epoch is None else epoch * steps_per_epoch


def is_kernel(params: Any) -> Any:
    """True for convolution kernels, False for biases, batch norm and edge weights."""
    return traverse_util.path_aware_map(lambda path, _: path[-1] == 'kernel', params)


# name -> (momentum, weight decay) -> update direction, before the learning rate
OPTIMIZERS: dict[str, Callable[[float, float], optax.GradientTransformation]] = {
    'sgd': lambda momentum, decay: (
        # Without a decay nothing in front: the tree of the state is part of every checkpoint.
        optax.chain(optax.add_decayed_weights(decay, mask=is_kernel), optax.trace(momentum))
        if decay
        else optax.trace(momentum)
    ),
    'adam': lambda momentum, _: optax.scale_by_adam(b1=momentum),
    'adamw': lambda momentum, decay: optax.chain(
        optax.scale_by_adam(b1=momentum), optax.add_decayed_weights(decay, mask=is_kernel)
    ),
}


def clip(limit: float, each: bool) -> optax.GradientTransformation:
    """To a global norm of at most `limit`, as in optax; with `each`, every gradient by its own norm before.

    The latter are the official code's two stages. What a gradient's norm is after the first follows from what it was.
    """

    def update(gradients: Any, _: Any) -> Any:
        if not each:
            factor = _at_most(limit, jnp.sqrt(squared_norm(gradients)))
            return jax.tree.map(lambda g: g * factor, gradients)
        # Scalars and no vector of them: taking the i-th would make every gradient's product a program of its own.
        leaves, tree = jax.tree.flatten(gradients)
        norms = [jnp.sqrt(jnp.vdot(g, g, precision='highest')) for g in leaves]
        factors = [_at_most(limit, norm) for norm in norms]
        clipped_L = jnp.stack([norm * factor for norm, factor in zip(norms, factors, strict=True)])
        of_all = _at_most(limit, jnp.linalg.norm(clipped_L))
        return jax.tree.unflatten(tree, [g * (factor * of_all) for g, factor in zip(leaves, factors, strict=True)])

    return optax.stateless(update)


def squared_norm(tree: Any) -> Float[Array, '']:
    """Of all leaves together: one sum over a copy, since as many sums as leaves take seconds to compile."""
    flat = jnp.concatenate([leaf.ravel() for leaf in jax.tree.leaves(tree)])
    return jnp.vdot(flat, flat, precision='highest')


def _at_most(limit: float, norm: Array) -> Array:
    """What to multiply with for a norm of at most `limit`."""
    return jnp.minimum(1.0, limit / jnp.maximum(norm, 1e-16))


def scale_by_learning_rate(schedule: Callable) -> optax.GradientTransformationExtraArgs:
    """As in optax; but `update` takes the `learning_rate` of its step, if that is known already."""
    own = optax.scale_by_learning_rate(schedule)

    def update(updates: Any, state: Any, params: Any = None, *, learning_rate: Any = None, **_: Any) -> tuple[Any, Any]:
        if learning_rate is None:
            return own.update(updates, state, params)
        return jax.tree.map(lambda u: -learning_rate * u, updates), state._replace(count=state.count + 1)

    return optax.GradientTransformationExtraArgs(own.init, update)


def make_schedule(c: Any, batch_size: int, steps_per_epoch: int, total_steps: int) -> Callable[[Any], jax.Array]:
    """Linear warm-up, then the decay that `c.decay` names. Start and rate are scaled with the batch where asked for.

    The cosine counts from step 0, not from the end of the warm-up, as in the official code. It ends at `c.final_rate`;
    the official one divides by the steps after the warm-up, and rises a little at the end (docs/reference.md,
    Optimization).
    """
    factor = batch_size / REFERENCE_BATCH if c.scale_with_batch else 1.0
    rate, start, final = c.learning_rate * factor, c.warmup_start * factor, c.final_rate
    drop_steps = [epoch * steps_per_epoch for epoch in c.step_epochs]
    decays = {
        'cosine': lambda t: final + (rate - final) * _half_cosine(t / total_steps),
        'step': lambda t: rate * 0.1 ** sum(jnp.float32(t >= drop) for drop in drop_steps),
        'constant': lambda t: rate,
    }
    decay = decays[c.decay]
    warmup_steps = max(int(c.warmup_epochs * steps_per_epoch), 1)

    def schedule(step: Any) -> jax.Array:
        t = jnp.asarray(step, jnp.float32)
        warm = start + t / warmup_steps * (rate - start)
        return jnp.where(t < warmup_steps, warm, decay(t))

    return schedule


def _half_cosine(progress: jax.Array) -> jax.Array:
    """From 1 at 0 to 0 at 1 and beyond."""
    return 0.5 * (1.0 + jnp.cos(jnp.pi * jnp.minimum(progress, 1.0)))
