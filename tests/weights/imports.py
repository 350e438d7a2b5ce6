"""What the tests of the importer share: a small detector, its config, its file."""

import containers
import writers

from effdet_jax.configs import default

MEMBER = writers.Member('lite0', cells=1, head_layers=1)
CLASS_NAMES = ('circle', 'square', 'triangle', 'star', 'ring')  # as many as the member has
LAYERS = writers.layers(MEMBER)
WRITTEN = writers.draw(LAYERS)


def config(member=MEMBER, class_names=CLASS_NAMES):
    c = default.get_config('lite0')
    c.name = 'small'
    c.image.size = (64, 64)
    c.model.update(backbone=member.backbone, fpn_channels=member.channels, fpn_cells=member.cells)
    c.model.update(head_layers=member.head_layers, max_level=member.max_level)
    c.model.feature_network.fusion = 'fast' if member.weighted else 'sum'
    c.dataset.class_names = class_names
    return c


def torch_arrays(layers=LAYERS, written=WRITTEN):
    return writers.to_torch(layers, written)


def file(folder, arrays=None):
    """An effdet .safetensors, which is read without torch."""
    return containers.safe(folder, torch_arrays() if arrays is None else arrays)
