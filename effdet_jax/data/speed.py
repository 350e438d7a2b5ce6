"""How fast each stage of the input is, alone and all together."""

import itertools
from collections.abc import Callable, Iterable
from time import perf_counter

import cv2
import numpy as np

from effdet_jax.data import jitter, transforms
from effdet_jax.data.pipeline import load, train_batches
from effdet_jax.data.sources import Source


def stage_rates(
    source: Source,
    *,
    image_size: tuple[int, int],
    scale_range: tuple[float, float],
    threads: int,
    images: int = 64,
    seconds: float = 1.0,
) -> dict[str, float]:
    """{stage: images/s} on one thread, and of whole batches on one thread and on `threads`; `seconds` for each.

    Over the first `images` of the source, which must be readable.
    """
    cv2.setNumThreads(1)
    indices = range(min(images, len(source)))
    rng = np.random.default_rng(0)
    examples = [source[i] for i in indices]
    loaded = [load(source, i) for i in indices]
    places = [
        jitter.place((pixels.shape[0], pixels.shape[1]), image_size, jitter.draw(scale_range, rng))
        for pixels, _ in loaded
    ]
    out = np.empty((*image_size, 3), np.uint8)

    def decode(i: int, reduction: int) -> np.ndarray:
        image = examples[i].image
        return transforms.decode(image, '', reduction=reduction) if isinstance(image, bytes) else image

    needed = [decode(i, where.reduction) for i, where in enumerate(places)]
    stages: dict[str, Callable[[int], object]] = {
        'read, or draw': lambda i: source[i],
        'decode': lambda i: decode(i, 1),
        'decode no larger than needed': lambda i: decode(i, places[i].reduction),
        'resize, crop, pad': lambda i: transforms.fill(out, needed[i], places[i].scaled, places[i].corner),
        'boxes': lambda i: jitter.move_boxes(loaded[i][1].boxes_yxyx, places[i], image_size),
    }
    rates = {name: _rate(map(stage, itertools.cycle(indices)), 1, seconds) for name, stage in stages.items()}
    batch_size = min(8, len(source))
    for count in sorted({1, threads}):
        batches = iter(
            train_batches(
                source, image_size=image_size, batch_size=batch_size, max_boxes=100, scale_range=scale_range, seed=0,
                threads=count, prefetch=1,
            )
        )  # fmt: skip
        next(batches)
        rates[f'batches, {count} thread{"s" * (count > 1)}'] = _rate(batches, batch_size, seconds)
    return rates


def _rate(work: Iterable, images: int, seconds: float) -> float:
    start, done = perf_counter(), 0
    for _ in work:
        done += images
        if perf_counter() - start > seconds:
            break
    return done / (perf_counter() - start)
