"""Files made to do harm: each is refused with one line, before it has cost memory or time."""

import json
import os
import struct
import zlib

import cv2
import numpy as np
import pytest
from test_annotation_files import coco, coco_content, overwrite, table, voc

from effdet_jax.data import files, open_source, read_image, transforms
from effdet_jax.errors import UnreadableError, UserError

PIXELS = 60_000  # on each side: 10.8 GB as RGB


def png() -> bytes:
    header = struct.pack('>4sIIBBBBB', b'IHDR', PIXELS, PIXELS, 8, 2, 0, 0, 0)
    chunk = struct.pack('>I', 13) + header + struct.pack('>I', zlib.crc32(header))
    return b'\x89PNG\r\n\x1a\n' + chunk + struct.pack('>I4s', 1000, b'IDAT')


def jpeg() -> bytes:
    good = cv2.imencode('.jpg', np.zeros((8, 8, 3), np.uint8))[1].tobytes()
    at = good.index(b'\xff\xc0') + 5
    return good[:at] + struct.pack('>HH', PIXELS, PIXELS) + good[at + 4 :]


def bmp() -> bytes:
    return b'BM' + struct.pack('<IHHIIiiHHIIiiII', 54, 0, 0, 54, 40, PIXELS, PIXELS, 1, 24, 0, 0, 0, 0, 0, 0)


def tiff() -> bytes:
    entries = [(256, 4, 1, PIXELS), (257, 4, 1, PIXELS), (258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 1), (273, 4, 1, 0)]
    return (
        struct.pack('<2sHIH', b'II', 42, 8, len(entries))
        + b''.join(struct.pack('<HHII', *e) for e in entries)
        + bytes(4)
    )


@pytest.mark.parametrize('bomb', [png, jpeg, bmp, tiff, lambda: b'P6 60000 60000 255\n'])
def test_an_enormous_image_is_refused_by_its_header(bomb):
    for read in (transforms.decode, transforms.image_size):
        with pytest.raises(UnreadableError, match=r'^bomb: more than 178 megapixels, probably damaged: scale it down'):
            read(bomb(), 'bomb')


def test_the_limit_is_a_number_of_pixels(monkeypatch):
    encoded = cv2.imencode('.png', np.zeros((10, 12, 3), np.uint8))[1].tobytes()
    monkeypatch.setattr(transforms, 'MAX_PIXELS', 120)
    assert transforms.decode(encoded, 'x').shape == (10, 12, 3)
    monkeypatch.setattr(transforms, 'MAX_PIXELS', 119)
    with pytest.raises(UnreadableError, match='megapixels'):
        transforms.decode(encoded, 'x')


@pytest.mark.parametrize(
    'content',
    [
        b'#?RADIANCE\nFORMAT=32-bit_rle_rgbe\n\n-Y 60000 +X 60000\n',
        b'P7\nWIDTH 60000\nHEIGHT 60000\nDEPTH 3\nMAXVAL 255\nTUPLTYPE RGB\nENDHDR\n',
        b'PF\n60000 60000\n-1.0\n',
        b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n',
        b'<svg xmlns="http://www.w3.org/2000/svg"/>',
        b'not a picture',
    ],
    ids=['radiance', 'pam', 'pfm', 'eps', 'svg', 'text'],
)
def test_formats_that_only_one_library_knows_are_refused(content):
    """Those OpenCV alone would decode without a limit of ours; EPS, which Pillow alone knows, is a program."""
    with pytest.raises(UnreadableError, match=r'not a readable image \(JPEG, PNG'):
        transforms.decode(content, 'x')


def test_what_is_no_regular_file_is_not_read(tmp_path):
    os.mkfifo(tmp_path / 'pipe.jpg')
    (tmp_path / 'zeros.jpg').symlink_to('/dev/zero')
    for name in ('pipe.jpg', 'zeros.jpg', '.'):
        with pytest.raises(UnreadableError, match='not a regular file: replace or remove'):
            read_image(tmp_path / name)
    with pytest.raises(UnreadableError, match='not a valid file name'):
        read_image('a\0b.jpg')


def test_a_file_larger_than_the_decoders_take_is_not_read(tmp_path):
    path = tmp_path / 'x.png'
    with path.open('wb') as file:
        file.truncate(files.MAX_BYTES + 1)  # sparse: it takes no room
    with pytest.raises(UnreadableError, match=r'x\.png: 2,147,483,648 bytes, more than'):
        read_image(path)


def test_symbolic_links_are_fine(tmp_path):
    spec = voc(tmp_path)
    (tmp_path / 'JPEGImages' / 'a.jpg').rename(tmp_path / 'elsewhere.jpg')
    (tmp_path / 'JPEGImages' / 'a.jpg').symlink_to('../elsewhere.jpg')
    assert open_source(spec)[0].annotations.labels.tolist() == [0, 1]


def test_a_split_is_a_name_and_no_path(tmp_path):
    voc(tmp_path)
    (tmp_path / 'list.txt').write_text('a\n')
    with pytest.raises(UserError, match=r"has no split '\.\./\.\./list': choose one of none, train"):
        open_source(f'voc:{tmp_path}', '../../list')


def test_names_with_dots_that_stay_inside_are_fine(tmp_path):
    assert len(open_source(table(tmp_path, 'images/../images/./a.jpg,1,1,9,9,cat\nimages/b.jpg,,,,,\n'))) == 2


def named(name: str):
    content = coco_content()
    return lambda root: coco(root, {**content, 'images': [{**content['images'][0], 'file_name': name}]})


LAUGHS = '<!DOCTYPE a [<!ENTITY a "{}">{}]><annotation><size><width>&j;</width></size></annotation>'.format(
    'ha' * 100, ''.join(f'<!ENTITY {b} "{f"&{a};" * 100}">' for a, b in zip('abcdefghi', 'bcdefghij', strict=True))
)
EXTERNAL = (
    '<!DOCTYPE a [<!ENTITY e SYSTEM "file:///etc/passwd">]><annotation><object><name>&e;</name></object></annotation>'
)


@pytest.mark.parametrize(
    ('write', 'message'),
    [
        (named('../coco.json'), r"image 70: the file name '\.\./coco\.json' points outside .*images: use a path"),
        (named('/etc/passwd'), r"the file name '/etc/passwd' points outside"),
        (named(''), "the file name '' points outside"),
        (named('a/../../x.jpg'), 'points outside'),
        (named('a\0.jpg'), r'a\\x00\.jpg: no such file'),
        (named('\ud800.jpg'), r'\\ud800\.jpg: no such file'),
        (lambda root: table(root, '../x.jpg,1,2,3,4,cat\n'), r"table\.csv:2: the file name '\.\./x\.jpg' points"),
        (overwrite('ImageSets/Main/train.txt', '../../x\n', voc), r"train\.txt: the name '\.\./\.\./x' points outside"),
        (overwrite('Annotations/a.xml', LAUGHS, voc), r'a\.xml: not valid XML \(entity declarations are'),
        (overwrite('Annotations/a.xml', EXTERNAL, voc), r'a\.xml: not valid XML \(entity declarations are'),
        (overwrite('Annotations/a.xml', '<?xml version="1.0" encoding="x"?><a/>', voc), r'a\.xml: not valid XML'),
        (overwrite('coco.json', '[' * 200_000, coco), r'coco\.json: not valid JSON \(.*recursion'),
        (overwrite('coco.json', f'[{"9" * 5000}]', coco), r'coco\.json: not valid JSON \(Exceeds the limit'),
        (lambda root: table(root, 'images/a.jpg,1,2,3,4,' + 'c' * 200_000 + '\n'), r'table\.csv:\d: .*field larger'),
        (lambda root: table(root, 'images/a\0.jpg,1,2,3,4,cat\n'), r'a\\x00\.jpg: no such file'),
        (lambda root: table(root, 'images/a.jpg,1,2,3,1e999,cat\n'), 'expected 4 finite numbers'),
        (lambda root: table(root, 'images/a.jpg,1,2,3,1e30,cat\n'), 'expected 4 finite numbers'),
    ],
)  # fmt: skip
def test_hostile_annotations_are_refused_with_a_line(write, message, tmp_path):
    with pytest.raises(UserError, match=message) as error:
        open_source(write(tmp_path))
    assert str(error.value).isprintable() and len(str(error.value)) < 1000


@pytest.mark.parametrize('box', [[1e400, 1, 2, 3], [10**400, 1, 2, 3], ['9' * 4000, 1, 2, 3], [float('nan'), 1, 2, 3]])
def test_numbers_beyond_reason_are_refused(box, tmp_path):
    content = coco_content()
    content['annotations'][0]['bbox'] = box
    with pytest.raises(UserError, match='annotation 1: expected 4 finite numbers, found'):
        open_source(coco(tmp_path, json.loads(json.dumps(content))))


def test_a_csv_that_is_no_text_is_named_with_its_line(tmp_path):
    spec = table(tmp_path)
    (tmp_path / 'table.csv').write_bytes((tmp_path / 'table.csv').read_bytes() + b'\xff\xfe\n')
    with pytest.raises(UserError, match=r'table\.csv:5: not UTF-8 text .*save it as UTF-8'):
        open_source(spec)
