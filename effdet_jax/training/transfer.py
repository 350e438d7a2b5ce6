"""Starting from the weights of another run: loads the arrays that fit and reports the others."""

from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import traverse_util

from effdet_jax import config as run_config
from effdet_jax.errors import UserError
from effdet_jax.records.checkpoint import has_checkpoints, load_variables
from effdet_jax.records.console import info, table
from effdet_jax.training.state import Variables

MAY_DIFFER = ('params', 'class_net', 'predict')  # depends on the number of classes

# The weights were trained with these settings. A run that starts from them may still change them, with a note.
MEANING_OF_WEIGHTS = ('model.anchors.', 'image.mean', 'image.std', 'image.padding')

Row = tuple[str, int, int, int]  # part, parameters loaded, re-initialised, skipped


def check_start(workdir: Path, shapes: Variables) -> None:
    """Raises the UserError that `start_from` would raise, before anything is written. Keeps no weights in memory."""
    if not has_checkpoints(workdir):
        raise UserError(f'{workdir} holds no checkpoints: set config.train.init_from to a run that has saved one')
    transfer(shapes, load_variables(workdir, run_config.load(workdir).checkpoint.best)[1])


def start_from(workdir: Path, fresh: Variables, config: Any) -> Variables:
    """`fresh` with the best weights of another run. Prints what was loaded and which settings differ."""
    their_config = run_config.load(workdir)
    step, weights = load_variables(workdir, their_config.checkpoint.best)
    for key, theirs, ours in run_config.differences(their_config, config, MEANING_OF_WEIGHTS):
        info(f'note: {workdir} was trained with {key}={theirs}, this run has {ours}')
    variables, rows = transfer(fresh, weights)
    title = f'starting from {workdir}, step {step}'
    info(table(('part', 'loaded', 're-initialised', 'skipped'), rows, title))
    return variables


def transfer(fresh: Variables, source: Variables) -> tuple[Variables, list[Row]]:
    """`fresh` with each array that `source` has under the same path in the same shape, and a row for each part.

    The source may lack whole parts (a backbone alone); they keep their fresh values.

    Raises:
      UserError: if anything but the class predictor differs. Names the first differences.
    """
    ours: dict[tuple[str, ...], Any] = dict(traverse_util.flatten_dict(fresh))
    theirs: dict[tuple[str, ...], Any] = dict(traverse_util.flatten_dict(source))
    loaded = {p for p in ours.keys() & theirs.keys() if ours[p].shape == theirs[p].shape}
    parts = {path[1] for path in theirs}
    differ = {path for path in (ours.keys() | theirs.keys()) - loaded if path[1] in parts}
    wrong = sorted(path for path in differ if path[: len(MAY_DIFFER)] != MAY_DIFFER)
    if wrong:
        names = ', '.join('/'.join(p) for p in wrong[:3])
        raise UserError(
            f'the weights to start from belong to another model: {len(wrong)} arrays outside the class predictor '
            f'differ, the first are {names}; set config.train.init_from to a run of the same model'
        )
    merged = {path: jax.numpy.asarray(theirs[path]) if path in loaded else value for path, value in ours.items()}

    def count(tree: dict, paths: Any, part: str) -> int:
        return sum(int(np.prod(tree[p].shape)) for p in paths if p[0] == 'params' and p[1] == part)

    fresh_ones, skipped = ours.keys() - loaded, theirs.keys() - loaded
    rows = [
        (part, count(ours, loaded, part), count(ours, fresh_ones, part), count(theirs, skipped, part))
        for part in dict.fromkeys(path[1] for path in ours if path[0] == 'params')
    ]
    return traverse_util.unflatten_dict(merged), rows
