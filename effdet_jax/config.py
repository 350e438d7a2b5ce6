"""The config of a run: checked, on disk, and proof that every key of it is used."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from effdet_jax.configs import default, rules
from effdet_jax.errors import UserError
from effdet_jax.records.files import write_atomically

# May differ when a run continues: none of these changes what is learned.
FREE_KEYS = (
    'log.', 'checkpoint.', 'eval.', 'dataset.threads', 'dataset.prefetch', 'dataset.cache_gb',
    'dataset.max_unreadable_fraction', 'dataset.accepted_fingerprint', 'train.max_skipped_steps',
)  # fmt: skip

# May differ too, but the user is told what the change means. What was learned so far stays valid.
TOLD_KEYS = {
    'train.epochs': 'from here on the learning rate follows the new schedule',
    'dataset.source': 'the training images must be the same',
    'dataset.train_split': 'the training images must be the same',
    'dataset.eval_split': 'evaluations from here on do not compare with earlier ones if the images are others',
    'dataset.category_ids': 'results are written with these numbers',
}

# What a checkpoint means: these must agree to use it at all.
NETWORK_KEYS = ('model.', 'image.', 'dataset.class_names')

# What a detector is made of beside its weights.
DETECTOR_KEYS = (
    *NETWORK_KEYS, 'dataset.category_ids', 'checkpoint.best', 'eval.nms', 'eval.per_class_nms', 'eval.max_candidates',
    'eval.max_detections', 'eval.nms_iou_threshold', 'eval.sigma', 'eval.score_threshold',
)  # fmt: skip


def check(config: ConfigDict, only: tuple[str, ...] = ('',)) -> None:
    """Checks every key that starts with one of `only` by configs/rules.py, and turns short forms into full ones.

    Raises:
      UserError: for the first key that is missing or wrong, then for the first keys that do not go together.
    """
    given, values = dict(flatten(config.to_dict())), {}
    for old in rules.RENAMED:
        if old in given:
            raise UserError(rules.use_new_name(old))
    for key, rule in rules.RULES.items():
        if key.startswith(only):
            if key not in given:
                raise UserError(f'config.{key} is missing: start from effdet_jax.configs.default.get_config')
            values[key] = rule.normal(given[key])
            if not rule.accepts(values[key]):
                raise UserError(f'config.{key}={given[key]!r}{rule.advice}')
    for keys, holds, advice in rules.AGREEMENTS:
        if values.keys() >= {*keys} and not holds(*(values[key] for key in keys)):
            shown = ' and '.join(f'config.{key}={values[key]!r}' for key in keys)
            raise UserError(f'{shown} do not go together: {advice}')
    config.update_from_flattened_dict({key: value for key, value in values.items() if value != given[key]})


class Recorded:
    """A read-only view of a config that remembers which keys were read. Attribute access, as with the config itself."""

    def __init__(self, config: ConfigDict) -> None:
        self._values = {
            key: Recorded(value) if isinstance(value, ConfigDict) else value for key, value in config.items()
        }
        self._read: set[str] = set()

    def __getattr__(self, key: str) -> Any:
        if key.startswith('_') or key not in self._values:
            raise AttributeError(key)
        self._read.add(key)
        return self._values[key]

    def __repr__(self) -> str:
        return repr(self._values)

    def unread(self) -> Iterator[str]:
        """Dotted names of the keys that nothing has read."""
        for key, value in self._values.items():
            if isinstance(value, Recorded):
                yield from (f'{key}.{inner}' for inner in value.unread())
            elif key not in self._read:
                yield key


def refuse_unread(config: Recorded) -> None:
    """Raises UserError where a key was read by nobody: an option that does nothing is a mistake."""
    if unread := sorted(config.unread()):
        raise UserError(
            f'nothing reads these config keys: {", ".join(unread)}; see configs/default.py for those there are'
        )


def to_json(config: ConfigDict) -> dict[str, Any]:
    """The config as JSON sees it (lists for tuples), so that it can be compared with one that was read."""
    return json.loads(json.dumps(config.to_dict()))


def save(config: ConfigDict, workdir: Path) -> None:
    write_atomically(workdir / 'config.json', (json.dumps(to_json(config), indent=2) + '\n').encode())


def load(workdir: Path) -> Any:  # a ConfigDict, whose keys no type checker knows
    """The config that a work directory was trained with.

    Raises:
      UserError: where there is none, or it is damaged.
    """
    path = workdir / 'config.json'
    if not path.is_file():
        raise UserError(f'{path} does not exist: give the --workdir of a training run')
    config = default.get_config('d0')  # for keys that are younger than the run
    try:
        saved = dict(flatten(json.loads(path.read_text(encoding='utf-8'))))
        if not saved:
            raise ValueError('no keys')
        with config.unlocked():
            config.update_from_flattened_dict(
                {rules.RENAMED.get(key, key): _as_tuple(value) for key, value in saved.items()}
            )
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{path} is damaged ({error}): restore it from a checkpoint's config/") from error
    return config


def load_detector(workdir: Path) -> Any:  # as `load`
    """The config of a run that is to detect. Only `DETECTOR_KEYS` are checked: its training is over.

    Raises:
      UserError: as `load`, and for a value that a detector cannot be made of.
    """
    config = load(workdir)
    try:
        check(config, DETECTOR_KEYS)
    except UserError as error:
        raise UserError(f'{workdir / "config.json"}: {error}') from error
    return config


def _as_tuple(value: Any) -> Any:
    """JSON has lists where a config has tuples."""
    return tuple(map(_as_tuple, value)) if isinstance(value, list) else value


def refuse_another(config: ConfigDict, workdir: Path, only: tuple[str, ...] = ('',)) -> None:
    """Raises UserError where the work directory's config differs in a key that starts with one of `only`."""
    if not (workdir / 'config.json').exists():
        return
    different = [
        f'{key}: {theirs!r} there, {ours!r} now'
        for key, theirs, ours in differences(load(workdir), config, only)
        if not key.startswith(FREE_KEYS) and key not in TOLD_KEYS
    ]
    if different:
        raise UserError(
            f'{workdir} belongs to a run with another config ({"; ".join(different)}): choose another --workdir, or '
            'leave --config away to use its own'
        )


def changes_to_tell(config: ConfigDict, workdir: Path) -> list[str]:
    """A line for each key of `TOLD_KEYS` that differs from the work directory's config; none without a run there."""
    if not (workdir / 'config.json').exists():
        return []
    return [
        f'config.{key} changes from {theirs!r} to {ours!r}: {TOLD_KEYS[key]}'
        for key, theirs, ours in differences(load(workdir), config)
        if key in TOLD_KEYS
    ]


def differences(a: ConfigDict, b: ConfigDict, only: tuple[str, ...] = ('',)) -> Iterator[tuple[str, Any, Any]]:
    """(dotted key, value in a, value in b) where they differ, of the keys that start with one of `only`."""
    in_a, in_b = (dict(flatten(to_json(config))) for config in (a, b))
    for key in sorted(in_a.keys() | in_b.keys()):
        if key.startswith(only) and in_a.get(key) != in_b.get(key):
            yield key, in_a.get(key), in_b.get(key)


def flatten(tree: Mapping[str, Any], prefix: str = '') -> Iterator[tuple[str, Any]]:
    """(dotted name, value) of every leaf."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f'{prefix}{key}.')
        else:
            yield prefix + key, value
