"""The only file that knows that there are several devices, and several hosts."""

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
HEARTBEAT_SECONDS = 30  # after which a silent process counts as dead

_last_words: list[Callable[[], Any]] = []  # of this process, to be withdrawn


def start_hosts(coordinator: str = '', num_processes: int | None = None, process_id: int | None = None) -> None:
    """Connects this process with the others of the run: as told, or where the environment says that there are any.

    coordinator: HOST:PORT of process 0. On TPU VMs and under srun jax knows all three by itself. A process that dies
    ends the others within a minute; started again, they continue together from the last checkpoint.

    Raises:
      UserError: where the processes cannot be connected.
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
    """A last line in the log, should another process die: jax then ends this one from C++, past all exceptions.

    Returns what to call where the process ends by itself.
    """
    faulthandler.disable()  # which would bury the line under every thread's stack
    words = (
        'error: this process was ended, most likely because another one of the run died (see above): start all of them '
        'again, and the run continues from the last checkpoint'
    )
    shell = subprocess.Popen(
        ['sh', '-c', f"read end || echo '{words}' >&2"], stdin=subprocess.PIPE, start_new_session=True
    )  # `read` fails where this process ends without a word
    withdraw = functools.partial(shell.communicate, b'end\n')
    atexit.register(withdraw)
    return withdraw


@contextlib.contextmanager
def failing_together() -> Iterator[None]:
    """A process of several that fails ends at once, and so ends the others; alone it raises as ever.

    (The way out of Python would wait for the other processes, and they wait for this one.)
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
    """Whether this process owns the work directory: the lock, the checkpoints."""
    return jax.process_index() == 0


def notice_for_all(step: int) -> bool:
    """Whether all hosts are to stop after this step, because one has been told to. To be called after every step.

    jax listens for SIGTERM on every host, and agrees with the others on a step that none of them has passed yet.
    """
    return multihost_utils.reached_preemption_sync_point(step)


def meet(name: str) -> None:
    """Waits for the other hosts."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def steps_ahead() -> int:
    """How many steps the host may be ahead of the devices: none on a CPU, where each has scratch memory of its own."""
    return 0 if jax.default_backend() == 'cpu' else 1


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


def from_first_host(thing: Any, like: Any) -> Any:
    """What the first host has, on every host, bit for bit; `like` has its tree, shapes and types. NumPy leaves."""
    if jax.process_count() == 1:
        return thing
    # As bytes, because the hosts' values are added up (the others' zeros): -0.0 + 0.0 would be 0.0.
    mine = thing if is_first_host() else like
    leaves, tree = jax.tree.flatten(jax.tree.map(np.asarray, mine))
    sent = [np.frombuffer(leaf.tobytes(), np.uint8) for leaf in leaves]
    received = multihost_utils.broadcast_one_to_all(sent, is_source=is_first_host())
    arrays = [np.asarray(r).view(leaf.dtype).reshape(leaf.shape) for r, leaf in zip(received, leaves, strict=True)]
    return jax.tree.unflatten(tree, arrays)


def gather_objects(thing: Any) -> list[Any]:
    """What every host has, in the order of the hosts, on every host. Any picklable object of our own making."""
    if jax.process_count() == 1:
        return [thing]
    data = np.frombuffer(pickle.dumps(thing), np.uint8)
    lengths = np.asarray(multihost_utils.process_allgather(np.asarray([data.size]))).reshape(-1)
    padded = np.pad(data, (0, int(lengths.max()) - data.size))
    rows = multihost_utils.process_allgather(padded)
    return [pickle.loads(row[:length].tobytes()) for row, length in zip(rows, lengths, strict=True)]
