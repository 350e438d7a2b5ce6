"""Annotated image files: COCO JSON, PASCAL VOC folders, CSV tables. All become one kind of source, `AnnotatedFiles`.

Everything that can be checked without decoding an image is checked when the source is opened.
"""

import collections
import csv
import dataclasses
import json
import math
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from effdet_jax.data import checks, transforms
from effdet_jax.data.example import Annotations, Example
from effdet_jax.errors import UserError


class AnnotatedFiles:
    """Images in files and their annotations in memory. Thread safe."""

    def __init__(self, class_names: Sequence[str], category_ids: Sequence[int], records: Sequence['_Record']):
        missing = _missing([record.path for record in records])
        if missing:
            raise UserError(
                f'{len(missing)} of {len(records)} image files are missing: {checks.first_few(missing)}: add them, '
                'or remove them from the annotations'
            )
        self.class_names = tuple(class_names)
        self.category_ids = tuple(category_ids)
        cleaned = [checks.clean(record.annotations, record.size) for record in records]
        self._records = [
            dataclasses.replace(record, annotations=annotations)
            for record, (annotations, _) in zip(records, cleaned, strict=True)
        ]
        self.notes = checks.describe(
            (str(record.annotations.image_id), faults) for record, (_, faults) in zip(records, cleaned, strict=True)
        )

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Example:
        record = self._records[index]
        encoded = transforms.read_bytes(record.path)
        size = transforms.image_size(encoded, str(record.path))
        if record.size is None:
            return Example(encoded, checks.clean(record.annotations, size)[0])
        if size != record.size:
            raise UserError(
                f'{record.path}: the image is {size[1]}x{size[0]}, its annotations say '
                f'{record.size[1]}x{record.size[0]} (width x height): correct the annotations, or put the image they '
                'were made on'
            )
        return Example(encoded, record.annotations)

    def annotations(self, index: int) -> Annotations:
        """The annotations of one image; the image is read only where the annotation file does not know its size."""
        if self._records[index].size is None:
            return self[index].annotations
        return self._records[index].annotations


def open_coco(json_file: Path, images: Path, class_names: Sequence[str] = ()) -> AnnotatedFiles:
    """A COCO `instances_*.json` and the folder its `file_name`s are relative to. Classes: its categories, by id."""
    if not json_file.is_file():
        raise UserError(f'{json_file}: no such file: in coco:JSON,IMAGES give the path of an instances_*.json')
    try:
        content = json.loads(json_file.read_bytes())
    except ValueError as error:
        raise UserError(f'{json_file}: not valid JSON ({error}): was it written or copied completely?') from error
    lacking = {'images', 'annotations', 'categories'} - set(content if isinstance(content, dict) else ())
    if lacking:
        raise UserError(f'{json_file}: no {sorted(lacking)}: give a COCO instances file, with images and annotations')

    name_of = {
        _get(c, 'id', f'{json_file}: a category'): str(_get(c, 'name', f'{json_file}: a category'))
        for c in content['categories']
    }
    names = tuple(class_names) or tuple(name_of[identity] for identity in sorted(name_of))
    if len(set(names)) < len(names):
        raise UserError(f'{json_file}: two categories have the same name ({", ".join(names)}): rename one')
    objects_of: dict[Any, list[_Object]] = {_get(i, 'id', f'{json_file}: an image'): [] for i in content['images']}
    label_of = {name: label for label, name in enumerate(names)}
    for annotation in content['annotations']:
        where = f'{json_file}: annotation {annotation.get("id")}'
        image_id, category = _get(annotation, 'image_id', where), _get(annotation, 'category_id', where)
        if image_id not in objects_of or category not in name_of:
            raise UserError(f'{where}: no image {image_id} or no category {category} in this file: add or remove it')
        x, y, width, height = _numbers(_get(annotation, 'bbox', where), where)
        objects_of[image_id].append(
            _Object(
                (y, x, y + height, x + width),
                _label(name_of[category], label_of, where),
                area=_numbers([annotation['area']], where, 1)[0] if 'area' in annotation else math.nan,
                is_crowd=bool(annotation.get('iscrowd', 0)),
            )
        )

    records = []
    for image in content['images']:
        where = f'{json_file}: image {image["id"]}'
        name = _get(image, 'file_name', where)
        size = (int(image.get('height') or 0), int(image.get('width') or 0))
        annotations = _annotations(image['id'], str(images / name), objects_of[image['id']])
        records.append(_Record(images / name, size if min(size) > 0 else None, annotations))
    if not records:
        raise UserError(f'{json_file}: it lists no images: give another file')
    return AnnotatedFiles(names, _category_ids(names, name_of), records)


def open_voc(root: Path, split: str, class_names: Sequence[str] = ()) -> AnnotatedFiles:
    """A folder in the layout of PASCAL VOC; `split` is a file of ImageSets/Main, without .txt.

    Classes: the sorted names of all objects of all files in Annotations, so that every split has the same. Coordinates
    are taken as they stand.
    """
    folders = [root / name for name in ('Annotations', 'ImageSets/Main', 'JPEGImages')]
    if absent := [str(folder) for folder in folders if not folder.is_dir()]:
        raise UserError(f'{absent[0]}: no such folder: voc:ROOT needs Annotations, ImageSets/Main and JPEGImages')
    annotation_folder, split_folder, image_folder = folders
    split_file = split_folder / f'{split}.txt'
    if not split or not split_file.is_file():
        splits = ', '.join(sorted(path.stem for path in split_folder.glob('*.txt')))
        raise UserError(f'{split_folder} has no split {split!r}: choose one of {splits}')
    # some lists carry a second column that marks one class
    stems = [line.split()[0] for line in split_file.read_text().splitlines() if line.strip()]
    if not stems:
        raise UserError(f'{split_file}: the split is empty: list one image a line, without extension')
    if missing := _missing([annotation_folder / f'{stem}.xml' for stem in stems]):
        raise UserError(
            f'{len(missing)} of {len(stems)} annotation files that {split_file} lists are missing: '
            f'{checks.first_few(missing)}: add them or shorten the list'
        )

    wanted = {f'{stem}.xml' for stem in stems}
    files = sorted(path for path in annotation_folder.glob('*.xml') if not class_names or path.name in wanted)
    trees = {path.stem: _parse_xml(path) for path in files}
    found = {_text(node, 'name', path) for path in files for node in trees[path.stem].iter('object')}
    names = tuple(class_names or sorted(found))
    label_of = {name: label for label, name in enumerate(names)}
    image_of = {path.stem: path for path in sorted(image_folder.iterdir())}

    records = []
    for stem in stems:
        path, tree = annotation_folder / f'{stem}.xml', trees[stem]
        image = image_of.get(stem, image_folder / f'{stem}.jpg')
        objects = [_voc_object(node, path, label_of) for node in tree.iter('object')]
        height, width = (int(float(tree.findtext(f'size/{side}') or 0)) for side in ('height', 'width'))
        size = (height, width)
        records.append(_Record(image, size if min(size) > 0 else None, _annotations(stem, str(image), objects)))
    return AnnotatedFiles(names, range(1, len(names) + 1), records)


def open_csv(file: Path, class_names: Sequence[str] = ()) -> AnnotatedFiles:
    """A table with the header image,xmin,ymin,xmax,ymax,label; image paths are relative to the table.

    A row with empty box fields stands for an image without objects. Classes: the sorted labels.
    """
    if not file.is_file():
        raise UserError(f'{file}: no such file: csv:FILE takes a table with the header {",".join(_COLUMNS)}')
    rows_of: dict[str, list[tuple[str, list[str], str]]] = {}
    with file.open(newline='', encoding='utf-8-sig') as lines:
        reader = csv.DictReader(lines)
        if not set(_COLUMNS) <= set(reader.fieldnames or ()):
            raise UserError(f'{file}:1: the header is {reader.fieldnames}: it must be {",".join(_COLUMNS)}')
        try:
            for row in reader:
                where = f'{file}:{reader.line_num}'
                name, *corners, label = (row[column] for column in _COLUMNS)
                if not name or label is None:
                    raise UserError(f'{where}: a row needs the fields {",".join(_COLUMNS)}: complete it')
                rows = rows_of.setdefault(name, [])
                if any(corners) or label:
                    rows.append((where, corners, label))
        except (csv.Error, UnicodeDecodeError) as error:
            raise UserError(f'{file}:{reader.line_num}: not a CSV table in UTF-8 ({error}): correct it') from error
    if not rows_of:
        raise UserError(f'{file}: the table has no rows: add one for every object')

    names = tuple(class_names or sorted({label for rows in rows_of.values() for _, _, label in rows if label}))
    label_of = {name: label for label, name in enumerate(names)}
    stems = [Path(name).stem for name in rows_of]
    unique = len(set(stems)) == len(stems)
    records = []
    for index, (name, rows) in enumerate(rows_of.items()):
        objects = []
        for where, corners, label in rows:
            xmin, ymin, xmax, ymax = _numbers(corners, where)
            objects.append(_Object((ymin, xmin, ymax, xmax), _label(label, label_of, where)))
        path = file.parent / name
        annotations = _annotations(stems[index] if unique else index, str(path), objects)
        records.append(_Record(path, None, annotations))
    return AnnotatedFiles(names, range(1, len(names) + 1), records)


_COLUMNS = ('image', 'xmin', 'ymin', 'xmax', 'ymax', 'label')


@dataclasses.dataclass(frozen=True)
class _Record:
    path: Path
    size: tuple[int, int] | None  # height, width; None: nothing is clipped until the image has been seen
    annotations: Annotations


@dataclasses.dataclass(frozen=True)
class _Object:
    box_yxyx: tuple[float, float, float, float]
    label: int
    area: float = math.nan  # the area of the box, once that is clean
    is_crowd: bool = False
    is_difficult: bool = False


def _annotations(image_id: int | str, file_name: str, objects: Sequence[_Object]) -> Annotations:
    return Annotations(
        image_id=image_id,
        file_name=file_name,
        boxes_yxyx=np.array([o.box_yxyx for o in objects], np.float32).reshape(-1, 4),
        labels=np.array([o.label for o in objects], np.int32),
        areas=np.array([o.area for o in objects], np.float32),
        is_crowd=np.array([o.is_crowd for o in objects], bool),
        is_difficult=np.array([o.is_difficult for o in objects], bool),
    )


def _voc_object(node: ElementTree.Element, path: Path, label_of: Mapping[str, int]) -> _Object:
    name = _text(node, 'name', path)
    corners = [_text(node, f'bndbox/{corner}', path) for corner in ('ymin', 'xmin', 'ymax', 'xmax')]
    ymin, xmin, ymax, xmax = _numbers(corners, f'{path}: {name}')
    is_difficult = (node.findtext('difficult') or '0').strip() == '1'
    return _Object((ymin, xmin, ymax, xmax), _label(name, label_of, str(path)), is_difficult=is_difficult)


def _parse_xml(path: Path) -> ElementTree.Element:
    try:
        return ElementTree.parse(path).getroot()
    except ElementTree.ParseError as error:  # names line and column
        raise UserError(f'{path}: not valid XML ({error}): correct the file') from error


def _text(node: ElementTree.Element, tag: str, path: Path) -> str:
    text = (node.findtext(tag) or '').strip()
    if not text:
        raise UserError(f'{path}: an object without <{tag}>: complete or remove it')
    return text


def _get(mapping: Mapping[str, Any], key: str, where: str) -> Any:
    if key not in mapping:
        raise UserError(f'{where} has no {key!r}: complete or remove it')
    return mapping[key]


def _numbers(values: Sequence[Any], where: str, count: int = 4) -> list[float]:
    try:
        numbers = [float(value) for value in values]
    except (TypeError, ValueError):
        numbers = []
    if len(numbers) != count or not all(map(math.isfinite, numbers)):
        raise UserError(f'{where}: expected {count} finite numbers, found {values}: correct or remove the object')
    return numbers


def _label(name: str, label_of: Mapping[str, int], where: str) -> int:
    if name not in label_of:
        raise UserError(
            f'{where}: label {name!r} is not among the class names ({", ".join(label_of)}): add it there or correct it'
        )
    return label_of[name]


def _category_ids(names: Sequence[str], name_of: Mapping[int, str]) -> list[int]:
    """The ids of the file; classes that it does not have get numbers that it does not use."""
    id_of = {name: identity for identity, name in name_of.items()}
    unused = max(id_of.values(), default=0)
    return [id_of.get(name, unused + 1 + label) for label, name in enumerate(names)]


def _missing(paths: Iterable[Path]) -> list[str]:
    """The paths without a file, found by listing each folder once: `exists` for each is slow on a network disk."""
    names_of: dict[Path, list[str]] = collections.defaultdict(list)
    for path in paths:
        names_of[path.parent].append(path.name)
    missing = []
    for folder, names in names_of.items():
        present = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
        missing += [str(folder / name) for name in names if name not in present]
    return missing
