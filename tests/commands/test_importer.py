"""What the importer refuses, in one line that names the culprit, before anything is written; and what it may allow."""

import json
import pickle
import sys
import tarfile
from pathlib import Path as FilePath

import containers
import imports
import jax
import numpy as np
import pytest
import writers
from flax import traverse_util

from effdet_jax import build
from effdet_jax.commands.import_weights import importer
from effdet_jax.configs import default
from effdet_jax.errors import UserError
from effdet_jax.inference import Detector
from effdet_jax.records.checkpoint import load_variables
from effdet_jax.weights import families, names, readers

pytestmark = pytest.mark.usefixtures('depthwise_by_xla')

KERNEL = 'class_net.predict.conv_pw.weight'


@pytest.fixture
def refused(tmp_path):
    """`refused(source, message, ...)`: the import fails in one line that matches, and leaves no work directory."""

    def check(source, message, config=None, **options):
        workdir = tmp_path / 'imported'
        with pytest.raises(UserError, match=message) as error:
            importer.import_weights(config or imports.config(), source, workdir, **options)
        assert '\n' not in str(error.value)
        assert not workdir.exists()
        return str(error.value)

    return check


def imported(source, workdir, config=None, **options):
    """Our variables of the work directory, flat, and its import.json."""
    importer.import_weights(config or imports.config(), source, workdir, **options)
    _, variables = load_variables(workdir, 'eval/AP')
    return traverse_util.flatten_dict(variables), json.loads((workdir / 'import.json').read_text())


# What a file holds


def test_a_file_that_fits(tmp_path):
    variables, account = imported(imports.file(tmp_path), tmp_path / 'imported')
    assert variables.keys() == imports.WRITTEN.keys()
    for path, array in imports.WRITTEN.items():
        np.testing.assert_array_equal(variables[path], array)
    counters = {name for name in imports.torch_arrays() if name.endswith('num_batches_tracked')}
    assert account['not used'].keys() == counters
    assert {name for every in account['loaded'].values() for name in every} | counters == imports.torch_arrays().keys()


def test_another_member_of_the_family(tmp_path, refused):
    layers = writers.layers(writers.Member('b1', 88, 4, 3, weighted=True, classes=90))
    source = imports.file(tmp_path, imports.torch_arrays(layers, writers.draw(layers)))
    config = imports.config(writers.Member('b0', 64, 3, 3, weighted=True), class_names=())
    message = refused(
        source, r'small: 346 mismatched, 192 unexpected; the first is box_net/bn_0_p3/mean \(box_net\.bn_rep', config
    )
    assert message.endswith('give --config=configs/d1.py')


@pytest.mark.parametrize(('key', 'value'), [('name', 'panet'), ('per_channel', True), ('separable', False)])
def test_a_detector_with_another_feature_network(key, value, tmp_path, refused):
    config = imports.config()
    config.model.feature_network[key] = value
    refused(imports.file(tmp_path), f'config.model.feature_network.{key}={value}: published detectors have', config)


@pytest.mark.parametrize(('theirs', 'ours', 'member'), [('b0', 'lite0', 'd0'), ('lite0', 'b0', 'lite0')])
def test_a_lite_file_and_its_brother_of_the_same_size(theirs, ours, member, tmp_path, refused):
    layers = writers.layers(writers.Member(theirs, 64, 3, 3, weighted=theirs == 'b0', classes=90))
    source = imports.file(tmp_path, imports.torch_arrays(layers, writers.draw(layers)))
    config = imports.config(writers.Member(ours, 64, 3, 3, weighted=ours == 'b0'), class_names=())
    assert f'give --config=configs/{member}.py' in refused(source, 'does not fit', config)


def test_a_backbone_of_another_size(tmp_path, refused):
    layers = list(writers.backbone('b1'))
    arrays = writers.to_torch(layers, writers.draw(layers))
    source = imports.file(tmp_path, {name.removeprefix('backbone.'): array for name, array in arrays.items()})
    refused(
        source,
        r'another model .23 blocks .* give --config=configs/d1.py or --config=configs/d2.py',
        imports.config(writers.Member('b0')),
    )


def without(arrays):
    del arrays[KERNEL]


def with_one_more(arrays):
    arrays['class_net.predict.conv_pw.scale'] = np.zeros(3, np.float32)


def with_a_block_more(arrays):
    arrays['backbone.blocks.6.1.conv_pw.weight'] = np.zeros((8, 8, 1, 1), np.float32)


def transposed(arrays):
    arrays[KERNEL] = arrays[KERNEL].transpose(1, 0, 2, 3)


def transposed_bias(arrays):
    arrays['backbone.bn1.weight'] = arrays['backbone.bn1.weight'][None]


def not_finite(arrays):
    arrays[KERNEL][3, 2] = np.nan


def infinite(arrays):
    arrays['fpn.resample.3.conv.bn.running_var'][1] = np.inf


@pytest.mark.parametrize(
    ('spoil', 'message'),
    [
        (without, rf'1 missing; the first is class_net/predict/pw/kernel \(the file has no {KERNEL}\)'),
        (with_one_more, r'1 unexpected; the first is class_net\.predict\.conv_pw\.scale \(the model has no such'),
        (with_a_block_more, r'1 unexpected; the first is backbone\.blocks\.6\.1\.conv_pw\.weight'),
        (
            transposed,
            rf'1 mismatched; the first is class_net/predict/pw/kernel \({KERNEL} has shape \(1, 1, 45, 16\), expected',
        ),
        (transposed_bias, r'1 mismatched; .* backbone/stem/bn/scale \(backbone\.bn1\.weight has shape \(1, 32\)'),
        (not_finite, rf'1 mismatched; .* \({KERNEL} contains NaN or infinity\)'),
        (infinite, r'1 mismatched; the first is resample_p6/bn/var \(.* NaN or infinity\)'),
    ],
)
def test_one_wrong_tensor(spoil, message, tmp_path, refused):
    spoil(arrays := {name: np.array(array) for name, array in imports.torch_arrays().items()})
    refused(imports.file(tmp_path, arrays), message)


def test_all_problems_are_listed_and_counted(tmp_path, refused, capsys):
    arrays = {name: array for name, array in imports.torch_arrays().items() if not name.startswith('box_net.')}
    refused(imports.file(tmp_path, arrays), rf'{len(imports.torch_arrays()) - len(arrays) - 5} missing')
    assert 'box_net/predict/pw/bias' in capsys.readouterr().out


@pytest.mark.slow
def test_missing_biases_are_explained(tmp_path, refused):
    arrays = imports.torch_arrays()
    redundant = [name for name in arrays if name.endswith('.conv_pw.bias') and 'predict' not in name]
    for name in redundant:
        del arrays[name]
    source = imports.file(tmp_path, arrays)
    assert 'add --allow=bias' in refused(source, f'{len(redundant)} missing')
    variables, _ = imported(source, tmp_path / 'allowed', allow=['bias'])
    assert not np.any(variables['params', 'class_net', 'conv_0', 'pw', 'bias'])


# Number of classes


@pytest.mark.slow
def test_another_number_of_classes(tmp_path, refused):
    source = imports.file(tmp_path)
    config = imports.config(class_names=('a', 'b', 'c'))
    message = refused(source, r'2 mismatched; the first is class_net/predict/pw/', config)
    assert message.endswith('It has 5 classes, the config 3: for a new predictor add --allow=class_net/predict')
    workdir = tmp_path / 'allowed'
    variables, account = imported(
        source, workdir, imports.config(class_names=('a', 'b', 'c')), allow=['class_net/pred']
    )
    predictor = ('params', 'class_net', 'predict', 'pw')
    assert variables[*predictor, 'kernel'].shape == (1, 1, 16, 27)
    prior = -np.log((1 - 0.01) / 0.01)
    np.testing.assert_allclose(variables[*predictor, 'bias'], np.full(27, prior), rtol=1e-6)
    for path in imports.WRITTEN.keys() - {(*predictor, 'kernel'), (*predictor, 'bias')}:
        np.testing.assert_array_equal(variables[path], imports.WRITTEN[path])
    assert [kind for kind, *_ in account['allowed']] == ['mismatched', 'mismatched']


def test_classes_without_names(tmp_path, refused):
    refused(
        imports.file(tmp_path),
        '5 classes without names: add --config.dataset.class_names',
        imports.config(class_names=()),
    )


def test_90_classes_are_cocos(tmp_path):
    layers = writers.layers(imports.MEMBER._replace(classes=90))
    source = imports.file(tmp_path, imports.torch_arrays(layers, writers.draw(layers)))
    importer.import_weights(config := imports.config(class_names=()), source, tmp_path / 'imported')
    named = dict(zip(config.dataset.category_ids, config.dataset.class_names, strict=True))
    # Lin et al. 2014: the ids run to 90; 12, 26, 29, ... have no objects.
    assert (len(named), named[1], named[3], named[18], named[44], named[90]) == (
        90, 'person', 'car', 'dog', 'bottle', 'toothbrush'
    )  # fmt: skip


# What may be allowed


@pytest.mark.slow
@pytest.mark.parametrize(
    ('spoil', 'pattern', 'kind'),
    [
        (without, '^class_net/predict/pw/kernel', 'missing'),
        (without, r'class_net\.predict\.conv_pw', 'missing'),  # their name serves as well
        (with_one_more, 'conv_pw.scale', 'unexpected'),
        (transposed, 'predict/pw/kernel', 'mismatched'),
        (not_finite, 'predict/pw/kernel', 'mismatched'),
    ],
)
def test_a_named_tensor_is_allowed_and_accounted_for(spoil, pattern, kind, tmp_path):
    spoil(arrays := {name: np.array(array) for name, array in imports.torch_arrays().items()})
    variables, account = imported(imports.file(tmp_path, arrays), tmp_path / 'imported', allow=['nothing', pattern])
    assert [allowed for allowed, *_ in account['allowed']] == [kind]
    assert variables.keys() == imports.WRITTEN.keys()
    for path, array in imports.WRITTEN.items():
        assert variables[path].shape == array.shape
        assert np.isfinite(variables[path]).all()
        if path[-4:-1] != ('class_net', 'predict', 'pw'):
            np.testing.assert_array_equal(variables[path], array)


def test_what_is_allowed_does_not_cover_the_rest(tmp_path, refused):
    arrays = {name: np.array(array) for name, array in imports.torch_arrays().items()}
    without(arrays)
    infinite(arrays)
    refused(imports.file(tmp_path, arrays), '1 mismatched; the first is resample_p6/bn/var', allow=['class_net'])


def test_a_pattern_that_is_none(tmp_path, refused):
    refused(imports.file(tmp_path), r'--allow=\(.*regex', allow=['('])


# Where it comes from


class Hostile:
    """Unpickled, it makes a file."""

    def __init__(self, trace):
        self._trace = trace

    def __reduce__(self):
        return eval, (f'open({str(self._trace)!r}, "w").close()',)


def as_torch_zip(content, path):
    import torch

    torch.save(content, path)


def as_torch_legacy(content, path):
    import torch

    torch.save(content, path, _use_new_zipfile_serialization=False)


def as_pickle(content, path):
    path.write_bytes(pickle.dumps(content))


EVAL = r'Unsupported global: GLOBAL .*eval'


@pytest.mark.filterwarnings('ignore:Detected pickle protocol')
@pytest.mark.parametrize(
    ('save', 'culprit'), [(as_torch_zip, EVAL), (as_torch_legacy, EVAL), (as_pickle, 'Unsupported .*')]
)
def test_a_pickle_that_would_run_code(save, culprit, tmp_path, refused):
    trace = tmp_path / 'it ran'
    save({'state_dict': Hostile(trace)}, source := tmp_path / 'model.pth')
    refused(source, rf'model\.pth: .*could run code.*\({culprit}\).*save only the weights')
    assert not trace.exists()
    if save is as_pickle:  # the trap works
        pickle.loads(source.read_bytes())
        assert trace.exists()


def pth(folder):
    return containers.pth(folder, imports.torch_arrays())


def old_pth(folder):
    return containers.pth(folder, imports.torch_arrays(), _use_new_zipfile_serialization=False)


def h5(folder):
    return containers.keras_h5(folder, writers.to_tensorflow(imports.LAYERS, imports.WRITTEN, 'keras'))


def tar_gz(folder):
    return containers.released(folder, writers.to_tensorflow(imports.LAYERS, imports.WRITTEN, 'keras'))


@pytest.mark.slow
@pytest.mark.parametrize('write', [imports.file, h5, pth, old_pth, tar_gz])
@pytest.mark.parametrize('left', [0.3, 0.999])
def test_a_file_cut_off(write, left, tmp_path, refused):
    source = write(tmp_path)
    content = source.read_bytes()
    source.write_bytes(content[: int(len(content) * left)])
    refused(source, rf'{source.name}: damaged or incomplete \(.*\): download it again')


@pytest.mark.parametrize('write', [imports.file, h5, pth, old_pth, tar_gz])
def test_the_first_bytes_of_a_file(write, tmp_path, refused):
    source = write(tmp_path)
    source.write_bytes(source.read_bytes()[:40])
    refused(source, rf'{source.name}: (damaged or incomplete|could run code|unknown format)')


@pytest.mark.parametrize('part', ['index', 'data-00000-of-00001'])
def test_a_tensorflow_checkpoint_cut_off(part, tmp_path, refused):
    prefix = containers.tf1_plain(tmp_path, writers.to_tensorflow(imports.LAYERS, imports.WRITTEN, 'keras'))
    file = prefix.with_name(f'{prefix.name}.{part}')
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    refused(prefix, r'model\.ckpt-1: damaged or incomplete')
    file.unlink()
    refused(prefix, r'model\.ckpt-1: (damaged or incomplete|no such file)')


def test_a_tar_gz_with_a_wrong_bit(tmp_path, refused):
    source = tar_gz(tmp_path)
    content = bytearray(source.read_bytes())
    content[len(content) // 2] ^= 0xFF
    source.write_bytes(content)
    refused(source, r'\.tar\.gz: damaged')


@pytest.mark.parametrize(
    ('name', 'content'),
    [
        ('notes.txt', b'These are not the weights that you are looking for.\n'),
        ('picture.png', b'\x89PNG\r\n\x1a\n' + b'\x00\x00\x00\rIHDR' + bytes(40)),
        ('page.html', b'<!DOCTYPE html><html>404</html>'),
        ('empty.pth', b''),
    ],
)
def test_another_kind_of_file(name, content, tmp_path, refused):
    (source := tmp_path / name).write_bytes(content)
    refused(source, rf'{name}: unknown format.*Keras \.h5')


def test_json(tmp_path, refused):
    (source := tmp_path / 'model.json').write_text('{"class_net": {"a": 1}, "b": {"c": [1, 2, 3]}}')
    refused(source, r'model\.json: (unknown format|damaged)')


def test_no_file(tmp_path, refused):
    refused(tmp_path / 'model.h5', r'model\.h5: no such file')


def test_arrays_of_something_else(tmp_path, refused):
    refused(imports.file(tmp_path, {'layer1.weight': np.zeros(3, np.float32)}), 'the file has layer1.weight')
    refused(imports.file(tmp_path, {}), 'the file has no arrays at all')


def test_folders(tmp_path, refused):
    (folder := tmp_path / 'checkpoints').mkdir()
    refused(folder, 'is a folder without a TensorFlow checkpoint')
    for name in ('model-1', 'model-2'):
        (folder / f'{name}.index').touch()
    refused(folder, rf'has 2 checkpoints: choose one, e.g. --source={folder}/model-[12]')


def archive(path, members):
    with tarfile.open(path, 'w:gz') as file:
        for name in members:
            info = tarfile.TarInfo(name)
            file.addfile(info)
    return path


@pytest.mark.parametrize(
    ('members', 'message'),
    [
        (['../outside.index'], r'd0\.tar\.gz: .*outside'),
        (['/tmp/effdet_jax_outside.index', '../../b'], r'd0\.tar\.gz: .*outside'),
        (['d0/readme.txt'], r'd0\.tar\.gz: .*with 0 TensorFlow checkpoints'),
        (['d0/model-1.index', 'd0/model-2.index'], r'd0\.tar\.gz: .*with 2 TensorFlow checkpoints .*: unpack it'),
    ],
)
def test_archives(members, message, tmp_path, refused):
    (folder := tmp_path / 'deep' / 'deeper').mkdir(parents=True)
    source = archive(folder / 'd0.tar.gz', members)
    assert '/tmp/tmp' not in refused(source, message)
    assert [path.name for path in tmp_path.rglob('*') if path.is_file()] == ['d0.tar.gz']


@pytest.mark.parametrize(
    ('module', 'write', 'requirements'),
    [('torch', pth, 'requirements-torch.txt'), ('tensorflow', tar_gz, 'requirements-tensorflow.txt')],
)
def test_what_a_format_needs(module, write, requirements, tmp_path, refused, monkeypatch):
    source = write(tmp_path)
    monkeypatch.setitem(sys.modules, module, None)  # as if it were not installed
    message = refused(source, rf'{module} cannot be imported .* pip install -r {requirements}')
    assert '/tmp/tmp' not in message


# Where it goes


def test_a_used_work_directory(tmp_path):
    source, workdir = imports.file(tmp_path), tmp_path / 'imported'
    importer.import_weights(imports.config(), source, workdir)
    before = {path: path.stat().st_mtime_ns for path in workdir.rglob('*')}
    with pytest.raises(UserError, match='already has checkpoints: choose another --workdir'):
        importer.import_weights(imports.config(), source, workdir)
    assert {path: path.stat().st_mtime_ns for path in workdir.rglob('*')} == before


def test_a_work_directory_that_cannot_be_written(tmp_path):
    (tmp_path / 'file').touch()
    with pytest.raises(UserError, match=r'file/imported.*cannot be written'):
        importer.import_weights(imports.config(), imports.file(tmp_path), tmp_path / 'file' / 'imported')


def test_presets_follow_the_family(tmp_path):
    """What they do around the same network (docs/reference.md, Differences between implementations)."""
    source = imports.file(tmp_path)
    importer.import_weights(config := imports.config(), source, tmp_path / 'effdet')
    assert config.eval.nms == 'hard'
    assert config.image.mean == config.image.std == (127.5,) * 3
    assert config.model.anchors.aspect_ratios[1] == (1.4, 0.7)
    importer.import_weights(config := imports.config(), source, tmp_path / 'kept', preset='config')
    assert config.to_dict() == imports.config().to_dict() | {'dataset': config.dataset.to_dict()}
    named = source.rename(tmp_path / 'tf_efficientdet_lite0_ap.safetensors')
    importer.import_weights(config := imports.config(), named, tmp_path / 'lite')  # there is no AdvProp of Lite
    assert config.image.padding == 0.0
    importer.import_weights(config := imports.config(), h5(tmp_path), tmp_path / 'official')
    assert (config.eval.nms, config.eval.sigma) == ('gaussian', 0.5)
    assert config.image.mean == (127.0,) * 3
    assert config.model.anchors.aspect_ratios == (1.0, 2.0, 0.5)


def b0(size=(512, 512)):
    config = imports.config(writers.Member('b0', cells=1, head_layers=1, weighted=True))
    config.name, config.image = 'd0', default.get_config('d0').image
    config.image.size = size
    return config


@pytest.mark.parametrize(
    ('family', 'format_name', 'path', 'preset'),
    [
        ('official', 'tensorflow', 'advprop/efficientdet-d0.tar.gz/efficientdet-d0/model', 'official-advprop'),
        ('official', 'tensorflow', 'Det-AdvProp/efficientdet-d0/model', 'official-advprop'),
        ('official', 'tensorflow', 'efficientdet-d0.tar.gz/d0_advprop/model', 'official-advprop'),
        ('official', 'tensorflow', 'coco2/efficientdet-d0.tar.gz/efficientdet-d0/model', 'official'),
        ('official', 'tensorflow', 'advprop/mine/coco2/efficientdet-d0.tar.gz', 'official'),  # the nearest folder
        ('official', 'tensorflow', 'coco640/d3.tar.gz/model', 'official-640'),
        ('official', 'hdf5', 'efficientdet-d0.h5', 'official'),  # published AdvProp weights are no .h5
        ('official', 'hdf5', 'efficientdet-d3-640.h5', 'official-640'),
        ('effdet', 'torch', 'tf_efficientdet_d0_34-f153e0cf.pth', 'effdet'),
        ('effdet', 'torch', 'tf_efficientdet_d0_ap-d0cdbd0a.pth', 'effdet-advprop'),
        ('effdet', 'torch', 'advprop/tf_efficientdet_d0_34-f153e0cf.pth', 'effdet'),
        ('effdet', 'torch', 'best_ap_0.34/model.pth', 'effdet'),  # average precision
        ('timm', 'safetensors', 'tf_efficientnet_b0.ap_in1k/model.safetensors', 'timm-advprop'),
        ('timm', 'safetensors', 'timm--tf_efficientnet_b0.ap_in1k/snapshots/9f/model.safetensors', 'timm-advprop'),
        ('timm', 'safetensors', 'timm--tf_efficientnet_b0.aa_in1k/snapshots/9f/model.safetensors', 'timm'),
        ('timm', 'torch', 'tf_efficientnet_b0_ap-f262efe1.pth', 'timm-advprop'),
        ('port', 'torch', 'adv-efficientnet-b0-b64d5a18.pth', 'port-advprop'),
        ('port', 'torch', 'efficientnet-b0-355c32eb.pth', 'port'),
    ],
)  # fmt: skip
def test_the_path_tells_what_the_arrays_do_not(family, format_name, path, preset):
    found = families.Recognised(family, names.SCHEMES['keras'], family in ('official', 'effdet'), {}, {})
    assert importer.choose_preset(found, b0(), readers.Contents({}, format_name, FilePath('/home/me') / path)) == preset


@pytest.mark.parametrize('backbone', ['b6', 'b7', 'lite0'])
def test_of_some_members_there_is_no_advprop(backbone):
    config = b0()
    config.model.backbone = backbone
    found = families.Recognised('official', names.SCHEMES['keras'], True, {}, {})
    preset = importer.choose_preset(found, config, readers.Contents({}, 'tensorflow', FilePath('/efficientdet.tar.gz')))
    assert preset == ('official-lite' if backbone == 'lite0' else 'official')


def released(folder):
    """A detector of B0 as google/automl publishes it."""
    folder.mkdir(parents=True)
    layers = writers.layers(writers.Member('b0', cells=1, head_layers=1, weighted=True))
    return containers.released(folder, writers.to_tensorflow(layers, writers.draw(layers), 'keras'))


@pytest.mark.slow
def test_advprop_by_the_folder_of_the_archive(tmp_path, capsys):
    importer.import_weights(config := b0(), released(tmp_path / 'advprop'), tmp_path / 'imported')
    assert (config.image.mean, config.image.padding) == ((127.5,) * 3, -1.0)
    assert config.model.anchors.aspect_ratios == (1.0, 2.0, 0.5)
    said = ' '.join(capsys.readouterr().out.split())
    assert 'preset official-advprop, because the path contains advprop; if that is wrong, give --preset=' in said


@pytest.mark.slow
def test_it_is_asked_where_nothing_tells(tmp_path, refused):
    source = released(tmp_path / 'downloads')
    refused(source, r'plain or AdvProp weights\?.* add --preset=official, or --preset=official-advprop', b0())
    importer.import_weights(config := b0(), source, tmp_path / 'told', preset='official-advprop')
    assert config.image.padding == -1.0


def test_640_pixels_unless_another_size_was_given():
    assert importer.apply_preset(config := b0(), 'official-640')['image.size'] == (640, 640)
    assert config.image.size == (640, 640)
    importer.apply_preset(config := b0((256, 256)), 'official-640')
    assert config.image.size == (256, 256)


def test_training_would_replace_imported_weights(tmp_path):
    importer.import_weights(config := imports.config(), imports.file(tmp_path), workdir := tmp_path / 'imported')
    with pytest.raises(UserError, match=rf'imported weights.*--config\.train\.init_from={workdir}'):
        build.build_run(config, workdir)


def test_a_backbone_is_no_detector(tmp_path):
    arrays = {name: array for name, array in imports.torch_arrays().items() if name.startswith('backbone.')}
    config = imports.config(class_names=())
    config.model.feature_network.name = 'nasfpn'  # a backbone goes before any
    importer.import_weights(config, imports.file(tmp_path, arrays), tmp_path / 'imported')
    with pytest.raises(UserError, match='has only a backbone: train a detector'):
        Detector.load(tmp_path / 'imported')
    assert jax.tree.leaves(load_variables(tmp_path / 'imported', 'eval/AP')[1])
