"""All that is worth measuring on a GPU, in one command of ten minutes at most.

    python -m experiments.benchmarks.gpu --out=gpu                     # on a machine with a GPU
    python -m experiments.benchmarks.gpu --out=gpu --parts=infer       # a part of it
    python -m experiments.benchmarks.gpu --out=gpu --tiny --limit=3600 # a rehearsal on a CPU, with small sizes

Parts are commands of their own, the most valuable first (`PARTS`). A part that fails, or has used its time up, ends
alone, with whatever it started; the next one follows. What an earlier part leaves of its time, the later ones share. A
part writes what it knows into OUT/PART.json as it goes. After each part OUT/gpu.json says how all parts ended and
OUT/gpu.md has all tables; OUT/gpu.log has what the parts said meanwhile.

A GPU machine without a network: `wheels`, beside this file.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import threading
from importlib import metadata
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple

from effdet_jax.records.console import table
from effdet_jax.records.files import write_atomically

LOG = 'gpu.log'
PACKAGES = ('jax', 'flax', 'optax', 'orbax-checkpoint', 'numpy', 'opencv-python-headless', 'torch', 'timm', 'effdet')
TINY_XLA_FLAGS = '--xla_backend_optimization_level=0'  # compiles in a third of the time
LAST_LINES = 5  # of a part that failed
NEAR_END = 0.8  # of a part's time: then it should finish by itself


class Part(NamedTuple):
    """`command` and `tiny` are what follows `python -m`; `{limit}` in them becomes the part's seconds, rounded."""

    name: str
    what: str
    share: float  # of the time, beside the others
    command: tuple[str, ...]
    tiny: tuple[str, ...]  # what is different in a rehearsal: these flags come last and win
    xla_flags: str = ''


PEERS, MEMORY = ('experiments.benchmarks.peers', '--quiet'), ('experiments.benchmarks.memory', '--quiet')
DEPTHWISE, RESUME = 'experiments.benchmarks.depthwise', 'experiments.reliability.resume'
ON_CPU = ('--device=cpu', '--rounds=2', '--seconds=0.2')
PARTS = (
    Part(
        'train', 'D0 512: a training step of 64 images, beside effdet', 190,
        (*PEERS, '--device=cuda', '--case=train:d0:512:64', '--systems=compile,deterministic', '--rounds=8',
         '--limit={limit}'),
        (*ON_CPU, '--case=train:lite0:64:2', '--systems=channels_last,deterministic'),
    ),
    Part(
        'infer', 'D0 512: inference of 1 and of 64 images, beside effdet', 120,
        (*PEERS, '--device=cuda', '--case=infer:d0:512:1,infer:d0:512:64', '--systems=boxes,compile', '--rounds=5',
         '--limit={limit}'),
        (*ON_CPU, '--case=infer:lite0:64:1'),
    ),
    Part(
        'infer_d3', 'D3 896: the same', 70,
        (*PEERS, '--device=cuda', '--case=infer:d3:896:1,infer:d3:896:64', '--systems=boxes,compile', '--rounds=5',
         '--limit={limit}'),
        (*ON_CPU, '--case=infer:lite1:64:2', '--systems=boxes'),
    ),
    Part(
        'depthwise', 'Depthwise convolutions in two forms', 45,
        (DEPTHWISE, '--networks=d0:512:64,d3:896:16', '--limit={limit}'),
        ('--networks=lite0:64:1', '--dtype=float32', '--limit=20'),
    ),
    Part(
        'resume', 'Killed and continued: the same bits?', 110,
        (RESUME, '--device=cuda', '--at_once=8', '--limit={limit}'),
        ('--device=cpu', '--toy', '--at_once=2'),
    ),
    Part(
        'memory', 'D7x, rematerialised: memory and the largest batch', 35,
        (*MEMORY, '--largest', '--config=configs/d7x.py', '--config.model.remat=True', '--config.model.dtype=bfloat16',
         '--config.train.batch_size=1'),
        ('--config=configs/lite0.py', '--config.image.size=(64, 64)', '--config.model.dtype=float32',
         '--memory=300MiB'),
        '--xla_gpu_autotune_level=0',  # it asks for memory, not for time: compiles sooner
    ),
)  # fmt: skip
NAMES = [part.name for part in PARTS]


def main(out: str, parts: str, tiny: bool, limit: float) -> None:
    chosen = parts.split(',')
    if unknown := [name for name in chosen if name not in NAMES]:
        sys.exit(f'error: --parts={",".join(unknown)}: choose of {", ".join(NAMES)}')
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that the part ends with this process
    folder, machine = Path(out), describe_machine()
    failed = run_parts([part for part in PARTS if part.name in chosen], folder, machine, limit, tiny)
    print((folder / 'gpu.md').read_text())
    if failed:
        sys.exit(f'error: not all was measured ({", ".join(failed)}): see {folder / "gpu.md"} and {folder / LOG}')


def run_parts(parts: list[Part], out: Path, machine: dict[str, str], limit: float, tiny: bool) -> list[str]:
    """Runs them in turn and writes what is known after each; returns the names of those that did not end well."""
    out.mkdir(parents=True, exist_ok=True)
    start, ends, tables = perf_counter(), {}, {}
    for number, part in enumerate(parts):
        left = limit - (perf_counter() - start)
        seconds = left * part.share / sum(later.share for later in parts[number:])
        ends[part.name], tables[part.name] = run_part(part, out, seconds, tiny)
        report = {'machine': machine, 'tiny': tiny, 'limit': limit, 'parts': ends}
        write_atomically(out / 'gpu.json', (json.dumps(report, indent=1) + '\n').encode())
        write_atomically(out / 'gpu.md', page(machine, ends, tables, tiny).encode())
        print(
            f'{part.name}: {ends[part.name]["state"]}, {ends[part.name]["seconds"]:.0f} s of {seconds:.0f}', flush=True
        )
    return [name for name, end in ends.items() if end['state'] != 'done']


def run_part(part: Part, out: Path, seconds: float, tiny: bool) -> tuple[dict[str, Any], str]:
    """(how it ended, what it printed: its tables). Ended with all that it started where it takes longer."""
    arguments = [*part.command, *(part.tiny if tiny else ()), f'--out={out / part.name}.json']
    command = [sys.executable, '-m', *(text.replace('{limit}', f'{NEAR_END * seconds:.0f}') for text in arguments)]
    flags_of_xla = ' '.join([os.environ.get('XLA_FLAGS', ''), part.xla_flags, TINY_XLA_FLAGS if tiny else '']).strip()
    environment = os.environ | {'XLA_FLAGS': flags_of_xla, 'JAX_PLATFORMS': 'cpu' if tiny else 'cuda,cpu'}
    start, too_late = perf_counter(), threading.Event()
    with (out / LOG).open('a') as log:
        log.write(f'\n=== {part.name}: {" ".join(command)}\n')
        log.flush()
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=log, text=True, env=environment, process_group=0
        )

        def end() -> None:
            too_late.set()
            os.killpg(process.pid, signal.SIGKILL)  # and what it started

        timer = threading.Timer(seconds, end)
        timer.start()
        try:
            printed, _ = process.communicate()
        finally:
            timer.cancel()
            if process.poll() is None:  # this process was interrupted
                os.killpg(process.pid, signal.SIGKILL)
    state = 'out of time' if too_late.is_set() else 'done' if process.returncode == 0 else 'failed'
    ended = {'what': part.what, 'state': state, 'seconds': perf_counter() - start, 'command': command[1:]}
    if state == 'failed':
        ended['last lines'] = (out / LOG).read_text().splitlines()[-LAST_LINES:]
    return ended, printed.strip()


def describe_machine() -> dict[str, str]:
    """What the figures hold for."""
    query = ['nvidia-smi', '--query-gpu=name,memory.total,driver_version', '--format=csv,noheader']
    try:
        gpus = subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip().replace('\n', '; ')
    except (OSError, subprocess.CalledProcessError):
        gpus = 'none'
    commit = subprocess.run(['git', 'describe', '--always', '--dirty'], capture_output=True, text=True).stdout.strip()
    machine = {'GPU': gpus, 'cores': str(os.cpu_count()), 'commit': commit, 'Python': sys.version.split()[0]}
    return machine | {name: _version(name) for name in PACKAGES}


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return 'missing'


def page(machine: dict[str, str], ends: dict[str, dict[str, Any]], tables: dict[str, str], tiny: bool) -> str:
    """All tables in Markdown."""
    rows = [(name, end['what'], end['state'], round(end['seconds'])) for name, end in ends.items()]
    title = 'A rehearsal with tiny sizes on a CPU: the figures mean nothing' if tiny else 'Measured on a GPU'
    texts = [f'# {title}', ', '.join(f'{name} {value}' for name, value in machine.items())]
    texts.append(table(('part', 'what', 'ended', 's'), rows))
    for name, end in ends.items():
        reason = '\n'.join(f'    {line}' for line in end.get('last lines', []))
        texts += [text for text in (f'## {end["what"]}', tables[name], reason) if text]
    return '\n\n'.join(texts) + '\n'


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--out', required=True, help='folder for what is measured')
    parser.add_argument('--parts', default=','.join(NAMES), help=f'of {", ".join(NAMES)}, in this order')
    parser.add_argument('--tiny', action='store_true', help='a rehearsal: small networks and images, on the CPU')
    parser.add_argument('--limit', type=float, default=570, help='seconds for all parts')
    main(**vars(parser.parse_args()))
