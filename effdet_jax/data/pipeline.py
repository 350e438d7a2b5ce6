"""From a source to batches: shuffled and endless for training, each image once for evaluation. Grain does the reading.

What a batch holds is a function of (seed, position) alone: the images of all epochs stand in one endless row, of every
global batch host h of n takes the h-th of n parts, and random numbers depend on the place in the row. So a position is
one integer, and neither the number of threads nor that of hosts changes what is learned from.
"""

import dataclasses
from collections.abc import Iterator, Sequence

import cv2
import grain
import numpy as np
from jaxtyping import Bool, Float, Int, UInt8

from effdet_jax.data import transforms
from effdet_jax.data.example import Annotations, Example
from effdet_jax.data.sources import Source


@dataclasses.dataclass(frozen=True)
class EvalBatch:
    """A batch of evaluation images, in which padding has `mask` False and `index` -1.

    image_scale: multiply a box in network pixels by it to return to the original image. index: into the source.
    annotations: of the images that are no padding, which come first; original pixels, crowds included, nothing cut.
    """

    image: UInt8[np.ndarray, 'B H W 3']
    valid_size: Int[np.ndarray, 'B 2']
    image_scale: Float[np.ndarray, 'B']
    mask: Bool[np.ndarray, 'B']
    index: Int[np.ndarray, 'B']
    annotations: tuple[Annotations, ...]

    @property
    def arrays(self) -> dict[str, np.ndarray]:
        """What goes to the device: everything but the annotations."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)[:-1]}


def train_batches(
    source: Source,
    *,
    image_size: tuple[int, int],
    batch_size: int,
    max_boxes: int,
    scale_range: tuple[float, float],
    seed: int,
    host: int = 0,
    num_hosts: int = 1,
    threads: int = 2,
    prefetch: int = 4,
) -> grain.IterDataset:
    """Endless batches of `batch_size` images (of this host), shuffled anew in every epoch, jittered (spec 9).

    A batch is a dict: `image` uint8 [B, H, W, 3] with zeros at bottom and right, `valid_size` int32 [B, 2], `boxes`
    float32 [B, M, 4] yxyx in network pixels, `labels` int32 [B, M] with -1 as padding, `index` int32 [B] into the
    source, `dropped` int32 [B]: how many boxes were left out because there were more than M = `max_boxes` (the first
    M are kept). Crowds are no targets and are left out, difficult objects are kept.

    An iterator's `get_state()` is {'next_index': number of the next batch}; `set_state` continues there, bit for bit.
    `threads` prepare up to `prefetch` batches ahead, at least one each; with 0 threads nothing is prepared ahead.
    """
    load = _Train(source, image_size, scale_range, max_boxes)
    dataset = grain.MapDataset.range(len(source)).seed(seed).shuffle().repeat().random_map(load)
    # Shared out after all that is random, in blocks: the hosts' devices in a row see what those of one host would see.
    # (drop_remainder: without it Grain rounds the length of the endless row up to more than an integer holds.)
    return _read(dataset.batch(batch_size, drop_remainder=True)[host::num_hosts], threads, prefetch)


def eval_batches(
    source: Source,
    *,
    image_size: tuple[int, int],
    batch_size: int,
    host: int = 0,
    num_hosts: int = 1,
    threads: int = 2,
    prefetch: int = 4,
) -> Iterator[EvalBatch]:
    """Every image of the source once, over all hosts together; every host yields the same number of batches."""
    per_host = -(-len(source) // num_hosts)
    mine = range(host, len(source), num_hosts)

    def load(batch: int) -> EvalBatch:
        return _eval_batch(source, mine[batch * batch_size : (batch + 1) * batch_size], image_size, batch_size)

    return iter(_read(grain.MapDataset.range(-(-per_host // batch_size)).map(load), threads, prefetch))


@dataclasses.dataclass(frozen=True)
class _Train(grain.transforms.RandomMap):
    """Index -> one element of a training batch."""

    source: Source
    image_size: tuple[int, int]
    scale_range: tuple[float, float]
    max_boxes: int

    def random_map(self, index: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
        example = self.source[index]
        targets = example.annotations.select(~example.annotations.is_crowd)
        image, valid_size, boxes_K4, kept_M = transforms.jitter_resize_crop(
            _pixels(example), targets.boxes_yxyx, self.image_size, self.scale_range, rng
        )
        return {
            'image': image,
            'valid_size': np.array(valid_size, np.int32),
            'boxes': _to_length(boxes_K4, self.max_boxes, 0),
            'labels': _to_length(targets.labels[kept_M], self.max_boxes, -1),
            'index': np.array(index, np.int32),
            'dropped': np.array(max(0, len(boxes_K4) - self.max_boxes), np.int32),
        }


def _eval_batch(source: Source, indices: Sequence[int], image_size: tuple[int, int], batch_size: int) -> EvalBatch:
    examples = [source[index] for index in indices]
    resized = [transforms.resize_and_pad(_pixels(example), image_size) for example in examples]
    padding = batch_size - len(examples)
    images, valid_sizes, image_scales = zip(
        *resized, *[(np.zeros((*image_size, 3), np.uint8), (0, 0), 1.0)] * padding, strict=True
    )
    return EvalBatch(
        image=np.stack(images),
        valid_size=np.array(valid_sizes, np.int32),
        image_scale=np.array(image_scales, np.float32),
        mask=np.arange(batch_size) < len(examples),
        index=np.array([*indices, *[-1] * padding], np.int32),
        annotations=tuple(example.annotations for example in examples),
    )


def _pixels(example: Example) -> np.ndarray:
    if isinstance(example.image, bytes):
        return transforms.decode(example.image, example.annotations.file_name)
    return example.image


def _to_length(array: np.ndarray, length: int, fill: int) -> np.ndarray:
    padded = np.full((length, *array.shape[1:]), fill, array.dtype)
    padded[: len(array)] = array[:length]
    return padded


def _read(dataset: grain.MapDataset, threads: int, prefetch: int) -> grain.IterDataset:
    cv2.setNumThreads(1)  # the images are shared out among our threads; more of OpenCV's would fight them
    return dataset.to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=max(prefetch, threads)))
