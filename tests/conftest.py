import fcntl
import functools
import gc
import json
import os

import hypothesis
import jax
import pytest
import tiny

from effdet_jax.configs import default
from effdet_jax.model import build_model, cost
from effdet_jax.runtime import xla

# The tests compile much and compute little. With these, a training step compiles in a third of the time.
os.environ['XLA_FLAGS'] = xla.known_flags(
    *os.environ.get('XLA_FLAGS', '').split(),
    '--xla_backend_optimization_level=0',  # LLVM's; XLA's own passes stay as they are
    '--xla_cpu_use_fusion_emitters=false',
    '--xla_force_host_platform_device_count=4',  # some tests compare several devices with one
)
hypothesis.settings.register_profile('compiles', deadline=None)  # an example may be the first one of its shape
hypothesis.settings.load_profile('compiles')
gc.freeze()  # what was imported stays, and no collection looks at it
gc.set_threshold(100_000)  # tracing makes many objects and no garbage: a quarter of its time went into looking for it


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """What looks at a finished run is slow: that run takes a minute by itself."""
    for item in items:
        if 'finished_run' in item.fixturenames:
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope='session')
def shared_folder(tmp_path_factory):
    """One for all workers of pytest-xdist, which each have a temporary folder in it."""
    folder = tmp_path_factory.getbasetemp()
    return folder.parent if 'PYTEST_XDIST_WORKER' in os.environ else folder


@pytest.fixture(scope='session', autouse=True)
def compilation_cache(shared_folder):
    """A program that two tests need is compiled once, in commands too; nothing is left for or from another session."""
    settings = {
        'compilation_cache_dir': str(shared_folder / 'jax'),
        'compilation_cache_max_size': 2**33,  # with a limit, jax locks the folder: no worker reads half a program
        'persistent_cache_min_compile_time_secs': 0.3,
    }
    for name, value in settings.items():
        os.environ[f'JAX_{name.upper()}'] = str(value)
        jax.config.update(f'jax_{name}', value)


@pytest.fixture(scope='module', autouse=True)
def forget_programs():
    """Programs that were compiled for one file are of no use to the next, and all together take gigabytes."""
    yield
    jax.clear_caches()
    gc.collect()


@pytest.fixture(scope='session')
def traced():
    """`traced('d3')`: what `cost.trace` gives for a model with 90 classes; each is traced once per session."""

    @functools.cache
    def of_name(name):
        config = default.get_config(name)
        with pytest.MonkeyPatch.context() as patch:
            use_xlas_depthwise_convolution(patch)
            return cost.trace(build_model(config.model, num_classes=90), config.image.size)

    return of_name


@pytest.fixture(scope='session')
def shapes(traced):
    """`shapes('d3')`: the variables of a model with 90 classes as shapes."""
    return lambda name: {collection: traced(name)[collection] for collection in ('params', 'batch_stats')}


@pytest.fixture(scope='module')
def depthwise_by_xla():
    """XLA's depthwise convolution on CPU too, which compiles sooner (test_depthwise.py: ours is the same function)."""
    with pytest.MonkeyPatch.context() as patch:
        use_xlas_depthwise_convolution(patch)
        yield


def use_xlas_depthwise_convolution(patch):
    patch.setattr(jax.lax, 'platform_dependent', lambda *args, cpu, default: default(*args))


@pytest.fixture(scope='session')
def finished_run(shared_folder):
    """(work directory, metrics at its end, what it printed) of a run with `tiny.config()`; one worker makes it."""
    from effdet_jax import train
    from effdet_jax.records import console

    workdir, results = shared_folder / 'finished', shared_folder / 'finished.json'
    with (shared_folder / 'finished.lock').open('w') as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not results.exists():
            with pytest.MonkeyPatch.context() as patch, console.terminal.capture() as printed:
                use_xlas_depthwise_convolution(patch)
                numbers = train.train_and_evaluate(tiny.config(), workdir)
            results.write_text(json.dumps([numbers, printed.get()]))
    return workdir, *json.loads(results.read_text())
