"""Freezing: `config.train.freeze` is a regex of parameter paths; what it matches stays as it is until it is unfrozen.

A path is 'backbone/stem/conv/kernel', matched from its start. While frozen, a parameter gets no gradient, its batch
norm uses the stored statistics and leaves them alone, and the optimizer neither moves nor decays it. All are unfrozen
at `config.train.unfreeze_epoch`; then the step is compiled a second time.

Where it takes effect: gradients and batch norms in step.py, L2 and updates in optimizer.py; build.py checks the regex.
Batch norms match by their own path ('backbone/stem/bn'). Stochastic depth stays on.
"""

import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax import traverse_util

from effdet_jax.errors import UserError
from effdet_jax.model.batch_norm import BatchNorm


def path_matches(pattern: str, path: Sequence[Any]) -> bool:
    """Whether the regex `pattern` matches a parameter path from its start; '' matches nothing."""
    return bool(pattern) and re.match(pattern, '/'.join(path)) is not None


def check_freeze(pattern: str, variables: Any) -> None:
    """Raises UserError where `config.train.freeze` matches no parameter."""
    paths = traverse_util.flatten_dict(variables['params'])
    if pattern and not any(path_matches(pattern, path) for path in paths):
        raise UserError(
            f'config.train.freeze={pattern!r} matches no parameter: paths look like {"/".join(next(iter(paths)))}'
        )


def unfreeze_step(pattern: str, unfreeze_epoch: float | None, steps_per_epoch: int) -> float:
    """The step from which all parameters are trained: 0 without a pattern, infinity if they stay frozen."""
    if not pattern:
        return 0
    return math.inf if unfreeze_epoch is None else unfreeze_epoch * steps_per_epoch


def stop_gradient(params: Any, pattern: str) -> Any:
    """`params`, of which the frozen ones get no gradient: XLA then drops that part of the backward pass."""
    return traverse_util.path_aware_map(
        lambda path, p: jax.lax.stop_gradient(p) if path_matches(pattern, path) else p, params
    )


def frozen_batch_norm(pattern: str) -> Callable:
    """A Flax interceptor: frozen batch norms behave as in evaluation."""

    def intercept(method: Callable, args: tuple, kwargs: dict, context: nn.module.InterceptorContext) -> Any:
        if isinstance(context.module, BatchNorm) and path_matches(pattern, context.module.path):
            args = (args[0], False)  # train=False
        return method(*args, **kwargs)

    return intercept


def unless_frozen(
    transformation: optax.GradientTransformation, pattern: str, unfreeze_at: float
) -> optax.GradientTransformationExtraArgs:
    """`transformation`, which gives zeros for what is frozen and leaves its state alone until step `unfreeze_at`.

    What is frozen has a state of its own, so that the others' state survives the switch. `update(..., frozen=...)` says
    whether it is still frozen; otherwise the number of updates decides, which leaves out skipped steps.
    """

    def unfrozen(step: Any, *, frozen: bool | None = None, **_: Any) -> jax.Array:
        return jnp.asarray(step >= unfreeze_at if frozen is None else not frozen)

    def labels(params: Any) -> Any:  # they are names in every checkpoint
        return traverse_util.path_aware_map(lambda path, _: 'late' if path_matches(pattern, path) else 'always', params)

    late = optax.transforms.conditionally_mask(transformation, unfrozen, forward_extra_args=True)
    return optax.partition({'always': transformation, 'late': late}, labels)
