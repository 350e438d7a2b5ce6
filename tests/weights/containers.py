"""Files as other implementations make them (docs/reference.md, Containers), from {name: array}.

Each function returns the --source.
"""

import tarfile

import h5py
import numpy as np
import safetensors.numpy


def keras_h5(folder, arrays):
    """Keras repeats a layer's name before those of its variables; a layer without variables is an empty group."""
    with h5py.File(path := folder / 'model.h5', 'w') as file:
        file.create_group('resample_p7')
        file.attrs['layer_names'] = [b'resample_p7', *sorted({name.partition('/')[0].encode() for name in arrays})]
        for name, array in arrays.items():
            file[f'{name.partition("/")[0]}/{name}:0'] = array
    return path


def tf1(folder, arrays):
    """Averages beside values that are another training's, slots of the optimizer, the global step."""
    import tensorflow as tf

    everything: dict[str, np.ndarray] = {'global_step': np.asarray(7, np.int64)}
    for name, array in arrays.items():
        everything[name] = array + np.float32(1)
        everything[f'{name}/ExponentialMovingAverage'] = array
        if 'moving' not in name:
            everything[f'{name}/Momentum'] = np.zeros_like(array)
    folder.mkdir(exist_ok=True)
    tf.raw_ops.SaveV2(
        prefix=str(prefix := folder / 'model'), tensor_names=list(everything), shape_and_slices=[''] * len(everything),
        tensors=[tf.constant(array) for array in everything.values()],
    )  # fmt: skip
    (folder / 'checkpoint').write_text('model_checkpoint_path: "model"\nall_model_checkpoint_paths: "model"\n')
    return prefix


def tf1_plain(folder, arrays):
    """Without averages."""
    import tensorflow as tf

    tensors = [tf.constant(array) for array in arrays.values()]
    prefix = folder / 'model.ckpt-1'
    tf.raw_ops.SaveV2(
        prefix=str(prefix), tensor_names=list(arrays), shape_and_slices=[''] * len(arrays), tensors=tensors
    )
    return prefix


def released(folder, arrays):
    """A TF1 checkpoint in a .tar.gz of one folder."""
    tf1(folder / 'efficientdet-d0', arrays)
    with tarfile.open(path := folder / 'efficientdet-d0.tar.gz', 'w:gz') as archive:
        archive.add(folder / 'efficientdet-d0', 'efficientdet-d0')
    return path


def tf2(folder, arrays):
    """What tf.train.Checkpoint makes of objects with these attributes, and of their optimizer's slots."""
    import tensorflow as tf

    tree: dict = {}
    for name, array in arrays.items():
        *parts, leaf = name.split('/')
        node = tree
        for part in parts:
            node = node.setdefault(part, {})
        node[leaf] = tf.Variable(array)

    def to_objects(node):
        if not isinstance(node, dict):
            return node
        children = {name: to_objects(child) for name, child in node.items()}
        if all(name.isdigit() for name in children):
            return [children.get(str(i), tf.Module()) for i in range(max(map(int, children)) + 1)]
        module = tf.Module()
        for name, child in children.items():
            setattr(module, name, child)
        return module

    optimizer = tf.compat.v1.train.MomentumOptimizer(0.1, momentum=0.9)
    kernel = tree['backbone']['_stem']['_conv_stem']['kernel']
    optimizer.apply_gradients([(tf.zeros_like(kernel), kernel)])
    checkpoint = tf.train.Checkpoint(optimizer=optimizer, **{name: to_objects(node) for name, node in tree.items()})
    checkpoint.save(str(folder / 'ckpt'))
    return folder


def pth(folder, content, **options):
    """Whatever a training script saves: dictionaries of arrays, nested or not."""
    import torch

    def to_torch(node):
        if isinstance(node, dict):
            return {name: to_torch(child) for name, child in node.items()}
        return torch.from_numpy(np.array(node)) if isinstance(node, np.ndarray) else node

    torch.save(to_torch(content), path := folder / 'model.pth', **options)
    return path


def safe(folder, arrays):
    safetensors.numpy.save_file(
        {name: np.ascontiguousarray(array) for name, array in arrays.items()}, path := folder / 'model.safetensors'
    )
    return path


def bfloat16(folder, arrays):
    """A .pth of numbers in half the bits."""
    import torch

    halved = {name: torch.from_numpy(np.array(array, order='C')).to(torch.bfloat16) for name, array in arrays.items()}
    torch.save(halved, path := folder / 'model.pth')
    return path


def bfloat16_safe(folder, arrays):
    import safetensors.torch
    import torch

    halved = {name: torch.from_numpy(np.array(array, order='C')).to(torch.bfloat16) for name, array in arrays.items()}
    safetensors.torch.save_file(halved, path := folder / 'model.safetensors')
    return path
