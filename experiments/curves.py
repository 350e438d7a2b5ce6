"""Loss and AP over the steps of one or more runs: python -m experiments.curves OUT.png WORKDIR..."""

import sys
from pathlib import Path

import matplotlib.pyplot as plt

from effdet_jax.records.metrics import read_metrics

PANELS = (('train/loss',), ('train/class_loss',), ('eval/AP', 'eval/AP50'))


def main(out: str, *workdirs: str) -> None:
    figure, axes = plt.subplots(1, len(PANELS), figsize=(12, 3.6), layout='constrained')
    for colour, workdir in enumerate(map(Path, workdirs)):
        rows = read_metrics(workdir / 'metrics.jsonl')
        for axis, names in zip(axes, PANELS, strict=True):
            for style, name in zip(('-', '--'), names, strict=False):
                points = [(row['step'], row[name]) for row in rows if name in row]
                label = f'{workdir.name} {name.split("/")[1]}'
                axis.plot(*zip(*points, strict=True), style, color=f'C{colour}', label=label)
    for axis, names in zip(axes, PANELS, strict=True):
        axis.set(title=', '.join(names), xlabel='step', ylim=(0, 1 if names[0].startswith('eval') else None))
        axis.grid(alpha=0.3)
        axis.legend(frameon=False)
    figure.savefig(out, dpi=110)


if __name__ == '__main__':
    main(*sys.argv[1:])
