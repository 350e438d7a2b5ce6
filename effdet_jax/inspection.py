"""Inspects the data of a config (splits, classes, anchors), for `check-data` and before every training."""

import collections
import dataclasses
import functools
import itertools
import shlex
import sys
from collections.abc import Iterable
from typing import Any

import numpy as np

from effdet_jax import data
from effdet_jax.data import survey
from effdet_jax.data.checks import KINDS, Finding, first_few
from effdet_jax.detection import anchors
from effdet_jax.errors import UserError
from effdet_jax.records.console import result, track

SPLITS = ('train', 'eval')
SAMPLE = 200  # images per split listed before training, if each has to be read or rendered
ALL = sys.maxsize
ADVICE_OBJECTS = 20_000  # evenly spaced objects on which anchor scales are compared
SCALES = (1.0, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0, 8.0)
MIN_UNMATCHED = 0.05  # share of objects without a matching anchor; only check-data reports fewer
MIN_IMPROVEMENT = 0.01  # share of objects that another anchor scale must match in addition to be proposed
SIDES = (8, 16, 32, 64, 128, 256, 512)  # square root of the area in network pixels
RATIOS = (1 / 4, 1 / 2, 2, 4)  # width / height


@dataclasses.dataclass(frozen=True)
class AnchorFit:
    """How well the anchors match the objects of the training split at the size of the network input.

    table: (size, ratio, objects, unmatched) for each group with objects. unmatched_at: {anchor scale: objects whose
    best IoU is below the threshold}, including the config's scale; extrapolated if there are many objects.
    """

    scale: float
    objects: int
    unmatched: int
    table: tuple[tuple[str, str, int, int], ...]
    unmatched_at: dict[float, int]

    @property
    def advice(self) -> str:
        """One line, or '' if no other scale is clearly better."""
        best = min(self.unmatched_at, key=lambda scale: (self.unmatched_at[scale], scale))
        current = self.unmatched_at[self.scale]
        if current - self.unmatched_at[best] < max(MIN_IMPROVEMENT * self.objects, 1):
            return ''
        return (
            f'--config.model.anchors.scale={best:g} leaves {self.unmatched_at[best]:,} of {self.objects:,} '
            f'objects without a matching anchor, instead of {current:,} at {self.scale:g}'
        )


@dataclasses.dataclass(frozen=True)
class Inspection:
    """findings: by split. classes: (name, objects in train, objects in eval). fit: None if no image size is known."""

    findings: dict[str, list[Finding]]
    sources: dict[str, data.CheckableSource]
    listings: dict[str, data.Listing]
    classes: tuple[tuple[str, int, int], ...]
    fit: AnchorFit | None

    def of_kind(self, kind: str) -> dict[str, list[Finding]]:
        """{split: findings of this kind}."""
        return {split: [f for f in findings if f.kind == kind] for split, findings in self.findings.items()}

    def count(self, severity: str) -> int:
        """The number of findings of this severity."""
        return sum(KINDS[f.kind].severity == severity for findings in self.findings.values() for f in findings)


def inspect(config: Any, images: bool = False) -> Inspection:
    """Opens both splits of `config.dataset` and looks for all kinds of faults.

    `images`: also reads, hashes and decodes every image. A split that cannot be opened at all is a finding, too.
    """
    d = config.dataset
    sources: dict[str, data.CheckableSource] = {}
    findings: dict[str, list[Finding]] = {split: [] for split in SPLITS}
    for split, name in zip(SPLITS, (d.train_split, d.eval_split), strict=True):
        class_names = sources['train'].class_names if 'train' in sources else d.class_names
        try:
            sources[split] = data.open_source(d.source, name, class_names, faulty=True)
        except UserError as error:
            findings[split].append(Finding('unreadable_annotations', '', str(error), advice=''))  # the error has advice
    return inspect_sources(config, sources, findings, images)


def inspect_sources(
    config: Any,
    sources: dict[str, data.CheckableSource],
    findings: dict[str, list[Finding]],
    images: bool = False,
    max_images: int = ALL,
) -> Inspection:
    """Inspects open splits, {'train': ..., 'eval': ...}, as in `inspect`. Appends to `findings`.

    `max_images` limits the images listed per split for sources that have to read or render each of them.
    """
    listings: dict[str, data.Listing] = {}
    digests: dict[str, str] = {}
    for split, source in sources.items():
        listing = source.listing(max_images, track if max_images == ALL else lambda items, total, description: items)
        if images:
            image_findings, listing, hashes = survey.check_images(source, listing, track)
            findings[split] += image_findings
            digests |= hashes
        findings[split] += survey.check_labels(listing)
        listings[split] = listing
    if len(listings) == len(SPLITS):
        findings['eval'] += survey.leaks(listings['train'], listings['eval'], digests)
    fit = None
    if 'train' in listings:
        threshold, size = config.loss.match_threshold, tuple(config.image.size)
        limits = (config.dataset.max_boxes, size, best_ious(config), threshold)
        findings['train'] += survey.check_training(listings['train'], *limits)
        if max_images == ALL:
            fit = anchor_fit(config, listings['train'])
    return Inspection(findings, sources, listings, _classes(listings), fit)


def check_sources(config: Any, sources: dict[str, data.CheckableSource]) -> None:
    """Checks one or both splits, {'train': ..., 'eval': ...}, without reading images, and prints a short summary.

    Raises:
      UserError: if a split has no usable objects.
    """
    inspection = inspect_sources(config, sources, {split: [] for split in SPLITS}, max_images=SAMPLE)
    for line in summary(inspection):
        result(f'data: {line}')
    if unusable := [f for findings in inspection.of_kind('no_objects').values() for f in findings]:
        raise UserError(f'{unusable[0].message} (see {_check_command()})')
    if inspection.count('error') + inspection.count('warning'):
        counts = ' and '.join(counted(inspection.count(severity), severity) for severity in ('error', 'warning'))
        sampled = any(listing.sampled for listing in inspection.listings.values())
        sample = f' in a sample of {SAMPLE} images per split' if sampled else ''
        result(f'data: {counts}{sample}; for the full list, run {_check_command()}')


def counted(number: int, noun: str) -> str:
    """'1 error', '2,000 errors'."""
    return f'{number:,} {noun}{"" if number == 1 else "s"}'


def summary(inspection: Inspection) -> list[str]:
    """One line per split and kind of error or warning: the count, the first few places, and what to do."""
    lines = []
    for name, kind in KINDS.items():
        for split, findings in inspection.of_kind(name).items():
            if not findings or kind.severity == 'note':
                continue
            if name != 'unmatched_object' or len(findings) >= MIN_UNMATCHED * len(inspection.listings[split].labels):
                places = first_few(_places(findings), 3)
                lines.append(f'{kind.severity}: {split}: {len(findings):,} x {kind.what}: {places}: {kind.advice}')
    return lines


def anchor_fit(config: Any, listing: data.Listing) -> AnchorFit | None:
    """How well the anchors match, or None if no image size is known."""
    threshold, scale = config.loss.match_threshold, float(config.model.anchors.scale)
    _, boxes_K4 = survey.network_boxes(listing, tuple(config.image.size))
    if len(boxes_K4) == 0:
        return None
    unmatched_K = best_ious(config)(boxes_K4) < threshold
    sample_K4 = boxes_K4[:: -(-len(boxes_K4) // ADVICE_OBJECTS)]
    unmatched_at = {
        s: round(float((best_ious(config, scale=s)(sample_K4) < threshold).mean()) * len(boxes_K4))
        for s in sorted({*SCALES, scale})
    }
    table = tuple(_by_size_and_ratio(boxes_K4, unmatched_K))
    return AnchorFit(scale, len(boxes_K4), int(unmatched_K.sum()), table, unmatched_at)


def best_ious(config: Any, **changes: Any) -> survey.BestIous:
    """A function: boxes yxyx [K, 4] in network pixels -> IoU [K] with the best anchor of `config`, with `changes`."""
    a, size = config.model.anchors, tuple(config.image.size)
    settings = dict(scale=a.scale, scales_per_octave=a.scales_per_octave, aspect_ratios=a.aspect_ratios) | changes
    return functools.partial(anchors.best_ious, level_sizes=level_sizes(config), image_size=size, **settings)


def level_sizes(config: Any) -> tuple[tuple[int, int], ...]:
    """The (height, width) of each feature level that has anchors."""
    return anchors.level_sizes(tuple(config.image.size), anchors.MIN_LEVEL, config.model.max_level)


def _by_size_and_ratio(boxes_K4: np.ndarray, unmatched_K: np.ndarray) -> Iterable[tuple[str, str, int, int]]:
    height_K, width_K = (boxes_K4[:, 2:] - boxes_K4[:, :2]).T
    side_K, ratio_K = np.digitize(np.sqrt(height_K * width_K), SIDES), np.digitize(width_K / height_K, RATIOS)
    for side, side_name in enumerate(_ranges([str(s) for s in SIDES])):
        for ratio, ratio_name in enumerate(_ranges(['1:4', '1:2', '2:1', '4:1'])):
            group_K = (side_K == side) & (ratio_K == ratio)
            if group_K.any():
                yield side_name, ratio_name, int(group_K.sum()), int(unmatched_K[group_K].sum())


def _ranges(edges: list[str]) -> list[str]:
    between = [f'{low} to {high}' for low, high in itertools.pairwise(edges)]
    return [f'under {edges[0]}', *between, f'from {edges[-1]}']


def _classes(listings: dict[str, data.Listing]) -> tuple[tuple[str, int, int], ...]:
    names = next(iter(listings.values())).class_names if listings else ()
    counts = [
        np.bincount(listings[split].labels, minlength=len(names)).tolist() if split in listings else [0] * len(names)
        for split in SPLITS
    ]
    return tuple(zip(names, *counts, strict=True))


def _places(findings: list[Finding]) -> list[str]:
    """The distinct places without their folders, with counts."""
    counts = collections.Counter(
        f.label if f.kind == 'class_without_examples' else (f.image or f.where).rpartition('/')[2] for f in findings
    )
    return [f'{place} ({count})' if count > 1 else place for place, count in counts.items()]


def _check_command() -> str:
    """The check-data command with the --config flags of this run."""
    flags = [argument for argument in sys.argv[1:] if argument.startswith('--config')]
    return f'python -m effdet_jax check-data {" ".join(map(shlex.quote, flags)) or "--config=FILE"}'
