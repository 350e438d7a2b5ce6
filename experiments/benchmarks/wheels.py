"""The packages that `gpu` needs, for a GPU machine without a network. Standard library only.

    python -m experiments.benchmarks.wheels collect        # where there is a network: into wheels/, beside this file
    python -m experiments.benchmarks.wheels install SITE   # on the GPU machine: those that it lacks, into folder SITE

The list is wheels.txt, without jax, torch and what comes with them. Nothing that the GPU machine has is replaced:
start Python there with PYTHONPATH=SITE.
"""

import re
import subprocess
import sys
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

LIST = Path(__file__).with_name('wheels.txt')
FOLDER = Path(__file__).with_name('wheels')
PYTHON = '3.12'  # of the GPU machine, Linux on x86-64
PLATFORMS = ('manylinux_2_28_x86_64', 'manylinux_2_27_x86_64', 'manylinux_2_17_x86_64', 'manylinux2014_x86_64')
MOST = 60 * 2**20  # bytes that may be brought along
MIB = 2**20


def collect(names: Iterable[str], folder: Path, most: int = MOST) -> int:
    """Downloads wheels `NAME==VERSION` into `folder` and removes others; returns the bytes of all.

    Raises:
      SystemExit: where they are more than `most`, or pip fails.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob('*.whl'):
        old.unlink()
    platforms = [f'--platform={platform}' for platform in PLATFORMS]
    target = ('--only-binary=:all:', '--implementation=cp', f'--python-version={PYTHON}', *platforms)
    _pip('download', '--no-deps', *target, f'--dest={folder}', *names)
    size = sum(wheel.stat().st_size for wheel in folder.glob('*.whl'))
    if size > most:
        sys.exit(f'error: {folder} has {size / MIB:.1f} MiB of wheels, more than {most / MIB:.0f}: shorten {LIST.name}')
    return size


def install(folder: Path, site: Path) -> list[str]:
    """Installs the wheels of `folder` that this Python lacks into `site`; returns their names.

    Raises:
      SystemExit: where there is none, or pip fails.
    """
    wheels = sorted(folder.glob('*.whl'))
    if not wheels:
        sys.exit(f'error: no wheels in {folder}: run `collect` where there is a network, and bring the folder along')
    lacking = [wheel for wheel in wheels if not _is_installed(wheel.name.partition('-')[0])]
    if lacking:
        offline = ('--no-index', '--no-deps', '--no-cache-dir', '--upgrade')
        _pip('install', *offline, f'--target={site}', *map(str, lacking))
    return [wheel.name.partition('-')[0] for wheel in lacking]


def listed(text: str) -> list[str]:
    """The lines of a requirements file without comments."""
    lines = (re.sub(r'#.*', '', line).strip() for line in text.splitlines())
    return [line for line in lines if line]


def _is_installed(name: str) -> bool:
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True


def _pip(*arguments: str) -> None:
    command = [sys.executable, '-m', 'pip', '--quiet', '--disable-pip-version-check', *arguments]
    if subprocess.run(command, check=False).returncode:
        sys.exit(f'error: pip {arguments[0]} failed: see above')


def main(arguments: list[str]) -> None:
    match arguments:
        case ['collect']:
            size = collect(listed(LIST.read_text()), FOLDER)
            print(f'{FOLDER}: {len(list(FOLDER.glob("*.whl")))} wheels, {size / MIB:.1f} MiB')
        case ['install', site]:
            print(f'installed into {site}: {", ".join(install(FOLDER, Path(site))) or "nothing, all is here"}')
        case _:
            sys.exit(__doc__)


if __name__ == '__main__':
    main(sys.argv[1:])
