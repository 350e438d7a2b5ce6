"""A folder in the layout of PASCAL VOC -> Listing."""

import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Sequence
from pathlib import Path, PureWindowsPath
from typing import NamedTuple
from xml.parsers import expat

from effdet_jax.data.checks import Finding
from effdet_jax.data.files import (
    Folder,
    Found,
    files_below,
    leaves_folder,
    name_key,
    read_bytes,
    read_text,
)
from effdet_jax.data.listing import (
    ImageRow,
    Listing,
    ObjectRow,
    finite_numbers,
    image_size_of,
    make_listing,
    truth,
)
from effdet_jax.errors import UnreadableError, UserError
from effdet_jax.runtime.paths import IMAGE_SUFFIXES


def read_voc(root: Path, split: str, class_names: Sequence[str] = ()) -> Listing:
    """`split` is a file of ImageSets/Main, without .txt. Coordinates are taken as they stand.

    An image without an XML file has no objects. Classes: the sorted names of all objects of all files in Annotations
    and its folders, so that every split has the same. What is wrong with single images and objects is among the
    listing's faults. Raises UserError where the folder or the list cannot be read.
    """
    folders = [root / name for name in ('Annotations', 'ImageSets/Main', 'JPEGImages')]
    if absent := [str(folder) for folder in folders if not folder.is_dir()]:
        raise UserError(f'{absent[0]}: no such folder: voc:ROOT needs Annotations, ImageSets/Main and JPEGImages')
    annotation_folder, split_folder, image_folder = folders
    annotations, pictures = Folder(annotation_folder), Folder(image_folder)
    list_file = split_folder / f'{split}.txt'
    faults: list[Finding] = []
    listed: list[tuple[str, str]] = []  # stem, its XML file or '' where it has none
    for stem in _listed(split_folder, split, lambda name: _is_there(name, annotations, pictures)):
        found = annotations.find(f'{stem}.xml')
        if leaves_folder(stem) or found.fault == 'unsafe_path':
            faults.append(Finding('unsafe_path', str(list_file), f'the name {stem!r} leaves {annotation_folder}'))
        else:
            listed.append((stem, '' if found.fault else found.path))

    files = [Path(file) for _, file in listed if file]
    others = () if class_names else files_below(annotation_folder, '.xml')
    parsed = {path: _parse(path) for path in dict.fromkeys((*others, *files))}
    found_names = {o.name for one in parsed.values() if isinstance(one, _Annotated) for o in one.objects if o.name}
    names = tuple(class_names or sorted(found_names))
    label_of = {name: label for label, name in enumerate(names)}

    images: list[ImageRow] = []
    objects: list[ObjectRow] = []
    for stem, file in listed:
        one = parsed[Path(file)] if file else _Annotated('', (0, 0), [])
        if isinstance(one, Finding):
            faults.append(one)
            continue
        image, fault, detail = _image(pictures, image_folder, stem, one.file_name)
        if not (file or fault):
            fault, detail = 'image_without_annotations', f'there is no {annotation_folder / stem}.xml'
        faults += [Finding(fault, image, detail, image)] if fault else []
        for number, box in enumerate(one.objects, start=1):
            if box.fault:
                faults.append(Finding('malformed_annotation', file, box.fault, image, box.name))
            elif box.name not in label_of:
                detail = f'label {box.name!r} is not among the class names ({", ".join(names)})'
                faults.append(Finding('unknown_label', file, detail, image, box.name))
            else:
                row = ObjectRow(len(images), box.yxyx, label_of[box.name], number, is_difficult=box.is_difficult)
                objects.append(row)
        images.append(ImageRow(stem, image, f'{file}: object ', one.size))
    if listed and not files:
        detail = f'none of the {len(listed)} images of {list_file} has an XML file here'
        faults.insert(0, Finding('unreadable_annotations', str(annotation_folder), detail, advice='check the folder'))
    return make_listing(names, range(1, len(names) + 1), images, objects, faults)


class _Object(NamedTuple):
    name: str
    yxyx: tuple[float, float, float, float]
    is_difficult: bool
    fault: str  # '' where there is none


class _Annotated(NamedTuple):
    file_name: str  # of the image, '' where the file does not say it
    size: tuple[int, int]
    objects: list[_Object]


def _listed(folder: Path, split: str, is_there: Callable[[str], bool]) -> list[str]:
    """The stems in a list. A line may carry a second column, -1, 0 or 1: whether the image has one class."""
    file = folder / f'{split}.txt'
    if not split or leaves_folder(split) or not file.is_file():
        splits = ', '.join(sorted(path.stem for path in folder.glob('*.txt')))
        raise UserError(f'{folder} has no split {split!r}: choose one of {splits}')
    stems = []
    for line in map(str.strip, read_text(file).splitlines()):
        *rest, last = line.rsplit(maxsplit=1) or ['']
        # 'IMG 1' may be a name, and 'a.jpg' the file instead of its stem
        readings = [line, *(rest if last in ('-1', '0', '1') else ())]
        stem = next((name for name in readings if is_there(name)), readings[-1])
        suffix = Path(stem).suffix
        if suffix.lower() in IMAGE_SUFFIXES and not is_there(stem) and is_there(stem.removesuffix(suffix)):
            stem = stem.removesuffix(suffix)
        stems += [stem] if stem else []
    if not stems:
        raise UserError(f'{file}: the split is empty: list one image a line, without extension')
    return stems


def _is_there(stem: str, annotations: Folder, pictures: Folder) -> bool:
    return bool(stem and (not annotations.find(f'{stem}.xml').fault or pictures.images(stem)[0]))


def _image(pictures: Folder, folder: Path, stem: str, stated: str) -> Found:
    """The image of a stem; of several it is the one whose name, `stated`, the XML file gives."""
    images, others = pictures.images(stem)
    if len(images) == 1:
        return Found(images[0])
    if not images:
        more = f', but {" and ".join(others)}' if others else ''
        return Found(str(folder / f'{stem}.jpg'), 'missing_image', f'there is no such file{more}')
    names, stated = [Path(path).name for path in images], PureWindowsPath(stated).name  # which knows both separators
    for same in (lambda name: name, name_key):
        named = [path for path, name in zip(images, names, strict=True) if same(name) == same(stated)]
        if len(named) == 1:
            return Found(named[0])
    detail = f'{" and ".join(names)} have the same name, and no <filename> says which of them is meant'
    return Found(images[0], 'malformed_annotation', detail)


def _parse(path: Path) -> _Annotated | Finding:
    try:
        content = read_bytes(path)
        _refuse_entities(content)
        tree = ElementTree.fromstring(content)
        size = image_size_of(*(tree.findtext(f'size/{side}') for side in ('height', 'width')))
    except UnreadableError as error:
        return Finding('unreadable_annotations', str(path), error.reason)
    # LookupError, ValueError: an encoding that Python does not know, or cannot use here
    except (ElementTree.ParseError, expat.ExpatError, LookupError, ValueError) as error:
        return Finding('unreadable_annotations', str(path), f'not valid XML ({error})')
    file_name = (tree.findtext('filename') or '').strip()
    return _Annotated(file_name, size, [_object(node) for node in tree.iter('object')])


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
        is_difficult = truth(node.findtext('difficult'), 'difficult')
    except ValueError as error:
        return _Object(name, nowhere, False, f'{name}: {error}')
    return _Object(name, (ymin, xmin, ymax, xmax), is_difficult, '')
