"""A folder in the layout of PASCAL VOC -> Listing."""

import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple
from xml.parsers import expat

from effdet_jax.data import transforms
from effdet_jax.data.checks import Finding
from effdet_jax.data.listing import (
    ImageRow,
    Listing,
    ObjectRow,
    finite_numbers,
    image_size_of,
    leaves_folder,
    make_listing,
)
from effdet_jax.errors import UnreadableError, UserError


def read_voc(root: Path, split: str, class_names: Sequence[str] = ()) -> Listing:
    """`split` is a file of ImageSets/Main, without .txt. Coordinates are taken as they stand.

    Classes: the sorted names of all objects of all files in Annotations, so that every split has the same. What is
    wrong with single images and objects is among the listing's faults. Raises UserError where the folder or the list
    cannot be read.
    """
    folders = [root / name for name in ('Annotations', 'ImageSets/Main', 'JPEGImages')]
    if absent := [str(folder) for folder in folders if not folder.is_dir()]:
        raise UserError(f'{absent[0]}: no such folder: voc:ROOT needs Annotations, ImageSets/Main and JPEGImages')
    annotation_folder, split_folder, image_folder = folders
    stems = _listed(split_folder, split)
    files = {stem: annotation_folder / f'{stem}.xml' for stem in stems}
    unsafe = {stem for stem in files if leaves_folder(stem)}
    others = {} if class_names else {path.stem: path for path in sorted(annotation_folder.glob('*.xml'))}
    parsed = {stem: _parse(path) for stem, path in (others | files).items() if stem not in unsafe}
    found = {o.name for one in parsed.values() if isinstance(one, _Annotated) for o in one.objects if o.name}
    names = tuple(class_names or sorted(found))
    label_of = {name: label for label, name in enumerate(names)}
    image_of = {path.stem: path for path in sorted(image_folder.iterdir())}

    images: list[ImageRow] = []
    objects: list[ObjectRow] = []
    faults: list[Finding] = []
    for stem in stems:
        if stem in unsafe:
            where = f'{split_folder / split}.txt'
            faults.append(Finding('unsafe_path', where, f'the name {stem!r} leaves {annotation_folder}'))
            continue
        one = parsed[stem]
        if isinstance(one, Finding):
            faults.append(one)
            continue
        image = str(image_of.get(stem, image_folder / f'{stem}.jpg'))
        for number, box in enumerate(one.objects, start=1):
            if box.fault:
                faults.append(Finding('malformed_annotation', str(files[stem]), box.fault, image, box.name))
            elif box.name not in label_of:
                detail = f'label {box.name!r} is not among the class names ({", ".join(names)})'
                faults.append(Finding('unknown_label', str(files[stem]), detail, image, box.name))
            else:
                row = ObjectRow(len(images), box.yxyx, label_of[box.name], number, is_difficult=box.is_difficult)
                objects.append(row)
        images.append(ImageRow(stem, image, f'{files[stem]}: object ', one.size))
    return make_listing(names, range(1, len(names) + 1), images, objects, faults)


class _Object(NamedTuple):
    name: str
    yxyx: tuple[float, float, float, float]
    is_difficult: bool
    fault: str  # '' where there is none


class _Annotated(NamedTuple):
    size: tuple[int, int]
    objects: list[_Object]


def _listed(folder: Path, split: str) -> list[str]:
    file = folder / f'{split}.txt'
    if not split or leaves_folder(split) or not file.is_file():
        splits = ', '.join(sorted(path.stem for path in folder.glob('*.txt')))
        raise UserError(f'{folder} has no split {split!r}: choose one of {splits}')
    try:
        lines = transforms.read_bytes(file).decode().splitlines()
    except UnicodeDecodeError as error:
        raise UserError(f'{file}: not text in UTF-8 ({error}): list one image a line') from error
    # some lists carry a second column that marks one class
    stems = [line.split()[0] for line in lines if line.strip()]
    if not stems:
        raise UserError(f'{file}: the split is empty: list one image a line, without extension')
    return stems


def _parse(path: Path) -> _Annotated | Finding:
    try:
        content = transforms.read_bytes(path)
        _refuse_entities(content)
        tree = ElementTree.fromstring(content)
        size = image_size_of(*(tree.findtext(f'size/{side}') for side in ('height', 'width')))
    except UnreadableError as error:
        return Finding('unreadable_annotations', str(path), error.reason)
    # LookupError, ValueError: an encoding that Python does not know, or cannot use here
    except (ElementTree.ParseError, expat.ExpatError, LookupError, ValueError) as error:
        return Finding('unreadable_annotations', str(path), f'not valid XML ({error})')
    return _Annotated(size, [_object(node) for node in tree.iter('object')])


def _refuse_entities(content: bytes) -> None:
    """A few entities that stand for each other fill the memory; older versions of expat do not notice."""

    def refuse(*_) -> None:
        raise ValueError('it declares entities')

    parser = expat.ParserCreate()
    parser.EntityDeclHandler = refuse
    parser.Parse(content, True)


def _object(node: ElementTree.Element) -> _Object:
    nowhere = (0.0, 0.0, 0.0, 0.0)
    name = (node.findtext('name') or '').strip()
    if not name:
        return _Object('', nowhere, False, 'an object without <name>')
    corners = []
    for corner in ('ymin', 'xmin', 'ymax', 'xmax'):
        corners.append((node.findtext(f'bndbox/{corner}') or '').strip())
        if not corners[-1]:
            return _Object(name, nowhere, False, f'an object without <bndbox/{corner}>')
    try:
        ymin, xmin, ymax, xmax = finite_numbers(corners, 4)
    except ValueError as error:
        return _Object(name, nowhere, False, f'{name}: {error}')
    return _Object(name, (ymin, xmin, ymax, xmax), (node.findtext('difficult') or '0').strip() == '1', '')
