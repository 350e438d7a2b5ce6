"""Logs the curves and pictures to Weights & Biases too, if `config.log.wandb` is set and `wandb` is installed."""

import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8

from effdet_jax.errors import UserError
from effdet_jax.records.files import write_atomically

ID_FILE = 'wandb.id'  # in the work directory; a continued run continues the same run there


def import_wandb(project: str) -> Any:
    """The module `wandb`.

    Raises:
      UserError: if it is not installed.
    """
    try:
        import wandb  # type: ignore[import-not-found]  # optional
    except ImportError:
        wandb = None
    if not hasattr(wandb, 'init'):  # Python also imports the folder ./wandb that earlier runs leave behind
        raise UserError(
            f'config.log.wandb={project!r} needs Weights & Biases, which is not installed: pip install wandb, or set '
            "--config.log.wandb=''"
        )
    return wandb


class WandbRun:
    """The run of a work directory in `project`, or in `entity/project`. WANDB_MODE=offline works without a network.

    Steps are logged as a metric, because W&B ignores steps that go back, as they do after a crash.
    """

    def __init__(self, project: str, workdir: Path) -> None:
        """Begins a run, or continues the one whose id is stored in the work directory.

        Raises:
          UserError: if Weights & Biases refuses, for example without a login.
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
                f'config.log.wandb={project!r}: {error}: run `wandb login`, or set WANDB_MODE=offline or '
                '--config.log.wandb='
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
