"""The check of a config's data: both splits, classes, anchors. Behind `check_data`, and before every training."""

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
SAMPLE = 200  # images looked at before training, where each would have to be read or drawn
ALL = sys.maxsize
ADVICE_OBJECTS = 20_000  # anchor scales are tried on so many objects, evenly spread
SCALES = (1.0, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0, 8.0)
WORTH_SAYING = 0.05  # of the objects without a fitting anchor; fewer are told by check_data alone
WORTH_ADVICE = 0.01  # of the objects; a scale that fits fewer more is not worth a change
SIDES = (8, 16, 32, 64, 128, 256, 512)  # square root of the area, network pixels
RATIOS = (1 / 4, 1 / 2, 2, 4)  # width / height


@dataclasses.dataclass(frozen=True)
class AnchorFit:
    """How the anchors fit the objects of the training split, at the network's input size.

    table: (sides, ratio, objects, unmatched) of every group that has objects. unmatched_at: {scale: objects whose best
    anchor stays under the threshold}, scaled up from a sample where there are many; the config's own scale among them.
    """

    scale: float
    objects: int
    unmatched: int
    table: tuple[tuple[str, str, int, int], ...]
    unmatched_at: dict[float, int]

    @property
    def advice(self) -> str:
        """One line, or '' where no other scale is worth it."""
        best = min(self.unmatched_at, key=lambda scale: (self.unmatched_at[scale], scale))
        now = self.unmatched_at[self.scale]
        if now - self.unmatched_at[best] < max(WORTH_ADVICE * self.objects, 1):
            return ''
        return (
            f'--config.model.anchors.scale={best:g} would leave {self.unmatched_at[best]:,} of {self.objects:,} '
            f'objects without a fitting anchor, instead of {now:,} at {self.scale:g}'
        )


@dataclasses.dataclass(frozen=True)
class Inspection:
    """findings: {split: those of it}. classes: (name, objects in train, in eval). fit: None where nothing is known."""

    findings: dict[str, list[Finding]]
    sources: dict[str, data.CheckableSource]
    listings: dict[str, data.Listing]
    classes: tuple[tuple[str, int, int], ...]
    fit: AnchorFit | None

    def of_kind(self, kind: str) -> dict[str, list[Finding]]:
        """{split: findings of this kind}."""
        return {split: [f for f in found if f.kind == kind] for split, found in self.findings.items()}

    def count(self, severity: str) -> int:
        """Findings of this severity."""
        return sum(KINDS[f.kind].severity == severity for found in self.findings.values() for f in found)


def inspect(config: Any, images: bool = False) -> Inspection:
    """Opens both splits of `config.dataset`, faulty as they may be, and looks for every kind of fault.

    With `images` all of them are read, hashed and decoded. What cannot be opened at all becomes a finding too.
    """
    d = config.dataset
    sources: dict[str, data.CheckableSource] = {}
    findings: dict[str, list[Finding]] = {split: [] for split in SPLITS}
    for split, name in zip(SPLITS, (d.train_split, d.eval_split), strict=True):
        class_names = sources['train'].class_names if 'train' in sources else d.class_names
        try:
            sources[split] = data.open_source(d.source, name, class_names, faulty=True)
        except UserError as error:
            findings[split].append(Finding('unreadable_annotations', '', str(error), advice=''))  # it has its own
    return inspect_sources(config, sources, findings, images)


def inspect_sources(
    config: Any,
    sources: dict[str, data.CheckableSource],
    findings: dict[str, list[Finding]],
    images: bool = False,
    most: int = ALL,
) -> Inspection:
    """As `inspect`, for splits that are open, {'train': ..., 'eval': ...}; `findings` are added to.

    Of sources that are not annotated files, whose records must be read or drawn, `most` are looked at.
    """
    listings: dict[str, data.Listing] = {}
    digests: dict[str, str] = {}
    for split, source in sources.items():
        listing = source.listing(most, track if most == ALL else lambda items, total, description: items)
        if images:
            found, listing, hashes = survey.check_images(source, listing, track)
            findings[split] += found
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
        if most == ALL:
            fit = anchor_fit(config, listings['train'])
    return Inspection(findings, sources, listings, _classes(listings), fit)


def check_sources(config: Any, sources: dict[str, data.CheckableSource]) -> None:
    """The part of the check that reads no image, with a summary of a few lines; of {'train': ..., 'eval': ...} or one.

    Raises:
      UserError: where nothing could be learned or measured: no object in a split that could be.
    """
    found = inspect_sources(config, sources, {split: [] for split in SPLITS}, most=SAMPLE)
    for line in summary(found):
        result(f'data: {line}')
    fatal = [f for findings in found.findings.values() for f in findings if f.kind == 'no_objects']
    if fatal:
        raise UserError(f'{fatal[0].message} (see {_command()})')
    if found.count('error') + found.count('warning'):
        counts = ' and '.join(counted(found.count(severity), severity) for severity in ('error', 'warning'))
        sample = f' in {SAMPLE} images of a split' if any(x.sampled for x in found.listings.values()) else ''
        result(f'data: {counts}{sample}; to see all: {_command()}')


def counted(number: int, what: str) -> str:
    """'1 error', '2,000 errors'."""
    return f'{number:,} {what}{"" if number == 1 else "s"}'


def summary(found: Inspection) -> list[str]:
    """A line for each kind of error and warning and each split: how many, where (the first few), what is done."""
    lines = []
    for name, kind in KINDS.items():
        for split, of_split in found.of_kind(name).items():
            if not of_split or kind.severity == 'note':
                continue
            if name != 'unmatched_object' or len(of_split) >= WORTH_SAYING * len(found.listings[split].labels):
                places = first_few(_places(of_split), 3)
                lines.append(f'{kind.severity}: {split}: {len(of_split):,} x {kind.what}: {places}: {kind.advice}')
    return lines


def anchor_fit(config: Any, listing: data.Listing) -> AnchorFit | None:
    """None where no object's size at the input is known."""
    threshold, scale = config.loss.match_threshold, float(config.model.anchors.scale)
    _, boxes_K4 = survey.network_boxes(listing, tuple(config.image.size))
    if len(boxes_K4) == 0:
        return None
    unmatched_K = best_ious(config)(boxes_K4) < threshold
    few_K4 = boxes_K4[:: -(-len(boxes_K4) // ADVICE_OBJECTS)]
    unmatched_at = {
        s: round(float((best_ious(config, scale=s)(few_K4) < threshold).mean()) * len(boxes_K4))
        for s in sorted({*SCALES, scale})
    }
    table = tuple(_by_size_and_ratio(boxes_K4, unmatched_K))
    return AnchorFit(scale, len(boxes_K4), int(unmatched_K.sum()), table, unmatched_at)


def best_ious(config: Any, **changes: Any) -> survey.BestIous:
    """boxes yxyx [K, 4] in network pixels -> IoU [K] with the best anchor of `config`, in which `changes` apply."""
    a, size = config.model.anchors, tuple(config.image.size)
    levels = anchors.level_sizes(size, anchors.MIN_LEVEL, config.model.max_level)
    chosen = dict(scale=a.scale, octaves=a.octaves, aspect_ratios=a.aspect_ratios) | changes
    return functools.partial(anchors.best_ious, level_sizes=levels, image_size=size, **chosen)


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


def _places(found: list[Finding]) -> list[str]:
    """Where, without the folders, each place once."""
    counts = collections.Counter(f.label if f.kind == 'class_without_examples' else _stem(f) for f in found)
    return [f'{place} ({count})' if count > 1 else place for place, count in counts.items()]


def _stem(finding: Finding) -> str:
    return (finding.image or finding.where).rpartition('/')[2]


def _command() -> str:
    """What the user types to see more: with the flags of this very run, as far as they say what the data are."""
    flags = [argument for argument in sys.argv[1:] if argument.startswith('--config')]
    return f'python -m effdet_jax check-data {" ".join(map(shlex.quote, flags)) or "--config=FILE"}'
