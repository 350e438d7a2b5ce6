"""The only file that knows that there are several devices, and several hosts."""

import os
import pickle
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from effdet_jax.errors import UserError

AXIS = 'batch'


def start_hosts() -> None:
    """Connects this process with the other hosts of the run, where the environment says that there are any."""
    several = (
        'JAX_COORDINATOR_ADDRESS' in os.environ
        or ',' in os.environ.get('TPU_WORKER_HOSTNAMES', '')
        or int(os.environ.get('SLURM_NTASKS', '1')) > 1
    )
    if several and not jax.distributed.is_initialized():
        jax.distributed.initialize()


def host() -> tuple[int, int]:
    """(index of this host, number of hosts)."""
    return jax.process_index(), jax.process_count()


def is_first_host() -> bool:
    """Whether this process writes what a run has one of."""
    return jax.process_index() == 0


def describe_devices() -> str:
    """'4 x NVIDIA H200 on 1 host'."""
    hosts = jax.process_count()
    return f'{jax.device_count()} x {jax.devices()[0].device_kind} on {hosts} host{"s" if hosts > 1 else ""}'


def host_folder() -> str:
    """Where this host writes its logs and pictures, below the work directory: the first one in the directory itself."""
    return f'hosts/{jax.process_index()}' if jax.process_index() else '.'


def host_batch_size(key: str, global_batch_size: int, parts: int = 1) -> int:
    """This host's share of a batch.

    Raises:
      UserError: where the batch cannot be divided evenly among all devices, and there into `parts`.
    """
    if global_batch_size % (jax.device_count() * parts):
        into = f'{jax.device_count()} devices' + (f' x {parts} parts' if parts > 1 else '')
        raise UserError(f'{key}={global_batch_size} cannot be divided evenly into {into}: choose a multiple')
    return global_batch_size // jax.process_count()


def map_devices(function: Callable, donate: tuple[int, ...] = (), static: tuple[int, ...] = ()) -> Callable:
    """`function` on every device, each with its slice of the leading axis of every argument."""
    return jax.pmap(function, axis_name=AXIS, donate_argnums=donate, static_broadcasted_argnums=static)


def replicate(tree: Any) -> Any:
    """The same values on every device of this host, with a leading axis of devices."""
    # Over the same named axis as the step: an array laid out over another would compile the step a second time.
    copy = jax.pmap(lambda _, values: values, in_axes=(0, None), axis_name=AXIS)
    return copy(np.arange(jax.local_device_count()), tree)


def first_replica(tree: Any) -> Any:
    """Undoes `replicate`: the first device's values, as NumPy arrays."""
    return jax.tree.map(lambda x: np.asarray(x.addressable_shards[0].data)[0], tree)


def shard(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """[B, ...] -> [devices, B / devices, ...]."""
    devices = jax.local_device_count()
    return {name: x.reshape(devices, x.shape[0] // devices, *x.shape[1:]) for name, x in batch.items()}


def unshard(tree: Any) -> Any:
    """[devices, B / devices, ...] on the devices -> [B, ...] in NumPy."""
    return jax.tree.map(lambda x: np.asarray(x).reshape(-1, *x.shape[2:]), tree)


def gather_objects(thing: Any) -> list[Any]:
    """What every host has, in the order of the hosts, on every host. Any picklable object of our own making."""
    if jax.process_count() == 1:
        return [thing]
    data = np.frombuffer(pickle.dumps(thing), np.uint8)
    lengths = np.asarray(multihost_utils.process_allgather(np.asarray([data.size]))).reshape(-1)
    padded = np.pad(data, (0, int(lengths.max()) - data.size))
    rows = multihost_utils.process_allgather(padded)
    return [pickle.loads(row[:length].tobytes()) for row, length in zip(rows, lengths, strict=True)]
