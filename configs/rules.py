"""The allowed values of each config key: a row for every key of `default.py`, then rules between keys.

`config.check` applies both before anything starts. Configs do not import jax, so the names of backbones, losses and so
on are repeated here; tests/test_rules.py compares them with the tables in the code.
"""

import math
import operator
import re
from collections.abc import Callable
from typing import Any, NamedTuple


class Rule(NamedTuple):
    """advice: the end of the error message. accepts: whether a value, of any type, is allowed.

    normal: expands a short form, such as one number for a square image.
    """

    advice: str
    accepts: Callable[[Any], Any]
    normal: Callable[[Any], Any] = lambda value: value


# Kinds of values.


def whole(low: int, high: int | None = None) -> Rule:
    words, inside = _bounds(low, high)
    return Rule(f': give a whole number{words}', lambda value: is_whole(value) and inside(value))


def number(
    low: float | None = None, high: float | None = None, *, above: float | None = None, below: float | None = None
) -> Rule:
    words, inside = _bounds(low, high, above, below)
    return Rule(f': give a number{words}', lambda value: is_number(value) and inside(value))


def numbers(low: float) -> Rule:
    """As many as you like."""
    words, inside = _bounds(low)
    return Rule(f': give numbers{words}', lambda value: is_tuple(value, lambda x: is_number(x) and inside(x)))


def ascending(low: float, high: float) -> Rule:
    """Two numbers, the ends of a range."""
    words, inside = _bounds(low, high)
    return Rule(
        f': give two numbers{words}, the smaller one first',
        lambda value: is_tuple(value, lambda x: is_number(x) and inside(x), 2) and value[0] <= value[1],
    )


def per_channel(low: float | None = None, high: float | None = None, *, above: float | None = None) -> Rule:
    """Three numbers; a single one holds for every channel."""
    words, inside = _bounds(low, high, above)
    return Rule(
        f': give red, green and blue as numbers{words}, or one number for all three',
        lambda value: is_tuple(value, lambda x: is_number(x) and inside(x), 3),
        lambda value: _single(value) * 3 or value,
    )


def image_size(low: int, high: int) -> Rule:
    """Height and width. One number is a square, and so is 512x512; not 512x640, where some write the width first."""
    words, inside = _bounds(low, high)

    def normal(value: Any) -> Any:
        if not (single := _single(value)):
            return value
        square = re.fullmatch(r'(\d{1,9}) ?x ?\1', str(single[0]).lower())
        return (int(square[1]) if square else single[0],) * 2

    return Rule(
        f': give height and width in pixels, whole numbers{words}, as (480, 640), or one number for a square',
        lambda value: is_tuple(value, lambda x: is_whole(x) and inside(x), 2),
        normal,
    )


def one_of(*names: str) -> Rule:
    known = ', '.join(name or "''" for name in names)
    return Rule(f' is unknown: choose one of {known}', lambda value: isinstance(value, str) and value in names)


def optional(rule: Rule) -> Rule:
    return Rule(f'{rule.advice}, or None', lambda value: value is None or rule.accepts(value))


def is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    return (is_whole(value) or isinstance(value, float)) and abs(value) < math.inf  # NaN is not


def is_tuple(value: Any, accepts: Callable[[Any], Any], length: int | None = None) -> bool:
    return isinstance(value, tuple) and length in (None, len(value)) and all(map(accepts, value))


def is_aspect_ratio(value: Any) -> bool:
    """width / height, or a pair of factors."""
    factors = value if is_tuple(value, is_number, 2) else (value,)
    return all(is_number(factor) and factor > 0 for factor in factors)


def is_regex(value: Any) -> bool:
    try:
        return isinstance(value, str) and bool(re.compile(value))
    except (re.error, OverflowError):
        return False


def _bounds(
    low: float | None, high: float | None = None, above: float | None = None, below: float | None = None
) -> tuple[str, Callable[[Any], bool]]:
    """(' from 0 to 1', whether a number lies there); `above` and `below` are bounds that are outside themselves."""
    every = (
        ('from', low, operator.ge),
        ('above', above, operator.gt),
        ('to', high, operator.le),
        ('to below', below, operator.lt),
    )
    given = [(word, bound, holds) for word, bound, holds in every if bound is not None]
    words = ''.join(f' {word} {bound}' for word, bound, _ in given)
    return words, lambda x: all(holds(x, bound) for _, bound, holds in given)


def _single(value: Any) -> tuple[Any, ...]:
    """(512,) for 512 and for (512,), () for anything longer or shorter."""
    items = value if isinstance(value, tuple) else (value,)
    return items if len(items) == 1 else ()


BOOL = Rule(': give True or False', lambda value: isinstance(value, bool))
TEXT = Rule(': give text', lambda value: isinstance(value, str))
PROBABILITY = number(0, 1)

# The table.

RULES: dict[str, Rule] = {
    'name': TEXT,
    'seed': whole(0, 2**32 - 1),
    'image.size': image_size(8, 16384),
    'image.mean': per_channel(0, 255),
    'image.std': per_channel(above=0),
    'image.padding': number(),
    'model.backbone': one_of(
        'b0', 'b1', 'b2', 'b3', 'b4', 'b5', 'b6', 'b7', 'lite0', 'lite1', 'lite2', 'lite3', 'lite4', 'nano'
    ),
    'model.feature_network.name': one_of('bifpn', 'fpn', 'panet', 'nasfpn', 'qufpn', 'fully_connected'),
    'model.feature_network.fusion': one_of('fast', 'softmax', 'sum'),
    'model.feature_network.per_channel': BOOL,
    'model.feature_network.separable': BOOL,
    'model.fpn_channels': whole(1),
    'model.fpn_cells': whole(1),
    'model.head_layers': whole(0),
    'model.max_level': whole(5, 10),
    'model.stochastic_depth': number(0, below=1),
    'model.anchors.scale': number(above=0),
    'model.anchors.scales_per_octave': whole(1),
    'model.anchors.aspect_ratios': Rule(
        ': give at least one width / height, as (1.0, 2.0, 0.5), or pairs of factors, as ((1.4, 0.7), (0.7, 1.4))',
        lambda value: value and is_tuple(value, is_aspect_ratio),
    ),
    'model.dtype': one_of('float32', 'bfloat16'),
    'model.remat': BOOL,
    'dataset.source': TEXT,
    'dataset.train_split': TEXT,
    'dataset.eval_split': TEXT,
    'dataset.class_names': Rule(
        ": give every class a name of its own, as ('cup', 'plate'), or () for those of the data",
        lambda value: is_tuple(value, TEXT.accepts) and len({*value}) == len(value),
    ),
    'dataset.category_ids': Rule(
        ': give every class a whole number of its own, as (1, 2), or () for those of the data',
        lambda value: is_tuple(value, is_whole) and len({*value}) == len(value),
    ),
    'dataset.accepted_fingerprint': TEXT,
    'dataset.max_boxes': whole(1),
    'dataset.max_unreadable_fraction': number(0, 1),
    'dataset.threads': whole(0),
    'dataset.prefetch': whole(0),
    'dataset.cache_gb': number(0),
    'augment.scale': ascending(0.01, 10),
    'augment.flip': BOOL,
    'augment.mosaic.probability': PROBABILITY,
    'augment.rand_augment.probability': PROBABILITY,
    'augment.rand_augment.layers': whole(1, 10),
    'augment.rand_augment.magnitude': number(0, 10),
    'augment.mixup.probability': PROBABILITY,
    'augment.mixup.alpha': number(0.01, 1000),
    'augment.color_jitter.probability': PROBABILITY,
    'augment.color_jitter.brightness': number(0, 1),
    'augment.color_jitter.contrast': number(0, 1),
    'augment.color_jitter.saturation': number(0, 1),
    'augment.color_jitter.hue': number(0, 0.5),
    'augment.erasing.probability': PROBABILITY,
    'augment.erasing.area': ascending(0, 1),
    'augment.erasing.aspect': ascending(0.01, 100),
    'loss.alpha': number(0, 1),
    'loss.gamma': number(0),
    'loss.label_smoothing': number(0, below=1),
    'loss.delta': number(above=0),
    'loss.box_weight': number(0),
    'loss.iou_kind': one_of('iou', 'giou', 'diou', 'ciou', ''),
    'loss.iou_weight': number(0),
    'loss.l2': number(0),
    'loss.match_threshold': number(above=0, high=1),
    'adversarial.weight': number(0, 100),
    'adversarial.epsilon': number(0, 255),
    'train.epochs': number(above=0),
    'train.batch_size': whole(1),
    'train.gradient_accumulation_steps': whole(1),
    'train.ema_decay': number(0, below=1),
    'train.max_skipped_steps': whole(1),
    'train.init_from': TEXT,
    'train.freeze': Rule(' is no regular expression: give one, as backbone, or backbone|fpn', is_regex),
    'train.unfreeze_epoch': optional(number(0)),
    'optimizer.name': one_of('sgd', 'adam', 'adamw'),
    'optimizer.momentum': number(0, below=1),
    'optimizer.weight_decay': number(0),
    'optimizer.clip_norm': number(0),
    'optimizer.clip_each': BOOL,
    'schedule.learning_rate': number(above=0),
    'schedule.warmup_init_rate': number(0),
    'schedule.scale_with_batch': BOOL,
    'schedule.warmup_epochs': number(0),
    'schedule.decay': one_of('cosine', 'step', 'constant'),
    'schedule.step_epochs': numbers(0),
    'schedule.final_rate': number(0),
    'eval.batch_size': whole(1),
    'eval.every_epochs': number(above=0),
    'eval.pictures': whole(0),
    'eval.per_class_nms': BOOL,
    'eval.max_candidates': whole(1),
    'eval.nms': one_of('gaussian', 'hard'),
    'eval.nms_iou_threshold': number(0, 1),
    'eval.sigma': number(above=0),
    'eval.score_threshold': number(0, 1),
    'eval.max_detections': whole(1),
    'checkpoint.every_epochs': number(above=0),
    'checkpoint.keep': whole(1),
    'checkpoint.best': one_of(
        'eval/AP', 'eval/AP50', 'eval/AP75', 'eval/AP_small', 'eval/AP_medium', 'eval/AP_large', 'eval/AR100',
        'eval/VOC07_AP50', 'eval/VOC_AP50',
    ),
    'log.every_steps': whole(1),
    'log.wandb': TEXT,
}  # fmt: skip

# {old name: new name} of renamed keys. `config.load` reads old work directories with it.
RENAMED = {
    'model.feature_network': 'model.feature_network.name',
    'model.fusion': 'model.feature_network.fusion',
    'model.channels': 'model.fpn_channels',
    'model.cells': 'model.fpn_cells',
    'model.anchors.octaves': 'model.anchors.scales_per_octave',
    'dataset.fingerprint': 'dataset.accepted_fingerprint',
    'dataset.max_unreadable': 'dataset.max_unreadable_fraction',
    'train.accumulate': 'train.gradient_accumulation_steps',
    'train.max_skipped': 'train.max_skipped_steps',
    'schedule.warmup_start': 'schedule.warmup_init_rate',
    'eval.per_class': 'eval.per_class_nms',
    'eval.iou_threshold': 'eval.nms_iou_threshold',
}


def use_new_name(old: str) -> str:
    """The error message for an old name."""
    return f'config.{old} is now config.{RENAMED[old]}: use that name'


GROUP = 4  # images mixed by mosaic and MixUp

# (keys, condition on their values, advice if it fails). Conditions on the number of devices are checked in the code.
AGREEMENTS: tuple[tuple[tuple[str, ...], Callable[..., Any], str], ...] = (
    (
        ('train.batch_size', 'train.gradient_accumulation_steps'),
        lambda batch, parts: batch % parts == 0,
        'choose a batch size that is a multiple of gradient_accumulation_steps',
    ),
    *(
        (
            ('train.batch_size', f'augment.{name}.probability'),
            lambda batch, probability: batch % GROUP == 0 or not probability,
            f'{name} mixes groups of {GROUP} images, so choose a batch size that is a multiple of {GROUP}',
        )
        for name in ('mosaic', 'mixup')
    ),
    (
        ('model.feature_network.name', 'model.max_level'),
        lambda name, level: name != 'nasfpn' or level in (7, 8),
        'nasfpn was found for P3-P7, so choose max_level 7 or 8',
    ),
    (
        ('model.feature_network.fusion', 'model.feature_network.per_channel'),
        lambda fusion, per_channel: fusion != 'sum' or not per_channel,
        'sum has no weights, so choose the fusion fast or softmax',
    ),
    (
        ('dataset.class_names', 'dataset.category_ids'),
        lambda names, ids: not names or not ids or len(names) == len(ids),
        'give as many ids as names, or leave one of them to the data',
    ),
)
