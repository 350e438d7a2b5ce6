"""Detection in files: images are drawn, videos annotated, and everything that is found becomes COCO results."""

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

THREADS = 4  # that read and write pictures while the network works
LARGEST_ID = 2**53 - 1  # the largest integer that every reader of JSON keeps

A = TypeVar('A')
B = TypeVar('B')


@dataclasses.dataclass(frozen=True)
class Job:
    """What to do with what is found."""

    detector: Detector
    out: Path
    score: float  # from which a box is drawn and cut out
    classes: tuple[str, ...] = ()  # the only ones wanted; empty: all
    crop: bool = False

    def __post_init__(self) -> None:
        if unknown := [name for name in self.classes if name not in self.detector.class_names]:
            raise UserError(
                f'--classes: {", ".join(unknown)} unknown; this detector knows {", ".join(self.detector.class_names)}'
            )

    def wanted(self, found: Detections) -> Detections:
        return found.of(self.classes) if self.classes else found

    def cut_out(self, found: Detections, image: np.ndarray, name: str) -> None:
        """Every detection into OUT/crops/CLASS/NAME.NUMBER.png."""
        for number, (class_name, crop) in enumerate(zip(found.names, found.crops(image), strict=True)):
            folder = re.sub(r'[^\w .-]|^\.+', '_', class_name)  # a class may be called a/c, or ..
            write_image(self.out / 'crops' / folder / f'{name}.{number}.png', crop)


def predict(job: Job, files: Mapping[Path, str]) -> None:
    """Writes a picture or a video for each of `files` {path: name of its results}, and detections.json.

    detections.json holds all detections in images, for evaluation; of videos those that are drawn, with the number of
    the frame, from 0. Each has the `file_name` that is in `files`.

    Raises:
      UserError: at the end, where files could not be read, naming them; at once for classes that there are not.
    """
    videos = {path: name for path, name in files.items() if paths.is_video(path)}
    images = {path: name for path, name in files.items() if path not in videos}
    left_out: list[str] = []
    count = 0
    with json_list(job.out / 'detections.json') as write:

        def record(rows: list[dict[str, Any]]) -> None:
            nonlocal count
            count += len(rows)
            write(rows)

        if images:
            _detect_in_images(job, images, record, left_out)
        seen_images = len(images) - len(left_out)
        for path, name in videos.items():
            try:
                _detect_in_video(job, path, name, record)
            except UserError as error:
                left_out.append(str(error))
        seen_videos = len(files) - len(left_out) - seen_images
        if len(left_out) == len(files):
            raise UserError(f'nothing could be read; the first: {left_out[0]}')
    seen = [
        f'{number} {kind}{"s" if number > 1 else ""}'
        for number, kind in ((seen_images, 'image'), (seen_videos, 'video'))
        if number
    ]
    info(f'{", ".join(seen)}, {count} detections: {job.out}/detections.json')
    if left_out:
        raise UserError(f'{len(left_out)} of {len(files)} files were left out: {"; ".join(left_out)}')


def image_ids(names: Collection[str]) -> dict[str, int | str]:
    """{name: image_id in COCO results}, each of which occurs once.

    COCO names an image after its number: 000000397133.jpg is 397133. An image whose name is no number, or the same
    number as that of another, is known by its name.
    """
    stems = {name: PurePath(name).stem for name in names}
    numbers = {name: int(stem) for name, stem in stems.items() if stem.isdecimal() and int(stem) <= LARGEST_ID}
    times = Counter(numbers.values())
    return {name: numbers[name] if name in numbers and times[numbers[name]] == 1 else name for name in names}


Record = Callable[[list[dict[str, Any]]], None]


def _detect_in_images(job: Job, images: Mapping[Path, str], record: Record, left_out: list[str]) -> None:
    """Reading and drawing happen in threads, a few images ahead and behind, so any number of images fits in memory."""
    waiting: deque[tuple[str, np.ndarray]] = deque()
    ids = image_ids(images.values())

    def readable(pool: ThreadPoolExecutor) -> Iterator[np.ndarray]:
        for name, image in zip(images.values(), _ahead(pool, _read, images), strict=True):
            if isinstance(image, UserError):
                left_out.append(str(image))
            else:
                waiting.append((name, image))
                yield image

    def detected(pool: ThreadPoolExecutor) -> Iterator[tuple[str, np.ndarray, Detections]]:
        for everything in job.detector.stream(readable(pool)):
            found, (name, image) = job.wanted(everything), waiting.popleft()
            rows = found.to_coco(ids[name], job.detector.category_ids)
            record([row | {'file_name': name} for row in rows])
            yield name, image, found.above(job.score)

    def save(item: tuple[str, np.ndarray, Detections]) -> None:
        name, image, found = item
        write_image(job.out / f'{name}.png', found.draw(image))
        if job.crop:
            job.cut_out(found, image, name)

    speed = _Speed(job.detector.batch_size)
    with (
        ThreadPoolExecutor(THREADS) as pool,
        Progress(len(images), unit='image', description='detecting', keep=False) as progress,
    ):
        for done, _ in enumerate(_ahead(pool, save, detected(pool)), start=1):
            progress.update(done + len(left_out), speed.values('images/s', done))


def _detect_in_video(job: Job, path: Path, name: str, record: Record) -> None:
    video = open_video(path)
    waiting: deque[np.ndarray] = deque()

    def frames() -> Iterator[np.ndarray]:
        for frame in video.frames():
            waiting.append(frame)
            yield frame

    total, speed = max(video.num_frames, 1), _Speed(job.detector.batch_size)
    with (
        video_writer(job.out / f'{name}.mp4', video.frame_rate, video.height, video.width) as write,
        Progress(total, unit='frame', description=name, keep=False) as progress,
    ):
        done = 0
        for done, everything in enumerate(job.detector.stream(frames()), start=1):
            found, frame, number = job.wanted(everything).above(job.score), waiting.popleft(), done - 1
            rows = found.to_coco(f'{name}#{number}', job.detector.category_ids)
            record([row | {'file_name': name, 'video': name, 'frame': number} for row in rows])
            write(found.draw(frame, enlarge=False))
            if job.crop:
                job.cut_out(found, frame, f'{name}.{number:06d}')
            # The total is a guess: 100 % is said once, after the last frame.
            progress.update(min(done, total - 1), speed.values('frames/s', done))
        progress.update(total)
    if done < 0.95 * video.num_frames:
        info(f'note: {path} ends after {done} of {video.num_frames} frames: is it damaged?')
    rate = ''.join(f', detected at {v:.1f} {unit}' for unit, v in speed.values('frames/s', done).items())
    info(f'{job.out / name}.mp4: {done} frames, {video.frame_rate:.4g} a second{rate}; without sound')


class _Speed:
    """Things per second, without the first batch: that one waits for compilation."""

    def __init__(self, first: int) -> None:
        self._first, self._start = first, 0.0

    def values(self, unit: str, done: int) -> dict[str, float]:
        """{unit: things per second}, empty at first."""
        if done <= self._first:
            self._start = perf_counter()
            return {}
        return {unit: (done - self._first) / (perf_counter() - self._start)}


def _ahead(pool: ThreadPoolExecutor, function: Callable[[A], B], items: Iterable[A]) -> Iterator[B]:
    """`map(function, items)`, computed in the pool a few items ahead."""
    running: deque[Future[B]] = deque()
    for item in items:
        running.append(pool.submit(function, item))
        if len(running) > THREADS:
            yield running.popleft().result()
    while running:
        yield running.popleft().result()


def _read(path: Path) -> np.ndarray | UserError:
    try:
        return read_image(path)
    except UserError as error:
        return error
