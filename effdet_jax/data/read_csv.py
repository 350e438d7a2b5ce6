"""A table of boxes -> Listing."""

import csv
import io
from collections.abc import Sequence
from pathlib import Path

from effdet_jax.data import transforms
from effdet_jax.data.checks import Finding
from effdet_jax.data.listing import ImageRow, Listing, ObjectRow, finite_numbers, leaves_folder, make_listing, shortened
from effdet_jax.errors import UserError

COLUMNS = ('image', 'xmin', 'ymin', 'xmax', 'ymax', 'label')


def read_csv(file: Path, class_names: Sequence[str] = ()) -> Listing:
    """A table with the header image,xmin,ymin,xmax,ymax,label; image paths are relative to the table.

    A row with empty box fields stands for an image without objects. Classes: the sorted labels. What is wrong with
    single rows is among the listing's faults. Raises UserError where the table as a whole cannot be read.
    """
    faults: list[Finding] = []
    rows = _rows(file, faults)
    if not rows and not faults:
        raise UserError(f'{file}: the table has no rows: add one for every object')
    names = tuple(class_names or sorted({label for _, _, _, label in rows if label}))
    label_of = {name: label for label, name in enumerate(names)}
    files = list(dict.fromkeys(name for _, name, _, _ in rows))
    stems = [Path(name).stem for name in files]
    unique = len(set(stems)) == len(stems)
    images = [
        ImageRow(stem if unique else place, str(file.parent / name), f'{file}:')
        for place, (name, stem) in enumerate(zip(files, stems, strict=True))
    ]
    place_of = {name: place for place, name in enumerate(files)}
    objects = []
    for line, name, corners, label in rows:
        if not any(corners) and not label:
            continue
        where, image = f'{file}:{line}', images[place_of[name]].file
        try:
            xmin, ymin, xmax, ymax = finite_numbers(corners, 4)
        except ValueError as error:
            faults.append(Finding('malformed_annotation', where, str(error), image, label))
            continue
        if label in label_of:
            objects.append(ObjectRow(place_of[name], (ymin, xmin, ymax, xmax), label_of[label], line))
        else:
            detail = f'label {shortened(label)} is not among the class names ({", ".join(names)})'
            faults.append(Finding('unknown_label', where, detail, image, label))
    return make_listing(names, range(1, len(names) + 1), images, objects, faults)


def _rows(file: Path, faults: list[Finding]) -> list[tuple[int, str, list[str], str]]:
    """(line, image, corners as text, label) of every row that has these fields."""
    if not file.is_file():
        raise UserError(f'{file}: no such file: csv:FILE takes a table with the header {",".join(COLUMNS)}')
    content = transforms.read_bytes(file)
    try:
        text = content.decode('utf-8-sig')
    except UnicodeDecodeError as error:
        line = content.count(b'\n', 0, error.start) + 1
        raise UserError(f'{file}:{line}: not a CSV table in UTF-8 ({error.reason}): correct it') from error
    rows = []
    reader = csv.DictReader(io.StringIO(text, newline=''))
    try:
        if not set(COLUMNS) <= set(reader.fieldnames or ()):
            raise UserError(f'{file}:1: the header is {shortened(reader.fieldnames)}: it must be {",".join(COLUMNS)}')
        for row in reader:
            name, *corners, label = (row[column] for column in COLUMNS)
            where = f'{file}:{reader.line_num}'
            if not name or label is None:
                faults.append(Finding('malformed_annotation', where, f'a row needs the fields {",".join(COLUMNS)}'))
            elif leaves_folder(name):
                detail = f'the file name {shortened(name)} leaves {file.parent}'
                faults.append(Finding('unsafe_path', where, detail))
            else:
                rows.append((reader.line_num, name, corners, label))
    except csv.Error as error:
        raise UserError(f'{file}:{reader.line_num}: not a CSV table in UTF-8 ({error}): correct it') from error
    return rows
