"""Strict by default: 8 host devices, no rank promotion, warnings are errors."""

import ctypes
import gc
import inspect
import os

os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("MPLBACKEND", "agg")

import jax
import pytest
from helpers.markers import markers_of
from jax.experimental.compilation_cache import compilation_cache

from flaxfit.trainer.compilation_cache import use_compilation_cache

jax.config.update("jax_numpy_rank_promotion", "raise")

# On one device where nothing else is said: most tests are not about several, which
# compile longer. Those that are take the fixture `eight_devices`.
jax.config.update("jax_default_device", jax.local_devices()[0])


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Marks tests by what they use, before `-m` chooses among them."""
    for item in items:
        row = item.callspec.id if hasattr(item, "callspec") else ""
        given = {marker.name for marker in item.iter_markers()}
        source = inspect.getsource(item.module)
        for name in markers_of(source, item.originalname, row, given) - given:
            item.add_marker(name)


@pytest.fixture
def eight_devices():
    """Trainers made inside train on all of the host's eight devices."""
    with jax.default_device(None):
        yield jax.local_devices()


@pytest.fixture(scope="session", autouse=True)
def shared_compiles(tmp_path_factory):
    """Compiled programs are kept, for tests that make one trainer again and again."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent  # that of all workers
    names = (
        "jax_compilation_cache_dir",
        "jax_persistent_cache_min_compile_time_secs",
        "jax_persistent_cache_min_entry_size_bytes",
    )
    before = {name: getattr(jax.config, name) for name in names}
    use_compilation_cache(folder / "compiled")
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


@pytest.fixture(scope="module", autouse=True)
def small_workers():
    """Drops jax's caches after each file, and gives the memory back to the system.

    The caches keep what was traced for all trainers, and glibc keeps what was freed: a
    worker would grow to 3 GB by the end. Recompiling reads the disk.
    """
    yield
    jax.clear_caches()
    gc.collect()
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        trim(0)


@pytest.fixture
def compiled():
    """What XLA compiles from here on, by jax's own events; `clear` begins anew."""
    names = []

    def listen(event, duration, **labels):
        if event == "/jax/core/compile/backend_compile_duration":
            names.append(labels.get("fun_name"))

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield names
    jax.monitoring.clear_event_listeners()
