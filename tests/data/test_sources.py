import json

import numpy as np
import pytest
from processes import printed_by

from effdet_jax.data import Source, fingerprint, open_source, resolve_split, shapes
from effdet_jax.errors import UserError


def test_shapes_are_a_range_of_pictures():
    source = open_source('shapes', '10:13')
    assert isinstance(source, Source) and len(source) == 3
    assert source.class_names == shapes.CLASS_NAMES and source.category_ids == (1, 2, 3, 4, 5)
    np.testing.assert_array_equal(source[2].image, shapes.draw(12).image)
    assert source.annotations(2).image_id == 12
    with pytest.raises(IndexError):
        source[3]


@pytest.mark.parametrize(
    ('split', 'expected'),
    [
        ('train', ('voc:R', 'train')),
        ('train[:90%]+test', ('voc:R', 'train[:90%]+test')),
        ('shapesque', ('voc:R', 'shapesque')),
        ('coco:val.json,val', ('coco:val.json,val', '')),
        ('tfds:voc/2007@test', ('tfds:voc/2007@test', '')),
        ('shapes@5:9', ('shapes@5:9', '')),
    ],
)
def test_split_may_be_a_source(split, expected):
    assert resolve_split('voc:R', split) == expected


def test_source_given_as_split_is_opened():
    assert len(open_source('voc:/nowhere', 'shapes@5:9')) == 4


def test_concatenation_has_the_parts_in_order():
    source = open_source('shapes@3:5 + shapes + shapes@9:10', '7:9')
    ids = [source.annotations(index).image_id for index in range(len(source))]
    assert ids == [3, 4, 7, 8, 9] == [source[index].annotations.image_id for index in range(5)]
    with pytest.raises(IndexError):
        source[5]


def test_concatenated_parts_must_have_the_same_classes(tmp_path):
    (tmp_path / 'a.csv').write_text('image,xmin,ymin,xmax,ymax,label\na.csv,1,2,3,4,cat\n')
    with pytest.raises(UserError, match=r'the classes cat, but shapes.* has ellipse'):
        open_source(f'shapes@0:2 + csv:{tmp_path}/a.csv')


@pytest.mark.parametrize(
    ('spec', 'split', 'message'),
    [
        ('shape', '', "'shape' is not a data source: use shapes, tfds:NAME"),
        ('', 'trainval', r'no data source is given: set config\.dataset\.source to shapes, tfds:NAME'),
        ('shapes', '', 'use START:STOP'),
        ('shapes', '5:5', 'use START:STOP'),
        ('shapes:big', '0:5', 'shapes:big'),
        ('coco:a.json,b', 'train', "coco has no splits, got 'train'"),
        ('csv:a.csv', 'train', 'csv has no splits'),
    ],
)
def test_malformed_source_is_explained(spec, split, message):
    with pytest.raises(UserError, match=message):
        open_source(spec, split)


def test_shapes_have_their_own_classes():
    with pytest.raises(UserError, match='the classes of shapes are ellipse'):
        open_source('shapes', '0:5', class_names=('cat',))


def test_data_need_neither_jax_nor_tensorflow_datasets():
    """Start-up stays short, and the batches can be made where there is no accelerator."""
    code = """
import sys
for name in ('jax', 'tensorflow', 'tensorflow_datasets'):
    sys.modules[name] = None  # importing it fails
from effdet_jax import data
batches = data.train_batches(data.open_source('shapes', '0:3'), image_size=(64, 64), batch_size=2, max_boxes=8,
                             scale_range=(0.8, 1.2), seed=0, threads=1)
print(next(iter(batches))['image'].shape)
"""
    assert printed_by(code) == '(2, 64, 64, 3)\n'


@pytest.mark.parametrize('folder', ['a + b', 'my, data', 'me@home', 'a + b, c@d', 'shapes + rings'])
def test_folders_may_have_any_name(tmp_path, monkeypatch, folder):
    root = tmp_path / folder
    for name in ('JPEGImages', 'Annotations', 'ImageSets/Main'):
        (root / name).mkdir(parents=True)
    (root / 'JPEGImages' / 'a.jpg').touch()
    (root / 'Annotations' / 'a.xml').write_text('<annotation/>')
    (root / 'ImageSets' / 'Main' / 'train.txt').write_text('a')
    (root / 'table.csv').write_text('image,xmin,ymin,xmax,ymax,label\nJPEGImages/a.jpg,1,2,3,4,cat\n')
    coco = {'images': [{'id': 1, 'file_name': 'a.jpg'}], 'annotations': [], 'categories': [{'id': 1, 'name': 'cat'}]}
    (root / 'coco.json').write_text(json.dumps(coco))
    for where in (str(root), folder):
        monkeypatch.chdir(tmp_path)
        csv, voc, json_ = f'csv:{where}/table.csv', f'voc:{where}', f'coco:{where}/coco.json,{where}/JPEGImages'
        for spec, split in (('', csv), (voc, 'train'), ('', f'{voc}@train'), ('', json_), (csv, '')):
            assert len(open_source(spec, split)) == 1
        assert len(open_source(f'{csv} + coco:{where}/coco.json, {where}/JPEGImages')) == 2


def test_a_user_that_does_not_exist_is_a_folder_that_does_not_exist():
    with pytest.raises(UserError, match='no such file'):
        open_source('csv:~nobody_of_this_name/a.csv')


def write_table(root, *rows):
    for folder in ('day', 'night'):
        (root / folder).mkdir(parents=True, exist_ok=True)
        for name in ('a.jpg', 'b.jpg'):
            (root / folder / name).touch()
    (root / 'boxes.csv').write_text('\n'.join(['image,xmin,ymin,xmax,ymax,label', *rows]) + '\n')
    return f'csv:{root}/boxes.csv'


ROWS = ('day/a.jpg,1,2,3,4,cat', 'day/b.jpg,1,2,3,4,dog', 'night/a.jpg,,,,,')


def test_fingerprint_of_files_survives_a_move(tmp_path, monkeypatch):
    known = fingerprint(open_source(write_table(tmp_path / 'old', *ROWS)))
    assert len(known) == 32 and int(known, 16)
    assert fingerprint(open_source(write_table(tmp_path / 'new' / 'place', *ROWS))) == known
    monkeypatch.chdir(tmp_path / 'new')
    assert fingerprint(open_source('csv:place/boxes.csv')) == known


@pytest.mark.parametrize(
    'rows',
    [
        ROWS[:2],
        (ROWS[1], ROWS[0], ROWS[2]),
        ('day/a.jpg,1,2,3,5,cat', *ROWS[1:]),
        ('day/a.jpg,1,2,3,4,dog', *ROWS[1:]),
        (*ROWS, 'day/a.jpg,5,6,7,8,cat'),
        (ROWS[0], ROWS[1], 'night/b.jpg,,,,,'),
        (ROWS[0], ROWS[1], 'day/a.jpg,,,,,'),
        tuple(row.replace('dog', 'cow') for row in ROWS),
    ],
    ids=['image gone', 'order', 'box', 'label', 'object more', 'other file', 'other folder', 'class name'],
)
def test_fingerprint_changes_with_names_boxes_and_labels(tmp_path, rows):
    known = fingerprint(open_source(write_table(tmp_path, *ROWS)))
    assert fingerprint(open_source(write_table(tmp_path, *rows))) != known


def test_fingerprint_of_drawings_and_of_several_sources(tmp_path):
    specs = ['shapes@0:8', 'shapes@0:16', 'shapes@8:16', 'shapes@0:8 + shapes@8:16', 'shapes@8:16 + shapes@0:8']
    assert len({fingerprint(open_source(spec)) for spec in specs}) == len(specs)
    assert fingerprint(open_source('shapes@0:8')) == fingerprint(open_source('shapes', '0:8'))
