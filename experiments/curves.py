"""Loss and AP over the steps of one or more runs: python -m experiments.curves OUT.png WORKDIR..."""

import sys
from collections.abc import Sequence
from pathlib import Path

import matplotlib.pyplot as plt

from effdet_jax.records.metrics import read_metrics

PANELS = (('train/loss',), ('train/class_loss',), ('eval/AP', 'eval/AP50'))


def main(out: str, *workdirs: str) -> None:
    figure, axes = plt.subplots(1, len(PANELS), figsize=(12, 3.6), layout='constrained')
    paths = [Path(workdir) for workdir in workdirs]
    for colour, (workdir, run) in enumerate(zip(paths, names(paths), strict=True)):
        rows = read_metrics(workdir / 'metrics.jsonl')
        for axis, names_of_panel in zip(axes, PANELS, strict=True):
            for style, name in zip(('-', '--'), names_of_panel, strict=False):
                points = [(row['step'], row[name]) for row in rows if name in row]
                label = f'{run} {name.split("/")[1]}' if len(names_of_panel) > 1 else run
                axis.plot(*zip(*points, strict=True), style, color=f'C{colour}', label=label)
    for axis, names_of_panel in zip(axes, PANELS, strict=True):
        top = 1 if names_of_panel[0].startswith('eval') else None
        axis.set(title=', '.join(names_of_panel), xlabel='step', ylim=(0, top))
        axis.grid(alpha=0.3)
        axis.legend(frameon=False)
    figure.savefig(out, dpi=110)


def names(workdirs: Sequence[Path]) -> list[str]:
    """What tells them apart: runs/a/seed_0 and runs/b/seed_0 are a and b."""
    columns = list(zip(*(path.resolve().parts for path in workdirs), strict=False))
    differing = [column for column in columns if len(set(column)) > 1]
    return ['/'.join(parts) for parts in zip(*differing, strict=True)] if differing else [workdirs[0].name]


if __name__ == '__main__':
    main(*sys.argv[1:])
