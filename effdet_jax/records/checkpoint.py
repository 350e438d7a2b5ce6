"""Checkpoints of a run: state, data position, config and metrics are one thing, written by Orbax in the background."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from effdet_jax.errors import UserError


class Restored(NamedTuple):
    state: Any
    data_position: dict[str, Any]


class Checkpoints:
    """`checkpoints/<step>/` of a work directory: the best one by a metric, and the last `keep`."""

    def __init__(self, workdir: Path, *, keep: int = 1, best: str = 'eval/AP') -> None:
        """`best` names the metric whose largest value marks the checkpoint that is never deleted."""

        def metric(metrics: Mapping[str, float]) -> float:
            return metrics[best]

        policies = [
            checkpoint_managers.LatestN(keep),
            checkpoint_managers.BestN(get_metric_fn=metric, n=1, keep_checkpoints_without_metrics=False),
        ]
        options = ocp.CheckpointManagerOptions(
            best_fn=metric,
            preservation_policy=checkpoint_managers.AnyPreservationPolicy(policies),
            create=False,  # the first save makes the folder: a run that cannot start leaves none behind
        )
        handlers = {
            'state': ocp.PyTreeCheckpointHandler(),
            'data': ocp.JsonCheckpointHandler(),
            'config': ocp.JsonCheckpointHandler(),
        }
        self.folder = (workdir / 'checkpoints').absolute()
        self._manager = ocp.CheckpointManager(
            self.folder, item_names=tuple(handlers), item_handlers=handlers, options=options
        )

    def save(
        self,
        step: int,
        state: Any,
        data_position: Mapping[str, Any],
        config: Mapping[str, Any],
        metrics: Mapping[str, float] | None = None,
    ) -> None:
        """Returns once `state` (NumPy leaves) is copied; the rest happens in the background. `metrics` if evaluated."""
        items = ocp.args.Composite(
            state=ocp.args.PyTreeSave(state),
            data=ocp.args.JsonSave(dict(data_position)),
            config=ocp.args.JsonSave(dict(config)),
        )
        self.folder.mkdir(parents=True, exist_ok=True)
        self._manager.save(step, args=items, metrics=dict(metrics) if metrics else None)

    def latest_step(self) -> int | None:
        return self._manager.latest_step()

    def best_step(self) -> int | None:
        """The step with the best metric; the latest where none was evaluated."""
        best = self._manager.best_step()
        return self._manager.latest_step() if best is None else best

    def restore(self, step: int, state_like: Any) -> Restored:
        """Everything needed to go on. `state_like` has the tree, shapes and types of the state.

        Raises:
          UserError: where the checkpoint holds another state.
        """
        items = ocp.args.Composite(state=ocp.args.PyTreeRestore(state_like), data=ocp.args.JsonRestore())
        try:
            restored: Any = self._manager.restore(step, args=items)
            # Orbax checks the tree, and not the shapes.
            jax.tree.map(_check_shape, restored.state, state_like)
        except (ValueError, KeyError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(
                f'{self.folder / str(step)} does not hold the state of this model ({reason}): choose another --workdir'
            ) from error
        return Restored(restored.state, restored.data)

    def variables(self, step: int) -> dict[str, Any]:
        """The weights to deploy, {'params', 'batch_stats'} in NumPy: the moving average where there is one."""
        metadata: Any = self._manager.item_metadata(step)
        tree = metadata.state.tree
        name = 'ema' if tree.get('ema') else 'variables'
        wanted = ocp.args.PyTreeRestore(item={name: tree[name]}, partial_restore=True)
        restored: Any = self._manager.restore(step, args=ocp.args.Composite(state=wanted))
        return restored.state[name]

    def close(self) -> None:
        """Waits for what is still being written."""
        self._manager.close()


def has_checkpoints(workdir: Path) -> bool:
    """Whether a run has saved anything there. Looks only."""
    return any((workdir / 'checkpoints').glob('[0-9]*'))


def load_variables(workdir: Path) -> tuple[int, dict[str, Any]]:
    """(step, weights) of the best checkpoint of a run.

    Raises:
      UserError: where there is none.
    """
    if not has_checkpoints(workdir):
        raise UserError(f'{workdir} holds no checkpoints: give the --workdir of a training run that has saved one')
    checkpoints = Checkpoints(workdir)
    step = checkpoints.best_step()
    assert step is not None
    variables = checkpoints.variables(step)
    checkpoints.close()
    return step, variables


def _check_shape(array: Any, wanted: Any) -> None:
    if np.shape(array) != np.shape(wanted):
        raise ValueError(f'an array of {np.shape(array)} where {np.shape(wanted)} is wanted')
