"""From a source to batches: shuffled and endless for training, each image once for evaluation. Grain does the reading.

What a batch holds is a function of (seed, position) alone: the images of all epochs stand in one endless row, of every
global batch host h of n takes the h-th of n parts, and random numbers depend on the place in the row. So a position is
one integer, and neither the number of threads nor that of hosts changes what is learned from.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence

import cv2
import grain
import numpy as np
from jaxtyping import Bool, Float, Int, UInt8

from effdet_jax.data import transforms
from effdet_jax.data.checks import first_few
from effdet_jax.data.example import Annotations
from effdet_jax.data.sources import Source
from effdet_jax.errors import UnreadableError, UserError

REPLACEMENTS = 10  # so many images after one that cannot be read are tried; more in a row are no accident


@dataclasses.dataclass(frozen=True)
class EvalBatch:
    """A batch of evaluation images, in which padding has `mask` False and `index` -1.

    image_scale: multiply a box in network pixels by it to return to the original image. index: into the source.
    annotations: of the images that are no padding, which come first; original pixels, crowds included, nothing cut.
    errors: of the same images, '' or why the image cannot be read; it is then black, with a valid_size of 0.
    """

    image: UInt8[np.ndarray, 'B H W 3']
    valid_size: Int[np.ndarray, 'B 2']
    image_scale: Float[np.ndarray, 'B']
    mask: Bool[np.ndarray, 'B']
    index: Int[np.ndarray, 'B']
    annotations: tuple[Annotations, ...]
    errors: tuple[str, ...]

    @property
    def arrays(self) -> dict[str, np.ndarray]:
        """What goes to the device: everything but annotations and errors."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)[:-2]}


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
    M are kept), `unreadable` int32 [B]: the index of an image that cannot be read and was replaced by the next one, or
    -1 (`Unreadable` names and limits them). Crowds are no targets and are left out, difficult objects are kept.

    An iterator's `get_state()` is {'next_index': number of the next batch}; `set_state` continues there, bit for bit.
    `threads` prepare up to `prefetch` batches ahead, at least one each; with 0 threads nothing is prepared ahead.
    """
    to_element = _Train(source, image_size, scale_range, max_boxes)
    dataset = grain.MapDataset.range(len(source)).seed(seed).shuffle().repeat().random_map(to_element)
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

    def load_batch(batch: int) -> EvalBatch:
        return _eval_batch(source, mine[batch * batch_size : (batch + 1) * batch_size], image_size, batch_size)

    return iter(_read(grain.MapDataset.range(-(-per_host // batch_size)).map(load_batch), threads, prefetch))


class Unreadable:
    """The images of a source that could not be read so far: each is named once, and too many end the run.

    Every image is read once in an epoch, so after one epoch all are known. The host's own images are counted.
    """

    def __init__(self, source: Source, limit: float, say: Callable[[str], None]) -> None:
        """`limit`: the share of all images that may be unreadable. `say` prints a line."""
        self._source, self._limit, self._say = source, limit, say
        self._reasons: dict[int, str] = {}

    def count(self, unreadable: Int[np.ndarray, 'B']) -> int:
        """How many images of a batch were replaced, from its `unreadable`.

        Raises UserError when more than the limit's share of all images are known to be unreadable.
        """
        indices = unreadable[unreadable >= 0].tolist()
        for index in indices:
            if index not in self._reasons:
                self._reasons[index] = self._why(index)
                self._say(f'warning: replaced by the next image: {self._reasons[index]}')
        check_unreadable(list(self._reasons.values()), len(self._source), self._limit)
        return len(indices)

    def _why(self, index: int) -> str:
        try:
            load(self._source, index)
        except UnreadableError as error:
            return str(error)
        return f'image {index}: could not be read once, but can be read now: is the disk sound?'


def check_unreadable(reasons: Sequence[str], total: int, limit: float) -> None:
    """Raises UserError where more than the share `limit` of `total` images cannot be read."""
    if len(reasons) > limit * total:
        raise UserError(
            f'{len(reasons)} of {total} images cannot be read, more than config.dataset.max_unreadable={limit:g} '
            f'allows: {first_few(reasons)} (check_data --images finds all)'
        )


@dataclasses.dataclass(frozen=True)
class _Train(grain.transforms.RandomMap):
    """Index -> one element of a training batch."""

    source: Source
    image_size: tuple[int, int]
    scale_range: tuple[float, float]
    max_boxes: int

    def random_map(self, index: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
        used, pixels, annotations = _readable(self.source, index)
        targets = annotations.select(~annotations.is_crowd)
        image, valid_size, boxes_K4, kept_M = transforms.jitter_resize_crop(
            pixels, targets.boxes_yxyx, self.image_size, self.scale_range, rng
        )
        return {
            'image': image,
            'valid_size': np.array(valid_size, np.int32),
            'boxes': _to_length(boxes_K4, self.max_boxes, 0),
            'labels': _to_length(targets.labels[kept_M], self.max_boxes, -1),
            'index': np.array(used, np.int32),
            'unreadable': np.array(-1 if used == index else index, np.int32),
            'dropped': np.array(max(0, len(boxes_K4) - self.max_boxes), np.int32),
        }


def _readable(source: Source, index: int) -> tuple[int, np.ndarray, Annotations]:
    """(index, RGB, annotations) of the image, or of the first after it that can be read: the same at every visit."""
    reasons = []
    for step in range(min(REPLACEMENTS + 1, len(source))):
        candidate = (index + step) % len(source)
        try:
            return candidate, *load(source, candidate)
        except UnreadableError as error:
            reasons.append(str(error))
    raise UserError(
        f'{len(reasons)} images in a row cannot be read, from image {index} on; the first: {reasons[0]} '
        '(check_data --images finds all)'
    )


def load(source: Source, index: int) -> tuple[UInt8[np.ndarray, 'H W 3'], Annotations]:
    """(RGB, annotations) of one image; an UnreadableError where it cannot be read or is not the one annotated."""
    example = source[index]
    if isinstance(example.image, bytes):
        return transforms.decode(example.image, example.annotations.file_name), example.annotations
    return example.image, example.annotations


def _eval_batch(source: Source, indices: Sequence[int], image_size: tuple[int, int], batch_size: int) -> EvalBatch:
    loaded = [_resized(source, index, image_size) for index in indices]
    padding = batch_size - len(loaded)
    images, valid_sizes, image_scales, annotations, errors = zip(
        *loaded, *[_nothing(image_size, None, '')] * padding, strict=True
    )
    return EvalBatch(
        image=np.stack(images),
        valid_size=np.array(valid_sizes, np.int32),
        image_scale=np.array(image_scales, np.float32),
        mask=np.arange(batch_size) < len(loaded),
        index=np.array([*indices, *[-1] * padding], np.int32),
        annotations=annotations[: len(loaded)],
        errors=errors[: len(loaded)],
    )


def _resized(source: Source, index: int, image_size: tuple[int, int]) -> tuple:
    """An evaluated image is not replaced: another would be counted twice, and its own objects not at all."""
    try:
        pixels, annotations = load(source, index)
    except UnreadableError as error:
        return _nothing(image_size, source.annotations(index), str(error))
    return *transforms.resize_and_pad(pixels, image_size), annotations, ''


def _nothing(image_size: tuple[int, int], annotations: Annotations | None, error: str) -> tuple:
    return np.zeros((*image_size, 3), np.uint8), (0, 0), 1.0, annotations, error


def _to_length(array: np.ndarray, length: int, fill: int) -> np.ndarray:
    padded = np.full((length, *array.shape[1:]), fill, array.dtype)
    padded[: len(array)] = array[:length]
    return padded


def _read(dataset: grain.MapDataset, threads: int, prefetch: int) -> grain.IterDataset:
    cv2.setNumThreads(1)  # the images are shared out among our threads; more of OpenCV's would fight them
    return dataset.to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=max(prefetch, threads)))
