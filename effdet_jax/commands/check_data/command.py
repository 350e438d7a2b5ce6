"""Check the data of a config for faults: python -m effdet_jax check-data --config=configs/d3.py:voc2007 [--images]

Reads all annotations of both splits, and with --images also every image, and prints the faults. Writes files only with
--out=DIR: check.json with all findings, and pictures of the worst images. Exits with 1 if there are errors.
"""

import json
import sys
from collections.abc import Sequence

from absl import flags
from ml_collections import config_flags

from effdet_jax.commands import cli

CONFIG = config_flags.DEFINE_config_file(
    'config', None, 'FILE or FILE:PRESET, e.g. configs/d3.py:voc2007', lock_config=True
)
IMAGES = flags.DEFINE_bool(
    'images', False, 'also read all images: finds damaged ones, wrong sizes, copies in both splits'
)
OUT = flags.DEFINE(cli.PATH, 'out', None, 'folder for check.json and pictures, created if missing')


def main(_: Sequence[str]) -> None:
    from effdet_jax.commands.check_data import inspection_report  # imported late to keep --help fast
    from effdet_jax.inspection import inspect
    from effdet_jax.records.console import info
    from effdet_jax.records.files import write_atomically

    inspection = inspect(CONFIG.value, IMAGES.value)
    inspection_report.show(inspection, IMAGES.value)
    if out := OUT.value:
        content = json.dumps(inspection_report.to_json(inspection), indent=1)
        write_atomically(out / 'check.json', content.encode())
        pictures = inspection_report.write_pictures(inspection, out)
        info(f'wrote check.json and {pictures} pictures to {out}')
    if inspection.count('error'):
        sys.exit(1)


if __name__ == '__main__':
    cli.run(main, required=('config',))
