"""Damaged and hostile files: whatever is in them, the readers return something or raise a UserError of one line.

11,000 inputs in each run: valid files with bytes replaced, inserted, removed, repeated, and files of noise.
"""

import io
import json

import cv2
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from effdet_jax.data import open_source, survey, transforms
from effdet_jax.errors import UserError

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings('ignore')]  # Pillow's about what it reads

IMAGE = cv2.imencode('.png', np.zeros((30, 40, 3), np.uint8))[1].tobytes()
TOKENS = (
    b'0', b'-1', b'1e999', b'NaN', b'-Infinity', b'9' * 400, b'9' * 5000, b'null', b'true', b'""', b'{}', b'[]', b'[[',
    b'"', b',', b',,,,,,,,', b'\n', b'\r\n', b'\0', b'\xff', b'\xed\xa0\x80', b'\\ud800', b'\\u0000', b'../', b'/',
    b'a' * 300, b'<', b'>', b'</object>', b'<object>', b'&a;', b'<!DOCTYPE a [<!ENTITY a "aaaa">]>',
    b'<?xml version="1.0" encoding="x"?>', b'<bndbox><xmin>', b'_1', b'1.5', b'1e30', b'id', b'bbox', b'file_name',
    b'image', b'cat', b'\x1b[31m',
)  # fmt: skip

edits = st.lists(
    st.tuples(st.integers(0, 2**16 - 1), st.integers(0, 12), st.sampled_from(TOKENS) | st.binary(max_size=4)),
    min_size=1,
    max_size=4,
)


def damaged(valid: bytes) -> st.SearchStrategy[bytes]:
    """`valid` after a few edits, each of which puts a text in the place of some bytes; also cut off, or noise."""

    def apply(changes) -> bytes:
        content = valid
        for place, removed, text in changes:
            start = place % (len(content) + 1)
            content = content[:start] + text + content[start + removed :]
        return content

    cut = st.integers(0, len(valid)).map(lambda end: valid[:end])
    return st.one_of(edits.map(apply), edits.map(apply), edits.map(apply), cut, st.binary(max_size=60))


def fuzz(inputs: int):
    checks = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large]
    return settings(max_examples=inputs, deadline=None, suppress_health_check=checks)


def only_user_errors(function) -> None:
    try:
        function()
    except UserError as error:
        assert str(error).isprintable()


def use_all_of(spec: str) -> None:
    """Everything that reading a source leads to: training's way in, and the check's."""
    only_user_errors(lambda: open_source(spec, class_names=('cat', 'dog')))

    def check() -> None:
        source = open_source(spec, faulty=True)
        listing = source.listing(100, lambda items, *_: items)
        found = survey.check_labels(listing)
        found += survey.check_training(listing, 2, (64, 64), lambda boxes: np.zeros(len(boxes), np.float32), 0.5)
        assert all(finding.message.isprintable() for finding in found)
        for index in range(len(source)):
            only_user_errors(lambda index=index: source[index])
            assert np.isfinite(source.annotations(index).boxes_yxyx).all()

    only_user_errors(check)


@pytest.fixture(scope='module')
def root(tmp_path_factory):
    """A folder with two images in every layout."""
    folder = tmp_path_factory.mktemp('fuzz')
    for name in ('Annotations', 'ImageSets/Main', 'JPEGImages'):
        (folder / name).mkdir(parents=True)
    for name in ('a', 'b'):
        (folder / 'JPEGImages' / f'{name}.png').write_bytes(IMAGE)
        (folder / 'Annotations' / f'{name}.xml').write_bytes(XML)
    (folder / 'ImageSets' / 'Main' / 'all.txt').write_bytes(b'a 1\nb -1\n')
    return folder


XML = (
    b'<annotation><size><width>40</width><height>30</height></size><object><name>cat</name><difficult>0</difficult>'
    b'<bndbox><xmin>5</xmin><ymin>4</ymin><xmax>25</xmax><ymax>14</ymax></bndbox></object><object><name>dog</name>'
    b'<bndbox><xmin>0</xmin><ymin>0</ymin><xmax>40</xmax><ymax>30</ymax></bndbox></object></annotation>'
)
COCO = json.dumps(
    {
        'images': [
            {'id': 70, 'file_name': 'a.png', 'width': 40, 'height': 30},
            {'id': 5, 'file_name': 'b.png', 'width': 40, 'height': 30},
        ],
        'categories': [{'id': 18, 'name': 'dog'}, {'id': 17, 'name': 'cat'}],
        'annotations': [
            {'id': 1, 'image_id': 70, 'category_id': 17, 'bbox': [5, 4, 20, 10], 'area': 111.5, 'iscrowd': 0},
            {'id': 2, 'image_id': 5, 'category_id': 18, 'bbox': [0, 0, 40, 30], 'iscrowd': 1},
        ],
    }
).encode()
CSV = (
    b'image,xmin,ymin,xmax,ymax,label\nJPEGImages/a.png,5,4,25,14,cat\nJPEGImages/a.png,0,0,40,30,"dog"\n'
    b'JPEGImages/b.png,,,,,\n'
)


@fuzz(2000)
@given(damaged(XML))
def test_voc_annotations(root, content):
    (root / 'Annotations' / 'a.xml').write_bytes(content)
    use_all_of(f'voc:{root}@all')


@fuzz(500)
@given(damaged(b'a 1\nb -1\n'))
def test_voc_lists(root, content):
    (root / 'ImageSets' / 'Main' / 'some.txt').write_bytes(content)
    use_all_of(f'voc:{root}@some')


@fuzz(2000)
@given(damaged(COCO))
def test_coco(root, content):
    (root / 'coco.json').write_bytes(content)
    use_all_of(f'coco:{root}/coco.json,{root}/JPEGImages')


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


@fuzz(1000)
@given(st.sampled_from(['images', 'categories', 'annotations']), st.data())
def test_coco_with_values_of_any_type(root, part, data):
    content = json.loads(COCO)
    row = content[part][data.draw(st.integers(0, 1))]
    row[data.draw(st.sampled_from(sorted(row)))] = data.draw(json_values)
    (root / 'coco.json').write_text(json.dumps(content))
    use_all_of(f'coco:{root}/coco.json,{root}/JPEGImages')


@fuzz(2000)
@given(damaged(CSV))
def test_csv(root, content):
    (root / 'table.csv').write_bytes(content)
    use_all_of(f'csv:{root}/table.csv')


def encoded(format_: str, mode: str = 'RGB') -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.arange(16 * 24 * 3, dtype=np.uint8).reshape(16, 24, 3)).convert(mode).save(buffer, format_)
    return buffer.getvalue()


IMAGES = [encoded(name) for name in ('JPEG', 'PNG', 'WEBP', 'BMP', 'TIFF', 'GIF', 'AVIF', 'JPEG2000', 'PPM')]
IMAGES += [encoded('PNG', 'RGBA'), encoded('PNG', 'P'), encoded('WEBP', 'RGBA'), encoded('JPEG', 'CMYK')]


@fuzz(3500)
@given(st.sampled_from(IMAGES).flatmap(damaged))
def test_images(content):
    def read() -> None:
        height, width = transforms.image_size(content, 'x')
        assert height * width <= transforms.MAX_PIXELS
        assert transforms.decode(content, 'x').shape == (height, width, 3)
        assert transforms.exif_orientation(content, 'x') in range(1, 9)
        transforms.is_deep(content, 'x')

    only_user_errors(read)
