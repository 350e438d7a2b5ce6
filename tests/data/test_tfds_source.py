import io
import json
import shlex
import shutil
import socket
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from effdet_jax import evaluate
from effdet_jax.configs import coco, default
from effdet_jax.data import eval_batches, fingerprint, open_source, survey
from effdet_jax.errors import UserError

tfds = pytest.importorskip('tensorflow_datasets')

SIZES = [(30, 40), (20, 50), (64, 64), (16, 24), (10, 10)]  # height, width
NAMES = ('ant', 'bee')


def image(index: int) -> bytes:
    return cv2.imencode('.png', np.full((*SIZES[index], 3), 40 * index, np.uint8))[1].tobytes()


class TinyDetection(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Example i has i objects. The first two boxes are sound, the third has no area."""

    VERSION = tfds.core.Version('1.0.0')
    BUILDER_CONFIGS = (tfds.core.BuilderConfig(name='2007'),)

    def _info(self):
        objects = {
            'bbox': tfds.features.BBoxFeature(),
            'label': tfds.features.ClassLabel(names=NAMES),
            'is_difficult': np.bool_,
        }
        features = {
            'image': tfds.features.Image(),
            'image/filename': tfds.features.Text(),
            'objects': tfds.features.Sequence(objects),
        }
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {'train': self._generate_examples(range(4)), 'test': self._generate_examples([4])}

    def _generate_examples(self, indices):
        boxes = [(0.0, 0.0, 0.5, 0.5), (0.25, 0.5, 1.0, 1.0), (0.5, 0.1, 0.5, 0.9), (0.0, 0.5, 1.0, 0.75)]
        for i in indices:
            objects = [
                {'bbox': tfds.features.BBox(*boxes[j]), 'label': NAMES[j % 2], 'is_difficult': j == 1} for j in range(i)
            ]
            yield i, {'image': image(i), 'image/filename': f'00{i}.png', 'objects': objects}


@pytest.fixture(scope='module')
def prepared(tmp_path_factory) -> Path:
    """A data directory with tiny_detection/2007, prepared by TFDS itself, without TensorFlow."""
    folder = tmp_path_factory.mktemp('tfds')
    TinyDetection(data_dir=str(folder), file_format='array_record').download_and_prepare()
    return folder


@pytest.fixture(autouse=True)
def data_dir(prepared, monkeypatch):
    monkeypatch.setenv('TFDS_DATA_DIR', str(prepared))


def by_name(source) -> dict:
    return {source[i].annotations.image_id: source[i] for i in range(len(source))}


@pytest.mark.parametrize('name', ['tiny_detection/2007', 'tiny_detection/2007:1.0.0'])
def test_prepared_dataset_is_read_without_tensorflow(name):
    source = open_source(f'tfds:{name}', 'train')
    assert len(source) == 4 and source.class_names == NAMES and source.category_ids == (1, 2)
    examples = by_name(source)
    assert set(examples) == {'000', '001', '002', '003'}
    for index, example in enumerate(examples[f'00{i}'] for i in range(4)):
        assert example.image == image(index)
    assert examples['000'].annotations.boxes_yxyx.shape == (0, 4)
    two = examples['002'].annotations
    np.testing.assert_array_equal(two.boxes_yxyx, [[0, 0, 32, 32], [16, 32, 64, 64]])
    np.testing.assert_array_equal(two.labels, [0, 1])
    np.testing.assert_array_equal(two.areas, [1024, 48 * 32])
    np.testing.assert_array_equal(two.is_difficult, [False, True])
    assert not two.is_crowd.any()
    assert len(examples['003'].annotations.labels) == 2  # the box without area is gone


def test_splits_are_those_of_tfds():
    assert len(open_source('tfds:tiny_detection/2007@test')) == 1
    assert len(open_source('tfds:tiny_detection/2007', 'train[:50%]+test')) == 3
    assert len(open_source('tfds:tiny_detection/2007@train + tfds:tiny_detection/2007@test')) == 5
    with pytest.raises(UserError, match=r"no images in split 'val': choose one of (test, train|train, test)"):
        open_source('tfds:tiny_detection/2007', 'val')
    with pytest.raises(UserError, match='needs a split'):
        open_source('tfds:tiny_detection/2007')
    with pytest.raises(UserError, match='no images in split'):
        open_source('tfds:tiny_detection/2007', 'train[:0]')


def test_fingerprint_is_that_of_the_name_the_version_and_the_split(prepared, tmp_path, monkeypatch):
    known = fingerprint(open_source('tfds:tiny_detection/2007', 'train'))
    assert fingerprint(open_source('tfds:tiny_detection/2007:1.0.0@train')) == known
    others = {fingerprint(open_source('tfds:tiny_detection/2007', split)) for split in ('test', 'train[:50%]')}
    assert len(others - {known}) == 2
    shutil.copytree(prepared / 'tiny_detection', tmp_path / 'tiny_detection')
    monkeypatch.setenv('TFDS_DATA_DIR', str(tmp_path))
    assert fingerprint(open_source('tfds:tiny_detection/2007', 'train')) == known
    (tmp_path / 'tiny_detection/2007/1.0.0').rename(tmp_path / 'tiny_detection/2007/1.0.1')
    info_file = tmp_path / 'tiny_detection/2007/1.0.1/dataset_info.json'
    info_file.write_text(info_file.read_text().replace('1.0.0', '1.0.1'))
    assert fingerprint(open_source('tfds:tiny_detection/2007', 'train')) != known


class TinyCoco(TinyDetection, skip_registration=True):
    """The classes of COCO as TFDS has them: 80 names without their ids."""

    def _info(self):
        info = super()._info()
        names = list(coco.USED_NAMES)
        objects = {'bbox': tfds.features.BBoxFeature(), 'label': tfds.features.ClassLabel(names=names)}
        features = {**info.features, 'objects': tfds.features.Sequence(objects)}
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _generate_examples(self, indices):
        for i in indices:
            objects = [{'bbox': tfds.features.BBox(0.0, 0.0, 0.5, 0.5), 'label': 'toothbrush'}]
            yield i, {'image': image(i), 'image/filename': f'{i}.png', 'objects': objects}


# COCO 2017, instances_val2017.json: the ids of its categories
HOLES = {12, 26, 29, 30, 45, 66, 68, 69, 71, 83}


def test_coco_has_its_own_ids(tmp_path, monkeypatch):
    TinyCoco(data_dir=str(tmp_path), file_format='array_record').download_and_prepare()
    monkeypatch.setenv('TFDS_DATA_DIR', str(tmp_path))
    spec = 'tfds:tiny_coco/2007'
    source = open_source(spec, 'train')
    assert source.category_ids == tuple(sorted(set(range(1, 91)) - HOLES))
    id_of = dict(zip(source.class_names, source.category_ids, strict=True))
    official = {'person': 1, 'stop sign': 13, 'backpack': 27, 'dining table': 67, 'tv': 72, 'toothbrush': 90}
    assert {name: id_of[name] for name in official} == official
    (label,) = source[0].annotations.labels
    assert source.category_ids[label] == 90
    config = default.get_config('d0', 'coco2017')
    evaluate.remember_classes(config, source, config.dataset.category_ids)  # what a Detector reads from config.json
    assert dict(zip(config.dataset.class_names, config.dataset.category_ids, strict=True)) == id_of
    assert open_source(spec, 'train', coco.CLASS_NAMES).category_ids == coco.CATEGORY_IDS
    assert open_source(spec, 'train', ('toothbrush', 'dragon', 'tv')).category_ids[::2] == (90, 72)


def test_fewer_classes_with_names_of_coco_keep_their_numbers():
    assert open_source('tfds:tiny_detection/2007', 'train').category_ids == (1, 2)


@pytest.mark.parametrize('keep', [0, 20, 60], ids=['empty', 'header', 'pixels'])
def test_a_damaged_image_is_one_in_which_nothing_is_found(monkeypatch, keep):
    source = open_source('tfds:tiny_detection/2007', 'train')
    records = [dict(source._records[i]) for i in range(4)]
    damaged = next(i for i, record in enumerate(records) if record['image/filename'] in ('002.png', b'002.png'))
    records[damaged]['image'] = records[damaged]['image'][:keep]
    monkeypatch.setattr(source, '_records', records)
    (batch,) = eval_batches(source, image_size=(32, 32), batch_size=4, threads=0)
    assert [bool(error) for error in batch.errors] == [i == damaged for i in range(4)]
    assert len(batch.annotations[damaged].labels) == 2 and batch.valid_size[damaged].tolist() == [0, 0]
    assert (batch.annotations[damaged].boxes_yxyx[:, 2:] > batch.annotations[damaged].boxes_yxyx[:, :2]).all()


def test_a_turned_image_is_noted(monkeypatch):
    source = open_source('tfds:tiny_detection/2007', 'train')
    exif, turned = Image.Exif(), io.BytesIO()
    exif[0x0112] = 6
    Image.new('RGB', (40, 20)).save(turned, 'JPEG', exif=exif)
    record = {**source._records[0], 'image': turned.getvalue()}
    monkeypatch.setattr(source, '_records', [record])
    monkeypatch.setattr(type(source), '__len__', lambda self: 1)
    findings, listing, _ = survey.check_images(source, source.listing(9, lambda x, *_: x), lambda x, *_: x)
    assert [f.kind for f in findings] == ['turned_image'] and listing.sizes.tolist() == [[40, 20]]


def test_given_class_names_fix_the_labels():
    two = by_name(open_source('tfds:tiny_detection/2007', 'train', class_names=('bee', 'ant')))['002'].annotations
    np.testing.assert_array_equal(two.labels, [1, 0])
    source = open_source('tfds:tiny_detection/2007', 'train', class_names=('ant',))
    with pytest.raises(UserError, match=r"00[23]\.png: label 'bee' is not among the class names \(ant\)"):
        [source[i] for i in range(4)]


@pytest.mark.parametrize('name', ['voc/2007', 'coco/2017', 'no_such_set', 'tiny_detection/2012', '../odd'])
def test_missing_dataset_is_explained_offline(name, monkeypatch):
    def connect(*_):
        raise AssertionError('the network was tried')

    monkeypatch.setattr(socket.socket, 'connect', connect)
    with pytest.raises(UserError) as error:
        open_source(f'tfds:{name}', 'train')
    message = str(error.value)
    assert message.startswith(f'{name} is not prepared in ') and '\n' not in message
    *_, program = shlex.split(message.split(': run ')[1])  # what a shell makes of the advice is a program
    assert f'tfds.builder("{name}", file_format="array_record").download_and_prepare()' in program
    compile(program, 'advice', 'exec')


def test_dataset_in_another_format_is_explained(prepared, tmp_path, monkeypatch):
    shutil.copytree(prepared / 'tiny_detection', tmp_path / 'tiny_detection')
    info_file = tmp_path / 'tiny_detection' / '2007' / '1.0.0' / 'dataset_info.json'
    info_file.write_text(json.dumps({**json.loads(info_file.read_text()), 'fileFormat': 'tfrecord'}))
    monkeypatch.setenv('TFDS_DATA_DIR', str(tmp_path))
    with pytest.raises(
        UserError, match=r'is stored as tfrecord.*tfds convert_format --dataset_version_dir=.*/1\.0\.0 '
    ):
        open_source('tfds:tiny_detection/2007', 'train')


def test_mocked_dataset(prepared):
    """TFDS's own mocking, with examples of ours: its random ones give one image boxes and labels of unequal number."""
    record = {
        'image': image(1),
        'objects': {'bbox': np.array([[0, 0.2, 0.5, 0.6]], np.float32), 'label': np.array([1]), 'area': [7]},
        'image/id': 123,
    }
    with tfds.testing.mock_data(data_dir=str(prepared), as_data_source_fn=lambda self, split, **_: [record] * 3):
        source = open_source('tfds:tiny_detection/2007', 'train')
    assert len(source) == 3 and source.class_names == NAMES
    annotations = source.annotations(2)
    np.testing.assert_allclose(annotations.boxes_yxyx, [[0, 10, 10, 30]], rtol=1e-6)
    np.testing.assert_array_equal(annotations.areas, [7])
    assert annotations.image_id == 123
