"""Several devices and hosts: starting, mapping, sharding, gathering.

Sums over the axis AXIS are in the step, the batch norms and the augmentations; a few files ask jax for counts.
"""

import atexit
import contextlib
import faulthandler
import functools
import os
import pickle
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from effdet_jax.errors import UserError

AXIS = 'batch'
HEARTBEAT_SECONDS = 30  # without a heartbeat for so long, a process counts as dead

_last_words: list[Callable[[], Any]] = []  # functions that cancel the last line of this process


def start_hosts(coordinator: str = '', num_processes: int | None = None, process_id: int | None = None) -> None:
    """Connects this process with the others of its run, if the arguments or the environment say that there are others.

    coordinator: HOST:PORT of process 0. On TPU VMs and under srun, jax finds all three by itself. If a process dies,
    the others end within a minute; started again, they continue together from the last checkpoint.

    Raises:
      UserError: if the processes cannot be connected.
    """
    several = (
        coordinator
        or 'JAX_COORDINATOR_ADDRESS' in os.environ
        or ',' in os.environ.get('TPU_WORKER_HOSTNAMES', '')
        or ('SLURM_STEP_NODELIST' in os.environ and int(os.environ.get('SLURM_NTASKS', '1')) > 1)  # under srun
    )
    if not several or jax.distributed.is_initialized():
        return
    _last_words.append(_prepare_last_words())
    try:
        jax.distributed.initialize(
            coordinator or None, num_processes, process_id,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS, shutdown_timeout_seconds=HEARTBEAT_SECONDS,
        )  # fmt: skip
    except (ValueError, RuntimeError) as error:
        raise UserError(
            f'cannot join the other processes of the run ({str(error).splitlines()[0]}): give every one of them '
            '--coordinator=HOST:PORT of process 0, --num_processes and its own --process_id'
        ) from error


def _prepare_last_words() -> Callable[[], Any]:
    """Prepares a last line for the log in case another process dies: jax then ends this one from C++, without Python.

    Returns a function that cancels it.
    """
    faulthandler.disable()  # it would bury the line under the stacks of all threads
    words = (
        'error: this process was ended, most likely because another one of the run died (see above): start all of them '
        'again, and the run continues from the last checkpoint'
    )
    shell = subprocess.Popen(
        ['sh', '-c', f"read end || echo '{words}' >&2"], stdin=subprocess.PIPE, start_new_session=True
    )  # `read` fails if this process ends without writing
    withdraw = functools.partial(shell.communicate, b'end\n')
    atexit.register(withdraw)
    return withdraw


@contextlib.contextmanager
def failing_together() -> Iterator[None]:
    """With several processes, an error ends this process at once, and thereby the others. Otherwise it is raised.

    The normal exit of Python would wait for the other processes, which wait for this one.
    """
    try:
        yield
    except (UserError, jax.errors.JaxRuntimeError) as error:
        if jax.process_count() == 1:
            raise
        reason = str(error).splitlines()[0][:400]
        if not isinstance(error, UserError):
            traceback.print_exc()
            reason = (
                f'most likely another process of this run died ({reason}): start all of them again, and the run '
                'continues from the last checkpoint'
            )
        print(f'error: {reason}', file=sys.stderr, flush=True)
        for withdraw in _last_words:
            withdraw()
        os._exit(1)


def host() -> tuple[int, int]:
    """(index of this host, number of hosts)."""
    return jax.process_index(), jax.process_count()


def is_first_host() -> bool:
    """Whether this process owns the work directory, with its lock and checkpoints."""
    return jax.process_index() == 0


def notice_for_all(step: int) -> bool:
    """Whether all hosts must stop after this step because one received SIGTERM. Must be called after every step.

    The hosts agree on a step that none of them has passed yet.
    """
    return multihost_utils.reached_preemption_sync_point(step)


def meet(name: str) -> None:
    """Waits for the other hosts."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def steps_ahead() -> int:
    """How many steps the host may run ahead of the devices: 0 on CPU, where two steps would need twice the memory."""
    return 0 if jax.default_backend() == 'cpu' else 1


def describe_devices() -> str:
    """'4 x NVIDIA H200 on 1 host'."""
    hosts = jax.process_count()
    return f'{jax.device_count()} x {jax.devices()[0].device_kind} on {hosts} host{"s" if hosts > 1 else ""}'


def host_folder() -> str:
    """Where this host writes logs and pictures, relative to the work directory: the first host in `.`."""
    return f'hosts/{jax.process_index()}' if jax.process_index() else '.'


def host_batch_size(key: str, global_batch_size: int, parts: int = 1) -> int:
    """This host's share of a batch.

    Raises:
      UserError: if the batch cannot be divided evenly among all devices, and on each into `parts`.
    """
    if global_batch_size % (jax.device_count() * parts):
        into = f'{jax.device_count()} devices' + (f' x {parts} parts' if parts > 1 else '')
        raise UserError(f'{key}={global_batch_size} cannot be divided evenly into {into}: choose a multiple')
    return global_batch_size // jax.process_count()


def map_devices(function: Callable, donate: tuple[int, ...] = (), static: tuple[int, ...] = ()) -> Callable:
    """`function` mapped over the leading axis of its arguments, one slice per device.

    `jax.pmap`, because the step is written for one device with a named axis.
    """
    return jax.pmap(function, axis_name=AXIS, donate_argnums=donate, static_broadcasted_argnums=static)


def replicate(tree: Any) -> Any:
    """The same values on every device of this host, with a leading axis of devices."""
    # Over the same named axis as the step: another layout would compile the step twice.
    copy = jax.pmap(lambda _, values: values, in_axes=(0, None), axis_name=AXIS)
    return copy(np.arange(jax.local_device_count()), tree)


def first_replica(tree: Any) -> Any:
    """The inverse of `replicate`: the first device's values, as NumPy arrays."""
    return jax.tree.map(lambda x: np.asarray(x.addressable_shards[0].data)[0], tree)


def shard(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """[B, ...] -> [devices, B / devices, ...]."""
    count = jax.local_device_count()
    return {name: x.reshape(count, x.shape[0] // count, *x.shape[1:]) for name, x in batch.items()}


def unshard(tree: Any) -> Any:
    """[devices, B / devices, ...] on the devices -> [B, ...] in NumPy."""
    return jax.tree.map(lambda x: np.asarray(x).reshape(-1, *x.shape[2:]), tree)


def from_first_host(thing: Any, like: Any) -> Any:
    """Gives the first host's tree of NumPy arrays to every host, bit for bit. `like` has its tree, shapes and types."""
    if jax.process_count() == 1:
        return thing
    # As bytes, because the broadcast adds the hosts' values, and -0.0 + 0.0 would be 0.0.
    mine = thing if is_first_host() else like
    leaves, tree = jax.tree.flatten(jax.tree.map(np.asarray, mine))
    sent = [np.frombuffer(leaf.tobytes(), np.uint8) for leaf in leaves]
    received = multihost_utils.broadcast_one_to_all(sent, is_source=is_first_host())
    arrays = [np.asarray(r).view(leaf.dtype).reshape(leaf.shape) for r, leaf in zip(received, leaves, strict=True)]
    return jax.tree.unflatten(tree, arrays)


def gather_objects(thing: Any) -> list[Any]:
    """Gives the objects of all hosts, in order, to every host. For picklable objects of our own."""
    if jax.process_count() == 1:
        return [thing]
    data = np.frombuffer(pickle.dumps(thing), np.uint8)
    lengths = np.asarray(multihost_utils.process_allgather(np.asarray([data.size]))).reshape(-1)
    padded = np.pad(data, (0, int(lengths.max()) - data.size))
    rows = multihost_utils.process_allgather(padded)
    return [pickle.loads(row[:length].tobytes()) for row, length in zip(rows, lengths, strict=True)]
