import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from effdet_jax.errors import UserError
from effdet_jax.records.checkpoint import Checkpoints, has_checkpoints, load_variables
from effdet_jax.training.state import init_state

OPTIMIZER = optax.adam(0.1)


def state(seed=0, ema_decay=0.998, width=3):
    """A training state with NumPy leaves of several types, as the loop saves it; the average differs."""
    rng = np.random.default_rng(seed)
    kernel = jnp.float32(rng.standard_normal((2, width)))
    variables = {'params': {'conv': {'kernel': kernel}}, 'batch_stats': {'bn': {'mean': jnp.ones(width)}}}
    made = init_state(variables, OPTIMIZER, ema_decay).replace(step=jnp.int32(seed))
    return jax.tree.map(np.asarray, made.replace(ema=jax.tree.map(lambda x: x + 0.5, made.ema)))


def save(checkpoints, step, ap=None, saved=None):
    metrics = {'eval/AP': ap, 'eval/AP50': 1.0 - ap} if ap is not None else None
    checkpoints.save(step, saved or state(step), {'next_index': step}, {'name': 'd0', 'seed': step}, metrics)


def steps_in(workdir):
    return sorted(int(path.name) for path in (workdir / 'checkpoints').iterdir())


def assert_same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)
    assert jax.tree.map(lambda x: np.asarray(x).dtype, a) == jax.tree.map(lambda x: np.asarray(x).dtype, b)


@pytest.mark.parametrize('ema_decay', [0.998, 0.0], ids=['with an average', 'without'])
def test_what_is_restored_is_what_was_saved_to_the_bit(tmp_path, ema_decay):
    checkpoints = Checkpoints(tmp_path)
    save(checkpoints, 7, saved=state(7, ema_decay))
    checkpoints.close()
    restored = Checkpoints(tmp_path).restore(7, state(0, ema_decay))
    assert_same(restored.state, state(7, ema_decay))
    assert restored.data_position == {'next_index': 7}


def test_the_config_is_in_every_checkpoint(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    save(checkpoints, 7)
    checkpoints.close()
    assert '"seed":7' in (tmp_path / 'checkpoints/7/config/metadata').read_text().replace(' ', '')


def test_the_last_ones_are_kept_and_the_best(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step, ap in enumerate([0.1, 0.9, None, 0.5, None, None], start=1):
        save(checkpoints, step, ap)
    checkpoints.close()
    assert steps_in(tmp_path) == [2, 5, 6]
    again = Checkpoints(tmp_path)
    assert (again.latest_step(), again.best_step()) == (6, 2)
    assert_same(again.restore(2, state()).state, state(2))


def test_a_better_one_takes_the_place_of_the_best(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=1)
    for step, ap in enumerate([0.9, 0.1, 0.95, 0.2], start=1):
        save(checkpoints, step, ap)
    checkpoints.close()
    assert steps_in(tmp_path) == [3, 4]


def test_best_is_by_the_metric_that_was_named(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=1, best='eval/AP50')
    for step, ap in enumerate([0.1, 0.9, 0.5], start=1):
        save(checkpoints, step, ap)
    checkpoints.close()
    assert steps_in(tmp_path) == [1, 3]


def test_before_the_first_evaluation_the_latest_is_the_best(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    assert (checkpoints.latest_step(), checkpoints.best_step()) == (None, None)
    for step in (1, 2):
        save(checkpoints, step)
    checkpoints.close()
    assert Checkpoints(tmp_path).best_step() == 2


def test_the_average_is_what_is_deployed(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    save(checkpoints, 1, ap=0.5)
    save(checkpoints, 2, ap=0.4)
    checkpoints.close()
    step, variables = load_variables(tmp_path)
    assert step == 1
    assert_same(variables, state(1).ema)


def test_without_an_average_the_variables_are_deployed(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    save(checkpoints, 1, saved=state(1, ema_decay=0.0))
    checkpoints.close()
    assert_same(load_variables(tmp_path)[1], state(1).variables)


@pytest.mark.parametrize('wanted', [state(width=4), state(ema_decay=0.0)], ids=['another shape', 'another tree'])
def test_the_state_of_another_model_is_refused(tmp_path, wanted):
    checkpoints = Checkpoints(tmp_path)
    save(checkpoints, 3)
    checkpoints.close()
    with pytest.raises(
        UserError, match=r'checkpoints/3 does not hold the state of this model .*choose another --workdir'
    ):
        Checkpoints(tmp_path).restore(3, wanted)


def test_where_there_is_no_checkpoint_the_message_says_so(tmp_path):
    assert not has_checkpoints(tmp_path)
    with pytest.raises(UserError, match='holds no checkpoints: give the --workdir of a training run'):
        load_variables(tmp_path)
    assert list(tmp_path.iterdir()) == []
    Checkpoints(tmp_path).close()
    assert list(tmp_path.iterdir()) == []  # the first save makes the folder
    (tmp_path / 'checkpoints').mkdir()
    with pytest.raises(UserError, match='holds no checkpoints'):
        load_variables(tmp_path)
