"""The same curves and pictures in Weights & Biases, where `config.log.wandb` asks for it and `wandb` is installed."""

import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8

from effdet_jax.errors import UserError
from effdet_jax.records.files import write_atomically

ID_FILE = 'wandb.id'  # in the work directory, so that a run that continues goes on in the same one over there


def import_wandb(project: str) -> Any:
    """The module.

    Raises:
      UserError: where it is not installed.
    """
    try:
        import wandb  # type: ignore[import-not-found]  # optional
    except ImportError:
        wandb = None
    if not hasattr(wandb, 'init'):  # a folder ./wandb, which it leaves behind, can be imported too
        raise UserError(
            f'config.log.wandb={project!r} asks for Weights & Biases, which is not installed: pip install wandb, or '
            "--config.log.wandb=''"
        )
    return wandb


class WandbRun:
    """The run of a work directory in the project `project`, or `entity/project`; WANDB_MODE=offline needs no network.

    Steps are a metric of their own: those that are repeated after a crash have the same values and lie on the old ones.
    """

    def __init__(self, project: str, workdir: Path) -> None:
        """Begins the run, or continues the one that the work directory remembers.

        Raises:
          UserError: where Weights & Biases refuses.
        """
        self._wandb = import_wandb(project)
        entity, _, name = project.rpartition('/')
        path = workdir / ID_FILE
        if not path.exists():
            write_atomically(path, uuid.uuid4().hex[:8].encode())
        try:
            self._run = self._wandb.init(
                entity=entity or None, project=name, id=path.read_text(), resume='allow', name=workdir.name, dir=workdir
            )
        except self._wandb.Error as error:
            raise UserError(
                f'config.log.wandb={project!r}: {error}: wandb login, or WANDB_MODE=offline, or --config.log.wandb='
            ) from error
        self._run.define_metric('step')
        self._run.define_metric('*', step_metric='step')

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log({'step': step, **values})

    def picture(self, step: int, name: str, rgb: UInt8[np.ndarray, '_ _ 3']) -> None:
        self._run.log({'step': step, name: self._wandb.Image(rgb)})

    def hyper_parameters(self, values: Mapping[str, Any]) -> None:
        self._run.config.update(dict(values), allow_val_change=True)

    def close(self) -> None:
        self._run.finish()
