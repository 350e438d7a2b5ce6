"""All that changes during a run. It is one pytree, and so one checkpoint."""

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
from effdet_jax.weights.names import shapes_of

Variables = dict[str, Any]  # {'params': ..., 'batch_stats': ...}


@flax.struct.dataclass
class TrainState:
    """Randomness is a function of `step` and the seed, so no key is kept."""

    # Any: JAX and Orbax also make such trees of shapes, or of what is to be done with each array.
    step: Any  # int32 [], number of steps done
    variables: Any  # Variables
    ema: Any  # moving average of the variables; {} where none is kept
    optimizer: Any  # optax.OptState

    @property
    def best_variables(self) -> Variables:
        """What to evaluate and to deploy: records/deployed.py."""
        return deployed({'variables': self.variables, 'ema': self.ema})[1]


def init_variables(model: nn.Module, seed: int) -> Variables:
    """Fresh parameters and batch statistics. Their shapes do not depend on the image size."""
    images = jnp.zeros((1, 64, 64, 3))
    return xla.once(lambda key: model.init(key, images), jax.random.key(seed))


def init_state(
    variables: Variables, optimizer: optax.GradientTransformation, ema_decay: float, attacked: bool = False
) -> TrainState:
    """Step 0 from given variables; `attacked`: of a training that needs auxiliary batch norms."""
    if attacked:
        variables = with_auxiliary(variables)

    @jax.jit
    def rest(variables: Variables) -> tuple[Variables, optax.OptState]:
        ema = jax.tree.map(jnp.copy, variables) if ema_decay else {}  # a copy: the state's buffers are donated
        return ema, optimizer.init(variables['params'])

    return TrainState(jnp.zeros((), jnp.int32), variables, *rest(variables))


def state_shapes(
    model: nn.Module, optimizer: optax.GradientTransformation, ema_decay: float, attacked: bool = False
) -> TrainState:
    """The shapes and types of what `init_state` makes. Computes and allocates nothing."""
    return jax.eval_shape(lambda fresh: init_state(fresh, optimizer, ema_decay, attacked), shapes_of(model))


def arrays_like(shapes: Any) -> Any:
    """NumPy arrays of these shapes and types, for what takes arrays as its pattern: a single zero each in memory."""
    return jax.tree.map(lambda x: np.broadcast_to(np.zeros((), x.dtype), x.shape), shapes)


BATCH_STATS_DECAY = 0.99  # the "momentum" of batch norm


def moving_average(average: Any, value: Any, weight: Any) -> Any:
    """One step of it: `weight` is the value's, `averaging_weight`."""
    return jax.tree.map(lambda a, v: a + weight * (v - a), average, value)  # exact where both are equal


def averaging_weight(decay: float, step: jax.Array) -> jax.Array:
    """1 - min(decay, (1 + t) / (10 + t)): starting with a short memory, an average forgets the random start.

    Of the variables, and of the batch statistics (docs/reference.md, Backbone). The official code averages the latter
    with a constant 0.99 from variance 1, of which 3 per cent are left after 360 steps: where the true variance is 0.01,
    evaluation is wrong for most of a short run. From step 891 on there is no difference.
    """
    return 1.0 - jnp.minimum(decay, (1.0 + step) / (10.0 + step))
