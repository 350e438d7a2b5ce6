"""The check of data: on BCCD as it is, with a planted fault of every kind, and of every kind of source."""

import json
import struct
import zlib
from collections import Counter
from pathlib import Path

import cv2
import numpy as np
import planted_faults
import pytest
from PIL import Image

from effdet_jax import data, inspection
from effdet_jax.build import open_sources
from effdet_jax.commands.check_data import inspection_report
from effdet_jax.configs import bccd as bccd_config
from effdet_jax.configs import default
from effdet_jax.data.checks import KINDS
from effdet_jax.errors import UserError
from effdet_jax.records import console

BCCD = Path(__file__).parents[3] / 'shared' / 'data' / 'bccd'
needs_bccd = pytest.mark.skipif(not BCCD.is_dir(), reason=f'no photographs: {BCCD} is absent')


def found_in(root: Path, class_names=()) -> inspection.Inspection:
    c = bccd_config.get_config()
    c.dataset.update(source=f'voc:{root}', class_names=class_names, max_boxes=planted_faults.MAX_BOXES)
    return inspection.inspect(c, images=True)


def placed(found: inspection.Inspection) -> Counter:
    """How often each (kind, split, image or class)."""
    return Counter(
        (f.kind, split, f.label if 'class' in f.kind else Path(f.image or f.where).stem)
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
    assert {kind for kind, _, _ in expected} == set(KINDS) - {'no_objects'}  # 23 kinds
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


def config(source: str, train_split='', eval_split=''):
    c = default.get_config('d0')
    c.image.size = (64, 64)
    c.dataset.update(source=source, train_split=train_split, eval_split=eval_split)
    return c


def kinds(found: inspection.Inspection) -> dict[str, set[str]]:
    return {split: {f.kind for f in of_split} for split, of_split in found.findings.items()}


@pytest.fixture
def csv_files(tmp_path):
    """`csv_files(name, rows)` -> source; the folder holds a.png and b.png of 40x30 and c.png, a copy of a.png."""
    for name, grey in (('a', 0), ('b', 99), ('c', 0)):
        cv2.imwrite(str(tmp_path / f'{name}.png'), np.full((30, 40, 3), grey, np.uint8))

    def write(name, *rows):
        (tmp_path / f'{name}.csv').write_text('image,xmin,ymin,xmax,ymax,label\n' + '\n'.join(rows) + '\n')
        return f'csv:{tmp_path}/{name}.csv'

    return write


def test_sizes_that_a_table_does_not_know_come_from_the_images(csv_files):
    train = csv_files('train', 'a.png,5,5,35,25,cat', 'b.png,20,10,60,25,dog')
    c = config(train, eval_split=csv_files('eval', 'b.png,5,5,35,25,cat', 'c.png,5,5,35,25,dog'))
    without = inspection.inspect(c)
    assert kinds(without) == {'train': set(), 'eval': {'image_in_both_splits'}}  # b.png by its name
    assert without.fit is None
    found = inspection.inspect(c, images=True)
    assert kinds(found) == {'train': {'box_reaching_outside'}, 'eval': {'image_in_both_splits'}}
    assert [Path(f.image).name for f in found.findings['eval']] == ['b.png', 'c.png']  # c.png by its bytes
    assert found.fit.objects == 2
    with console.terminal.capture() as printed:
        inspection_report.show(without, images=False)
    assert 'size of 4 images is not annotated: add --images' in printed.get()


def test_what_cannot_be_opened_at_all_is_a_finding_and_the_other_split_is_still_checked(csv_files, tmp_path):
    good = csv_files('train', 'a.png,5,5,35,25,cat', 'a.png,5,5,35,25,cat')
    found = inspection.inspect(config(good, eval_split=f'coco:{tmp_path}/x.json,{tmp_path}'))
    assert kinds(found) == {'train': {'duplicate_box'}, 'eval': {'unreadable_annotations'}}
    found = inspection.inspect(config(f'csv:{tmp_path}/x.csv', eval_split=good))
    assert kinds(found) == {'train': {'unreadable_annotations'}, 'eval': {'duplicate_box'}}
    with console.terminal.capture() as printed:
        inspection_report.show(found, images=False)
    assert 'x.csv: no such file' in printed.get() and '1 error, 1 warning, 0 notes' in printed.get()
    assert inspection_report.to_json(found)['anchors'] is None


def test_every_fault_of_a_coco_file_is_told_at_once(csv_files, tmp_path):
    csv_files('unused')
    image = {'file_name': 'a.png', 'width': 40, 'height': 30}
    box = {'image_id': 1, 'category_id': 1, 'bbox': [5, 5, 30, 20]}
    content = {
        'images': [{'id': 1, **image}, {'id': 1, **image}, 7, {'id': 2, **image, 'file_name': '../a.png'}, {'id': 3}],
        'categories': [{'id': 1, 'name': 'cat'}, {'id': 2, 'name': 'dog'}],
        'annotations': [
            {'id': 11, **box}, {'id': 12, **box, 'bbox': [1, 2, None, 4]}, {'id': 13, **box, 'image_id': 99},
            {'id': 14, **box, 'category_id': []}, 'no object', {'id': 15, **box, 'category_id': 2},
            {'id': 16, **box, 'image_id': 2}, {'id': 17, **box, 'iscrowd': 1},
        ],
    }  # fmt: skip
    (tmp_path / 'coco.json').write_text(json.dumps(content))
    c = config(f'coco:{tmp_path}/coco.json,{tmp_path}', eval_split='shapes@0:2')
    c.dataset.class_names = ('cat',)
    listing = (found := inspection.inspect(c)).listings['train']
    assert len(listing.images) == 1 and listing.numbers.tolist() == [11, 17]
    where = [f.where.rpartition(': ')[2] for f in listing.faults]
    assert where == ['image 1', 'image 2', 'image 2', 'image 3', *(f'annotation {n}' for n in (12, 13, 14, 4, 15))]
    assert kinds(found)['train'] == {'malformed_annotation', 'unsafe_path', 'unknown_label'}


@pytest.mark.slow
def test_drawn_pictures_have_no_faults_and_a_sample_says_nothing_of_classes():
    c = config('shapes', '0:300', '1000:1002')
    assert kinds(inspection.inspect(c))['train'] <= {'unmatched_object'}
    assert kinds(inspection.inspect(c, images=True))['eval'] <= {'class_without_examples'}
    c.dataset.eval_split = '299:301'
    found = inspection.inspect(c)
    assert [f.image for f in found.findings['eval'] if f.kind == 'image_in_both_splits'] == ['shapes, image 299']
    sources = {split: data.open_source('shapes', '0:300') for split in ('train', 'eval')}
    sample = inspection.inspect_sources(c, sources, {'train': [], 'eval': []}, max_images=3)
    assert [row.file for row in sample.listings['train'].images] == [f'shapes, image {i}' for i in (0, 149, 299)]
    assert sample.listings['train'].sampled and 'class_without_examples' not in kinds(sample)['train']


def test_crowds_are_counted(tmp_path):
    cv2.imwrite(str(tmp_path / 'a.png'), np.zeros((30, 40, 3), np.uint8))
    box = {'image_id': 1, 'category_id': 1, 'bbox': [5, 5, 30, 20], 'iscrowd': '1'}
    content = {
        'images': [{'id': 1, 'file_name': 'a.png'}],
        'categories': [{'id': 1, 'name': 'cat'}],
        'annotations': [{'id': 1, **box}],
    }
    (tmp_path / 'coco.json').write_text(json.dumps(content))
    found = inspection.inspect(config(f'coco:{tmp_path}/coco.json,{tmp_path}', eval_split='shapes@0:2'))
    with console.terminal.capture() as printed:
        inspection_report.show(found, images=False)
    assert 'train: 1 images, 1 objects, including 1 crowd' in printed.get()
    assert 'none of the 1 objects (1 are crowds) is usable' in printed.get()
    assert inspection_report.to_json(found)['splits']['train'] == {'images': 1, 'objects': 1, 'crowds': 1}


def test_classes_that_differ_only_in_case_or_blanks(csv_files):
    rows = [f'a.png,5,5,{x},25,{name}' for x, name in enumerate(('Cup', 'cup', 'tea cup', 'tea_cup', 'pen'), start=20)]
    found = inspection.inspect(config(csv_files('train', *rows), eval_split=csv_files('eval', *rows)))
    assert [f.message for f in found.of_kind('similar_classes')['train']] == [
        "class 'cup': there is also 'Cup': use one name for one class",
        "class 'tea_cup': there is also 'tea cup': use one name for one class",
    ]


def test_an_image_that_is_stored_turned_is_told_where_no_size_tells_what_was_annotated(csv_files, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.open(tmp_path / 'a.png').save(tmp_path / 'a.png', exif=exif)
    c = config(csv_files('train', 'a.png,5,5,29,39,cat'), eval_split=csv_files('eval', 'b.png,5,5,35,25,cat'))
    found = inspection.inspect(c, images=True)
    assert kinds(found)['train'] == {'turned_image'}  # and the box lies inside of the upright image, 30x40
    assert found.count('error') == 0


def test_no_library_prints_a_line_of_its_own(csv_files, tmp_path, capfd):
    encoded = (tmp_path / 'b.png').read_bytes()
    profile = b'iCCP' + b'x\0\0'
    chunk = struct.pack('>I', 3) + profile + struct.pack('>I', zlib.crc32(profile))
    (tmp_path / 'a.png').write_bytes(encoded[:33] + chunk + encoded[33:])
    jpeg = cv2.imencode('.jpg', np.full((30, 40, 3), 9, np.uint8))[1].tobytes()
    (tmp_path / 'c.png').write_bytes(jpeg[:-2] + b'\1\2\3' + jpeg[-2:])
    c = config(csv_files('train', 'a.png,5,5,9,9,cat'), eval_split=csv_files('eval', 'c.png,5,5,9,9,cat'))
    inspection.inspect(c, images=True)
    assert capfd.readouterr().err == ''


def test_advice_on_the_scale_of_anchors(csv_files):
    rows = [f'a.png,{x},{y},{x + 6},{y + 6},cat' for x in range(0, 34, 7) for y in range(0, 24, 7)]
    c = config(csv_files('small', *rows), eval_split='shapes@0:2')
    c.dataset.class_names = ('cat',)
    fit = inspection.inspect(c, images=True).fit  # 6 pixels become 9.6; the smallest anchor has 32
    assert (fit.objects, fit.unmatched) == (20, 20) and fit.table == (('8 to 16', '1:2 to 2:1', 20, 20),)
    best = min(fit.unmatched_at, key=fit.unmatched_at.get)
    assert best < 2 and f'scale={best:g} leaves {fit.unmatched_at[best]} of 20' in fit.advice
    c.model.anchors.scale = best
    again = inspection.inspect(c, images=True).fit
    assert again.unmatched == fit.unmatched_at[best] and again.advice == ''


# Before a training.


def test_a_training_starts_with_a_summary(csv_files):
    train = csv_files('train', 'a.png,5,5,35,25,cat', 'a.png,9,9,9,20,cat', 'b.png,5,5,35,25,dog')
    c = config(train, eval_split=csv_files('eval', 'c.png,5,5,35,25,cat', 'c.png,5,9,35,25,dog'))
    with console.terminal.capture() as printed:
        inspection.check_sources(c, dict(zip(('train', 'eval'), open_sources(c), strict=True)))
    assert printed.get().splitlines() == [
        'data: warning: train: 1 x box without area: a.png: dropped in training: remove or redraw it',
        'data: 0 errors and 1 warning; for the full list, run python -m effdet_jax check-data --config=FILE',
    ]


@pytest.mark.parametrize(
    'rows',
    [
        ['a.png,,,,,', 'b.png,9,9,9,20,cat'],  # nothing, and no area
        ['a.png,0.1,0.2,0.7,0.9,cat', 'b.png,0.3,0.3,0.6,0.8,cat'],  # fractions for pixels
    ],
)
def test_a_training_that_could_learn_nothing_does_not_start(csv_files, rows):
    c = config(csv_files('train', *rows), eval_split='shapes@0:2')
    c.dataset.class_names = ('cat',)
    c.dataset.eval_split = csv_files('eval', 'c.png,5,5,35,25,cat')
    with pytest.raises(UserError, match=r'all 2 images: none of the \d objects is usable: .*check-data'):
        inspection.check_sources(c, dict(zip(('train', 'eval'), open_sources(c), strict=True)))
