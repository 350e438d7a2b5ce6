"""The command that detects, on files as people have them; once, in a process of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
from absl import app
from PIL import Image
from pycocotools.coco import COCO

from effdet_jax import predict
from effdet_jax.errors import UserError

ROOT = Path(__file__).parents[1]
SIZES = {  # name: width and height as a viewer shows it
    'grey.png': (90, 60),
    'clear.png': (60, 90),
    'rotated.jpg': (40, 80),
    'dot.png': (1, 1),
    'wide.png': (1500, 4),
    'below/000000397133.jpg': (100, 100),
}


@pytest.fixture(scope='module')
def images(tmp_path_factory):
    """A folder of odd images, a broken one, and a file that is no image."""
    folder = tmp_path_factory.mktemp('images')
    (folder / 'below').mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (100, 1500, 4)).astype(np.uint8)
    Image.fromarray(pixels[:60, :90, 0]).save(folder / 'grey.png')
    Image.fromarray(pixels[:90, :60]).save(folder / 'clear.png')
    sideways = Image.Exif()
    sideways[0x0112] = 6  # to be turned by 90 degrees
    Image.fromarray(pixels[:40, :80, :3]).save(folder / 'rotated.jpg', exif=sideways)
    Image.fromarray(pixels[:1, :1, :3]).save(folder / 'dot.png')
    Image.fromarray(pixels[:4, :1500, :3]).save(folder / 'wide.png')
    Image.fromarray(pixels[:100, :100, :3]).save(folder / 'below' / '000000397133.jpg')
    (folder / 'broken.jpg').write_bytes((folder / 'rotated.jpg').read_bytes()[:40])
    (folder / 'notes.txt').write_text('no image')
    return folder


@pytest.fixture(scope='module')
def run(images, finished_run, tmp_path_factory):
    out = tmp_path_factory.mktemp('predict') / 'made' / 'out'
    done = subprocess.run(
        [sys.executable, '-m', 'effdet_jax.predict', f'--workdir={finished_run[0]}', f'--out={out}', str(images)],
        cwd=ROOT, env=os.environ | {'JAX_PLATFORMS': 'cpu'}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    return SimpleNamespace(code=done.returncode, out=done.stdout, error=done.stderr, folder=out)


def test_a_broken_image_is_named_in_one_line_and_the_exit_code(run):
    assert run.code == 1
    assert run.error.startswith('error: 1 of 7 images were left out: ')
    assert 'broken.jpg' in run.error
    assert run.error.count('\n') == 1


def test_every_other_image_is_drawn_in_its_own_proportions(run):
    drawn = {str(path.relative_to(run.folder)) for path in run.folder.rglob('*.png')}
    assert drawn == {f'{name}.png' for name in SIZES}
    for name, (width, height) in SIZES.items():
        shape = cv2.imread(str(run.folder / f'{name}.png')).shape
        factor = max(1, 640 / max(width, height))
        assert shape[:2] == (round(height * factor), round(width * factor))


def test_the_results_are_coco_results(run):
    results = json.loads((run.folder / 'detections.json').read_text())
    ids = {'000000397133.jpg': 397133}
    size_of = {ids.get(Path(name).name, name): size for name, size in SIZES.items()}
    assert {result['image_id'] for result in results} == size_of.keys()
    for result in results:
        width, height = size_of[result['image_id']]
        x, y, w, h = result['bbox']
        assert min(x, y, w, h) >= 0
        assert x + w <= width + 0.02
        assert y + h <= height + 0.02
        assert result['category_id'] in (1, 2, 3, 4, 5)
        assert 0 < result['score'] <= 1

    truth = COCO()
    truth.dataset = {
        'images': [{'id': i, 'width': w, 'height': h} for i, (w, h) in size_of.items()],
        'categories': [{'id': c, 'name': str(c)} for c in range(1, 6)],
        'annotations': [],
    }
    truth.createIndex()
    assert len(truth.loadRes(str(run.folder / 'detections.json')).anns) == len(results)
    assert f'6 images, {len(results)} detections' in run.out


def test_images_are_named_by_their_path_below_the_folder(images):
    found = predict.find_images([str(images)])
    assert set(found.values()) == SIZES.keys() | {'broken.jpg'}
    assert predict.find_images([str(images / 'grey.png')]) == {images / 'grey.png': 'grey.png'}


def test_an_image_that_is_named_twice_is_detected_once(images):
    assert predict.find_images([str(images / 'grey.png')] * 2) == {images / 'grey.png': 'grey.png'}


def test_nothing_to_do_is_said(images, tmp_path):
    with pytest.raises(UserError, match=r'no image in .*: known are \.jpg'):
        predict.find_images([str(tmp_path)])
    with pytest.raises(UserError, match='nowhere does not exist'):
        predict.find_images([str(images), str(tmp_path / 'nowhere')])
    with pytest.raises(app.UsageError, match='name at least one image or folder'):
        predict.find_images([])


def test_two_images_of_one_name_are_refused(images, tmp_path):
    (tmp_path / 'grey.png').write_bytes(b'')
    with pytest.raises(UserError, match=r'would both be written as grey\.png'):
        predict.find_images([str(images), str(tmp_path)])


@pytest.mark.parametrize(
    ('name', 'image_id'),
    [('000000397133.jpg', 397133), ('val/12.png', 12), ('IMG_12.jpg', 'IMG_12.jpg'), ('a/b.png', 'a/b.png')],
)
def test_image_ids(name, image_id):
    assert predict.image_id(name) == image_id
