"""Export formats: each has a `write` for a program of arrays, and a `load` that needs nothing else of this package.

    stablehlo    a zip with model.stablehlo (jax.export for cpu, cuda and tpu) and metadata.json; needs jax, flatbuffers
    savedmodel   a TensorFlow SavedModel of the same program, with assets.extra/metadata.json
    onnx         converted by jax2onnx, with the model property `metadata`

`load` returns a function of NumPy arrays, in the order of the program's inputs and outputs. TensorFlow and ONNX Runtime
run it on the CPU, jax on its default device.
"""

import json
import warnings
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import export

from effdet_jax.errors import UserError, import_optional
from effdet_jax.kernels.dispatch import plain_everywhere

PLATFORMS = ('cpu', 'cuda', 'tpu')

# SavedModels are written in this version of StableHLO: jax writes a newer one that TensorFlow cannot read.
STABLEHLO_OF_TENSORFLOW = '1.13.0'  # the newest that TensorFlow 2.21 reads

Metadata = Mapping[str, Any]
Run = Callable[..., tuple[Any, ...]]


class Input(NamedTuple):
    """An argument of a program. A letter in the shape is any length, the same wherever that letter occurs."""

    name: str
    shape: tuple[int | str, ...]
    dtype: str


class Program(NamedTuple):
    function: Callable[..., tuple[jax.Array, ...]]  # pure; the weights are constants in it
    inputs: tuple[Input, ...]
    outputs: tuple[str, ...]


class Format(NamedTuple):
    write: Callable[[Program, Metadata, Path], None]
    load: Callable[[Path], Run]


def read_stablehlo(path: Path) -> tuple[Run, dict[str, Any]]:
    """(program, metadata) of a file written by `write_stablehlo`. The program can be jitted.

    Raises:
      UserError: for any other file.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            metadata = json.loads(archive.read('metadata.json'))
            program: Any = export.deserialize(bytearray(archive.read('model.stablehlo')))
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise UserError(
            f'{path} is not a StableHLO export ({error}): give a work directory, or a file written by `effdet export`'
        ) from error
    return program.call, metadata


def write_stablehlo(program: Program, metadata: Metadata, path: Path) -> None:
    with zipfile.ZipFile(path, 'w', zipfile.ZIP_DEFLATED) as archive:
        archive.writestr('metadata.json', json.dumps(metadata, indent=1))
        archive.writestr('model.stablehlo', _exported(program).serialize())


def load_stablehlo(path: Path) -> Run:
    return jax.jit(read_stablehlo(path)[0])


def write_saved_model(program: Program, metadata: Metadata, path: Path) -> None:
    """Wraps the program in TensorFlow's XlaCallModule, as jax2tf does, but in a StableHLO version that it can read.

    Raises:
      UserError: if TensorFlow is not installed, or the program has operations unknown to that version.
    """
    tf = import_optional('tensorflow', '-r requirements-tensorflow.txt')
    from tensorflow.compiler.tf2xla.python import xla

    exported = _exported(program)
    content = _for_tensorflow(exported.mlir_module_serialized)

    def call(*arguments: Any) -> dict[str, Any]:
        results: Any = xla.call_module(
            list(arguments),
            version=exported.calling_convention_version,
            module=content,
            Tout=[aval.dtype for aval in exported.out_avals],
            Sout=[[n if isinstance(n, int) else None for n in aval.shape] for aval in exported.out_avals],
            platforms=[platform.upper() for platform in exported.platforms],
        )
        return dict(zip(program.outputs, results, strict=True))

    signature = [
        tf.TensorSpec([n if isinstance(n, int) else None for n in i.shape], i.dtype, i.name) for i in program.inputs
    ]
    holder = tf.Module()
    holder.call = tf.function(call, autograph=False, input_signature=signature)
    tf.saved_model.save(holder, str(path), signatures={'serving_default': holder.call})
    (path / 'assets.extra').mkdir()
    (path / 'assets.extra' / 'metadata.json').write_text(json.dumps(metadata, indent=1), encoding='utf-8')


def load_saved_model(path: Path) -> Run:
    tf = import_optional('tensorflow', '-r requirements-tensorflow.txt')
    model = tf.saved_model.load(str(path))
    signature = model.signatures['serving_default']
    names, outputs = _names(path / 'assets.extra' / 'metadata.json')

    def run(*arguments: Any) -> tuple[np.ndarray, ...]:
        _, specs = signature.structured_input_signature
        with tf.device('CPU'):
            tensors = {
                name: tf.constant(value, specs[name].dtype) for name, value in zip(names, arguments, strict=True)
            }
            results = signature(**tensors)
        return tuple(results[name].numpy() for name in outputs)

    run.model = model  # type: ignore[attr-defined]  # keeps the model alive: its signature does not
    return run


def write_onnx(program: Program, metadata: Metadata, path: Path) -> None:
    """Depthwise convolutions become grouped convolutions in ONNX, on whatever platform this runs."""
    jax2onnx, onnx = (import_optional(name, '-r requirements-export.txt') for name in ('jax2onnx', 'onnx'))
    with plain_everywhere(), warnings.catch_warnings():
        warnings.simplefilter('ignore')
        try:
            model = jax2onnx.to_onnx(
                program.function,
                [jax.ShapeDtypeStruct(i.shape, i.dtype) for i in program.inputs],
                input_names=[i.name for i in program.inputs],
                output_names=program.outputs,
            )
        except Exception as error:  # with an unsupported jax it raises anything
            raise UserError(
                f'jax2onnx cannot convert this with jax {jax.__version__} ({type(error).__name__}: {error}): use a '
                'version of jax that it supports (jax2onnx 0.17.1: below 0.12), or --format=stablehlo or savedmodel'
            ) from error
    # The converter transposes channels but keeps the old shapes of intermediate values; onnxruntime infers them anew.
    del model.graph.value_info[:]
    onnx.helper.set_model_props(model, {'metadata': json.dumps(metadata)})
    onnx.save(model, str(path))


def load_onnx(path: Path) -> Run:
    runtime = import_optional('onnxruntime', '-r requirements-export.txt')
    session = runtime.InferenceSession(str(path), providers=['CPUExecutionProvider'])
    names = [value.name for value in session.get_inputs()]
    return lambda *arguments: tuple(session.run(None, dict(zip(names, arguments, strict=True))))


FORMATS = {
    'stablehlo': Format(write_stablehlo, load_stablehlo),
    'savedmodel': Format(write_saved_model, load_saved_model),
    'onnx': Format(write_onnx, load_onnx),
}


def _exported(program: Program) -> export.Exported:
    scope = export.SymbolicScope()
    shapes = [
        jax.ShapeDtypeStruct(export.symbolic_shape(', '.join(map(str, i.shape)), scope=scope), i.dtype)
        for i in program.inputs
    ]
    return export.export(jax.jit(program.function), platforms=PLATFORMS)(*shapes)


def _for_tensorflow(module_serialized: bytes) -> bytes:
    """The same module in a StableHLO version that TensorFlow reads, which lacks the composites of jax 0.12.

    A composite is defined by its decomposition, a function, so a call of that function replaces it.
    """
    from jax.extend.mlir import ir
    from jax.extend.mlir.dialects import func, stablehlo

    composites: list[Any] = []

    def note(operation: Any) -> Any:
        if operation.name == 'stablehlo.composite':
            composites.append(operation)
        return ir.WalkResult.ADVANCE

    with ir.Context() as context:
        module = stablehlo.deserialize_portable_artifact(context, module_serialized)
        module.operation.walk(note)
        for composite in composites:
            types = [result.type for result in composite.results]
            with ir.InsertionPoint(composite), composite.location:
                call = func.CallOp(types, composite.attributes['decomposition'], list(composite.operands))
            for old, new in zip(composite.results, call.results, strict=True):
                old.replace_all_uses_with(new)
            composite.erase()
        try:
            return stablehlo.serialize_portable_artifact(module, STABLEHLO_OF_TENSORFLOW)
        except ValueError as error:
            raise UserError(
                f'jax {jax.__version__} writes StableHLO newer than {STABLEHLO_OF_TENSORFLOW}, which TensorFlow cannot '
                f'read ({error}): use --format=stablehlo, or export with jax 0.10'
            ) from error


def _names(path: Path) -> tuple[list[str], list[str]]:
    metadata = json.loads(path.read_text(encoding='utf-8'))
    return [i['name'] for i in metadata['inputs']], metadata['outputs']
