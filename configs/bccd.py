"""BCCD, 364 photographs of blood cells, at 256x256 (experiments/bccd): a recipe for small own data.

D0, or another member: configs/bccd.py:lite0. AdamW with a short schedule, scale jitter that keeps objects near their
size, anchors as small as the smallest class.
"""

from effdet_jax.configs import default


def get_config(name: str = 'd0') -> default.ConfigDict:
    config = default.get_config(name)
    config.dataset.update(source='voc:data/bccd', train_split='trainval', eval_split='test')
    config.image.size = (256, 256)
    config.model.anchors.scale = 2.0  # 16 pixels on P3: a platelet; the usual 4.0 starts at 32
    config.augment.scale = (0.7, 1.4)
    config.train.update(epochs=40.0, batch_size=16, ema_decay=0.998)
    config.optimizer.update(name='adamw', weight_decay=1e-4)
    config.schedule.update(learning_rate=2e-3, warmup_start=1e-4, scale_with_batch=False, warmup_epochs=1.0)
    config.loss.l2 = 0.0
    config.eval.every_epochs = 10.0
    config.checkpoint.every_epochs = 5.0
    return config
