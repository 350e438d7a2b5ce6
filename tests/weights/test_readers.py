"""Files that reach for other files, or claim to be huge: refused in one line, and nothing of them is left."""

import io
import tarfile
import zipfile

import containers
import h5py
import numpy as np
import pytest
import safetensors.numpy

from effdet_jax.errors import UserError
from effdet_jax.weights import readers

ARRAYS = {'class_net/kernel': np.arange(6, dtype=np.float32).reshape(2, 3), 'stem/kernel': np.ones(4, np.float32)}


def refused(source, message):
    with pytest.raises(UserError, match=message) as error:
        readers.read(source)
    assert '\n' not in str(error.value)
    assert str(error.value).startswith(str(source))


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(readers, 'MAX_BYTES', 2**20)
    monkeypatch.setattr(readers, 'MAX_FILES', 200)


# Archives


def add(archive, name, size=0, **attributes):
    member = tarfile.TarInfo(name)
    member.size = size
    for key, value in attributes.items():
        setattr(member, key, value)
    archive.addfile(member, io.BytesIO(bytes(size)))


def with_a_symbolic_link(archive):
    add(archive, 'd0/model.index', type=tarfile.SYMTYPE, linkname='/etc/passwd')


def with_a_linked_folder(archive):
    add(archive, 'd0', type=tarfile.SYMTYPE, linkname='..')
    add(archive, 'd0/model.index')


def with_a_hard_link(archive):
    add(archive, 'd0/model.index', type=tarfile.LNKTYPE, linkname='../../secret')


def with_a_device(archive):
    add(archive, 'd0/model.index', type=tarfile.CHRTYPE, devmajor=1, devminor=5)


def with_a_pipe(archive):
    add(archive, 'd0/model.index', type=tarfile.FIFOTYPE)


def with_an_absolute_name(archive):
    add(archive, '/tmp/effdet_jax_outside.index')


def with_a_name_upwards(archive):
    add(archive, 'd0/../../outside.index')


def with_much(archive):
    add(archive, 'd0/model.data-00000-of-00001', 2**21)


def with_a_long_header(archive):
    add(archive, 'd0/model.index', pax_headers={'comment': 'a' * 2**21})


def with_many(archive):
    for index in range(300):
        add(archive, f'd0/{index}')


@pytest.mark.usefixtures('small')
@pytest.mark.parametrize('mode', ['w', 'w:gz'])
@pytest.mark.parametrize(
    ('fill', 'message'),
    [
        (with_a_symbolic_link, r'd0/model\.index is neither a plain file nor a folder'),
        (with_a_linked_folder, r'd0 is neither a plain file nor a folder'),
        (with_a_hard_link, r'd0/model\.index is neither a plain file nor a folder'),
        (with_a_device, r'd0/model\.index is neither a plain file nor a folder'),
        (with_a_pipe, r'd0/model\.index is neither a plain file nor a folder'),
        (with_an_absolute_name, r'/tmp/effdet_jax_outside\.index would be unpacked outside'),
        (with_a_name_upwards, r'd0/\.\./\.\./outside\.index would be unpacked outside'),
        (with_much, 'more than 0.000977 GiB'),
        (with_a_long_header, 'more than 0.000977 GiB'),
        (with_many, 'more than 200 files'),
    ],
)
def test_archives(fill, message, mode, tmp_path):
    with tarfile.open(source := tmp_path / 'd0.tar', mode, format=tarfile.PAX_FORMAT) as archive:
        fill(archive)
    refused(source, message)
    assert [path.name for path in tmp_path.rglob('*')] == ['d0.tar']


@pytest.mark.slow
def test_where_in_an_archive_the_checkpoint_lies(tmp_path):
    contents = readers.read(source := containers.released(tmp_path, ARRAYS))
    assert (contents.format, contents.path) == ('tensorflow', source / 'efficientdet-d0' / 'model')
    np.testing.assert_array_equal(contents.arrays['stem/kernel/ExponentialMovingAverage'], ARRAYS['stem/kernel'])


# HDF5


def external_data(file, other):
    other.write_bytes(b'secret: 1234')
    file.create_dataset('bias', (3,), 'f4', external=[(str(other), 0, 12)])


def external_link(file, other):
    h5py.File(other, 'w').close()
    file['class_net/more'] = h5py.ExternalLink(str(other), '/')


def external_link_to_nothing(file, other):
    file['class_net/more'] = h5py.ExternalLink(str(other), '/')


def external_weights(file, other):
    with h5py.File(other, 'w') as outside:
        outside['bias'] = np.ones(3)
    file['model_weights'] = h5py.ExternalLink(str(other), '/')


def linked_external_weights(file, other):
    external_link(file, other)
    file['model_weights'] = h5py.SoftLink('/class_net/more')


def virtual(file, other):
    with h5py.File(other, 'w') as outside:
        outside['bias'] = np.ones(3)
    layout = h5py.VirtualLayout((3,), 'f4')
    layout[:] = h5py.VirtualSource(str(other), 'bias', (3,))
    file.create_virtual_dataset('bias', layout)


@pytest.mark.parametrize(
    'point',
    [external_data, external_link, external_link_to_nothing, external_weights, linked_external_weights, virtual],
)
def test_hdf5_that_points_to_another_file(point, tmp_path):
    with h5py.File(source := containers.keras_h5(tmp_path, ARRAYS), 'r+') as file:
        point(file, tmp_path / 'other')
    refused(source, r'model\.h5: \S+ lies in another file, .*: do not trust this file')


def test_hdf5_that_points_into_itself_and_holds_other_things(tmp_path):
    with h5py.File(source := containers.keras_h5(tmp_path, ARRAYS), 'r+') as file:
        file['again'], file['nowhere'] = h5py.SoftLink('/class_net'), h5py.SoftLink('/no')
        file['text'], file['nothing'], file['model_weights'] = 'abc', h5py.Empty('f4'), np.zeros(2)
    contents = readers.read(source)
    assert contents.format == 'hdf5'
    assert contents.arrays.keys() == {'class_net/class_net/kernel:0', 'stem/stem/kernel:0', 'model_weights'}
    np.testing.assert_array_equal(contents.arrays['class_net/class_net/kernel:0'], ARRAYS['class_net/kernel'])


# Small files that claim to be huge


def huge_h5(folder):
    """A dataset whose numbers are not in the file."""
    with h5py.File(path := folder / 'model.h5', 'w') as file:
        file.create_dataset('class_net', (2**20, 2**20), 'f4', chunks=(1, 1))
    return path


def huge_pth(folder):
    """A tensor that repeats one number."""
    import torch

    torch.save({'class_net': torch.zeros(1, dtype=torch.float16).expand(2**40)}, path := folder / 'model.pth')
    return path


def huge_old_pth(folder):
    import torch

    tensor = torch.zeros(1, dtype=torch.float16).expand(2**40)
    torch.save({'class_net': tensor}, path := folder / 'model.pth', _use_new_zipfile_serialization=False)
    return path


def zipped(folder):
    """A .pth whose parts are compressed."""
    with zipfile.ZipFile(path := folder / 'model.pth', 'w', zipfile.ZIP_DEFLATED) as archive:
        for index in range(5):
            archive.writestr(f'model/data/{index}', bytes(2**18))
    return path


def huge_tensorflow(folder):
    return containers.tf1_plain(folder, {'class_net': np.zeros(2**19, np.float32)})


@pytest.mark.usefixtures('small')
@pytest.mark.parametrize('write', [huge_h5, huge_pth, huge_old_pth, zipped, huge_tensorflow])
def test_what_is_too_large(write, tmp_path):
    refused(write(tmp_path), 'more than 0.000977 GiB, but the largest detector has only 0.3')


@pytest.mark.parametrize('write', [huge_h5, huge_pth, huge_old_pth])
def test_what_is_larger_than_the_memory(write, tmp_path):
    refused(write(tmp_path), 'more than 4 GiB')


def test_the_largest_detector_with_its_averages_and_slots_is_not(tmp_path):
    numbers, copies = 77_000_000, 8  # D7x; value, average and two slots of an optimizer, twice over
    assert 4 * numbers * copies < readers.MAX_BYTES


# Tensors


def test_parameters_are_read_and_tensors_without_numbers_are_not(tmp_path):
    import torch

    content = {
        'a': torch.nn.Parameter(torch.ones(3)),
        'b': torch.zeros(1, device='meta'),
        'c': torch.zeros(2, 2).to_sparse(),
        'd': 'no tensor',
    }
    torch.save(content, source := tmp_path / 'model.pth')
    contents = readers.read(source)
    assert (contents.format, contents.arrays.keys()) == ('torch', {'a'})
    np.testing.assert_array_equal(contents.arrays['a'], np.ones(3))


def test_the_path_is_absolute(tmp_path, monkeypatch):
    safetensors.numpy.save_file(ARRAYS, tmp_path / 'model.safetensors')
    monkeypatch.chdir(tmp_path)
    contents = readers.read(readers.Path('model.safetensors'))
    assert (contents.format, contents.path) == ('safetensors', tmp_path / 'model.safetensors')
