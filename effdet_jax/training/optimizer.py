"""Optimizer and learning rate, from the config (docs/reference.md, Optimization)."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import traverse_util
from jaxtyping import Array, Float

from effdet_jax.training.freeze import unfreeze_step, unless_frozen

REFERENCE_BATCH = 64  # the batch size of the official learning rates


def make_optimizer(
    config: Any, steps_per_epoch: int, total_steps: int
) -> tuple[optax.GradientTransformationExtraArgs, Callable]:
    """(optimizer, schedule: step -> learning rate).

    The chain: L2 of the loss, zero for what is frozen, clipping, the optimizer proper, the learning rate.
    """
    c, train = config.optimizer, config.train
    schedule = make_schedule(config.schedule, train.batch_size, steps_per_epoch, total_steps)
    frozen = train.freeze, unfreeze_step(train.freeze, train.unfreeze_epoch, steps_per_epoch)
    optimizer = optax.chain(
        optax.add_decayed_weights(config.loss.l2, mask=is_kernel),
        unless_frozen(optax.identity(), *frozen),  # takes the decay back before it counts in the clipping norm
        clip(c.clip_norm, c.clip_each) if c.clip_norm else optax.identity(),
        unless_frozen(OPTIMIZERS[c.name](c.momentum, c.weight_decay), *frozen),
        scale_by_learning_rate(schedule),
    )
    return optimizer, schedule


def is_kernel(params: Any) -> Any:
    """True for convolution kernels, False for biases, batch norm and edge weights."""
    return traverse_util.path_aware_map(lambda path, _: path[-1] == 'kernel', params)


# name -> (momentum, weight decay) -> update direction, before the learning rate
OPTIMIZERS: dict[str, Callable[[float, float], optax.GradientTransformation]] = {
    'sgd': lambda momentum, decay: (
        # Without weight decay there is no transformation for it: the state's tree is part of every checkpoint.
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
    """Clips to a global norm of at most `limit`, as in optax. With `each`, clips every gradient by its own norm first.

    `each` gives the official code's two stages. The norms after the first stage follow from those before it.
    """

    def update(gradients: Any, _: Any) -> Any:
        if not each:
            factor = _at_most(limit, jnp.sqrt(squared_norm(gradients)))
            return jax.tree.map(lambda g: g * factor, gradients)
        # Scalars instead of a vector: indexing it would give each product a loop of its own to compile.
        leaves, tree = jax.tree.flatten(gradients)
        norms = [jnp.sqrt(jnp.vdot(g, g, precision='highest')) for g in leaves]
        factors = [_at_most(limit, norm) for norm in norms]
        clipped_L = jnp.stack([norm * factor for norm, factor in zip(norms, factors, strict=True)])
        of_all = _at_most(limit, jnp.linalg.norm(clipped_L))
        return jax.tree.unflatten(tree, [g * (factor * of_all) for g, factor in zip(leaves, factors, strict=True)])

    return optax.stateless(update)


def squared_norm(tree: Any) -> Float[Array, '']:
    """The squared global norm, as one sum over a copy: a sum per leaf would take seconds to compile."""
    flat = jnp.concatenate([leaf.ravel() for leaf in jax.tree.leaves(tree)])
    return jnp.vdot(flat, flat, precision='highest')


def _at_most(limit: float, norm: Array) -> Array:
    """The factor that brings a norm down to at most `limit`."""
    return jnp.minimum(1.0, limit / jnp.maximum(norm, 1e-16))


def scale_by_learning_rate(schedule: Callable) -> optax.GradientTransformationExtraArgs:
    """As in optax, but `update` also accepts the `learning_rate` of its step if it is known already."""
    own = optax.scale_by_learning_rate(schedule)

    def update(updates: Any, state: Any, params: Any = None, *, learning_rate: Any = None, **_: Any) -> tuple[Any, Any]:
        if learning_rate is None:
            return own.update(updates, state, params)
        return jax.tree.map(lambda u: -learning_rate * u, updates), state._replace(count=state.count + 1)

    return optax.GradientTransformationExtraArgs(own.init, update)


def make_schedule(c: Any, batch_size: int, steps_per_epoch: int, total_steps: int) -> Callable[[Any], jax.Array]:
    """Linear warm-up, then the decay `c.decay`. With `c.scale_with_batch`, rates are scaled by batch size / 64.

    As in the official code, the cosine counts from step 0, not from the end of the warm-up. Here it ends at
    `c.final_rate`; the official one divides by the steps after the warm-up and rises a little at the end
    (docs/reference.md, Optimization).
    """
    factor = batch_size / REFERENCE_BATCH if c.scale_with_batch else 1.0
    rate, start, final = c.learning_rate * factor, c.warmup_init_rate * factor, c.final_rate
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
