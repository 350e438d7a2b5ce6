"""Det-AdvProp on a network of four layers: the attack, the step that learns from it, a run from start to detector."""

import operator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from tiny import assert_same

from effdet_jax import build, train
from effdet_jax.configs import default
from effdet_jax.detection import assignment, losses, preprocess
from effdet_jax.detection.anchors import make_anchors
from effdet_jax.inference import Detector
from effdet_jax.records.checkpoint import Checkpoints, load_variables
from effdet_jax.records.metrics import MetricsLog, read_metrics
from effdet_jax.runtime import devices
from effdet_jax.training import adversarial, footprint
from effdet_jax.training.optimizer import make_optimizer
from effdet_jax.training.state import init_state, init_variables
from effdet_jax.training.step import make_train_step

SIZE, NUM_CLASSES, RATE, EPSILON, WEIGHT = 32, 3, 0.1, 3.0, 0.7
ANCHORS_N4 = jnp.asarray(make_anchors(((4, 4),), (SIZE, SIZE), scale=1.0))
MODEL = tiny.toy(NUM_CLASSES)
BATCH = tiny.batch(SIZE, num_classes=NUM_CLASSES)
ON = {'adversarial.weight': WEIGHT, 'adversarial.epsilon': EPSILON}


def recipe(**changes):
    """Plain descent, so that a step shows the gradient: no momentum, clipping, decay or average; nothing random."""
    c = default.get_config('d0')
    c.augment.flip = False
    c.loss.l2 = c.train.ema_decay = 0.0
    c.optimizer.update(momentum=0.0, clip_norm=0.0)
    c.schedule.update(
        learning_rate=RATE, warmup_init_rate=RATE, scale_with_batch=False, warmup_epochs=0.0, decay='constant'
    )
    c.update_from_flattened_dict(changes)
    return c


def make(config, network=MODEL):
    """(state, step), and the state in the middle of a run: auxiliary norms are no longer copies of the main ones."""
    optimizer, schedule = make_optimizer(config, 4, 8)
    state = init_state(init_variables(network, 0), optimizer, config.train.ema_decay, config.adversarial.weight > 0)
    rng = np.random.default_rng(1)
    variables = jax.tree.map(
        lambda leaf: leaf + jnp.float32(0.1 * np.abs(rng.standard_normal(leaf.shape))), state.variables
    )
    return state.replace(variables=variables), make_train_step(config, network, optimizer, schedule, ANCHORS_N4)


def one_step(frozen=False, **changes):
    """(state before, state after, metrics)."""
    state, step = make(recipe(**changes))
    return state, *jax.jit(step, static_argnums=2)(state, BATCH, frozen)


def assert_close(a, b, rtol=1e-4, atol=1e-5):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol, atol=atol), a, b)


def layers_of(variables):
    """{name: (main norm, auxiliary norm)}, each {scale, bias, mean, var}, of the toy's two."""
    found = {}
    for part in ('backbone', 'class_net'):
        both = variables['params'][part]['bn'] | {}, variables['batch_stats'][part]['bn'] | {}
        aux = {name: leaf for tree in both for name, leaf in tree.pop('auxiliary').items()}
        found[part] = {name: leaf for tree in both for name, leaf in tree.items()}, aux
    return found


# The attack.


def linear_losses(seed):
    """Losses of each image whose gradients are known and nowhere zero: (function, class [B, H, W, 3], box)."""
    rng = np.random.default_rng(seed)
    gradients = [rng.choice([-1.0, 1.0], (4, SIZE, SIZE, 3)) * rng.uniform(0.1, 1, (4, 1, 1, 1)) for _ in range(2)]
    gradients = [jnp.float32(g) for g in gradients]
    return lambda images: tuple((g * images).sum((1, 2, 3)) for g in gradients), *gradients


@pytest.mark.parametrize('padding', [0.0, -1.0])
def test_every_valid_pixel_moves_by_epsilon_or_to_the_bound_and_padding_stays(padding):
    c = recipe()

    def normalize(pixels):
        return preprocess.normalize(pixels, jnp.asarray(BATCH['valid_size']), c.image.mean, c.image.std, padding)

    function, *gradients = linear_losses(seed=0)
    pixels, epsilon = jnp.asarray(BATCH['image']), 20.0  # far enough for many pixels to reach a bound
    images, class_won_B = adversarial.attack(function, normalize, pixels, epsilon)
    assert len(set(class_won_B.tolist())) == 2
    for i, class_won in enumerate(class_won_B):
        (height, width), up = BATCH['valid_size'][i], np.asarray(gradients[0 if class_won else 1])[i] > 0
        expected = np.clip(np.float32(pixels[i]) + np.where(up, epsilon, -epsilon), 0, 255)
        moved = np.asarray(images[i]) * np.array(c.image.std) + np.array(c.image.mean)
        np.testing.assert_allclose(moved[:height, :width], expected[:height, :width], atol=1e-4)
        assert (np.asarray(images[i])[height:] == padding).all() and (np.asarray(images[i])[:, width:] == padding).all()


def reference(variables, batch, normalizer):
    """(attacked images, which attack won, losses at the true images, at both attacks), one image after the other."""
    c = recipe()
    assign = jax.jit(assignment.assign)
    targets = [assign(ANCHORS_N4, *image) for image in zip(batch['boxes'], batch['labels'], strict=True)]
    classes_BN, regressions_BN4 = (jnp.stack(column) for column in list(zip(*targets, strict=True))[:2])

    def normalize(pixels):
        return preprocess.normalize(jnp.float32(pixels), jnp.asarray(batch['valid_size']), c.image.mean, c.image.std)

    @jax.jit
    def by_image(images):
        outputs, _ = MODEL.apply(variables, images, train=True, mutable=['batch_stats'])
        class_B = losses.focal_loss(outputs.class_logits, classes_BN).sum((1, 2)) / normalizer
        box_B = losses.huber_loss(outputs.box_regressions, regressions_BN4).sum((1, 2)) / (4 * normalizer)
        return class_B, 50 * box_B

    images, attacks = normalize(batch['image']), []
    for which in (0, 1):
        gradient = jax.grad(lambda x, which=which: by_image(x)[which].sum())(images)
        attacks.append(normalize(np.clip(batch['image'] + EPSILON * np.sign(gradient), 0, 255)))
    totals = [np.add(*by_image(attack)) for attack in attacks]
    won = [bool(totals[0][i] >= totals[1][i]) for i in range(len(images))]
    chosen = jnp.stack([attacks[0 if won[i] else 1][i] for i in range(len(images))])
    return chosen, won, by_image(images), [by_image(attack) for attack in attacks]


def seen_in_attack(state):
    """The network's variables with the auxiliary norms, put together by name."""
    params, stats = (dict(adversarial.main(state.variables)[kind]) for kind in ('params', 'batch_stats'))
    for part, (_, aux) in layers_of(state.variables).items():
        params[part] = params[part] | {'bn': {name: aux[name] for name in ('scale', 'bias')}}
        stats[part] = {'bn': {name: aux[name] for name in ('mean', 'var')}}
    return {'params': params, 'batch_stats': stats}


@pytest.fixture(scope='module')
def on():
    """(state before, state after, metrics) of a step with attacks."""
    return one_step(**ON)


def test_each_attack_raises_its_own_loss(on):
    _, _, before, attacked = reference(seen_in_attack(on[0]), BATCH, on[2]['positives'] + 1)
    for which in (0, 1):
        assert attacked[which][which].sum() > before[which].sum()


# The step.


def test_the_step_learns_from_the_stronger_attack_on_each_image(on):
    """Loss, parameters and statistics are those of two plain steps: at the images, and at the attacked ones."""
    before, after, metrics = on
    normalizer = metrics['positives'] + 1
    chosen, won, _, _ = reference(seen_in_attack(before), BATCH, normalizer)
    assert len(set(won)) == 2
    np.testing.assert_allclose(metrics['class_attacks'], np.mean(won))

    c = recipe()
    backwards = np.asarray(chosen) * np.array(c.image.std) + np.array(c.image.mean)
    pixels = np.round(backwards).clip(0, 255).astype(np.uint8)  # epsilon is whole, and so attacked pixels are
    plain_state, plain_step = make(c)
    plain_step = jax.jit(plain_step, static_argnums=2)
    main = plain_state.replace(variables=adversarial.main(before.variables))
    at_true, true_metrics = plain_step(main, BATCH, False)
    aux = main.replace(variables=seen_in_attack(before))
    at_attacked, attacked_metrics = plain_step(aux, BATCH | {'image': pixels}, False)

    np.testing.assert_allclose(metrics['adversarial_loss'], attacked_metrics['loss'], rtol=1e-4)
    np.testing.assert_allclose(metrics['loss'], true_metrics['loss'] + WEIGHT * attacked_metrics['loss'], rtol=1e-4)
    assert_close({name: metrics[name] for name in ('class_loss', 'box_loss')},
                 {name: true_metrics[name] for name in ('class_loss', 'box_loss')})  # fmt: skip
    for kernel in (('backbone', 'conv'), ('class_net', 'conv'), ('box_net',)):
        old, new, by_true, by_attacked = (state.variables['params'] for state in (before, after, at_true, at_attacked))
        for name in kernel:
            old, new, by_true, by_attacked = (tree[name] for tree in (old, new, by_true, by_attacked))
        expected = jax.tree.map(lambda w, a, b: a + WEIGHT * (b - w), old, by_true, by_attacked)
        assert_close(new, expected)
    for part, (main_norm, aux_norm) in layers_of(after.variables).items():
        old = layers_of(before.variables)[part][1]
        true_norm, attacked_norm = (
            state.variables['params'][part]['bn'] | state.variables['batch_stats'][part]['bn']
            for state in (at_true, at_attacked)
        )
        assert_close(main_norm, true_norm)
        for name in ('scale', 'bias'):
            np.testing.assert_allclose(
                aux_norm[name], old[name] + WEIGHT * (attacked_norm[name] - old[name]), rtol=1e-4, atol=1e-5
            )
        assert_close({name: aux_norm[name] for name in ('mean', 'var')},
                     {name: attacked_norm[name] for name in ('mean', 'var')})  # fmt: skip


def test_switched_off_there_is_no_trace_of_it():
    plain, other = make(recipe()), make(recipe(**{'adversarial.epsilon': 5.0}))
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(plain[0])]
    assert not any('auxiliary' in path for path in paths)
    traced = [jax.make_jaxpr(step, static_argnums=2)(state, BATCH, False) for state, step in (plain, other)]
    assert str(traced[0]) == str(traced[1])
    outputs = jax.eval_shape(plain[1], plain[0], BATCH)[1]
    assert outputs.keys().isdisjoint({'adversarial_loss', 'class_attacks'})


def test_what_is_frozen_is_frozen_in_both_sets_of_norms():
    before, after, _ = one_step(frozen=True, **ON, **{'train.freeze': 'backbone', 'optimizer.momentum': 0.9})
    for part, equal in (('backbone', True), ('class_net', False)):
        for old, new in zip(layers_of(before.variables)[part], layers_of(after.variables)[part], strict=True):
            assert {np.array_equal(old[name], new[name]) for name in old} == {equal}


def test_accumulation_in_parts_is_one_step_where_batch_norm_is_frozen():
    """Only there do the images of a batch not meet."""
    whole, parts = (
        one_step(frozen=True, **ON, **{'train.freeze': '.*bn', 'train.gradient_accumulation_steps': n})[1:]
        for n in (1, 2)
    )
    assert_close(parts, whole)


@pytest.mark.slow
def test_two_devices_compute_what_one_computes():
    """Attacks too meet all images of the batch in the batch norms."""
    state, step = make(recipe(**ON), tiny.toy(NUM_CLASSES, devices.AXIS))
    results = []
    for n in (1, 2):
        mapped = jax.pmap(step, axis_name=devices.AXIS, static_broadcasted_argnums=2, devices=jax.local_devices()[:n])
        replicated = jax.tree.map(lambda x, n=n: jnp.stack([x] * n), state)
        batch = {name: x.reshape(n, len(x) // n, *x.shape[1:]) for name, x in BATCH.items()}
        results.append(jax.tree.map(lambda x: x[0], mapped(replicated, batch, False)))
    assert_close(results[1], results[0])


# A whole run.


def config():
    c = tiny.config()
    c.model.max_level = 3  # the toy's only level
    c.adversarial.update(weight=1.0, epsilon=2.0)
    return c


@pytest.fixture(scope='module')
def runs(tmp_path_factory):
    """Work directories of a run, and of the same one stopped after step 3 and started again; of the toy."""
    folder = tmp_path_factory.mktemp('adversarial')
    write = MetricsLog.write

    def interrupting(self, step, numbers):
        write(self, step, numbers)
        if step == 3:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        tiny.use_toy(patch)
        train.train_and_evaluate(config(), folder / 'once')
        with pytest.MonkeyPatch.context() as other, pytest.raises(KeyboardInterrupt):
            other.setattr(MetricsLog, 'write', interrupting)
            train.train_and_evaluate(config(), folder / 'again')
        train.train_and_evaluate(config(), folder / 'again')
        yield folder / 'once', folder / 'again'


def states_of(workdirs):
    c = config()
    like = jax.tree.map(
        lambda x: np.zeros(x.shape, x.dtype), footprint.plan_step(c, tiny.toy(5), np.asarray(ANCHORS_N4), False).state
    )
    for workdir in workdirs:
        checkpoints = Checkpoints(workdir)
        yield checkpoints.restore(tiny.STEPS, like).state
        checkpoints.close()


@pytest.mark.slow
def test_a_continued_run_ends_with_the_same_state_to_the_bit(runs):
    once, again = states_of(runs)
    assert_same(once, again)
    for tree in (once.variables, once.ema):
        for main, aux in layers_of(tree).values():
            assert not any(np.array_equal(main[name], aux[name]) for name in main)
    rows = [row for row in read_metrics(runs[0] / 'metrics.jsonl') if 'train/loss' in row]
    assert all(0 <= row['train/class_attacks'] <= 1 and row['train/adversarial_loss'] > 0 for row in rows)


@pytest.mark.slow
def test_only_the_main_norms_leave_the_training(runs):
    """A detector, and a run that starts from these weights, whose auxiliary norms are copies of the main ones."""
    _, variables = load_variables(runs[0], 'eval/AP')
    assert jax.tree.structure(variables) == jax.tree.structure(init_variables(tiny.toy(5), 0))
    (state, _) = states_of(runs)
    if load_variables(runs[0], 'eval/AP')[0] == tiny.STEPS:
        assert_same(variables, adversarial.main(state.ema))
    assert_same(state.best_variables, adversarial.main(state.ema))
    assert len(Detector.load(runs[0])(np.zeros((64, 64, 3), np.uint8))) > 0

    c = config()
    c.train.init_from = str(runs[0])
    fresh = build.build_run(c, runs[0].parent / 'next').initial_state()
    assert_same(fresh.best_variables, variables)
    for main, aux in layers_of(fresh.variables).values():
        assert_same(main, aux)
    assert not any(map(operator.is_, *map(jax.tree.leaves, (fresh.variables, fresh.ema))))
