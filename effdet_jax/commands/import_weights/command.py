"""Import weights: python -m effdet_jax import-weights --config=configs/d0.py --source=FILE --workdir=runs/d0

FILE is an EfficientDet checkpoint of google/automl (.h5, TF1 or TF2 checkpoint, .tar.gz) or of effdet (.pth,
.safetensors), or an EfficientNet backbone of either, of timm or of a PyTorch port. Use the work directory to evaluate,
predict, or start a training. --certify=OUTPUTS.npz compares the network with outputs of the original, layer by layer.
"""

from collections.abc import Sequence

from absl import flags
from ml_collections import config_flags

from effdet_jax.commands import cli
from effdet_jax.configs.presets import PRESETS

CONFIG = config_flags.DEFINE_config_file('config', None, 'the model in the file, e.g. configs/d0.py', lock_config=True)
SOURCE = flags.DEFINE(cli.PATH, 'source', None, 'the checkpoint: a file, a folder, or the prefix of a TensorFlow one')
WORKDIR = flags.DEFINE(cli.PATH, 'workdir', None, 'a new folder for the imported weights')
PRESET = flags.DEFINE_enum(
    'preset', 'auto', ['auto', *PRESETS], 'input statistics, anchors and NMS; auto: recognised from the file'
)
ALLOW = flags.DEFINE_list(
    'allow', [], 'regexes of tensors that may be missing, unexpected or mismatched in shape, e.g. class_net/predict'
)
CERTIFY = flags.DEFINE(cli.PATH, 'certify', None, '.npz file of reference outputs to compare with, layer by layer')


def main(_: Sequence[str]) -> None:
    from effdet_jax.commands.import_weights import importer  # after the flags: --help must not wait for jax

    assert SOURCE.value and WORKDIR.value  # required
    importer.import_weights(
        CONFIG.value, SOURCE.value, WORKDIR.value, preset=PRESET.value, allow=ALLOW.value, reference=CERTIFY.value
    )


if __name__ == '__main__':
    cli.run(main, required=('config', 'source', 'workdir'))
