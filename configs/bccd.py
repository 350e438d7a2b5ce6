"""BCCD, 364 photographs of blood cells, at 256x256 (experiments/bccd): what own data may need beside a recipe.

D0, or another member: configs/bccd.py:lite0.
"""

from effdet_jax.configs import default, own_data


def get_config(presets: str = 'd0') -> default.ConfigDict:
    config = own_data.get_config(presets)
    config.dataset.source = 'voc:data/bccd'
    config.image.size = (256, 256)
    config.model.anchors.scale = 2.0  # 16 pixels on P3: a platelet; the usual 4.0 starts at 32
    return config
