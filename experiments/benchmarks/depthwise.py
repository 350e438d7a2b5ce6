"""Depthwise convolutions in two forms, forwards and backwards, in every shape that networks have them in.

    python -m experiments.benchmarks.depthwise --networks=d0:512:64,d3:896:16 --out=depthwise.json

For accelerators: asks which form to take there. `lax` is XLA's grouped convolution; `shifted` is k*k shifted
multiply-adds, summed in float32, with the gradient that jax derives. A call must at least read its inputs and write its
result: those bytes / seconds are compared with the memory bandwidth of the device. Large shapes come first.
"""

import argparse
import collections
import json
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from effdet_jax.commands.benchmark.peaks import peak
from effdet_jax.configs import default
from effdet_jax.kernels.depthwise import plain_depthwise_conv
from effdet_jax.kernels.windows import shifted_slices
from effdet_jax.model import build_model, cost
from effdet_jax.model.layers import DepthwiseConv
from effdet_jax.records.console import table
from effdet_jax.records.files import write_atomically
from effdet_jax.runtime import timing

SECONDS = 0.05  # of a block
BLOCKS = 5
AHEAD = 4  # calls under way, so that the device need not wait for the host
LARGEST = 8  # rows of the table, beside the sums
DIRECTIONS = ('forward', 'input gradient', 'kernel gradient')


class Layer(NamedTuple):
    """One shape of a depthwise convolution, for one image."""

    height: int
    width: int
    channels: int
    kernel: int
    stride: int

    def bytes(self, batch: int, item: int) -> int:
        """The least that a call moves, in each direction the same: one array of each side."""
        inside = self.height * self.width
        outside = -(-self.height // self.stride) * -(-self.width // self.stride)
        return batch * (inside + outside) * self.channels * item

    def __str__(self) -> str:
        return f'{self.height}x{self.width}x{self.channels}, {self.kernel}x{self.kernel} / {self.stride}'


def main(networks: str, dtype: str, limit: float, out: str) -> None:
    start, rows = perf_counter(), []
    report = {'device': jax.devices()[0].device_kind, 'dtype': dtype, 'peak': peak(dtype)._asdict()}
    todo = [work for network in networks.split(',') for work in _todo(network, jnp.dtype(dtype).itemsize)]
    for work in sorted(todo, key=lambda work: -work['bytes']):
        if perf_counter() - start > limit:
            break
        rows.append(work | measure(Layer(*work['layer']), work['batch'], dtype))
        print(work['network'], Layer(*work['layer']), file=sys.stderr)
        if out:
            write_atomically(Path(out), (json.dumps(report | {'rows': rows}, indent=1) + '\n').encode())
    print(summary(report, rows, len(todo)))


def _todo(network: str, item: int) -> Iterator[dict[str, Any]]:
    """What is to be measured; `item`: bytes of a number."""
    name, size, batch = network.split(':')
    for layer, count in layers_of(name, int(size)).items():
        yield {
            'network': network, 'layer': list(layer), 'count': count, 'batch': int(batch),
            'bytes': layer.bytes(int(batch), item),
        }  # fmt: skip


def layers_of(name: str, size: int) -> collections.Counter[Layer]:
    """The depthwise convolutions of a member of the family for images of size x size, and how often each is called."""
    found: collections.Counter[Layer] = collections.Counter()

    def note(call: Callable, arguments: tuple, keywords: dict, context: Any) -> Any:
        if isinstance(module := context.module, DepthwiseConv) and context.method_name == '__call__':
            found[Layer(*arguments[0].shape[1:], module.kernel_size, module.stride)] += 1
        return call(*arguments, **keywords)

    with nn.intercept_methods(note):
        cost.trace(build_model(default.get_config(name).model, 90), (size, size))
    return found


def _shifted(x: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
    taps = shifted_slices(x, kernel.shape[0], stride)
    products = [tap.astype(jnp.float32) * kernel[i, j, 0].astype(jnp.float32) for i, j, tap in taps]
    return sum(products[1:], products[0]).astype(x.dtype)


# f(x [B, H, W, C], kernel [k, k, 1, C], stride), equal but for rounding.
FORMS: dict[str, Callable] = {'lax': plain_depthwise_conv, 'shifted': _shifted}


def measure(layer: Layer, batch: int, dtype: str) -> dict[str, Any]:
    """{'seconds': {form: {direction: s}}} and {'failed': {form: {direction: reason}}}."""
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (batch, layer.height, layer.width, layer.channels), dtype)
    kernel = jax.random.normal(keys[1], (layer.kernel, layer.kernel, 1, layer.channels), dtype)
    outside = (-(-layer.height // layer.stride), -(-layer.width // layer.stride))
    gradient = jax.random.normal(keys[2], (batch, *outside, layer.channels), dtype)

    def directions(form: Callable) -> dict[str, Callable]:
        return {
            'forward': lambda x, kernel, _: form(x, kernel, layer.stride),
            'input gradient': lambda x, kernel, g: jax.vjp(lambda x: form(x, kernel, layer.stride), x)[1](g),
            'kernel gradient': lambda x, kernel, g: jax.vjp(lambda kernel: form(x, kernel, layer.stride), kernel)[1](g),
        }

    functions = {(name, way): f for name, form in FORMS.items() for way, f in directions(form).items()}
    arrays = x, kernel, gradient
    with ThreadPoolExecutor(len(functions)) as pool:
        compiling = {key: pool.submit(lambda f: jax.jit(f).lower(*arrays).compile(), f) for key, f in functions.items()}
    result: dict[str, Any] = {'seconds': {}, 'failed': {}}
    for (name, way), compiled in compiling.items():
        try:
            seconds = _seconds(lambda compiled=compiled: compiled.result()(*arrays))
            result['seconds'].setdefault(name, {})[way] = seconds
        except jax.errors.JaxRuntimeError as error:
            result['failed'].setdefault(name, {})[way] = str(error).splitlines()[0][:200]
    return result


def _seconds(call: Callable[[], Any]) -> float:
    wait = jax.block_until_ready
    wait(call())
    calls = timing.calls_in(SECONDS, timing.seconds_of(lambda: wait(call())))
    return timing.spread([timing.seconds_per_call(call, wait, calls, AHEAD) for _ in range(BLOCKS)]).median


def summary(report: dict[str, Any], rows: list[dict[str, Any]], wanted: int) -> str:
    """A Markdown table: sums over the layers of each network, then the largest shapes."""
    names, bandwidth = list(FORMS), report['peak']['bandwidth']

    def cells(ms: Callable[[str, str], float | None], least: float) -> list[str]:
        found = [ms(name, way) for way in DIRECTIONS for name in names]
        return ['-' if value is None else f'{value:.3g} ({least / value:.0%})' for value in found]

    def sums(part: list[dict[str, Any]]) -> list[str]:
        def total(name: str, way: str) -> float | None:
            values = [row['seconds'].get(name, {}).get(way) for row in part]
            return None if None in values else 1e3 * sum(v * row['count'] for v, row in zip(values, part, strict=True))

        return cells(total, 1e3 * sum(row['bytes'] * row['count'] for row in part) / bandwidth)

    lines = []
    for network in dict.fromkeys(row['network'] for row in rows):
        part = [row for row in rows if row['network'] == network]
        lines.append([f'{network}: sum of the layers measured', sum(row['count'] for row in part), *sums(part)])
    for row in rows[:LARGEST]:
        lines.append([f'{row["network"]}: {Layer(*row["layer"])}', row['count'], *sums([row | {'count': 1}])])
    header = ('ms (share of the peak bandwidth)', 'layers', *(f'{way}, {name}' for way in DIRECTIONS for name in names))
    title = (
        f'Depthwise convolutions, {report["dtype"]}, {report["device"]}: {len(rows)} of {wanted} shapes; peak '
        f'{bandwidth / 1e9:,.0f} GB/s ({report["peak"]["source"]})\n'
    )
    return table(header, lines, title)


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--networks', default='d0:512:64,d3:896:16', help='MODEL:SIZE:BATCH,...')
    parser.add_argument('--dtype', default='bfloat16', choices=['bfloat16', 'float32'], help='of the activations')
    parser.add_argument('--limit', type=float, default=float('inf'), help='seconds after which no other shape is begun')
    parser.add_argument('--out', default='', help='JSON file for everything measured')
    main(**vars(parser.parse_args()))
