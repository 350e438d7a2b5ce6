import jax
import numpy as np
import pytest
import tiny

from effdet_jax.errors import UserError
from effdet_jax.inference.detector import image_anchors
from effdet_jax.model import build_model
from effdet_jax.runtime import devices
from effdet_jax.training.optimizer import make_optimizer
from effdet_jax.training.state import init_state, init_variables
from effdet_jax.training.step import make_train_step

BATCH = {'image': np.arange(8 * 3).reshape(8, 3), 'index': np.arange(8)}


def test_there_are_four_devices():
    assert jax.local_device_count() == 4


def test_every_device_gets_the_next_part_of_a_batch_and_all_come_back_in_order():
    sharded = devices.shard(BATCH)
    assert sharded['image'].shape == (4, 2, 3)
    jax.tree.map(np.testing.assert_array_equal, devices.unshard(sharded), BATCH)


def test_mapped_functions_know_their_place_on_the_axis():
    def place(x):
        return x + 0 * jax.lax.axis_index(devices.AXIS), jax.lax.psum(x.sum(), devices.AXIS)

    x, total = devices.map_devices(place)(devices.shard(BATCH)['index'])
    np.testing.assert_array_equal(devices.unshard(x), BATCH['index'])
    np.testing.assert_array_equal(total, [28] * 4)


def test_every_device_gets_a_copy_of_the_state():
    copies = devices.replicate(BATCH)
    assert all(len(x.addressable_shards) == 4 for x in jax.tree.leaves(copies))
    jax.tree.map(np.testing.assert_array_equal, devices.first_replica(copies), BATCH)


def test_a_batch_is_a_multiple_of_devices_and_parts():
    assert devices.host_batch_size('config.train.batch_size', 24, parts=2) == 24
    with pytest.raises(UserError, match=r'config\.eval\.batch_size=6 cannot be divided evenly into 4 devices'):
        devices.host_batch_size('config.eval.batch_size', 6)
    with pytest.raises(UserError, match=r'=12 cannot be divided evenly into 4 devices x 2 parts: choose a multiple'):
        devices.host_batch_size('config.train.batch_size', 12, parts=2)


def test_alone_a_host_gathers_its_own():
    thing = {3: ('boxes', np.zeros(2))}
    assert devices.gather_objects(thing) == [thing]


@pytest.fixture(scope='module')
def three_steps():
    """`three_steps(count)`: losses and final state of three steps with flips and stochastic depth, nothing frozen."""
    config = tiny.config()
    model = build_model(config.model, 5, devices.AXIS)
    optimizer, schedule = make_optimizer(config, tiny.STEPS_PER_EPOCH, tiny.STEPS)
    start = init_state(init_variables(model, config.seed), optimizer, config.train.ema_decay)
    # From the epoch in which nothing is frozen any more.
    start = devices.first_replica(devices.replicate(start.replace(step=np.int32(tiny.STEPS_PER_EPOCH))))
    train_step = make_train_step(config, model, optimizer, schedule, image_anchors(config))

    def run(count):
        with pytest.MonkeyPatch.context() as patch:
            all_devices, pmap = jax.local_devices(), jax.pmap
            patch.setattr(jax, 'local_device_count', lambda: count)
            patch.setattr(jax, 'pmap', lambda *args, **kwargs: pmap(*args, devices=all_devices[:count], **kwargs))
            step = devices.map_devices(train_step, donate=(0,), static=(2,))
            state, losses = devices.replicate(start), []
            for seed in range(3):
                batch = tiny.batch(64, num_classes=5, seed=seed)
                state, metrics = step(state, devices.shard(batch), False)
                losses.append(devices.first_replica(metrics))
            return losses, state

    return run


@pytest.mark.slow
@pytest.mark.usefixtures('depthwise_by_xla')
def test_four_devices_compute_what_one_computes(three_steps):
    losses_4, state_4 = three_steps(4)
    losses_1, state_1 = three_steps(1)
    jax.tree.map(lambda x: np.testing.assert_array_equal(x, np.broadcast_to(x[:1], x.shape)), state_4)
    for ours, expected in zip(losses_4, losses_1, strict=True):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4), ours, expected)
    final_4, final_1 = devices.first_replica(state_4), devices.first_replica(state_1)

    def assert_close(path, a, b):
        # Some means and biases are zero but for rounding: the batch norm before or behind them takes them away.
        tolerance = 1e-4 * np.abs(b).max() + 3e-7
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance, err_msg=jax.tree_util.keystr(path))

    jax.tree_util.tree_map_with_path(assert_close, (final_4.variables, final_4.ema), (final_1.variables, final_1.ema))
