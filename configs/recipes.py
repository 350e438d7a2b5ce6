"""Training recipes: {recipe: {config key: value that differs from `default.py`}}, as in `configs/d3.py:voc2007,report`.

If several recipes are given, only the last one is used. Values that depend on the model (sizes, stochastic depth) or on
the data (image size, anchors) are not part of a recipe.
"""

from typing import Any

RECIPES: dict[str, dict[str, Any]] = {
    # google/automl's (docs/reference.md, Optimization): SGD, a rate in proportion to the batch, cosine, L2 in the loss,
    # two stages of clipping.
    'official': {},
    # train.py of effdet (likewise): SGD with momentum 0.9 and a cosine, as above. Other than there: the rate moves at
    # every step, not every epoch; the 10 cool-down epochs at the final rate are left out; the average, off there unless
    # asked for, ramps up to its decay of 0.9998; stochastic depth is the member's (effdet: 0.2 for D0, 0 for Lite0).
    'effdet': {
        'train.epochs': 300.0,
        'train.batch_size': 32,
        'schedule.learning_rate': 0.09,  # its README, for 4 x 16 images: at batch 64, as here
        'schedule.warmup_init_rate': 2e-4,  # at batch 64, so 1e-4 at 32
        'schedule.warmup_epochs': 5.0,
        'schedule.final_rate': 1e-5,
        'optimizer.clip_each': False,
        'optimizer.weight_decay': 4e-5,  # of kernels, after clipping ...
        'loss.l2': 0.0,  # ... not before it
    },
    # The report that this project starts from (docs/seed_report.md, Training): VOC 2007; D0, D1 and D3.
    'report': {
        'train.epochs': 200.0,  # 100 to 200
        'train.freeze': 'backbone',  # needs a trained backbone: train.init_from
        'train.unfreeze_epoch': 50.0,  # 50 to 100; the loss stands still after about 50
        'schedule.learning_rate': 1e-3,  # better than 1e-5
        'loss.delta': 1.0,  # smooth-L1 (docs/seed_report.md, Losses)
        # Left open by the report; chosen here: what its few words say and nothing more.
        'train.batch_size': 16,
        'train.ema_decay': 0.0,
        'optimizer.name': 'adam',
        'schedule.scale_with_batch': False,
        'schedule.warmup_epochs': 0.0,
        'schedule.warmup_init_rate': 1e-3,  # of the very first step
        'schedule.decay': 'constant',
        'loss.l2': 0.0,
        # The report does not give the next three, clipping and augmentation; official values.
        'loss.alpha': 0.25,
        'loss.gamma': 1.5,
        'loss.box_weight': 50.0,
    },
    # Ours, for a few hundred to a few thousand images (experiments/bccd): a few thousand steps from scratch.
    'short': {
        'augment.scale': (0.7, 1.4),  # objects keep about their size
        'train.epochs': 40.0,
        'train.batch_size': 16,
        'train.ema_decay': 0.998,  # remembers 500 steps
        'optimizer.name': 'adamw',
        'optimizer.weight_decay': 1e-4,
        'schedule.learning_rate': 2e-3,
        'schedule.warmup_init_rate': 1e-4,
        'schedule.scale_with_batch': False,
        'schedule.warmup_epochs': 1.0,
        'loss.l2': 0.0,
        'eval.every_epochs': 10.0,
        'checkpoint.every_epochs': 5.0,
    },
}
