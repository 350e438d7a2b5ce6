"""Throughput of the input pipeline, as a whole and of each stage."""

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
    """{stage: images/s} of each stage on one thread, and of batches on one and on `threads` threads.

    Measures each for `seconds`, over the first `images` of the source, which must be readable.
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

    decoded = [decode(i, where.reduction) for i, where in enumerate(places)]
    stages: dict[str, Callable[[int], object]] = {
        'read or generate': lambda i: source[i],
        'decode': lambda i: decode(i, 1),
        'decode at reduced size': lambda i: decode(i, places[i].reduction),
        'resize, crop, pad': lambda i: transforms.fill(out, decoded[i], places[i].scaled, places[i].corner),
        'boxes': lambda i: jitter.move_boxes(loaded[i][1].boxes_yxyx, places[i], image_size),
    }
    rates = {name: _rate(map(stage, itertools.cycle(indices)), 1, seconds) for name, stage in stages.items()}
    for count in sorted({1, threads}):
        rate = batch_rate(source, image_size=image_size, scale_range=scale_range, threads=count, seconds=seconds)
        rates[f'batches, {count} thread{"s" * (count > 1)}'] = rate
    return rates


def batch_rate(
    source: Source,
    *,
    image_size: tuple[int, int],
    scale_range: tuple[float, float],
    threads: int,
    batch_size: int = 8,
    seconds: float = 1.0,
) -> float:
    """Images/s of `train_batches` on this host, measured for `seconds` after the first batch."""
    size = min(batch_size, len(source))
    batches = iter(
        train_batches(
            source, image_size=image_size, batch_size=size, max_boxes=100, scale_range=scale_range, seed=0,
            threads=threads, prefetch=1,
        )
    )  # fmt: skip
    next(batches)
    return _rate(batches, size, seconds)


def _rate(work: Iterable, images: int, seconds: float) -> float:
    start, done = perf_counter(), 0
    for _ in work:
        done += images
        if perf_counter() - start > seconds:
            break
    return done / (perf_counter() - start)
