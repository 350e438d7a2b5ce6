"""Converts a checkpoint of another implementation to a work directory."""

import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path as FilePath
from typing import Any

import numpy as np
from flax import traverse_util

from effdet_jax import config as run_config
from effdet_jax.configs import coco, default
from effdet_jax.configs.presets import PRESETS
from effdet_jax.configs.scaling import SCALES
from effdet_jax.errors import UserError, explaining_write_errors
from effdet_jax.model import build_model, efficientnet
from effdet_jax.records.checkpoint import Checkpoints, has_checkpoints
from effdet_jax.records.console import info, result, table
from effdet_jax.records.files import write_atomically
from effdet_jax.training.state import init_variables
from effdet_jax.weights import certificate, families, names, readers

MAX_ROWS = 30  # of the table of problems; with --allow=. import.json lists them all

ADVPROP_BACKBONES = ('b0', 'b1', 'b2', 'b3', 'b4', 'b5')  # backbones of the published AdvProp detectors

Problem = tuple[str, str, str]  # kind, name for --allow, description


def import_weights(
    config: Any,
    source: FilePath,
    workdir: FilePath,
    *,
    preset: str = 'auto',
    allow: Sequence[str] = (),
    reference: FilePath | None = None,
) -> None:
    """Converts the weights in `source` to a work directory. Writes nothing unless all weights fit.

    Args:
      config: of the model in the file. The preset sets its input statistics, anchors and NMS.
      source: a file that `readers.read` can read.
      preset: a name of `PRESETS`, or 'auto' to choose one by `choose_preset`.
      allow: regexes on names, ours or theirs, of tensors that may be missing (they keep their initial values),
        unexpected, or mismatched in shape.
      reference: an .npz file of reference outputs to compare with, see `certificate.read_reference`.

    Raises:
      UserError: if the file does not fit the model, naming each tensor, if something cannot be read or written, or if
        the preset is ambiguous.
    """
    patterns = [_compile(pattern) for pattern in allow]
    if has_checkpoints(workdir):
        raise UserError(f'{workdir} already has checkpoints: choose another --workdir')
    contents = readers.read(source)
    weights = families.recognise(contents.arrays)
    if weights.is_detector:
        _refuse_other_feature_networks(config)
    info(f'{source}: {weights.family}, {families.size_of(weights)}')
    preset = preset if preset != 'auto' else choose_preset(weights, config, contents)
    settings = apply_preset(config, preset)
    name_classes(config, weights)
    classes_in_file = families.num_classes(weights, _num_anchors(config))

    model = build_model(config.model, len(config.dataset.class_names) or max(classes_in_file, 1))
    shapes = {
        path: shape
        for path, shape in traverse_util.flatten_dict(names.shapes_of(model)).items()
        if weights.is_detector or path[1] == 'backbone'
    }
    matched = names.match_weights(weights.arrays, shapes, config.model.backbone, weights.scheme)
    allowed, refused = _split(_problems(matched), patterns)
    if refused:
        _refuse(refused, source, config, weights)
    if weights.is_detector and not config.dataset.class_names:
        raise UserError(
            f"{source} has {classes_in_file} classes without names: add --config.dataset.class_names=\"('a', 'b')\""
        )
    flat = dict(matched.arrays)
    if new := shapes.keys() - flat.keys():
        initial = traverse_util.flatten_dict(init_variables(model, config.seed))
        flat |= {path: np.asarray(initial[path]) for path in new}
    variables = traverse_util.unflatten_dict(flat)
    _print_summary(shapes, matched, weights, allowed)
    info(f'preset {preset}: {", ".join(f"{key}={value}" for key, value in settings.items()) or "nothing to set"}')
    certified = [] if reference is None else certify(model, variables, reference)

    with explaining_write_errors(workdir, 'choose another --workdir'):
        run_config.save(config, workdir)
        _write_json(workdir / 'import.json', _provenance(source, preset, matched, weights, allowed))
        if certified:
            _write_json(workdir / 'certificate.json', [row._asdict() for row in certified])
        checkpoints = Checkpoints(workdir, best=config.checkpoint.best)
        checkpoints.save(0, {'variables': variables}, {}, run_config.to_json(config))
        checkpoints.close()
    _print_next_steps(workdir, weights.is_detector)


def _refuse_other_feature_networks(config: Any) -> None:
    """All published detectors have the same feature network; a backbone works with any."""
    published = {'name': 'bifpn', 'per_channel': False, 'separable': True}
    for key, value in published.items():
        if (given := config.model.feature_network[key]) != value:
            raise UserError(
                f'config.model.feature_network.{key}={given}: published detectors have {value}; to use {given}, import '
                'a backbone and train from it'
            )


def choose_preset(weights: families.Recognised, config: Any, contents: readers.Contents) -> str:
    """The name in `PRESETS` of the family and variant of a file. Only the path can tell AdvProp and 640x640.

    Raises:
      UserError: for an official TensorFlow checkpoint whose path does not tell whether it is AdvProp: plain and AdvProp
        checkpoints have the same file names. A published .h5 is never AdvProp.
    """
    family = weights.family
    if not weights.is_detector:
        family = {'official': 'port', 'effdet': 'timm'}.get(family, family)
    if efficientnet.VARIANTS[config.model.backbone].lite:
        return f'{family}-lite'
    variant, part = families.variant_of(weights.family, contents.path)
    if (preset := f'{family}-{variant}') in PRESETS:
        info(f'note: preset {preset}, because the path contains {part}; if that is wrong, give --preset={family}')
        return preset
    if not variant and config.model.backbone in ADVPROP_BACKBONES:
        advprop = f'{family}-advprop'
        if weights.is_detector and weights.family == 'official' and contents.format == 'tensorflow':
            raise UserError(
                f'{contents.path}: plain or AdvProp weights? Their files have the same names, and the path contains '
                f'neither coco2 nor advprop: add --preset={family}, or --preset={advprop} for inputs in -1..1'
            )
        if contents.format != 'hdf5':
            info(f'note: preset {family}, because the path does not say AdvProp; for AdvProp give --preset={advprop}')
    return family


def apply_preset(config: Any, preset: str) -> dict[str, Any]:
    """Sets and returns the keys of the preset. Keys that the user has changed from their default are kept."""
    lite = efficientnet.VARIANTS[config.model.backbone].lite
    member = config.name if config.name in SCALES else 'lite0' if lite else 'd0'
    defaults = dict(run_config.flatten(default.get_config(member).to_dict()))
    given = dict(run_config.flatten(config.to_dict()))
    kept = {key: given[key] for key in PRESETS[preset] if given[key] not in (defaults[key], PRESETS[preset][key])}
    for key, value in kept.items():
        info(f'note: {key}={value} is kept; the preset {preset} has {PRESETS[preset][key]}')
    settings = {key: value for key, value in PRESETS[preset].items() if key not in kept}
    config.update_from_flattened_dict(settings)
    return settings


def name_classes(config: Any, weights: families.Recognised) -> None:
    """Sets missing class names and category ids; those of COCO if the file has 90 classes."""
    d = config.dataset
    with config.unlocked():
        if not d.class_names and families.num_classes(weights, _num_anchors(config)) == len(coco.CLASS_NAMES):
            d.class_names, d.category_ids = coco.CLASS_NAMES, coco.CATEGORY_IDS
        d.category_ids = tuple(d.category_ids) or tuple(range(1, len(d.class_names) + 1))


def certify(model: Any, variables: Any, reference: FilePath) -> list[certificate.Row]:
    """Prints and returns the differences from the reference outputs, layer by layer.

    Raises:
      UserError: if a difference is above the tolerance.
    """
    images, theirs = certificate.read_reference(reference)
    rows = certificate.compare(certificate.layer_outputs(model, variables, images, theirs.keys()), theirs)
    shown = [
        (row.name, 'x'.join(map(str, row.shape)), f'{row.largest:.3g}', f'{row.difference:.1e}', f'{row.relative:.1e}')
        for row in rows
    ]
    result('\n' + table(('output', 'shape', 'largest value', 'largest difference', 'relative'), shown))
    worst = max(rows, key=lambda row: math.inf if math.isnan(row.relative) else row.relative)
    if not worst.relative <= certificate.TOLERANCE:
        raise UserError(
            f'{worst.name} differs from {reference} by {worst.relative:.1e} of its largest value (allowed '
            f'{certificate.TOLERANCE:.0e}): nothing was imported; check --preset, and that both are the same model'
        )
    result(f'certified: {len(rows)} outputs; the largest difference is {worst.relative:.1e} of the largest value')
    return rows


def _problems(matched: names.MatchedWeights) -> Iterator[Problem]:
    for path, name in matched.missing.items():
        yield 'missing', '/'.join(path[1:]), f'the file has no {name}'
    for path, description in matched.mismatched.items():
        yield 'mismatched', '/'.join(path[1:]), description
    for name in matched.unexpected:
        yield 'unexpected', name, 'the model has no such tensor'


def _compile(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise UserError(f'--allow={pattern} is not a regex ({error}): escape special characters, as in \\(') from error


def _split(problems: Iterable[Problem], allow: Sequence[re.Pattern[str]]) -> tuple[list[Problem], list[Problem]]:
    """(allowed, refused): a regex may match our name, or the description, which contains theirs."""
    allowed, refused = [], []
    for problem in problems:
        is_allowed = any(pattern.search(' '.join(problem[1:])) for pattern in allow)
        (allowed if is_allowed else refused).append(problem)
    return allowed, refused


def _refuse(refused: list[Problem], source: FilePath, config: Any, weights: families.Recognised) -> None:
    result('\n' + table(('problem', 'tensor', ''), refused[:MAX_ROWS]))
    if len(refused) > MAX_ROWS:
        result(f'... and {len(refused) - MAX_ROWS} more')
    kinds = ', '.join(f'{count} {kind}' for kind, count in Counter(kind for kind, _, _ in refused).items())
    raise UserError(
        f'{source} does not fit {config.name}: {kinds}; the first is {refused[0][1]} ({refused[0][2]}). '
        f'{_advice(refused, config, weights)}'
    )


def _advice(refused: list[Problem], config: Any, weights: families.Recognised) -> str:
    """The usual cause of such a mismatch, and what to do."""
    m = config.model
    theirs = families.size_of(weights)
    ours = _size(m.backbone, m.fpn_cells, m.fpn_channels, m.head_layers, weights.is_detector)
    if theirs != ours:
        members = [
            f'--config=configs/{name}.py'
            for name, s in SCALES.items()
            if _size(s.backbone, s.fpn_cells, s.fpn_channels, s.head_layers, weights.is_detector) == theirs
        ]
        advice = f'give {" or ".join(members)}' if members else 'no published model has that size'
        return f'The file has another model ({theirs}) than the config ({ours}): {advice}'
    in_file, classes = families.num_classes(weights, _num_anchors(config)), len(config.dataset.class_names)
    if classes and in_file not in (0, classes):
        return f'It has {in_file} classes, the config {classes}: for a new predictor add --allow=class_net/predict'
    if all(kind == 'missing' and name.endswith('bias') for kind, name, _ in refused):
        return (
            "effdet's own models (efficientdet_*, not tf_efficientdet_*) have no such biases and pad differently, so "
            'their outputs differ here; to start a training from them, add --allow=bias'
        )
    return 'Choose the matching config or file; to accept single tensors, name them in --allow=REGEX'


def _size(backbone: str, cells: int, channels: int, head_layers: int, is_detector: bool) -> families.ModelSize:
    variant = efficientnet.VARIANTS[backbone]
    blocks = len(efficientnet.block_table(variant))
    return families.ModelSize(blocks, not variant.lite, *((cells, channels, head_layers) if is_detector else (0, 0, 0)))


def _num_anchors(config: Any) -> int:
    return config.model.anchors.scales_per_octave * len(config.model.anchors.aspect_ratios)


def _print_summary(
    shapes: Any, matched: names.MatchedWeights, weights: families.Recognised, allowed: list[Problem]
) -> None:
    rows = []
    for part in dict.fromkeys(path[1] for path in shapes):
        loaded = [path for path in matched.arrays if path[1] == part]
        new = [path for path in shapes if path[1] == part and path not in matched.arrays]
        of_theirs = sum(len(matched.names[path]) for path in loaded)
        rows.append((part, of_theirs, *(sum(int(np.prod(shapes[p].shape)) for p in paths) for paths in (loaded, new))))
    info('\n' + table(('part', 'tensors', 'values loaded', 're-initialised'), rows))
    for kind, count in Counter(kind for kind, _, _ in allowed).items():
        info(f'allowed: {count} {kind}')
    for why, count in Counter(weights.unused.values()).items():
        info(f'not used: {count} tensors, {why}')
    if weights.family == 'timm':
        info(
            'note: only tf_efficientnet_* of timm give the same outputs here; others pad differently, so fine-tune them'
        )


def _provenance(
    source: FilePath, preset: str, matched: names.MatchedWeights, weights: families.Recognised, allowed: list[Problem]
) -> dict[str, Any]:
    """What happened to every tensor of the file."""
    return {
        'source': str(source),
        'family': weights.family,
        'preset': preset,
        'loaded': {'/'.join(path): matched.names[path] for path in matched.arrays},
        'allowed': allowed,
        'not used': weights.unused,
    }


def _write_json(path: FilePath, content: Any) -> None:
    write_atomically(path, (json.dumps(content, indent=1) + '\n').encode())


def _print_next_steps(workdir: FilePath, is_detector: bool) -> None:
    info(f'\n{workdir}: config.json  checkpoints/  import.json')
    if is_detector:
        info(f'detect:     python -m effdet_jax predict --workdir={workdir} --out=found IMAGES')
        info(f'evaluate:   python -m effdet_jax.main --workdir={workdir} --mode=eval')
    info(f'start from: python -m effdet_jax.main --config=... --workdir=runs/new --config.train.init_from={workdir}')
