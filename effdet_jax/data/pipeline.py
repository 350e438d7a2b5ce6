"""From a source to batches: shuffled and endless for training, each image once for evaluation. Grain does the reading.

What a batch holds is a function of (seed, position) alone: the images of all epochs stand in one endless row, of every
global batch host h of n takes the h-th of n parts, and random numbers depend on the place in the row. So a position is
one integer, and neither the number of threads nor that of hosts changes what is learned from.
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
    cache_bytes: int = 0,
) -> grain.IterDataset:
    """Endless batches of `batch_size` images (of this host), shuffled anew in every epoch, jittered.

    A batch is a dict: `image` uint8 [B, H, W, 3] with zeros at bottom and right, `valid_size` int32 [B, 2], `boxes`
    float32 [B, M, 4] yxyx in network pixels, `labels` int32 [B, M] with -1 as padding, `index` int32 [B] into the
    source, `dropped` int32 [B]: how many boxes were left out because there were more than M = `max_boxes` (the first
    M are kept), `unreadable` int32 [B]: the index of an image that cannot be read and was replaced by the next one, or
    -1 (`Unreadable` names and limits them). Crowds are no targets and are left out, difficult objects are kept.

    An iterator's `get_state()` is {'next_index': number of the next batch}; `set_state` continues there, bit for bit.
    `threads` prepare up to `prefetch` batches ahead, at least one each; with 0 threads nothing is prepared ahead.
    `cache_bytes`: decoded images to keep in memory (`Reader`); what the batches hold does not depend on it.
    """
    assemble = _Assemble(Reader(source, cache_bytes), image_size, max_boxes)
    dataset = grain.MapDataset.range(len(source)).seed(seed).shuffle().repeat().random_map(_Draw(scale_range))
    # Shared out after all that is random, in blocks: the hosts' devices in a row see what those of one host would see.
    # (drop_remainder: without it Grain rounds the length of the endless row up to more than an integer holds.)
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
class _Draw(grain.transforms.RandomMap):
    """Index -> (index, the random numbers of its place in the row)."""

    scale_range: tuple[float, float]

    def random_map(self, index: int, rng: np.random.Generator) -> tuple[int, jitter.Jitter]:
        return index, jitter.draw(self.scale_range, rng)


@dataclasses.dataclass(frozen=True)
class _Assemble:
    """What was drawn for each image -> a batch, in whose one array of pixels the images are resized."""

    reader: Reader
    image_size: tuple[int, int]
    max_boxes: int

    def __call__(self, drawn: Sequence[tuple[int, jitter.Jitter]]) -> dict[str, np.ndarray]:
        size, most = len(drawn), self.max_boxes
        batch = {
            'image': np.empty((size, *self.image_size, 3), np.uint8),
            'valid_size': np.empty((size, 2), np.int32),
            'boxes': np.zeros((size, most, 4), np.float32),
            'labels': np.full((size, most), -1, np.int32),
            'index': np.empty(size, np.int32),
            'unreadable': np.full(size, -1, np.int32),
            'dropped': np.empty(size, np.int32),
        }
        for i, (index, draws) in enumerate(drawn):
            place = functools.partial(jitter.place, image_size=self.image_size, jitter=draws)
            used, (where, pixels, annotations) = _readable(self.reader, index, place)
            batch['valid_size'][i] = transforms.fill(batch['image'][i], pixels, where.scaled, where.corner)
            targets = annotations.select(~annotations.is_crowd)
            boxes_K4, kept_M = jitter.move_boxes(targets.boxes_yxyx, where, self.image_size)
            count = min(len(boxes_K4), most)
            batch['boxes'][i, :count] = boxes_K4[:count]
            batch['labels'][i, :count] = targets.labels[kept_M][:count]
            batch['dropped'][i] = len(boxes_K4) - count
            batch['index'][i] = used
            if used != index:
                batch['unreadable'][i] = index
        return batch


def _readable(
    reader: Reader, index: int, place: Callable[[tuple[int, int]], jitter.Place]
) -> tuple[int, tuple[jitter.Place, np.ndarray, Annotations]]:
    """(index, what is read) of the image, or of the first after it that can be read: the same at every visit."""
    reasons = []
    for step in range(min(REPLACEMENTS + 1, len(reader))):
        candidate = (index + step) % len(reader)
        try:
            return candidate, reader.read(candidate, place)
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
    images = np.zeros((batch_size, *image_size, 3), np.uint8)
    rest = [_resized_into(image, source, index) for image, index in zip(images, indices, strict=False)]
    padding = batch_size - len(rest)
    valid_sizes, image_scales, annotations, errors = zip(*rest, *[_nothing(None, '')] * padding, strict=True)
    return EvalBatch(
        image=images,
        valid_size=np.array(valid_sizes, np.int32),
        image_scale=np.array(image_scales, np.float32),
        mask=np.arange(batch_size) < len(rest),
        index=np.array([*indices, *[-1] * padding], np.int32),
        annotations=annotations[: len(rest)],
        errors=errors[: len(rest)],
    )


def _resized_into(out: np.ndarray, source: Source, index: int) -> tuple:
    """An evaluated image is not replaced: another would be counted twice, and its own objects not at all."""
    try:
        pixels, annotations = load(source, index)
    except UnreadableError as error:
        return _nothing(source.annotations(index), str(error))
    _, valid_size, image_scale = transforms.resize_and_pad(pixels, (out.shape[0], out.shape[1]), out)
    return valid_size, image_scale, annotations, ''


def _nothing(annotations: Annotations | None, error: str) -> tuple:
    return (0, 0), 1.0, annotations, error


def _read(dataset: grain.MapDataset, threads: int, prefetch: int) -> grain.IterDataset:
    cv2.setNumThreads(1)  # the images are shared out among our threads; more of OpenCV's would fight them
    return dataset.to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=max(prefetch, threads)))
