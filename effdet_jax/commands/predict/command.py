"""Detect objects: python -m effdet_jax predict --workdir=runs/d3 PATH... --out=DIR

PATH is an image, a video, a folder of them, or a quoted pattern ('photos/**/*.jpg'). Writes DIR/NAME.png with the boxes
of an image, DIR/NAME.mp4 for a video (without sound), and DIR/detections.json, a list of COCO results with file names.
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

WORKDIR = flags.DEFINE(cli.PATH, 'workdir', None, 'the training run, whose best checkpoint is used, or an export')
OUT = flags.DEFINE(cli.PATH, 'out', None, 'folder for pictures, videos and detections.json; created if needed')
SCORE = flags.DEFINE_float(
    'score', 0.3, 'minimum score of boxes to draw and crop; detections.json has all boxes of images', 0.0, 1.0
)
CLASSES = flags.DEFINE_list('classes', [], 'detect only these classes, by name: car,bus')
CROP = flags.DEFINE_bool('crop', False, 'also write the content of each box to DIR/crops/CLASS/')
BATCH = flags.DEFINE_integer('batch', 8, 'images or frames at a time', lower_bound=1)
TTA = flags.DEFINE_list(
    'tta', [], 'test-time augmentation: flip (mirror image) and scales of the input, e.g. flip,0.75,1.25'
)
MERGE = flags.DEFINE_enum('merge', 'wbf', ['wbf', 'nms'], 'how --tta merges boxes: weighted box fusion or NMS')


SHOWN = 3  # names of files in a message


def main(arguments: Sequence[str]) -> None:
    workdir, out = WORKDIR.value, OUT.value
    assert workdir and out  # required
    files, views = find_files(arguments, out), read_views(TTA.value)
    if not workdir.exists():
        raise UserError(f'{workdir} does not exist: give the --workdir of a training run')

    from effdet_jax.commands.predict.predictor import Job, predict
    from effdet_jax.inference import Augmentation, Detector  # late: --help and wrong paths must not wait for jax

    augmentation = Augmentation(*views, merge=MERGE.value) if TTA.value else None
    detector = Detector.load(workdir, batch_size=BATCH.value, augmentation=augmentation)
    predict(Job(detector, out, SCORE.value, tuple(CLASSES.value), CROP.value), files)


def find_files(arguments: Sequence[str], out: Path) -> dict[Path, str]:
    """{image or video: name of its results}, the path relative to its folder, or to the fixed part of a pattern.

    Folders are searched recursively, and links are followed. Skips earlier results in `out`, and files whose suffix is
    neither of an image nor of a video, unless they are given by name. Prints what it skips.

    Raises:
      UserError: if a path does not exist, a pattern matches nothing, or no image or video is found.
    """
    if not arguments:
        raise app.UsageError('name at least one image, video, folder or pattern')
    files: dict[str, Path] = {}
    skipped: dict[str, list[str]] = {}
    for candidate in itertools.chain.from_iterable(map(_candidates, arguments)):
        if reason := _reason_to_skip(candidate, out):
            skipped.setdefault(reason, []).append(str(candidate.path))
            continue
        name = candidate.path.relative_to(candidate.root).as_posix()
        if _real(files.setdefault(name, candidate.path)) != _real(candidate.path):
            raise UserError(
                f'{files[name]} and {candidate.path} would both be written as {name}: run the command for each of them'
            )
    notes = [f'{len(names)} skipped, {reason}: {_first(names)}' for reason, names in skipped.items()]
    if not files:
        known = ' '.join(paths.IMAGE_SUFFIXES + paths.VIDEO_SUFFIXES)
        message = '; '.join([f'no image or video in {", ".join(arguments)}', *notes])
        raise UserError(f'{message}: give files with one of the suffixes {known}')
    if notes:
        from effdet_jax.records.console import info  # imported late: it takes half a second

        for note in notes:
            info(printable(f'note: {note}'))
    return {path: name for name, path in files.items()}


def read_views(words: Sequence[str]) -> tuple[bool, tuple[float, ...]]:
    """--tta as (flip, scales). The scales always include 1."""
    scales = [1.0]
    for word in words:
        try:
            scales += [] if word == 'flip' else [float(word)]
        except ValueError as error:
            raise app.UsageError(f'--tta: {word!r} is neither flip nor a number') from error
    return 'flip' in words, tuple(dict.fromkeys(scales))


class _Candidate(NamedTuple):
    """A file that an argument may mean."""

    path: Path
    root: Path  # its results are named relative to this folder
    problem: str = ''  # why it cannot be used
    explicit: bool = False  # given by name, not found in a folder or by a pattern


def _candidates(argument: str) -> Iterator[_Candidate]:
    path = paths.local(argument)
    if path.is_dir():
        yield from _search(path, path)
    elif path.exists():
        yield _Candidate(path, path.parent, explicit=True)
    elif has_magic(argument):
        fixed = next(parent for parent in path.parents if not has_magic(str(parent)))
        matches = _match_pattern(fixed, path.relative_to(fixed).parts)
        if (first := next(matches, None)) is None:
            raise UserError(f'{argument} matches no file: check the pattern')
        yield from itertools.chain([first], matches)
    else:
        raise UserError(f'{argument} does not exist: check the path')


def _match_pattern(fixed: Path, parts: tuple[str, ...]) -> Iterator[_Candidate]:
    """Matches like pathlib, but `**` also follows links to folders, and a matching folder stands for its files."""
    place = parts.index('**') if '**' in parts else len(parts)
    before, after = str(Path(*parts[:place])), str(Path(*parts[place + 1 :]))
    for path in sorted(fixed.glob(before)) if place else [fixed]:
        for candidate in _search(path, fixed) if path.is_dir() else [_Candidate(path, fixed)]:
            below = candidate.path.relative_to(path)
            if place == len(parts) or after == '.' or any(each.match(after) for each in (below, *below.parents)):
                yield candidate


def _search(folder: Path, root: Path) -> Iterator[_Candidate]:
    """All files in `folder` and below; those behind links come last.

    Each folder is searched once, so cyclic links do no harm. Links to parents of `folder` are not followed.
    """
    seen, queue = {*folder.resolve().parents}, deque([folder])
    errors: list[OSError] = []
    while queue:
        for here, folders, files in os.walk(queue.popleft(), onerror=errors.append):
            place = Path(here)
            if (real := place.resolve()) in seen:
                folders.clear()
                continue
            seen.add(real)
            folders.sort()
            queue.extend(place / name for name in folders if (place / name).is_symlink())
            yield from (_Candidate(place / name, root) for name in sorted(files))
    yield from (_Candidate(Path(error.filename), root, f'cannot be opened ({error.strerror})') for error in errors)


def _reason_to_skip(candidate: _Candidate, out: Path) -> str:
    if candidate.problem:
        return candidate.problem
    if _is_result(candidate.path, out):
        return 'results of an earlier run'
    if candidate.explicit or paths.is_image(candidate.path) or paths.is_video(candidate.path):
        return ''
    return 'no images or videos by their suffix'


def _is_result(path: Path, out: Path) -> bool:
    """Whether a file lies in `out`, by any spelling or link, and is named like an output of this command."""
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
    except OSError:  # a broken link, or no permission
        return False


def _real(path: Path) -> Path:
    try:
        return path.resolve()
    except (OSError, RuntimeError):  # a link to itself
        return path.absolute()


def _first(files: Sequence[str]) -> str:
    return ', '.join([*files[:SHOWN], *(['...'] if len(files) > SHOWN else [])])


if __name__ == '__main__':
    cli.run(main, required=('workdir', 'out'), positional=True)
