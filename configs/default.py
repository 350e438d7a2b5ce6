"""Every key there is, with the value that is used where nothing says otherwise. `rules.py` says what each may be.

`get_config('d3', 'voc2007,report')` is D3 on the data set `voc2007` by the recipe `report`. A config imports no jax: it
is data.
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
    'own': dict(source='', train_split='trainval', eval_split='test'),  # `source` is for the user to say
}


def get_config(name: str, presets: str = 'shapes') -> Any:  # a ConfigDict, whose keys no type checker knows
    """The family's member `name`, with `presets`, words with commas between them: data sets and recipes.

    Of several words of a kind the last one counts. Without any: the data set `shapes`, the recipe `official`.

    Raises:
      ValueError: for a name or a word that is unknown.
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
                size=(scale.image_size, scale.image_size),  # height, width of the network's input
                mean=(127.0,) * 3 if lite else IMAGENET_MEAN,  # of 0..255, RGB
                std=(128.0,) * 3 if lite else IMAGENET_STD,
                padding=0.0,  # beyond the image, after normalising: 0 is the mean colour; AdvProp: -1, black
            ),
            model=dict(
                backbone=scale.backbone,
                feature_network=dict(
                    name='bifpn',  # bifpn, fpn, panet, nasfpn, qufpn, fully_connected
                    fusion=scale.fusion,  # fast, softmax, sum
                    per_channel=False,  # a weight for every channel of an edge, not one for the edge
                    separable=True,  # depthwise and pointwise convolutions, not 3x3 ones
                ),
                fpn_channels=scale.fpn_channels,  # of the feature network, and of the heads
                fpn_cells=scale.fpn_cells,  # repeats of the feature network
                head_layers=scale.head_layers,
                max_level=scale.max_level,  # levels P3..P{max_level}
                stochastic_depth=scale.stochastic_depth,  # rate of the last block; it grows linearly from 0
                anchors=dict(scale=scale.anchor_scale, scales_per_octave=3, aspect_ratios=(1.0, 2.0, 0.5)),
                dtype='float32',  # of the computation; bfloat16 on TPU and GPU
                remat=False,  # recompute activations in the backward pass: less memory, more time
            ),
            dataset=dict(
                **DATASETS[dataset],
                class_names=(),  # empty: taken from the data
                category_ids=(),  # of the classes in COCO results; empty: taken from the data
                accepted_fingerprint='',  # of other training data to continue with; an error message says which
                max_boxes=100,  # per image, in training
                max_unreadable_fraction=0.01,  # of the images that may be unreadable before the run stops
                threads=2,  # that decode and resize, per host
                prefetch=16,  # batches
                cache_gb=0.0,  # of decoded training images to keep in memory, per host: for data sets that fit
            ),
            augment=dict(
                scale=(0.1, 2.0),  # of the size that fits into the input; what does not fit is cropped
                flip=True,
                # In the order in which they are applied. probability: of each image to get it; 0: off.
                mosaic=dict(probability=0.0),  # four images become one
                rand_augment=dict(probability=0.0, layers=1, magnitude=5.0),  # so many operations, of 0 to 10
                mixup=dict(probability=0.0, alpha=32.0),  # two images blended by Beta(alpha, alpha)
                color_jitter=dict(
                    probability=0.0,
                    brightness=0.4,  # a factor in 1 -+ 0.4, as those of contrast and saturation
                    contrast=0.4,
                    saturation=0.4,
                    hue=0.05,  # turns, either way
                ),
                erasing=dict(
                    probability=0.0,
                    area=(0.02, 0.2),  # of the rectangle, as a share of the picture
                    aspect=(0.3, 3.3),  # height to width
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
                l2=4e-5,  # on every kernel, part of the loss
                match_threshold=0.5,  # IoU from which an anchor is positive
            ),
            adversarial=dict(  # Det-AdvProp: attacked images beside the true ones
                weight=0.0,  # of the loss at attacked images; 0: none are made
                epsilon=1.0,  # of 255: how far the attack moves every channel of a pixel
            ),
            train=dict(
                epochs=scale.epochs,
                batch_size=64,  # over all devices
                gradient_accumulation_steps=1,  # split each batch into so many parts, one after the other
                ema_decay=0.9998,  # reached by (1 + t) / (10 + t); 0: no average
                max_skipped_steps=20,  # steps in a row without a finite loss and gradient, before the run stops
                init_from='',  # a work directory whose weights to start from
                freeze='',  # regex on parameter paths, e.g. backbone: not trained ...
                unfreeze_epoch=config_dict.placeholder(float),  # ... before this epoch; None: never trained
            ),
            optimizer=dict(
                name='sgd',  # sgd, adam, adamw
                momentum=0.9,  # sgd: momentum; adam, adamw: first moment
                weight_decay=0.0,  # on kernels; sgd: added to the clipped gradient, adamw: decoupled, adam: none
                clip_norm=10.0,  # of all gradients together; 0: no clipping
                clip_each=True,  # each gradient by its own norm first
            ),
            schedule=dict(
                learning_rate=0.08,  # at batch 64; scaled in proportion where scale_with_batch
                warmup_init_rate=0.008,  # of the first step, likewise
                scale_with_batch=True,
                warmup_epochs=1.0,
                decay='cosine',  # cosine, step, constant
                step_epochs=(200.0, 250.0),  # step: a tenth of the rate from each on
                final_rate=0.0,  # cosine: where it ends; never scaled
            ),
            eval=dict(
                batch_size=32,
                every_epochs=5.0,
                pictures=8,  # detections beside ground truth, at each evaluation
                per_class_nms=True,  # boxes suppress their own class only
                max_candidates=5000,  # before suppression
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
