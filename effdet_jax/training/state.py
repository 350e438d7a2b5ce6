"""Everything that changes during a run: one pytree, and so one checkpoint."""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

from effdet_jax.records.deployed import deployed
from effdet_jax.runtime import xla
from effdet_jax.training.adversarial import with_auxiliary

Variables = dict[str, Any]  # {'params': ..., 'batch_stats': ...}


@flax.struct.dataclass
class TrainState:
    """No random key is stored: randomness is a function of `step` and the seed."""

    # Any: JAX and Orbax also make such trees of shapes and of instructions.
    step: Any  # int32 [], number of steps done
    variables: Any  # Variables
    ema: Any  # moving average of the variables; {} where none is kept
    optimizer: Any  # optax.OptState

    @property
    def best_variables(self) -> Variables:
        """The variables to evaluate and to deploy: records/deployed.py."""
        return deployed({'variables': self.variables, 'ema': self.ema})[1]


def init_variables(model: nn.Module, seed: int) -> Variables:
    """Fresh parameters and batch statistics. Their shapes do not depend on the image size."""
    images = jnp.zeros((1, 64, 64, 3))
    return xla.once(lambda key: model.init(key, images), jax.random.key(seed))


def init_state(
    variables: Variables, optimizer: optax.GradientTransformation, ema_decay: float, attacked: bool = False
) -> TrainState:
    """The state of step 0. `attacked`: adds the auxiliary batch norms of adversarial training."""
    if attacked:
        variables = with_auxiliary(variables)

    @jax.jit
    def rest(variables: Variables) -> tuple[Variables, optax.OptState]:
        ema = jax.tree.map(jnp.copy, variables) if ema_decay else {}  # a copy: the state's buffers are donated
        return ema, optimizer.init(variables['params'])

    return TrainState(jnp.zeros((), jnp.int32), variables, *rest(variables))


def state_shapes(
    variables: Any, optimizer: optax.GradientTransformation, ema_decay: float, attacked: bool = False
) -> TrainState:
    """The shapes and types of `init_state`'s result, from shapes of the variables. Computes and allocates nothing."""
    return jax.eval_shape(lambda fresh: init_state(fresh, optimizer, ema_decay, attacked), variables)


def arrays_like(shapes: Any) -> Any:
    """NumPy arrays of these shapes and types, for functions that want arrays. Each takes the memory of one number."""
    return jax.tree.map(lambda x: np.broadcast_to(np.zeros((), x.dtype), x.shape), shapes)


BATCH_STATS_DECAY = 0.99  # the "momentum" of batch norm


def moving_average(average: Any, value: Any, weight: Any) -> Any:
    """average + weight * (value - average); see `averaging_weight`."""
    return jax.tree.map(lambda a, v: a + weight * (v - a), average, value)  # exact where both are equal


def averaging_weight(decay: float, step: jax.Array) -> jax.Array:
    """1 - min(decay, (1 + t) / (10 + t)): a short memory at first, so that the average forgets the random start.

    Used for the variables and for the batch statistics (docs/reference.md, Backbone). The official code averages batch
    statistics with a constant 0.99 from variance 1. After 360 steps 3 percent of that 1 are left, so where the true
    variance is 0.01, evaluation is wrong for most of a short run. From step 891 on both are the same.
    """
    return 1.0 - jnp.minimum(decay, (1.0 + step) / (10.0 + step))
