"""The training step on a network of four layers: what it computes. tests/training/test_devices.py has a real one."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from quick import slow_but
from tiny import assert_same

from effdet_jax.configs import default
from effdet_jax.detection import assignment, boxes, losses
from effdet_jax.detection.anchors import make_anchors
from effdet_jax.training.optimizer import is_kernel, make_optimizer
from effdet_jax.training.state import averaging_weight, init_state, init_variables, moving_average
from effdet_jax.training.step import make_train_step

SIZE, NUM_CLASSES, RATE = 32, 3, 0.1
ANCHORS_N4 = jnp.asarray(make_anchors(((4, 4),), (SIZE, SIZE), scale=1.0))
MODEL = tiny.toy(NUM_CLASSES)
BATCH = tiny.batch(SIZE, num_classes=NUM_CLASSES)


def recipe(**changes):
    """Plain descent, so that a step shows the gradient: no momentum, clipping, decay or average; nothing random."""
    c = default.get_config('d0')
    c.augment.flip = False
    c.train.ema_decay = 0.0
    c.optimizer.update(momentum=0.0, clip_norm=0.0)
    c.schedule.update(
        learning_rate=RATE, warmup_init_rate=RATE, scale_with_batch=False, warmup_epochs=0.0, decay='constant'
    )
    c.update_from_flattened_dict(changes)
    return c


def make(config):
    """(state, jitted step), and the state in the middle of a run: no parameter or statistic is zero or one."""
    optimizer, schedule = make_optimizer(config, 4, 8)
    rng = np.random.default_rng(1)
    variables = jax.tree.map(
        lambda leaf: leaf + jnp.float32(0.1 * np.abs(rng.standard_normal(leaf.shape))), init_variables(MODEL, 0)
    )
    step = jax.jit(make_train_step(config, MODEL, optimizer, schedule, ANCHORS_N4), static_argnums=2)
    return init_state(variables, optimizer, config.train.ema_decay), step


@pytest.fixture(scope='module')
def plain():
    """(state before, state after, metrics) of a step with `recipe()`."""
    state, step = make(recipe())
    return state, *step(state, BATCH, False)


def normalized(batch, config):
    """By the definition, image by image, in NumPy."""
    images = (np.float64(batch['image']) - np.array(config.image.mean)) / np.array(config.image.std)
    for image, (height, width) in zip(images, batch['valid_size'], strict=True):
        image[height:] = 0
        image[:, width:] = 0
    return jnp.float32(images)


def targets_of(batch):
    """(classes [B, N], regressions [B, N, 4], positives), image by image."""
    assign = jax.jit(assignment.assign)  # positive from an IoU of 0.5
    targets = [assign(ANCHORS_N4, *image) for image in zip(batch['boxes'], batch['labels'], strict=True)]
    classes_BN, regressions_BN4, positives_B = (jnp.stack(column) for column in zip(*targets, strict=True))
    return classes_BN, regressions_BN4, positives_B.sum()


def focal(logits, onehot):
    """The formulas of (docs/reference.md, Losses) to the letter, with alpha 0.25 and gamma 1.5."""
    p = jax.nn.sigmoid(logits)
    p_t = onehot * p + (1 - onehot) * (1 - p)
    alpha_t = onehot * 0.25 + (1 - onehot) * 0.75
    return -alpha_t * (1 - p_t) ** 1.5 * jnp.log(p_t)


def huber(error):
    return jnp.where(jnp.abs(error) <= 0.1, 0.5 * error**2, 0.1 * jnp.abs(error) - 0.5 * 0.1**2)


def composed(params, batch_stats, batch, normalizer, train=True):
    """(loss without L2, (class loss, box loss, batch statistics)) put together here."""
    outputs, updates = MODEL.apply(
        {'params': params, 'batch_stats': batch_stats},
        normalized(batch, recipe()),
        train=train,
        mutable=['batch_stats'],
    )
    classes_BN, regressions_BN4, _ = targets_of(batch)
    class_loss = focal(outputs.class_logits, jax.nn.one_hot(classes_BN, NUM_CLASSES)).sum() / normalizer
    box_loss = (huber(outputs.box_regressions - regressions_BN4) * (regressions_BN4 != 0)).sum() / (4 * normalizer)
    return class_loss + 50 * box_loss, (class_loss, box_loss, updates['batch_stats'])


def assert_close(a, b, rtol=1e-4, atol=1e-6):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol, atol=atol), a, b)


def moved(before, after):
    return [
        path
        for path, leaf in jax.tree_util.tree_leaves_with_path(jax.tree.map(jnp.subtract, after, before))
        if np.any(leaf)
    ]


def test_loss_and_metrics_are_those_of_the_definition(plain):
    before, after, metrics = plain
    params, batch_stats = before.variables['params'], before.variables['batch_stats']
    positives = targets_of(BATCH)[2]
    assert positives > len(BATCH['labels'])
    loss, (class_loss, box_loss, statistics) = composed(params, batch_stats, BATCH, positives + 1)
    kernels = [leaf for leaf, kernel in zip(*map(jax.tree.leaves, (params, is_kernel(params))), strict=True) if kernel]
    l2_loss = 4e-5 * sum(0.5 * np.sum(np.float64(kernel) ** 2) for kernel in kernels)
    expected = {
        'class_loss': class_loss, 'box_loss': box_loss, 'l2_loss': l2_loss, 'loss': loss + l2_loss,
        'positives': positives, 'learning_rate': RATE,
    }  # fmt: skip
    assert_close({name: metrics[name] for name in expected}, expected)
    # A tenth of what was stored is left after the first step (the average's decay starts at 1 / 10).
    averaged = jax.tree.map(lambda old, new: 0.1 * old + 0.9 * new, batch_stats, statistics)
    assert_close(after.variables['batch_stats'], averaged)
    assert after.step == before.step + 1


def test_parameters_follow_the_gradient_of_the_loss(plain):
    before, after, metrics = plain
    params, batch_stats = before.variables['params'], before.variables['batch_stats']
    gradients = jax.grad(composed, has_aux=True)(params, batch_stats, BATCH, targets_of(BATCH)[2] + 1)[0]
    np.testing.assert_allclose(metrics['gradient_norm'], optax.tree.norm(gradients), rtol=1e-4)
    with_l2 = jax.tree.map(lambda g, w, kernel: g + 4e-5 * w * kernel, gradients, params, is_kernel(params))
    assert_close(after.variables['params'], jax.tree.map(lambda w, g: w - RATE * g, params, with_l2), atol=1e-5)


def test_without_an_average_there_is_none(plain):
    assert plain[0].ema == plain[1].ema == {}


def test_images_without_boxes_are_negatives(plain):
    state, step = make(recipe())
    nothing = BATCH | {'labels': np.full_like(BATCH['labels'], -1)}
    after, metrics = step(state, nothing, False)
    assert metrics['positives'] == metrics['box_loss'] == 0
    assert metrics['class_loss'] > 0
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(after))
    # The normaliser is one: every logit is pushed down with full weight.
    logits = MODEL.apply(state.variables, normalized(nothing, recipe()), train=True, mutable=['batch_stats'])[0][0]
    np.testing.assert_allclose(metrics['class_loss'], focal(logits, jnp.zeros_like(logits)).sum(), rtol=1e-4)


@pytest.mark.parametrize('kind', ['iou', 'ciou'])
def test_an_iou_loss_is_added_with_its_weight(plain, kind):
    state, step = make(recipe(**{'loss.iou_kind': kind, 'loss.iou_weight': 3.0}))
    after, metrics = step(state, BATCH, False)
    np.testing.assert_allclose(metrics['loss'] - plain[2]['loss'], 3 * metrics['iou_loss'], rtol=1e-3)
    assert moved(plain[1].variables['params']['box_net'], after.variables['params']['box_net'])
    if kind == 'iou':
        regressions_BN4 = MODEL.apply(
            state.variables, normalized(BATCH, recipe()), train=True, mutable=['batch_stats']
        )[0].box_regressions
        classes_BN, wanted_BN4, positives = targets_of(BATCH)
        iou_BN = boxes.iou(boxes.decode(regressions_BN4, ANCHORS_N4), boxes.decode(wanted_BN4, ANCHORS_N4))
        expected = jnp.sum((1 - iou_BN) * (classes_BN >= 0)) / (4 * (positives + 1))  # docs/reference.md, losses
        np.testing.assert_allclose(metrics['iou_loss'], expected, rtol=1e-4)


# Steps without a finite loss or gradient.

POISONS = {
    'loss': lambda loss, logits: loss + jnp.nan,
    'gradient': lambda loss, logits: loss + jnp.sqrt(logits - jax.lax.stop_gradient(logits)),  # adds 0, with slope inf
}


@pytest.mark.parametrize('parts', slow_but([1, 2], 1))
@pytest.mark.parametrize('poison', POISONS)
def test_a_step_that_is_not_finite_changes_nothing_but_its_number(monkeypatch, poison, parts):
    """One image of four is enough. The next step learns as if it had not been."""
    config = recipe(**{'train.ema_decay': 0.9, 'optimizer.name': 'adam', 'train.gradient_accumulation_steps': parts})
    state, step = make(config)
    after, metrics = step(state, BATCH, False)
    assert metrics['skipped_steps'] == 0
    good = losses.focal_loss

    def poisoned(logits, classes, **kwargs):
        loss = good(logits, classes, **kwargs)
        return loss.at[0].set(POISONS[poison](loss, logits)[0])

    monkeypatch.setattr(losses, 'focal_loss', poisoned)
    _, poisoned_step = make(config)
    skipped, metrics = poisoned_step(state, BATCH, False)
    assert metrics['skipped_steps'] == 1
    assert np.isfinite(metrics['loss']) == (poison == 'gradient')
    assert np.isfinite(metrics['gradient_norm']) == (poison == 'loss')
    assert_same(skipped, state.replace(step=state.step + 1))
    again, metrics = step(skipped.replace(step=state.step), BATCH, False)
    assert_same(again, after)


def test_the_learning_rate_that_is_logged_is_the_one_that_is_used():
    """The optimiser counts the steps that it has taken; a skipped one is none of them."""
    changes = {'schedule.warmup_epochs': 2.0, 'schedule.warmup_init_rate': 0.0, 'loss.l2': 0.0}
    state, step = make(recipe(**changes))
    rates = []
    for number in (0, 5):  # five steps were skipped
        after, metrics = step(state.replace(step=jnp.int32(number)), BATCH, False)
        rates.append(float(metrics['learning_rate']))
        state = after
    np.testing.assert_allclose(rates, [0.0, RATE / 8], rtol=1e-6)


# Randomness.


def flipped(batch, which):
    """The images in `which` mirrored by hand, and nothing else."""
    batch = {name: array.copy() for name, array in batch.items()}
    for i in which:
        width = batch['valid_size'][i, 1]
        batch['image'][i, :, :width] = batch['image'][i, :, :width][:, ::-1]
        _, x1, _, x2 = batch['boxes'][i].T
        batch['boxes'][i][:, [1, 3]] = np.stack([width - x2, width - x1], axis=1)
    return batch


@pytest.mark.slow
def test_each_image_is_flipped_or_not_by_seed_and_step(plain):
    """The loss is that of one of the 16 ways to flip four images; seed and step alone say of which."""
    _, step = make(recipe())
    state = plain[0]
    ways = [way for n in range(5) for way in itertools.combinations(range(4), n)]
    losses = [float(step(state, flipped(BATCH, way), False)[1]['loss']) for way in ways]
    assert len(set(losses)) == len(ways)

    def ways_taken(seed):
        _, random_step = make(recipe(**{'augment.flip': True, 'seed': seed}))
        taken = [float(random_step(state.replace(step=jnp.int32(t)), BATCH, False)[1]['loss']) for t in range(6)]
        nearest = [int(np.abs(np.array(losses) - loss).argmin()) for loss in taken]
        np.testing.assert_allclose(taken, np.array(losses)[nearest], rtol=1e-5)
        return [ways[i] for i in nearest]

    first = ways_taken(seed=0)
    assert len(set(first)) > 2
    assert first == ways_taken(seed=0) != ways_taken(seed=1)


# Frozen parts, averages, accumulation.


def test_what_is_frozen_keeps_parameters_and_statistics():
    state, step = make(recipe(**{'train.freeze': 'backbone', 'optimizer.momentum': 0.9}))
    after, metrics = step(state, BATCH, True)
    for kind in ('params', 'batch_stats'):
        assert_same(after.variables[kind]['backbone'], state.variables[kind]['backbone'])
    others = {kind: state.variables[kind].keys() - {'backbone'} for kind in state.variables}
    for kind, part in [(kind, part) for kind, parts in others.items() for part in parts]:
        assert moved(state.variables[kind][part], after.variables[kind][part])
    # What is frozen has no gradient that could count in its norm.
    step_of_rest = jax.tree.map(lambda old, new: (old - new) / RATE, *(t.variables['params'] for t in (state, after)))
    np.testing.assert_allclose(metrics['gradient_norm'], optax.tree.norm(step_of_rest), rtol=1e-3)


def test_unfreezing_moves_parameters_and_statistics_again():
    state, step = make(recipe(**{'train.freeze': 'backbone', 'train.unfreeze_epoch': 0.0}))
    after, _ = step(state, BATCH, False)
    assert len(moved(state.variables, after.variables)) == len(jax.tree.leaves(state.variables))


def test_the_loop_unfreezes_and_not_the_count_of_updates_which_leaves_out_skipped_steps():
    state, step = make(recipe(**{'train.freeze': 'backbone', 'train.unfreeze_epoch': 1.0}))
    after, _ = step(state, BATCH, False)  # at update 0 of an epoch of 4, as after skipped steps
    assert len(moved(state.variables, after.variables)) == len(jax.tree.leaves(state.variables))


def test_frozen_batch_norm_uses_its_stored_statistics():
    state, step = make(recipe(**{'train.freeze': '.*bn'}))
    after, metrics = step(state, BATCH, True)
    params, batch_stats = state.variables['params'], state.variables['batch_stats']
    normalizer = targets_of(BATCH)[2] + 1
    loss, (class_loss, box_loss, _) = composed(params, batch_stats, BATCH, normalizer, train=False)
    assert_close(
        {name: metrics[name] for name in ('class_loss', 'box_loss')}, {'class_loss': class_loss, 'box_loss': box_loss}
    )
    assert_close(metrics['loss'], loss + metrics['l2_loss'])
    assert_same(after.variables['batch_stats'], batch_stats)


def test_the_average_follows_parameters_and_statistics():
    state, step = make(recipe(**{'train.ema_decay': 0.9}))
    for t in range(3):
        after, _ = step(state, BATCH, False)
        assert_close(after.ema, moving_average(state.ema, after.variables, averaging_weight(0.9, jnp.int32(t))))
        state = after
    assert len(moved(state.variables, state.ema)) == len(jax.tree.leaves(state.ema))


def test_accumulation_in_parts_is_one_step_where_batch_norm_is_frozen():
    """Only there: otherwise each part is normalised by its own statistics, as in any accumulation."""
    whole, parts = (
        step(state, BATCH, True)
        for state, step in (
            make(recipe(**{'train.freeze': '.*bn', 'train.gradient_accumulation_steps': n})) for n in (1, 2)
        )
    )
    assert_close(parts, whole, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_accumulation_adds_the_gradients_of_the_parts():
    """All divided by the positives of the whole batch; the statistics are the mean of the parts'."""
    state, step = make(recipe(**{'train.gradient_accumulation_steps': 2, 'loss.l2': 0.0}))
    after, metrics = step(state, BATCH, False)
    params, stored = state.variables['params'], state.variables['batch_stats']
    gradient = jax.value_and_grad(composed, has_aux=True)
    parts = [
        gradient(params, stored, {name: array[part::2] for name, array in BATCH.items()}, targets_of(BATCH)[2] + 1)
        for part in range(2)
    ]
    total = jax.tree.map(jnp.add, parts[0][1], parts[1][1])
    assert_close(metrics['loss'], sum(value for (value, _), _ in parts))
    averaged = jax.tree.map(lambda old, a, b: 0.1 * old + 0.45 * (a + b), stored, *(aux[2] for (_, aux), _ in parts))
    assert_close(after.variables['batch_stats'], averaged)
    assert_close(after.variables['params'], jax.tree.map(lambda w, g: w - RATE * g, params, total), atol=1e-5)


def test_the_learning_rate_is_computed_once_and_not_in_the_loop_of_every_parameter():
    """XLA copies numbers into what they scale, unless they come from outside of the branch; that costs compile time."""
    state, step = make(recipe(**{'schedule.decay': 'cosine'}))
    assert step.lower(state, BATCH, False).compile().as_text().count(' cosine(') == 1
