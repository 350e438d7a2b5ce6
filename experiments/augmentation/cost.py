"""What each augmentation costs a training step: python -m experiments.augmentation.cost [SIZE [BATCH [ROUNDS]]]

Times the compiled augmentation by itself, for every image of the batch, on one device, in turns with D0's training step
(all augmentations off) on the same batch, so that whatever else the machine does befalls all alike.
"""

import statistics
import sys
from collections.abc import Callable
from typing import Any

import jax

from effdet_jax import data
from effdet_jax.configs import default
from effdet_jax.inference.detector import image_anchors
from effdet_jax.model import build_model
from effdet_jax.records.console import table
from effdet_jax.runtime import timing
from effdet_jax.training.augment import AUGMENTATIONS, make_augment
from effdet_jax.training.compiled import compile_step
from effdet_jax.training.optimizer import make_optimizer
from effdet_jax.training.state import init_state, init_variables
from effdet_jax.training.step import make_train_step


def main(size: int = 512, batch_size: int = 8, rounds: int = 15) -> None:
    config = default.get_config('d0')
    config.image.size = (size, size)
    source = data.open_source(config.dataset.source, config.dataset.train_split, ())
    batches = data.train_batches(
        source, image_size=config.image.size, batch_size=batch_size, max_boxes=100, scale_range=(0.5, 1.5), seed=0
    )
    first = next(iter(batches))
    batch = jax.device_put({key: first[key] for key in ('image', 'boxes', 'labels', 'valid_size')})
    takes = {'train step': train_step(config, batch, len(source.class_names)), 'flip': augmentation(config, batch)}
    takes |= {name: augmentation(config, batch, name) for name in AUGMENTATIONS}
    takes['all'] = augmentation(config, batch, *AUGMENTATIONS)
    for take in takes.values():  # compiles
        jax.block_until_ready(take())
    seconds = {name: [] for name in takes}
    for order in timing.in_turns(list(takes), rounds):
        for name in order:
            seconds[name].append(timing.seconds_of(lambda name=name: jax.block_until_ready(takes[name]())))
    step = statistics.median(seconds['train step'])
    rows = [
        (name, f'{1e3 * statistics.median(times) / batch_size:.2f}', f'{statistics.median(times) / step:.1%}')
        for name, times in seconds.items()
    ]
    what = f'D0 at {size}x{size}, batch {batch_size}, {jax.devices()[0].device_kind}, {rounds} rounds, medians'
    print(table(('what', 'ms an image', 'of a step'), rows, what))


def augmentation(config: default.ConfigDict, batch: dict[str, jax.Array], *names: str) -> Callable[[], Any]:
    config = config.copy_and_resolve_references()
    config.augment.flip = not names
    for name in names:
        config.augment[name].probability = 1.0
    augment, key = jax.jit(make_augment(config, None)), jax.random.key(0)
    return lambda: augment(key, batch)


def train_step(config: default.ConfigDict, batch: dict[str, jax.Array], num_classes: int) -> Callable[[], Any]:
    model = build_model(config.model, num_classes)
    optimizer, schedule = make_optimizer(config, 1000, 1000)
    state = init_state(init_variables(model, 0), optimizer, config.train.ema_decay)
    step = jax.jit(make_train_step(config, model, optimizer, schedule, image_anchors(config)))
    step = compile_step(step.lower(state, batch))
    return lambda: step(state, batch)


if __name__ == '__main__':
    main(*map(int, sys.argv[1:]))
