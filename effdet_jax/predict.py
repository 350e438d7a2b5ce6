"""Detect: python -m effdet_jax.predict --workdir=runs/d3 PATH... --out=DIR

PATH is an image, a video, a folder of them, or a quoted pattern ('photos/**/*.jpg'). Draws into DIR, NAME.png for an
image and NAME.mp4 for a video (without sound), and writes DIR/detections.json, a list of COCO results.
"""

from collections.abc import Iterator, Sequence
from glob import has_magic
from pathlib import Path

from absl import app, flags

from effdet_jax import cli
from effdet_jax.errors import UserError
from effdet_jax.records.files import IMAGE_SUFFIXES, VIDEO_SUFFIXES

WORKDIR = flags.DEFINE_string('workdir', '', 'the training run whose best checkpoint detects')
OUT = flags.DEFINE_string('out', '', 'folder for pictures, videos and detections.json; made if need be')
SCORE = flags.DEFINE_float(
    'score', 0.3, 'draw and cut out boxes from this score; detections.json holds all in images', 0.0, 1.0
)
CLASSES = flags.DEFINE_list('classes', [], 'the only classes to detect, by name: car,bus')
CROP = flags.DEFINE_bool('crop', False, 'also write what is inside the boxes into DIR/crops/CLASS/')
BATCH = flags.DEFINE_integer('batch', 8, 'images or frames at a time', lower_bound=1)
TTA = flags.DEFINE_list(
    'tta', [], 'look several times: flip (mirrored too) and scales of the input, e.g. flip,0.75,1.25'
)
MERGE = flags.DEFINE_enum('merge', 'wbf', ['wbf', 'nms'], 'how --tta unites its boxes: weighted box fusion or NMS')


def main(arguments: Sequence[str]) -> None:
    workdir, out = Path(WORKDIR.value), Path(OUT.value)
    files, views = find_files(arguments, out), read_views(TTA.value)
    if not workdir.exists():
        raise UserError(f'{workdir} does not exist: give the --workdir of a training run')

    from effdet_jax.inference import Augmentation, Detector  # only now: neither --help nor a wrong path waits for jax
    from effdet_jax.predictor import Job, predict

    augmentation = Augmentation(*views, merge=MERGE.value) if TTA.value else None
    detector = Detector.load(workdir, batch_size=BATCH.value, augmentation=augmentation)
    predict(Job(detector, out, SCORE.value, tuple(CLASSES.value), CROP.value), files)


def find_files(arguments: Sequence[str], out: Path) -> dict[Path, str]:
    """{image or video: name of its results}, which is its path below the folder, or below the fixed part of a pattern.

    A folder is searched to its depths, without what an earlier call has written to `out` inside of it.

    Raises:
      UserError: for a path that does not exist, a pattern that matches nothing, or nothing to detect in at all.
    """
    if not arguments:
        raise app.UsageError('name at least one image, video, folder or pattern')
    found: dict[str, Path] = {}
    for path, root in (pair for argument in arguments for pair in _matches(argument, out)):
        name = str(path.relative_to(root))
        if found.setdefault(name, path) != path:
            raise UserError(f'{found[name]} and {path} would both be written as {name}: give them one at a time')
    if not found:
        known = ' '.join(IMAGE_SUFFIXES + VIDEO_SUFFIXES)
        raise UserError(f'no image or video in {", ".join(arguments)}: known are {known}')
    return {path: name for name, path in found.items()}


def read_views(words: Sequence[str]) -> tuple[bool, tuple[float, ...]]:
    """--tta as (flip, scales); the input's own size is always one of the scales."""
    scales = [1.0]
    for word in words:
        try:
            scales += [] if word == 'flip' else [float(word)]
        except ValueError as error:
            raise app.UsageError(f'--tta: {word!r} is neither flip nor a number') from error
    return 'flip' in words, tuple(dict.fromkeys(scales))


def _matches(argument: str, out: Path) -> Iterator[tuple[Path, Path]]:
    """(file, folder that its name leaves away)."""
    root = Path(argument)
    if root.is_dir():
        yield from ((path, root) for path in _files_below(root, out))
    elif root.exists():
        yield root, root.parent
    elif has_magic(argument):
        fixed = next(parent for parent in root.parents if not has_magic(str(parent)))
        if not (matched := sorted(fixed.glob(str(root.relative_to(fixed))))):
            raise UserError(f'{argument} matches nothing')
        for path in matched:
            files = _files_below(path, out) if path.is_dir() else [path] if _is_known(path) else []
            yield from ((file, fixed) for file in files)
    else:
        raise UserError(f'{argument} does not exist')


def _files_below(folder: Path, out: Path) -> Iterator[Path]:
    ours = out.resolve() if folder.resolve() in out.resolve().parents else None
    return (
        path
        for path in sorted(folder.rglob('*'))
        if _is_known(path) and path.is_file() and not (ours and ours in path.resolve().parents)
    )


def _is_known(path: Path) -> bool:
    return path.suffix.lower() in IMAGE_SUFFIXES + VIDEO_SUFFIXES


if __name__ == '__main__':
    cli.run(main, required=('workdir', 'out'))
