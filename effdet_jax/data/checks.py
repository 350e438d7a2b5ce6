"""What can be wrong with images and labels: one table of kinds, the tests of boxes, and the mending of them.

Reading (`annotation_files`), mending (`clean`) and checking (`survey`) all speak of the same kinds.
"""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from effdet_jax.data.example import Annotations
from effdet_jax.errors import UserError, printable

SMALLEST_SIDE = 1.0  # pixels; less is no picture of anything, often coordinates of 0..1 instead of pixels
LONGEST_RATIO = 50.0  # sides; a line and no region: of any anchor up to 2:1 it shares less than an eighth
LARGEST_BOX = 4.0  # images; more are the coordinates of another, larger picture


class Kind(NamedTuple):
    """error: training refuses it, loses an object, or is measured wrongly. warning: it trains, but look at it."""

    severity: Literal['error', 'warning', 'note']
    what: str
    advice: str  # what happens to it, what to do


# In the order of a report.
KINDS: dict[str, Kind] = {
    'unreadable_annotations': Kind('error', 'annotations that cannot be read', 'correct or restore the file'),
    'malformed_annotation': Kind('error', 'malformed image or object', 'correct or remove it'),
    'unsafe_path': Kind('error', 'file name that leaves the image folder', 'name a file in it (a symlink may be one)'),
    'missing_image': Kind('error', 'missing image file', 'add it, or remove it from the annotations'),
    'unreadable_image': Kind('error', 'image that cannot be decoded', 'replace or remove the file'),
    'another_size': Kind(
        'error', 'size other than annotated', 'correct the annotations, or put the image they were made on'
    ),
    'image_in_both_splits': Kind('error', 'image in both splits', 'remove it from one: the figures would flatter'),
    'unknown_label': Kind('error', 'label that is no class', 'correct it, or add it to config.dataset.class_names'),
    'no_objects': Kind('error', 'split without any object that could be learned', 'check the files and coordinates'),
    'inverted_box': Kind('error', 'box with swapped corners', 'dropped in training: swap them'),
    'box_outside': Kind('error', 'box wholly outside the image', 'dropped in training: correct it'),
    'box_without_area': Kind('warning', 'box without area', 'dropped in training: remove or redraw it'),
    'absurd_box': Kind('warning', 'box of absurd size or proportion', 'kept in training: redraw it'),
    'box_reaching_outside': Kind('warning', 'box reaching outside the image', 'clipped in training'),
    'duplicate_box': Kind('warning', 'object annotated twice', 'kept in training: remove one'),
    'image_listed_twice': Kind('warning', 'image listed twice', 'remove one'),
    'similar_classes': Kind(
        'warning', 'classes that differ only in case or blanks', 'if they are the same, give them the same name'
    ),
    'class_without_examples': Kind('warning', 'class without examples', 'it cannot be learned or measured: add some'),
    'unmatched_object': Kind(
        'warning', 'object that no anchor fits', 'it trains one anchor alone: change config.model.anchors or image.size'
    ),
    'too_many_objects': Kind(
        'warning', 'image with more objects than are trained', 'the last are left out: raise config.dataset.max_boxes'
    ),
    'dark_image': Kind(
        'warning', 'nearly black image of more than 8 bits', 'scale its values to all 16 bits, or save it with 8'
    ),
    'turned_image': Kind(
        'note', 'image that EXIF turns upright', 'used upright: its boxes must refer to the upright image'
    ),
    'image_without_annotations': Kind('note', 'image without an annotation file', 'trains as background'),
    'image_without_objects': Kind('note', 'image without objects', 'trains as background'),
}
DROPPED = ('inverted_box', 'box_outside', 'box_without_area')


@dataclasses.dataclass(frozen=True, slots=True)
class Finding:
    """One fault. where: file and object. box_xyxy: as annotated, in pixels of the original image.

    advice: None for that of the kind.
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
        """One line: where, what, what to do."""
        advice = KINDS[self.kind].advice if self.advice is None else self.advice
        return printable(': '.join(filter(None, (self.where, self.detail, advice))))


def find_box_faults(
    boxes: Float[np.ndarray, 'M 4'], sizes: Int[np.ndarray, 'M 2']
) -> tuple[Float[np.ndarray, 'M 4'], dict[str, np.ndarray]]:
    """(boxes yxyx clipped to their images, {kind: bool [M]}); each box is under the first kind that applies.

    `sizes` are (height, width) of each box's image; 0 where unknown, which limits nothing.
    """
    limits_M2 = np.where(sizes > 0, sizes, np.inf).astype(np.float32)
    clipped_M4 = np.clip(boxes, np.float32(0), np.tile(limits_M2, 2))
    free_M, faults = np.ones(len(boxes), bool), {}
    for kind, test in _BOX_TESTS.items():
        faults[kind] = test(boxes, clipped_M4, limits_M2) & free_M
        free_M = free_M & ~faults[kind]
    return clipped_M4, faults


def mend_boxes(
    boxes: Float[np.ndarray, 'M 4'], areas: Float[np.ndarray, 'M'], sizes: Int[np.ndarray, 'M 2']
) -> tuple[Float[np.ndarray, 'M 4'], Float[np.ndarray, 'M'], np.ndarray]:
    """(boxes clipped to their images, areas, which of them to keep: bool [M]).

    Not kept: boxes without area, with swapped corners, or wholly outside the image. An area that is NaN, and that of a
    clipped box, become the area of the box.
    """
    clipped_M4, faults = find_box_faults(boxes, sizes)
    sides_M2 = clipped_M4[:, 2:] - clipped_M4[:, :2]
    moved_M = (clipped_M4 != boxes).any(1)
    areas_M = np.where(moved_M | np.isnan(areas), sides_M2[:, 0] * sides_M2[:, 1], areas)
    return clipped_M4, areas_M, ~np.any([faults[kind] for kind in DROPPED], axis=0)


def clean(annotations: Annotations, size: tuple[int, int] | None) -> Annotations:
    """The annotations of one image with `mend_boxes` done to them.

    `size` is the image's (height, width), or None where that is not known: then nothing is cut at bottom and right.
    Raises UserError where a coordinate is not finite.
    """
    boxes_M4 = annotations.boxes_yxyx
    if not np.isfinite(boxes_M4).all():
        bad = int(np.flatnonzero(~np.isfinite(boxes_M4).all(1))[0])
        raise UserError(
            f'{annotations.file_name or annotations.image_id}: box {bad} (ymin, xmin, ymax, xmax = '
            f'{boxes_M4[bad].tolist()}) has a coordinate that is no finite number: correct or remove it'
        )
    sizes_M2 = np.full((len(boxes_M4), 2), size or (0, 0))
    clipped_M4, areas_M, keep_M = mend_boxes(boxes_M4, annotations.areas, sizes_M2)
    return dataclasses.replace(annotations, boxes_yxyx=clipped_M4, areas=areas_M).select(keep_M)


def other_size(size: tuple[int, int], stated: tuple[int, int], orientation: int) -> tuple[str, str | None]:
    """(detail, advice) on an image whose `size` is not the `stated` one; both (height, width).

    `orientation` is the image's in EXIF. The advice is None for that of the kind.
    """
    (height, width), (stated_height, stated_width) = size, stated
    detail = f'the image is {width}x{height}, its annotations say {stated_width}x{stated_height} (width x height)'
    if orientation < 5 or stated != (width, height):
        return detail, None
    return (
        f'{detail}: it is stored turned, and its EXIF orientation, {orientation}, turns it upright',
        'if its boxes are drawn on the stored image, remove the orientation (exiftool -Orientation= FILE); '
        'if on the upright one, correct the annotated size',
    )


def first_few(names: Iterable[str], limit: int = 5) -> str:
    """'a, b, c' or, beyond `limit`, 'a, b, c, d, e and 37 more'."""
    names = list(names)
    more = f' and {len(names) - limit} more' if len(names) > limit else ''
    return printable(', '.join(names[:limit]) + more)


def _absurd(boxes_M4: np.ndarray, clipped_M4: np.ndarray, limits_M2: np.ndarray) -> np.ndarray:
    sides_M2 = boxes_M4[:, 2:] - boxes_M4[:, :2]
    shorter_M, longer_M = sides_M2.min(1), sides_M2.max(1)
    images_M = sides_M2.astype(np.float64).prod(1) / limits_M2.astype(np.float64).prod(1)
    return (shorter_M < SMALLEST_SIDE) | (longer_M > LONGEST_RATIO * shorter_M) | (images_M >= LARGEST_BOX)


_BOX_TESTS = {
    'inverted_box': lambda boxes, clipped, limits: (boxes[:, 2:] < boxes[:, :2]).any(1),
    'box_without_area': lambda boxes, clipped, limits: (boxes[:, 2:] == boxes[:, :2]).any(1),
    'box_outside': lambda boxes, clipped, limits: (clipped[:, 2:] <= clipped[:, :2]).any(1),
    'absurd_box': _absurd,
    'box_reaching_outside': lambda boxes, clipped, limits: (clipped != boxes).any(1),
}
