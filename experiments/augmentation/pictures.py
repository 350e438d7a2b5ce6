"""Augmented training pictures with their boxes: python -m experiments.augmentation.pictures OUT.jpg [FOLDER [NAME]]

One row for each augmentation, always applied, four pictures of a batch each; FOLDER holds a data set in PASCAL VOC
layout, without it ('') the embedded shapes are drawn. NAME: only what has this in its name; `rand_augment:` shows all
its operations.
"""

import sys
from pathlib import Path
from unittest import mock

import cv2
import jax
import numpy as np

from effdet_jax import data
from effdet_jax.configs import default
from effdet_jax.records.pictures import draw_boxes, grid, write_image
from effdet_jax.training.augment import AUGMENTATIONS, make_augment
from effdet_jax.training.augmentations.rand_augment import OPERATIONS

SIZE, COLUMNS, TILE = 384, 4, 150
MEAN = tuple(map(round, default.IMAGENET_MEAN))


def main(out: str, folder: str = '', only: str = '') -> None:
    config = default.get_config('d0')
    config.image.size = (SIZE, SIZE)
    config.augment.scale = (0.7, 1.2)
    if folder:
        config.dataset.update(source=f'voc:{folder}', train_split='trainval')
    source = data.open_source(config.dataset.source, config.dataset.train_split, ())
    batches = data.train_batches(
        source,
        image_size=config.image.size,
        batch_size=COLUMNS,
        max_boxes=100,
        scale_range=config.augment.scale,
        seed=1,
    )
    batch = next(iter(batches))
    rows = {'none': batch}
    for name in AUGMENTATIONS:
        rows[name] = augmented(config, batch, name)
    for name in OPERATIONS:
        with mock.patch.dict(OPERATIONS, {name: OPERATIONS[name]}, clear=True):
            rows[f'rand_augment: {name}'] = augmented(config, batch, 'rand_augment')
    chosen = {name: row for name, row in rows.items() if (only in name if only else ':' not in name)}
    tiles = []
    for name, row in chosen.items():
        drawn = [draw(row, index, source.class_names) for index in range(COLUMNS)]
        cv2.putText(drawn[0], name, (6, TILE - 8), (255, 255, 255), cv2.FontFace('sans'), 15, weight=700)
        tiles += drawn
    write_image(Path(out), grid(tiles, columns=COLUMNS))


def augmented(config: default.ConfigDict, batch: dict[str, np.ndarray], name: str) -> dict[str, np.ndarray]:
    """The batch after this augmentation of every image, at a strength that can be seen."""
    config = config.copy_and_resolve_references()
    config.augment.flip = False
    config.augment[name].probability = 1.0
    config.augment.rand_augment.magnitude = 7.0
    config.augment.color_jitter.update(brightness=0.5, contrast=0.5, saturation=0.7, hue=0.1)
    arrays = {key: batch[key] for key in ('image', 'boxes', 'labels', 'valid_size')}
    return jax.device_get(jax.jit(make_augment(config, None))(jax.random.key(3), arrays))


def draw(batch: dict[str, np.ndarray], index: int, class_names: tuple[str, ...]) -> np.ndarray:
    """Padding has the mean colour, as for the network."""
    image, (height, width) = batch['image'][index].copy(), batch['valid_size'][index]
    image[height:], image[:, width:] = MEAN, MEAN
    real = batch['labels'][index] >= 0
    boxes_xyxy = batch['boxes'][index][real][:, [1, 0, 3, 2]]
    drawn = draw_boxes(image, boxes_xyxy, batch['labels'][index][real], class_names)
    return cv2.resize(drawn, (TILE, TILE), interpolation=cv2.INTER_AREA)


if __name__ == '__main__':
    main(*sys.argv[1:])
