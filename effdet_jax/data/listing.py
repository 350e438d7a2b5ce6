"""All images and objects of a split in flat arrays, exactly as annotated: nothing is cleaned or clipped."""

import dataclasses
import hashlib
import math
import os
import re
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from effdet_jax.data.checks import Finding
from effdet_jax.data.example import Annotations

Track = Callable[[Iterable[Any], int, str], Iterable[Any]]  # (items, total, description): shows progress


class ImageRow(NamedTuple):
    """where: the location of an object without its number, as in 'a.xml: object ' or 'table.csv:'."""

    image_id: int | str
    file: str
    where: str
    size: tuple[int, int] = (0, 0)  # height, width; 0 if not annotated
    is_measured: bool = False  # whether the size was read from the image


class ObjectRow(NamedTuple):
    """image: position in the list of images. number: annotation id, line, or 1-based position in the file."""

    image: int
    box_yxyx: tuple[float, float, float, float]
    label: int
    number: int
    area: float = math.nan
    is_crowd: bool = False
    is_difficult: bool = False


@dataclasses.dataclass(frozen=True)
class Listing:
    """I images with M objects, ordered by image.

    indices: the positions of the images in their source. faults: entries that could not be read and are skipped.
    sampled: whether the listing covers only a sample of the images.
    """

    class_names: tuple[str, ...]
    category_ids: tuple[int, ...]
    images: tuple[ImageRow, ...]
    indices: Int[np.ndarray, 'I']
    sizes: Int[np.ndarray, 'I 2']
    image_of: Int[np.ndarray, 'M']
    boxes_yxyx: Float[np.ndarray, 'M 4']
    labels: Int[np.ndarray, 'M']
    numbers: Int[np.ndarray, 'M']
    areas: Float[np.ndarray, 'M']
    is_crowd: Bool[np.ndarray, 'M']
    is_difficult: Bool[np.ndarray, 'M']
    faults: tuple[Finding, ...]
    sampled: bool = False

    @property
    def starts(self) -> np.ndarray:
        """[I + 1] offsets: the objects of image i are starts[i]:starts[i + 1]."""
        return np.searchsorted(self.image_of, np.arange(len(self.images) + 1))

    def where(self, number: int) -> str:
        """The file of an object and its place there."""
        return f'{self.images[self.image_of[number]].where}{self.numbers[number]}'

    @property
    def fingerprint(self) -> str:
        """A digest of class names, file names and objects in order, independent of the folder of the images."""
        files = [os.path.normpath(image.file) for image in self.images]
        folder = os.path.commonpath({os.path.dirname(file) for file in files} or {''})  # noqa: PTH120
        names = [unicodedata.normalize('NFC', file.removeprefix(folder).lstrip(os.sep)) for file in files]
        arrays = (self.image_of, self.boxes_yxyx, self.labels, self.is_crowd, self.is_difficult)
        return digest(self.class_names, names, *arrays)


def make_listing(
    class_names: Sequence[str],
    category_ids: Sequence[int],
    images: Sequence[ImageRow],
    objects: Sequence[ObjectRow],
    faults: Sequence[Finding] = (),
) -> Listing:
    """Builds a listing. Sorts `objects` by image and keeps their order within an image."""
    columns = zip(*objects, strict=True) if objects else [()] * len(ObjectRow._fields)
    image_M, boxes, labels, numbers, areas, crowds, difficult = columns
    order_M = np.argsort(np.array(image_M, np.int64), kind='stable')
    return Listing(
        class_names=tuple(class_names),
        category_ids=tuple(category_ids),
        images=tuple(images),
        indices=np.arange(len(images)),
        sizes=np.array([image.size for image in images], np.int64).reshape(-1, 2),
        image_of=np.array(image_M, np.int64)[order_M],
        boxes_yxyx=np.array(boxes, np.float32).reshape(-1, 4)[order_M],
        labels=np.array(labels, np.int32)[order_M],
        numbers=np.array(numbers, np.int64)[order_M],
        areas=np.array(areas, np.float32)[order_M],
        is_crowd=np.array(crowds, bool)[order_M],
        is_difficult=np.array(difficult, bool)[order_M],
        faults=tuple(faults),
    )


def list_some(
    read: Callable[[int], tuple[ImageRow, Annotations] | Finding],
    class_names: Sequence[str],
    category_ids: Sequence[int],
    total: int,
    max_images: int,
    track: Track,
) -> Listing:
    """Lists up to `max_images` evenly spaced images of a source that has to read or render each of them."""
    images: list[ImageRow] = []
    objects: list[ObjectRow] = []
    faults: list[Finding] = []
    read_indices: list[int] = []
    indices = range(total) if total <= max_images else np.linspace(0, total - 1, max_images).astype(int).tolist()
    for index in track(indices, len(indices), 'reading annotations'):
        item = read(index)
        if isinstance(item, Finding):
            faults.append(item)
            continue
        row, a = item
        columns = (a.boxes_yxyx, a.labels, range(1, len(a.labels) + 1), a.areas, a.is_crowd, a.is_difficult)
        objects += [ObjectRow(len(images), *values) for values in zip(*columns, strict=True)]
        images.append(row)
        read_indices.append(index)
    listing = make_listing(class_names, category_ids, images, objects, faults)
    return dataclasses.replace(listing, indices=np.array(read_indices, np.int64), sampled=len(indices) < total)


def join(listings: Sequence[Listing], lengths: Sequence[int]) -> Listing:
    """Concatenates the listings of sources with these lengths and the same classes."""
    first_index = np.cumsum([0, *lengths])
    first_image = np.cumsum([0, *(len(listing.images) for listing in listings)])
    arrays = {
        field: np.concatenate([getattr(listing, field) for listing in listings])
        for field in ('sizes', 'boxes_yxyx', 'labels', 'numbers', 'areas', 'is_crowd', 'is_difficult')
    }
    image_of = [listing.image_of + first for listing, first in zip(listings, first_image, strict=False)]
    indices = [listing.indices + first for listing, first in zip(listings, first_index, strict=False)]
    return dataclasses.replace(
        listings[0],
        **arrays,
        image_of=np.concatenate(image_of),
        indices=np.concatenate(indices),
        images=tuple(image for listing in listings for image in listing.images),
        faults=tuple(fault for listing in listings for fault in listing.faults),
        sampled=any(listing.sampled for listing in listings),
    )


def digest(*parts: Any) -> str:
    """Hex digest of strings, sequences of strings, and arrays."""
    hasher = hashlib.blake2b(digest_size=16)
    for part in parts:
        content = part.tobytes() if isinstance(part, np.ndarray) else repr(part).encode('utf-8', 'backslashreplace')
        hasher.update(f'{type(part).__name__} {len(content)} '.encode() + content)
    return hasher.hexdigest()


def parse_numbers(values: Any, count: int) -> list[float]:
    """Parses `count` numbers of magnitude at most 1e12, so that box areas fit into float32. Raises ValueError."""
    try:
        numbers = [float(value) for value in values]
    except (TypeError, ValueError, OverflowError):
        numbers = []
    if len(numbers) != count or not all(abs(number) <= 1e12 for number in numbers):
        raise ValueError(f'expected {count} finite numbers, found {shortened(values)}')
    return numbers


def parse_image_size(height: Any, width: Any) -> tuple[int, int]:
    """The annotated (height, width), or (0, 0) if either is missing or not positive. Raises ValueError."""
    try:
        size = (int(float(height or 0)), int(float(width or 0)))
    except (TypeError, ValueError, OverflowError):
        size = None
    if size is None or max(size) >= 2**31:
        raise ValueError(f'the size {shortened(width)} x {shortened(height)} is not a valid number of pixels')
    return size if min(size) > 0 else (0, 0)


def parse_integer(value: Any, what: str = 'id') -> int:
    """Parses an integer, also from '7' or 7.0. Raises ValueError that names `what`."""
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    if isinstance(value, str) and re.fullmatch(r'\s*[+-]?[0-9]{1,4000}\s*', value):
        return int(value)
    if isinstance(value, float) and value.is_integer():
        return int(value)
    raise ValueError(f'its {what}, {shortened(value)}, is not an integer')


def parse_flag(value: Any, what: str) -> bool:
    """Parses a flag such as iscrowd: a bool, 0 or 1, also as a string. Raises ValueError that names `what`."""
    text = f'{value:g}' if isinstance(value, float) else '' if value is None else str(value).strip().lower()
    if text not in _FLAGS:
        raise ValueError(f'its {what}, {shortened(value)}, is neither 0 nor 1')
    return _FLAGS[text]


def category_ids(names: Sequence[str], id_of: Mapping[str, int]) -> list[int]:
    """The ids of the classes; classes without one get unused numbers."""
    unused = max(id_of.values(), default=0)
    return [id_of.get(name, unused + 1 + label) for label, name in enumerate(names)]


def unknown_label(label: str, names: Sequence[str]) -> str:
    """The detail of an unknown_label fault."""
    return f'label {shortened(label)} is not among the class names ({", ".join(names)})'


def shortened(value: Any, limit: int = 80) -> str:
    """`repr(value)`, cut off after `limit` characters."""
    text = repr(value)
    return text if len(text) <= limit else f'{text[:limit]}...'


_FLAGS = dict.fromkeys(('', '0', 'false', 'no', 'unspecified'), False) | dict.fromkeys(('1', 'true', 'yes'), True)
