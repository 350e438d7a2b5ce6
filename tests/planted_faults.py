"""A copy of BCCD with one fault of every kind, each in an image of its own.

    python tests/planted_faults.py ../shared/data/bccd /tmp/planted

makes such a copy and prints what `check_data` must find in it.
"""

import io
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

CLASS_NAMES = ('Parasite', 'Platelets', 'RBC', 'WBC', 'wbc')  # of which BCCD has no parasite and no wbc
OBJECT = '<object><name>{}</name><bndbox><xmin>{}</xmin><ymin>{}</ymin><xmax>{}</xmax><ymax>{}</ymax></bndbox></object>'
MAX_BOXES = 30  # BCCD's most in an image that is trained on

Finding = tuple[str, str, str]  # kind, split, image (or class)


def copy(bccd: Path, root: Path) -> None:
    """A copy of the set whose images are links: faults are planted in files that replace them."""
    shutil.copytree(bccd / 'ImageSets', root / 'ImageSets', copy_function=shutil.copyfile)
    for folder in ('Annotations', 'JPEGImages'):
        (root / folder).mkdir()
    for path in (bccd / 'Annotations').iterdir():
        shutil.copyfile(path, root / 'Annotations' / path.name)
    for path in (bccd / 'JPEGImages').iterdir():
        (root / 'JPEGImages' / path.name).symlink_to(path.resolve())
    for path in (root, *root.rglob('*')):
        if path.is_dir():
            path.chmod(0o755)


def plant(root: Path, sound: list[str], full: str) -> set[Finding]:
    """Plants one fault of each kind into the training split and returns what is then to be found.

    `sound` are training images without any fault; `full` is another with MAX_BOXES objects.
    """
    images = iter(sound)
    expected = {('class_without_examples', split, 'Parasite') for split in ('train', 'eval')}
    expected |= {('class_without_examples', 'eval', 'wbc'), ('similar_classes', 'eval', 'wbc')}
    for kind, change in PLANTS.items():
        stem = full if kind == 'too_many_objects' else next(images)
        expected.add(change(root, stem) or (kind, 'train', stem))
    return expected


def add_object(label: str, *corners: float) -> Callable[[Path, str], None]:
    return edit(lambda text: text.replace('</annotation>', OBJECT.format(label, *corners) + '</annotation>'))


def edit(change: Callable[[str], str]) -> Callable[[Path, str], None]:
    def edit_xml(root: Path, stem: str) -> None:
        path = root / 'Annotations' / f'{stem}.xml'
        path.write_text(change(path.read_text()))

    return edit_xml


def first_object(text: str) -> str:
    return text[text.index('<object>') : text.index('</object>') + len('</object>')]


def listed(line: str) -> Callable[[Path, str], Finding | None]:
    def append(root: Path, stem: str) -> Finding | None:
        with (root / 'ImageSets' / 'Main' / 'trainval.txt').open('a') as lines:
            lines.write(line.format(stem) + '\n')
        return None if '{}' in line else ('unsafe_path', 'train', 'trainval')

    return append


def replace_image(content: Callable[[bytes], bytes | None]) -> Callable[[Path, str], None]:
    """None: without a file in its place."""

    def replace(root: Path, stem: str) -> None:
        path = root / 'JPEGImages' / f'{stem}.jpg'
        new = content(path.read_bytes())
        path.unlink()
        if new is not None:
            path.write_bytes(new)

    return replace


def halved(encoded: bytes) -> bytes:
    image = cv2.imdecode(np.frombuffer(encoded, np.uint8), cv2.IMREAD_COLOR)
    return cv2.imencode('.jpg', cv2.resize(image, None, fx=0.5, fy=0.5))[1].tobytes()


def deep(encoded: bytes) -> bytes:
    """12 bits in 16."""
    grey = cv2.imdecode(np.frombuffer(encoded, np.uint8), cv2.IMREAD_GRAYSCALE)
    return cv2.imencode('.png', grey.astype(np.uint16) * 16)[1].tobytes()


def turned(encoded: bytes) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 3
    buffer = io.BytesIO()
    Image.open(io.BytesIO(encoded)).save(buffer, 'JPEG', exif=exif)
    return buffer.getvalue()


def add_similar_class(root: Path, stem: str) -> Finding:
    add_object('wbc', 100, 100, 180, 180)(root, stem)
    return 'similar_classes', 'train', 'wbc'


def leak(root: Path, stem: str) -> Finding:
    """The picture of the training image takes the place of one of the evaluation's."""
    target = (root / 'ImageSets' / 'Main' / 'test.txt').read_text().split()[3]
    path = root / 'JPEGImages' / f'{target}.jpg'
    path.unlink()
    shutil.copyfile(root / 'JPEGImages' / f'{stem}.jpg', path)
    return 'image_in_both_splits', 'eval', target


PLANTS: dict[str, Callable[[Path, str], Finding | None]] = {
    'unreadable_annotations': edit(lambda text: text[: len(text) // 2]),
    'malformed_annotation': add_object('RBC', 100, 100, 'wide', 200),
    'unsafe_path': listed('../../secret'),
    'missing_image': replace_image(lambda encoded: None),
    'unreadable_image': replace_image(lambda encoded: encoded[: len(encoded) // 2]),
    'another_size': replace_image(halved),
    'image_in_both_splits': leak,
    'unknown_label': add_object('RCB', 100, 100, 180, 180),
    'inverted_box': add_object('RBC', 200, 200, 100, 100),
    'box_outside': add_object('RBC', 700, 100, 800, 200),
    'box_without_area': add_object('RBC', 50, 50, 50, 90),
    'absurd_box': add_object('RBC', 100, 100, 100.5, 160),
    'box_reaching_outside': add_object('RBC', 560, 400, 700, 560),
    'duplicate_box': edit(lambda text: text.replace('</annotation>', first_object(text) + '</annotation>')),
    'image_listed_twice': listed('{}'),
    'similar_classes': add_similar_class,
    'unmatched_object': add_object('RBC', 100, 100, 500, 110),
    'too_many_objects': add_object('RBC', 100, 100, 181, 183),
    'dark_image': replace_image(deep),
    'turned_image': replace_image(turned),
    'image_without_annotations': lambda root, stem: (root / 'Annotations' / f'{stem}.xml').unlink(),
    'image_without_objects': edit(lambda text: text[: text.index('<object>')] + '</annotation>'),
}


if __name__ == '__main__':
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from test_check_data import found_in, sound_images

    bccd, copied = map(Path, sys.argv[1:])
    copy(bccd, copied)
    for finding in sorted(plant(copied, *sound_images(found_in(bccd)))):
        print(*finding)
    flags = f'--images --config=configs/bccd.py --config.dataset.max_boxes={MAX_BOXES}'
    flags += f' --config.dataset.source=voc:{copied} --config.dataset.class_names="{CLASS_NAMES}"'
    print(f'python -m effdet_jax check-data {flags}')
