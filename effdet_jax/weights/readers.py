"""Reads weights files of other implementations: {name in the file: array}. The content decides the format.

Files are not trusted. Nothing in them is executed: PyTorch pickles are read with `weights_only`. They cannot reach
other files: only plain files are unpacked from archives, into a temporary folder, and HDF5 links to other files are
refused. They cannot fill memory or disk: the declared size is compared with `MAX_BYTES` first.
TensorFlow and PyTorch are imported only when a file needs them.
"""

import argparse
import contextlib
import gzip
import io
import math
import pickle
import re
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np

from effdet_jax.errors import UserError, import_optional

Arrays = dict[str, np.ndarray]

HDF5_MAGIC = b'\x89HDF\r\n\x1a\n'
GZIP_MAGIC = b'\x1f\x8b'
MAX_BYTES = 4 * 2**30  # D7x has 0.3 GB, plus the same for each moving average and optimizer slot
MAX_FILES = 10_000  # in an archive

FORMATS = 'Keras .h5, TensorFlow checkpoints (prefix, folder or .tar.gz), PyTorch .pth / .pt / .bin, .safetensors'


class Contents(NamedTuple):
    """The contents of a weights file."""

    arrays: Arrays  # with the names and layouts of the file
    format: str  # 'tensorflow', 'hdf5', 'safetensors' or 'torch'
    path: Path  # absolute; for an archive, followed by the path of the checkpoint inside


def read(source: Path) -> Contents:
    """Reads all arrays of a checkpoint file, folder or prefix.

    Raises:
      UserError: if the file is missing, damaged, of an unknown format or too large, contains code, or points to other
        files.
    """
    path = source.absolute()
    if checkpoint := _tensorflow_prefix(source):
        return Contents(_read_tensorflow(checkpoint, source), 'tensorflow', path)
    if not source.is_file():
        raise UserError(f'{source}: no such file: --source takes {FORMATS}')
    with source.open('rb') as file:
        head = file.read(512)
    if head.startswith(HDF5_MAGIC):
        return Contents(_read_hdf5(source), 'hdf5', path)
    if head.startswith(GZIP_MAGIC) or head[257:262] == b'ustar':
        arrays, inside = _read_archive(source)
        return Contents(arrays, 'tensorflow', path / inside)
    if head[8:9] == b'{':  # the JSON header follows its length
        return Contents(_read_safetensors(source), 'safetensors', path)
    if zipfile.is_zipfile(source) or head.startswith((b'\x80', b'PK')):
        return Contents(_read_torch(source), 'torch', path)
    raise UserError(f'{source}: unknown format, or damaged: --source takes {FORMATS}')


def _read_hdf5(source: Path) -> Arrays:
    import h5py

    datasets: dict[str, Any] = {}

    def external(name: str, item: Any) -> str | None:
        """The name, if the content of a link or dataset lies in another file."""
        is_link = isinstance(item, h5py.ExternalLink)
        is_external = isinstance(item, h5py.Dataset) and (item.external or item.is_virtual)
        return name if is_link or is_external else None  # anything but None ends the visit

    def visit(name: str, item: Any) -> None:
        if isinstance(item, h5py.Dataset) and item.shape is not None and item.dtype.kind in 'iuf':
            datasets[name] = item

    with _damage_reported(source, OSError, RuntimeError, KeyError, TypeError), h5py.File(source, 'r') as file:
        if (name := file.visititems_links(external) or file.visititems(external)) is not None:
            raise UserError(f'{source}: {name} lies in another file, which weights never need: do not trust this file')
        # A complete Keras model has a group of weights and one of optimizer state.
        weights: Any = file.get('model_weights', file)
        (weights if isinstance(weights, h5py.Group) else file).visititems(visit)
        _refuse_too_large(source, (dataset.nbytes for dataset in datasets.values()))
        return {name: np.asarray(dataset) for name, dataset in datasets.items()}


def _read_safetensors(source: Path) -> Arrays:
    from safetensors import SafetensorError, safe_open

    with _damage_reported(source, SafetensorError, OSError), safe_open(source, framework='numpy') as file:
        return {name: np.asarray(file.get_tensor(name), np.float32) for name in file.keys()}  # noqa: SIM118


def _read_torch(source: Path) -> Arrays:
    torch = import_optional('torch', '-r requirements-torch.txt')
    if zipfile.is_zipfile(source):
        with _damage_reported(source, zipfile.BadZipFile, OSError, ValueError), zipfile.ZipFile(source) as archive:
            _refuse_too_large(source, (member.file_size for member in archive.infolist()))
    try:
        # The training script of effdet saves its command line too: a Namespace of plain values, without code.
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(source, map_location='cpu', weights_only=True)
    except pickle.UnpicklingError as error:
        culprit = re.search(r'WeightsUnpickler error:\s+(.+?)(?: was not an allowed|$)', str(error), re.MULTILINE)
        raise UserError(
            f'{source}: contains objects that could run code ({culprit[1] if culprit else error}): save only the '
            'weights, torch.save(model.state_dict(), FILE)'
        ) from error
    except (RuntimeError, EOFError, OSError, KeyError, ValueError) as error:
        raise _damaged(source, error) from error
    tensors = _tensors(content, torch)
    _refuse_too_large(source, (tensor.numel() * tensor.element_size() for tensor in tensors.values()))
    with _damage_reported(source, RuntimeError, TypeError):
        return {name: tensor.detach().float().numpy() for name, tensor in tensors.items()}


def _tensors(content: Any, torch: Any) -> Mapping[str, Any]:
    """The dense tensors among what training scripts save; averaged parameters are preferred to raw ones."""
    for key in ('state_dict_ema', 'state_dict', 'model_ema', 'model'):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            return _tensors(content[key], torch)
    if not isinstance(content, Mapping):
        return {}
    return {
        str(name): value
        for name, value in content.items()
        if isinstance(value, torch.Tensor) and value.layout is torch.strided and value.device.type == 'cpu'
    }


def _read_tensorflow(prefix: Path, source: Path) -> Arrays:
    """Reads the checkpoint `prefix`. `source` is what the user gave, for messages."""
    tensorflow = import_optional('tensorflow', '-r requirements-tensorflow.txt')
    arrays: Arrays = {}
    with _damage_reported(source, tensorflow.errors.OpError, ValueError, IndexError, RuntimeError):
        reader = tensorflow.train.load_checkpoint(str(prefix))
        shapes = reader.get_variable_to_shape_map()
        numbers = {
            name: dtype
            for name, dtype in reader.get_variable_to_dtype_map().items()
            if dtype.is_floating or dtype.is_integer
        }
        _refuse_too_large(source, (math.prod(shapes[name]) * dtype.size for name, dtype in numbers.items()))
        for name in numbers:
            arrays[name] = np.asarray(reader.get_tensor(name))
    return arrays


def _tensorflow_prefix(source: Path) -> Path | None:
    """runs/model, runs/model.index, or a folder with one checkpoint or a `checkpoint` file -> runs/model."""
    if source.is_dir():
        prefixes = sorted(path.with_suffix('') for path in source.rglob('*.index'))
        newest = max(prefixes, key=lambda path: path.with_name(path.name + '.index').stat().st_mtime, default=None)
        if len(prefixes) > 1:
            raise UserError(f'{source} has {len(prefixes)} checkpoints: choose one, e.g. --source={newest}')
        if newest is None:
            raise UserError(f'{source} is a folder without a TensorFlow checkpoint (*.index): --source takes {FORMATS}')
        return newest
    if source.suffix == '.index' and source.is_file():
        return source.with_suffix('')
    return source if source.with_name(source.name + '.index').is_file() else None


def _read_archive(source: Path) -> tuple[Arrays, PurePosixPath]:
    """(arrays, path inside) of a .tar.gz, as official checkpoints are released."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with _damage_reported(source, tarfile.TarError, OSError, EOFError, zlib.error):
            _unpack(source, folder)
        prefixes = [path.with_suffix('') for path in folder.rglob('*.index')]
        if len(prefixes) != 1:
            raise UserError(
                f'{source}: damaged, or an archive with {len(prefixes)} TensorFlow checkpoints (*.index) instead of '
                'one: unpack it and choose one'
            )
        return _read_tensorflow(prefixes[0], source), PurePosixPath(prefixes[0].relative_to(folder))


def _unpack(source: Path, folder: Path) -> None:
    """Unpacks a .tar or .tar.gz as a stream, up to `MAX_BYTES`."""
    with source.open('rb') as file:
        compressed = file.read(2) == GZIP_MAGIC
    with (gzip.open if compressed else open)(source, 'rb') as plain:
        stream = _Bounded(plain, source)
        with tarfile.open(fileobj=stream, mode='r|') as archive:
            for count, member in enumerate(archive, start=1):
                if count > MAX_FILES:
                    raise UserError(f'{source}: more than {MAX_FILES} files: unpack it and choose one')
                if member.name.startswith('/') or '..' in PurePosixPath(member.name).parts:
                    raise UserError(
                        f'{source}: {member.name} would be unpacked outside the folder: do not trust this file'
                    )
                if not (member.isdir() or (member.isreg() and not member.issparse())):
                    raise UserError(
                        f'{source}: {member.name} is neither a plain file nor a folder: if you trust the archive, '
                        'unpack it and choose the checkpoint'
                    )
                archive.extract(member, folder, filter='data')
        while stream.read(2**20):  # so that gzip verifies the checksum at the end
            pass


class _Bounded(io.RawIOBase):
    """A file from which at most `MAX_BYTES` can be read."""

    def __init__(self, file: Any, source: Path) -> None:
        self._file, self._source, self._left = file, source, MAX_BYTES

    def read(self, size: int = -1) -> bytes:
        content = self._file.read(size)
        self._left -= len(content)
        if self._left < 0:
            raise _too_large(self._source)
        return content


@contextlib.contextmanager
def _damage_reported(source: Path, *errors: type[Exception]) -> Iterator[None]:
    try:
        yield
    except errors as error:
        raise _damaged(source, error) from error


def _refuse_too_large(source: Path, sizes: Iterable[int]) -> None:
    if sum(sizes) > MAX_BYTES:
        raise _too_large(source)


def _too_large(source: Path) -> UserError:
    return UserError(
        f'{source}: more than {MAX_BYTES / 2**30:.3g} GiB, but the largest detector has only 0.3: save only its weights'
    )


def _damaged(source: Path, error: Exception) -> UserError:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    return UserError(f'{source}: damaged or incomplete ({reason}): download it again')
