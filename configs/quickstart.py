"""A detector of the family small enough to learn the embedded shapes on two CPU cores in minutes."""

from effdet_jax.configs import default


def get_config(presets: str = 'shapes') -> default.ConfigDict:
    config = default.get_config('nano', f'short,{presets}')
    config.dataset.update(train_split='0:25600', eval_split='1000000:1000300')
    config.augment.scale = (0.8, 1.25)
    config.train.update(epochs=1.0, batch_size=8)
    config.schedule.update(learning_rate=3e-3, warmup_epochs=0.1)
    config.eval.every_epochs = 0.25
    config.checkpoint.every_epochs = 0.125
    return config
