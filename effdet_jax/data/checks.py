"""What is wrong with these labels, and what is done about it."""

import dataclasses
from collections.abc import Iterable

import numpy as np

from effdet_jax.data.example import Annotations
from effdet_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Faults:
    """Counts of the boxes of one image that were mended. Each box is counted once, under the first that applies."""

    without_area: int = 0
    inverted: int = 0
    outside: int = 0
    clipped: int = 0

    def __bool__(self) -> bool:
        return any(dataclasses.astuple(self))


def clean(annotations: Annotations, size: tuple[int, int] | None) -> tuple[Annotations, Faults]:
    """Drops the boxes that cannot be learned and clips the others to the image.

    Dropped: boxes without area, with swapped corners, or wholly outside the image. `size` is its (height, width),
    or None where that is not known yet: then nothing is cut at bottom and right. An area that is NaN, and that of a
    clipped box, become the area of the box. Raises UserError where a coordinate is not finite.
    """
    boxes_M4 = annotations.boxes_yxyx
    if not np.isfinite(boxes_M4).all():
        bad = int(np.flatnonzero(~np.isfinite(boxes_M4).all(1))[0])
        raise UserError(
            f'{annotations.file_name or annotations.image_id}: box {bad} (ymin, xmin, ymax, xmax = '
            f'{boxes_M4[bad].tolist()}) has a coordinate that is no finite number: correct or remove it'
        )
    limit_4 = np.array(size * 2 if size else [np.inf] * 4, np.float32)
    clipped_M4 = np.clip(boxes_M4, np.float32(0), limit_4)

    inverted_M = (boxes_M4[:, 2:] < boxes_M4[:, :2]).any(1)
    without_area_M = (boxes_M4[:, 2:] == boxes_M4[:, :2]).any(1) & ~inverted_M
    outside_M = (clipped_M4[:, 2:] <= clipped_M4[:, :2]).any(1) & ~inverted_M & ~without_area_M
    keep_M = ~(inverted_M | without_area_M | outside_M)
    moved_M = (clipped_M4 != boxes_M4).any(1)

    faults = Faults(*(int(mask_M.sum()) for mask_M in (without_area_M, inverted_M, outside_M, moved_M & keep_M)))
    box_areas_M = (clipped_M4[:, 2] - clipped_M4[:, 0]) * (clipped_M4[:, 3] - clipped_M4[:, 1])
    areas_M = np.where(moved_M | np.isnan(annotations.areas), box_areas_M, annotations.areas)
    return dataclasses.replace(annotations, boxes_yxyx=clipped_M4, areas=areas_M).select(keep_M), faults


def describe(faults_by_name: Iterable[tuple[str, Faults]]) -> tuple[str, ...]:
    """One line for each kind of fault that occurs: how many boxes, what was done, in which images (the first few)."""
    found = [(name, dataclasses.asdict(faults)) for name, faults in faults_by_name if faults]
    lines = []
    for kind, what in _WHAT_WAS_DONE.items():
        total = sum(faults[kind] for _, faults in found)
        if total:
            names = [name for name, faults in found if faults[kind]]
            lines.append(f'{total} {"box" if total == 1 else "boxes"} {what}: {first_few(names)}')
    return tuple(lines)


def first_few(names: list[str], limit: int = 5) -> str:
    """'a, b, c' or, beyond `limit`, 'a, b, c, d, e and 37 more'."""
    more = f' and {len(names) - limit} more' if len(names) > limit else ''
    return ', '.join(names[:limit]) + more


_WHAT_WAS_DONE = {
    'without_area': 'without area dropped',
    'inverted': 'with swapped corners dropped',
    'outside': 'wholly outside the image dropped',
    'clipped': 'reaching outside the image clipped',
}
