"""The faults that images and annotations can have: the table of kinds, the checks of boxes, and their repair.

Reading (`annotation_files`), repair (`clean`) and inspection (`survey`) share these kinds.
"""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from effdet_jax.data.example import Annotations
from effdet_jax.errors import UserError, printable

SMALLEST_SIDE = 1.0  # pixels; smaller boxes often come from coordinates in [0, 1] instead of pixels
LONGEST_RATIO = 50.0  # of the sides; such a box covers less than an eighth of any anchor up to 2:1
LARGEST_BOX = 4.0  # times the area of the image; beyond, the coordinates belong to another, larger image


class Kind(NamedTuple):
    """error: training fails, an object is lost, or the metrics are wrong. warning: training works, but look at it."""

    severity: Literal['error', 'warning', 'note']
    what: str
    advice: str  # what training does with it, and what to do


# Reports list the kinds in this order.
KINDS: dict[str, Kind] = {
    'unreadable_annotations': Kind('error', 'annotations that cannot be read', 'fix or restore the file'),
    'malformed_annotation': Kind('error', 'malformed image or object entry', 'fix or remove it'),
    'unsafe_path': Kind(
        'error', 'file name outside the image folder', 'use a path inside the folder; symlinks are allowed'
    ),
    'missing_image': Kind('error', 'missing image file', 'add the file, or remove it from the annotations'),
    'unreadable_image': Kind('error', 'image that cannot be decoded', 'replace or remove the file'),
    'another_size': Kind('error', 'image size differs from the annotations', 'fix the annotated size or the image'),
    'image_in_both_splits': Kind('error', 'image in both splits', 'remove it from one: it inflates the metrics'),
    'unknown_label': Kind('error', 'unknown class label', 'fix it, or add it to config.dataset.class_names'),
    'no_objects': Kind('error', 'split without usable objects', 'check the files and coordinates'),
    'inverted_box': Kind('error', 'box with swapped corners', 'dropped in training: swap the corners'),
    'box_outside': Kind('error', 'box entirely outside the image', 'dropped in training: fix it'),
    'box_without_area': Kind('warning', 'box without area', 'dropped in training: remove or redraw it'),
    'absurd_box': Kind('warning', 'box of implausible size or aspect ratio', 'kept in training: redraw it'),
    'box_reaching_outside': Kind('warning', 'box partly outside the image', 'clipped in training'),
    'duplicate_box': Kind('warning', 'object annotated twice', 'kept in training: remove one'),
    'image_listed_twice': Kind('warning', 'image listed twice', 'remove one'),
    'similar_classes': Kind('warning', 'class names that differ only in case or spaces', 'use one name for one class'),
    'class_without_examples': Kind('warning', 'class without examples', 'cannot be learned or evaluated: add some'),
    'unmatched_object': Kind(
        'warning', 'object without a matching anchor', 'change config.model.anchors or image.size'
    ),
    'too_many_objects': Kind('warning', 'image with more objects than max_boxes', 'raise config.dataset.max_boxes'),
    'dark_image': Kind('warning', 'nearly black image with 16-bit values', 'rescale the values to the full range'),
    'turned_image': Kind('note', 'image rotated by its EXIF orientation', 'boxes must refer to the upright image'),
    'image_without_annotations': Kind('note', 'image without an annotation file', 'used as background'),
    'image_without_objects': Kind('note', 'image without objects', 'used as background'),
}
DROPPED = ('inverted_box', 'box_outside', 'box_without_area')


@dataclasses.dataclass(frozen=True, slots=True)
class Finding:
    """One fault in the data.

    where: the file and the object. box_xyxy: as annotated, in pixels of the original image. advice: None for the
    advice of the kind.
    """

    kind: str
    where: str
    detail: str
    image: str = ''
    label: str = ''
    box_xyxy: tuple[float, ...] | None = None
    values: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    advice: str | None = None

    @property
    def message(self) -> str:
        """One line that says where, what, and what to do."""
        advice = KINDS[self.kind].advice if self.advice is None else self.advice
        return printable(': '.join(filter(None, (self.where, self.detail, advice))))


def find_box_faults(
    boxes: Float[np.ndarray, 'M 4'], sizes: Int[np.ndarray, 'M 2']
) -> tuple[Float[np.ndarray, 'M 4'], dict[str, np.ndarray]]:
    """(boxes yxyx clipped to their images, {kind: bool [M]}); each box counts for the first kind that applies.

    `sizes` holds the (height, width) of each box's image, 0 where unknown; then nothing is clipped there.
    """
    limits_M2 = np.where(sizes > 0, sizes, np.inf).astype(np.float32)
    clipped_M4 = np.clip(boxes, np.float32(0), np.tile(limits_M2, 2))
    is_sound_M, faults = np.ones(len(boxes), bool), {}
    for kind, test in _BOX_TESTS.items():
        faults[kind] = test(boxes, clipped_M4, limits_M2) & is_sound_M
        is_sound_M = is_sound_M & ~faults[kind]
    return clipped_M4, faults


def mend_boxes(
    boxes: Float[np.ndarray, 'M 4'], areas: Float[np.ndarray, 'M'], sizes: Int[np.ndarray, 'M 2']
) -> tuple[Float[np.ndarray, 'M 4'], Float[np.ndarray, 'M'], np.ndarray]:
    """(boxes clipped to their images, areas, bool [M] mask of the boxes to keep).

    Boxes with zero area, with swapped corners, or entirely outside the image are dropped. Where the area is NaN or the
    box was clipped, the area of the box is used.
    """
    clipped_M4, faults = find_box_faults(boxes, sizes)
    sides_M2 = clipped_M4[:, 2:] - clipped_M4[:, :2]
    is_clipped_M = (clipped_M4 != boxes).any(1)
    areas_M = np.where(is_clipped_M | np.isnan(areas), sides_M2[:, 0] * sides_M2[:, 1], areas)
    return clipped_M4, areas_M, ~np.any([faults[kind] for kind in DROPPED], axis=0)


def clean(annotations: Annotations, size: tuple[int, int] | None) -> Annotations:
    """Applies `mend_boxes` to the annotations of one image.

    `size` is the (height, width) of the image, or None if unknown: then boxes are clipped only at 0. Raises UserError
    if a coordinate is not finite.
    """
    boxes_M4 = annotations.boxes_yxyx
    if not np.isfinite(boxes_M4).all():
        bad = int(np.flatnonzero(~np.isfinite(boxes_M4).all(1))[0])
        raise UserError(
            f'{annotations.file_name or annotations.image_id}: box {bad} (ymin, xmin, ymax, xmax = '
            f'{boxes_M4[bad].tolist()}) has a coordinate that is not finite: fix or remove it'
        )
    sizes_M2 = np.full((len(boxes_M4), 2), size or (0, 0))
    clipped_M4, areas_M, keep_M = mend_boxes(boxes_M4, annotations.areas, sizes_M2)
    return dataclasses.replace(annotations, boxes_yxyx=clipped_M4, areas=areas_M).select(keep_M)


def size_mismatch(size: tuple[int, int], annotated: tuple[int, int], orientation: int) -> tuple[str, str | None]:
    """(detail, advice) for an image whose `size` differs from the annotated one; both are (height, width).

    `orientation` is the EXIF orientation of the image. An advice of None means the advice of the kind.
    """
    (height, width), (annotated_height, annotated_width) = size, annotated
    detail = f'the image is {width}x{height}, the annotations say {annotated_width}x{annotated_height} (width x height)'
    if orientation < 5 or annotated != (width, height):
        return detail, None
    return (
        f'{detail}: it is stored rotated, with EXIF orientation {orientation}',
        'if the boxes were drawn on the stored image, remove the orientation (exiftool -Orientation= FILE); '
        'if they were drawn on the upright image, fix the annotated size',
    )


def first_few(names: Iterable[str], limit: int = 5) -> str:
    """'a, b, c', or for more than `limit` names 'a, b, c, d, e and 37 more'."""
    names = list(names)
    more = f' and {len(names) - limit} more' if len(names) > limit else ''
    return printable(', '.join(names[:limit]) + more)


def _is_absurd(boxes_M4: np.ndarray, clipped_M4: np.ndarray, limits_M2: np.ndarray) -> np.ndarray:
    sides_M2 = boxes_M4[:, 2:] - boxes_M4[:, :2]
    shorter_M, longer_M = sides_M2.min(1), sides_M2.max(1)
    share_M = sides_M2.astype(np.float64).prod(1) / limits_M2.astype(np.float64).prod(1)
    return (shorter_M < SMALLEST_SIDE) | (longer_M > LONGEST_RATIO * shorter_M) | (share_M >= LARGEST_BOX)


_BOX_TESTS = {
    'inverted_box': lambda boxes, clipped, limits: (boxes[:, 2:] < boxes[:, :2]).any(1),
    'box_without_area': lambda boxes, clipped, limits: (boxes[:, 2:] == boxes[:, :2]).any(1),
    'box_outside': lambda boxes, clipped, limits: (clipped[:, 2:] <= clipped[:, :2]).any(1),
    'absurd_box': _is_absurd,
    'box_reaching_outside': lambda boxes, clipped, limits: (clipped != boxes).any(1),
}
