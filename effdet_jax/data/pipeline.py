"""Batches from a source, read by Grain: endless and shuffled for training, each image once for evaluation.

A training batch is a function of (seed, position). The images of all epochs form one endless sequence, cut into global
batches, of which host h of n takes the h-th of n parts. Random numbers depend on the position in that sequence. So the
position is a single integer, and the data do not depend on the number of threads or hosts.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence

import cv2
import grain
import numpy as np
from jaxtyping import Bool, Float, Int, UInt8

from effdet_jax.data import jitter, transforms
from effdet_jax.data.checks import first_few
from effdet_jax.data.example import Annotations
from effdet_jax.data.reader import Reader
from effdet_jax.data.sources import Source
from effdet_jax.errors import UnreadableError, UserError

REPLACEMENTS = 10  # images tried after an unreadable one; a longer run of unreadable images is an error


@dataclasses.dataclass(frozen=True)
class EvalBatch:
    """A batch of evaluation images. Padding comes last, with `mask` False and `index` -1.

    image_scale: factor from network pixels to original pixels. index: position in the source. annotations: of the
    images without the padding, in original pixels, with crowds and without cropping. errors: for the same images, '' or
    why the image cannot be read; such an image is black and has valid_size 0.
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
        """The arrays for the device: everything but annotations and errors."""
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
    cache_bytes: int = 0,
) -> grain.IterDataset:
    """Endless jittered batches of `batch_size` images for this host, reshuffled in every epoch.

    Each batch is a dict:
        image: uint8 [B, H, W, 3], zero-padded at the bottom and right.
        valid_size: int32 [B, 2], the (height, width) without padding.
        boxes: float32 [B, M, 4] yxyx in network pixels. Crowds are left out, difficult objects are included.
        labels: int32 [B, M], -1 for padding.
        index: int32 [B], the position in the source.
        dropped: int32 [B], the number of boxes left out because an image has more than M = `max_boxes`.
        unreadable: int32 [B], the index of an unreadable image that was replaced by the next one, or -1.

    The state of an iterator is {'next_index': number of the next batch}; `set_state` resumes there, bit for bit.
    `threads` prepare up to `prefetch` batches ahead, at least one each; with 0 threads nothing is prefetched.
    `cache_bytes` limits the decoded images kept in memory (`Reader`), without effect on the batches.
    """
    assemble = _Assemble(Reader(source, cache_bytes), image_size, max_boxes)
    dataset = grain.MapDataset.range(len(source)).seed(seed).shuffle().repeat().random_map(_Draw(scale_range))
    # Batches are dealt to the hosts after all random steps, so that the result does not depend on the number of hosts.
    # Without drop_remainder, Grain rounds up the length of the endless sequence and overflows an integer.
    batches = dataset.batch(batch_size, drop_remainder=True, batch_fn=assemble)[host::num_hosts]
    return _read(batches, threads, prefetch)


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
    """Yields every image of the source once over all hosts. Every host yields the same number of batches."""
    per_host = -(-len(source) // num_hosts)
    indices = range(host, len(source), num_hosts)

    def load_batch(batch: int) -> EvalBatch:
        return _eval_batch(source, indices[batch * batch_size : (batch + 1) * batch_size], image_size, batch_size)

    return iter(_read(grain.MapDataset.range(-(-per_host // batch_size)).map(load_batch), threads, prefetch))


class Unreadable:
    """Counts the unreadable images of this host. Reports each one once, and ends the run if there are too many.

    All of them are known after one epoch, which reads every image once.
    """

    def __init__(self, source: Source, limit: float, log: Callable[[str], None]) -> None:
        """`limit`: the allowed share of unreadable images. `log` prints a line."""
        self._source, self._limit, self._log = source, limit, log
        self._reasons: dict[int, str] = {}

    def count(self, unreadable: Int[np.ndarray, 'B']) -> int:
        """Returns the number of replaced images in a batch, given its `unreadable`.

        Raises UserError if the share of unreadable images exceeds the limit.
        """
        indices = unreadable[unreadable >= 0].tolist()
        for index in indices:
            if index not in self._reasons:
                self._reasons[index] = self._reason(index)
                self._log(f'warning: replaced by the next image: {self._reasons[index]}')
        check_unreadable(list(self._reasons.values()), len(self._source), self._limit)
        return len(indices)

    def _reason(self, index: int) -> str:
        try:
            load(self._source, index)
        except UnreadableError as error:
            return str(error)
        return f'image {index}: reading failed once, but works now: check the disk'


def check_unreadable(reasons: Sequence[str], total: int, limit: float) -> None:
    """Raises UserError if more than the share `limit` of `total` images cannot be read."""
    if len(reasons) > limit * total:
        raise UserError(
            f'{len(reasons)} of {total} images cannot be read, more than config.dataset.max_unreadable_fraction='
            f'{limit:g} allows: {first_few(reasons)} (check-data --images lists all)'
        )


@dataclasses.dataclass(frozen=True)
class _Draw(grain.transforms.RandomMap):
    """Index -> (index, random numbers for its position in the sequence)."""

    scale_range: tuple[float, float]

    def random_map(self, index: int, rng: np.random.Generator) -> tuple[int, jitter.Jitter]:
        return index, jitter.draw(self.scale_range, rng)


@dataclasses.dataclass(frozen=True)
class _Assemble:
    """Indices and random numbers -> a batch. Images are resized directly into its pixel array."""

    reader: Reader
    image_size: tuple[int, int]
    max_boxes: int

    def __call__(self, drawn: Sequence[tuple[int, jitter.Jitter]]) -> dict[str, np.ndarray]:
        size, max_boxes = len(drawn), self.max_boxes
        batch = {
            'image': np.empty((size, *self.image_size, 3), np.uint8),
            'valid_size': np.empty((size, 2), np.int32),
            'boxes': np.zeros((size, max_boxes, 4), np.float32),
            'labels': np.full((size, max_boxes), -1, np.int32),
            'index': np.empty(size, np.int32),
            'unreadable': np.full(size, -1, np.int32),
            'dropped': np.empty(size, np.int32),
        }
        for i, (index, draws) in enumerate(drawn):
            place = functools.partial(jitter.place, image_size=self.image_size, jitter=draws)
            used, (where, pixels, annotations) = _read_or_replace(self.reader, index, place)
            batch['valid_size'][i] = transforms.fill(batch['image'][i], pixels, where.scaled, where.corner)
            targets = annotations.select(~annotations.is_crowd)
            boxes_K4, kept_M = jitter.move_boxes(targets.boxes_yxyx, where, self.image_size)
            count = min(len(boxes_K4), max_boxes)
            batch['boxes'][i, :count] = boxes_K4[:count]
            batch['labels'][i, :count] = targets.labels[kept_M][:count]
            batch['dropped'][i] = len(boxes_K4) - count
            batch['index'][i] = used
            if used != index:
                batch['unreadable'][i] = index
        return batch


def _read_or_replace(
    reader: Reader, index: int, place: Callable[[tuple[int, int]], jitter.Place]
) -> tuple[int, tuple[jitter.Place, np.ndarray, Annotations]]:
    """(index, result of reading) of the image, or of the first readable image after it."""
    reasons = []
    for step in range(min(REPLACEMENTS + 1, len(reader))):
        candidate = (index + step) % len(reader)
        try:
            return candidate, reader.read(candidate, place)
        except UnreadableError as error:
            reasons.append(str(error))
    raise UserError(
        f'{len(reasons)} consecutive images from image {index} on cannot be read: {reasons[0]} '
        '(check-data --images lists all)'
    )


def load(source: Source, index: int) -> tuple[UInt8[np.ndarray, 'H W 3'], Annotations]:
    """(RGB, annotations) of one image. Raises UnreadableError if it is unreadable or not of the annotated size."""
    example = source[index]
    if isinstance(example.image, bytes):
        return transforms.decode(example.image, example.annotations.file_name), example.annotations
    return example.image, example.annotations


def _eval_batch(source: Source, indices: Sequence[int], image_size: tuple[int, int], batch_size: int) -> EvalBatch:
    images = np.zeros((batch_size, *image_size, 3), np.uint8)
    rows = [_load_into(image, source, index) for image, index in zip(images, indices, strict=False)]
    padding = batch_size - len(rows)
    valid_sizes, image_scales, annotations, errors = zip(*rows, *[_black(None, '')] * padding, strict=True)
    return EvalBatch(
        image=images,
        valid_size=np.array(valid_sizes, np.int32),
        image_scale=np.array(image_scales, np.float32),
        mask=np.arange(batch_size) < len(rows),
        index=np.array([*indices, *[-1] * padding], np.int32),
        annotations=annotations[: len(rows)],
        errors=errors[: len(rows)],
    )


def _load_into(out: np.ndarray, source: Source, index: int) -> tuple:
    """Unreadable images are not replaced here: evaluation must count every image once, with its own objects."""
    try:
        pixels, annotations = load(source, index)
    except UnreadableError as error:
        return _black(source.annotations(index), str(error))
    _, valid_size, image_scale = transforms.resize_and_pad(pixels, (out.shape[0], out.shape[1]), out)
    return valid_size, image_scale, annotations, ''


def _black(annotations: Annotations | None, error: str) -> tuple:
    return (0, 0), 1.0, annotations, error


def _read(dataset: grain.MapDataset, threads: int, prefetch: int) -> grain.IterDataset:
    cv2.setNumThreads(1)  # images are already processed in parallel, more threads would compete
    return dataset.to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=max(prefetch, threads)))
