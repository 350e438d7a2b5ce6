"""Detect: python -m effdet_jax predict --workdir=runs/d3 PATH... --out=DIR

PATH is an image, a video, a folder of them, or a quoted pattern ('photos/**/*.jpg'). Draws into DIR, NAME.png for an
image and NAME.mp4 for a video (without sound), and writes DIR/detections.json, a list of COCO results with file names.
"""

import itertools
import os
from collections import deque
from collections.abc import Iterator, Sequence
from glob import has_magic
from pathlib import Path
from typing import NamedTuple

from absl import app, flags

from effdet_jax.commands import cli
from effdet_jax.errors import UserError, printable
from effdet_jax.runtime import paths

WORKDIR = flags.DEFINE(cli.PATH, 'workdir', None, 'the training run whose best checkpoint detects')
OUT = flags.DEFINE(cli.PATH, 'out', None, 'folder for pictures, videos and detections.json; made if need be')
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


SHOWN = 3  # files of many that are named


def main(arguments: Sequence[str]) -> None:
    workdir, out = WORKDIR.value, OUT.value
    assert workdir and out  # required
    files, views = find_files(arguments, out), read_views(TTA.value)
    if not workdir.exists():
        raise UserError(f'{workdir} does not exist: give the --workdir of a training run')

    from effdet_jax.commands.predict.predictor import Job, predict
    from effdet_jax.inference import Augmentation, Detector  # only now: neither --help nor a wrong path waits for jax

    augmentation = Augmentation(*views, merge=MERGE.value) if TTA.value else None
    detector = Detector.load(workdir, batch_size=BATCH.value, augmentation=augmentation)
    predict(Job(detector, out, SCORE.value, tuple(CLASSES.value), CROP.value), files)


def find_files(arguments: Sequence[str], out: Path) -> dict[Path, str]:
    """{image or video: name of its results}, which is its path below the folder, or below the fixed part of a pattern.

    Folders are searched to their depths, linked ones too. Prints what is left out: what an earlier call wrote to
    `out`, and what is no image or video by its name, unless it is given by itself.

    Raises:
      UserError: for a path that does not exist, a pattern that matches nothing, or nothing to detect in at all.
    """
    if not arguments:
        raise app.UsageError('name at least one image, video, folder or pattern')
    found: dict[str, Path] = {}
    left_out: dict[str, list[str]] = {}
    for match in itertools.chain.from_iterable(map(_matches, arguments)):
        if reason := _reason_to_leave_out(match, out):
            left_out.setdefault(reason, []).append(str(match.path))
            continue
        name = match.path.relative_to(match.root).as_posix()
        if _real(found.setdefault(name, match.path)) != _real(match.path):
            raise UserError(f'{found[name]} and {match.path} would both be written as {name}: give them one at a time')
    notes = [f'{len(files)} left out, {reason}: {_first(files)}' for reason, files in left_out.items()]
    if not found:
        known = ' '.join(paths.IMAGE_SUFFIXES + paths.VIDEO_SUFFIXES)
        raise UserError('; '.join([f'no image or video in {", ".join(arguments)}', *notes]) + f': known are {known}')
    if notes:
        from effdet_jax.records.console import info  # only now: it takes half a second to load

        for note in notes:
            info(printable(f'note: {note}'))
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


class _Match(NamedTuple):
    """A file that an argument stands for."""

    path: Path
    root: Path  # the folder that its name leaves away
    problem: str = ''  # why it cannot be used
    by_itself: bool = False  # not in a folder, not by a pattern


def _matches(argument: str) -> Iterator[_Match]:
    path = paths.local(argument)
    if path.is_dir():
        yield from _search(path, path)
    elif path.exists():
        yield _Match(path, path.parent, by_itself=True)
    elif has_magic(argument):
        fixed = next(parent for parent in path.parents if not has_magic(str(parent)))
        matches = _matches_of_pattern(fixed, path.relative_to(fixed).parts)
        if (first := next(matches, None)) is None:
            raise UserError(f'{argument} matches nothing')
        yield from itertools.chain([first], matches)
    else:
        raise UserError(f'{argument} does not exist')


def _matches_of_pattern(fixed: Path, parts: tuple[str, ...]) -> Iterator[_Match]:
    """Pathlib's patterns, except that `**` follows links to folders. A folder that matches stands for what is in it."""
    place = parts.index('**') if '**' in parts else len(parts)
    before, after = str(Path(*parts[:place])), str(Path(*parts[place + 1 :]))
    for path in sorted(fixed.glob(before)) if place else [fixed]:
        for match in _search(path, fixed) if path.is_dir() else [_Match(path, fixed)]:
            below = match.path.relative_to(path)
            if place == len(parts) or after == '.' or any(each.match(after) for each in (below, *below.parents)):
                yield match


def _search(folder: Path, root: Path) -> Iterator[_Match]:
    """All files in `folder` and below, those behind links last.

    Each folder is searched once, so links may lead in circles. One to a folder above `folder` is not followed.
    """
    seen, waiting = {*folder.resolve().parents}, deque([folder])
    closed: list[OSError] = []
    while waiting:
        for here, folders, files in os.walk(waiting.popleft(), onerror=closed.append):
            place = Path(here)
            if (real := place.resolve()) in seen:
                folders.clear()
                continue
            seen.add(real)
            folders.sort()
            waiting.extend(place / name for name in folders if (place / name).is_symlink())
            yield from (_Match(place / name, root) for name in sorted(files))
    yield from (_Match(Path(error.filename), root, f'cannot be opened ({error.strerror})') for error in closed)


def _reason_to_leave_out(match: _Match, out: Path) -> str:
    if match.problem:
        return match.problem
    if _is_result(match.path, out):
        return 'written by an earlier call'
    if match.by_itself or paths.is_image(match.path) or paths.is_video(match.path):
        return ''
    return 'no images or videos by their names'


def _is_result(path: Path, out: Path) -> bool:
    """Whether a file lies in `out`, however that is spelled or linked, and is called as what this command writes."""
    real = _real(path)
    folders = real.parents if out.exists() else ()
    inside = next((real.relative_to(folder) for folder in folders if _is_same(folder, out)), None)
    if inside is None:
        return False
    source = Path(inside.stem)  # NAME of NAME.png
    return (
        inside == Path('detections.json')
        or (inside.suffix == '.png' and paths.is_image(source))
        or (inside.suffix == '.mp4' and paths.is_video(source))
        or (inside.parts[0] == 'crops' and inside.suffix == '.png' and source.suffix[1:].isdecimal())
    )


def _is_same(a: Path, b: Path) -> bool:
    try:
        return a.samefile(b)
    except OSError:  # a link to what is gone, or closed to us
        return False


def _real(path: Path) -> Path:
    try:
        return path.resolve()
    except (OSError, RuntimeError):  # a link to itself
        return path.absolute()


def _first(files: Sequence[str]) -> str:
    return ', '.join([*files[:SHOWN], *(['...'] if len(files) > SHOWN else [])])


if __name__ == '__main__':
    cli.run(main, required=('workdir', 'out'))
