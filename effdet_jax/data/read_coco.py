"""COCO's `instances_*.json` -> Listing."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from effdet_jax.data.checks import Finding, first_few
from effdet_jax.data.files import Folder, read_bytes
from effdet_jax.data.listing import (
    ImageRow,
    Listing,
    ObjectRow,
    category_ids,
    finite_numbers,
    image_size_of,
    make_listing,
    shortened,
    truth,
    whole_number,
)
from effdet_jax.errors import UserError


def read_coco(json_file: Path, folder: Path, class_names: Sequence[str] = ()) -> Listing:
    """A COCO file and the folder its `file_name`s are relative to. Classes: its categories, by id.

    Ids may be numbers or texts: 1, 1.0 and '1' are the same. What is wrong with single images and objects is among the
    listing's faults. Raises UserError where the file as a whole cannot be read.
    """
    content = _load(json_file)
    name_of = _categories(content['categories'], json_file)
    names = tuple(class_names) or tuple(name_of[identity] for identity in sorted(name_of))
    if len(set(names)) < len(names):
        twice = dict.fromkeys(name for name in names if names.count(name) > 1)
        raise UserError(f'{json_file}: two categories have the same name ({first_few(twice)}): rename one')

    faults: list[Finding] = []
    images = _images(content['images'], json_file, folder, faults)
    if not images and not faults:
        raise UserError(f'{json_file}: it lists no images: give another file')
    image_of = {image.image_id: place for place, image in enumerate(images)}
    label_of_name = {name: label for label, name in enumerate(names)}
    label_of = {identity: label_of_name.get(name) for identity, name in name_of.items()}
    # whose objects are lost with them, and no fault
    lost_ids = {fault.values.get('image_id') for fault in faults} - {None}
    objects = []
    for place, annotation in enumerate(content['annotations']):
        kind, image = 'malformed_annotation', ''
        try:
            image_id = _image_id(annotation['image_id'])
            category = whole_number(annotation['category_id'], 'category_id')
            if image_id in lost_ids:
                continue
            if image_id not in image_of or category not in name_of:
                raise ValueError(f'no image {shortened(image_id)} or no category {shortened(category)} in this file')
            image = images[image_of[image_id]].file
            if (label := label_of[category]) is None:
                kind = 'unknown_label'
                raise ValueError(f'label {name_of[category]!r} is not among the class names ({", ".join(names)})')
            objects.append(_object(annotation, image_of[image_id], label, place))
        except (KeyError, TypeError, ValueError) as error:
            number = annotation.get('id', place) if isinstance(annotation, dict) else place
            where = f'{json_file}: annotation {shortened(number)}'
            faults.append(Finding(kind, where, _reason(error), image))
    id_of = {name: identity for identity, name in name_of.items()}
    return make_listing(names, category_ids(names, id_of), images, objects, faults)


def _load(json_file: Path) -> dict[str, list]:
    if not json_file.is_file():
        raise UserError(f'{json_file}: no such file: in coco:JSON,IMAGES give the path of an instances_*.json')
    try:
        content = json.loads(read_bytes(json_file))
    except (ValueError, RecursionError) as error:  # ValueError: no JSON, no UTF-8, a number of thousands of digits
        raise UserError(f'{json_file}: not valid JSON ({error}): was it written or copied completely?') from error
    parts = content if isinstance(content, dict) else {}
    if lacking := [name for name in ('annotations', 'categories', 'images') if not isinstance(parts.get(name), list)]:
        raise UserError(
            f'{json_file}: no list of {" and ".join(lacking)}: give a COCO instances file, with images and annotations'
        )
    return parts


def _categories(categories: Sequence[Any], json_file: Path) -> dict[int, str]:
    name_of: dict[int, str] = {}
    for category in categories:
        try:
            identity, name = whole_number(category['id']), category['name']
            if not isinstance(name, str | int) or isinstance(name, bool) or not str(name).strip():
                raise ValueError(f'its name is {shortened(name)}')
            if identity in name_of:
                raise ValueError(f'another one has the id {identity}')
            name_of[identity] = str(name).strip()
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(
                f'{json_file}: the category {shortened(category)} is malformed ({_reason(error)}): '
                'give each a name and an id of its own, a whole number'
            ) from error
    return name_of


def _images(images: Sequence[Any], json_file: Path, folder: Path, faults: list[Finding]) -> list[ImageRow]:
    rows: dict[int | str, ImageRow] = {}
    files = Folder(folder)
    for place, image in enumerate(images):
        image_id, kind = None, 'malformed_annotation'
        try:
            image_id = _image_id(image['id'])
            path, fault, detail = files.find(image['file_name'])
            if fault == 'unsafe_path':
                kind = fault
                raise ValueError(detail)
            if image_id in rows:
                raise ValueError(f'another image has the id {shortened(image_id)}')
            size = image_size_of(image.get('height'), image.get('width'))
            rows[image_id] = ImageRow(image_id, path, f'{json_file}: annotation ', size)
            faults += [Finding(fault, path, detail, path)] if fault else []
        except (KeyError, TypeError, ValueError) as error:
            lost_id = None if image_id in rows else image_id
            where = f'{json_file}: image {place if lost_id is None else shortened(lost_id)}'
            faults.append(Finding(kind, where, _reason(error), values={'image_id': lost_id}))
    return list(rows.values())


def _image_id(value: Any) -> int | str:
    """As a number where it is one; a text such as '007' stays as it is, since '7' may be another image."""
    return value if isinstance(value, str) and not re.fullmatch('0|[1-9][0-9]{0,99}', value) else whole_number(value)


def _object(annotation: Mapping[str, Any], image: int, label: int, place: int) -> ObjectRow:
    x, y, width, height = finite_numbers(annotation['bbox'], 4)
    area = annotation.get('area')
    return ObjectRow(
        image,
        (y, x, y + height, x + width),
        label,
        _number(annotation.get('id'), place),
        float('nan') if area is None else finite_numbers([area], 1)[0],
        truth(annotation.get('iscrowd'), 'iscrowd'),
    )


def _number(identity: Any, place: int) -> int:
    """Of an annotation, for messages."""
    try:
        number = whole_number(identity)
    except ValueError:
        return place
    return number if abs(number) < 2**63 else place


def _reason(error: Exception) -> str:
    if isinstance(error, TypeError):  # Python's words would say nothing about the file
        return 'a value is not of the type it has in COCO files'
    return f'it has no {error}' if isinstance(error, KeyError) else str(error)
