"""Every key of the config: what is refused in one line, what is accepted, and names that the code knows."""

import functools
import itertools
import math
import operator

import jax
import jax.numpy as jnp
import pytest

from effdet_jax import config as run_config
from effdet_jax import evaluate
from effdet_jax.configs import default, presets, recipes, rules, scaling
from effdet_jax.detection import losses, nms
from effdet_jax.errors import UserError
from effdet_jax.model import efficientdet, efficientnet, feature_network
from effdet_jax.training import optimizer
from effdet_jax.training.augmentations import mixing, rand_augment

DEFAULTS = dict(run_config.flatten(default.get_config('d0').to_dict()))
FOREVER = 10**30  # where there is no upper bound


def check(**changes):
    """The config after `changes` to the default, of any type, and after the check."""
    tree = default.get_config('d0').to_dict()
    for key, value in changes.items():  # past the types that a ConfigDict insists on
        *path, last = key.split('.')
        functools.reduce(operator.getitem, path, tree)[last] = value
    config = default.ConfigDict(tree, type_safe=False)
    run_config.check(config)
    return dict(run_config.flatten(config.to_dict()))


def assert_refused(key, value):
    with pytest.raises(UserError) as refused:
        check(**{key: value})
    message = str(refused.value)
    assert message.startswith(f'config.{key}={value!r}')
    assert ': give ' in message or ': choose one of ' in message
    assert '\n' not in message


# (keys, accepted, refused), at both ends.
NUMBERS = [
    (
        'model.fpn_channels model.fpn_cells model.anchors.scales_per_octave dataset.max_boxes train.batch_size '
        'train.max_skipped_steps eval.batch_size eval.max_candidates eval.max_detections checkpoint.keep '
        'log.every_steps',
        (1, FOREVER), (0, -8),
    ),
    ('model.head_layers dataset.threads dataset.prefetch eval.pictures', (0, FOREVER), (-1,)),
    (
        'model.anchors.scale loss.delta train.epochs schedule.learning_rate eval.every_epochs eval.sigma '
        'checkpoint.every_epochs',
        (0.01, FOREVER), (0.0, -0.01),
    ),
    (
        'dataset.cache_gb loss.gamma loss.box_weight loss.iou_weight loss.l2 optimizer.weight_decay '
        'optimizer.clip_norm schedule.warmup_init_rate schedule.warmup_epochs schedule.final_rate',
        (0, FOREVER), (-1e-5,),
    ),
    (
        'dataset.max_unreadable_fraction augment.mosaic.probability augment.rand_augment.probability '
        'augment.mixup.probability augment.color_jitter.probability augment.erasing.probability '
        'augment.color_jitter.brightness augment.color_jitter.contrast augment.color_jitter.saturation '
        'loss.alpha eval.nms_iou_threshold eval.score_threshold',
        (0, 1), (-0.01, 1.01),
    ),
    ('model.stochastic_depth loss.label_smoothing train.ema_decay optimizer.momentum', (0, 0.9), (-0.1, 1.0)),
    ('seed', (0, 2**32 - 1), (-1, 2**32)),
    ('image.padding', (-1.0, 0, 2.5), ()),
    ('model.max_level', (5, 10), (2, 4, 11)),
    ('augment.rand_augment.layers', (1, 10), (0, 11)),
    ('augment.rand_augment.magnitude', (0, rand_augment.MAX_MAGNITUDE), (-0.1, 10.1)),
    ('augment.mixup.alpha', (0.01, 1000), (0.0, 1000.1)),
    ('augment.color_jitter.hue', (0, 0.5), (-0.1, 0.6)),
    ('loss.match_threshold', (0.1, 1), (0.0, 1.1)),
    ('adversarial.weight', (0, 100), (-0.1, 100.1)),
    ('adversarial.epsilon', (0, 255), (-0.1, 256.0)),
    ('train.gradient_accumulation_steps', (1, 64), (0, -1)),
    ('train.unfreeze_epoch', (0, None, FOREVER), (-1.0,)),
]  # fmt: skip

TUPLES = {
    'image.size': (
        ((8, 16384), (480, 640)),
        ((), (7, 512), (512, 16385), (512, 512, 3), (512.0, 512.0), (512, None), ('512', '512'), ('512x640',)),
    ),
    'image.mean': (((0, 255, 127.5),), ((), (127, 127), (1, 2, 3, 4), (-1, 0, 0), (0, 0, 256), (None,), ('grey',))),
    'image.std': (((1, 0.5, 58.4), (1000,) * 3), ((), (58, 58), (0, 1, 1), (-58.4,), (0,), (True,))),
    'model.anchors.aspect_ratios': (
        ((1.0,), (1.0, 2, 0.5), ((1.0, 1.0), (1.4, 0.7))),
        ((), (0.0,), (-1.0, 1.0), ('1:2',), ((1.4, 0.7, 1.0),), ((1.4,),), ((),), ((1.4, 0.0),), (None,)),
    ),
    'dataset.class_names': (((), ('cup',), ('cup', 'plate')), (('cup', 'cup'), (1, 2), (None,))),
    'dataset.category_ids': (((), (0,), (7, 3)), ((1, 1), (1.0, 2.0), ('1', '2'), (None,), (True,))),
    'augment.scale': (((0.01, 10), (1, 1)), ((), (1.0,), (2, 1), (0.0, 1.0), (0.1, 10.1), (0.1, 1.0, 2.0), (1, '2'))),
    'augment.erasing.area': (((0, 1),), ((0.5, 0.1), (-0.1, 0.2), (0.0, 1.1), (0.2,))),
    'augment.erasing.aspect': (((0.01, 100),), ((3.3, 0.3), (0.0, 1.0), (1.0, 101.0), (1.0,))),
    'schedule.step_epochs': (((), (0,), (200.0, 250.0)), ((-1.0,), ('200',), (None,))),
}

TEXTS = (
    'name', 'dataset.source', 'dataset.train_split', 'dataset.eval_split', 'dataset.accepted_fingerprint',
    'train.init_from', 'log.wandb',
)  # fmt: skip

# {key: the names that the code knows}
NAMES = {
    'model.backbone': efficientnet.VARIANTS,
    'model.feature_network.name': feature_network.FEATURE_NETWORKS,
    'model.feature_network.fusion': feature_network.FUSIONS,
    'model.dtype': efficientdet.DTYPES,
    'loss.iou_kind': [*losses.IOU_PENALTIES, ''],
    'optimizer.name': optimizer.OPTIMIZERS,
    'schedule.decay': ['cosine', 'step', 'constant'],
    'eval.nms': ['gaussian', 'hard'],
    'checkpoint.best': [f'eval/{name}' for name in evaluate.SUMMARY],
}

SWITCHES = [key for key, value in DEFAULTS.items() if isinstance(value, bool)]


def test_every_key_has_a_rule_and_a_test_and_no_other_has():
    assert rules.RULES.keys() == DEFAULTS.keys()
    numbers = [key for keys, *_ in NUMBERS for key in keys.split()]
    tested = [*numbers, *TUPLES, *TEXTS, *NAMES, *SWITCHES, 'train.freeze']
    assert sorted(tested) == sorted(DEFAULTS)


def test_no_member_data_set_recipe_or_preset_breaks_a_rule():
    words = [','.join(pair) for pair in itertools.product(default.DATASETS, recipes.RECIPES)]
    changes = [*((w, {}) for w in words), *((words[0], s) for s in presets.PRESETS.values())]
    for name, (words_of_config, settings) in itertools.product(scaling.SCALES, changes):
        config = default.get_config(name, words_of_config)
        config.update_from_flattened_dict(settings)
        before = config.to_dict()
        run_config.check(config)
        assert config.to_dict() == before


def test_a_value_of_another_type_is_refused():
    for key in DEFAULTS:
        others = [object(), b'512', 1j, [1], math.nan, math.inf, -math.inf, (math.nan,) * 3, ((),)]
        others += [] if key == 'train.unfreeze_epoch' else [None]
        others += [] if key in (*TEXTS, 'train.freeze') else ['many', *[''] * (key != 'loss.iou_kind')]  # '': none
        others += [True] if key not in SWITCHES else []
        others += [1, 0.5] if key in (*SWITCHES, *TEXTS, *NAMES) else []
        for value in others:
            assert_refused(key, value)


@pytest.mark.parametrize(('keys', 'accepted', 'refused'), [*NUMBERS, *((key, *row) for key, row in TUPLES.items())])
def test_numbers_in_their_range(keys, accepted, refused):
    for key in keys.split():
        for value in accepted:
            assert check(**{key: value})[key] == value
        for value in refused:
            assert_refused(key, value)


def test_names_are_those_that_the_code_knows():
    for key, names in NAMES.items():
        for name in names:
            assert check(**{key: name})[key] == name
        assert_refused(key, 'soft')
        with pytest.raises(UserError, match=r"'soft' is unknown: choose one of (.*)") as refused:
            check(**{key: 'soft'})
        shown = str(refused.value).rpartition(' of ')[2].split(', ')
        assert sorted(shown) == sorted(name or "''" for name in names)


def test_names_that_no_table_holds_work():
    for decay in NAMES['schedule.decay']:
        schedule = default.get_config('d0').schedule
        schedule.decay = decay
        assert optimizer.make_schedule(schedule, 64, 10, 100)(99) >= 0
    for kind in NAMES['eval.nms']:
        kept = nms.nms(jnp.array([[0.0, 0, 2, 2]]), jnp.ones(1), jnp.zeros(1, int), kind=kind, max_outputs=1)
        assert jax.device_get(kept.indices).tolist() == [0]


def test_bounds_are_those_of_the_code():
    assert rules.GROUP == mixing.GROUP
    assert efficientdet.BACKBONE_LEVELS[-1] == 5  # as model.max_level above


def test_a_regex_that_is_none():
    assert check(**{'train.freeze': 'backbone|fpn'})['train.freeze'] == 'backbone|fpn'
    for pattern in ('back(bone', '*', 'a{99999999999999999999}'):
        with pytest.raises(UserError, match=r'config\.train\.freeze=.* is no regular expression: give one'):
            check(**{'train.freeze': pattern})


def test_one_number_is_a_square_and_holds_for_every_channel():
    for written in (512, (512,), ('512x512',), ('512X512',), ('512 x 512',), (512, 512)):
        assert check(**{'image.size': written})['image.size'] == (512, 512)
    for key in ('image.mean', 'image.std'):
        for written in (127, (127,), (127, 127, 127)):
            assert check(**{key: written})[key] == (127, 127, 127)


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({'train.batch_size': 64, 'train.gradient_accumulation_steps': 3}, 'a multiple of gradient_accumulation_steps'),
        ({'train.batch_size': 6, 'augment.mosaic.probability': 0.5}, 'mosaic mixes groups of 4 images'),
        ({'train.batch_size': 6, 'augment.mixup.probability': 0.5}, 'mixup mixes groups of 4 images'),
        ({'model.feature_network.name': 'nasfpn', 'model.max_level': 6}, 'choose max_level 7 or 8'),
        (
            {'model.feature_network.fusion': 'sum', 'model.feature_network.per_channel': True},
            'choose the fusion fast or softmax',
        ),
        ({'dataset.class_names': ('cup', 'plate'), 'dataset.category_ids': (1,)}, 'as many ids as names'),
    ],
)
def test_values_that_do_not_go_together(changes, message):
    shown = ' and '.join(f'config.{key}={value!r}' for key, value in changes.items())
    with pytest.raises(UserError) as refused:
        check(**changes)
    assert str(refused.value).startswith(f'{shown} do not go together: ')
    assert message in str(refused.value)


@pytest.mark.parametrize(
    'changes',
    [
        {
            'train.batch_size': 12,
            'train.gradient_accumulation_steps': 3,
            'augment.mosaic.probability': 1,
            'augment.mixup.probability': 1,
        },
        {'train.batch_size': 6, 'augment.erasing.probability': 1},
        {'model.feature_network.name': 'nasfpn', 'model.max_level': 8},
        {'model.feature_network.fusion': 'softmax', 'model.feature_network.per_channel': True},
        {'dataset.class_names': ('cup', 'plate'), 'dataset.category_ids': (7, 1)},
        {'dataset.category_ids': (7, 1)},  # of classes that the data name
    ],
)
def test_values_that_go_together(changes):
    assert check(**changes) == DEFAULTS | changes


def test_only_the_keys_asked_for_are_checked():
    config = default.get_config('d0')
    config.train.update(epochs=-1.0, gradient_accumulation_steps=7)
    run_config.check(config, run_config.DETECTOR_KEYS)
    with pytest.raises(UserError, match=r'config\.train\.epochs=-1\.0: give a number above 0'):
        run_config.check(config)
