"""Export a run: python -m effdet_jax export --workdir=runs/d3 --format=stablehlo --out=d3.zip

Writes the best checkpoint as one program that runs without this package, with weights, preprocessing and metadata:
from images of any sizes to boxes, or from resized images to raw outputs. The export is compared with the original on
images of the evaluation split. If they differ, nothing is written, and the difference is printed.
"""

from collections.abc import Sequence

from absl import flags

from effdet_jax.commands import cli

WORKDIR = flags.DEFINE(cli.PATH, 'workdir', None, 'the training run whose best checkpoint is exported')
OUT = flags.DEFINE(cli.PATH, 'out', None, 'the file to write, or the folder for savedmodel')
FORMAT = flags.DEFINE_enum(
    'format', 'stablehlo', ['stablehlo', 'savedmodel', 'onnx'],
    'stablehlo: runs with jax and flatbuffers on CPU, NVIDIA GPU and TPU; savedmodel: with TensorFlow; onnx: with '
    'onnxruntime',
)  # fmt: skip
OUTPUTS = flags.DEFINE_enum(
    'outputs', None, ['boxes', 'raw'],
    'boxes: (pixels, sizes, score, iou, sigma) -> boxes, scores, labels; raw: (images, valid_size) -> class_logits, '
    'box_regressions, anchors; by default boxes, but raw for onnx',
)  # fmt: skip
BATCH = flags.DEFINE_integer(
    'batch', None, 'fixes the number of images; by default any number, but 1 for savedmodel with boxes', lower_bound=1
)


def main(_: Sequence[str]) -> None:
    from effdet_jax.commands.export.exporter import export  # after the flags: --help must not wait for jax

    assert WORKDIR.value and OUT.value  # required
    outputs = OUTPUTS.value or ('raw' if FORMAT.value == 'onnx' else 'boxes')
    export(WORKDIR.value, OUT.value, FORMAT.value, outputs, BATCH.value)


if __name__ == '__main__':
    cli.run(main, required=('workdir', 'out'))
