"""A full training step of every member of the family at its own size, traced and not run: every shape fits."""

import jax
import numpy as np
import pytest
from quick import slow_but

from effdet_jax.configs import default, scaling
from effdet_jax.inference.detector import image_anchors
from effdet_jax.model import build_model
from effdet_jax.training.optimizer import make_optimizer
from effdet_jax.training.state import init_state
from effdet_jax.training.step import make_train_step

pytestmark = pytest.mark.usefixtures('depthwise_by_xla')
NUM_CLASSES = 90


@pytest.mark.parametrize('name', slow_but([name for name in scaling.SCALES if name != 'nano'], 'd0'))
def test_a_training_step_can_be_traced(name, shapes):
    config = default.get_config(name, 'coco2017')
    optimizer, schedule = make_optimizer(config, 1000, 3000)
    state = jax.eval_shape(lambda fresh: init_state(fresh, optimizer, config.train.ema_decay), shapes(name))
    step = make_train_step(config, build_model(config.model, NUM_CLASSES), optimizer, schedule, image_anchors(config))
    after, metrics = jax.eval_shape(step, state, batch(config))
    assert jax.tree.map(signature, after) == jax.tree.map(signature, state)
    assert {signature(metric) for metric in metrics.values()} == {((), np.dtype('float32'))}


def signature(array):
    return array.shape, array.dtype


def batch(config):
    """The shapes of a batch of one image."""
    boxes = config.dataset.max_boxes
    return {
        'image': jax.ShapeDtypeStruct((1, *config.image.size, 3), np.uint8),
        'valid_size': jax.ShapeDtypeStruct((1, 2), np.int32),
        'boxes': jax.ShapeDtypeStruct((1, boxes, 4), np.float32),
        'labels': jax.ShapeDtypeStruct((1, boxes), np.int32),
    }
