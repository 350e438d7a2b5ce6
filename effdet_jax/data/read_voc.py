"""Reads a folder in the PASCAL VOC layout."""

import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Sequence
from pathlib import Path, PureWindowsPath
from typing import NamedTuple
from xml.parsers import expat

from effdet_jax.data.checks import Finding
from effdet_jax.data.files import Folder, Lookup, files_below, leaves_folder, name_key, read_bytes, read_text
from effdet_jax.data.listing import (
    ImageRow,
    Listing,
    ObjectRow,
    make_listing,
    parse_flag,
    parse_image_size,
    parse_numbers,
    unknown_label,
)
from effdet_jax.errors import UnreadableError, UserError
from effdet_jax.runtime.paths import IMAGE_SUFFIXES


def read_voc(root: Path, split: str, class_names: Sequence[str] = ()) -> Listing:
    """Reads the images in `ImageSets/Main/SPLIT.txt`. Coordinates are used as annotated.

    An image without an XML file has no objects. Classes are the sorted names of all objects below Annotations, so that
    all splits have the same classes. Malformed images and objects become faults of the listing. Raises UserError if the
    folder or the split cannot be read.
    """
    folders = [root / name for name in ('Annotations', 'ImageSets/Main', 'JPEGImages')]
    if missing := [folder for folder in folders if not folder.is_dir()]:
        raise UserError(f'{missing[0]}: no such folder: voc:ROOT needs Annotations, ImageSets/Main and JPEGImages')
    annotation_folder, split_folder, image_folder = folders
    annotation_files, image_files = Folder(annotation_folder), Folder(image_folder)
    split_file = split_folder / f'{split}.txt'
    faults: list[Finding] = []
    entries: list[tuple[str, str]] = []  # stem, XML file or ''
    for stem in _read_split(split_folder, split, lambda name: _exists(name, annotation_files, image_files)):
        xml_file = annotation_files.find(f'{stem}.xml')
        if leaves_folder(stem) or xml_file.fault == 'unsafe_path':
            detail = f'the name {stem!r} points outside {annotation_folder}'
            faults.append(Finding('unsafe_path', str(split_file), detail))
        else:
            entries.append((stem, '' if xml_file.fault else xml_file.path))

    files = [Path(file) for _, file in entries if file]
    others = () if class_names else files_below(annotation_folder, '.xml')
    parsed = {path: _parse(path) for path in dict.fromkeys((*others, *files))}
    annotated = {o.name for item in parsed.values() if isinstance(item, _Annotated) for o in item.objects if o.name}
    names = tuple(class_names or sorted(annotated))
    label_of = {name: label for label, name in enumerate(names)}

    images: list[ImageRow] = []
    objects: list[ObjectRow] = []
    for stem, file in entries:
        item = parsed[Path(file)] if file else _Annotated('', (0, 0), [])
        if isinstance(item, Finding):
            faults.append(item)
            continue
        image, fault, detail = _find_image(image_files, image_folder, stem, item.file_name)
        if not (file or fault):
            fault, detail = 'image_without_annotations', f'no file {annotation_folder / stem}.xml'
        faults += [Finding(fault, image, detail, image)] if fault else []
        for number, box in enumerate(item.objects, start=1):
            if box.fault:
                faults.append(Finding('malformed_annotation', file, box.fault, image, box.name))
            elif box.name not in label_of:
                faults.append(Finding('unknown_label', file, unknown_label(box.name, names), image, box.name))
            else:
                row = ObjectRow(len(images), box.yxyx, label_of[box.name], number, is_difficult=box.is_difficult)
                objects.append(row)
        images.append(ImageRow(stem, image, f'{file}: object ', item.size))
    if entries and not files:
        detail = f'none of the {len(entries)} images in {split_file} has an XML file here'
        faults.insert(0, Finding('unreadable_annotations', str(annotation_folder), detail, advice='check the folder'))
    return make_listing(names, range(1, len(names) + 1), images, objects, faults)


class _Object(NamedTuple):
    name: str
    yxyx: tuple[float, float, float, float]
    is_difficult: bool
    fault: str  # '' if it is valid


class _Annotated(NamedTuple):
    file_name: str  # of the image, may be ''
    size: tuple[int, int]
    objects: list[_Object]


def _read_split(folder: Path, split: str, exists: Callable[[str], bool]) -> list[str]:
    """The image stems of a split. Lines may have a second column, -1, 0 or 1: whether the image contains a class."""
    file = folder / f'{split}.txt'
    if not split or leaves_folder(split) or not file.is_file():
        splits = ', '.join(sorted(path.stem for path in folder.glob('*.txt')))
        raise UserError(f'{folder} has no split {split!r}: choose one of {splits}')
    stems = []
    for line in map(str.strip, read_text(file).splitlines()):
        *rest, last = line.rsplit(maxsplit=1) or ['']
        # 'IMG 1' may be a name, and 'a.jpg' may stand for 'a'.
        readings = [line, *(rest if last in ('-1', '0', '1') else ())]
        stem = next((name for name in readings if exists(name)), readings[-1])
        suffix = Path(stem).suffix
        if suffix.lower() in IMAGE_SUFFIXES and not exists(stem) and exists(stem.removesuffix(suffix)):
            stem = stem.removesuffix(suffix)
        stems += [stem] if stem else []
    if not stems:
        raise UserError(f'{file}: the split is empty: list one image per line, without extension')
    return stems


def _exists(stem: str, annotation_files: Folder, image_files: Folder) -> bool:
    return bool(stem and (not annotation_files.find(f'{stem}.xml').fault or image_files.images(stem)[0]))


def _find_image(image_files: Folder, folder: Path, stem: str, file_name: str) -> Lookup:
    """The image with this stem. If there are several, `file_name` from the XML file decides."""
    images, others = image_files.images(stem)
    if len(images) == 1:
        return Lookup(images[0])
    if not images:
        more = f', only {" and ".join(others)}' if others else ''
        return Lookup(str(folder / f'{stem}.jpg'), 'missing_image', f'no such file{more}')
    names, file_name = [Path(path).name for path in images], PureWindowsPath(file_name).name  # splits at / and \
    for key in (str, name_key):
        matches = [path for path, name in zip(images, names, strict=True) if key(name) == key(file_name)]
        if len(matches) == 1:
            return Lookup(matches[0])
    detail = f'{" and ".join(names)} share a stem, and <filename> names none of them'
    return Lookup(images[0], 'malformed_annotation', detail)


def _parse(path: Path) -> _Annotated | Finding:
    try:
        content = read_bytes(path)
        _refuse_entities(content)
        tree = ElementTree.fromstring(content)
        size = parse_image_size(*(tree.findtext(f'size/{side}') for side in ('height', 'width')))
    except UnreadableError as error:
        return Finding('unreadable_annotations', str(path), error.reason)
    # LookupError, ValueError: an unknown or unusable encoding
    except (ElementTree.ParseError, expat.ExpatError, LookupError, ValueError) as error:
        return Finding('unreadable_annotations', str(path), f'not valid XML ({error})')
    file_name = (tree.findtext('filename') or '').strip()
    return _Annotated(file_name, size, [_object(node) for node in tree.iter('object')])


def _refuse_entities(content: bytes) -> None:
    """Nested entities can exhaust the memory (billion laughs), which older versions of expat allow."""

    def refuse(*_) -> None:
        raise ValueError('entity declarations are not allowed')

    parser = expat.ParserCreate()
    parser.EntityDeclHandler = refuse
    parser.Parse(content, True)


def _object(node: ElementTree.Element) -> _Object:
    nowhere = (0.0, 0.0, 0.0, 0.0)
    name = (node.findtext('name') or '').strip()
    if not name:
        return _Object('', nowhere, False, 'object without <name>')
    corners = []
    for corner in ('ymin', 'xmin', 'ymax', 'xmax'):
        corners.append((node.findtext(f'bndbox/{corner}') or '').strip())
        if not corners[-1]:
            return _Object(name, nowhere, False, f'object without <bndbox/{corner}>')
    try:
        ymin, xmin, ymax, xmax = parse_numbers(corners, 4)
        is_difficult = parse_flag(node.findtext('difficult'), 'difficult')
    except ValueError as error:
        return _Object(name, nowhere, False, f'{name}: {error}')
    return _Object(name, (ymin, xmin, ymax, xmax), is_difficult, '')
