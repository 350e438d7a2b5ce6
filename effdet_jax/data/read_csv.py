"""Reads boxes from a CSV table."""

import csv
import functools
import io
from collections.abc import Sequence
from pathlib import Path

from effdet_jax.data.checks import Finding
from effdet_jax.data.files import Folder, Lookup, read_text
from effdet_jax.data.listing import ImageRow, Listing, ObjectRow, make_listing, parse_numbers, shortened, unknown_label
from effdet_jax.errors import UserError

COLUMNS = ('image', 'xmin', 'ymin', 'xmax', 'ymax', 'label')
DELIMITERS = ',;\t'  # as written by programs in different locales
MISSING = {'', 'nan', 'na', 'n/a', '<na>', '#n/a', 'none', 'null'}  # how libraries write a missing value, in lower case


def read_csv(file: Path, class_names: Sequence[str] = ()) -> Listing:
    """Reads a table with the header image,xmin,ymin,xmax,ymax,label; image paths are relative to the table.

    A row without box and label is an image without objects. Classes are the sorted labels. Spaces around values are
    ignored. Malformed rows become faults of the listing. Raises UserError if the table as a whole cannot be read.
    """
    faults: list[Finding] = []
    rows = _rows(file, faults)
    if not rows and not faults:
        raise UserError(f'{file}: the table has no rows: add one per object')
    names = tuple(class_names or sorted({label for _, _, _, label in rows if label}))
    label_of = {name: label for label, name in enumerate(names)}
    paths = list(dict.fromkeys(lookup.path for _, lookup, _, _ in rows))
    stems = [Path(path).stem for path in paths]
    is_unique = len(set(stems)) == len(stems)
    images = [
        ImageRow(stem if is_unique else place, path, f'{file}:')
        for place, (path, stem) in enumerate(zip(paths, stems, strict=True))
    ]
    place_of = {path: place for place, path in enumerate(paths)}
    objects = []
    for line, lookup, corners, label in rows:
        if not corners:
            continue
        where, image = f'{file}:{line}', lookup.path
        try:
            xmin, ymin, xmax, ymax = parse_numbers(corners, 4)
        except ValueError as error:
            faults.append(Finding('malformed_annotation', where, str(error), image, label))
            continue
        if label in label_of:
            objects.append(ObjectRow(place_of[image], (ymin, xmin, ymax, xmax), label_of[label], line))
        else:
            faults.append(Finding('unknown_label', where, unknown_label(label, names), image, label))
    missing = {lookup.path: lookup for _, lookup, _, _ in rows if lookup.fault}
    faults += [Finding(lookup.fault, path, lookup.detail, path) for path, lookup in missing.items()]
    return make_listing(names, range(1, len(names) + 1), images, objects, faults)


def _rows(file: Path, faults: list[Finding]) -> list[tuple[int, Lookup, list[str], str]]:
    """(line, image, corners as strings, label) of every row; corners and label are empty if it has no object."""
    if not file.is_file():
        raise UserError(f'{file}: no such file: csv:FILE needs a table with the header {",".join(COLUMNS)}')
    text = read_text(file)
    header = text.partition('\n')[0]
    lines = csv.reader(io.StringIO(text, newline=''), delimiter=max(DELIMITERS, key=header.count))
    find, rows = functools.cache(Folder(file.parent).find), []
    try:
        columns = [column.strip().lower() for column in next(lines, ())]
        if not set(COLUMNS) <= set(columns):
            raise UserError(f'{file}:1: the header is {shortened(columns)}: change it to {",".join(COLUMNS)}')
        for cells in lines:
            if not cells:
                continue
            row = dict(zip(columns, (cell.strip() for cell in cells), strict=False))
            name, *corners, label = (row.get(column, '') for column in COLUMNS)
            where = f'{file}:{lines.line_num}'
            if not name or not set(COLUMNS) <= set(row):
                faults.append(Finding('malformed_annotation', where, f'a row must have the fields {",".join(COLUMNS)}'))
                continue
            lookup = find(name)
            if lookup.fault == 'unsafe_path':
                faults.append(Finding(lookup.fault, where, lookup.detail))
            elif all(value.lower() in MISSING for value in (*corners, label)):
                rows.append((lines.line_num, lookup, [], ''))
            else:
                rows.append((lines.line_num, lookup, corners, label))
    except csv.Error as error:
        raise UserError(f'{file}:{lines.line_num}: not a valid CSV table ({error}): fix the line') from error
    return rows
