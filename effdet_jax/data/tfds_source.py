"""Prepared TensorFlow datasets, read from their files without TensorFlow or network access."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from effdet_jax.configs import coco
from effdet_jax.data import checks, transforms
from effdet_jax.data.checks import Finding
from effdet_jax.data.example import Annotations, Example
from effdet_jax.data.listing import ImageRow, Listing, Track, category_ids, digest, list_some, unknown_label
from effdet_jax.errors import UnreadableError, UserError

UNKNOWN_SIZE = (512, 512)  # assumed for a damaged image, because boxes are stored as fractions of the size


class Tfds:
    """A dataset prepared by tensorflow_datasets, with features `image` and `objects {bbox, label, ...}`.

    Boxes are cleaned when they are read, because the size of the image is known only then.
    """

    faults = ()

    def __init__(self, name: str, split: str, class_names: Sequence[str] = ()):
        builder = _prepared(name)
        self._records = _tfds_records(builder, name, split)
        self._where = f'tfds:{name}@{split}'
        self._name, self._split = builder.info.full_name, split
        names = tuple(builder.info.features['objects']['label'].names)
        self.class_names = tuple(class_names) or names
        self.category_ids = _category_ids(self.class_names, names)
        # -1: a class that is not in `class_names`
        self._names = names
        self._label_of = np.array([self.class_names.index(n) if n in self.class_names else -1 for n in names], np.int32)

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Example:
        record = self._records[index]
        annotations, size, names = self._parse(record, index)
        if (annotations.labels < 0).any():
            raise UserError(self._unknown_label(annotations, names).message)
        return Example(record['image'], checks.clean(annotations, size))

    def image(self, index: int) -> bytes | np.ndarray:
        return self._records[index]['image']

    def annotations(self, index: int) -> Annotations:
        """Reads the record without decoding its image.

        If the header of the image is damaged, the boxes are in pixels of an image of UNKNOWN_SIZE.
        """
        try:
            return self[index].annotations
        except UnreadableError:
            annotations, size, _ = self._parse(self._records[index], index, UNKNOWN_SIZE)
            return checks.clean(annotations, size)

    def listing(self, max_images: int, track: Track) -> Listing:
        return list_some(self._read, self.class_names, self.category_ids, len(self), max_images, track)

    def fingerprint(self) -> str:
        """A digest of name, version and split, because a version never changes."""
        return digest(self.class_names, self._name, self._split, len(self))

    def _read(self, index: int) -> tuple[ImageRow, Annotations] | Finding:
        try:
            annotations, size, names = self._parse(self._records[index], index)
        except UnreadableError as error:
            return Finding('unreadable_image', f'{self._where}, record {index}', error.reason)
        if (annotations.labels < 0).any():
            return self._unknown_label(annotations, names)
        if not np.isfinite(annotations.boxes_yxyx).all():
            return Finding('malformed_annotation', annotations.file_name, 'a coordinate is not finite')
        name = annotations.file_name
        return ImageRow(annotations.image_id, name, f'{name}: object ', size, is_measured=True), annotations

    def _unknown_label(self, annotations: Annotations, names: Sequence[str]) -> Finding:
        label = names[int(np.argmin(annotations.labels))]
        detail = unknown_label(label, self.class_names)
        return Finding('unknown_label', annotations.file_name, detail, label=label)

    def _parse(
        self, record: Mapping[str, Any], index: int, size: tuple[int, int] | None = None
    ) -> tuple[Annotations, tuple[int, int], list[str]]:
        """(annotations with label -1 for unknown classes, size, names of the labels).

        `size` is (height, width), by default that of the image.
        """
        image, objects = record['image'], record['objects']
        file_name = _decoded(record.get('image/filename', ''))
        where = f'{self._where}, {file_name or f"image {index}"}'
        height, width = size or (transforms.image_size(image, where) if isinstance(image, bytes) else image.shape[:2])
        boxes_M4 = np.asarray(objects['bbox'], np.float32).reshape(-1, 4)
        labels_M = np.asarray(objects['label'], np.int64)
        annotations = Annotations(
            image_id=int(record['image/id']) if 'image/id' in record else Path(file_name).stem or index,
            file_name=where,
            boxes_yxyx=boxes_M4 * np.array([height, width, height, width], np.float32),
            labels=self._label_of[labels_M],
            areas=np.asarray(objects.get('area', [np.nan] * len(labels_M)), np.float32),
            is_crowd=np.asarray(objects.get('is_crowd', [False] * len(labels_M)), bool),
            is_difficult=np.asarray(objects.get('is_difficult', [False] * len(labels_M)), bool),
        )
        return annotations, (height, width), [self._names[label] for label in labels_M]


def _category_ids(class_names: Sequence[str], names: Sequence[str]) -> tuple[int, ...]:
    """1..K, or the non-contiguous ids of COCO, which a prepared dataset does not store."""
    if set(names) != set(coco.USED_NAMES):
        return tuple(range(1, len(class_names) + 1))
    return tuple(category_ids(class_names, dict(zip(coco.CLASS_NAMES, coco.CATEGORY_IDS, strict=True))))


def _prepared(name: str) -> Any:
    """The builder of a dataset on this disk, from its metadata.

    `tfds.builder` would run the code of the dataset, which needs TensorFlow for some, such as coco.
    """
    from tensorflow_datasets.core import read_only_builder  # takes half a second, so import only if needed

    data_dir = os.environ.get('TFDS_DATA_DIR') or '~/tensorflow_datasets'
    try:
        return read_only_builder.builder_from_files(name, data_dir=str(Path(data_dir).expanduser()))
    except ValueError as error:  # not found, or an invalid name
        raise UserError(
            f'{name} is not prepared in {data_dir}: run pip install -r requirements-tensorflow.txt && python -c '
            f"'import tensorflow_datasets as tfds; "
            f'tfds.builder("{name}", file_format="array_record").download_and_prepare()\''
        ) from error


def _tfds_records(builder: Any, name: str, split: str) -> Sequence[dict[str, Any]]:
    from tensorflow_datasets.core import decode

    features = builder.info.features
    objects = getattr(features['objects'], 'feature', {}) if 'objects' in features else {}
    if 'image' not in features or not {'bbox', 'label'} <= set(objects):
        raise UserError(
            f'{name} has the features {", ".join(features)}, but image and objects {{bbox, label}} are required: '
            'use another dataset'
        )
    if not split:
        raise UserError(f'tfds:{name} needs a split: choose one of {", ".join(builder.info.splits)}')
    try:
        return builder.as_data_source(split=split, decoders={'image': decode.SkipDecoding()})
    except NotImplementedError as error:
        raise UserError(
            f'{name} in {builder.data_dir} is stored as {builder.info.file_format.value}, without random access: '
            f'run pip install -r requirements-tensorflow.txt && tfds convert_format --dataset_version_dir='
            f'{builder.data_dir} --out_file_format=array_record'
        ) from error
    except (ValueError, KeyError) as error:
        splits = ', '.join(builder.info.splits)
        raise UserError(
            f'tfds:{name} has no images in split {split!r}: choose one of {splits}, or a part such as train[:90%]'
        ) from error


def _decoded(text: str | bytes) -> str:
    return text.decode() if isinstance(text, bytes) else text
