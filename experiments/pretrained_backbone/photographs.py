"""Does an imported backbone see? Its features, with the classifier that the file brings along, name a photograph.

    python -m experiments.pretrained_backbone.photographs runs/lite0_imagenet FILE.pth [PHOTOGRAPH...]

FILE is what runs/lite0_imagenet was imported from, a PyTorch port of EfficientNet-Lite0; its last three layers are no
part of a detector, and are applied here. Without a photograph: the portrait of Grace Hopper that matplotlib brings.
"""

import sys
from pathlib import Path

import jax
import matplotlib
import numpy as np

from effdet_jax import config as run_config
from effdet_jax.data import read_image, transforms
from effdet_jax.model import efficientnet, layers
from effdet_jax.records.checkpoint import load_variables
from effdet_jax.records.console import info, table
from effdet_jax.weights import readers

IMAGE_SIZE = 224
# Of ImageNet's 1,000 classes, in alphabetical order of their WordNet ids.
CLASS_NAMES = {
    281: 'tabby cat', 282: 'tiger cat', 285: 'Egyptian cat', 287: 'lynx', 400: 'academic gown', 504: 'coffee mug',
    540: 'drilling platform', 652: 'military uniform', 657: 'missile', 667: 'mortarboard', 682: 'obelisk',
    744: 'projectile', 809: 'soup bowl', 812: 'space shuttle', 834: 'suit', 904: 'window screen', 906: 'Windsor tie',
    925: 'consomme', 967: 'espresso', 968: 'cup',
}  # fmt: skip


def main(workdir: str, source: str, *photographs: str) -> None:
    config = run_config.load(Path(workdir))
    _, variables = load_variables(Path(workdir), config.checkpoint.best)
    backbone = efficientnet.EfficientNet(config.model.backbone, 0.0, layers.Norm())
    of_backbone = {collection: tree['backbone'] for collection, tree in variables.items()}
    features = jax.jit(lambda images: backbone.apply(of_backbone, images, train=False)[5])
    head = readers.read(Path(source)).arrays
    for photograph in photographs or [f'{matplotlib.get_data_path()}/sample_data/grace_hopper.jpg']:
        pixels = square(read_image(photograph))
        x = features(((pixels - np.array(config.image.mean)) / np.array(config.image.std))[None].astype(np.float32))
        probability = classify(np.asarray(x), head)
        best = np.argsort(-probability)[:5]
        rows = [(CLASS_NAMES.get(int(i), f'class {i}'), float(probability[i])) for i in best]
        info('\n' + table(('class', 'probability'), rows, Path(photograph).name))


def square(image: np.ndarray) -> np.ndarray:
    """The middle square, scaled to the size of ImageNet training."""
    side = min(image.shape[:2])
    top, left = ((n - side) // 2 for n in image.shape[:2])
    resized, _, _ = transforms.resize_and_pad(image[top : top + side, left : left + side], (IMAGE_SIZE, IMAGE_SIZE))
    return resized


def classify(x: np.ndarray, head: dict[str, np.ndarray]) -> np.ndarray:
    """P5 `[1, H, W, 320]` -> 1x1 convolution, batch norm, relu6, mean, linear, softmax `[1000]`."""
    x = x @ head['_conv_head.weight'][:, :, 0, 0].T
    scale = head['_bn1.weight'] / np.sqrt(head['_bn1.running_var'] + 1e-3)
    x = np.clip((x - head['_bn1.running_mean']) * scale + head['_bn1.bias'], 0, 6).mean(axis=(0, 1, 2))
    logits = head['_fc.weight'] @ x + head['_fc.bias']
    exponents = np.exp(logits - logits.max())
    return exponents / exponents.sum()


if __name__ == '__main__':
    main(*sys.argv[1:])
