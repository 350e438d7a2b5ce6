"""The source for image files annotated by a COCO JSON file, a PASCAL VOC folder or a CSV table."""

import contextlib

import numpy as np

from effdet_jax.data import checks, transforms
from effdet_jax.data.example import Annotations, Example
from effdet_jax.data.files import read_bytes
from effdet_jax.data.listing import Listing, Track
from effdet_jax.errors import UnreadableError


class AnnotatedFiles:
    """Image files with annotations in memory, which are cleaned when the source is created. Thread-safe."""

    def __init__(self, listing: Listing):
        self.class_names, self.category_ids = listing.class_names, listing.category_ids
        self.faults, self._listing = listing.faults, listing
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
        encoded, annotations = self.image(index), self._objects_of(index)
        size = transforms.image_size(encoded, file)
        if height == 0:
            return Example(encoded, checks.clean(annotations, size))
        if size != (height, width):
            orientation = transforms.exif_orientation(encoded, file)
            detail, advice = checks.size_mismatch(size, (int(height), int(width)), orientation)
            raise UnreadableError(file, detail, advice or checks.KINDS['another_size'].advice)
        return Example(encoded, annotations)

    def image(self, index: int) -> bytes:
        return read_bytes(self._listing.images[index].file)

    def annotations(self, index: int) -> Annotations:
        """The annotations of one image. Reads the image only if its annotated size is missing.

        If the image cannot be read either, boxes are not clipped at the bottom and right edges.
        """
        if self._listing.sizes[index, 0] == 0:
            with contextlib.suppress(UnreadableError):
                return self[index].annotations
        return self._objects_of(index)

    def listing(self, max_images: int, track: Track) -> Listing:
        return self._listing

    def fingerprint(self) -> str:
        return self._listing.fingerprint

    def _objects_of(self, index: int) -> Annotations:
        image, objects = self._listing.images[index], slice(*self._starts[index : index + 2])
        return Annotations(
            image_id=image.image_id,
            file_name=image.file,
            **{name: array[objects] for name, array in self._objects.items()},
        )
