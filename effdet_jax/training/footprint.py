"""Memory of a training step, from the compiler's layout of its buffers, and time, from running it."""

import dataclasses
from time import perf_counter
from typing import Any

import jax
import numpy as np
from jaxtyping import Float

from effdet_jax.errors import UserError
from effdet_jax.model import EfficientDet
from effdet_jax.runtime import devices, process
from effdet_jax.training.compiled import MappedStep, compile_step, map_train_step
from effdet_jax.training.state import TrainState, state_shapes
from effdet_jax.weights.names import shapes_of

HostBatch = dict[str, np.ndarray]

BATCHES_ON_DEVICE = 2  # the loop transfers the next one while the device works
SECONDS = 5.0  # of measuring
# Buffers are laid out before LLVM runs. Without its optimization the layout is the same and compiling is quicker
# (D0 at 256x256: equal to the byte, in three quarters of the time).
LAYOUT_ONLY = {'xla_backend_optimization_level': 0, 'xla_llvm_disable_expensive_passes': True}


@dataclasses.dataclass(frozen=True)
class StepMemory:
    """Bytes on each device during a step. `temporary`: buffers that live within it only, mostly activations."""

    variables: int  # parameters and batch statistics
    optimizer: int
    average: int
    batches: int
    temporary: int | None  # None: not compiled

    @property
    def total(self) -> int:
        return self.variables + self.optimizer + self.average + self.batches + (self.temporary or 0)


@dataclasses.dataclass(frozen=True)
class PlannedStep:
    """The step that the training loop would run for a config, and the shapes of its state."""

    mapped: MappedStep
    state: TrainState
    frozen: bool

    def lower(self, batch: HostBatch) -> jax.stages.Lowered:
        """For batches of these shapes."""
        return self.mapped.lower(replicated(self.state), devices.shard(batch), self.frozen)

    def memory(self, batch: HostBatch, compiled: jax.stages.Compiled | None) -> StepMemory:
        """For a batch of this host, divided among its devices."""
        state = self.state
        return StepMemory(
            variables=tree_bytes(state.variables),
            optimizer=tree_bytes(state.optimizer),
            average=tree_bytes(state.ema),
            batches=BATCHES_ON_DEVICE * tree_bytes(batch) // jax.local_device_count(),
            temporary=compiled and temporary_bytes(compiled),
        )

    def random_state(self) -> TrainState:
        """A state of random numbers on the devices."""
        rng = np.random.default_rng(0)
        return devices.replicate(jax.tree.map(lambda x: rng.uniform(0, 0.02, x.shape).astype(x.dtype), self.state))


def seconds_per_step(compiled: jax.stages.Compiled, state: TrainState, batch: HostBatch) -> float:
    """The mean over about `SECONDS` of steps, called as in the training loop; donates `state`."""
    state, metrics = jax.block_until_ready(compiled(state, devices.shard(batch)))
    process.give_back_memory()
    pending, start = [metrics], perf_counter()
    while (steps := len(pending) - 1) < 2 or perf_counter() - start < SECONDS:
        state, metrics = compiled(state, devices.shard(batch))
        pending.append(metrics)
        jax.block_until_ready(pending[-1 - devices.steps_ahead()])
    jax.block_until_ready(state)
    return (perf_counter() - start) / steps


def plan_step(config: Any, model: EfficientDet, anchors: Float[np.ndarray, 'N 4'], frozen: bool) -> PlannedStep:
    """Traces, compiles and allocates nothing yet. `frozen`: the step before the unfreezing (training/freeze.py)."""
    mapped, optimizer = map_train_step(config, model, anchors, 1000, 1000)  # no shape depends on the schedule
    state = state_shapes(shapes_of(model), optimizer, config.train.ema_decay, config.adversarial.weight > 0)
    return PlannedStep(mapped, state, frozen)


def random_batch(config: Any, batch_size: int, num_classes: int, objects: int) -> HostBatch:
    """A batch of noise with `objects` boxes in each image."""
    rng, most = np.random.default_rng(0), config.dataset.max_boxes
    size_2 = np.array(config.image.size)
    corners_BM22 = np.sort(rng.uniform(0, 1, (batch_size, most, 2, 2)), axis=2) * size_2
    labels_BM = rng.integers(0, num_classes, (batch_size, most))
    return {
        'image': rng.integers(0, 256, (batch_size, *size_2, 3), np.uint8),
        'valid_size': np.tile(size_2, (batch_size, 1)).astype(np.int32),
        'boxes': corners_BM22.reshape(batch_size, most, 4).astype(np.float32),
        'labels': np.where(np.arange(most) < objects, labels_BM, -1).astype(np.int32),
        # Not read by the step, but part of every batch.
        'index': np.zeros(batch_size, np.int32),
        'unreadable': np.full(batch_size, -1, np.int32),
        'dropped': np.zeros(batch_size, np.int32),
    }


def compile_layout(lowered: jax.stages.Lowered) -> jax.stages.Compiled:
    """Compiles only to learn the memory layout: quicker on CPU, and not meant to be run."""
    return compile_step(lowered, LAYOUT_ONLY if jax.default_backend() == 'cpu' else {})


def replicated(shapes: Any) -> Any:
    """The shapes that `devices.replicate` would give."""
    return jax.eval_shape(devices.replicate, shapes)


def temporary_bytes(compiled: jax.stages.Compiled) -> int:
    """Bytes that a program needs on each device beside its arguments: buffers, code, and results of its own.

    Raises:
      UserError: if the device's compiler does not tell.
    """
    m = compiled.memory_analysis()
    if m is None:
        raise UserError(
            f'the {jax.default_backend()} compiler does not tell what memory a program needs: add --no-step'
        )
    new_results = m.output_size_in_bytes - m.alias_size_in_bytes
    return m.temp_size_in_bytes + m.generated_code_size_in_bytes + new_results


def tree_bytes(tree: Any) -> int:
    """Total size of the arrays, or shapes of arrays, in a tree."""
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))
