"""Reads the `instances_*.json` files of COCO."""

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
    make_listing,
    parse_flag,
    parse_image_size,
    parse_integer,
    parse_numbers,
    shortened,
    unknown_label,
)
from effdet_jax.errors import UserError


def read_coco(json_file: Path, folder: Path, class_names: Sequence[str] = ()) -> Listing:
    """Reads a COCO file; file names are relative to `folder`. Classes are the categories, sorted by id.

    Ids may be numbers or strings: 1, 1.0 and '1' are equal. Malformed images and objects become faults of the listing.
    Raises UserError if the file as a whole cannot be read.
    """
    content = _load(json_file)
    name_of = _categories(content['categories'], json_file)
    names = tuple(class_names) or tuple(name_of[identity] for identity in sorted(name_of))
    if len(set(names)) < len(names):
        duplicates = dict.fromkeys(name for name in names if names.count(name) > 1)
        raise UserError(f'{json_file}: several categories have the same name ({first_few(duplicates)}): rename them')

    faults: list[Finding] = []
    images = _images(content['images'], json_file, folder, faults)
    if not images and not faults:
        raise UserError(f'{json_file}: no images are listed: use another file')
    image_of = {image.image_id: place for place, image in enumerate(images)}
    label_of_name = {name: label for label, name in enumerate(names)}
    label_of = {identity: label_of_name.get(name) for identity, name in name_of.items()}
    # The objects of an image that is lost are not faults of their own.
    lost_ids = {fault.values.get('image_id') for fault in faults} - {None}
    objects = []
    for place, annotation in enumerate(content['annotations']):
        kind, image = 'malformed_annotation', ''
        try:
            image_id = _image_id(annotation['image_id'])
            category = parse_integer(annotation['category_id'], 'category_id')
            if image_id in lost_ids:
                continue
            if image_id not in image_of or category not in name_of:
                raise ValueError(f'no image {shortened(image_id)} or no category {shortened(category)} in this file')
            image = images[image_of[image_id]].file
            if (label := label_of[category]) is None:
                kind = 'unknown_label'
                raise ValueError(unknown_label(name_of[category], names))
            objects.append(_object(annotation, image_of[image_id], label, place))
        except (KeyError, TypeError, ValueError) as error:
            number = annotation.get('id', place) if isinstance(annotation, dict) else place
            where = f'{json_file}: annotation {shortened(number)}'
            faults.append(Finding(kind, where, _reason(error), image))
    id_of = {name: identity for identity, name in name_of.items()}
    return make_listing(names, category_ids(names, id_of), images, objects, faults)


def _load(json_file: Path) -> dict[str, list]:
    if not json_file.is_file():
        raise UserError(f'{json_file}: no such file: coco:JSON,IMAGES needs the path of an instances_*.json')
    try:
        content = json.loads(read_bytes(json_file))
    except (
        ValueError,
        RecursionError,
    ) as error:  # ValueError: not JSON, not UTF-8, or a number with thousands of digits
        raise UserError(f'{json_file}: not valid JSON ({error}): check that the file is complete') from error
    parts = content if isinstance(content, dict) else {}
    if missing := [name for name in ('annotations', 'categories', 'images') if not isinstance(parts.get(name), list)]:
        raise UserError(f'{json_file}: {" and ".join(missing)} missing: use a COCO instances file')
    return parts


def _categories(categories: Sequence[Any], json_file: Path) -> dict[int, str]:
    name_of: dict[int, str] = {}
    for category in categories:
        try:
            identity, name = parse_integer(category['id']), category['name']
            if not isinstance(name, str | int) or isinstance(name, bool) or not str(name).strip():
                raise ValueError(f'invalid name {shortened(name)}')
            if identity in name_of:
                raise ValueError(f'duplicate id {identity}')
            name_of[identity] = str(name).strip()
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(
                f'{json_file}: malformed category {shortened(category)} ({_reason(error)}): '
                'give it a name and a unique integer id'
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
                raise ValueError(f'duplicate image id {shortened(image_id)}')
            size = parse_image_size(image.get('height'), image.get('width'))
            rows[image_id] = ImageRow(image_id, path, f'{json_file}: annotation ', size)
            faults += [Finding(fault, path, detail, path)] if fault else []
        except (KeyError, TypeError, ValueError) as error:
            lost_id = None if image_id in rows else image_id
            where = f'{json_file}: image {place if lost_id is None else shortened(lost_id)}'
            faults.append(Finding(kind, where, _reason(error), values={'image_id': lost_id}))
    return list(rows.values())


def _image_id(value: Any) -> int | str:
    """An int where possible. A string such as '007' stays a string, because '7' may be another image."""
    return value if isinstance(value, str) and not re.fullmatch('0|[1-9][0-9]{0,99}', value) else parse_integer(value)


def _object(annotation: Mapping[str, Any], image: int, label: int, place: int) -> ObjectRow:
    x, y, width, height = parse_numbers(annotation['bbox'], 4)
    area = annotation.get('area')
    return ObjectRow(
        image,
        (y, x, y + height, x + width),
        label,
        _number(annotation.get('id'), place),
        float('nan') if area is None else parse_numbers([area], 1)[0],
        parse_flag(annotation.get('iscrowd'), 'iscrowd'),
    )


def _number(identity: Any, place: int) -> int:
    """The number of an annotation in messages: its id if that is an integer, else its position."""
    try:
        number = parse_integer(identity)
    except ValueError:
        return place
    return number if abs(number) < 2**63 else place


def _reason(error: Exception) -> str:
    if isinstance(error, TypeError):  # Python's own message says nothing about the file
        return 'a value has the wrong type'
    return f'{error} is missing' if isinstance(error, KeyError) else str(error)
