"""96 steps that take less time than to start them: what is tried is everything around the step."""

from effdet_jax.configs import default, quickstart


def get_config() -> default.ConfigDict:
    config = quickstart.get_config()
    config.name = 'reliability'
    config.image.size = (64, 64)
    config.model.max_level = 3
    config.dataset.update(train_split='0:128', eval_split='1000000:1000008')
    config.train.update(epochs=3.0, batch_size=4, freeze='backbone', unfreeze_epoch=1.0)
    config.eval.update(batch_size=4, every_epochs=0.5, pictures=1, max_candidates=100, max_detections=10)
    config.checkpoint.update(every_epochs=0.125)
    config.log.every_steps = 1
    return config
