"""A checkpoint and reference outputs of effdet, the PyTorch implementation, to certify the importer with.

    pip install -r requirements-torch.txt torchvision timm effdet
    python -m experiments.certify.effdet_reference tf_efficientdet_d0 OUT_FOLDER

writes OUT_FOLDER/<model>.pth, random weights and batch statistics as effdet itself saves them, and
OUT_FOLDER/<model>.npz: what each of its layers returns for a fixed input, under our names.
"""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from effdet import create_model
from effdet.config import get_efficientdet_config
from flax import traverse_util

from effdet_jax.configs import default
from effdet_jax.model import build_model
from effdet_jax.weights import names


def main(model_name: str, folder: str) -> None:
    config = default.get_config(model_name.removeprefix('tf_efficientdet_').split('_')[0])
    theirs = create_model(model_name, bench_task='', pretrained=False, pretrained_backbone=False).eval()
    randomise(theirs)
    height, width = get_efficientdet_config(model_name).image_size
    image = np.random.default_rng(0).standard_normal((1, height, width, 3)).astype(np.float32)
    outputs = layer_outputs(theirs, image, module_names(config.model, theirs.config.num_classes))

    Path(folder).mkdir(parents=True, exist_ok=True)
    torch.save(theirs.state_dict(), Path(folder) / f'{model_name}.pth')
    np.savez(Path(folder) / f'{model_name}.npz', image=image, **outputs)
    print(f'{folder}/{model_name}.pth, .npz: {len(outputs)} outputs for {height}x{width}')


def randomise(model: torch.nn.Module) -> None:
    """As trained weights are: no batch norm is the identity, and activations neither vanish nor explode."""
    generator = torch.Generator().manual_seed(0)

    def normal(tensor: torch.Tensor) -> torch.Tensor:
        return torch.randn(tensor.shape, generator=generator)

    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            leaf = name.rpartition('.')[2]
            if tensor.ndim == 4:
                tensor.copy_(normal(tensor) / (tensor[0].numel() ** 0.5))
            elif leaf == 'running_var':
                tensor.copy_(torch.exp(0.3 * normal(tensor)))
            elif leaf in ('bias', 'running_mean'):
                tensor.copy_(0.1 * normal(tensor))
            elif leaf == 'weight':
                tensor.copy_(torch.exp(0.2 * normal(tensor)))
            elif leaf == 'edge_weights':
                tensor.copy_(0.8 + 0.5 * normal(tensor))


def module_names(model_config: Any, num_classes: int) -> dict[str, str]:
    """{our layer: effdet's module}, by the importer's own table."""
    shapes = traverse_util.flatten_dict(names.shapes_of(build_model(model_config, num_classes)))
    layers = {}
    for path, (name,) in names.their_names(shapes, model_config.backbone, names.SCHEMES['effdet']):
        if path[-1] != 'edge_weights':
            layers['/'.join(path[1:-1])] = name.rpartition('.')[0]
    return layers


def layer_outputs(model: torch.nn.Module, image: np.ndarray, modules: dict[str, str]) -> dict[str, np.ndarray]:
    """{our layer: its output, NHWC}; layers that several levels share get one entry for each, `layer@p3`."""
    calls: dict[str, list[np.ndarray]] = {}

    def remember(layer: str) -> Any:
        return lambda _module, _inputs, output: calls.setdefault(layer, []).append(nhwc(output))

    for layer, module in modules.items():
        submodule = model.get_submodule(module)
        # timm's batch norm ends in the activation; before that it drops nothing, and there we look.
        getattr(submodule, 'drop', submodule).register_forward_hook(remember(layer))
    with torch.no_grad():
        class_maps, box_maps = model(torch.from_numpy(image.transpose(0, 3, 1, 2).copy()))
    outputs = {
        layer if len(maps) == 1 else f'{layer}@p{3 + i}': output
        for layer, maps in calls.items()
        for i, output in enumerate(maps)
    }
    for level, (class_map, box_map) in enumerate(zip(class_maps, box_maps, strict=True), start=3):
        outputs |= {f'class_p{level}': nhwc(class_map), f'box_p{level}': nhwc(box_map)}
    return outputs


def nhwc(tensor: torch.Tensor) -> np.ndarray:
    return tensor.numpy().transpose(0, 2, 3, 1).copy()  # a copy: activations work in place


if __name__ == '__main__':
    main(*sys.argv[1:])
