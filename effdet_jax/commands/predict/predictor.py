"""Detects objects in image and video files: draws the boxes and writes COCO results."""

import dataclasses
import re
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path, PurePath
from time import perf_counter
from typing import Any, TypeVar

import numpy as np

from effdet_jax.data import read_image
from effdet_jax.errors import UserError
from effdet_jax.inference import Detections, Detector
from effdet_jax.inference.video import open_video, video_writer
from effdet_jax.records.console import Progress, info
from effdet_jax.records.files import json_list
from effdet_jax.records.pictures import write_image
from effdet_jax.runtime import paths

THREADS = 4  # for reading and writing pictures while the network runs
LARGEST_ID = 2**53 - 1  # the largest integer that every JSON reader keeps exactly

A = TypeVar('A')
B = TypeVar('B')


@dataclasses.dataclass(frozen=True)
class Job:
    """The options of `predict`."""

    detector: Detector
    out: Path
    score: float  # minimum score of boxes to draw and crop
    classes: tuple[str, ...] = ()  # detect only these; empty: all
    crop: bool = False

    def __post_init__(self) -> None:
        if unknown := [name for name in self.classes if name not in self.detector.class_names]:
            raise UserError(
                f'--classes: unknown {", ".join(unknown)}; this detector has {", ".join(self.detector.class_names)}'
            )

    def select(self, detections: Detections) -> Detections:
        """The detections of the chosen classes."""
        return detections.of(self.classes) if self.classes else detections

    def write_crops(self, detections: Detections, image: np.ndarray, name: str) -> None:
        """Writes the content of each box to OUT/crops/CLASS/NAME.NUMBER.png."""
        for number, (class_name, crop) in enumerate(zip(detections.names, detections.crops(image), strict=True)):
            folder = re.sub(r'[^\w .-]|^\.+', '_', class_name)  # a class may be called a/c, or ..
            write_image(self.out / 'crops' / folder / f'{name}.{number}.png', crop)


def predict(job: Job, files: Mapping[Path, str]) -> None:
    """Writes a picture or a video for each of `files` {path: name of its results}, and detections.json.

    detections.json has all detections in images, for evaluation. For videos it has the drawn detections with the number
    of their frame, from 0. The name in `files` becomes the `file_name`.

    Raises:
      UserError: at the end, if files could not be read, with their names.
    """
    videos = {path: name for path, name in files.items() if paths.is_video(path)}
    images = {path: name for path, name in files.items() if path not in videos}
    errors: list[str] = []
    count = 0
    with json_list(job.out / 'detections.json') as write:

        def record(rows: list[dict[str, Any]]) -> None:
            nonlocal count
            count += len(rows)
            write(rows)

        if images:
            _detect_in_images(job, images, record, errors)
        num_images = len(images) - len(errors)
        for path, name in videos.items():
            try:
                _detect_in_video(job, path, name, record)
            except UserError as error:
                errors.append(str(error))
        num_videos = len(files) - len(errors) - num_images
        if len(errors) == len(files):
            raise UserError(f'none of {len(files)} files could be read; the first: {errors[0]}')
    done = [
        f'{number} {kind}{"s" if number > 1 else ""}'
        for number, kind in ((num_images, 'image'), (num_videos, 'video'))
        if number
    ]
    info(f'{", ".join(done)}, {count} detections: {job.out}/detections.json')
    if errors:
        raise UserError(f'{len(errors)} of {len(files)} files could not be read: {"; ".join(errors)}')


def image_ids(names: Collection[str]) -> dict[str, int | str]:
    """{name: image_id in COCO results}; the ids are unique.

    COCO names files by their image id: 000000397133.jpg has the id 397133. If a file name is not a number, or two files
    have the same number, the name itself is the id.
    """
    stems = {name: PurePath(name).stem for name in names}
    numbers = {name: int(stem) for name, stem in stems.items() if stem.isdecimal() and int(stem) <= LARGEST_ID}
    times = Counter(numbers.values())
    return {name: numbers[name] if name in numbers and times[numbers[name]] == 1 else name for name in names}


Record = Callable[[list[dict[str, Any]]], None]


def _detect_in_images(job: Job, images: Mapping[Path, str], record: Record, errors: list[str]) -> None:
    """Reads and draws in threads, only a few images at a time, so any number of images fits in memory."""
    running: deque[tuple[str, np.ndarray]] = deque()
    ids = image_ids(images.values())

    def readable(pool: ThreadPoolExecutor) -> Iterator[np.ndarray]:
        for name, image in zip(images.values(), _ahead(pool, _read, images), strict=True):
            if isinstance(image, UserError):
                errors.append(str(image))
            else:
                running.append((name, image))
                yield image

    def detected(pool: ThreadPoolExecutor) -> Iterator[tuple[str, np.ndarray, Detections]]:
        for all_classes in job.detector.stream(readable(pool)):
            detections, (name, image) = job.select(all_classes), running.popleft()
            rows = detections.to_coco(ids[name], job.detector.category_ids)
            record([row | {'file_name': name} for row in rows])
            yield name, image, detections.above(job.score)

    def save(item: tuple[str, np.ndarray, Detections]) -> None:
        name, image, detections = item
        write_image(job.out / f'{name}.png', detections.draw(image))
        if job.crop:
            job.write_crops(detections, image, name)

    speed = _Speed(job.detector.batch_size)
    with (
        ThreadPoolExecutor(THREADS) as pool,
        Progress(len(images), unit='image', description='detecting', keep=False) as progress,
    ):
        for done, _ in enumerate(_ahead(pool, save, detected(pool)), start=1):
            progress.update(done + len(errors), speed.values('images/s', done))


def _detect_in_video(job: Job, path: Path, name: str, record: Record) -> None:
    video = open_video(path)
    running: deque[np.ndarray] = deque()

    def frames() -> Iterator[np.ndarray]:
        for frame in video.frames():
            running.append(frame)
            yield frame

    total, speed = max(video.num_frames, 1), _Speed(job.detector.batch_size)
    with (
        video_writer(job.out / f'{name}.mp4', video.frame_rate, video.height, video.width) as write,
        Progress(total, unit='frame', description=name, keep=False) as progress,
    ):
        done = 0
        for done, all_classes in enumerate(job.detector.stream(frames()), start=1):
            detections, frame, number = job.select(all_classes).above(job.score), running.popleft(), done - 1
            rows = detections.to_coco(f'{name}#{number}', job.detector.category_ids)
            record([row | {'file_name': name, 'video': name, 'frame': number} for row in rows])
            write(detections.draw(frame, enlarge=False))
            if job.crop:
                job.write_crops(detections, frame, f'{name}.{number:06d}')
            # The total is an estimate, so 100 % is shown only after the last frame.
            progress.update(min(done, total - 1), speed.values('frames/s', done))
        progress.update(total)
    if done < 0.95 * video.num_frames:
        info(f'note: {path} ends after {done} of {video.num_frames} frames: it may be damaged')
    rate = ''.join(f', detected at {v:.1f} {unit}' for unit, v in speed.values('frames/s', done).items())
    info(f'{job.out / name}.mp4: {done} frames at {video.frame_rate:.4g} frames/s{rate}; without sound')


class _Speed:
    """Images per second, without the first batch, which includes compilation."""

    def __init__(self, first: int) -> None:
        self._first, self._start = first, 0.0

    def values(self, unit: str, done: int) -> dict[str, float]:
        """{unit: speed}, empty during the first batch."""
        if done <= self._first:
            self._start = perf_counter()
            return {}
        return {unit: (done - self._first) / (perf_counter() - self._start)}


def _ahead(pool: ThreadPoolExecutor, function: Callable[[A], B], items: Iterable[A]) -> Iterator[B]:
    """Like `map(function, items)`, but computed in the pool a few items ahead."""
    futures: deque[Future[B]] = deque()
    for item in items:
        futures.append(pool.submit(function, item))
        if len(futures) > THREADS:
            yield futures.popleft().result()
    while futures:
        yield futures.popleft().result()


def _read(path: Path) -> np.ndarray | UserError:
    try:
        return read_image(path)
    except UserError as error:
        return error
