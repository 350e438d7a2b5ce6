"""What `peers` compares, each in a process of its own: builds one system for one case and runs blocks of it when told.

    python -m experiments.benchmarks.peer_systems SYSTEM CASE FOLDER DEVICE

speaks JSON lines over stdin and stdout with `peers`, which starts it. In place of a system, `prepare` writes what all
systems share into FOLDER, weights that PyTorch has drawn and inputs, and `export` the ONNX file.
"""

import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple

import numpy as np

from effdet_jax.runtime import process, timing

CLASSES, OBJECTS = 90, 8  # as COCO: classes, objects of a training image
PHOTO = 480, 640  # height, width of what goes from image to boxes
COMPARED_IMAGES = 1  # of a batch: the outputs of 64 are gigabytes
FRESH_CALLS = 3  # before anything counts; the first one compiles
WEIGHTS, INPUTS, ONNX = 'weights.safetensors', 'inputs.npz', 'model.onnx'


class Case(NamedTuple):
    """One row of the comparison; written infer:d0:512:1."""

    what: str  # infer, train
    model: str
    size: int
    batch: int

    def __str__(self) -> str:
        return ':'.join(map(str, self))


class Work(NamedTuple):
    """One system, built. `call` starts one piece of work, `wait` waits for what it returned."""

    call: Callable[[], Any]
    wait: Callable[[Any], Any]
    outputs: Callable[[Any], dict[str, np.ndarray]]  # of a finished call: what must agree with the other systems
    notes: dict[str, Any]  # threads, versions, ...
    device_peak: Callable[[], int | None]  # bytes on an accelerator


def parse_case(text: str) -> Case:
    """Raises ValueError where it is none."""
    what, model, size, batch = text.split(':')
    if what not in ('infer', 'train'):
        raise ValueError(what)
    return Case(what, model, int(size), int(batch))


def main(system: str, case: str, folder: str, device: str) -> None:
    parsed = parse_case(case)
    if system in PREPARATIONS:
        PREPARATIONS[system](parsed, Path(folder), device)
        return
    if SYSTEMS[system].build in (build_ours, build_our_boxes):
        process.prepare()  # as every command of ours does
    with answers() as answer:
        start = perf_counter()
        work = SYSTEMS[system].build(parsed, Path(folder), device)
        built = perf_counter()
        result = work.call()
        work.wait(result)
        first_call = perf_counter() - built
        np.savez(Path(folder) / f'{system}.npz', **work.outputs(result))
        del result
        one = min(timing.seconds_of(lambda: work.wait(work.call())) for _ in range(FRESH_CALLS))
        start_peak = timing.peak_bytes()
        timing.settle()
        ready = {'build_s': built - start, 'first_call_s': first_call, 'call_s': one, 'start_peak': start_peak}
        answer(ready | {'notes': work.notes})
        ahead = 1 if parsed.what == 'train' and device != 'cpu' else 0  # as our loop, and as PyTorch's queues
        for line in sys.stdin:
            seconds = timing.seconds_per_call(work.call, work.wait, json.loads(line)['calls'], ahead)
            answer({'seconds': seconds, 'peak': timing.peak_bytes(), 'device_peak': work.device_peak()})


@contextlib.contextmanager
def answers() -> Iterator[Callable[[dict[str, Any]], None]]:
    """Gives a function that sends one line to `peers`; whatever else prints to stdout goes to stderr."""
    with os.fdopen(os.dup(1), 'w') as pipe:
        os.dup2(2, 1)

        def answer(message: dict[str, Any]) -> None:
            print(json.dumps(message), file=pipe, flush=True)

        yield answer


def prepare(case: Case, folder: Path, device: str) -> None:
    """The same weights and inputs for all. In a process of its own, since it imports everything."""
    import torch
    from safetensors.torch import save_file

    from effdet_jax.training.footprint import random_batch

    torch.manual_seed(0)
    model = effdet_model(case)
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, folder / WEIGHTS)
    if case.what == 'train':
        inputs = random_batch(our_config(case, device), case.batch, CLASSES, OBJECTS)
    else:
        shape = (case.batch, case.size, case.size, 3)
        inputs = {'images': np.random.default_rng(0).standard_normal(shape, np.float32)}
    np.savez(folder / INPUTS, **inputs)


def export(case: Case, folder: Path, device: str) -> None:
    """What `prepare` made, as an ONNX file."""
    import torch
    from safetensors.torch import load_file

    model = effdet_model(case)
    model.load_state_dict(load_file(folder / WEIGHTS))
    images = torch.from_numpy(np.load(folder / INPUTS)['images'].transpose(0, 3, 1, 2).copy())
    torch.onnx.export(model.eval(), (images,), folder / ONNX)


PREPARATIONS = {'prepare': prepare, 'export': export}


# --- ours ---


def our_config(case: Case, device: str) -> Any:
    """The family member's own config, with the case's size and batch; bfloat16 on accelerators."""
    from effdet_jax.configs import default

    config = default.get_config(case.model)
    config.image.size = (case.size, case.size)
    config.train.batch_size = case.batch
    if device != 'cpu':
        config.model.dtype = 'bfloat16'
    return config


def build_ours(case: Case, folder: Path, device: str) -> Work:
    import jax

    from effdet_jax.model import build_model
    from effdet_jax.runtime import devices

    config = our_config(case, device)
    model = build_model(config.model, CLASSES, devices.AXIS if case.what == 'train' else None)
    variables = our_variables(model, config, folder)
    build = {'infer': _our_network, 'train': _our_step}[case.what]
    call, outputs = build(config, model, variables, dict(np.load(folder / INPUTS)))
    return Work(call, jax.block_until_ready, outputs, _our_notes(), _our_device_peak)


def build_our_boxes(case: Case, folder: Path, device: str) -> Work:
    """uint8 photographs in, at most 100 boxes out, through the public `Detector`: resizing, network, soft NMS."""
    import functools

    from effdet_jax.inference.detector import Detector, Thresholds, make_detect_pixels
    from effdet_jax.model import build_model
    from effdet_jax.model.batch_norm import fold
    from effdet_jax.runtime import xla

    config = our_config(case, device)
    model = build_model(config.model, CLASSES)
    variables = our_variables(model, config, folder)
    function = functools.partial(xla.jit(make_detect_pixels(config, model)), fold(variables))
    names = tuple(f'class {index}' for index in range(CLASSES))
    thresholds = Thresholds(config.eval.score_threshold, config.eval.nms_iou_threshold, config.eval.sigma)
    detector = Detector([function], names, tuple(range(1, CLASSES + 1)), thresholds, batch_size=case.batch)
    rng = np.random.default_rng(0)
    photos = [rng.integers(0, 256, (*PHOTO, 3), np.uint8) for _ in range(case.batch)]

    def outputs(found: Any) -> dict[str, np.ndarray]:
        return {'boxes_found': np.array([len(detections.scores) for detections in found])}

    return Work(lambda: detector(photos), lambda found: found, outputs, _our_notes(), _our_device_peak)


def our_variables(model: Any, config: Any, folder: Path) -> Any:
    import jax
    from flax import traverse_util
    from safetensors.numpy import load_file

    from effdet_jax.weights import families, names

    found = families.recognise(load_file(folder / WEIGHTS))
    shapes = traverse_util.flatten_dict(names.shapes_of(model))
    matched = names.match_weights(found.arrays, shapes, config.model.backbone, found.scheme)
    assert not matched.missing and not matched.mismatched, (matched.missing, matched.mismatched)
    return jax.device_put(traverse_util.unflatten_dict(matched.arrays))


def _our_network(config: Any, model: Any, variables: Any, inputs: dict[str, np.ndarray]) -> tuple[Callable, Callable]:
    import jax

    from effdet_jax.model.batch_norm import fold
    from effdet_jax.runtime import xla

    variables = fold(variables)  # as `Detector` does
    network = xla.jit(lambda variables, images: model.apply(variables, images, train=False))
    images = jax.device_put(inputs['images'])

    def outputs(found: Any) -> dict[str, np.ndarray]:
        return {name: np.asarray(getattr(found, name)[:COMPARED_IMAGES]) for name in found._fields}

    return lambda: network(variables, images), outputs


def _our_step(config: Any, model: Any, variables: Any, inputs: dict[str, np.ndarray]) -> tuple[Callable, Callable]:
    """As the training loop takes it: batches come as NumPy arrays, the state stays on the device."""
    import jax

    from effdet_jax.inference.detector import image_anchors
    from effdet_jax.runtime import devices
    from effdet_jax.training.compiled import map_train_step
    from effdet_jax.training.state import init_state

    steps = 10**6  # of an epoch: the rate stays that of the warm-up's beginning
    step, optimizer = map_train_step(config, model, image_anchors(config), steps, steps)
    state = devices.replicate(jax.device_get(init_state(variables, optimizer, config.train.ema_decay)))
    batch = devices.shard(inputs)

    def call() -> Any:
        nonlocal state
        state, metrics = step(state, batch, False)
        return metrics

    def outputs(metrics: Any) -> dict[str, np.ndarray]:
        return {name: np.asarray(metrics[name])[0] for name in ('class_loss', 'box_loss')}

    return call, outputs


def _our_notes() -> dict[str, Any]:
    import jax

    return {'jax': jax.__version__, 'device': jax.devices()[0].device_kind, 'threads': f'XLA: {os.cpu_count()}'}


def _our_device_peak() -> int | None:
    import jax

    return (jax.devices()[0].memory_stats() or {}).get('peak_bytes_in_use')


# --- effdet ---


def effdet_model(case: Case) -> Any:
    """effdet's network, untrained."""
    import effdet

    return effdet.create_model(
        f'tf_efficientdet_{case.model}', num_classes=CLASSES, image_size=(case.size, case.size), pretrained=False,
        pretrained_backbone=False,
    )  # fmt: skip


def build_effdet(channels_last: bool, compiled: bool) -> Callable[[Case, Path, str], Work]:
    """A builder. `compiled`: torch.compile with its default settings."""

    def build(case: Case, folder: Path, device: str) -> Work:
        import torch
        from safetensors.torch import load_file

        torch.backends.cudnn.benchmark = True
        layout = torch.channels_last if channels_last else torch.contiguous_format
        model = effdet_model(case)
        model.load_state_dict(load_file(folder / WEIGHTS))
        model = model.to(device=device, memory_format=layout)
        inputs = dict(np.load(folder / INPUTS))
        function = {'infer': _effdet_network, 'train': _effdet_step}[case.what]
        call, outputs, notes = function(model, inputs, layout, compiled, device)
        notes |= {name: version(name) for name in ('torch', 'timm', 'effdet')}
        notes |= {'threads': f'torch: {torch.get_num_threads()} intra-op, {torch.get_num_interop_threads()} inter-op'}
        if device == 'cpu':
            return Work(call, lambda result: result, outputs, notes, lambda: None)

        def call_and_mark() -> Any:
            result, event = call(), torch.cuda.Event()
            event.record()
            return result, event

        return Work(
            call_and_mark, lambda marked: marked[1].synchronize(), lambda marked: outputs(marked[0]), notes,
            torch.cuda.max_memory_allocated,
        )  # fmt: skip

    return build


def _effdet_network(
    model: Any, inputs: dict[str, np.ndarray], layout: Any, compiled: bool, device: str
) -> tuple[Callable, Callable, dict[str, Any]]:
    import torch

    network = torch.compile(model.eval()) if compiled else model.eval()
    images = torch.from_numpy(inputs['images']).permute(0, 3, 1, 2).to(device).contiguous(memory_format=layout)

    def call() -> Any:
        with torch.inference_mode(), _autocast(device):
            return network(images)

    return call, _level_outputs, {}


def _level_outputs(found: Any) -> dict[str, np.ndarray]:
    """[B, A * K, H, W] of each level -> [B, N, K], in the order of the anchors, as ours."""

    def join(levels: Any, values: int) -> np.ndarray:
        first = [x[:COMPARED_IMAGES] for x in levels]
        arrays = [np.asarray(x.float().cpu() if hasattr(x, 'cpu') else x) for x in first]
        return np.concatenate([x.transpose(0, 2, 3, 1).reshape(len(x), -1, values) for x in arrays], axis=1)

    class_levels, box_levels = found
    return {'class_logits': join(class_levels, CLASSES), 'box_regressions': join(box_levels, 4)}


def _effdet_step(
    model: Any, inputs: dict[str, np.ndarray], layout: Any, compiled: bool, device: str
) -> tuple[Callable, Callable, dict[str, Any]]:
    """A step with the recipe of ours: SGD, L2 on kernels, clipping, moving average of all variables.

    Anchors are labelled ahead, as effdet does by default in the workers of its data loader; ours are labelled in the
    step. The notes say how long effdet's own labelling takes for the batch, so that it can be added.
    """
    import torch
    from effdet.anchors import AnchorLabeler, Anchors
    from effdet.bench import DetBenchTrain
    from timm.utils import ModelEmaV3

    bench = DetBenchTrain(model, create_labeler=False).train().to(device)
    train = torch.compile(bench) if compiled else bench
    kernels = [p for p in model.parameters() if p.ndim == 4]
    others = [p for p in model.parameters() if p.ndim != 4]
    groups = [{'params': kernels, 'weight_decay': 4e-5}, {'params': others, 'weight_decay': 0.0}]
    optimizer = torch.optim.SGD(groups, lr=1e-3, momentum=0.9)
    average = ModelEmaV3(model, decay=0.9998)
    labeler = AnchorLabeler(Anchors.from_config(model.config), CLASSES)
    targets, seconds = _label(labeler, inputs, device)
    mean, std = (torch.tensor(x, device=device).view(1, 3, 1, 1) for x in _statistics(model))

    def call() -> Any:
        uint8 = torch.from_numpy(inputs['image']).to(device).permute(0, 3, 1, 2)
        images = uint8.float().contiguous(memory_format=layout).sub_(mean).div_(std)
        with _autocast(device):
            losses = train(images, targets)
        losses['loss'].backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 10.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        average.update(model)
        return losses

    def outputs(losses: Any) -> dict[str, np.ndarray]:
        return {name: losses[name].detach().float().cpu().numpy() for name in ('class_loss', 'box_loss')}

    return call, outputs, {'labels_s': seconds}


def _label(labeler: Any, inputs: dict[str, np.ndarray], device: str) -> tuple[dict[str, Any], float]:
    """(targets of the batch, median of the seconds that making them takes)."""
    import torch

    boxes = torch.from_numpy(inputs['boxes'])
    classes = torch.from_numpy(np.where(inputs['labels'] < 0, -1, inputs['labels'] + 1))  # effdet counts from 1
    seconds = []
    for _ in range(5):
        start = perf_counter()
        class_levels, box_levels, positives = labeler.batch_label_anchors(boxes, classes)
        seconds.append(perf_counter() - start)
    targets = {f'label_cls_{i}': level.to(device) for i, level in enumerate(class_levels)}
    targets |= {f'label_bbox_{i}': level.to(device) for i, level in enumerate(box_levels)}
    return targets | {'label_num_positives': positives.to(device)}, timing.spread(seconds).median


def _statistics(model: Any) -> tuple[list[float], list[float]]:
    """(mean, std) of the pixels, 0..255: as our config has them for this member of the family."""
    from effdet_jax.configs import default

    image = default.get_config(model.config.name.removeprefix('tf_efficientdet_')).image
    return list(image.mean), list(image.std)


def _autocast(device: str) -> contextlib.AbstractContextManager:
    import torch

    return contextlib.nullcontext() if device == 'cpu' else torch.autocast(device, torch.bfloat16)


# --- ONNX Runtime ---


def build_onnx(case: Case, folder: Path, device: str) -> Work:
    """effdet's network, exported by PyTorch; default settings of ONNX Runtime."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(folder / ONNX), providers=['CPUExecutionProvider'])
    images = np.ascontiguousarray(np.load(folder / INPUTS)['images'].transpose(0, 3, 1, 2))
    (entry,) = session.get_inputs()

    def outputs(found: Any) -> dict[str, np.ndarray]:
        half = len(found) // 2
        return _level_outputs((found[:half], found[half:]))

    notes = {'onnxruntime': onnxruntime.__version__, 'threads': 'ONNX Runtime: its default'}
    return Work(lambda: session.run(None, {entry.name: images}), lambda found: found, outputs, notes, lambda: None)


class System(NamedTuple):
    """A column of the comparison: where it applies, and how it is built."""

    title: str
    what: tuple[str, ...]
    devices: tuple[str, ...]
    build: Callable[[Case, Path, str], Work]
    xla_flags: str = ''


DETERMINISTIC = '--xla_gpu_deterministic_ops=true'  # XLA then neither uses atomics nor tries which kernel is fastest
BOTH, ANYWHERE = ('infer', 'train'), ('cpu', 'cuda')
SYSTEMS = {
    'ours': System('ours', BOTH, ANYWHERE, build_ours),
    'boxes': System('ours, image to boxes', ('infer',), ANYWHERE, build_our_boxes),
    'eager': System('effdet eager', BOTH, ANYWHERE, build_effdet(False, False)),
    'channels_last': System('effdet eager, channels-last', BOTH, ANYWHERE, build_effdet(True, False)),
    'compile': System('effdet torch.compile, channels-last', BOTH, ANYWHERE, build_effdet(True, True)),
    'onnx': System('effdet in ONNX Runtime', ('infer',), ('cpu',), build_onnx),
    'deterministic': System('ours, deterministic operations', ('train',), ANYWHERE, build_ours, DETERMINISTIC),
}

if __name__ == '__main__':
    main(*sys.argv[1:])
