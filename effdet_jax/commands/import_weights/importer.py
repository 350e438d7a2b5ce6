"""A checkpoint of another implementation -> a work directory that evaluates, detects and can be started from."""

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
from effdet_jax.errors import UserError
from effdet_jax.model import build_model, efficientnet
from effdet_jax.records.checkpoint import Checkpoints, has_checkpoints
from effdet_jax.records.console import info, result, table
from effdet_jax.records.files import write_atomically
from effdet_jax.training.state import init_variables
from effdet_jax.weights import certificate, families, names, readers

MAX_ROWS = 30  # of a table of problems; import.json and a run with --allow=. know the rest

ADVPROP_BACKBONES = ('b0', 'b1', 'b2', 'b3', 'b4', 'b5')  # of published detectors

Problem = tuple[str, str, str]  # kind, name to allow it by, what it is


def import_weights(
    config: Any,
    source: FilePath,
    workdir: FilePath,
    *,
    preset: str = 'auto',
    allow: Sequence[str] = (),
    reference: FilePath | None = None,
) -> None:
    """Fills `workdir` with the weights in `source` and the config they belong to. Nothing is written before all fits.

    Args:
      config: of the model that the file is of; its input statistics, anchors and NMS are set by the preset.
      source: a file that `readers.read` knows.
      preset: a name of `PRESETS`, or 'auto': by the family of the file and what its path says, see `choose_preset`.
      allow: regexes on names, ours or theirs, of tensors that may be missing (they keep their initial values), spare,
        or of another shape.
      reference: an .npz of reference outputs that must be met, see `certificate.read_reference`.

    Raises:
      UserError: where the file does not fit the model, naming every culprit; anything is not readable; or the preset
        cannot be told.
    """
    patterns = [_compile(pattern) for pattern in allow]
    if has_checkpoints(workdir):
        raise UserError(f'{workdir} holds checkpoints already: choose another --workdir')
    contents = readers.read(source)
    found = families.recognise(contents.arrays)
    if found.whole:
        _refuse_other_feature_networks(config)
    info(f'{source}: {found.family}, {families.size_of(found)}')
    preset = preset if preset != 'auto' else choose_preset(found, config, contents)
    settings = apply_preset(config, preset)
    name_classes(config, found)
    in_file = families.num_classes(found, _num_anchors(config))

    model = build_model(config.model, len(config.dataset.class_names) or max(in_file, 1))
    wanted = {
        path: shape
        for path, shape in traverse_util.flatten_dict(names.shapes_of(model)).items()
        if found.whole or path[1] == 'backbone'
    }
    matched = names.match(found.arrays, wanted, config.model.backbone, found.scheme)
    allowed, refused = _judge(_problems(matched), patterns)
    if refused:
        _refuse(refused, source, config, found)
    if found.whole and not config.dataset.class_names:
        raise UserError(
            f"{source} has {in_file} classes and no names for them: add --config.dataset.class_names=\"('a', 'b')\""
        )
    flat = dict(matched.arrays)
    if new := wanted.keys() - flat.keys():
        fresh = traverse_util.flatten_dict(init_variables(model, config.seed))
        flat |= {path: np.asarray(fresh[path]) for path in new}
    variables = traverse_util.unflatten_dict(flat)
    _say_what_was_loaded(wanted, matched, found, allowed)
    info(f'preset {preset}: {", ".join(f"{key}={value}" for key, value in settings.items()) or "nothing to set"}')
    certified = [] if reference is None else certify(model, variables, reference)

    try:
        run_config.save(config, workdir)
        _write_json(workdir / 'import.json', _account(source, preset, matched, found, allowed))
        if certified:
            _write_json(workdir / 'certificate.json', [row._asdict() for row in certified])
        checkpoints = Checkpoints(workdir, best=config.checkpoint.best)
        checkpoints.save(0, {'variables': variables}, {}, run_config.to_json(config))
        checkpoints.close()
    except OSError as error:
        raise UserError(f'{workdir} cannot be written ({error.strerror or error}): choose another --workdir') from error
    _say_what_next(workdir, found.whole)


def _refuse_other_feature_networks(config: Any) -> None:
    """Published detectors are of one kind; a backbone alone may go before any feature network."""
    published = {'name': 'bifpn', 'per_channel': False, 'separable': True}
    for key, value in published.items():
        if (given := config.model.feature_network[key]) != value:
            raise UserError(
                f'config.model.feature_network.{key}={given}: detectors can be imported only with {value}, other '
                'feature networks can be trained from an imported backbone'
            )


def choose_preset(found: families.Recognised, config: Any, contents: readers.Contents) -> str:
    """The file's family and variant as `PRESETS` names them. AdvProp and 640x640 stand in the path alone, if at all.

    Raises:
      UserError: for an official TensorFlow checkpoint of which nothing says whether it is AdvProp's: both are published
        under the same file names. A published .h5 is never AdvProp's.
    """
    family = found.family if found.whole else {'official': 'port', 'effdet': 'timm'}.get(found.family, found.family)
    if efficientnet.VARIANTS[config.model.backbone].lite:
        return f'{family}-lite'
    variant, part = families.variant_of(found.family, contents.path)
    if (preset := f'{family}-{variant}') in PRESETS:
        info(f'note: taken for {preset}, because of {part} in its path; otherwise give --preset={family}')
        return preset
    if not variant and config.model.backbone in ADVPROP_BACKBONES:
        advprop = f'{family}-advprop'
        if found.whole and found.family == 'official' and contents.format == 'tensorflow':
            raise UserError(
                f"{contents.path}: plain weights or AdvProp's? Their files are called the same, and neither coco2 nor "
                f'advprop is in the path: add --preset={family}, or --preset={advprop} for input from -1 to 1'
            )
        if contents.format != 'hdf5':
            info(f'note: taken for {family}: its path does not say AdvProp; for that give --preset={advprop}')
    return family


def apply_preset(config: Any, preset: str) -> dict[str, Any]:
    """Sets what the preset says, and returns it. A key that the user has given another value than usual stays."""
    lite = efficientnet.VARIANTS[config.model.backbone].lite
    member = config.name if config.name in SCALES else 'lite0' if lite else 'd0'
    usual = dict(run_config.flatten(default.get_config(member).to_dict()))
    given = dict(run_config.flatten(config.to_dict()))
    kept = {key: given[key] for key in PRESETS[preset] if given[key] not in (usual[key], PRESETS[preset][key])}
    for key, value in kept.items():
        info(f'note: {key}={value} is kept, where the preset {preset} has {PRESETS[preset][key]}')
    settings = {key: value for key, value in PRESETS[preset].items() if key not in kept}
    config.update_from_flattened_dict(settings)
    return settings


def name_classes(config: Any, found: families.Recognised) -> None:
    """Fills in class names and category ids where nobody has: COCO's, where the file has 90 classes."""
    d = config.dataset
    with config.unlocked():
        if not d.class_names and families.num_classes(found, _num_anchors(config)) == len(coco.CLASS_NAMES):
            d.class_names, d.category_ids = coco.CLASS_NAMES, coco.CATEGORY_IDS
        d.category_ids = tuple(d.category_ids) or tuple(range(1, len(d.class_names) + 1))


def certify(model: Any, variables: Any, reference: FilePath) -> list[certificate.Row]:
    """Prints and returns the differences from the reference outputs, layer by layer.

    Raises:
      UserError: where one is above the tolerance.
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
            f'{worst.name} differs from {reference} by {worst.relative:.1e} of its largest value, allowed are '
            f'{certificate.TOLERANCE:.0e}: nothing was imported'
        )
    result(f'certified: {len(rows)} outputs, the worst differs by {worst.relative:.1e} of its largest value')
    return rows


def _problems(matched: names.Match) -> Iterator[Problem]:
    for path, name in matched.missing.items():
        yield 'missing', '/'.join(path[1:]), f'the file has no {name}'
    for path, what in matched.misshapen.items():
        yield 'unfit', '/'.join(path[1:]), what
    for name in matched.spare:
        yield 'spare', name, 'the model has no place for it'


def _compile(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise UserError(f'--allow={pattern} is no regex ({error}): escape what is special, as in \\(') from error


def _judge(problems: Iterable[Problem], allow: Sequence[re.Pattern[str]]) -> tuple[list[Problem], list[Problem]]:
    """(allowed, refused): a regex may match the name, or what is said of it, which names theirs."""
    verdicts: tuple[list[Problem], list[Problem]] = ([], [])
    for problem in problems:
        _, name, what = problem
        verdicts[not any(pattern.search(f'{name} {what}') for pattern in allow)].append(problem)
    return verdicts


def _refuse(refused: list[Problem], source: FilePath, config: Any, found: families.Recognised) -> None:
    result('\n' + table(('problem', 'tensor', ''), refused[:MAX_ROWS]))
    if len(refused) > MAX_ROWS:
        result(f'... and {len(refused) - MAX_ROWS} more')
    kinds = ', '.join(f'{count} {kind}' for kind, count in Counter(kind for kind, _, _ in refused).items())
    raise UserError(
        f'{source} does not fit {config.name}: {kinds}, the first is {refused[0][1]} ({refused[0][2]}). '
        f'{_advice(refused, config, found)}'
    )


def _advice(refused: list[Problem], config: Any, found: families.Recognised) -> str:
    """What such a mismatch usually means, and the way out."""
    m = config.model
    theirs, ours = families.size_of(found), _size(m.backbone, m.cells, m.channels, m.head_layers, found.whole)
    if theirs != ours:
        members = [
            f'--config=configs/{name}.py'
            for name, s in SCALES.items()
            if _size(s.backbone, s.cells, s.channels, s.head_layers, found.whole) == theirs
        ]
        fitting = f'give {" or ".join(members)}' if members else 'no member of the family is of that size'
        return f'The file is of another model: {theirs}, and the config says {ours}: {fitting}'
    in_file, classes = families.num_classes(found, _num_anchors(config)), len(config.dataset.class_names)
    if classes and in_file not in (0, classes):
        return f'It has {in_file} classes, the config {classes}: for a new predictor add --allow=class_net/predict'
    if all(kind == 'missing' and name.endswith('bias') for kind, name, _ in refused):
        return (
            'Models that effdet trained itself (efficientdet_*, not tf_efficientdet_*) have no such biases; they also '
            'pad differently, so they make a start for training, not an equal: add --allow=bias'
        )
    return 'Take the right config or file; to accept single tensors as they are, name them in --allow=REGEX'


def _size(backbone: str, cells: int, channels: int, head_layers: int, whole: bool) -> families.Size:
    variant = efficientnet.VARIANTS[backbone]
    blocks = len(efficientnet.block_table(variant))
    return families.Size(blocks, not variant.lite, *((cells, channels, head_layers) if whole else (0, 0, 0)))


def _num_anchors(config: Any) -> int:
    return config.model.anchors.octaves * len(config.model.anchors.aspect_ratios)


def _say_what_was_loaded(shapes: Any, matched: names.Match, found: families.Recognised, allowed: list[Problem]) -> None:
    rows = []
    for part in dict.fromkeys(path[1] for path in shapes):
        loaded = [path for path in matched.arrays if path[1] == part]
        new = [path for path in shapes if path[1] == part and path not in matched.arrays]
        of_theirs = sum(len(matched.names[path]) for path in loaded)
        rows.append((part, of_theirs, *(sum(int(np.prod(shapes[p].shape)) for p in paths) for paths in (loaded, new))))
    info('\n' + table(('part', 'tensors', 'numbers loaded', 're-initialised'), rows))
    for kind, count in Counter(kind for kind, _, _ in allowed).items():
        info(f'allowed: {count} {kind}')
    for why, count in Counter(found.unused.values()).items():
        info(f'not used: {count} tensors, {why}')
    if found.family == 'timm':
        info('note: tf_efficientnet_* of timm compute the same here; those without tf_ pad differently: a start only')


def _account(
    source: FilePath, preset: str, matched: names.Match, found: families.Recognised, allowed: list[Problem]
) -> dict[str, Any]:
    """Where every tensor of the file went."""
    return {
        'source': str(source),
        'family': found.family,
        'preset': preset,
        'loaded': {'/'.join(path): matched.names[path] for path in matched.arrays},
        'allowed': allowed,
        'not used': found.unused,
    }


def _write_json(path: FilePath, content: Any) -> None:
    write_atomically(path, (json.dumps(content, indent=1) + '\n').encode())


def _say_what_next(workdir: FilePath, whole: bool) -> None:
    info(f'\n{workdir}: config.json  checkpoints/  import.json')
    if whole:
        info(f'detect:     python -m effdet_jax predict --workdir={workdir} --out=found IMAGES')
        info(f'evaluate:   python -m effdet_jax.main --workdir={workdir} --mode=eval')
    info(f'start from: python -m effdet_jax.main --config=... --workdir=runs/new --config.train.init_from={workdir}')
