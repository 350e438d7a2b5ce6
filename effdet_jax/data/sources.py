"""Where the data come from: `open_source('voc:data/bccd', 'trainval')`. One small class per origin.

    shapes                 drawn on the fly               split START:STOP, a range of indices
    tfds:NAME              a prepared TensorFlow dataset  split as TFDS writes it, 'train[:90%]'
    voc:ROOT               a PASCAL VOC folder            split: a file of ImageSets/Main, without .txt
    coco:JSON,IMAGES       a COCO file, an image folder   no split: another file is another source
    csv:FILE               a table                        no split
    A + B                  both, one after the other      for all parts that name none themselves: KIND:ARGS@SPLIT

A new origin is a function or class with the members of `Source` and a line in `_KINDS`.
"""

import bisect
import itertools
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from effdet_jax.data import annotation_files, checks, shapes, transforms
from effdet_jax.data.example import Annotations, Example
from effdet_jax.errors import UserError


@runtime_checkable
class Source(Protocol):
    """Random access to examples from several threads.

    class_names: in the order of the labels. category_ids: the number each class has outside, in COCO results; 1..K
    where the origin has none. notes: lines about the labels that were mended, for the user to read once.
    """

    class_names: tuple[str, ...]
    category_ids: tuple[int, ...]
    notes: tuple[str, ...]

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> Example: ...
    def annotations(self, index: int, /) -> Annotations:
        """What is known of one image, without decoding it."""
        ...


def open_source(spec: str, split: str = '', class_names: Sequence[str] = ()) -> Source:
    """Opens what `spec` names, see the head of this file.

    A `split` that is itself a source ('coco:val.json,val2017', 'tfds:voc/2007@test') is opened in place of `spec`.
    `class_names` fixes the classes and their order; without it they come from the data. Raises UserError where
    something is missing or malformed.
    """
    spec, split = resolve_split(spec, split)
    parts = [_open_part(part.strip(), split, tuple(class_names)) for part in spec.split(' + ')]
    for part, text in zip(parts, spec.split(' + '), strict=True):
        if part.class_names != parts[0].class_names:
            raise UserError(
                f'{text.strip()} has the classes {", ".join(part.class_names)} and {spec.split(" + ")[0].strip()} has '
                f'{", ".join(parts[0].class_names)}: name the classes for both in class_names'
            )
    return parts[0] if len(parts) == 1 else Concatenated(parts)


def resolve_split(source: str, split: str) -> tuple[str, str]:
    """(spec, split) to open: `split` itself as the spec where it is a source, else both as they are."""
    return (split, '') if re.match(rf'({"|".join(_KINDS)})([:@]|$)', split) else (source, split)


class Shapes:
    """The embedded dataset, pictures START to STOP - 1."""

    class_names = shapes.CLASS_NAMES
    category_ids = tuple(range(1, len(shapes.CLASS_NAMES) + 1))
    notes = ()

    def __init__(self, start: int, stop: int):
        self._indices = range(start, stop)

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> Example:
        return shapes.draw(self._indices[index])

    def annotations(self, index: int) -> Annotations:
        """What is covered or outside is known only once the picture is drawn: this takes as long as the picture."""
        return self[index].annotations


class Tfds:
    """A dataset prepared by tensorflow_datasets, with features `image` and `objects {bbox, label, ...}`.

    Read from its files alone: no TensorFlow, no network, not the code that made the dataset. Boxes are cleaned as they
    are read, because their pixels are known only then.
    """

    notes = ()

    def __init__(self, name: str, split: str, class_names: Sequence[str] = ()):
        builder = _prepared(name)
        self._records = _tfds_records(builder, name, split)
        self._where = f'tfds:{name}@{split}'
        names = tuple(builder.info.features['objects']['label'].names)
        self.class_names = tuple(class_names) or names
        self.category_ids = tuple(range(1, len(self.class_names) + 1))
        # -1 stands for a class that `class_names` leaves out
        self._names = names
        self._label_of = np.array([self.class_names.index(n) if n in self.class_names else -1 for n in names], np.int32)

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Example:
        record = self._records[index]
        image, objects = record['image'], record['objects']
        file_name = _decoded(record.get('image/filename', ''))
        where = f'{self._where}, {file_name or f"image {index}"}'
        height, width = transforms.image_size(image, where) if isinstance(image, bytes) else image.shape[:2]
        boxes_M4 = np.asarray(objects['bbox'], np.float32).reshape(-1, 4)
        given = np.asarray(objects['label'], np.int64)
        labels_M = self._label_of[given]
        if (labels_M < 0).any():
            raise UserError(
                f'{where}: label {self._names[given[labels_M < 0][0]]!r} is not among the class names '
                f'({", ".join(self.class_names)}): add it there'
            )
        annotations = Annotations(
            image_id=int(record['image/id']) if 'image/id' in record else Path(file_name).stem or index,
            file_name=where,
            boxes_yxyx=boxes_M4 * np.array([height, width, height, width], np.float32),
            labels=labels_M,
            areas=np.asarray(objects.get('area', [np.nan] * len(given)), np.float32),
            is_crowd=np.asarray(objects.get('is_crowd', [False] * len(given)), bool),
            is_difficult=np.asarray(objects.get('is_difficult', [False] * len(given)), bool),
        )
        return Example(image, checks.clean(annotations, (height, width))[0])

    def annotations(self, index: int) -> Annotations:
        """The record is read, the image in it is not decoded."""
        return self[index].annotations


class Concatenated:
    """Several sources of the same classes, one after the other."""

    def __init__(self, parts: Sequence[Source]):
        self.class_names, self.category_ids = parts[0].class_names, parts[0].category_ids
        self.notes = tuple(note for part in parts for note in part.notes)
        self._parts = parts
        self._ends = list(itertools.accumulate(len(part) for part in parts))

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> Example:
        part, index = self._locate(index)
        return part[index]

    def annotations(self, index: int) -> Annotations:
        """As the part does it."""
        part, index = self._locate(index)
        return part.annotations(index)

    def _locate(self, index: int) -> tuple[Source, int]:
        index = range(len(self))[index]
        number = bisect.bisect_right(self._ends, index)
        return self._parts[number], index - self._ends[number] + len(self._parts[number])


def _open_part(text: str, split: str, class_names: tuple[str, ...]) -> Source:
    kind = re.split('[:@]', text)[0]
    arguments = text[len(kind) :].removeprefix(':')  # 'shapes@0:100' has none but a split
    if kind not in _KINDS:
        raise UserError(f'{text!r} is no data source: write {_GRAMMAR}')
    return _KINDS[kind](arguments, split, class_names)


def _open_shapes(arguments: str, split: str, class_names: tuple[str, ...]) -> Shapes:
    arguments, split = _take_split(arguments, split)
    match = re.fullmatch(r'(\d+):(\d+)', split)
    if arguments or match is None or int(match[1]) >= int(match[2]):
        raise UserError(f'shapes{arguments and ":"}{arguments} has no split {split!r}: write START:STOP, as in 0:2000')
    if class_names and class_names != shapes.CLASS_NAMES:
        raise UserError(f'the classes of shapes are {", ".join(shapes.CLASS_NAMES)}, not {", ".join(class_names)}')
    return Shapes(int(match[1]), int(match[2]))


def _open_tfds(arguments: str, split: str, class_names: tuple[str, ...]) -> Tfds:
    return Tfds(*_take_split(arguments, split), class_names)


def _open_coco(arguments: str, split: str, class_names: tuple[str, ...]) -> annotation_files.AnnotatedFiles:
    _no_split('coco', split)
    json_file, comma, images = arguments.partition(',')
    if not (json_file and comma and images):
        raise UserError(f'coco:{arguments}: write coco:JSON,IMAGES, as in coco:instances_val2017.json,val2017')
    return annotation_files.open_coco(Path(json_file).expanduser(), Path(images).expanduser(), class_names)


def _open_voc(arguments: str, split: str, class_names: tuple[str, ...]) -> annotation_files.AnnotatedFiles:
    root, split = _take_split(arguments, split)
    return annotation_files.open_voc(Path(root).expanduser(), split, class_names)


def _open_csv(arguments: str, split: str, class_names: tuple[str, ...]) -> annotation_files.AnnotatedFiles:
    _no_split('csv', split)
    return annotation_files.open_csv(Path(arguments).expanduser(), class_names)


def _take_split(arguments: str, split: str) -> tuple[str, str]:
    """'voc/2007@test' -> ('voc/2007', 'test'); an @ before a slash is part of a path."""
    head, at, tail = arguments.rpartition('@')
    return (head, tail) if at and '/' not in tail else (arguments, split)


def _no_split(kind: str, split: str) -> None:
    if split:
        raise UserError(f"{kind}: knows no split, got {split!r}: set it to '' or to another source, {_GRAMMAR}")


def _prepared(name: str) -> Any:
    """The builder of a dataset on this disk, made from its metadata.

    `tfds.builder` would run the dataset's own code instead, which for some (coco) needs TensorFlow.
    """
    from tensorflow_datasets.core import read_only_builder  # takes half a second: only those who need it

    data_dir = os.environ.get('TFDS_DATA_DIR') or '~/tensorflow_datasets'
    try:
        return read_only_builder.builder_from_files(name, data_dir=str(Path(data_dir).expanduser()))
    except ValueError as error:  # not found, or not a name
        raise UserError(
            f'{name} is not prepared in {data_dir}, run: pip install -r requirements-tensorflow.txt && python -c '
            f"'import tensorflow_datasets as tfds; "
            f'tfds.builder("{name}", file_format="array_record").download_and_prepare()\''
        ) from error


def _tfds_records(builder: Any, name: str, split: str) -> Sequence[dict[str, Any]]:
    from tensorflow_datasets.core import decode

    features = builder.info.features
    objects = getattr(features['objects'], 'feature', {}) if 'objects' in features else {}
    if 'image' not in features or not {'bbox', 'label'} <= set(objects):
        raise UserError(f'{name} has the features {", ".join(features)}: needed are image and objects {{bbox, label}}')
    if not split:
        raise UserError(f'tfds:{name} needs a split: choose one of {", ".join(builder.info.splits)}')
    try:
        return builder.as_data_source(split=split, decoders={'image': decode.SkipDecoding()})
    except NotImplementedError as error:
        raise UserError(
            f'{name} in {builder.data_dir} is stored as {builder.info.file_format.value}, which cannot be read at '
            f'random, run: pip install -r requirements-tensorflow.txt && tfds convert_format --dataset_version_dir='
            f'{builder.data_dir} --out_file_format=array_record'
        ) from error
    except (ValueError, KeyError) as error:
        splits = ', '.join(builder.info.splits)
        raise UserError(f'tfds:{name} has no images in split {split!r}: choose of {splits}, or train[:90%]') from error


def _decoded(text: str | bytes) -> str:
    return text.decode() if isinstance(text, bytes) else text


_KINDS: dict[str, Callable[[str, str, tuple[str, ...]], Source]] = {
    'shapes': _open_shapes,
    'tfds': _open_tfds,
    'coco': _open_coco,
    'voc': _open_voc,
    'csv': _open_csv,
}
_GRAMMAR = 'shapes, tfds:NAME, voc:ROOT, coco:JSON,IMAGES or csv:FILE'
