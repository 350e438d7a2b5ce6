"""What is wrong with the data of a config: python -m effdet_jax check-data --config=configs/d3.py:voc2007 [--images]

Reads all annotations of both splits, with --images every image too, and prints what it found. Nothing is written but
by --out=DIR: check.json with every finding, and pictures of the worst. Exits with 1 where there is an error.
"""

import json
import sys
from collections.abc import Sequence

from absl import app, flags
from ml_collections import config_flags

from effdet_jax.commands import cli

CONFIG = config_flags.DEFINE_config_file(
    'config', None, 'FILE or FILE:PRESET, e.g. configs/d3.py:voc2007', lock_config=True
)
IMAGES = flags.DEFINE_bool(
    'images', False, 'read every image: undecodable ones, sizes, copies of an image in both splits'
)
OUT = flags.DEFINE(cli.PATH, 'out', None, 'folder for check.json and pictures; made if need be. Without it, no files')


def main(arguments: Sequence[str]) -> None:
    if arguments:
        raise app.UsageError(f'unexpected {" ".join(arguments)}: everything is a flag, --config=FILE --out=DIR')
    from effdet_jax import inspection  # after the flags: --help must not wait for them
    from effdet_jax.commands.check_data import inspection_report  # after the flags: --help must not wait for them
    from effdet_jax.records.console import info
    from effdet_jax.records.files import write_atomically

    found = inspection.inspect(CONFIG.value, IMAGES.value)
    inspection_report.show(found, IMAGES.value)
    if out := OUT.value:
        content = json.dumps(inspection_report.to_json(found), indent=1)
        write_atomically(out / 'check.json', content.encode())
        pictures = inspection_report.write_pictures(found, out)
        info(f'{out}: check.json and {pictures} pictures')
    if found.count('error'):
        sys.exit(1)


if __name__ == '__main__':
    cli.run(main, required=('config',))
