import json
from pathlib import Path

import cv2
import numpy as np
import pytest

from effdet_jax.data import open_source
from effdet_jax.errors import UserError

BCCD = Path(__file__).parents[3] / 'shared' / 'data' / 'bccd'
needs_bccd = pytest.mark.skipif(not BCCD.is_dir(), reason=f'no photographs: {BCCD} is absent')

# one picture of 40x30 (width x height) with a cat and a crowd of dogs, one of 20x10 with nothing
CAT, DOGS = (4.0, 5.0, 14.0, 25.0), (0.0, 0.0, 30.0, 40.0)  # yxyx


def write_images(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(folder / 'a.jpg'), np.zeros((30, 40, 3), np.uint8))
    cv2.imwrite(str(folder / 'b.jpg'), np.zeros((10, 20, 3), np.uint8))


def coco_content() -> dict:
    return {
        'images': [
            {'id': 70, 'file_name': 'a.jpg', 'width': 40, 'height': 30},
            {'id': 5, 'file_name': 'b.jpg', 'width': 20, 'height': 10},
        ],
        'categories': [{'id': 18, 'name': 'dog'}, {'id': 17, 'name': 'cat'}],
        'annotations': [
            {'id': 1, 'image_id': 70, 'category_id': 17, 'bbox': [5, 4, 20, 10], 'area': 111.5, 'iscrowd': 0},
            {'id': 2, 'image_id': 70, 'category_id': 18, 'bbox': [0, 0, 40, 30], 'iscrowd': 1},
        ],
    }


def coco(root: Path, content: dict | None = None) -> str:
    write_images(root / 'images')
    (root / 'coco.json').write_text(json.dumps(content or coco_content()))
    return f'coco:{root}/coco.json,{root}/images'


OBJECT = (
    '<object><name>{name}</name><difficult>{difficult}</difficult><bndbox><xmin>{x1}</xmin><ymin>{y1}</ymin>'
    '<xmax>{x2}</xmax><ymax>{y2}</ymax></bndbox></object>'
)


def voc_object(name: str, box=CAT, difficult: int = 0) -> str:
    y1, x1, y2, x2 = box
    return OBJECT.format(name=name, difficult=difficult, x1=x1, y1=y1, x2=x2, y2=y2)


def voc(root: Path, objects: str | None = None, size: str = '<width>40</width><height>30</height>') -> str:
    write_images(root / 'JPEGImages')
    (root / 'Annotations').mkdir(exist_ok=True)
    (root / 'ImageSets' / 'Main').mkdir(parents=True, exist_ok=True)
    objects = voc_object('cat') + voc_object('dog', DOGS, difficult=1) if objects is None else objects
    (root / 'Annotations' / 'a.xml').write_text(f'<annotation><size>{size}</size>{objects}</annotation>')
    (root / 'Annotations' / 'b.xml').write_text('<annotation><filename>b.jpg</filename></annotation>')
    (root / 'ImageSets' / 'Main' / 'train.txt').write_text('a  1\nb -1\n\n')
    (root / 'ImageSets' / 'Main' / 'none.txt').write_text('\n')
    return f'voc:{root}@train'


def table(root: Path, rows: str | None = None) -> str:
    write_images(root / 'images')
    rows = 'images/a.jpg,5,4,25,14,cat\nimages/a.jpg,0,0,40,30,dog\nimages/b.jpg,,,,,\n' if rows is None else rows
    (root / 'table.csv').write_text(f'image,xmin,ymin,xmax,ymax,label\n{rows}')
    return f'csv:{root}/table.csv'


@pytest.mark.parametrize('write', [coco, voc, table])
def test_three_layouts_say_the_same(write, tmp_path):
    source = open_source(write(tmp_path))
    assert len(source) == 2 and source.class_names == ('cat', 'dog') and source.faults == ()
    example = source[0]
    assert example.image == next(tmp_path.rglob('a.jpg')).read_bytes()
    np.testing.assert_array_equal(example.annotations.boxes_yxyx, [CAT, DOGS])
    np.testing.assert_array_equal(example.annotations.labels, [0, 1])
    assert example.annotations.file_name.endswith('a.jpg')
    assert source.annotations(1).boxes_yxyx.shape == (0, 4) and source[1].annotations.labels.shape == (0,)
    np.testing.assert_array_equal(source.annotations(0).areas, example.annotations.areas)


def test_what_only_coco_knows(tmp_path):
    source = open_source(coco(tmp_path))
    assert source.category_ids == (17, 18)
    annotations = source.annotations(0)
    assert annotations.image_id == 70 and source.annotations(1).image_id == 5
    np.testing.assert_array_equal(annotations.areas, [111.5, 1200])
    np.testing.assert_array_equal(annotations.is_crowd, [False, True])


def test_what_only_voc_knows(tmp_path):
    source = open_source(voc(tmp_path))
    assert source.category_ids == (1, 2) and source.annotations(0).image_id == 'a'
    np.testing.assert_array_equal(source.annotations(0).is_difficult, [False, True])


def test_voc_classes_come_from_all_files_not_from_the_split(tmp_path):
    spec = voc(tmp_path)
    (tmp_path / 'Annotations' / 'unlisted.xml').write_text(f'<annotation>{voc_object("ant")}</annotation>')
    assert open_source(spec).class_names == ('ant', 'cat', 'dog')


def test_equal_file_names_in_different_folders_are_different_images(tmp_path):
    write_images(tmp_path / 'x')
    source = open_source(table(tmp_path, 'images/a.jpg,1,1,9,9,cat\nx/a.jpg,1,1,9,9,cat\n'))
    assert [source.annotations(index).image_id for index in range(2)] == [0, 1]


def test_given_class_names_fix_the_labels(tmp_path):
    source = open_source(coco(tmp_path), class_names=('eel', 'dog', 'cat'))
    np.testing.assert_array_equal(source.annotations(0).labels, [2, 1])
    assert source.category_ids[1:] == (18, 17) and len(set(source.category_ids)) == 3


@pytest.mark.parametrize('write', [coco, voc, table])
def test_label_outside_the_given_names_is_named(write, tmp_path):
    with pytest.raises(UserError, match=r"(coco\.json|a\.xml|table\.csv:3).*'dog'.*\(cat, eel\)"):
        open_source(write(tmp_path), class_names=('cat', 'eel'))


def test_faulty_boxes_are_mended(tmp_path):
    objects = ''.join(
        voc_object('cat', box) for box in [CAT, (3, 3, 3, 9), (9, 9, 1, 1), (50, 0, 60, 5), (20, 20, 90, 90)]
    )
    source = open_source(voc(tmp_path, objects))
    np.testing.assert_array_equal(source.annotations(0).boxes_yxyx, [CAT, (20, 20, 30, 40)])
    assert len(source.listing(9, iter).labels) == 5  # what is in the file stays known


def test_size_comes_from_the_image_where_the_annotations_have_none(tmp_path):
    source = open_source(voc(tmp_path, voc_object('cat', (20, 20, 90, 90)), size=''))
    np.testing.assert_array_equal(source.annotations(0).boxes_yxyx, [(20, 20, 30, 40)])


def test_image_of_another_size_than_annotated_is_an_error(tmp_path):
    source = open_source(voc(tmp_path, size='<width>30</width><height>40</height>'))
    with pytest.raises(UserError, match=r'a\.jpg: the image is 40x30, its annotations say 30x40'):
        source[0]


def broken_coco(**changes):
    return lambda root: coco(root, {**coco_content(), **changes})


def annotation(**changes):
    return broken_coco(annotations=[{**coco_content()['annotations'][0], **changes}])


def remove(*names: str):
    def write(root: Path) -> str:
        spec = voc(root)
        for name in names:
            (root / name).unlink()
        return spec

    return write


def overwrite(name: str, text: str, write):
    def write_and_overwrite(root: Path) -> str:
        spec = write(root)
        (root / name).write_text(text)
        return spec

    return write_and_overwrite


@pytest.mark.parametrize(
    ('write', 'message'),
    [
        (remove('JPEGImages/b.jpg'), r'b\.jpg: there is no such file: add it'),
        (
            remove('Annotations/a.xml', 'Annotations/b.xml'),
            r'Annotations: none of the 2 images of .* has an XML',
        ),
        (remove('Annotations/b.xml', 'JPEGImages/b.jpg'), r'b\.jpg: there is no such file: add it'),
        (overwrite('Annotations/a.xml', '<annotation>\n<object>', voc), r'a\.xml: not valid XML .*line 2'),
        (lambda root: voc(root, '<object><name>cat</name></object>'), r'a\.xml: an object without <bndbox/ymin>'),
        (lambda root: voc(root, voc_object('cat', (1, 2, 'nan', 4))), r'a\.xml: cat: expected 4 finite numbers'),
        (lambda root: voc(root).replace('@train', '@tran'), "no split 'tran': choose one of none, train"),
        (lambda root: voc(root).replace('@train', '@none'), r'none\.txt: the split is empty'),
        (lambda root: f'voc:{root}@train', 'Annotations: no such folder'),
        (overwrite('coco.json', '{"images": [', coco), r'coco\.json: not valid JSON .*line 1'),
        (overwrite('coco.json', '[]', coco), r'coco\.json: no list of annotations and categories and images'),
        (lambda root: f'coco:{root}/x.json,{root}', r'x\.json: no such file'),
        (lambda root: f'coco:{root}', 'write coco:JSON,IMAGES'),
        (annotation(category_id=3), 'annotation 1: no image 70 or no category 3'),
        (annotation(image_id=3), 'annotation 1: no image 3 or'),
        (annotation(bbox=[1, 2, 3]), 'annotation 1: expected 4 finite numbers'),
        (annotation(bbox=[1, 2, 3, float('nan')]), 'annotation 1: expected 4 finite numbers'),
        (broken_coco(images=[], annotations=[]), 'lists no images'),
        (broken_coco(categories=[{'id': 17, 'name': 'x'}, {'id': 18, 'name': 'x'}]), 'the same name'),
        (overwrite('table.csv', 'image,label\na,b\n', table), r'table\.csv:1: the header is'),
        (lambda root: table(root, 'images/a.jpg,1,2,3,4,cat\nimages/a.jpg,1,2,3,x,cat\n'), r'table\.csv:3: expected 4'),
        (lambda root: table(root, 'images/a.jpg,1,2,,,cat\n'), r'table\.csv:2: expected 4'),
        (lambda root: table(root, 'images/a.jpg,1,2,3\n'), r'table\.csv:2: a row needs'),
        (lambda root: table(root, 'images/a.jpg,1,2,3,4,\n'), r"table\.csv:2: label ''"),
        (lambda root: table(root, 'images/c.jpg,1,2,3,4,cat\n'), r'c\.jpg: there is no such file: add it'),
        (lambda root: table(root, ''), 'the table has no rows'),
        (lambda root: f'csv:{root}/x.csv', r'x\.csv: no such file'),
    ],
)
def test_error_says_where_and_what(write, message, tmp_path):
    with pytest.raises(UserError, match=message) as error:
        open_source(write(tmp_path))
    assert '\n' not in str(error.value)


@needs_bccd
def test_blood_cells():
    train, test = open_source(f'voc:{BCCD}', 'trainval'), open_source(f'voc:{BCCD}@test')
    assert (len(train), len(test)) == (292, 72)
    assert train.class_names == test.class_names == ('Platelets', 'RBC', 'WBC')
    stated = sum(path.read_text().count('<object>') for path in (BCCD / 'Annotations').glob('*.xml'))
    found = sum(len(source.annotations(i).labels) for source in (train, test) for i in range(len(source)))
    assert found == stated - 2
