"""All config keys with their default values. `rules.py` says which values each may have.

`get_config('d3', 'voc2007,report')` is D3 on the data set `voc2007` with the recipe `report`. Configs are data: they do
not import jax.
"""

from typing import Any

from ml_collections import ConfigDict, config_dict

from effdet_jax.configs.recipes import RECIPES
from effdet_jax.configs.scaling import SCALES

IMAGENET_MEAN = (123.675, 116.28, 103.53)  # 255 * (0.485, 0.456, 0.406)
IMAGENET_STD = (58.395, 57.12, 57.375)  # 255 * (0.229, 0.224, 0.225)

# Words behind a config's file name, `:voc2007`. `source` and the splits are explained in (docs/data.md, Your own data).
DATASETS = {
    'shapes': dict(source='shapes', train_split='0:20000', eval_split='1000000:1000300'),
    'voc2007': dict(source='tfds:voc/2007', train_split='train+validation', eval_split='test'),
    'voc0712': dict(
        source='tfds:voc/2007 + tfds:voc/2012', train_split='train+validation', eval_split='tfds:voc/2007@test'
    ),
    'coco2017': dict(source='tfds:coco/2017', train_split='train', eval_split='validation'),
    'own': dict(source='', train_split='trainval', eval_split='test'),  # the user sets `source`
}


def get_config(name: str, presets: str = 'shapes') -> Any:  # a ConfigDict, whose keys no type checker knows
    """The config of the model `name`. `presets`: names of data sets and recipes, separated by commas.

    If several data sets or recipes are given, the last one counts. Defaults: data set `shapes`, recipe `official`.

    Raises:
      ValueError: for an unknown name or preset.
    """
    if name not in SCALES:
        raise ValueError(f'{name!r} is no member of the family: choose one of {", ".join(SCALES)}')
    dataset, recipe = 'shapes', 'official'
    for word in presets.split(','):
        if word in DATASETS:
            dataset = word
        elif word in RECIPES:
            recipe = word
        else:
            known = f'a data set ({", ".join(DATASETS)}) or a recipe ({", ".join(RECIPES)})'
            raise ValueError(f'preset {word!r} is unknown: choose {known}')
    config = _official(name, dataset)
    config.update_from_flattened_dict(RECIPES[recipe])
    return config


def _official(name: str, dataset: str) -> Any:
    scale = SCALES[name]
    lite = scale.backbone.startswith('lite')
    return ConfigDict(
        dict(
            name=name,
            seed=0,
            image=dict(
                size=(scale.image_size, scale.image_size),  # height and width of the network input
                mean=(127.0,) * 3 if lite else IMAGENET_MEAN,  # RGB, for pixels in 0..255
                std=(128.0,) * 3 if lite else IMAGENET_STD,
                padding=0.0,  # value of the padding after normalization: 0 is the mean color; AdvProp: -1, black
            ),
            model=dict(
                backbone=scale.backbone,
                feature_network=dict(
                    name='bifpn',  # bifpn, fpn, panet, nasfpn, qufpn, fully_connected
                    fusion=scale.fusion,  # fast, softmax, sum
                    per_channel=False,  # one fusion weight per channel instead of one per input
                    separable=True,  # depthwise and pointwise convolutions instead of plain 3x3
                ),
                fpn_channels=scale.fpn_channels,  # channels of the feature network and the heads
                fpn_cells=scale.fpn_cells,  # repeats of the feature network
                head_layers=scale.head_layers,
                max_level=scale.max_level,  # levels P3..P{max_level}
                stochastic_depth=scale.stochastic_depth,  # drop rate of the last block; it grows linearly from 0
                anchors=dict(scale=scale.anchor_scale, scales_per_octave=3, aspect_ratios=(1.0, 2.0, 0.5)),
                dtype='float32',  # compute type; use bfloat16 on TPU and GPU
                remat=False,  # recompute activations in the backward pass: less memory, more time
            ),
            dataset=dict(
                **DATASETS[dataset],
                class_names=(),  # empty: taken from the data
                category_ids=(),  # ids of the classes in COCO results; empty: taken from the data
                accepted_fingerprint='',  # continue with changed training data; the error message gives the value
                max_boxes=100,  # per image, in training
                max_unreadable_fraction=0.01,  # the run stops if more of the images are unreadable
                threads=2,  # for decoding and resizing, per host
                prefetch=16,  # batches
                cache_gb=0.0,  # memory for decoded training images, per host; useful if they all fit
            ),
            augment=dict(
                scale=(0.1, 2.0),  # random scale, 1: the image fits the input; larger images are cropped
                flip=True,
                # In the order in which they are applied. probability: of applying it to an image; 0: off.
                mosaic=dict(probability=0.0),  # four images become one
                rand_augment=dict(probability=0.0, layers=1, magnitude=5.0),  # number of operations; magnitude 0 to 10
                mixup=dict(probability=0.0, alpha=32.0),  # two images blended by Beta(alpha, alpha)
                color_jitter=dict(
                    probability=0.0,
                    brightness=0.4,  # factors are uniform in 1 ± 0.4
                    contrast=0.4,
                    saturation=0.4,
                    hue=0.05,  # in turns, either way
                ),
                erasing=dict(
                    probability=0.0,
                    area=(0.02, 0.2),  # area of the rectangle relative to the image
                    aspect=(0.3, 3.3),  # height / width
                ),
            ),
            loss=dict(
                alpha=0.25,
                gamma=1.5,
                label_smoothing=0.0,
                delta=0.1,  # 1.0 is smooth-L1
                box_weight=50.0,
                iou_kind='',  # iou, giou, diou, ciou; empty: none
                iou_weight=1.0,
                l2=4e-5,  # on convolution kernels, as a part of the loss
                match_threshold=0.5,  # anchors with at least this IoU are positive
            ),
            adversarial=dict(  # Det-AdvProp: also train on attacked images
                weight=0.0,  # weight of the loss on attacked images; 0: off
                epsilon=1.0,  # how far the attack moves each channel of a pixel, of 255
            ),
            train=dict(
                epochs=scale.epochs,
                batch_size=64,  # images on all devices together
                gradient_accumulation_steps=1,  # process each batch in this many parts, one after the other
                ema_decay=0.9998,  # at step t at most (1 + t) / (10 + t); 0: no moving average
                max_skipped_steps=20,  # the run stops after this many steps in a row without a finite loss
                init_from='',  # start from the weights of this work directory
                freeze='',  # regex of parameter paths, e.g. backbone: not trained ...
                unfreeze_epoch=config_dict.placeholder(float),  # ... before this epoch; None: never trained
            ),
            optimizer=dict(
                name='sgd',  # sgd, adam, adamw
                momentum=0.9,  # sgd: momentum; adam, adamw: first moment
                weight_decay=0.0,  # on kernels; sgd: added to the clipped gradient, adamw: decoupled, adam: none
                clip_norm=10.0,  # limit of the global gradient norm; 0: no clipping
                clip_each=True,  # first clip each gradient by its own norm
            ),
            schedule=dict(
                learning_rate=0.08,  # for batch 64; with scale_with_batch, proportional to the batch size
                warmup_init_rate=0.008,  # learning rate of the first step, scaled likewise
                scale_with_batch=True,
                warmup_epochs=1.0,
                decay='cosine',  # cosine, step, constant
                step_epochs=(200.0, 250.0),  # decay='step': divide by 10 at each of these epochs
                final_rate=0.0,  # decay='cosine': the last rate; never scaled
            ),
            eval=dict(
                batch_size=32,
                every_epochs=5.0,
                pictures=8,  # images drawn at each evaluation, detections beside ground truth
                per_class_nms=True,  # boxes only suppress boxes of their own class
                max_candidates=5000,  # before NMS
                nms='gaussian',  # gaussian, hard
                nms_iou_threshold=0.5,
                sigma=0.5,
                score_threshold=0.001,
                max_detections=100,
            ),
            checkpoint=dict(every_epochs=1.0, keep=2, best='eval/AP'),
            log=dict(
                every_steps=20,
                wandb='',  # project, or entity/project, of Weights & Biases; empty: none
            ),
        )
    )
