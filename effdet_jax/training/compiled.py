"""The training step on the devices: mapped over all of them, and compiled with the options that suit it."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import jax
import optax

from effdet_jax.model import EfficientDet
from effdet_jax.records.console import warn
from effdet_jax.runtime import devices, process, xla
from effdet_jax.training.objective import Metrics
from effdet_jax.training.optimizer import make_optimizer
from effdet_jax.training.state import TrainState
from effdet_jax.training.step import make_train_step


class MappedStep:
    """A training step on every device, for arrays with a leading axis of devices. It takes the state over (donates it).

    It is compiled at its first call, and again when `frozen` changes. All batches must have the same shapes.
    """

    def __init__(self, step: Callable) -> None:
        self._mapped = devices.map_devices(step, donate=(0,), static=(2,))
        self._compiled: dict[bool, jax.stages.Compiled] = {}

    def __call__(self, state: TrainState, batch: Mapping[str, Any], frozen: bool) -> tuple[TrainState, Metrics]:
        if not xla.options(xla.TRAINING) or jax.process_count() > 1:
            return self._mapped(state, batch, frozen)  # with several hosts, a compiled program would want all arrays
        if frozen not in self._compiled:
            self._compiled[frozen] = compile_step(self.lower(state, batch, frozen))
            process.give_back_memory()
        return self._compiled[frozen](state, batch)

    def lower(self, state: TrainState, batch: Mapping[str, Any], frozen: bool) -> jax.stages.Lowered:
        """For arrays, or for shapes of arrays."""
        return self._mapped.lower(state, batch, frozen)


def compile_step(lowered: jax.stages.Lowered, options: Mapping[str, Any] = MappingProxyType({})) -> jax.stages.Compiled:
    """With XLA's options for training on this platform, and with `options`."""
    options = {**xla.options(xla.TRAINING), **options}
    try:
        return lowered.compile(options or None)
    except jax.errors.JaxRuntimeError as error:
        if 'deterministic implementation' not in str(error):  # XLA's words for an operation that has none, on GPU
            raise
        warn('an operation of this network is not deterministic on this device: repeated steps may differ in rounding')
        return lowered.compile({name: value for name, value in options.items() if 'nondeterministic' not in name})


def map_train_step(
    config: Any, model: EfficientDet, anchors_N4: Any, steps_per_epoch: int, total_steps: int
) -> tuple[MappedStep, optax.GradientTransformation]:
    """(the step on every device, its optimizer)."""
    optimizer, schedule = make_optimizer(config, steps_per_epoch, total_steps)
    return MappedStep(make_train_step(config, model, optimizer, schedule, anchors_N4)), optimizer
