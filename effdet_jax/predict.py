"""Detect: python -m effdet_jax.predict --workdir=runs/d3 IMAGE_OR_FOLDER... --out=DIR

Draws every image into DIR and writes DIR/detections.json, a list of COCO results.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from absl import app, flags

from effdet_jax import cli
from effdet_jax.errors import UserError

WORKDIR = flags.DEFINE_string('workdir', '', 'the training run whose best checkpoint detects')
OUT = flags.DEFINE_string('out', '', 'folder for the drawn images and detections.json; made if need be')
SCORE = flags.DEFINE_float('score', 0.3, 'draw boxes from this score; detections.json holds all', 0.0, 1.0)

IMAGE_SUFFIXES = ('.jpg', '.jpeg', '.png', '.bmp', '.tif', '.tiff', '.webp')


def main(arguments: Sequence[str]) -> None:
    images, out = find_images(arguments), Path(OUT.value)

    from effdet_jax.data import read_image  # only now: neither --help nor a mistyped path waits for jax
    from effdet_jax.inference import Detector
    from effdet_jax.records.files import write_atomically
    from effdet_jax.records.metrics import say, track
    from effdet_jax.records.pictures import draw_boxes, write_image

    detector = Detector.load(WORKDIR.value)
    results, unreadable = [], []
    for path, name in track(images.items(), len(images), 'detecting'):
        try:
            image = read_image(path)
        except UserError as error:
            unreadable.append(str(error))
            continue
        found = detector(image)
        results += found.to_coco(image_id(name), detector.category_ids)
        drawn = found.above(SCORE.value)
        picture = draw_boxes(image, drawn.boxes_xyxy, drawn.labels, detector.class_names, drawn.scores)
        write_image(out / f'{name}.png', picture)
    if len(unreadable) == len(images):
        raise UserError(f'no image could be read; the first: {unreadable[0]}')
    write_atomically(out / 'detections.json', json.dumps(results).encode())
    say(f'{len(images) - len(unreadable)} images, {len(results)} detections: {out}/detections.json')
    if unreadable:
        raise UserError(f'{len(unreadable)} of {len(images)} images were left out: {"; ".join(unreadable)}')


def find_images(arguments: Sequence[str]) -> dict[Path, str]:
    """{image file: name of its results}. A folder is searched to its depths; a name is the path below that folder.

    Raises:
      UserError: for a path that does not exist, or no image at all.
    """
    if not arguments:
        raise app.UsageError('name at least one image or folder')
    found: dict[str, Path] = {}
    for root in map(Path, arguments):
        if not root.exists():
            raise UserError(f'{root} does not exist')
        for path in _images_below(root) if root.is_dir() else [root]:
            name = str(path.relative_to(root if root.is_dir() else root.parent))
            if found.setdefault(name, path) != path:
                raise UserError(f'{found[name]} and {path} would both be written as {name}: give them one at a time')
    if not found:
        raise UserError(f'no image in {", ".join(arguments)}: known are {" ".join(IMAGE_SUFFIXES)}')
    return {path: name for name, path in found.items()}


def image_id(name: str) -> int | str:
    """COCO names an image after its number ('000000397133.jpg'); any other image is known by its name."""
    stem = Path(name).stem
    return int(stem) if stem.isdecimal() else name


def _images_below(folder: Path) -> Iterator[Path]:
    return (path for path in sorted(folder.rglob('*')) if path.suffix.lower() in IMAGE_SUFFIXES)


if __name__ == '__main__':
    cli.run(main, required=('workdir', 'out'))
