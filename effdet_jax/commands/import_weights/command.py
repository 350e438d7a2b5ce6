"""Import: python -m effdet_jax import-weights --config=configs/d0.py --source=FILE --workdir=runs/d0

FILE is an EfficientDet checkpoint of google/automl (.h5, TF1 or TF2 checkpoint, .tar.gz) or of effdet (.pth,
.safetensors), or an EfficientNet backbone of either, of timm or of a PyTorch port. The work directory then evaluates,
predicts and can be started from. --certify=OUTPUTS.npz proves that the network computes what the original computes.
"""

from collections.abc import Sequence

from absl import app, flags
from ml_collections import config_flags

from effdet_jax.commands import cli
from effdet_jax.configs.presets import PRESETS

CONFIG = config_flags.DEFINE_config_file('config', None, 'the model the file is of, configs/d0.py', lock_config=True)
SOURCE = flags.DEFINE(
    cli.PATH, 'source', None, 'the checkpoint: a file, a folder, or the prefix of a TensorFlow checkpoint'
)
WORKDIR = flags.DEFINE(cli.PATH, 'workdir', None, 'a new folder for the imported weights')
PRESET = flags.DEFINE_enum(
    'preset', 'auto', ['auto', *PRESETS], "input statistics, anchors and NMS; auto: those of the file's family"
)
ALLOW = flags.DEFINE_list(
    'allow', [], 'regexes on names of tensors that may be missing, spare or of another shape, e.g. class_net/predict'
)
CERTIFY = flags.DEFINE(cli.PATH, 'certify', None, 'an .npz of reference outputs that must be met, layer by layer')


def main(arguments: Sequence[str]) -> None:
    if arguments:
        raise app.UsageError(f'unexpected {" ".join(arguments)}: everything is a flag, --source=FILE --workdir=DIR')
    from effdet_jax.commands.import_weights.importer import (
        import_weights,  # after the flags: --help must not wait for jax
    )

    assert SOURCE.value and WORKDIR.value  # required
    import_weights(
        CONFIG.value,
        SOURCE.value,
        WORKDIR.value,
        preset=PRESET.value,
        allow=ALLOW.value,
        reference=CERTIFY.value,
    )


if __name__ == '__main__':
    cli.run(main, required=('config', 'source', 'workdir'))
