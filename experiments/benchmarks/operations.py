r"""Where a network's time goes, kind by kind of operation: ours beside effdet in ONNX Runtime, on one core each.

    python -m experiments.benchmarks.operations --case=infer:d0:512:1

On one core operations come one after the other, so their times add up; what the second core brings is in the last row.
A loop that XLA has fused counts for its last operation. Needs the environment of `peers`.
"""

import collections
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from absl import app, flags

from effdet_jax.commands import cli
from effdet_jax.records.console import info, stage, table
from effdet_jax.runtime import process, timing
from experiments.benchmarks import peer_systems
from experiments.benchmarks.peer_systems import Case, parse_case

CASE = flags.DEFINE_string('case', 'infer:d0:512:1', 'infer:MODEL:SIZE:BATCH')
LARGEST = flags.DEFINE_integer('largest', 12, 'rows of the second table', lower_bound=0)

STEM = 'first convolution'
BACKBONE = '1x1 convolutions of the backbone'
REST = '1x1 convolutions of feature network and heads'
DEPTHWISE = 'depthwise convolutions, batch norm, activations, padding'
SQUEEZE = 'squeeze-excite'
FUSION = 'fusion of features, pooling, upsampling'
LAYOUT = 'changes of layout, joining levels'
KINDS = (STEM, BACKBONE, REST, DEPTHWISE, SQUEEZE, FUSION, LAYOUT)

# Paths of our operations in the compiled program, the first that matches.
OUR_KINDS = (
    (r'/stem/conv', STEM),
    (r'/se_(reduce|expand)/|/blocks_\d+/(reduce_sum|div|jit\(silu\)/\w+|logistic)$|/project_conv/mul$', SQUEEZE),
    (r'/backbone/.*/dot_general$', BACKBONE),
    (r'/dot_general$', REST),
    (r'/(class|box)_net/concatenate$', LAYOUT),
    (r'/(dw|bn\w*)/', DEPTHWISE),
    (r'/fpn/|/resample_p\d+/', FUSION),
    (r'/backbone/', DEPTHWISE),
)
CALLS = 7
IN_ORDER = '--xla_cpu_enable_concurrency_optimized_scheduler=false'
ALIGNMENT = 16  # ONNX Runtime fills channels up to a multiple of it


class Operation(NamedTuple):
    """One of a network's, as JSON holds it too."""

    kind: str
    product: tuple[int, ...]  # of a 1x1 convolution: positions, channels in and out, filled up; else ()
    ms: float  # median over calls


def main(_: list[str]) -> None:
    try:
        case = parse_case(CASE.value)
    except ValueError as error:
        raise app.UsageError(f'--case={CASE.value}: write infer:MODEL:SIZE:BATCH') from error
    if case.what != 'infer':
        raise app.UsageError(f'--case={CASE.value}: only inference is taken apart')
    with tempfile.TemporaryDirectory() as folder:
        with stage('weights and inputs'):
            for step in peer_systems.PREPARATIONS:
                _run(peer_systems.__name__, step, str(case), folder, 'cpu')
        found = {}
        for system in SYSTEMS:
            for cores in (1, os.cpu_count() or 1):
                with stage(f'{system}, {cores} cores'):
                    found[system, cores] = json.loads(
                        _run('experiments.benchmarks.operations', system, str(case), folder, str(cores))
                    )
    parsed = {key: {**run, 'operations': _operations(run)} for key, run in found.items()}
    info('\n' + summary(parsed, LARGEST.value))


def _run(module: str, *arguments: str) -> str:
    """What a child prints. One core: XLA then runs what it could run side by side in the order of the program."""
    from effdet_jax.runtime import xla  # only now: it imports jax

    environment = os.environ | {
        'JAX_COMPILATION_CACHE_DIR': '',
        'JAX_PLATFORMS': 'cpu',
        'XLA_FLAGS': xla.known_flags(IN_ORDER) if arguments[-1] == '1' else '',
    }
    command = [sys.executable, '-m', module, *arguments]
    return subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True).stdout


def _operations(run: dict[str, Any]) -> list[Operation]:
    return [Operation(kind, tuple(product), ms) for kind, product, ms in run['operations']]


def summary(found: dict[tuple[str, int], dict[str, Any]], largest: int) -> str:
    """Two tables: kinds of operations, and the `largest` products."""
    (ours, most), (theirs, _) = (max(key for key in found if key[0] == system) for system in SYSTEMS)
    kinds = {system: _sums(found[system, 1]['operations'], lambda o: o.kind) for system in SYSTEMS}
    rows = [_row(kind, *(kinds[system][kind] for system in SYSTEMS)) for kind in KINDS]
    rows.append(_row('all of them', *(sum(kinds[system].values()) for system in SYSTEMS)))
    rows.append(_row('a call that is not traced', *(found[system, 1]['ms'] for system in SYSTEMS)))
    rows.append(_row(f'the same on {most} cores', found[ours, most]['ms'], found[theirs, most]['ms']))
    header = ('ms on one core', 'ours', 'ONNX Runtime', 'ours / theirs', 'difference')
    text = table(header, rows)

    products = {system: _sums(found[system, 1]['operations'], lambda o: o.product) for system in SYSTEMS}
    counts = collections.Counter(o.product for o in found[ours, 1]['operations'])
    shared = sorted(
        (product for product in products[ours] if product and product in products[theirs]),
        key=lambda product: -products[ours][product],
    )
    rows = []
    for product in shared[:largest]:
        flops = 2 * np.prod([float(n) for n in product]) * counts[product]
        rows.append(
            (
                ' x '.join(map(str, product)), counts[product],
                *(f'{products[system][product]:.2f}' for system in SYSTEMS),
                *(f'{flops / products[system][product] / 1e6:.0f}' for system in SYSTEMS),
            )
        )  # fmt: skip
    header = ('positions x channels in x out', 'times', 'ours ms', 'theirs ms', 'ours GFLOP/s', 'theirs GFLOP/s')
    return text + '\n\n' + table(header, rows)


def _row(what: str, ours: float, theirs: float) -> tuple[str, ...]:
    return what, f'{ours:.2f}', f'{theirs:.2f}', f'{ours / theirs:.2f}' if theirs else '', f'{ours - theirs:+.2f}'


def _sums(operations: list[Operation], key: Callable[[Operation], Any]) -> collections.Counter:
    sums: collections.Counter = collections.Counter()
    for operation in operations:
        sums[key(operation)] += operation.ms
    return sums


# --- one system, in a process of its own ---


def child(system: str, case: str, folder: str, cores: str) -> None:
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: int(cores)])
    if system == 'ours':
        process.prepare()
    with peer_systems.answers() as answer:
        answer(SYSTEMS[system](parse_case(case), Path(folder), int(cores)))


def ours(case: Case, folder: Path, cores: int) -> dict[str, Any]:
    import jax

    from effdet_jax.model import build_model
    from effdet_jax.model.batch_norm import fold
    from effdet_jax.runtime import xla

    config = peer_systems.our_config(case, 'cpu')
    model = build_model(config.model, peer_systems.CLASSES)
    variables = fold(peer_systems.our_variables(model, config, folder))
    images = jax.device_put(np.load(folder / peer_systems.INPUTS)['images'])
    network = xla.jit(lambda v, x: model.apply(v, x, train=False)).lower(variables, images).compile()

    def call() -> None:
        jax.block_until_ready(network(variables, images))

    seconds = _seconds(call)
    calls = []
    for _ in range(CALLS if cores == 1 else 0):
        # One call for each trace: the profiler's records would break up the memory that is kept for the next.
        with tempfile.TemporaryDirectory() as traces:
            with jax.profiler.trace(traces):
                call()
            calls.append(_traced(next(Path(traces).rglob('*.xplane.pb'))))
    instructions = _instructions(network.as_text())
    operations = [
        (_our_kind(instructions[name]), _our_product(name, instructions), 1e-6 * _median(calls, name))
        for name in (calls[0] if calls else {})
        if name in instructions and instructions[name].operation != 'while'  # its body's have their own times
    ]
    return {'ms': 1e3 * seconds, 'operations': operations}


class Instruction(NamedTuple):
    operation: str
    shape: tuple[int, ...]
    operands: tuple[str, ...]
    path: str


def _instructions(program: str) -> dict[str, Instruction]:
    """Of a compiled program, by their names."""
    found = {}
    for name, shape, operation, operands, rest in re.findall(
        r'^\s+(?:ROOT )?%?([\w.-]+) = \w+\[([\d,]*)\]\S* ([\w-]+)\(([^)]*)\)(.*)$', program, re.MULTILINE
    ):
        path = re.search(r'op_name="([^"]*)"', rest)
        sides = tuple(int(side) for side in shape.split(',') if side)
        found[name] = Instruction(operation, sides, tuple(re.findall(r'%([\w.-]+)', operands)), path[1] if path else '')
    return found


def _traced(file: Path) -> dict[str, float]:
    """Nanoseconds of each instruction in a trace of one call."""
    from jax.profiler import ProfileData

    sums: collections.Counter = collections.Counter()
    for plane in ProfileData.from_file(str(file)).planes:
        for line in plane.lines:
            for event in line.events:
                if name := dict(event.stats).get('hlo_op'):
                    sums[name] += event.duration_ns
    return sums


def _our_kind(instruction: Instruction) -> str:
    path = instruction.path
    if not path:  # XLA has made these of squeeze-excite's products, of one row each
        return SQUEEZE if instruction.operation == 'dot' else LAYOUT
    return next((kind for pattern, kind in OUR_KINDS if re.search(pattern, path)), LAYOUT)


def _our_product(name: str, instructions: dict[str, Instruction]) -> tuple[int, ...]:
    found = instructions[name]
    if found.operation != 'dot' or _our_kind(found) not in (BACKBONE, REST):
        return ()
    channels_in = instructions[found.operands[0]].shape[-1]
    return _filled(int(np.prod(found.shape[:-1])), channels_in, found.shape[-1])


def _filled(positions: int, *channels: int) -> tuple[int, ...]:
    return positions, *(-(-count // ALIGNMENT) * ALIGNMENT for count in channels)


def onnx(case: Case, folder: Path, cores: int) -> dict[str, Any]:
    import onnxruntime

    images = np.ascontiguousarray(np.load(folder / peer_systems.INPUTS)['images'].transpose(0, 3, 1, 2))

    def caller(profiled: bool) -> tuple[Any, Callable[[], Any]]:
        options = onnxruntime.SessionOptions()
        options.enable_profiling, options.profile_file_prefix = profiled, str(folder / 'profile')
        if cores == 1:
            options.intra_op_num_threads = 1
        session = onnxruntime.InferenceSession(
            str(folder / peer_systems.ONNX), options, providers=['CPUExecutionProvider']
        )
        return session, lambda: session.run(None, {session.get_inputs()[0].name: images})

    seconds = _seconds(caller(False)[1])
    if cores > 1:
        return {'ms': 1e3 * seconds, 'operations': []}
    session, call = caller(True)
    for _ in range(CALLS):
        call()
    width = peer_systems.our_config(case, 'cpu').model.fpn_channels
    times = collections.defaultdict(list)
    for name, kind, product, ms in _profiled(Path(session.end_profiling()), width):
        times[name, kind, product].append(ms)
    operations = [(kind, product, statistics.median(ms)) for (_, kind, product), ms in times.items()]
    return {'ms': 1e3 * seconds, 'operations': operations}


def _profiled(file: Path, width: int) -> Iterator[tuple[str, str, tuple[int, ...], float]]:
    """(name, kind, product, ms) of each operation of each call."""
    for event in json.loads(file.read_text()):
        if event.get('cat') == 'Node' and event['name'].endswith('_kernel_time'):
            inputs = [next(iter(tensor.values())) for tensor in event['args']['input_type_shape']]
            outputs = [next(iter(tensor.values())) for tensor in event['args']['output_type_shape']]
            kind, product = _onnx_kind(event['args']['op_name'], inputs, outputs, width)
            yield event['name'], kind, product, 1e-3 * event['dur']


def _onnx_kind(
    operation: str, inputs: list[list[int]], outputs: list[list[int]], width: int
) -> tuple[str, tuple[int, ...]]:
    """`width`: channels of the feature network and the heads, which no 1x1 convolution of a backbone has."""
    one_by_one = len(inputs[0]) == 4 and inputs[0][2:] == [1, 1]
    if one_by_one or operation == 'ReduceMean' or (operation == 'Mul' and inputs[1][2:] == [1, 1]):
        return SQUEEZE, ()
    if operation == 'Conv':
        features, channels, *kernel = inputs[1]
        if kernel == [1, 1]:
            batch, _, height, columns = outputs[0]
            product = _filled(batch * height * columns, channels, features)
            return REST if width in (channels, features) else BACKBONE, product
        return (DEPTHWISE if channels == 1 else STEM), ()
    if operation in ('QuickGelu', 'Sigmoid', 'Clip'):
        return DEPTHWISE, ()
    return (LAYOUT if operation.startswith('Reorder') else FUSION), ()


def _seconds(call: Callable[[], Any]) -> float:
    """Of one call, which returns when all is done."""
    return timing.spread([timing.seconds_per_call(call, lambda _: None, CALLS) for _ in range(CALLS)]).median


def _median(calls: list[dict[str, float]], name: str) -> float:
    return statistics.median(call.get(name, 0.0) for call in calls)


SYSTEMS: dict[str, Callable[[Case, Path, int], dict[str, Any]]] = {'ours': ours, 'onnx': onnx}

if __name__ == '__main__':
    if len(sys.argv) == 5 and sys.argv[1] in SYSTEMS:
        child(*sys.argv[1:])
    else:
        cli.run(main)
