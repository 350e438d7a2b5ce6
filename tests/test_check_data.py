"""The check of data: on BCCD as it is, with a planted fault of every kind, and of every kind of source."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import planted_faults
import pytest

from configs import bccd as bccd_config
from effdet_jax import inspection, inspection_report
from effdet_jax.data.checks import KINDS

BCCD = Path(__file__).parents[2] / 'shared' / 'data' / 'bccd'
needs_bccd = pytest.mark.skipif(not BCCD.is_dir(), reason=f'no photographs: {BCCD} is absent')


def found_in(root: Path, class_names=()) -> inspection.Inspection:
    c = bccd_config.get_config()
    c.dataset.update(source=f'voc:{root}', class_names=class_names, max_boxes=planted_faults.MAX_BOXES)
    return inspection.inspect(c, images=True)


def placed(found: inspection.Inspection) -> Counter:
    """How often each (kind, split, image or class)."""
    return Counter(
        (f.kind, split, f.label if f.kind == 'class_without_examples' else Path(f.image or f.where).stem)
        for split, of_split in found.findings.items()
        for f in of_split
    )


def sound_images(found: inspection.Inspection) -> tuple[list[str], str]:
    """The training images without findings, and the one that has as many objects as the limit allows."""
    listing, faulty = found.listings['train'], {f.image for f in found.findings['train']}
    fullest = listing.images[np.bincount(listing.image_of).argmax()].file
    sound = [Path(image.file).stem for image in listing.images if image.file not in {fullest, *faulty}]
    return sound, Path(fullest).stem


@pytest.fixture(scope='module')
def original():
    return found_in(BCCD)


@needs_bccd
def test_bccd_has_two_boxes_without_area_and_platelets_that_no_anchor_fits(original):
    assert Counter(f.kind for f in original.findings['train']) == {'box_without_area': 2, 'unmatched_object': 58}
    assert original.findings['eval'] == []
    without_area = {Path(f.image).stem: f.box_xyxy for f in original.of_kind('box_without_area')['train']}
    assert without_area == {'BloodImage_00338': (504, 337, 504, 337), 'BloodImage_00343': (181, 329, 181, 329)}
    assert original.classes == (('Platelets', 292, 69), ('RBC', 3350, 805), ('WBC', 301, 71))


@needs_bccd
def test_every_planted_fault_is_found_and_nothing_else(original, tmp_path):
    root = tmp_path / 'bccd'
    planted_faults.copy(BCCD, root)
    expected = planted_faults.plant(root, *sound_images(original))
    assert {kind for kind, _, _ in expected} == set(KINDS) - {'no_objects'}  # 19 kinds
    found = found_in(root, planted_faults.CLASS_NAMES)
    assert placed(found) - placed(original) == Counter(expected)
    assert not placed(original) - placed(found)  # what was there before still is

    out = tmp_path / 'out'
    pictures = inspection_report.write_pictures(found, out)
    assert pictures == len(list(out.rglob('*.png')))
    assert {path.name for path in out.iterdir()} == {f.kind for f in found.findings['train'] if f.box_xyxy}
    content = json.loads(json.dumps(inspection_report.to_json(found)))
    assert len(content['findings']) == sum(placed(found).values())
    (inverted,) = (f for f in content['findings'] if f['kind'] == 'inverted_box')
    assert inverted['severity'] == 'error' and inverted['box_xyxy'] == [200, 200, 100, 100]
    assert Path(inverted['file']).suffix == '.jpg' and inverted['label'] == 'RBC'
