"""What the tests of training and inference share: a run of eight steps, a few images, a detector of four layers."""

import flax.linen as nn
import jax
import numpy as np

from effdet_jax import build, data, evaluate
from effdet_jax.configs import quickstart, rules
from effdet_jax.data import shapes
from effdet_jax.inference import detector
from effdet_jax.model import EfficientDet, build_model, efficientdet, layers

STEPS_PER_EPOCH, STEPS = 4, 8


def config():
    """Two epochs of four steps on 64x64 pixels. The backbone is unfrozen after the first; saved every second step."""
    c = quickstart.get_config()
    c.image.size = (64, 64)
    c.model.update(fpn_channels=16, fpn_cells=1, head_layers=1, max_level=6, stochastic_depth=0.2)
    c.dataset.update(train_split='0:16', eval_split='1000000:1000006', max_boxes=2)
    c.train.update(epochs=2.0, batch_size=4, freeze='backbone', unfreeze_epoch=1.0)
    c.optimizer.update(name='sgd', weight_decay=0.0)
    c.schedule.update(learning_rate=0.05, warmup_init_rate=0.01, warmup_epochs=0.5)
    c.loss.l2 = 4e-5
    c.eval.update(batch_size=4, every_epochs=1.0, pictures=2, max_candidates=200, max_detections=10)
    c.checkpoint.update(every_epochs=0.5)
    c.log.every_steps = 1
    return c


class ManySizes:
    """Pictures of shapes in as many sizes and proportions, larger and smaller than the network's input."""

    class_names = shapes.CLASS_NAMES
    category_ids = (1, 2, 3, 4, 5)

    def __init__(self, length):
        self._length = length

    def __len__(self):
        return self._length

    def __getitem__(self, index):
        example = shapes.draw(index, size=40 + 20 * index)
        margins = ((0, 0), (0, 7 * index), (0, 0)) if index % 2 else ((0, 5 * index), (0, 0), (0, 0))
        return data.Example(np.pad(example.image, margins), example.annotations)

    def annotations(self, index):
        return self[index].annotations


class Toy(EfficientDet):
    """A backbone of one convolution and two predictors, with batch norm in the backbone and in the class network.

    Compiles in a second. One level of 8x8 pixels: `(H / 8) * (W / 8) * 9` anchors.
    """

    @nn.compact
    def __call__(self, images, train=False):
        norm = layers.Norm(axis_name=self.axis_name)
        x = Convolution(8, 8, norm, name='backbone')(images, train)
        logits = Convolution(9 * self.num_classes, 1, norm, name='class_net')(x, train)
        regressions = nn.Conv(9 * 4, (1, 1), name='box_net')(x)
        rows = images.shape[0], -1
        return efficientdet.Outputs(
            logits.reshape(*rows, self.num_classes) - 2.0, nn.tanh(regressions).reshape(*rows, 4)
        )


class Convolution(nn.Module):
    features: int
    stride: int
    norm: layers.Norm

    @nn.compact
    def __call__(self, x, train):
        x = nn.Conv(self.features, (self.stride,) * 2, strides=self.stride, name='conv')(x)
        return nn.relu(self.norm('bn')(x, train))


def toy(num_classes, axis_name=None):
    """A `Toy`, whose other fields mean nothing."""
    return Toy(num_classes, 'nano', 'bifpn', 'fast', channels=8, cells=1, head_layers=1, axis_name=axis_name)


def use_toy(patch):
    """Commands and training build a `toy` in place of every model."""

    def build_toy(model_config, num_classes, axis_name=None):
        build_model(model_config, num_classes, axis_name)  # reads the keys: one that nothing reads is refused
        return toy(num_classes, axis_name)

    for module in (build, evaluate, detector):
        patch.setattr(module, 'build_model', build_toy)
    patch.setitem(rules.RULES, 'model.max_level', rules.whole(3))  # the only level that a toy has


def batch(size, images=4, num_classes=3, seed=0):
    """A training batch of noise with up to three boxes per image, some padding at the right and at the bottom."""
    rng = np.random.default_rng(seed)
    valid_BM2 = rng.integers(size // 2, size + 1, (images, 2)).astype(np.int32)
    corners = np.sort(rng.uniform(0, 1, (images, 4, 2, 2)), axis=2) * valid_BM2[:, None, None]
    labels_BM = np.where(np.arange(4) < rng.integers(1, 4, (images, 1)), rng.integers(0, num_classes, (images, 4)), -1)
    return {
        'image': rng.integers(0, 256, (images, size, size, 3)).astype(np.uint8),
        'valid_size': valid_BM2,
        'boxes': corners.reshape(images, 4, 4).astype(np.float32) * (labels_BM >= 0)[..., None],
        'labels': labels_BM.astype(np.int32),
    }


def assert_same(a, b):
    """Equal trees, to the bit."""
    jax.tree.map(np.testing.assert_array_equal, a, b)
