r"""Ours beside effdet (PyTorch) and ONNX Runtime, on one machine, in one run, in alternating blocks.

    python -m experiments.benchmarks.peers --out=peers.json
    python -m experiments.benchmarks.peers --case=infer:d0:512:1 --systems=ours,compile --rounds=30

Needs an environment with requirements.txt, effdet, torch, onnxruntime and onnxscript (README.md beside this file).
Every system lives in a process of its own and sleeps while another one works; how much CPU it takes in its sleep is
in the table. All load the same weights, get the same inputs, and their outputs are compared. A system that fails is
left out, and the exit code is 1 in the end.
"""

import contextlib
import datetime
import json
import math
import os
import platform
import select
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
from absl import app, flags

from effdet_jax.commands import cli
from effdet_jax.errors import UserError
from effdet_jax.records.console import info, result, stage, table, track
from effdet_jax.records.files import write_atomically
from effdet_jax.runtime import timing
from experiments.benchmarks.peer_systems import SYSTEMS, Case, parse_case

CASES = {
    'cpu': ('infer:d0:512:1', 'infer:d3:896:1', 'infer:lite0:320:1', 'train:d0:256:8', 'train:d0:512:4'),
    'cuda': ('infer:d0:512:1', 'infer:d0:512:64', 'infer:d3:896:1', 'infer:d3:896:64', 'train:d0:512:64'),
}
PLATFORMS = {'cpu': 'cpu', 'cuda': 'cuda,cpu'}  # of jax, which with cuda must not make do without one
CASE = flags.DEFINE_list('case', [], 'WHAT:MODEL:SIZE:BATCH,..., e.g. infer:d0:512:1; default: all of the device')
SYSTEM = flags.DEFINE_list(
    'systems', [name for name in SYSTEMS if name != 'deterministic'], f'of {", ".join(SYSTEMS)}; ours is always there'
)
DEVICE = flags.DEFINE_enum('device', 'cpu', list(CASES), 'cuda: bfloat16, and autocast for effdet')
ROUNDS = flags.DEFINE_integer('rounds', 15, 'each system runs one block in each', lower_bound=1)
SECONDS = flags.DEFINE_float('seconds', 1.5, 'of a block, about', lower_bound=0)
LIMIT = flags.DEFINE_float(
    'limit', None, 'seconds for all cases, about: what is not ready then is left out, and there are fewer rounds'
)
COLD = flags.DEFINE_bool(
    'cold', False, 'compile everything anew; otherwise torch.compile finds what it compiled before'
)
OUT = flags.DEFINE_string('out', '', 'JSON file for everything measured, every block of it')

TICK = os.sysconf('SC_CLK_TCK')
MIB = 2**20
LEAST_ROUNDS = 3  # where the time is up


def main(_: list[str]) -> None:
    cases = [_case(text) for text in CASE.value or CASES[DEVICE.value]]
    if unknown := [name for name in SYSTEM.value if name not in SYSTEMS]:
        raise app.UsageError(f'--systems={",".join(unknown)}: choose of {", ".join(SYSTEMS)}')
    report: dict[str, Any] = {'settings': settings(), 'cases': {}}
    info(' '.join(f'{name}: {value};' for name, value in report['settings'].items()))
    ends = perf_counter() + LIMIT.value if LIMIT.value else math.inf
    for number, case in enumerate(cases):
        names = [
            name for name, system in SYSTEMS.items()
            if (name in SYSTEM.value or name == 'ours') and case.what in system.what and DEVICE.value in system.devices
        ]  # fmt: skip
        now = perf_counter()
        for compared in compare(case, names, now + (ends - now) / (len(cases) - number)):
            report['cases'][str(case)] = compared
            if OUT.value:
                write_atomically(Path(OUT.value), (json.dumps(report, indent=1) + '\n').encode())
        result('\n' + summary(case, report['cases'][str(case)]) + '\n')
    cases = report['cases'].items()
    if failed := [f'{case}: {m["title"]}' for case, compared in cases for m in compared.values() if 'failed' in m]:
        raise UserError(f'not measured: {"; ".join(failed)}')


def _case(text: str) -> Case:
    try:
        return parse_case(text)
    except ValueError as error:
        raise app.UsageError(f'--case={text}: write WHAT:MODEL:SIZE:BATCH, e.g. infer:d0:512:1') from error


def settings() -> dict[str, Any]:
    """What the figures hold for."""
    commit = subprocess.run(['git', 'describe', '--always', '--dirty'], capture_output=True, text=True).stdout.strip()
    lines = Path('/proc/cpuinfo').read_text().splitlines()
    return {
        'commit': commit,
        'date': datetime.datetime.now(datetime.UTC).isoformat(timespec='minutes'),
        'processor': next((line.partition(':')[2].strip() for line in lines if line.startswith('model name')), ''),
        'cores': os.cpu_count(),
        'load when started': round(os.getloadavg()[0], 2),
        'python': platform.python_version(),
        'device': DEVICE.value,
        'rounds': ROUNDS.value,
        'seconds of a block': SECONDS.value,
    }


class Worker:
    """A system in a process of its own."""

    def __init__(self, system: str, case: Case, folder: str, ends: float) -> None:
        """Raises UserError where it fails, or is not ready when `perf_counter()` is `ends`."""
        self.system = system
        self._process = _start(system, case, folder)
        self.ready = self._answer(ends)
        self.calls = timing.calls_in(SECONDS.value, self.ready['call_s'])
        self.blocks: list[float] = []
        self.last: dict[str, Any] = {}
        self.slept = self.busy_asleep = 0.0

    def run_block(self) -> None:
        assert self._process.stdin
        self._process.stdin.write(json.dumps({'calls': self.calls}) + '\n')
        self._process.stdin.flush()
        self.last = self._answer()
        self.blocks.append(self.last['seconds'])

    def cpu_seconds(self) -> float:
        """Of all its threads since its start."""
        fields = Path(f'/proc/{self._process.pid}/stat').read_text().rpartition(')')[2].split()
        return (int(fields[11]) + int(fields[12])) / TICK

    def close(self) -> None:
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait()

    def _answer(self, ends: float = math.inf) -> dict[str, Any]:
        assert self._process.stdout
        patience = None if math.isinf(ends) else max(ends - perf_counter(), 0)
        if not select.select([self._process.stdout], [], [], patience)[0]:
            self._process.kill()
            raise UserError('not ready in time')
        line = self._process.stdout.readline()
        if not line:
            raise UserError(f'ended with code {self._process.wait()}: see its error above')
        return json.loads(line)


def _start(system: str, case: Case, folder: str) -> subprocess.Popen[str]:
    environment = dict(os.environ, JAX_COMPILATION_CACHE_DIR='', JAX_PLATFORMS=PLATFORMS[DEVICE.value])
    if DEVICE.value == 'cpu':
        environment |= {'CUDA_VISIBLE_DEVICES': ''}
    else:  # they share it: none may take all of its memory
        environment |= {'XLA_PYTHON_CLIENT_PREALLOCATE': 'false'}
    if system in SYSTEMS:
        environment |= {'XLA_FLAGS': f'{os.environ.get("XLA_FLAGS", "")} {SYSTEMS[system].xla_flags}'.strip()}
    if COLD.value:
        environment |= {'TORCHINDUCTOR_FORCE_DISABLE_CACHES': '1'}
    command = [sys.executable, '-m', 'experiments.benchmarks.peer_systems', system, str(case), folder, DEVICE.value]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)


def compare(case: Case, names: list[str], ends: float = math.inf) -> Iterator[dict[str, Any]]:
    """What is known of each system of one case, fit for JSON: after every start, and when all is measured."""
    with tempfile.TemporaryDirectory() as folder:
        known = {name: {'title': SYSTEMS[name].title} for name in names}
        with stage(f'{case}: weights and inputs'):
            steps = ('prepare', 'export') if 'onnx' in names else ('prepare',)
            if not all(_start(step, case, folder).wait() == 0 for step in steps):
                reason = {'failed': 'no weights or inputs: see the error above'}
                yield {name: about | reason for name, about in known.items()}
                return
        workers: dict[str, Worker] = {}
        try:
            for name in names:
                with stage(f'{case}: starting {SYSTEMS[name].title}'), _noting_failure(known[name]):
                    workers[name] = Worker(name, case, folder, ends)
                    known[name] |= {'ready': workers[name].ready}
                yield known
            turns = timing.in_turns(list(workers), ROUNDS.value)
            for number, order in enumerate(track(turns, ROUNDS.value, str(case))):
                if number >= LEAST_ROUNDS and perf_counter() > ends:
                    break
                for name in order:
                    if 'failed' not in known[name]:
                        with _noting_failure(known[name]):
                            _one_block(workers, name)
        finally:
            for worker in workers.values():
                worker.close()
        measured = {name: worker for name, worker in workers.items() if 'failed' not in known[name]}
        yield known | {name: _measured(worker, measured.get('ours'), folder) for name, worker in measured.items()}


@contextlib.contextmanager
def _noting_failure(about: dict[str, Any]) -> Iterator[None]:
    try:
        yield
    except (UserError, BrokenPipeError) as error:
        about['failed'] = str(error)


def _one_block(workers: dict[str, Worker], name: str) -> None:
    """One works, the others sleep: what CPU they take meanwhile is written down."""
    others = [worker for worker in workers.values() if worker.system != name]
    before, start = [worker.cpu_seconds() for worker in others], perf_counter()
    workers[name].run_block()
    for worker, cpu in zip(others, before, strict=True):
        worker.slept += perf_counter() - start
        worker.busy_asleep += worker.cpu_seconds() - cpu


def _measured(worker: Worker, ours: Worker | None, folder: str) -> dict[str, Any]:
    notes = worker.ready['notes']

    def ratio(more: float = 0.0) -> dict[str, Any] | None:
        return ours and timing.paired_ratio(ours.blocks, worker.blocks, more).as_dict()

    return {
        'title': SYSTEMS[worker.system].title,
        'seconds': timing.spread(worker.blocks).as_dict(),
        'ours / this': ratio(),
        'ours / this with labels': ratio(notes.get('labels_s', 0.0)),
        'first_call_s': worker.ready['first_call_s'],
        'build_s': worker.ready['build_s'],
        'start_peak': worker.ready['start_peak'],
        'peak': worker.last['peak'],
        'device_peak': worker.last['device_peak'],
        'busy_asleep': worker.busy_asleep / max(worker.slept, 1e-9),
        'calls_in_a_block': worker.calls,
        'blocks': worker.blocks,
        'notes': notes,
        'outputs': _outputs(folder, worker.system, 'ours' if ours else worker.system),
    }


def _outputs(folder: str, system: str, other: str) -> dict[str, Any]:
    """Of the first call: single numbers as they are; of arrays how far they are from the other's, in deviations."""
    ours, these = (np.load(Path(folder) / f'{name}.npz') for name in (other, system))
    found: dict[str, Any] = {}
    for name in these.files:
        if these[name].size <= 1 or name not in ours.files:
            found[name] = np.asarray(these[name], float).mean().item()
        else:
            found[name] = float(abs(these[name] - ours[name]).max() / ours[name].std())
    return found


def summary(case: Case, compared: dict[str, Any]) -> str:
    """A Markdown table, and below it what the numbers mean."""
    rows = []
    for name, m in compared.items():
        if 'failed' in m:
            continue
        s, ratio, labelled = m['seconds'], m['ours / this'], m['ours / this with labels']
        peak = m['device_peak'] or m['peak']
        rows.append(
            (
                m['title'], f'{1e3 * s["median"]:.1f}', f'{1e3 * s["low"]:.1f} to {1e3 * s["high"]:.1f}',
                f'{case.batch / s["median"]:.1f}', '' if name == 'ours' else _ratio(ratio),
                *([] if case.what == 'infer' else ['' if name == 'ours' else _ratio(labelled)]),
                round(peak / MIB), round(m['start_peak'] / MIB), f'{m["first_call_s"]:.1f}', f'{m["busy_asleep"]:.1%}',
                ', '.join(f'{output} {value:.3g}' for output, value in m['outputs'].items()),
            )
        )  # fmt: skip
    header = (
        'system', 'ms', 'middle half', 'images/s', 'ours / this',
        *([] if case.what == 'infer' else ['ours / this with its labelling']),
        'peak MiB', 'peak MiB of the start', 'first call s', 'CPU asleep', 'outputs',
    )  # fmt: skip
    text = table(header, rows, f'{case}, {ROUNDS.value} rounds, {DEVICE.value}\n') if rows else str(case)
    blocks = [compared[name]['blocks'] for name in ('boxes', 'ours') if 'blocks' in compared.get(name, {})]
    if len(blocks) == 2:
        text += f'\n\nImage to boxes / network only: {_ratio(timing.paired_ratio(*blocks).as_dict())}'
    failed = [f'\n\n{m["title"]}: {m["failed"]}' for m in compared.values() if 'failed' in m]
    return text + ''.join(failed)


def _ratio(ratio: dict[str, Any] | None) -> str:
    if ratio is None:
        return '-'
    return f'{ratio["median"]:.3f}' + (f' ± {ratio["error"]:.3f}' if ratio['error'] is not None else '')


if __name__ == '__main__':
    cli.run(main)
