"""Presents an inspection: tables on the terminal, JSON, pictures of the worst images."""

import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import rich.box
from rich.table import Table
from rich.text import Text

from effdet_jax import data
from effdet_jax.data.checks import KINDS, Finding
from effdet_jax.errors import UnreadableError
from effdet_jax.inspection import SPLITS, Inspection, counted
from effdet_jax.records.console import result, table, terminal
from effdet_jax.records.pictures import draw_boxes, write_image

EXAMPLES = 3  # messages per kind
PICTURES = 6  # per kind and split
COLORS = {'error': 'red', 'warning': 'yellow', 'note': 'blue'}


def show(inspection: Inspection, images: bool) -> None:
    """Prints the classes, how well the anchors match, and the faults with examples of each kind."""
    for split, listing in inspection.listings.items():
        crowds = int(listing.is_crowd.sum())
        more = f', including {counted(crowds, "crowd")}' if crowds else ''
        result(f'{split}: {len(listing.images):,} images, {len(listing.labels):,} objects{more}')
    if inspection.classes:
        result('\n' + table(('class', *SPLITS), inspection.classes))
    if inspection.fit and inspection.fit.unmatched:
        title = 'Objects without a matching anchor, by size (root of the area in network pixels) and width : height'
        rows = [row for row in inspection.fit.table if row[3]]
        result('\n' + table(('size', 'ratio', 'objects', 'unmatched'), rows, title))
        result(inspection.fit.advice and f'\n{inspection.fit.advice}')
    terminal.print(_fault_table(inspection))
    for name, kind in KINDS.items():
        all_findings = [(split, f) for split, findings in inspection.of_kind(name).items() for f in findings]
        for split, finding in all_findings[:EXAMPLES]:
            result(f'{kind.severity}: {split}: {finding.message}')
        if len(all_findings) > EXAMPLES:
            result(f'    and {len(all_findings) - EXAMPLES:,} more of this kind')
    unknown = sum(int((listing.sizes[:, 0] == 0).sum()) for listing in inspection.listings.values())
    if unknown and not images:
        result(f'The size of {unknown:,} images is not annotated: add --images to find boxes outside of them.')
    result(', '.join(counted(inspection.count(severity), severity) for severity in COLORS))


def to_json(inspection: Inspection) -> dict[str, Any]:
    """The whole inspection: splits, counts, classes, anchors, and every finding."""
    fit = inspection.fit
    return {
        'splits': {
            split: {'images': len(x.images), 'objects': len(x.labels), 'crowds': int(x.is_crowd.sum())}
            for split, x in inspection.listings.items()
        },
        'counts': {split: dict(Counter(f.kind for f in findings)) for split, findings in inspection.findings.items()},
        'classes': [dict(zip(('name', *SPLITS), row, strict=True)) for row in inspection.classes],
        'anchors': fit
        and {
            'scale': fit.scale,
            'objects': fit.objects,
            'unmatched': fit.unmatched,
            'unmatched_at_scale': {f'{scale:g}': count for scale, count in fit.unmatched_at.items()},
            'groups': [dict(zip(('size', 'ratio', 'objects', 'unmatched'), row, strict=True)) for row in fit.table],
            'advice': fit.advice,
        },
        'findings': [
            {
                'split': split,
                'kind': finding.kind,
                'severity': KINDS[finding.kind].severity,
                'file': finding.image or None,
                'label': finding.label or None,
                'box_xyxy': finding.box_xyxy,
                'values': dict(finding.values),
                'message': finding.message,
            }
            for split, findings in inspection.findings.items()
            for finding in findings
        ],
    }


def write_pictures(inspection: Inspection, out: Path) -> int:
    """Writes the images with the most faulty boxes to `out`/KIND/SPLIT_IMAGE.png; returns the number of pictures."""
    count = 0
    for kind in KINDS:
        for split, findings in inspection.of_kind(kind).items():
            worst = Counter(f.image for f in findings if f.box_xyxy).most_common(PICTURES)
            for image, _ in worst:
                picture = _draw(inspection, split, image, [f for f in findings if f.image == image and f.box_xyxy])
                if picture is not None:
                    name = re.sub(r'\W', '_', Path(image).stem or 'image')[:100]
                    write_image(out / kind / f'{split}_{name}.png', picture)
                    count += 1
    return count


def _draw(inspection: Inspection, split: str, image: str, faults: list[Finding]) -> np.ndarray | None:
    """Draws all boxes as annotated; faulty ones are labelled with their fault, in a colour of their own."""
    source, listing = inspection.sources[split], inspection.listings[split]
    position = next(i for i, row in enumerate(listing.images) if row.file == image)
    try:
        encoded = source.image(int(listing.indices[position]))
        pixels = data.decode(encoded, image) if isinstance(encoded, bytes) else encoded
    except UnreadableError:
        return None
    of_image = listing.image_of == position
    boxes_xyxy, labels = listing.boxes_yxyx[of_image][:, [1, 0, 3, 2]], listing.labels[of_image]
    faulty_xyxy = np.array([finding.box_xyxy for finding in faults], np.float32)
    is_sound = ~(boxes_xyxy[:, None] == faulty_xyxy).all(2).any(1)
    faulty_xyxy = np.sort(faulty_xyxy.reshape(-1, 2, 2), axis=1).reshape(-1, 4)  # sort swapped corners
    fault_label = len(listing.class_names)
    names = (*listing.class_names, faults[0].kind.replace('_', ' '))
    return draw_boxes(
        pixels,
        np.concatenate([boxes_xyxy[is_sound], faulty_xyxy]),
        np.concatenate([labels[is_sound], np.full(len(faults), fault_label, labels.dtype)]),
        names,
    )


def _fault_table(inspection: Inspection) -> Table:
    grid = Table(box=rich.box.SIMPLE_HEAD, title_justify='left')
    for name in ('', 'fault', *SPLITS, 'what to do'):
        grid.add_column(name, justify='right' if name in SPLITS else 'left')
    for name, kind in KINDS.items():
        counts = [len(findings) for findings in inspection.of_kind(name).values()]
        if any(counts):
            severity = Text(kind.severity, style=COLORS[kind.severity])
            grid.add_row(severity, kind.what, *(f'{count or "-"}' for count in counts), kind.advice)
    return grid
