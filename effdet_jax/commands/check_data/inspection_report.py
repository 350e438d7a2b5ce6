"""An inspection for people and programs: tables on the terminal, JSON, pictures of the worst images."""

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

EXAMPLES = 3  # messages shown of a kind
PICTURES = 6  # of a kind
COLORS = {'error': 'red', 'warning': 'yellow', 'note': 'blue'}


def show(found: Inspection, images: bool) -> None:
    """Prints the classes, the faults with the first few of each kind, and how the anchors fit."""
    for split, listing in found.listings.items():
        crowds = int(listing.is_crowd.sum())
        more = f', {counted(crowds, "crowd")} among them' if crowds else ''
        result(f'{split}: {len(listing.images):,} images, {len(listing.labels):,} objects{more}')
    if found.classes:
        result('\n' + table(('class', *SPLITS), found.classes))
    if found.fit and found.fit.unmatched:
        title = 'Objects that no anchor fits, by size (root of the area in network pixels) and width : height'
        rows = [row for row in found.fit.table if row[3]]
        result('\n' + table(('size', 'ratio', 'objects', 'unmatched'), rows, title))
        result(found.fit.advice and f'\n{found.fit.advice}')
    terminal.print(_table_of_kinds(found))
    for name, kind in KINDS.items():
        everything = [(split, f) for split, of_split in found.of_kind(name).items() for f in of_split]
        for split, finding in everything[:EXAMPLES]:
            result(f'{kind.severity}: {split}: {finding.message}')
        if len(everything) > EXAMPLES:
            result(f'    and {len(everything) - EXAMPLES:,} more of this kind')
    unknown = sum(int((listing.sizes[:, 0] == 0).sum()) for listing in found.listings.values())
    if unknown and not images:
        result(
            f'The annotations do not say the size of {unknown:,} images: add --images to find boxes outside of them.'
        )
    result(', '.join(counted(found.count(severity), severity) for severity in COLORS))


def to_json(found: Inspection) -> dict[str, Any]:
    """Everything: splits, counts, classes, anchors, and each finding with file, box, kind, severity and values."""
    fit = found.fit
    return {
        'splits': {
            split: {
                'images': len(listing.images),
                'objects': len(listing.labels),
                'crowds': int(listing.is_crowd.sum()),
            }
            for split, listing in found.listings.items()
        },
        'counts': {
            split: dict(Counter(finding.kind for finding in of_split)) for split, of_split in found.findings.items()
        },
        'classes': [dict(zip(('name', *SPLITS), row, strict=True)) for row in found.classes],
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
            for split, of_split in found.findings.items()
            for finding in of_split
        ],
    }


def write_pictures(found: Inspection, out: Path) -> int:
    """`out`/KIND/SPLIT_IMAGE.png: of each kind the images with the most faulty boxes; how many pictures."""
    count = 0
    for kind in KINDS:
        for split, of_split in found.of_kind(kind).items():
            worst = Counter(f.image for f in of_split if f.box_xyxy).most_common(PICTURES)
            for image, _ in worst:
                drawn = _draw(found, split, image, [f for f in of_split if f.image == image and f.box_xyxy])
                if drawn is not None:
                    name = re.sub(r'\W', '_', Path(image).stem or 'image')[:100]
                    write_image(out / kind / f'{split}_{name}.png', drawn)
                    count += 1
    return count


def _draw(found: Inspection, split: str, image: str, faults: list[Finding]) -> np.ndarray | None:
    """All boxes of the image as annotated; the faulty ones in another colour than any class, named by their fault."""
    source, listing = found.sources[split], found.listings[split]
    place = next(i for i, row in enumerate(listing.images) if row.file == image)
    try:
        encoded = source.image(int(listing.indices[place]))
        pixels = data.decode(encoded, image) if isinstance(encoded, bytes) else encoded
    except UnreadableError:
        return None
    of_image = listing.image_of == place
    boxes_xyxy, labels = listing.boxes_yxyx[of_image][:, [1, 0, 3, 2]], listing.labels[of_image]
    faulty_xyxy = np.array([finding.box_xyxy for finding in faults], np.float32)
    sound = ~(boxes_xyxy[:, None] == faulty_xyxy).all(2).any(1)
    faulty_xyxy = np.sort(faulty_xyxy.reshape(-1, 2, 2), axis=1).reshape(-1, 4)  # an inverted one can be drawn too
    fault_label = len(listing.class_names)
    names = (*listing.class_names, f'{faults[0].kind.replace("_", " ")}')
    return draw_boxes(
        pixels,
        np.concatenate([boxes_xyxy[sound], faulty_xyxy]),
        np.concatenate([labels[sound], np.full(len(faults), fault_label, labels.dtype)]),
        names,
    )


def _table_of_kinds(found: Inspection) -> Table:
    grid = Table(box=rich.box.SIMPLE_HEAD, title_justify='left')
    for name in ('', 'fault', *SPLITS, 'what to do'):
        grid.add_column(name, justify='right' if name in SPLITS else 'left')
    for name, kind in KINDS.items():
        counts = [len(of_split) for of_split in found.of_kind(name).values()]
        if any(counts):
            severity = Text(kind.severity, style=COLORS[kind.severity])
            grid.add_row(severity, kind.what, *(f'{count or "-"}' for count in counts), kind.advice)
    return grid
