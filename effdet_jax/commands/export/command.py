"""Export: python -m effdet_jax export --workdir=runs/d3 --format=stablehlo --out=d3.zip

Writes the best checkpoint of a run as one program without this package, weights, preprocessing and metadata inside:
images of any sizes to boxes, or resized images to raw outputs. It is run on images of the evaluation and compared with
the original; where it differs nothing is written, and the difference is told.
"""

from collections.abc import Sequence

from absl import app, flags

from effdet_jax.commands import cli

WORKDIR = flags.DEFINE(cli.PATH, 'workdir', None, 'the training run whose best checkpoint is exported')
OUT = flags.DEFINE(cli.PATH, 'out', None, 'what to write: a file, of savedmodel a folder')
FORMAT = flags.DEFINE_enum(
    'format', 'stablehlo', ['stablehlo', 'savedmodel', 'onnx'],
    'stablehlo: runs with jax and flatbuffers alone, on CPU, NVIDIA GPU and TPU; savedmodel: with TensorFlow; onnx: '
    'with onnxruntime',
)  # fmt: skip
OUTPUTS = flags.DEFINE_enum(
    'outputs', None, ['boxes', 'raw'],
    'boxes: (pixels, sizes, score, iou, sigma) -> boxes, scores, labels; raw: (images, valid_size) -> class_logits, '
    'box_regressions, anchors; without it boxes, of onnx raw',
)  # fmt: skip
BATCH = flags.DEFINE_integer(
    'batch', None, 'a fixed number of images; without it any number, of savedmodel with boxes 1', lower_bound=1
)


def main(arguments: Sequence[str]) -> None:
    if arguments:
        raise app.UsageError(f'unexpected {" ".join(arguments)}: everything is a flag, --workdir=DIR --out=FILE')
    from effdet_jax.commands.export.exporter import export  # after the flags: --help must not wait for jax

    assert WORKDIR.value and OUT.value  # required
    outputs = OUTPUTS.value or ('raw' if FORMAT.value == 'onnx' else 'boxes')
    export(WORKDIR.value, OUT.value, FORMAT.value, outputs, BATCH.value)


if __name__ == '__main__':
    cli.run(main, required=('workdir', 'out'))
