"""COCO's `instances_*.json` -> Listing."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from effdet_jax.data import transforms
from effdet_jax.data.checks import Finding, first_few
from effdet_jax.data.listing import (
    ImageRow,
    Listing,
    ObjectRow,
    finite_numbers,
    image_size_of,
    leaves_folder,
    make_listing,
    shortened,
)
from effdet_jax.errors import UserError


def read_coco(json_file: Path, folder: Path, class_names: Sequence[str] = ()) -> Listing:
    """A COCO file and the folder its `file_name`s are relative to. Classes: its categories, by id.

    What is wrong with single images and objects is among the listing's faults. Raises UserError where the file as a
    whole cannot be read.
    """
    content = _load(json_file)
    name_of = _categories(content['categories'], json_file)
    names = tuple(class_names) or tuple(name_of[identity] for identity in sorted(name_of))
    if len(set(names)) < len(names):
        raise UserError(f'{json_file}: two categories have the same name ({first_few(names)}): rename one')

    faults: list[Finding] = []
    images = _images(content['images'], json_file, folder, faults)
    if not images and not faults:
        raise UserError(f'{json_file}: it lists no images: give another file')
    image_of = {image.image_id: place for place, image in enumerate(images)}
    label_of_name = {name: label for label, name in enumerate(names)}
    label_of = {identity: label_of_name.get(name) for identity, name in name_of.items()}
    lost_ids = {fault.values['image_id'] for fault in faults} - {None}  # whose objects are lost with them, and no fault
    objects = []
    for place, annotation in enumerate(content['annotations']):
        kind, image = 'malformed_annotation', ''
        try:
            image_id, category = annotation['image_id'], annotation['category_id']
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
    return make_listing(names, _category_ids(names, name_of), images, objects, faults)


def _load(json_file: Path) -> dict[str, list]:
    if not json_file.is_file():
        raise UserError(f'{json_file}: no such file: in coco:JSON,IMAGES give the path of an instances_*.json')
    try:
        content = json.loads(transforms.read_bytes(json_file))
    except (ValueError, RecursionError) as error:  # ValueError: no JSON, no UTF-8, a number of thousands of digits
        raise UserError(f'{json_file}: not valid JSON ({error}): was it written or copied completely?') from error
    parts = content if isinstance(content, dict) else {}
    if lacking := [name for name in ('annotations', 'categories', 'images') if not isinstance(parts.get(name), list)]:
        raise UserError(
            f'{json_file}: no list of {" and ".join(lacking)}: give a COCO instances file, with images and annotations'
        )
    return parts


def _categories(categories: Sequence[Any], json_file: Path) -> dict[int, str]:
    try:
        name_of = {category['id']: str(category['name']) for category in categories}
        if not all(isinstance(identity, int) and abs(identity) < 2**31 for identity in name_of):
            raise ValueError('an id is no whole number')
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f'{json_file}: a category is malformed ({_reason(error)}): give each an id and a name'
        ) from error
    return name_of


def _images(images: Sequence[Any], json_file: Path, folder: Path, faults: list[Finding]) -> list[ImageRow]:
    rows: dict[int | str, ImageRow] = {}
    for place, image in enumerate(images):
        image_id = kind = None
        try:
            image_id = image['id']
            name = image['file_name']
            kind = 'unsafe_path' if leaves_folder(name) else 'malformed_annotation'
            if kind == 'unsafe_path':
                raise ValueError(f'the file name {shortened(name)} leaves {folder}')
            if not isinstance(image_id, int | str) or image_id in rows:
                raise ValueError(f'the id {shortened(image_id)} is no number or text, or another image has it')
            size = image_size_of(image.get('height'), image.get('width'))
            rows[image_id] = ImageRow(image_id, str(folder / name), f'{json_file}: annotation ', size)
        except (KeyError, TypeError, ValueError) as error:
            lost_id = image_id if isinstance(image_id, int | str) and image_id not in rows else None
            where = f'{json_file}: image {place if lost_id is None else shortened(lost_id)}'
            kind = kind or 'malformed_annotation'
            faults.append(Finding(kind, where, _reason(error), values={'image_id': lost_id}))
    return list(rows.values())


def _object(annotation: Mapping[str, Any], image: int, label: int, place: int) -> ObjectRow:
    x, y, width, height = finite_numbers(annotation['bbox'], 4)
    area = annotation.get('area')
    number = annotation.get('id')
    return ObjectRow(
        image,
        (y, x, y + height, x + width),
        label,
        number if isinstance(number, int) and abs(number) < 2**63 else place,
        float('nan') if area is None else finite_numbers([area], 1)[0],
        bool(annotation.get('iscrowd', 0)),
    )


def _reason(error: Exception) -> str:
    if isinstance(error, TypeError):  # Python's words would say nothing about the file
        return 'a value is not of the type it has in COCO files'
    return f'it has no {error}' if isinstance(error, KeyError) else str(error)


def _category_ids(names: Sequence[str], name_of: Mapping[int, str]) -> list[int]:
    """The ids of the file; classes that it does not have get numbers that it does not use."""
    id_of = {name: identity for identity, name in name_of.items()}
    unused = max(id_of.values(), default=0)
    return [id_of.get(name, unused + 1 + label) for label, name in enumerate(names)]
