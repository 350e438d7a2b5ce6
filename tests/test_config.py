import functools
import importlib
import json
import operator

import pytest
import tiny
from absl.flags import Error, FlagValues
from ml_collections import config_flags
from processes import ROOT, printed_by

from effdet_jax import config as run_config
from effdet_jax.commands import cli
from effdet_jax.configs import bccd, default, own_data, rules, scaling
from effdet_jax.errors import UserError

NO_RUNS = ('__init__', 'default', 'recipes', 'scaling', 'presets', 'coco', 'saved', 'rules')
FILES = sorted(path.stem for path in (ROOT / 'configs').glob('*.py') if path.stem not in NO_RUNS)

# docs/reference.md, Models: size, backbone, channels, cells, head layers, anchor scale, fusion, last level, stochastic
# depth
FAMILY = {
    'd0': (512, 'b0', 64, 3, 3, 4, 'fast', 7, 0.0),
    'd1': (640, 'b1', 88, 4, 3, 4, 'fast', 7, 0.2),
    'd2': (768, 'b2', 112, 5, 3, 4, 'fast', 7, 0.2),
    'd3': (896, 'b3', 160, 6, 4, 4, 'fast', 7, 0.2),
    'd4': (1024, 'b4', 224, 7, 4, 4, 'fast', 7, 0.2),
    'd5': (1280, 'b5', 288, 7, 4, 4, 'fast', 7, 0.2),
    'd6': (1280, 'b6', 384, 8, 5, 4, 'sum', 7, 0.2),
    'd7': (1536, 'b6', 384, 8, 5, 5, 'sum', 7, 0.2),
    'd7x': (1536, 'b7', 384, 8, 5, 4, 'sum', 8, 0.2),
    'lite0': (320, 'lite0', 64, 3, 3, 3, 'sum', 7, 0.2),
    'lite1': (384, 'lite1', 88, 4, 3, 3, 'sum', 7, 0.2),
    'lite2': (448, 'lite2', 112, 5, 3, 3, 'sum', 7, 0.2),
    'lite3': (512, 'lite3', 160, 6, 4, 4, 'sum', 7, 0.2),
    'lite3x': (640, 'lite3', 200, 6, 4, 3, 'sum', 7, 0.2),
    'lite4': (640, 'lite4', 224, 7, 4, 4, 'sum', 7, 0.2),
}


def get_config(name, *preset):
    return importlib.import_module(f'effdet_jax.configs.{name}').get_config(*preset)


# The config files.


@pytest.mark.parametrize('name', FAMILY)
def test_the_family(name):
    c = get_config(name)
    size, backbone, channels, cells, layers, anchor_scale, fusion, max_level, stochastic_depth = FAMILY[name]
    assert c.name == name
    assert c.image.size == (size, size)
    assert c.model.to_dict() == {
        'backbone': backbone, 'fpn_channels': channels, 'fpn_cells': cells,
        'feature_network': {'name': 'bifpn', 'fusion': fusion, 'per_channel': False, 'separable': True},
        'head_layers': layers, 'max_level': max_level, 'stochastic_depth': stochastic_depth,
        'anchors': {'scale': anchor_scale, 'scales_per_octave': 3, 'aspect_ratios': (1.0, 2.0, 0.5)},
        'dtype': 'float32', 'remat': False,
    }  # fmt: skip
    lite = name.startswith('lite')
    assert c.image.mean == pytest.approx((127,) * 3 if lite else [255 * m for m in (0.485, 0.456, 0.406)])
    assert c.image.std == pytest.approx((128,) * 3 if lite else [255 * s for s in (0.229, 0.224, 0.225)])
    assert c.train.epochs == (600 if name in ('d7', 'd7x') else 300)


def test_the_table_holds_the_family_and_one_more():
    assert scaling.SCALES.keys() - FAMILY.keys() == {'nano'}


@pytest.mark.parametrize('name', FILES)
def test_every_config_file_has_the_keys_of_the_default(name):
    ours, keys = (dict(run_config.flatten(c.to_dict())) for c in (get_config(name), default.get_config('d0')))
    assert ours.keys() == keys.keys()
    run_config.to_json(get_config(name))  # no function, no array: it can be stored
    run_config.check(get_config(name))


# docs/reference.md, Optimization; docs/seed_report.md, Training.
@pytest.mark.parametrize(
    ('words', 'facts'),
    [
        ('', {'dataset.source': 'shapes', 'train.epochs': 600.0}),
        ('voc2007', {'dataset.source': 'tfds:voc/2007', 'dataset.eval_split': 'test'}),
        ('voc0712', {'dataset.source': 'tfds:voc/2007 + tfds:voc/2012', 'dataset.eval_split': 'tfds:voc/2007@test'}),
        ('coco2017', {'dataset.train_split': 'train', 'dataset.eval_split': 'validation'}),
        ('own', {'dataset.source': '', 'optimizer.name': 'sgd'}),
        ('official', {'train.batch_size': 64, 'schedule.learning_rate': 0.08, 'train.ema_decay': 0.9998,
                      'optimizer.name': 'sgd', 'optimizer.clip_norm': 10.0, 'loss.l2': 4e-5}),
        ('effdet', {'train.batch_size': 32, 'train.epochs': 300.0, 'schedule.final_rate': 1e-5,
                    'schedule.learning_rate': 0.09, 'optimizer.weight_decay': 4e-5, 'loss.l2': 0.0}),
        ('report', {'train.epochs': 200.0, 'train.freeze': 'backbone', 'train.unfreeze_epoch': 50.0,
                    'schedule.learning_rate': 1e-3, 'loss.delta': 1.0, 'optimizer.name': 'adam'}),
        ('short', {'train.epochs': 40.0, 'optimizer.name': 'adamw', 'augment.scale': (0.7, 1.4)}),
    ],
)  # fmt: skip
def test_words_choose_the_data_and_the_recipe(words, facts):
    config = dict(run_config.flatten(get_config('d7', *filter(None, [words])).to_dict()))
    assert facts.items() <= config.items()
    assert (config['image.size'], config['model.anchors.scale']) == ((1536, 1536), 5.0)  # the member's own


@pytest.mark.parametrize(
    ('words', 'same'),
    [
        ('report,voc2007', 'voc2007,report'),
        ('coco2017,report,voc2007', 'voc2007,report'),
        ('short,report', 'report'),  # alone: nothing of the first is left
        ('short,official', 'shapes'),
    ],
)
def test_words_combine_and_of_a_kind_the_last_one_counts(words, same):
    assert run_config.to_json(get_config('d3', words)) == run_config.to_json(get_config('d3', same))


@pytest.mark.parametrize('words', ['voc2008', 'voc2008,report', 'report,voc2008'])
def test_an_unknown_word_is_named_with_the_known_ones(words):
    known = r'a data set \(shapes, voc2007, .*\) or a recipe \(official, effdet, report, short\)'
    with pytest.raises(ValueError, match=f"'voc2008' is unknown: choose {known}"):
        get_config('d3', words)


def test_own_data_are_trained_on_by_the_short_recipe_unless_another_is_named():
    for words, (name, presets) in {
        'lite0': ('lite0', 'own,short'),
        'd1,official': ('d1', 'own'),
        'd1,report': ('d1', 'own,report'),
    }.items():
        assert run_config.to_json(own_data.get_config(words)) == run_config.to_json(get_config(name, presets))
    with pytest.raises(ValueError, match="'report' is no member of the family: choose one of d0, d1, "):
        own_data.get_config('report')


def test_the_cells_need_their_folder_size_and_anchors_beside_a_recipe():
    different = {key: ours for key, _, ours in run_config.differences(own_data.get_config(), bccd.get_config())}
    assert different == {'dataset.source': 'voc:data/bccd', 'image.size': [256, 256], 'model.anchors.scale': 2.0}


def test_a_config_imports_no_jax():
    imports = ''.join(f'import effdet_jax.configs.{name} as c; c.get_config(); ' for name in FILES)
    script = (
        f'import sys; {imports}print([m for m in ("jax", "flax", "numpy", "effdet_jax.config") if m in sys.modules])'
    )
    assert printed_by(script) == '[]\n'


# From the command line.


def from_flags(*flags):
    argv = ['command', '--config=configs/d0.py', *(f'--config.{flag}' for flag in flags)]
    values = FlagValues()
    config_flags.DEFINE_config_file('config', flag_values=values, sys_argv=argv)
    values(argv)
    run_config.check(values.config)
    return values.config


@pytest.mark.parametrize(
    ('flags', 'key', 'value'),
    [
        (['image.size=512'], 'image.size', (512, 512)),
        (['image.size=512x512'], 'image.size', (512, 512)),
        (['image.size=(512,)'], 'image.size', (512, 512)),
        (['image.size=(480, 640)'], 'image.size', (480, 640)),
        (['image.size=480,640'], 'image.size', (480, 640)),
        (['image.size=[480,640]'], 'image.size', (480, 640)),
        (['image.size=(64, 96)', 'image.size=512'], 'image.size', (512, 512)),
        (['image.size=512', 'image.size=(64, 96)'], 'image.size', (64, 96)),
        (['image.mean=127', 'image.mean=127.5'], 'image.mean', (127.5,) * 3),
        (['augment.scale=0.1,2', 'augment.scale=(1, 1)'], 'augment.scale', (1, 1)),
        (['dataset.class_names=a', 'dataset.class_names=b'], 'dataset.class_names', ('b',)),
        (["dataset.class_names=('a', 'b')"], 'dataset.class_names', ('a', 'b')),
        (['dataset.class_names=(1, 2)', 'dataset.class_names=()'], 'dataset.class_names', ()),
        (['model.anchors.aspect_ratios=((1.4, 0.7),)'], 'model.anchors.aspect_ratios', ((1.4, 0.7),)),
        (['dataset.class_names=a', 'dataset.class_names='], 'dataset.class_names', ()),
        (['train.epochs=3', 'train.epochs=4'], 'train.epochs', 4.0),
        (['train.unfreeze_epoch=3'], 'train.unfreeze_epoch', 3.0),
        (['train.unfreeze_epoch=3', 'train.unfreeze_epoch=None'], 'train.unfreeze_epoch', None),
    ],
    ids=str,
)
def test_a_flag_is_read_as_python_writes_it_and_of_two_the_last_one_counts(flags, key, value):
    assert dict(run_config.flatten(from_flags(*flags).to_dict()))[key] == value


@pytest.mark.parametrize(('old', 'new'), rules.RENAMED.items())
def test_an_old_name_of_a_key_is_answered_with_the_new_one(old, new):
    message = f'config.{old} is now config.{new}: use that name'
    with pytest.raises((Error, AttributeError, KeyError)) as error:
        from_flags(f'{old}=1')
    assert cli._reason(error.value) == message
    assert old not in rules.RULES and new in rules.RULES


def test_what_is_saved_is_the_full_form(tmp_path):
    run_config.save(from_flags('image.size=64', 'image.mean=127'), tmp_path)
    saved = json.loads((tmp_path / 'config.json').read_text())['image']
    assert (saved['size'], saved['mean']) == ([64, 64], [127, 127, 127])
    run_config.refuse_another(from_flags('image.size=64x64', 'image.mean=(127, 127, 127)'), tmp_path)


# Every key is read.


def test_a_recorded_config_knows_what_nobody_has_read():
    c = run_config.Recorded(tiny.config())
    leaves = dict(run_config.flatten(tiny.config().to_dict()))
    assert set(c.unread()) == leaves.keys()
    assert (c.model.anchors.scales_per_octave, c.train.epochs) == (3, 2.0)
    assert leaves.keys() - set(c.unread()) == {'model.anchors.scales_per_octave', 'train.epochs'}
    with pytest.raises(AttributeError):
        _ = c.train.epoch


def test_what_nobody_has_read_is_refused_by_name():
    c = run_config.Recorded(default.ConfigDict({'a': 1, 'b': {'c': 2, 'd': 3}}))
    _ = c.b.c
    with pytest.raises(UserError, match=r'nothing reads these config keys: a, b\.d; see configs/default\.py'):
        run_config.refuse_unread(c)
    _ = c.a, c.b.d
    run_config.refuse_unread(c)


# On disk.


def test_what_is_saved_is_what_is_loaded(tmp_path):
    run_config.save(tiny.config(), tmp_path)
    assert run_config.to_json(run_config.load(tmp_path)) == run_config.to_json(tiny.config())


def test_a_run_with_a_value_that_is_refused_today_is_read_and_detects_where_it_can(tmp_path):
    c = tiny.config()
    c.train.epochs = -1.0
    run_config.save(c, tmp_path)
    assert run_config.load_detector(tmp_path).train.epochs == run_config.load(tmp_path).train.epochs == -1
    c.eval.nms = 'soft'
    run_config.save(c, tmp_path)
    assert run_config.load(tmp_path).eval.nms == 'soft'  # so that a flag can change it
    message = rf"{tmp_path}/config\.json: config\.eval\.nms='soft' is unknown: choose one of gaussian, hard"
    with pytest.raises(UserError, match=message):
        run_config.load_detector(tmp_path)


def test_a_run_with_the_old_names_of_keys_is_read_and_goes_on(tmp_path):
    c = default.get_config('d0')
    values = {
        'model.feature_network.name': 'panet', 'model.feature_network.fusion': 'softmax', 'model.fpn_channels': 16,
        'model.fpn_cells': 1, 'model.anchors.scales_per_octave': 2, 'dataset.accepted_fingerprint': '0' * 32,
        'dataset.max_unreadable_fraction': 0.5, 'train.gradient_accumulation_steps': 2, 'train.max_skipped_steps': 7,
        'schedule.warmup_init_rate': 0.01, 'eval.per_class_nms': False, 'eval.nms_iou_threshold': 0.3,
    }  # fmt: skip
    assert values.keys() == {*rules.RENAMED.values()}
    c.update_from_flattened_dict(values)
    run_config.save(c, tmp_path)
    saved = json.loads((tmp_path / 'config.json').read_text())
    del saved['model']['feature_network']  # once it was a name; its options are younger
    for old, new in rules.RENAMED.items():
        group, _, key = old.rpartition('.')
        place = functools.reduce(operator.getitem, group.split('.'), saved)
        place.pop(new.rpartition('.')[2], None)
        place[key] = values[new]
    (tmp_path / 'config.json').write_text(json.dumps(saved))
    assert run_config.to_json(run_config.load_detector(tmp_path)) == run_config.to_json(c)
    run_config.refuse_another(c, tmp_path)
    assert run_config.changes_to_tell(c, tmp_path) == []
    c.model.fpn_cells = 2
    with pytest.raises(UserError, match=r'another config \(model\.fpn_cells: 1 there, 2 now\)'):
        run_config.refuse_another(c, tmp_path)


def test_a_run_from_before_a_key_existed_goes_on_with_its_default(tmp_path):
    run_config.save(tiny.config(), tmp_path)
    saved = json.loads((tmp_path / 'config.json').read_text())
    del saved['optimizer']['clip_each'], saved['schedule']['final_rate']
    (tmp_path / 'config.json').write_text(json.dumps(saved))
    run_config.refuse_another(tiny.config(), tmp_path)
    c = tiny.config()
    c.optimizer.clip_each = False
    with pytest.raises(UserError, match=r'optimizer\.clip_each: True there, False now'):
        run_config.refuse_another(c, tmp_path)


def test_a_folder_without_a_run_and_a_damaged_config_are_named(tmp_path):
    with pytest.raises(UserError, match=r'config\.json does not exist: give the --workdir of a training run'):
        run_config.load(tmp_path)
    for damaged in ('{"train": {', '{}', '[]'):
        (tmp_path / 'config.json').write_text(damaged)
        with pytest.raises(UserError, match=r'config\.json is damaged'):
            run_config.load(tmp_path)


@pytest.mark.parametrize(
    ('key', 'value', 'message'),
    [
        ('train.batch_size', 8, r'train\.batch_size: 4 there, 8 now'),
        ('image.size', (64, 96), r'image\.size: \[64, 64\] there, \[64, 96\] now'),
        ('train.unfreeze_epoch', None, r'train\.unfreeze_epoch: 1\.0 there, None now'),
    ],
)
def test_a_run_does_not_go_on_with_another_config(tmp_path, key, value, message):
    run_config.save(tiny.config(), tmp_path)
    c = tiny.config()
    c.update_from_flattened_dict({key: value})
    with pytest.raises(UserError, match=f'belongs to a run with another config .*{message}.*choose another --workdir'):
        run_config.refuse_another(c, tmp_path)


def test_a_run_goes_on_where_only_what_it_shows_and_keeps_has_changed(tmp_path):
    run_config.refuse_another(tiny.config(), tmp_path)
    run_config.save(tiny.config(), tmp_path)
    c = tiny.config()
    c.log.every_steps, c.eval.every_epochs, c.checkpoint.keep, c.dataset.threads = 50, 0.5, 9, 4
    run_config.refuse_another(c, tmp_path)


def test_keys_that_change_what_comes_are_told_and_not_refused(tmp_path):
    assert run_config.changes_to_tell(tiny.config(), tmp_path) == []
    run_config.save(tiny.config(), tmp_path)
    c = tiny.config()
    c.train.epochs, c.dataset.train_split, c.eval.every_epochs = 3.0, '0:20', 0.5
    run_config.refuse_another(c, tmp_path)
    assert run_config.changes_to_tell(c, tmp_path) == [
        "config.dataset.train_split changes from '0:16' to '0:20': the training images must be the same",
        'config.train.epochs changes from 2.0 to 3.0: from here on the learning rate follows the new schedule',
    ]
