import jax
import numpy as np
import pytest
from flax import traverse_util

from effdet_jax.errors import UserError
from effdet_jax.training.transfer import transfer


def variables(seed, classes=3, channels=4, predictor='predict'):
    """Two parts, of which the second ends with a predictor for so many classes."""
    rng = np.random.default_rng(seed)
    shapes = {
        ('params', 'backbone', 'conv', 'kernel'): (1, 1, 3, channels),
        ('params', 'class_net', 'conv_0', 'kernel'): (1, 1, channels, channels),
        ('params', 'class_net', predictor, 'pw', 'kernel'): (1, 1, channels, 9 * classes),
        ('params', 'class_net', predictor, 'pw', 'bias'): (9 * classes,),
        ('params', 'class_net', predictor, 'dw', 'kernel'): (3, 3, 1, channels),
        ('batch_stats', 'backbone', 'bn', 'mean'): (channels,),
    }
    return traverse_util.unflatten_dict(
        {path: rng.standard_normal(shape).astype(np.float32) for path, shape in shapes.items()}
    )


def test_the_same_model_is_taken_whole():
    merged, rows = transfer(variables(0), variables(1))
    jax.tree.map(np.testing.assert_array_equal, merged, variables(1))
    assert rows == [('backbone', 12, 0, 0), ('class_net', 16 + 4 * 27 + 27 + 36, 0, 0)]


def test_another_number_of_classes_costs_the_class_predictor_alone():
    fresh, source = variables(0), variables(1, classes=5)
    merged, rows = transfer(fresh, source)
    assert rows == [('backbone', 12, 0, 0), ('class_net', 16 + 36, 4 * 27 + 27, 4 * 45 + 45)]
    merged, fresh, source = (traverse_util.flatten_dict(tree) for tree in (merged, fresh, source))
    for path in fresh:
        np.testing.assert_array_equal(merged[path], (fresh if path[-2] == 'pw' else source)[path])


def test_every_parameter_is_counted_once():
    fresh, source = variables(0), variables(1, classes=5)
    _, rows = transfer(fresh, source)
    _, loaded, new, skipped = (sum(column) if i else None for i, column in enumerate(zip(*rows, strict=True)))
    assert loaded + new == sum(leaf.size for leaf in jax.tree.leaves(fresh['params']))
    assert loaded + skipped == sum(leaf.size for leaf in jax.tree.leaves(source['params']))


@pytest.mark.parametrize(
    ('source', 'names'),
    [
        (
            variables(1, channels=8),
            r'batch_stats/backbone/bn/mean, params/backbone/conv/kernel, params/class_net/conv_0',
        ),
        (
            {'params': variables(1)['params'], 'batch_stats': {}},
            r'1 arrays .*, the first are batch_stats/backbone/bn/mean;',
        ),
        (variables(1) | {'batch_stats': {'backbone': {'bn': {'mean': np.zeros(4), 'var': np.zeros(4)}}}}, r'bn/var'),
    ],
    ids=['another width', 'without statistics', 'one array more'],
)
def test_another_model_is_refused_and_the_difference_named(source, names):
    with pytest.raises(UserError, match=names):
        transfer(variables(0), source)
