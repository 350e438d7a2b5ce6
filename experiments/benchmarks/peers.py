r"""Ours beside effdet (PyTorch) and ONNX Runtime, on one machine, in one run, in alternating blocks.

    python -m experiments.benchmarks.peers --out=peers.json
    python -m experiments.benchmarks.peers --case=infer:d0:512:1 --systems=ours,compile --rounds=30

Needs an environment with requirements.txt, effdet, torch, onnxruntime and onnxscript (README.md beside this file).
Every system lives in a process of its own and sleeps while another one works; how much CPU it takes in its sleep is
in the table. All load the same weights, get the same inputs, and their outputs are compared.
"""

import datetime
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
from absl import app, flags

from effdet_jax import cli, measuring
from effdet_jax.errors import UserError
from effdet_jax.records.files import write_atomically
from effdet_jax.records.metrics import say, stage, table, track
from experiments.benchmarks.peer_systems import SYSTEMS, Case, parse_case

CASES = {
    'cpu': ('infer:d0:512:1', 'infer:d3:896:1', 'infer:lite0:320:1', 'train:d0:256:8', 'train:d0:512:4'),
    'cuda': ('infer:d0:512:1', 'infer:d0:512:64', 'infer:d3:896:1', 'infer:d3:896:64', 'train:d0:512:64'),
}
CASE = flags.DEFINE_list('case', [], 'WHAT:MODEL:SIZE:BATCH,..., e.g. infer:d0:512:1; default: all of the device')
SYSTEM = flags.DEFINE_list('systems', list(SYSTEMS), f'of {", ".join(SYSTEMS)}; ours is always there')
DEVICE = flags.DEFINE_enum('device', 'cpu', list(CASES), 'cuda: bfloat16, and autocast for effdet')
ROUNDS = flags.DEFINE_integer('rounds', 15, 'each system runs one block in each', lower_bound=1)
SECONDS = flags.DEFINE_float('seconds', 1.5, 'of a block, about', lower_bound=0)
COLD = flags.DEFINE_bool(
    'cold', False, 'compile everything anew; otherwise torch.compile finds what it compiled before'
)
OUT = flags.DEFINE_string('out', '', 'JSON file for everything measured, every block of it')

TICK = os.sysconf('SC_CLK_TCK')
MIB = 2**20


def main(arguments: list[str]) -> None:
    if arguments:
        raise app.UsageError(f'unexpected {" ".join(arguments)}: everything is a flag')
    cases = [_case(text) for text in CASE.value or CASES[DEVICE.value]]
    if unknown := [name for name in SYSTEM.value if name not in SYSTEMS]:
        raise app.UsageError(f'--systems={",".join(unknown)}: choose of {", ".join(SYSTEMS)}')
    report: dict[str, Any] = {'settings': settings(), 'cases': {}}
    say(' '.join(f'{name}: {value};' for name, value in report['settings'].items()))
    for case in cases:
        names = [
            name for name, system in SYSTEMS.items()
            if (name in SYSTEM.value or name == 'ours') and case.what in system.what and DEVICE.value in system.devices
        ]  # fmt: skip
        report['cases'][str(case)] = compared = compare(case, names)
        say('\n' + summary(case, compared) + '\n')
        if OUT.value:
            write_atomically(Path(OUT.value), (json.dumps(report, indent=1) + '\n').encode())


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

    def __init__(self, system: str, case: Case, folder: str) -> None:
        self.system = system
        self._process = _start(system, case, folder)
        self.ready = self._answer()
        self.calls = measuring.calls_in(SECONDS.value, self.ready['call_s'])
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

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout
        line = self._process.stdout.readline()
        if not line:
            raise UserError(f'{SYSTEMS[self.system].title} ended with code {self._process.wait()}: see its error above')
        return json.loads(line)


def _start(system: str, case: Case, folder: str) -> subprocess.Popen[str]:
    environment = dict(os.environ, JAX_COMPILATION_CACHE_DIR='')
    if DEVICE.value == 'cpu':
        environment |= {'JAX_PLATFORMS': 'cpu', 'CUDA_VISIBLE_DEVICES': ''}
    else:  # they share it: none may take all of its memory
        environment |= {'XLA_PYTHON_CLIENT_PREALLOCATE': 'false'}
    if COLD.value:
        environment |= {'TORCHINDUCTOR_FORCE_DISABLE_CACHES': '1'}
    command = [sys.executable, '-m', 'experiments.benchmarks.peer_systems', system, str(case), folder, DEVICE.value]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)


def compare(case: Case, names: list[str]) -> dict[str, Any]:
    """Everything measured of one case, fit for JSON."""
    with tempfile.TemporaryDirectory() as folder:
        with stage(f'{case}: weights and inputs'):
            if _start('prepare', case, folder).wait():
                raise UserError(f'{case}: weights and inputs could not be made: see the error above')
        workers: dict[str, Worker] = {}
        try:
            for name in names:
                with stage(f'{case}: starting {SYSTEMS[name].title}'):
                    workers[name] = Worker(name, case, folder)
            for order in track(measuring.in_turns(names, ROUNDS.value), ROUNDS.value, str(case)):
                for name in order:
                    _one_block(workers, name)
        finally:
            for worker in workers.values():
                worker.close()
        return {name: _measured(worker, workers, folder) for name, worker in workers.items()}


def _one_block(workers: dict[str, Worker], name: str) -> None:
    """One works, the others sleep: what CPU they take meanwhile is written down."""
    others = [worker for worker in workers.values() if worker.system != name]
    before, start = [worker.cpu_seconds() for worker in others], perf_counter()
    workers[name].run_block()
    for worker, cpu in zip(others, before, strict=True):
        worker.slept += perf_counter() - start
        worker.busy_asleep += worker.cpu_seconds() - cpu


def _measured(worker: Worker, workers: dict[str, Worker], folder: str) -> dict[str, Any]:
    ours, notes = workers['ours'].blocks, worker.ready['notes']
    labels = notes.get('labels_s', 0.0)
    return {
        'title': SYSTEMS[worker.system].title,
        'seconds': measuring.spread(worker.blocks).as_dict(),
        'ours / this': measuring.paired_ratio(ours, worker.blocks).as_dict(),
        'ours / this with labels': measuring.paired_ratio(ours, worker.blocks, labels).as_dict(),
        'first_call_s': worker.ready['first_call_s'],
        'build_s': worker.ready['build_s'],
        'start_peak': worker.ready['start_peak'],
        'peak': worker.last['peak'],
        'device_peak': worker.last['device_peak'],
        'busy_asleep': worker.busy_asleep / max(worker.slept, 1e-9),
        'calls_in_a_block': worker.calls,
        'blocks': worker.blocks,
        'notes': notes,
        'outputs': _outputs(folder, worker.system),
    }


def _outputs(folder: str, system: str) -> dict[str, Any]:
    """Of the first call: single numbers as they are; of arrays how far they are from ours at most, in deviations."""
    ours, these = (np.load(Path(folder) / f'{name}.npz') for name in ('ours', system))
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
    text = table(header, rows, f'{case}, {ROUNDS.value} rounds, {DEVICE.value}\n')
    if 'boxes' in compared:
        blocks = [compared[name]['blocks'] for name in ('boxes', 'ours')]
        text += f'\n\nImage to boxes / network only: {_ratio(measuring.paired_ratio(*blocks).as_dict())}'
    return text


def _ratio(ratio: dict[str, Any]) -> str:
    return f'{ratio["median"]:.3f}' + (f' ± {ratio["error"]:.3f}' if ratio['error'] is not None else '')


if __name__ == '__main__':
    cli.run(main)
