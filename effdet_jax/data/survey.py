"""Finds the faults of a split: cheaply from its listing alone, or by decoding all of its images."""

import dataclasses
import hashlib
import os
import re
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from effdet_jax.data import transforms
from effdet_jax.data.checks import DROPPED, KINDS, Finding, find_box_faults, mend_boxes, size_mismatch
from effdet_jax.data.files import name_key
from effdet_jax.data.listing import Listing, Track
from effdet_jax.data.sources import CheckableSource
from effdet_jax.errors import UnreadableError

BestIous = Callable[[Float[np.ndarray, 'M 4']], Float[np.ndarray, 'M']]

DARK_LEVEL = 64  # of 256, reached by images that use 14 of their 16 bits


class _ImageInfo(NamedTuple):
    """brightest: the brightest level, of 255, if the image is dark and has more than 8 bits; else None."""

    size: tuple[int, int]
    digest: str
    orientation: int = 1
    brightest: int | None = None


def check_labels(listing: Listing) -> list[Finding]:
    """The faults that show without reading images. If the size of an image is unknown, no box is outside it."""
    return [
        *listing.faults,
        *_listed_twice(listing),
        *_similar_classes(listing),
        *_faulty_boxes(listing),
        *_duplicates(listing),
        *_without_objects(listing),
        *(() if listing.sampled else _without_examples(listing)),
    ]


def check_training(
    listing: Listing, max_boxes: int, image_size: tuple[int, int], best_ious: BestIous, threshold: float
) -> list[Finding]:
    """The faults that hinder training: too many objects in an image, and objects without a matching anchor.

    `best_ious` maps boxes, yxyx in network pixels without jitter, to the IoU with their best anchor. Objects in images
    of unknown size are skipped.
    """
    counts_I = np.bincount(listing.image_of[~listing.is_crowd], minlength=len(listing.images))
    crowded = [
        Finding(
            'too_many_objects', listing.images[i].file, f'{counts_I[i]} objects, but max_boxes is {max_boxes}',
            listing.images[i].file, values={'objects': int(counts_I[i]), 'max_boxes': max_boxes},
        )
        for i in np.flatnonzero(counts_I > max_boxes)
    ]  # fmt: skip
    numbers_K, boxes_K4 = network_boxes(listing, image_size)
    iou_K = best_ious(boxes_K4)
    _, faults = find_box_faults(listing.boxes_yxyx, listing.sizes[listing.image_of])
    unmatched = []
    for k in np.flatnonzero((iou_K < threshold) & ~faults['absurd_box'][numbers_K]):  # report each box once
        height, width = (float(side) for side in boxes_K4[k, 2:] - boxes_K4[k, :2])
        detail = f'{width:.0f}x{height:.0f} pixels at the network input, IoU {iou_K[k]:.2f} with the best anchor'
        values = {'width': round(width, 1), 'height': round(height, 1), 'iou': round(float(iou_K[k]), 3)}
        unmatched.append(_object_finding('unmatched_object', listing, int(numbers_K[k]), detail, values))
    return crowded + unmatched


def network_boxes(listing: Listing, image_size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """(indices [K] of the training targets, their boxes [K, 4] yxyx in network pixels without jitter)."""
    sizes_M2 = listing.sizes[listing.image_of]
    boxes_M4, _, keep_M = mend_boxes(listing.boxes_yxyx, listing.areas, sizes_M2)
    numbers_K = np.flatnonzero(keep_M & ~listing.is_crowd & (sizes_M2[:, 0] > 0))
    scale_K = (np.array(image_size) / sizes_M2[numbers_K]).min(1).astype(np.float32)
    return numbers_K, boxes_M4[numbers_K] * scale_K[:, None]


def check_images(
    source: CheckableSource, listing: Listing, track: Track
) -> tuple[list[Finding], Listing, dict[str, str]]:
    """Reads, hashes and decodes every image: (findings, listing with the true sizes, {image: digest})."""

    def read(index: int) -> _ImageInfo | UnreadableError:
        name = listing.images[index].file
        try:
            image = source.image(int(listing.indices[index]))
            if not isinstance(image, bytes):
                return _ImageInfo(image.shape[:2], _hash(image.tobytes()))
            pixels = transforms.decode(image, name, quiet=True)
            brightest = int(pixels.max())
            return _ImageInfo(
                pixels.shape[:2],
                _hash(image),
                transforms.exif_orientation(image, name),
                brightest if brightest < DARK_LEVEL and transforms.is_deep(image, name) else None,
            )
        except UnreadableError as error:
            return error

    findings, sizes_I2, digests = [], listing.sizes.copy(), {}
    missing = {fault.image for fault in listing.faults if fault.kind == 'missing_image'}
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        results = threads.map(read, range(len(listing.images)))
        for i, info in enumerate(track(results, len(listing.images), 'reading images')):
            file, annotated = listing.images[i].file, tuple(listing.sizes[i].tolist())
            if isinstance(info, UnreadableError):
                if file not in missing:
                    findings.append(Finding('unreadable_image', file, info.reason, file, advice=info.advice))
                continue
            digests[file], size, orientation = info.digest, info.size, info.orientation
            sizes_I2[i] = size
            if annotated[0] and annotated != size:
                detail, advice = size_mismatch(size, annotated, orientation)
                values = {'width': size[1], 'height': size[0], 'stated': annotated[::-1]}
                findings.append(Finding('another_size', file, detail, file, values=values, advice=advice))
                sizes_I2[i] = annotated  # the boxes were drawn at this size, so check them against it
            # Only an annotated size shows whether boxes were drawn on the stored or on the upright image.
            elif orientation > 1 and not (orientation >= 5 and size[0] != size[1] and _has_annotated_size(listing, i)):
                findings.append(Finding('turned_image', file, f'EXIF orientation {orientation}', file))
            if info.brightest is not None:
                detail = f'the brightest pixel is {info.brightest} of 255'
                findings.append(Finding('dark_image', file, detail, file, values={'brightest': info.brightest}))
    return findings, dataclasses.replace(listing, sizes=sizes_I2), digests


def leaks(train: Listing, evaluation: Listing, digests: Mapping[str, str]) -> list[Finding]:
    """Images in both splits: the same file, or with `digests` {image: hash} also a copy of it."""

    def keys(listing: Listing) -> dict[str, str]:
        files = [image.file for image in listing.images]
        return {file: digests.get(file) or os.path.normpath(file) for file in files}

    trained = {key: file for file, key in keys(train).items()}
    return [
        Finding(
            'image_in_both_splits', file, f'also in the training split, as {trained[key]}', file,
            values={'trained_as': trained[key]},
        )
        for file, key in keys(evaluation).items()
        if key in trained
    ]  # fmt: skip


def num_usable(listing: Listing) -> int:
    """The number of objects that are neither dropped nor implausible nor crowds."""
    _, faults = find_box_faults(listing.boxes_yxyx, listing.sizes[listing.image_of])
    return int((~np.any([listing.is_crowd, *(faults[kind] for kind in (*DROPPED, 'absurd_box'))], axis=0)).sum())


def _hash(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def _has_annotated_size(listing: Listing, image: int) -> bool:
    return bool(listing.sizes[image, 0] > 0 and not listing.images[image].is_measured)


def _similar_classes(listing: Listing) -> Iterator[Finding]:
    first: dict[str, str] = {}
    for name in listing.class_names:
        key = re.sub(r'[\s_]', '', name_key(name))
        if (other := first.setdefault(key, name)) != name:
            yield Finding('similar_classes', f'class {name!r}', f'there is also {other!r}', label=name)


def _listed_twice(listing: Listing) -> Iterator[Finding]:
    first: dict[str, int] = {}
    for i, file in enumerate(image.file for image in listing.images):
        if first.setdefault(file, i) != i:
            yield Finding('image_listed_twice', file, f'images {first[file]} and {i} of the split are the same', file)


def _faulty_boxes(listing: Listing) -> Iterator[Finding]:
    sizes_M2 = listing.sizes[listing.image_of]
    _, faults = find_box_faults(listing.boxes_yxyx, sizes_M2)
    for kind, fault_M in faults.items():
        for number in np.flatnonzero(fault_M):
            height, width = sizes_M2[number].tolist()
            inside = f' in an image of {width}x{height}' if height else ''
            detail = f'{KINDS[kind].what}: {_corners(listing, int(number))}{inside}'
            yield _object_finding(kind, listing, int(number), detail)


def _duplicates(listing: Listing) -> Iterator[Finding]:
    """Objects with the same image, class and corners as an earlier one."""
    # + 0 turns -0.0 into 0.0
    columns = [listing.image_of, listing.labels, listing.is_crowd, *(listing.boxes_yxyx + 0).view(np.uint32).T]
    hash_M = np.zeros(len(listing.labels), np.uint64)
    for column in columns:  # hash the rows: sorting whole rows takes twenty times as long
        hash_M = (hash_M ^ column.astype(np.uint64)) * np.uint64(0x9E3779B97F4A7C15)
        hash_M ^= hash_M >> np.uint64(29)
    _, first_U, which_M = np.unique(hash_M, return_index=True, return_inverse=True)
    first_M = first_U[which_M]
    for number in np.flatnonzero(first_M != np.arange(len(first_M))):
        other = int(listing.numbers[first_M[number]])
        detail = f'{KINDS["duplicate_box"].what}, same as number {other}: {_corners(listing, int(number))}'
        yield _object_finding('duplicate_box', listing, int(number), detail, {'same_as': other})


def _without_objects(listing: Listing) -> Iterator[Finding]:
    counts_I = np.bincount(listing.image_of, minlength=len(listing.images))
    lost = {fault.image for fault in listing.faults}  # their objects could not be read
    for i in np.flatnonzero(counts_I == 0):
        file = listing.images[i].file
        if file not in lost:
            yield Finding('image_without_objects', file, 'no objects', file)


def _without_examples(listing: Listing) -> Iterator[Finding]:
    counts_K = np.bincount(listing.labels[~listing.is_crowd], minlength=len(listing.class_names))
    if num_usable(listing) == 0:
        crowds = int(listing.is_crowd.sum())
        more = f' ({crowds} are crowds)' if crowds else ''
        detail = f'none of the {len(listing.labels)} objects{more} is usable'
        yield Finding('no_objects', f'all {len(listing.images)} images', detail)
        return
    for label in np.flatnonzero(counts_K == 0):
        name = listing.class_names[label]
        detail = 'only crowds' if (listing.labels == label).any() else 'no objects'
        yield Finding('class_without_examples', f'class {name}', detail, label=name)


def _object_finding(kind: str, listing: Listing, number: int, detail: str, values: dict | None = None) -> Finding:
    y1, x1, y2, x2 = listing.boxes_yxyx[number].tolist()
    label = listing.class_names[listing.labels[number]]
    file = listing.images[listing.image_of[number]].file
    return Finding(kind, f'{listing.where(number)} ({label})', detail, file, label, (x1, y1, x2, y2), values or {})


def _corners(listing: Listing, number: int) -> str:
    y1, x1, y2, x2 = listing.boxes_yxyx[number].tolist()
    return f'xmin, ymin, xmax, ymax = {x1:g}, {y1:g}, {x2:g}, {y2:g}'
