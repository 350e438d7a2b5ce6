import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import traverse_util
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import assert_same

from effdet_jax.configs import default
from effdet_jax.configs.recipes import RECIPES
from effdet_jax.training import freeze
from effdet_jax.training import optimizer as op

STEPS_PER_EPOCH = 4
RATE = 0.1


def recipe(**changes):
    """A config whose optimiser only descends: no momentum, no clipping, no decay, a constant rate."""
    c = default.get_config('d0')
    c.loss.l2 = 0.0
    c.optimizer.update(momentum=0.0, clip_norm=0.0)
    c.schedule.update(
        learning_rate=RATE, warmup_init_rate=RATE, scale_with_batch=False, warmup_epochs=0.0, decay='constant'
    )
    c.update_from_flattened_dict(changes)
    return c


def random_tree(seed, scale=1.0):
    rng = np.random.default_rng(seed)

    def layer():
        return {'kernel': scale * rng.standard_normal((1, 1, 3, 4)), 'bias': scale * rng.standard_normal(4)}

    tree = {'backbone': {'conv': layer()}, 'class_net': {'conv': layer(), 'bn': {'scale': rng.standard_normal(4)}}}
    return jax.tree.map(jnp.float32, tree)


PARAMS = random_tree(0)
GRADIENTS = [random_tree(seed) for seed in range(1, 9)]


def descend(optimizer, params=PARAMS, gradients=GRADIENTS):
    """[(parameters, optimiser state) before the first step and after each]."""
    update = jax.jit(optimizer.update)
    state = optimizer.init(params)
    trajectory = [(params, state)]
    for gradient in gradients:
        updates, state = update(gradient, state, params)
        params = optax.apply_updates(params, updates)
        trajectory.append((params, state))
    return trajectory


def descend_with(config, params=PARAMS, gradients=GRADIENTS):
    return descend(op.make_optimizer(config, STEPS_PER_EPOCH, 8)[0], params, gradients)


def assert_close(a, b):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6), a, b)


def of_backbone(tree):
    """The leaves of a tree, an optimiser state for example, that belong to the backbone's parameters."""
    return [
        leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree) if 'backbone' in jax.tree_util.keystr(path)
    ]


# The schedule.


def rates(steps, batch_size=64, steps_per_epoch=10, total_steps=100, **changes):
    c = default.get_config('d0').schedule
    c.update(changes)
    schedule = op.make_schedule(c, batch_size, steps_per_epoch, total_steps)
    return np.asarray(schedule(np.asarray(steps)))


def test_the_official_schedule_in_closed_form():
    t = np.arange(101)
    warm = 0.008 + t / 10 * (0.08 - 0.008)
    cosine = 0.5 * 0.08 * (1 + np.cos(np.pi * t / 100))  # counts from step 0, so the rate drops at the end of warm-up
    np.testing.assert_allclose(rates(t), np.where(t < 10, warm, cosine), rtol=1e-5, atol=1e-8)


def test_warm_up_start_and_rate_are_in_proportion_to_the_batch():
    t = np.arange(101)
    np.testing.assert_allclose(rates(t, batch_size=256), 4 * rates(t), rtol=1e-6)
    np.testing.assert_array_equal(rates(t, batch_size=256, scale_with_batch=False), rates(t))


def test_the_rate_is_zero_at_the_end_of_a_cosine_and_stays_there():
    np.testing.assert_allclose(rates([100, 150, 200]), 0, atol=1e-8)


def test_a_cosine_ends_at_the_final_rate_which_is_not_scaled_with_the_batch():
    t = np.arange(10, 151)
    expected = 0.003 + 0.5 * (0.16 - 0.003) * (1 + np.cos(np.pi * np.minimum(t, 100) / 100))
    np.testing.assert_allclose(rates(t, batch_size=128, final_rate=0.003), expected, rtol=1e-5)


def test_steps_divide_the_rate_by_ten_from_their_epoch_on():
    t = [10, 19, 20, 49, 50, 100]
    expected = [0.08, 0.08, 0.008, 0.008, 0.0008, 0.0008]
    np.testing.assert_allclose(rates(t, decay='step', step_epochs=(2.0, 5.0)), expected, rtol=1e-6)


def test_a_constant_rate_is_constant_after_the_warm_up():
    np.testing.assert_allclose(rates([0, 5, 10, 1000], decay='constant'), [0.008, 0.044, 0.08, 0.08], rtol=1e-6)


def test_a_run_shorter_than_its_warm_up_never_exceeds_the_rate():
    assert rates(np.arange(4), total_steps=3).max() <= 0.08


# The optimiser.


def test_sgd_by_hand():
    velocity, params = jax.tree.map(np.zeros_like, PARAMS), jax.tree.map(np.asarray, PARAMS)
    for gradient, (computed, _) in zip(GRADIENTS, descend_with(recipe(**{'optimizer.momentum': 0.9}))[1:], strict=True):
        velocity = jax.tree.map(lambda v, g: 0.9 * v + g, velocity, gradient)
        params = jax.tree.map(lambda w, v: w - RATE * v, params, velocity)
        assert_close(computed, params)


def test_the_decay_of_sgd_is_added_to_the_clipped_gradient_of_kernels():
    c = recipe(**{'optimizer.momentum': 0.9, 'optimizer.weight_decay': 0.2, 'optimizer.clip_norm': 1.0})
    velocity, params = jax.tree.map(np.zeros_like, PARAMS), jax.tree.map(np.asarray, PARAMS)
    for gradient, (computed, _) in zip(GRADIENTS, descend_with(c)[1:], strict=True):
        decay = jax.tree.map(lambda w, kernel: 0.2 * w * kernel, params, op.is_kernel(params))
        velocity = jax.tree.map(lambda v, g, d: 0.9 * v + g + d, velocity, clipped(gradient, 1.0), decay)
        params = jax.tree.map(lambda w, v: w - RATE * v, params, velocity)
        assert_close(computed, params)


def test_sgd_without_decay_has_the_state_of_old_checkpoints():
    state = op.OPTIMIZERS['sgd'](0.9, 0.0).init(PARAMS)
    assert jax.tree.structure(state) == jax.tree.structure(optax.trace(0.9).init(PARAMS))


@pytest.mark.parametrize('name', ['adam', 'adamw'])
def test_adam_and_adamw_are_those_of_optax(name):
    c = recipe(**{'optimizer.name': name, 'optimizer.momentum': 0.8, 'optimizer.weight_decay': 0.05})
    theirs = {
        'adam': optax.adam(RATE, b1=0.8),
        'adamw': optax.adamw(RATE, b1=0.8, weight_decay=0.05, mask=op.is_kernel),
    }[name]
    for (ours, _), (expected, _) in zip(descend_with(c), descend(theirs), strict=True):
        assert_close(ours, expected)


def test_l2_is_the_gradient_of_half_the_squared_norm_of_the_kernels():
    def penalty(params):
        flat = traverse_util.flatten_dict(params)
        return 0.5 * 0.3 * sum(jnp.sum(leaf**2) for path, leaf in flat.items() if path[-1] == 'kernel')

    with_l2 = jax.tree.map(jnp.add, GRADIENTS[0], jax.grad(penalty)(PARAMS))
    expected = jax.tree.map(lambda w, g: w - RATE * g, PARAMS, with_l2)
    assert_close(descend_with(recipe(**{'loss.l2': 0.3}), gradients=GRADIENTS[:1])[-1][0], expected)


def clipped(tree, norm):
    """By the definition: each gradient by its own norm, then all together."""
    tree = jax.tree.map(lambda g: np.float64(g) * min(1, norm / np.linalg.norm(g)), tree)
    total = math.sqrt(sum(np.sum(g**2) for g in jax.tree.leaves(tree)))
    return jax.tree.map(lambda g: g * min(1, norm / total), tree)


@given(scales=st.lists(st.sampled_from([1e-3, 0.3, 1.0, 1e4]), min_size=5, max_size=5))
@settings(max_examples=15, deadline=None)
def test_clipping_has_two_stages(scales):
    c = recipe(**{'optimizer.clip_norm': 3.0})
    leaves, structure = jax.tree.flatten(GRADIENTS[0])
    gradient = jax.tree.unflatten(structure, [scale * leaf for scale, leaf in zip(scales, leaves, strict=True)])
    expected = jax.tree.map(lambda w, g: w - RATE * g, PARAMS, clipped(gradient, 3.0))
    assert_close(descend_with(c, gradients=[gradient])[-1][0], expected)


def test_without_the_first_stage_clipping_is_that_of_optax():
    c = recipe(**{'optimizer.clip_norm': 3.0, 'optimizer.clip_each': False})
    theirs = optax.chain(optax.clip_by_global_norm(3.0), optax.sgd(RATE))
    gradients = [jax.tree.map(lambda g: 100 * g, GRADIENTS[0]), jax.tree.map(lambda g: 0.01 * g, GRADIENTS[1])]
    for (ours, _), (expected, _) in zip(
        descend_with(c, gradients=gradients), descend(theirs, gradients=gradients), strict=True
    ):
        assert_close(ours, expected)


def test_l2_counts_in_the_norm_that_is_clipped():
    c = recipe(**{'optimizer.clip_norm': 3.0, 'loss.l2': 5.0})
    with_l2 = jax.tree.map(lambda g, w, kernel: g + 5.0 * w * kernel, GRADIENTS[0], PARAMS, op.is_kernel(PARAMS))
    expected = jax.tree.map(lambda w, g: w - RATE * g, PARAMS, clipped(with_l2, 3.0))
    assert_close(descend_with(c, gradients=GRADIENTS[:1])[-1][0], expected)


def test_no_gradient_at_all_is_no_division_by_zero():
    zeros = jax.tree.map(jnp.zeros_like, PARAMS)
    assert_same(descend_with(recipe(**{'optimizer.clip_norm': 3.0}), gradients=[zeros])[-1][0], PARAMS)


# Freezing.

OPTIMIZERS = {
    'sgd': {'optimizer.momentum': 0.9},
    'sgd with decay': {'optimizer.momentum': 0.9, 'optimizer.weight_decay': 0.05},
    'adamw': {'optimizer.name': 'adamw', 'optimizer.momentum': 0.9, 'optimizer.weight_decay': 0.05},
}


@pytest.fixture(params=OPTIMIZERS)
def frozen_for_an_epoch(request):
    """A config in which the backbone is frozen for the first epoch, with L2 that would move it."""
    return recipe(
        **OPTIMIZERS[request.param], **{'loss.l2': 0.1, 'train.freeze': 'backbone', 'train.unfreeze_epoch': 1.0}
    )


def test_what_is_frozen_does_not_move_nor_does_its_optimiser_state(frozen_for_an_epoch):
    trajectory = descend_with(frozen_for_an_epoch)
    assert of_backbone(trajectory[0][1])
    for params, state in trajectory[: STEPS_PER_EPOCH + 1]:
        assert_same(params['backbone'], PARAMS['backbone'])
        assert_same(of_backbone(state), of_backbone(trajectory[0][1]))
    for (before, state_before), (after, state) in zip(
        trajectory[STEPS_PER_EPOCH:], trajectory[STEPS_PER_EPOCH + 1 :], strict=False
    ):
        for old, new in zip(of_backbone((before, state_before)), of_backbone((after, state)), strict=True):
            assert np.any(old != new)


def test_the_rest_never_notices_what_is_frozen_or_unfrozen(frozen_for_an_epoch):
    never = frozen_for_an_epoch.copy_and_resolve_references()
    never.train.freeze = ''
    alone = [{'class_net': tree['class_net']} for tree in (PARAMS, *GRADIENTS)]
    together = descend_with(frozen_for_an_epoch)
    apart = descend_with(never, alone[0], alone[1:])
    for (params, _), (expected, _) in zip(together, apart, strict=True):
        assert_same(params['class_net'], expected['class_net'])


def test_what_is_unfrozen_starts_with_a_fresh_optimiser(frozen_for_an_epoch):
    always = frozen_for_an_epoch.copy_and_resolve_references()
    always.train.freeze = ''
    alone = [{'backbone': tree['backbone']} for tree in (PARAMS, *GRADIENTS)]
    together = descend_with(frozen_for_an_epoch)[STEPS_PER_EPOCH:]
    apart = descend_with(always, alone[0], alone[1 + STEPS_PER_EPOCH :])
    for (params, _), (expected, _) in zip(together, apart, strict=True):
        assert_close(params['backbone'], expected['backbone'])


def test_what_is_frozen_does_not_count_in_the_clipping_norm():
    c = recipe(**{'optimizer.clip_norm': 1.0, 'loss.l2': 5.0, 'train.freeze': 'backbone'})
    huge = GRADIENTS[0] | {'backbone': jax.tree.map(lambda g: 1e6 * g, GRADIENTS[0]['backbone'])}
    c_alone = c.copy_and_resolve_references()
    c_alone.train.freeze = ''
    alone = descend_with(c_alone, {'class_net': PARAMS['class_net']}, [{'class_net': huge['class_net']}])
    params = descend_with(c, gradients=[huge])[-1][0]
    assert_same(params['class_net'], alone[-1][0]['class_net'])
    assert_same(params['backbone'], PARAMS['backbone'])


@pytest.mark.parametrize(
    ('pattern', 'epoch', 'step'), [('', None, 0), ('', 3.0, 0), ('backbone', None, math.inf), ('backbone', 2.5, 10.0)]
)
def test_the_step_at_which_everything_is_trained(pattern, epoch, step):
    assert freeze.unfreeze_step(pattern, epoch, STEPS_PER_EPOCH) == step


@pytest.mark.parametrize(
    ('pattern', 'matches'),
    [
        ('backbone', True),
        ('(fpn|backbone)', True),
        ('.*kernel', True),
        ('stem', False),
        ('backbone/stem$', False),
        ('', False),
    ],
)
def test_a_pattern_matches_from_the_start_of_a_path(pattern, matches):
    assert freeze.path_matches(pattern, ('backbone', 'stem', 'conv', 'kernel')) is matches


# Recipes: what reaches the optimiser.

EPOCHS, PER_EPOCH = 300, 4


def by_recipe(name, total_steps=EPOCHS * PER_EPOCH):
    """(optimiser, schedule) of D0 by the recipe, at its own batch size."""
    return op.make_optimizer(default.get_config('d0', name), PER_EPOCH, total_steps)


def test_the_schedule_of_effdet_in_closed_form():
    t = np.arange(EPOCHS * PER_EPOCH + 1)
    rate, warmup_steps = 0.09 * 32 / 64, 5 * PER_EPOCH
    warm = 1e-4 + t / warmup_steps * (rate - 1e-4)
    cosine = 1e-5 + 0.5 * (rate - 1e-5) * (1 + np.cos(np.pi * t / t[-1]))
    np.testing.assert_allclose(by_recipe('effdet')[1](t), np.where(t < warmup_steps, warm, cosine), rtol=1e-4)


def test_effdet_clips_all_gradients_together_and_decays_after_that():
    c = default.get_config('d0', 'effdet')
    c.schedule.warmup_init_rate = 2.0  # a first step of 1 at its batch of 32, in which the decay shows
    huge = jax.tree.map(lambda g: 100 * g, GRADIENTS[0])
    norm = math.sqrt(sum(np.sum(np.square(g, dtype=np.float64)) for g in jax.tree.leaves(huge)))
    expected = jax.tree.map(lambda w, g, k: w - 10 / norm * g - 4e-5 * w * k, PARAMS, huge, op.is_kernel(PARAMS))
    assert_close(descend_with(c, gradients=[huge])[-1][0], expected)


def test_the_report_has_a_constant_rate_from_the_first_step_on():
    t = np.arange(0, 2000, 7)
    np.testing.assert_array_equal(np.broadcast_to(by_recipe('report')[1](t), t.shape), np.float32(1e-3))


def test_the_report_is_adam_on_all_but_a_backbone_unfrozen_after_50_epochs():
    gradients = GRADIENTS * 26  # 52 epochs
    ours = descend(by_recipe('report')[0], gradients=gradients)
    alone = [{'class_net': tree['class_net']} for tree in (PARAMS, *gradients)]
    apart = descend(optax.chain(optax.clip_by_global_norm(10.0), optax.adam(1e-3)), alone[0], alone[1:])
    assert_close(ours[-1][0]['class_net'], apart[-1][0]['class_net'])
    assert_same(ours[50 * PER_EPOCH][0]['backbone'], PARAMS['backbone'])
    assert np.all(ours[50 * PER_EPOCH + 1][0]['backbone']['conv']['bias'] != PARAMS['backbone']['conv']['bias'])


@pytest.mark.parametrize('name', RECIPES)
def test_every_recipe_makes_an_optimiser(name):
    (_, (params, _)) = descend(by_recipe(name)[0], gradients=GRADIENTS[:1])
    assert np.all(params['class_net']['conv']['bias'] != PARAMS['class_net']['conv']['bias'])
