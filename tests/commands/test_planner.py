"""The plan: predictions against what the compiler says, closed forms, what is printed."""

import jax
import numpy as np
import pytest
import tiny
from hypothesis import given
from hypothesis import strategies as st

from effdet_jax.commands.plan import anchor_report, planner
from effdet_jax.commands.plan.memory import line_through, parse_bytes
from effdet_jax.configs import default
from effdet_jax.data.listing import ImageRow, ObjectRow, make_listing
from effdet_jax.errors import UserError
from effdet_jax.inference.detector import image_anchors
from effdet_jax.runtime import devices
from effdet_jax.training import footprint

pytestmark = pytest.mark.usefixtures('depthwise_by_xla')
CLASSES = 5


def plan_step(config, model):
    return footprint.plan_step(config, model, image_anchors(config), frozen=False)


@pytest.fixture(scope='module')
def compiled():
    """(step, {batch size: (batch, its compiled step)}) on the four devices of the tests."""
    config = tiny.config()
    config.model.max_level = 3  # the toy's only level
    step = plan_step(config, tiny.toy(CLASSES, devices.AXIS))
    batches = {size: footprint.random_batch(config, size, CLASSES, 2) for size in (8, 16, 32)}
    return step, {size: (batch, footprint.compile_layout(step.lower(batch))) for size, batch in batches.items()}


def test_the_line_through_two_small_batches_predicts_a_larger_one(compiled):
    step, programs = compiled
    totals = {size: step.memory(*program).total for size, program in programs.items()}
    line = line_through({size // 4: totals[size] for size in (8, 16)})
    assert line.at(32 // 4) == pytest.approx(totals[32], rel=0.05)
    assert totals[32] > 1.5 * totals[8]


def test_arguments_are_counted_as_the_compiler_counts_them(compiled):
    step, programs = compiled
    for batch, program in programs.values():
        memory = step.memory(batch, program)
        number_of_the_step = 4
        counted = number_of_the_step + memory.variables + memory.optimizer + memory.average + memory.batches // 2
        unread = sum(batch[name].nbytes for name in ('index', 'unreadable', 'dropped')) // 4
        assert counted - unread == program.memory_analysis().argument_size_in_bytes
        assert memory.temporary >= program.memory_analysis().temp_size_in_bytes > 0


def test_a_planned_step_runs(compiled, monkeypatch):
    step, programs = compiled
    batch, program = programs[8]
    monkeypatch.setattr(footprint, 'SECONDS', 0.0)
    assert 0 < footprint.seconds_per_step(program, step.random_state(), batch) < 60


@given(
    fixed=st.integers(0, 10**9), per_image=st.integers(1, 10**8), a=st.integers(1, 9), limit=st.integers(0, 10**10),
    multiple=st.integers(1, 8),
)  # fmt: skip
def test_the_largest_batch_fits_and_the_next_does_not(fixed, per_image, a, limit, multiple):
    line = line_through({a: fixed + per_image * a, 2 * a: fixed + per_image * 2 * a})
    largest = line.largest(limit, multiple)
    assert largest % multiple == 0
    assert largest == 0 or line.at(largest) <= limit * (1 + 1e-9)
    assert line.at(largest + multiple) > limit * (1 - 1e-9)


@pytest.mark.parametrize(
    ('text', 'size'), [('16GiB', 16 * 2**30), ('24 GB', 24 * 10**9), ('1.5gib', 3 * 2**29), ('900MiB', 900 * 2**20)]
)
def test_amounts_of_memory(text, size):
    assert parse_bytes(text) == size


@pytest.mark.parametrize('text', ['16', 'GiB', '16GiBs', '-1GB', '0GB', '1e3MB'])
def test_what_is_no_amount_of_memory_is_refused(text):
    with pytest.raises(UserError, match='16GiB or 24GB'):
        parse_bytes(text)


def toy(config, num_classes, axis_name):
    return tiny.toy(num_classes, axis_name)


@pytest.fixture
def toy_config(monkeypatch):
    monkeypatch.setattr(planner, 'build_model', toy)
    monkeypatch.setattr(footprint, 'SECONDS', 0.0)
    monkeypatch.setattr(planner, 'SECONDS_OF_INPUT', 0.0)
    config = tiny.config()
    config.model.max_level = 3  # the toy's only level
    config.train.batch_size = 8
    return config


def test_a_whole_plan(toy_config):
    plan = '\n\n'.join(planner.plan(toy_config, memory=10**9, fit=True))
    parameters = sum(x.size for x in jax.tree.leaves(toy(None, CLASSES, None).init(
        jax.random.key(0), np.zeros((1, 64, 64, 3)))['params']))  # fmt: skip
    assert f'{parameters:,}' in plan
    for expected in (
        'Network: nano, 5 classes, 64x64 pixels',
        'objects of 16 training images',
        'batch 8 on 4 x cpu on 1 host, float32, remat=False, gradient_accumulation_steps=1',
        'Estimated from compiled batches 4 and 8',
        'Evaluation of 4 images at a time',
        'Time: 16 images, 2 steps of 8 per epoch',
        'all 2 epochs',
    ):
        assert expected in plan
    assert 'does not fit' not in plan


@pytest.mark.slow
def test_a_batch_that_does_not_fit_comes_with_what_does(toy_config):
    toy_config.train.batch_size = 64
    sections = list(planner.plan(toy_config, memory=2_500_000, with_data=False))
    (advice,) = [section for section in sections if 'does not fit' in section]
    fits = int(advice.partition('--config.train.batch_size=')[2].split()[0])
    assert 0 < fits < 64 and fits % 4 == 0
    assert f'of --memory: {fits}.' in advice
    assert f'measured with {fits} images' in sections[-1]


@pytest.mark.slow
def test_a_batch_that_the_compiler_refuses_is_predicted_from_smaller_ones(toy_config, monkeypatch):
    toy_config.train.batch_size = 64
    (honest,) = [x for x in planner.plan(toy_config, 10**9, with_data=False) if 'Memory of a training step' in x]
    lower = footprint.PlannedStep.lower

    class Refused(jax.stages.Lowered):
        def __init__(self):
            pass

        def compile(self, options=None):
            raise jax.errors.JaxRuntimeError('RESOURCE_EXHAUSTED: out of memory')

    def refuse_64(self, batch):
        return Refused() if len(batch['image']) == 64 else lower(self, batch)

    monkeypatch.setattr(footprint.PlannedStep, 'lower', refuse_64)
    sections = list(planner.plan(toy_config, 2_500_000, with_data=False))
    (predicted,) = [section for section in sections if 'Memory of a training step' in section]

    def total(section):
        return int(section.partition('| total')[2].split('|')[1])

    assert total(predicted) == pytest.approx(total(honest), rel=0.1, abs=1)


def test_without_the_step_nothing_is_compiled(toy_config, monkeypatch):
    monkeypatch.setattr(footprint.PlannedStep, 'lower', None)
    plan = '\n'.join(planner.plan(toy_config, with_step=False, with_data=False))
    assert '90 classes' in plan
    assert 'other temporaries' in plan


def test_data_that_cannot_be_opened_can_be_left_out(toy_config):
    toy_config.dataset.source = 'voc:nowhere'
    with pytest.raises(UserError, match='--no-data'):
        list(planner.plan(toy_config))


def test_a_feature_network_is_drawn_with_its_cost(tmp_path):
    config = default.get_config('d0')
    planner.draw_feature_network(config, tmp_path / 'bifpn.svg')
    picture = (tmp_path / 'bifpn.svg').read_text()
    assert 'bifpn, P3-P7, 3 x 64 channels, fast fusion' in picture
    assert '196,281 parameters' in picture  # docs/reference.md, Models


def test_a_picture_that_cannot_be_written(tmp_path):
    (tmp_path / 'file').touch()
    with pytest.raises(UserError, match='cannot be written'):
        planner.draw_feature_network(default.get_config('nano'), tmp_path / 'file' / 'bifpn.svg')


def test_anchors_are_told_by_coco_size_and_by_class():
    config = default.get_config('d0')  # the anchors of P3 are squares of 32 pixels and more, centred at 4, 12, ...
    fits, none_fits = (84.0, 84.0, 116.0, 116.0), (94.0, 94.0, 106.0, 106.0)
    listing = make_listing(
        ('cell', 'dot'), (1, 2), [ImageRow(1, 'a.png', 'a: ', (512, 512))],
        [ObjectRow(0, fits, 0, 1), ObjectRow(0, fits, 0, 2), ObjectRow(0, none_fits, 1, 3)],
    )  # fmt: skip
    table, _, advice = anchor_report.sections(config, listing, fit=False)
    rows = {cells[0].strip(): [c.strip() for c in cells[1:5]] for line in table.splitlines()[4:]
            if (cells := line.strip('|').split('|'))}  # fmt: skip
    iou = 12 * 12 / (32 * 32)  # the whole of it lies in an anchor
    assert rows == {
        'all': ['3', '0.667', f'{(2 + iou) / 3:.3f}', '1'],
        'small': ['1', '0.000', f'{iou:.3f}', '1'],
        'medium': ['2', '1.000', '1.000', '0'],
        'large': ['0', '-', '-', '0'],
        'cell': ['2', '1.000', '1.000', '0'],
        'dot': ['1', '0.000', f'{iou:.3f}', '1'],
    }
    assert advice.startswith('Advice: --config.model.anchors.scale=1 leaves 0 of 3')


def test_without_known_sizes_nothing_is_said_of_anchors():
    listing = make_listing(('cell',), (1,), [ImageRow(1, 'a.png', 'a: ')], [ObjectRow(0, (0.0, 0.0, 9.0, 9.0), 0, 1)])
    (only,) = anchor_report.sections(default.get_config('d0'), listing, fit=True)
    assert 'annotated size' in only


def test_attacked_images_add_to_the_state_of_the_training_and_not_to_the_network(toy_config):
    plain = list(planner.plan(toy_config, with_step=False, with_data=False))
    before = plan_step(toy_config, tiny.toy(CLASSES)).state
    toy_config.adversarial.weight = 1.0
    attacked = list(planner.plan(toy_config, with_step=False, with_data=False))
    after = plan_step(toy_config, tiny.toy(CLASSES)).state
    assert attacked[0] == plain[0]  # the network
    norms = 4 * 4 * (8 + 9 * CLASSES)  # scale, bias, mean, variance; float32
    assert footprint.tree_bytes(after.variables) - footprint.tree_bytes(before.variables) == norms
    assert footprint.tree_bytes(after.best_variables) == footprint.tree_bytes(before.variables)
