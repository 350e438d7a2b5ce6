"""What a step makes of the state: new parameters, batch statistics and averages, or nothing if the step is skipped."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from effdet_jax.training.state import BATCH_STATS_DECAY, TrainState, Variables, averaging_weight, moving_average


class Rates(NamedTuple):
    """Factors that scale whole trees.

    They are computed outside the branch that uses them: inside, XLA would compute a cosine in the loop of every array.
    """

    learning_rate: jax.Array
    batch_stats: jax.Array  # weight of the new batch statistics in their moving average
    ema: jax.Array  # weight of the new variables in theirs


def make_rates(learning_rate: jax.Array, step: jax.Array, ema_decay: float) -> Rates:
    return Rates(learning_rate, averaging_weight(BATCH_STATS_DECAY, step), averaging_weight(ema_decay, step))


def make_update(optimizer: optax.GradientTransformationExtraArgs, ema_decay: float) -> Callable[..., TrainState]:
    """`update(frozen, state, gradients, batch_stats, rates)` -> the next state. `batch_stats`: this batch's."""

    def update(frozen: bool, state: TrainState, gradients: Any, batch_stats: Any, rates: Rates) -> TrainState:
        params = state.variables['params']
        updates, optimizer_state = optimizer.update(
            gradients, state.optimizer, params, learning_rate=rates.learning_rate, frozen=frozen
        )
        variables: Variables = {
            'params': optax.apply_updates(params, updates),
            'batch_stats': moving_average(state.variables['batch_stats'], batch_stats, rates.batch_stats),
        }
        ema = moving_average(state.ema, variables, rates.ema) if ema_decay else state.ema
        return TrainState(state.step + 1, variables, ema, optimizer_state)

    return update


def skip(state: TrainState, *_: Any) -> TrainState:
    """Takes the place of `update` if the loss or a gradient is not finite."""
    return dataclasses.replace(state, step=state.step + 1)


def branch(condition: jax.Array, if_true: Callable, if_false: Callable, *operands: Any) -> Any:
    """`if_true(*operands)` or `if_false(*operands)`, the cheaper way on each platform (experiments/reliability).

    On CPU a branch, which copies nothing. Elsewhere a selection, since a branch would wait for the host.
    """
    if jax.default_backend() == 'cpu':
        return jax.lax.cond(condition, if_true, if_false, *operands)
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), if_true(*operands), if_false(*operands))
