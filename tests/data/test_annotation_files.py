import json
import shutil
import unicodedata
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from effdet_jax.data import load, open_source
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
    with pytest.raises(UserError, match=r'a\.jpg: the image is 40x30, the annotations say 30x40'):
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
        (remove('JPEGImages/b.jpg'), r'b\.jpg: no such file: add the file'),
        (
            remove('Annotations/a.xml', 'Annotations/b.xml'),
            r'Annotations: none of the 2 images in .* has an XML',
        ),
        (remove('Annotations/b.xml', 'JPEGImages/b.jpg'), r'b\.jpg: no such file: add the file'),
        (overwrite('Annotations/a.xml', '<annotation>\n<object>', voc), r'a\.xml: not valid XML .*line 2'),
        (lambda root: voc(root, '<object><name>cat</name></object>'), r'a\.xml: object without <bndbox/ymin>'),
        (lambda root: voc(root, voc_object('cat', (1, 2, 'nan', 4))), r'a\.xml: cat: expected 4 finite numbers'),
        (lambda root: voc(root).replace('@train', '@tran'), "no split 'tran': choose one of none, train"),
        (lambda root: voc(root).replace('@train', '@none'), r'none\.txt: the split is empty'),
        (lambda root: f'voc:{root}@train', 'Annotations: no such folder'),
        (overwrite('coco.json', '{"images": [', coco), r'coco\.json: not valid JSON .*line 1'),
        (overwrite('coco.json', '[]', coco), r'coco\.json: annotations and categories and images missing'),
        (lambda root: f'coco:{root}/x.json,{root}', r'x\.json: no such file'),
        (lambda root: f'coco:{root}', 'use coco:JSON,IMAGES'),
        (annotation(category_id=3), 'annotation 1: no image 70 or no category 3'),
        (annotation(image_id=3), 'annotation 1: no image 3 or'),
        (annotation(bbox=[1, 2, 3]), 'annotation 1: expected 4 finite numbers'),
        (annotation(bbox=[1, 2, 3, float('nan')]), 'annotation 1: expected 4 finite numbers'),
        (broken_coco(images=[], annotations=[]), 'no images are listed'),
        (broken_coco(categories=[{'id': 17, 'name': 'x'}, {'id': 18, 'name': 'x'}]), 'the same name'),
        (overwrite('table.csv', 'image,label\na,b\n', table), r'table\.csv:1: the header is'),
        (lambda root: table(root, 'images/a.jpg,1,2,3,4,cat\nimages/a.jpg,1,2,3,x,cat\n'), r'table\.csv:3: expected 4'),
        (lambda root: table(root, 'images/a.jpg,1,2,,,cat\n'), r'table\.csv:2: expected 4'),
        (lambda root: table(root, 'images/a.jpg,1,2,3\n'), r'table\.csv:2: a row must have'),
        (lambda root: table(root, 'images/a.jpg,1,2,3,4,\n'), r"table\.csv:2: label ''"),
        (lambda root: table(root, 'images/c.jpg,1,2,3,4,cat\n'), r'c\.jpg: no such file: add the file'),
        (lambda root: table(root, ''), 'the table has no rows'),
        (lambda root: f'csv:{root}/x.csv', r'x\.csv: no such file'),
    ],
)
def test_error_says_where_and_what(write, message, tmp_path):
    with pytest.raises(UserError, match=message) as error:
        open_source(write(tmp_path))
    assert '\n' not in str(error.value)


# What other tools write.


@pytest.mark.parametrize('write', [str, float, int])
def test_ids_of_coco_may_be_texts_or_floats(tmp_path, write):
    content = coco_content()
    for row in content['images'] + content['categories']:
        row['id'] = write(row['id'])
    for row in content['annotations']:
        row['id'] = write(row['id'])
    source = open_source(coco(tmp_path, content))
    assert source.category_ids == (17, 18) and source.annotations(0).image_id == 70
    assert source.annotations(0).labels.tolist() == [0, 1]
    assert source.listing(9, iter).numbers.tolist() == [1, 2]


def test_huge_ids_of_coco_are_kept(tmp_path):
    content, huge = coco_content(), 10**20
    for row in content['images'] + content['categories']:
        row['id'] += huge
    for row in content['annotations']:
        row.update(id=row['id'] + huge, image_id=row['image_id'] + huge, category_id=row['category_id'] + huge)
    source = open_source(coco(tmp_path, content))
    assert source.category_ids == (17 + huge, 18 + huge) and source.annotations(0).image_id == 70 + huge


def test_a_text_with_leading_zeros_is_no_number(tmp_path):
    content = coco_content()
    content['images'] = [{**content['images'][0], 'id': image_id} for image_id in ('007', 7, 'img_7')]
    content['annotations'] = [{**content['annotations'][0], 'image_id': image_id} for image_id in ('7', '007', 'img_7')]
    source = open_source(coco(tmp_path, content))
    assert [source.annotations(i).image_id for i in range(3)] == ['007', 7, 'img_7']
    assert [len(source.annotations(i).labels) for i in range(3)] == [1, 1, 1]


@pytest.mark.parametrize('name', ['images\\Tür.JPG', 'images/Tür.jpg', '{root}/images/Tür.jpg', 'Images/tür.jpg '])
def test_image_names_of_coco_in_other_spellings(tmp_path, name):
    write_images(tmp_path / 'images')
    disk = tmp_path / 'images' / unicodedata.normalize('NFD', 'Tür.jpg')
    (tmp_path / 'images' / 'a.jpg').rename(disk)
    content = coco_content()
    content['images'] = [{**content['images'][0], 'file_name': name.format(root=tmp_path)}]
    (tmp_path / 'coco.json').write_text(json.dumps(content))
    assert open_source(f'coco:{tmp_path}/coco.json,{tmp_path}')[0].image == disk.read_bytes()


@pytest.mark.parametrize(
    ('mark', 'is_crowd'),
    [('0', False), ('false', False), ('', False), (0.0, False), (None, False), (False, False), ('False', False),
     ('1', True), ('true', True), (1.0, True), (True, True), (1, True)],
)  # fmt: skip
def test_iscrowd_may_be_text(tmp_path, mark, is_crowd):
    assert open_source(annotation(iscrowd=mark)(tmp_path)).annotations(0).is_crowd.tolist() == [is_crowd]


@pytest.mark.parametrize(('mark', 'is_difficult'), [('0', False), ('', False), ('1', True), ('true', True)])
def test_difficult_may_be_a_word(tmp_path, mark, is_difficult):
    source = open_source(voc(tmp_path, voc_object('cat', difficult=mark)))
    assert source.annotations(0).is_difficult.tolist() == [is_difficult]


def test_labels_are_taken_without_blanks_around_them(tmp_path):
    assert open_source(table(tmp_path, 'images/a.jpg,1,2,3,4, cat\nimages/a.jpg,1,2,3,5,cat\t\n')).class_names == (
        'cat',
    )
    categories = [{'id': 17, 'name': ' cat'}, {'id': 18, 'name': 'dog '}]
    assert open_source(broken_coco(categories=categories)(tmp_path)).class_names == ('cat', 'dog')


@pytest.mark.parametrize(
    ('write', 'message'),
    [
        (
            broken_coco(categories=[{'id': 17, 'name': None}]),
            r"category \{'id': 17, 'name': None\} .*invalid name None",
        ),
        (broken_coco(categories=[{'id': 17, 'name': ' '}]), 'invalid name'),
        (broken_coco(categories=[{'id': 'x7', 'name': 'cat'}]), "its id, 'x7', is not an integer"),
        (broken_coco(categories=[{'id': 1, 'name': 'a'}, {'id': '1', 'name': 'b'}]), 'duplicate id 1'),
        (broken_coco(categories=[{'id': 1, 'name': 'a'}, {'id': 2, 'name': ' a'}]), r'the same name \(a\)'),
        (annotation(iscrowd='maybe'), "annotation 1: its iscrowd, 'maybe', is neither 0 nor 1"),
        (annotation(category_id='cat'), "annotation 1: its category_id, 'cat', is not an integer"),
        (annotation(image_id=None), 'annotation 1: its id, None, is not an integer'),
    ],
)
def test_what_is_no_id_name_or_mark_is_told(write, message, tmp_path):
    with pytest.raises(UserError, match=message):
        open_source(write(tmp_path))


HEADER = 'image,xmin,ymin,xmax,ymax,label'
ROWS = f'{HEADER}\nimages/a.jpg,5,4,25,14,cat\nimages/a.jpg,0,0,40,30,dog\nimages/b.jpg,,,,,\n'


@pytest.mark.parametrize(
    'content',
    [
        ROWS.encode('utf-8-sig'),
        ROWS.encode('utf-16'),
        ROWS.replace('\n', '\r\n').encode(),
        ROWS.replace(',', ';').encode(),
        ROWS.replace(',', '\t').encode(),
        ROWS.replace(',', ' , ').encode(),
        ROWS.replace('/', '\\').encode(),
        ROWS.replace('a.jpg', 'A.JPG').encode(),
        ROWS.replace(HEADER, HEADER.title()).encode(),
        ROWS.replace(',,,,,', ',nan,nan,nan,nan,nan').encode(),
        ROWS.replace(',,,,,', ',NaN,NaN,NaN,NaN,').encode(),
        ROWS.replace(',,,,,', ',NA,None,null,<NA>,N/A').encode(),
    ],
    ids=['mark', 'utf-16', 'crlf', 'semicolons', 'tabs', 'blanks', 'backslashes', 'case', 'header', 'nan', 'NaN', 'NA'],
)
def test_tables_of_other_programs(tmp_path, content):
    table(tmp_path)
    expected = open_source(f'csv:{tmp_path}/table.csv')
    (tmp_path / 'table.csv').write_bytes(content)
    source = open_source(f'csv:{tmp_path}/table.csv')
    assert source.class_names == ('cat', 'dog') and len(source) == 2
    for index in range(2):
        np.testing.assert_array_equal(source[index].annotations.boxes_yxyx, expected[index].annotations.boxes_yxyx)
        assert source[index].annotations.file_name == expected[index].annotations.file_name


def test_a_class_may_be_called_none(tmp_path):
    assert open_source(table(tmp_path, 'images/a.jpg,1,2,3,4,None\nimages/b.jpg,,,,,\n')).class_names == ('None',)


@pytest.mark.parametrize('spec', ['csv:table.csv', 'csv:./table.csv', 'coco:coco.json,.'])
def test_images_beside_the_annotations_in_the_current_folder(tmp_path, monkeypatch, spec):
    write_images(tmp_path)
    (tmp_path / 'table.csv').write_text(ROWS.replace('images/', ''))
    (tmp_path / 'coco.json').write_text(json.dumps(coco_content()))
    monkeypatch.chdir(tmp_path)
    source = open_source(spec)
    assert source[0].annotations.file_name == 'a.jpg' and len(source) == 2


# Lists, images and XML files of VOC.


def rename(root: Path, **names: str) -> None:
    for old, new in names.items():
        for path in (root / 'Annotations' / f'{old}.xml', root / 'JPEGImages' / f'{old}.jpg'):
            target = path.parent / (new + path.suffix)
            target.parent.mkdir(exist_ok=True)
            path.rename(target)


@pytest.mark.parametrize(
    ('names', 'lines'),
    [
        (('a', 'b'), '\ufeffa\nb\n'),
        (('a', 'b'), 'a\r\nb\r\n'),
        (('a', 'b'), 'a\t1\nb -1\n'),
        (('a', 'b'), 'a.jpg\nb.jpg\n'),
        (('a', 'b'), 'A\nB 0\n'),
        (('IMG 001', 'cup (1)'), 'IMG 001\ncup (1)\n'),
        (('IMG 001', 'cup (1)'), 'IMG 001 1\ncup (1)  -1\n'),
        (('IMG 1', 'IMG 0'), 'IMG 1\nIMG 0 1\n'),
        (('cam1/a', 'cam2/a'), 'cam1/a\ncam2/a\n'),
        (('cam1/a', 'cam2/a'), 'cam1\\a\ncam2\\a\n'),
        (('a.v1', 'b.v2'), 'a.v1\nb.v2\n'),
    ],
)
def test_names_in_voc_lists(tmp_path, names, lines):
    spec = voc(tmp_path)
    rename(tmp_path, **dict(zip('ab', names, strict=True)))
    (tmp_path / 'ImageSets' / 'Main' / 'train.txt').write_text(lines, newline='')
    source = open_source(spec)
    assert source.faults == () and source.class_names == ('cat', 'dog')
    assert [source[i].annotations.file_name for i in range(2)] == [f'{tmp_path}/JPEGImages/{n}.jpg' for n in names]
    assert [len(source[i].annotations.labels) for i in range(2)] == [2, 0]


@pytest.mark.parametrize('encoding', ['utf-8-sig', 'utf-16'])
def test_voc_lists_of_other_encodings(tmp_path, encoding):
    spec = voc(tmp_path)
    (tmp_path / 'ImageSets' / 'Main' / 'train.txt').write_text('a\nb\n', encoding=encoding)
    assert open_source(spec).faults == ()


def test_classes_come_from_the_files_in_folders_too(tmp_path):
    spec = voc(tmp_path)
    rename(tmp_path, a='cam1/a')
    (tmp_path / 'ImageSets' / 'Main' / 'train.txt').write_text('b')
    assert open_source(spec).class_names == ('cat', 'dog')


@pytest.mark.parametrize('suffix', ['png', 'bmp', 'gif', 'avif', 'webp', 'jfif', 'JPG', 'tif'])
def test_voc_images_of_any_format_beside_other_files(tmp_path, suffix):
    spec = voc(tmp_path)
    images = tmp_path / 'JPEGImages'
    for folder in (images, images / 'sub'):
        folder.mkdir(exist_ok=True)
        for other in ('a.xml', 'a.txt', 'a.jpg.txt', 'Thumbs.db'):
            (folder / other).write_text('no image')
    (images / 'a.jpg').rename(images / f'a.{suffix}')
    assert open_source(spec)[0].annotations.file_name == f'{images}/a.{suffix}'


@pytest.mark.parametrize('stated', ['a.jpg', 'A.JPG', 'C:\\images\\a.jpg', '/home/me/a.jpg'])
def test_of_two_images_the_xml_says_which(tmp_path, stated):
    spec = voc(tmp_path, voc_object('cat') + f'<filename>{stated}</filename>')
    cv2.imwrite(str(tmp_path / 'JPEGImages' / 'a.png'), np.zeros((3, 4, 3), np.uint8))  # a thumbnail
    assert open_source(spec)[0].annotations.file_name.endswith('/a.jpg')


def test_two_images_of_which_nothing_says_which_are_a_fault(tmp_path):
    spec = voc(tmp_path)
    shutil.copy(tmp_path / 'JPEGImages' / 'a.jpg', tmp_path / 'JPEGImages' / 'a.png')
    with pytest.raises(UserError, match=r'a\.jpg and a\.png share a stem, and <filename> names none'):
        open_source(spec)


def test_an_image_of_a_format_that_is_not_read_is_named(tmp_path):
    spec = voc(tmp_path)
    (tmp_path / 'JPEGImages' / 'b.jpg').rename(tmp_path / 'JPEGImages' / 'b.heic')
    with pytest.raises(UserError, match=r'b\.jpg: no such file, only b\.heic'):
        open_source(spec)


def test_an_image_without_xml_has_no_objects_and_a_note(tmp_path):
    source = open_source(remove('Annotations/b.xml')(tmp_path))
    (note,) = source.faults
    assert (note.kind, note.image) == ('image_without_annotations', f'{tmp_path}/JPEGImages/b.jpg')
    assert len(source[1].annotations.labels) == 0


# EXIF: the upright image.


def turn(path: Path, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.open(path).save(path, exif=exif)


def test_annotations_of_the_upright_image_fit_an_image_that_is_stored_turned(tmp_path):
    spec = voc(tmp_path, voc_object('cat'), size='<width>30</width><height>40</height>')
    turn(tmp_path / 'JPEGImages' / 'a.jpg', 6)
    pixels, annotations = load(open_source(spec), 0)
    assert pixels.shape == (40, 30, 3)
    np.testing.assert_array_equal(annotations.boxes_yxyx, [CAT])


def test_annotations_of_the_stored_image_are_told_what_to_do(tmp_path):
    spec = voc(tmp_path)
    turn(tmp_path / 'JPEGImages' / 'a.jpg', 8)
    with pytest.raises(UserError, match=r'the image is 30x40, .* say 40x30 .*stored rotated.* EXIF .*exiftool'):
        open_source(spec)[0]


def test_boxes_are_cut_to_the_upright_image_where_no_size_is_annotated(tmp_path):
    spec = table(tmp_path, 'images/a.jpg,0,0,99,99,cat\n')
    turn(tmp_path / 'images' / 'a.jpg', 6)
    np.testing.assert_array_equal(open_source(spec)[0].annotations.boxes_yxyx, [(0, 0, 40, 30)])


@needs_bccd
def test_blood_cells():
    train, test = open_source(f'voc:{BCCD}', 'trainval'), open_source(f'voc:{BCCD}@test')
    assert (len(train), len(test)) == (292, 72)
    assert train.class_names == test.class_names == ('Platelets', 'RBC', 'WBC')
    stated = sum(path.read_text().count('<object>') for path in (BCCD / 'Annotations').glob('*.xml'))
    found = sum(len(source.annotations(i).labels) for source in (train, test) for i in range(len(source)))
    assert found == stated - 2
