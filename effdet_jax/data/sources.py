"""Data sources: `open_source('voc:data/bccd', 'trainval')`. One small class per kind.

    shapes                 generated on the fly           split START:STOP, a range of indices
    tfds:NAME              a prepared TensorFlow dataset  split in the syntax of TFDS, 'train[:90%]'
    voc:ROOT               a PASCAL VOC folder            split: a file in ImageSets/Main, without .txt
    coco:JSON,IMAGES       a COCO file, an image folder   no split: use another file instead
    csv:FILE               a table                        no split
    A + B                  concatenation                  split for all parts without their own, KIND:ARGS@SPLIT

To add a kind, write a class with the members of `CheckableSource` and a line in `_KINDS`.
"""

import bisect
import itertools
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import UInt8

from effdet_jax.data import shapes
from effdet_jax.data.annotation_files import AnnotatedFiles
from effdet_jax.data.checks import KINDS, Finding
from effdet_jax.data.example import Annotations, Example
from effdet_jax.data.listing import ImageRow, Listing, Track, digest, join, list_some
from effdet_jax.data.read_coco import read_coco
from effdet_jax.data.read_csv import read_csv
from effdet_jax.data.read_voc import read_voc
from effdet_jax.data.tfds_source import Tfds
from effdet_jax.errors import UserError


@runtime_checkable
class Source(Protocol):
    """Thread-safe random access to examples, for training and evaluation.

    class_names: in the order of the labels. category_ids: the external id of each class, for COCO results; 1..K if the
    data define none.
    """

    class_names: tuple[str, ...]
    category_ids: tuple[int, ...]

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> Example:
        """One image with cleaned annotations. Raises UnreadableError if the image is unreadable or of another size."""
        ...

    def annotations(self, index: int, /) -> Annotations:
        """The cleaned annotations of one image, without decoding it."""
        ...


@runtime_checkable
class CheckableSource(Source, Protocol):
    """A source that can be checked for faults. faults: annotations that could not be read."""

    faults: tuple[Finding, ...]

    def image(self, index: int, /) -> bytes | UInt8[np.ndarray, 'H W 3']:
        """One image, encoded and unchecked, or RGB."""
        ...

    def listing(self, max_images: int, track: Track) -> Listing:
        """All annotations, uncleaned. Samples about `max_images` images if it has to read or render each of them."""
        ...

    def fingerprint(self) -> str:
        """The result of `data.fingerprint`."""
        ...


def fingerprint(source: CheckableSource) -> str:
    """32 hex digits, equal for sources with the same images and annotations in the same order. Reads no image.

    It covers the class names, file names, boxes and labels of annotated files, but not their folder; the name, version,
    split and length of a prepared dataset; and the range of generated images.
    """
    return source.fingerprint()


def open_source(
    spec: str, split: str = '', class_names: Sequence[str] = (), *, faulty: bool = False
) -> CheckableSource:
    """Opens a source, with the syntax at the top of this file.

    A `split` that is itself a source ('coco:val.json,val2017', 'tfds:voc/2007@test') replaces `spec`. `class_names`
    sets the classes and their order; by default they come from the data. Raises UserError if something is missing or
    malformed; with `faulty`, only if nothing can be read at all.
    """
    spec, split = resolve_split(spec, split)
    if not spec:
        raise UserError(f'no data source is given: set config.dataset.source to {_GRAMMAR}')
    # A folder may be called 'a + b', so split only where a kind follows.
    texts = [text.strip() for text in re.split(rf' \+ (?=\s*{_KIND})', spec)]
    parts = [_open_part(text, split, tuple(class_names)) for text in texts]
    for part, text in zip(parts, texts, strict=True):
        if part.class_names != parts[0].class_names:
            raise UserError(
                f'{text} has the classes {", ".join(part.class_names)}, but {texts[0]} has '
                f'{", ".join(parts[0].class_names)}: list the classes of both in config.dataset.class_names'
            )
    source = parts[0] if len(parts) == 1 else Concatenated(parts)
    errors = [fault for fault in source.faults if KINDS[fault.kind].severity == 'error']
    if errors and not faulty:
        others = len(errors) - 1
        more = f' ({others} more {"error" if others == 1 else "errors"}; check-data lists all)' if others else ''
        raise UserError(errors[0].message + more)
    return source


def resolve_split(source: str, split: str) -> tuple[str, str]:
    """(spec, split) to open: (split, '') if the split is itself a source, else both unchanged."""
    return (split, '') if re.match(_KIND, split) else (source, split)


class Shapes:
    """Images START to STOP - 1 of the built-in dataset."""

    class_names = shapes.CLASS_NAMES
    category_ids = tuple(range(1, len(shapes.CLASS_NAMES) + 1))
    faults = ()

    def __init__(self, start: int, stop: int):
        self._indices = range(start, stop)

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> Example:
        return shapes.draw(self._indices[index])

    def image(self, index: int) -> bytes | np.ndarray:
        return self[index].image

    def annotations(self, index: int) -> Annotations:
        """Takes as long as drawing the image, because visibility is known only then."""
        return self[index].annotations

    def listing(self, max_images: int, track: Track) -> Listing:
        return list_some(self._read, self.class_names, self.category_ids, len(self), max_images, track)

    def fingerprint(self) -> str:
        return digest('shapes', self._indices)

    def _read(self, index: int) -> tuple[ImageRow, Annotations]:
        annotations, (height, width, _) = (example := self[index]).annotations, np.shape(example.image)
        name = f'shapes, image {annotations.image_id}'
        return ImageRow(annotations.image_id, name, f'{name}: object ', (height, width)), annotations


class Concatenated:
    """Several sources with the same classes, one after the other."""

    def __init__(self, parts: Sequence[CheckableSource]):
        self.class_names, self.category_ids = parts[0].class_names, parts[0].category_ids
        self.faults = tuple(fault for part in parts for fault in part.faults)
        self._parts = parts
        self._ends = list(itertools.accumulate(len(part) for part in parts))

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> Example:
        part, index = self._locate(index)
        return part[index]

    def image(self, index: int) -> bytes | np.ndarray:
        part, index = self._locate(index)
        return part.image(index)

    def annotations(self, index: int) -> Annotations:
        part, index = self._locate(index)
        return part.annotations(index)

    def listing(self, max_images: int, track: Track) -> Listing:
        listings = [part.listing(-(-max_images // len(self._parts)), track) for part in self._parts]
        return join(listings, [len(part) for part in self._parts])

    def fingerprint(self) -> str:
        return digest([part.fingerprint() for part in self._parts])

    def _locate(self, index: int) -> tuple[CheckableSource, int]:
        index = range(len(self))[index]
        number = bisect.bisect_right(self._ends, index)
        return self._parts[number], index - self._ends[number] + len(self._parts[number])


def _open_part(text: str, split: str, class_names: tuple[str, ...]) -> CheckableSource:
    kind = re.split('[:@]', text)[0]
    arguments = text[len(kind) :].removeprefix(':')  # 'shapes@0:100' has only a split
    if kind not in _KINDS:
        raise UserError(f'{text!r} is not a data source: use {_GRAMMAR}')
    return _KINDS[kind](arguments, split, class_names)


def _open_shapes(arguments: str, split: str, class_names: tuple[str, ...]) -> Shapes:
    arguments, split = _take_split(arguments, split)
    match = re.fullmatch(r'(\d+):(\d+)', split)
    if arguments or match is None or int(match[1]) >= int(match[2]):
        raise UserError(f'shapes{arguments and ":"}{arguments} has no split {split!r}: use START:STOP, as in 0:2000')
    if class_names and class_names != shapes.CLASS_NAMES:
        raise UserError(f'the classes of shapes are {", ".join(shapes.CLASS_NAMES)}, not {", ".join(class_names)}')
    return Shapes(int(match[1]), int(match[2]))


def _open_tfds(arguments: str, split: str, class_names: tuple[str, ...]) -> Tfds:
    return Tfds(*_take_split(arguments, split), class_names)


def _open_coco(arguments: str, split: str, class_names: tuple[str, ...]) -> AnnotatedFiles:
    _no_split('coco', split)
    commas = [at for at, character in enumerate(arguments) if character == ',']
    texts = [(arguments[:at].strip(), arguments[at + 1 :].strip()) for at in commas]
    if not any(json_file and images for json_file, images in texts):
        raise UserError(f'coco:{arguments}: use coco:JSON,IMAGES, as in coco:instances_val2017.json,val2017')
    # Paths may contain commas: prefer the comma between an existing file and an existing folder.
    pairs = [(_path(json_file), _path(images)) for json_file, images in texts if json_file and images]
    json_file, images = max(pairs, key=lambda pair: (pair[0].is_file(), pair[1].is_dir()))
    return AnnotatedFiles(read_coco(json_file, images, class_names))


def _open_voc(arguments: str, split: str, class_names: tuple[str, ...]) -> AnnotatedFiles:
    if not _path(arguments).is_dir():  # a folder name may contain an @
        arguments, split = _take_split(arguments, split)
    return AnnotatedFiles(read_voc(_path(arguments), split, class_names))


def _open_csv(arguments: str, split: str, class_names: tuple[str, ...]) -> AnnotatedFiles:
    _no_split('csv', split)
    return AnnotatedFiles(read_csv(_path(arguments), class_names))


def _take_split(arguments: str, split: str) -> tuple[str, str]:
    """'voc/2007@test' -> ('voc/2007', 'test'); an @ before a slash is part of a path."""
    head, at, tail = arguments.rpartition('@')
    return (head, tail) if at and '/' not in tail else (arguments, split)


def _path(text: str) -> Path:
    return Path(os.path.expanduser(text))  # noqa: PTH111  # Path.expanduser raises for unknown users


def _no_split(kind: str, split: str) -> None:
    if split:
        raise UserError(f"{kind} has no splits, got {split!r}: use '' or another source, {_GRAMMAR}")


_KINDS: dict[str, Callable[[str, str, tuple[str, ...]], CheckableSource]] = {
    'shapes': _open_shapes,
    'tfds': _open_tfds,
    'coco': _open_coco,
    'voc': _open_voc,
    'csv': _open_csv,
}
_KIND = rf'(?:{"|".join(_KINDS)})(?:[:@\s]|$)'  # the start of a source
_GRAMMAR = 'shapes, tfds:NAME, voc:ROOT, coco:JSON,IMAGES or csv:FILE'
