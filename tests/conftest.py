"""Settings of every test: four CPU devices, x64, strict promotion, the key-reuse checker, warnings as errors."""

import importlib.metadata
import os
import pathlib

ROOT = pathlib.Path(__file__).resolve().parent.parent
collect_ignore = ["process_worker.py"]  # a script that wants arguments
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".cache" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
# Four devices; and machine code for small programs that run once, whose compilation is most of the time.
FLAGS = [
    "--xla_force_host_platform_device_count=4",
    "--xla_backend_optimization_level=0",
    "--xla_cpu_parallel_codegen_split_count=1",
]
if importlib.metadata.version("jaxlib").startswith("0.10."):  # later ones abort: they have no other emitters
    FLAGS.append("--xla_cpu_use_fusion_emitters=false")
for flag in FLAGS:
    if flag.partition("=")[0] not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}"

import jax
import jaxtyping
import pytest


def pytest_configure(config):
    """Warnings are errors."""
    config.addinivalue_line("filterwarnings", "error")


@pytest.fixture(autouse=True, scope="module")
def _forgets():
    """A worker does not keep the compiled programs of a module that is done."""
    yield
    jax.clear_caches()


@pytest.fixture
def without_type_checks():
    """The library as users run it: its own error, and not jaxtyping's, refuses a wrong argument."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(autouse=True)
def _strict(request):
    """x64 and jax's own checkers, except for the doctests, which show what a user's session shows."""
    doctest = type(request.node).__name__ == "DoctestItem"
    with (
        jax.enable_x64(not doctest),
        jax.numpy_rank_promotion("raise"),
        jax.debug_key_reuse(not doctest),
    ):
        yield
