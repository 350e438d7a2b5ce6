"""Images in files, with annotations in a COCO JSON, a PASCAL VOC folder or a CSV table: all are one kind of source."""

import collections
import dataclasses
import os
from collections.abc import Iterable

import numpy as np

from effdet_jax.data import checks, transforms
from effdet_jax.data.example import Annotations, Example
from effdet_jax.data.listing import Listing, Track
from effdet_jax.errors import UnreadableError


class AnnotatedFiles:
    """Images in files and their annotations in memory, mended when the source is made. Thread safe."""

    def __init__(self, listing: Listing):
        self.class_names, self.category_ids = listing.class_names, listing.category_ids
        missing = [
            checks.Finding('missing_image', file, 'there is no such file', file)
            for file in missing_files(image.file for image in listing.images)
        ]
        self.faults = (*listing.faults, *missing)
        self._listing = dataclasses.replace(listing, faults=self.faults)
        sizes_M2 = listing.sizes[listing.image_of]
        boxes_M4, areas_M, keep_M = checks.mend_boxes(listing.boxes_yxyx, listing.areas, sizes_M2)
        self._objects = {
            'boxes_yxyx': boxes_M4[keep_M],
            'areas': areas_M[keep_M],
            **{name: getattr(listing, name)[keep_M] for name in ('labels', 'is_crowd', 'is_difficult')},
        }
        self._starts = np.searchsorted(listing.image_of[keep_M], np.arange(len(listing.images) + 1))

    def __len__(self) -> int:
        return len(self._listing.images)

    def __getitem__(self, index: int) -> Example:
        file, (height, width) = self._listing.images[index].file, self._listing.sizes[index]
        encoded, annotations = self.image(index), self._stated(index)
        size = transforms.image_size(encoded, file)
        if height == 0:
            return Example(encoded, checks.clean(annotations, size))
        if size != (height, width):
            stated = f'the image is {size[1]}x{size[0]}, its annotations say {width}x{height} (width x height)'
            raise UnreadableError(file, stated, checks.KINDS['another_size'].advice)
        return Example(encoded, annotations)

    def image(self, index: int) -> bytes:
        """The file alone, whatever is in it."""
        return transforms.read_bytes(self._listing.images[index].file)

    def annotations(self, index: int) -> Annotations:
        """The annotations of one image; the image is read only where they do not give its size.

        Where it cannot be read either, nothing is cut at bottom and right.
        """
        if self._listing.sizes[index, 0] > 0:
            return self._stated(index)
        try:
            return self[index].annotations
        except UnreadableError:
            return self._stated(index)

    def listing(self, most: int, track: Track) -> Listing:
        """All of it: it is in memory."""
        return self._listing

    def fingerprint(self) -> str:
        """Of file names and annotations."""
        return self._listing.fingerprint

    def _stated(self, index: int) -> Annotations:
        image, objects = self._listing.images[index], slice(*self._starts[index : index + 2])
        return Annotations(
            image_id=image.image_id,
            file_name=image.file,
            **{name: array[objects] for name, array in self._objects.items()},
        )


def missing_files(files: Iterable[str]) -> list[str]:
    """Those that are not there, found by listing each folder once: `exists` for each is slow on a network disk."""
    names_of: dict[str, list[str]] = collections.defaultdict(list)
    for file in files:
        folder, name = os.path.split(file)
        names_of[folder].append(name)
    missing = []
    for folder, names in names_of.items():
        present = set(_contents(folder))
        missing += [os.path.join(folder, name) for name in names if name not in present]  # noqa: PTH118
    return missing


def _contents(folder: str) -> list[str]:
    try:
        return os.listdir(folder)  # noqa: PTH208  # of a hundred thousand names, not as many paths
    except (OSError, ValueError):  # ValueError: a name that no file can have
        return []
