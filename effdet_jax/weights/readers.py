"""Files of other implementations -> {name in the file: array}. What a file is, its content says, not its suffix.

Nothing a file contains is executed: PyTorch's pickles are read with `weights_only`, archives are unpacked without
links and absolute paths. TensorFlow and PyTorch are imported only by the reader that needs them.
"""

import contextlib
import importlib
import pickle
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from effdet_jax.errors import UserError

Arrays = dict[str, np.ndarray]

HDF5_MAGIC = b'\x89HDF\r\n\x1a\n'
FORMATS = 'Keras .h5, TensorFlow checkpoints (prefix, folder or .tar.gz), PyTorch .pth / .pt / .bin, .safetensors'


def read(source: Path) -> Arrays:
    """Every array of a checkpoint file, folder or prefix; names and layouts as they are there.

    Raises:
      UserError: where there is none, it is damaged, of an unknown format, or would run code.
    """
    if checkpoint := _tensorflow_prefix(source):
        return _read_tensorflow(checkpoint)
    if not source.is_file():
        raise UserError(f'{source}: no such file: --source takes {FORMATS}')
    with source.open('rb') as file:
        head = file.read(16)
    if tarfile.is_tarfile(source):
        return _read_archive(source)
    return _reader(source, head)(source)


def _reader(source: Path, head: bytes) -> Callable[[Path], Arrays]:
    if head.startswith(HDF5_MAGIC):
        return _read_hdf5
    if head[8:9] == b'{':  # after the length of a JSON header
        return _read_safetensors
    if zipfile.is_zipfile(source) or head.startswith((b'\x80', b'PK')):
        return _read_torch
    raise UserError(f'{source}: neither of the known formats, or damaged: --source takes {FORMATS}')


def _read_hdf5(source: Path) -> Arrays:
    import h5py

    arrays: Arrays = {}

    def visit(name: str, item: Any) -> None:
        if isinstance(item, h5py.Dataset):
            arrays[name] = np.asarray(item)

    with _damage_reported(source, OSError, RuntimeError, KeyError), h5py.File(source, 'r') as file:
        # A model that was saved whole keeps its weights in a group beside its optimizer's.
        weights: Any = file.get('model_weights', file)
        weights.visititems(visit)
    return arrays


def _read_safetensors(source: Path) -> Arrays:
    from safetensors import SafetensorError, safe_open

    with _damage_reported(source, SafetensorError, OSError), safe_open(source, framework='numpy') as file:
        return {name: np.asarray(file.get_tensor(name), np.float32) for name in file.keys()}  # noqa: SIM118


def _read_torch(source: Path) -> Arrays:
    torch = _needed('torch', 'requirements-torch.txt', f'{source} is a PyTorch file')
    try:
        content = torch.load(source, map_location='cpu', weights_only=True)
    except pickle.UnpicklingError as error:
        culprit = next((line for line in str(error).splitlines() if 'GLOBAL' in line), str(error).splitlines()[0])
        raise UserError(
            f'{source}: holds more than arrays, which would run code when read ({culprit.strip()}): save its '
            'state_dict alone, torch.save(model.state_dict(), FILE)'
        ) from error
    except (RuntimeError, EOFError, OSError, KeyError, ValueError) as error:
        raise _damaged(source, error) from error
    return {name: tensor.float().numpy() for name, tensor in _tensors(content, torch).items()}


def _tensors(content: Any, torch: Any) -> Mapping[str, Any]:
    """The dictionary of tensors in what training scripts save around it; averaged parameters before raw ones."""
    for key in ('state_dict_ema', 'state_dict', 'model_ema', 'model'):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            return _tensors(content[key], torch)
    if not isinstance(content, Mapping):
        return {}
    return {str(name): value for name, value in content.items() if isinstance(value, torch.Tensor)}


def _read_tensorflow(prefix: Path) -> Arrays:
    tensorflow = _needed('tensorflow', 'requirements-tensorflow.txt', f'{prefix} is a TensorFlow checkpoint')
    arrays: Arrays = {}
    with _damage_reported(prefix, tensorflow.errors.OpError, ValueError):
        reader = tensorflow.train.load_checkpoint(str(prefix))
        for name, dtype in reader.get_variable_to_dtype_map().items():
            if dtype.is_floating or dtype.is_integer:
                arrays[name] = np.asarray(reader.get_tensor(name))
    return arrays


def _tensorflow_prefix(source: Path) -> Path | None:
    """runs/model, runs/model.index, or a folder with one checkpoint or a `checkpoint` file -> runs/model."""
    if source.is_dir():
        prefixes = sorted(path.with_suffix('') for path in source.rglob('*.index'))
        newest = max(prefixes, key=lambda path: path.with_name(path.name + '.index').stat().st_mtime, default=None)
        if len(prefixes) > 1:
            raise UserError(f'{source} holds {len(prefixes)} checkpoints: name one, as in --source={newest}')
        if newest is None:
            raise UserError(f'{source} is a folder without a TensorFlow checkpoint (*.index): --source takes {FORMATS}')
        return newest
    if source.suffix == '.index' and source.is_file():
        return source.with_suffix('')
    return source if source.with_name(source.name + '.index').is_file() else None


def _read_archive(source: Path) -> Arrays:
    """The .tar.gz in which official checkpoints are released."""
    with tempfile.TemporaryDirectory() as folder:
        with _damage_reported(source, tarfile.TarError, OSError, EOFError), tarfile.open(source) as archive:
            archive.extractall(folder, filter='data')
        return read(Path(folder))


def _needed(module: str, requirements: str, why: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(f'{why}, to read it: pip install -r {requirements}') from error


@contextlib.contextmanager
def _damage_reported(source: Path, *errors: type[Exception]) -> Iterator[None]:
    try:
        yield
    except errors as error:
        raise _damaged(source, error) from error


def _damaged(source: Path, error: Exception) -> UserError:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    return UserError(f'{source}: damaged or cut off ({reason}): fetch it again')
