"""The command that detects, on files as people have them; once, in a process of its own."""

import json
import os
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
from absl import app
from PIL import Image
from processes import effdet
from pycocotools.coco import COCO

from effdet_jax.commands.predict import command as predict
from effdet_jax.commands.predict import predictor
from effdet_jax.data import shapes
from effdet_jax.errors import UserError
from effdet_jax.inference import Detector
from effdet_jax.inference.detector import Thresholds
from effdet_jax.inference.video import open_video, video_writer
from effdet_jax.runtime.paths import IMAGE_FORMATS, IMAGE_SUFFIXES

ROOT = Path(__file__).parents[2]
OUT = Path('out')
FRAMES, FRAME_RATE = 6, 12.5
SIZES = {  # name: width and height as a viewer shows it
    'grey.png': (90, 60),
    'clear.png': (60, 90),
    'rotated.jpg': (40, 80),
    'dot.png': (1, 1),
    'wide.png': (1500, 4),
    'deep.tif': (70, 50),
    'palette.png': (50, 70),
    'print.jpg': (90, 40),
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
    cv2.imwrite(str(folder / 'deep.tif'), pixels[:50, :70, 0].astype(np.uint16) * 257)
    Image.fromarray(pixels[:70, :50, :3]).quantize(16).save(folder / 'palette.png')
    Image.fromarray(pixels[:40, :90, :3]).convert('CMYK').save(folder / 'print.jpg')
    Image.fromarray(pixels[:100, :100, :3]).save(folder / 'below' / '000000397133.jpg')
    (folder / 'broken.jpg').write_bytes((folder / 'rotated.jpg').read_bytes()[:40])
    (folder / 'notes.txt').write_text('no image')
    return folder


@pytest.fixture(scope='module')
def run(images, finished_run, tmp_path_factory):
    out = tmp_path_factory.mktemp('predict') / 'made' / 'out'
    clip = out.parents[1] / 'clip.mp4'
    with video_writer(clip, FRAME_RATE, 60, 90) as write:
        for number in range(FRAMES):
            write(np.roll(cv2.imread(str(images / 'wide.png'), 1)[:1, :90].repeat(60, 0), number, axis=1))
    options = f'--workdir={finished_run[0]}', f'--out={out}', '--score=0', '--crop', '--batch=4'
    code, printed, error = effdet('predict', *options, images, f'{clip.parent}/cl*.mp4')
    return SimpleNamespace(code=code, out=printed, error=error, folder=out)


def test_a_broken_image_is_named_in_one_line_and_the_exit_code(run):
    assert run.code == 1
    assert run.error.startswith('error: 1 of 11 files could not be read: ')
    assert 'broken.jpg' in run.error
    assert run.error.count('\n') == 1


def test_every_other_image_is_drawn_in_its_own_proportions(run):
    drawn = {str(path.relative_to(run.folder)) for path in run.folder.rglob('*.png')}
    drawn = {name for name in drawn if not name.startswith('crops')}
    assert drawn == {f'{name}.png' for name in SIZES}
    for name, (width, height) in SIZES.items():
        shape = cv2.imread(str(run.folder / f'{name}.png')).shape
        factor = max(1, 640 / max(width, height))
        assert shape[:2] == (round(height * factor), round(width * factor))


def test_the_results_are_coco_results(run):
    results = [row for row in json.loads((run.folder / 'detections.json').read_text()) if 'video' not in row]
    ids = {name: name for name in SIZES} | {'below/000000397133.jpg': 397133}
    assert {result['file_name'] for result in results} == SIZES.keys()
    for result in results:
        assert result['image_id'] == ids[result['file_name']]
        width, height = SIZES[result['file_name']]
        x, y, w, h = result['bbox']
        assert min(x, y, w, h) >= 0
        assert x + w <= width + 0.02
        assert y + h <= height + 0.02
        assert result['category_id'] in (1, 2, 3, 4, 5)
        assert 0 < result['score'] <= 1


def test_pycocotools_loads_the_results(run):
    results = json.loads((run.folder / 'detections.json').read_text())
    truth = COCO()
    truth.dataset = {
        'images': [{'id': image_id, 'width': 1, 'height': 1} for image_id in {row['image_id'] for row in results}],
        'categories': [{'id': c, 'name': str(c)} for c in range(1, 6)],
        'annotations': [],
    }
    truth.createIndex()
    assert len(truth.loadRes(str(run.folder / 'detections.json')).anns) == len(results)
    assert f'9 images, 1 video, {len(results)} detections' in run.out


def test_what_is_no_image_is_named(run, images):
    assert f'note: 1 skipped, no images or videos by their suffix: {images}/notes.txt\n' in run.out


def test_the_video_keeps_its_size_and_frame_rate(run):
    video = open_video(run.folder / 'clip.mp4.mp4')
    assert (video.height, video.width, video.frame_rate) == (60, 90, FRAME_RATE)
    assert len(list(video.frames())) == FRAMES
    assert f'{FRAMES} frames at 12.5 frames/s, detected at ' in run.out


def test_results_in_a_video_have_the_number_of_their_frame(run):
    results = [row for row in json.loads((run.folder / 'detections.json').read_text()) if 'video' in row]
    assert {row['frame'] for row in results} == set(range(FRAMES))
    for row in results:
        assert row['video'] == 'clip.mp4'
        assert row['image_id'] == f'clip.mp4#{row["frame"]}'
        assert row['file_name'] == 'clip.mp4'
        assert row['bbox'][0] + row['bbox'][2] <= 90.02


def test_every_detection_is_cut_out(run):
    results = json.loads((run.folder / 'detections.json').read_text())
    names = dict(enumerate(shapes.CLASS_NAMES, start=1))
    expected = Counter(names[row['category_id']] for row in results)
    assert Counter(path.relative_to(run.folder / 'crops').parts[0] for path in crops(run.folder)) == expected


def crops(folder):
    return (folder / 'crops').rglob('*.png')


def two_finds():
    """A detector that finds one pixel of class a and, less sure, the whole image of class b/c."""

    def detect(pixels, sizes, thresholds):
        boxes_B24 = np.array([[[0, 0, 1, 1], [0, 0, width, height]] for height, width in sizes], np.float32)
        return boxes_B24, np.float32([[0.9, 0.4]] * len(sizes)), np.array([[0, 1]] * len(sizes))

    return Detector([detect], ('a', 'b/c'), (1, 2), Thresholds(0.0, 0.5, 0.5))


@pytest.mark.parametrize(
    ('options', 'rows', 'cut'),
    [
        ({}, 2, ['a', 'b_c']),
        ({'classes': ('b/c',)}, 1, ['b_c']),
        ({'score': 0.5}, 2, ['a']),
        ({'score': 0.5, 'classes': ('b/c',)}, 1, []),
    ],
    ids=['all', 'class', 'score', 'both'],
)
def test_classes_narrow_everything_and_the_score_what_is_drawn(images, tmp_path, options, rows, cut):
    job = predictor.Job(two_finds(), tmp_path, **{'score': 0.0, 'crop': True, **options})
    predictor.predict(job, {images / 'grey.png': 'grey.png'})
    assert len(json.loads((tmp_path / 'detections.json').read_text())) == rows
    assert sorted(path.parent.name for path in crops(tmp_path)) == cut


def test_a_class_that_there_is_not_is_refused(tmp_path):
    with pytest.raises(UserError, match='--classes: unknown d, e; this detector has a, b/c'):
        predictor.Job(two_finds(), tmp_path, 0.3, ('d', 'a', 'e'))


def test_where_nothing_can_be_read_nothing_is_written(images, tmp_path):
    (tmp_path / 'clip.mp4').write_bytes(b'no video')
    files = {images / 'broken.jpg': 'broken.jpg', tmp_path / 'clip.mp4': 'clip.mp4'}
    with pytest.raises(UserError, match=r'could be read; the first: .*broken\.jpg'):
        predictor.predict(predictor.Job(two_finds(), tmp_path / 'out', 0.3), files)
    assert list((tmp_path / 'out').iterdir()) == []


def test_images_are_named_by_their_path_below_the_folder(images):
    found = predict.find_files([str(images)], OUT)
    assert set(found.values()) == SIZES.keys() | {'broken.jpg'}
    assert predict.find_files([str(images / 'grey.png')], OUT) == {images / 'grey.png': 'grey.png'}


def test_an_image_that_is_named_twice_is_detected_once(images):
    assert predict.find_files([str(images / 'grey.png')] * 2, OUT) == {images / 'grey.png': 'grey.png'}


def test_nothing_to_do_is_said(images, tmp_path):
    with pytest.raises(UserError, match=r'no image or video in .*: give files with one of the suffixes \.jpg'):
        predict.find_files([str(tmp_path)], OUT)
    with pytest.raises(UserError, match='nowhere does not exist'):
        predict.find_files([str(images), str(tmp_path / 'nowhere')], OUT)
    with pytest.raises(app.UsageError, match='name at least one image, video, folder or pattern'):
        predict.find_files([], OUT)


@pytest.mark.parametrize(
    ('pattern', 'names'),
    [
        ('*.png', {name for name in SIZES if name.endswith('.png')}),
        ('gr?y.*', {'grey.png'}),
        ('*', SIZES.keys() | {'broken.jpg'}),
        ('**/0*.jpg', {'below/000000397133.jpg'}),
        ('bel*/*', {'below/000000397133.jpg'}),
    ],
)
def test_a_pattern_names_images_by_what_lies_below_its_fixed_part(images, pattern, names):
    assert set(predict.find_files([f'{images}/{pattern}'], OUT).values()) == names


def test_patterns_are_taken_literally_where_a_file_is_called_so(tmp_path):
    (tmp_path / 'a[1].jpg').write_bytes(b'')
    assert predict.find_files([f'{tmp_path}/a[1].jpg'], OUT) == {tmp_path / 'a[1].jpg': 'a[1].jpg'}
    with pytest.raises(UserError, match='matches no file'):
        predict.find_files([f'{tmp_path}/b*.jpg'], OUT)


def test_what_an_earlier_call_has_drawn_is_left_out(tmp_path):
    for name in ('a.jpg', 'found/a.jpg.png', 'found/crops/car/a.jpg.0.png'):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b'')
    assert set(predict.find_files([str(tmp_path)], tmp_path / 'found').values()) == {'a.jpg'}
    with pytest.raises(UserError, match='2 skipped, results of an earlier run: '):
        predict.find_files([str(tmp_path / 'found')], tmp_path / 'found')
    assert len(predict.find_files([str(tmp_path / 'found')], tmp_path / 'elsewhere')) == 2


def spellings(folder):
    """(arguments, out) that all mean: detect in `folder`, and draw there."""
    (folder.parent / 'link').symlink_to(folder)
    (folder.parent / 'tree').mkdir()
    (folder.parent / 'tree' / 'link').symlink_to(folder)
    yield [str(folder)], folder
    yield [str(folder)], folder / 'below' / '..'
    yield [os.path.relpath(folder)], folder
    yield [str(folder.parent / 'link')], folder
    yield [str(folder)], folder.parent / 'link'
    yield [str(folder.parent / 'tree')], folder
    yield [f'{folder}/*'], folder
    yield [f'{folder}/**/*.*'], folder
    yield [f'{folder.parent}/li*/**'], folder
    yield sorted(map(str, folder.iterdir())), folder


def test_its_own_drawings_are_left_out_of_the_folder_that_they_lie_in_however_it_is_spelled(tmp_path, capsys):
    folder = tmp_path / 'photos'
    ours = ('a.jpg.png', 'a.jpg.png.png', 'below/b.PNG.png', 'gone.jpg.png', 'clip.mov.mp4', 'detections.json',
            'crops/car/a.jpg.0.png', 'crops/car/below/b.PNG.12.png', 'crops/car/clip.mov.000003.0.png')  # fmt: skip
    theirs = ('a.jpg', 'below/b.PNG', 'clip.mov', 'crops/c.png', 'crops/2.0.jpg', 'film.mp4')
    for name in (*ours, *theirs):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b'')
    for arguments, out in spellings(folder):
        capsys.readouterr()
        found = predict.find_files(arguments, out)
        assert {str(path.resolve().relative_to(folder)) for path in found} == set(theirs), (arguments, out)
        assert capsys.readouterr().out.startswith('note: ')


def test_links_to_folders_are_followed_and_every_folder_is_searched_once(tmp_path):
    for name in ('photos/deep/a.png', 'elsewhere/b.JPG', 'elsewhere/more/c.tiff', 'd.png'):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b'')
    for link, target in (
        ('photos/away', '../elsewhere'),
        ('photos/again', 'deep'),
        ('photos/self', '.'),
        ('photos/up', '..'),
        ('photos/deep/back', '..'),
        ('elsewhere/home', '../photos'),
        ('photos/a link.png', 'deep/a.png'),
    ):
        (tmp_path / link).symlink_to(target)
    names = {'deep/a.png', 'away/b.JPG', 'away/more/c.tiff', 'a link.png'}
    assert set(predict.find_files([str(tmp_path / 'photos')], OUT).values()) == names
    assert set(predict.find_files([f'{tmp_path}/photos/**/*'], OUT).values()) == names
    others = {'away/b.JPG', 'away/more/c.tiff'}
    assert set(predict.find_files([f'{tmp_path}/photos/**/*.[Jt]*'], OUT).values()) == others
    assert set(predict.find_files([f'{tmp_path}/photos/**/more'], OUT).values()) == {'away/more/c.tiff'}
    assert set(predict.find_files([f'{tmp_path}/ph*/**/a.png'], OUT).values()) == {'photos/deep/a.png'}


def test_links_that_lead_nowhere_are_found_and_fail_when_they_are_read(tmp_path):
    (tmp_path / 'out').mkdir()
    for link, target in (('gone.png', '/nowhere/at/all.png'), ('loop.png', 'loop.png'), ('loop', 'loop')):
        (tmp_path / link).symlink_to(target)
    found = predict.find_files([str(tmp_path)], tmp_path / 'out')
    assert set(found.values()) == {'gone.png', 'loop.png'}
    with pytest.raises(UserError, match=r'could be read; the first: .*gone\.png: cannot be read'):
        predictor.predict(predictor.Job(two_finds(), tmp_path / 'out', 0.0), found)


def test_every_format_that_can_be_read_is_found_and_the_rest_is_named(tmp_path, capsys):
    for suffix in IMAGE_SUFFIXES:
        (tmp_path / f'x{suffix.upper()}').write_bytes(b'')
    others = ('a.HEIC', 'b.txt', 'c', 'd.json', '.DS_Store')
    for name in others:
        (tmp_path / name).write_bytes(b'')
    assert len(predict.find_files([str(tmp_path)], OUT)) == len(IMAGE_SUFFIXES)
    first = ', '.join(f'{tmp_path}/{name}' for name in ('.DS_Store', 'a.HEIC', 'b.txt'))
    assert capsys.readouterr().out == f'note: 5 skipped, no images or videos by their suffix: {first}, ...\n'
    assert predict.find_files([f'{tmp_path}/c'], OUT) == {tmp_path / 'c': 'c'}  # given by itself: as an image
    with pytest.raises(UserError, match=r'no image or video in \S+; 1 skipped, .* suffix: \S+HEIC: give .* \.jpg '):
        predict.find_files([f'{tmp_path}/*.HEIC'], OUT)


@pytest.mark.parametrize('suffix', ['.gif', '.avif', '.jfif', '.jp2', '.ppm', '.webp'])
def test_a_format_that_is_found_is_read(suffix, tmp_path):
    image = shapes.draw(0).image
    kind = next(kind for kind, suffixes in IMAGE_FORMATS.items() if suffix in suffixes)
    Image.fromarray(image).save(tmp_path / f'x{suffix}', kind)
    job = predictor.Job(two_finds(), tmp_path / 'out', 0.0)
    predictor.predict(job, predict.find_files([str(tmp_path)], tmp_path / 'out'))
    assert cv2.imread(str(tmp_path / 'out' / f'x{suffix}.png')) is not None


def test_a_pipe_that_is_called_a_video_is_refused(tmp_path):
    os.mkfifo(tmp_path / 'clip.mp4')
    with pytest.raises(UserError, match=r'clip\.mp4: not a regular file'):
        open_video(tmp_path / 'clip.mp4')


@pytest.mark.parametrize(
    ('words', 'views'),
    [
        ([], (False, (1.0,))),
        (['flip'], (True, (1.0,))),
        (['0.75', 'flip', '1.25'], (True, (1.0, 0.75, 1.25))),
        (['1.0'], (False, (1.0,))),
    ],
)
def test_views_are_read(words, views):
    assert predict.read_views(words) == views


def test_a_word_that_is_no_view_is_bad_usage():
    with pytest.raises(app.UsageError, match="'flop' is neither flip nor a number"):
        predict.read_views(['flop'])


def test_two_images_of_one_name_are_refused(images, tmp_path):
    (tmp_path / 'grey.png').write_bytes(b'')
    with pytest.raises(UserError, match=r'would both be written as grey\.png'):
        predict.find_files([str(images), str(tmp_path)], OUT)


@pytest.mark.parametrize(
    'ids',
    [
        {'000000397133.jpg': 397133, 'val/12.png': 12, 'IMG_12.jpg': 'IMG_12.jpg', 'a/b.png': 'a/b.png'},
        {'clipA/000001.jpg': 'clipA/000001.jpg', 'clipB/000001.jpg': 'clipB/000001.jpg', 'clipB/000002.jpg': 2},
        {'7.jpg': '7.jpg', '07.jpg': '07.jpg', '7.png': '7.png', '8.jpg': 8},
        {'9007199254740991.png': 2**53 - 1, '9007199254740992.png': '9007199254740992.png'},
        {f'{"9" * 250}.png': f'{"9" * 250}.png', '\u00b2.png': '\u00b2.png'},
    ],
    ids=['numbers and names', 'folders', 'zeros', 'what JSON holds', 'no number'],
)
def test_an_image_has_the_number_in_its_name_where_no_other_image_has_it(ids):
    assert predictor.image_ids(ids) == ids


def test_two_images_of_one_number_can_be_told_apart_in_the_results(images, tmp_path):
    files = {images / 'grey.png': 'cam1/0001.png', images / 'clear.png': 'cam2/0001.png'}
    predictor.predict(predictor.Job(two_finds(), tmp_path, 0.0), files)
    rows = json.loads((tmp_path / 'detections.json').read_text())
    assert [(row['image_id'], row['file_name']) for row in rows] == [
        (name, name) for name in files.values() for _ in range(2)
    ]
