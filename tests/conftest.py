"""Settings of every test: four CPU devices, x64, strict promotion, the key-reuse checker, warnings
as errors.
"""

import importlib.metadata
import os
import pathlib

import jax
import jaxtyping
import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
# scripts: one wants arguments, and one sets the flags of its process when it is imported
collect_ignore = ["process_worker.py", "devices_worker.py"]
# The modules share many small programs, so the cache keeps those as well.
SETTINGS = {
    "jax_platforms": "cpu",
    "jax_compilation_cache_dir": str(ROOT / ".cache" / "jax"),
    "jax_persistent_cache_min_compile_time_secs": 0.0,
}
for name, value in SETTINGS.items():
    # for the processes that tests start
    value = type(value)(os.environ.setdefault(name.upper(), str(value)))
    # jax has read the environment if something has imported it before
    jax.config.update(name, value)
# Four devices; and machine code for small programs that run once, whose compilation is most of the
# time.
FLAGS = [
    "--xla_force_host_platform_device_count=4",
    "--xla_backend_optimization_level=0",
    "--xla_cpu_parallel_codegen_split_count=1",
]
# later ones abort: they have no other emitters
if importlib.metadata.version("jaxlib").startswith("0.10."):
    FLAGS.append("--xla_cpu_use_fusion_emitters=false")
for flag in FLAGS:
    if flag.partition("=")[0] not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}"

XLA_FLAGS = os.environ["XLA_FLAGS"]


def pytest_collection_finish():
    assert os.environ["XLA_FLAGS"] == XLA_FLAGS, "a file that was collected changes XLA_FLAGS"


def pytest_configure(config):
    """Warnings are errors, except where two workers meet at one entry of the compilation cache: jax
    then compiles.
    """
    config.addinivalue_line("filterwarnings", "error")
    config.addinivalue_line(
        "filterwarnings", "ignore:Error (reading|writing) persistent compilation cache entry"
    )


@pytest.fixture
def without_type_checks():
    """The library as users run it: its own error, and not jaxtyping's, refuses a wrong argument."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(autouse=True)
def _strict(request):
    """x64 and jax's own checkers. Not for the doctests, which show what a user's session shows."""
    doctest = type(request.node).__name__ == "DoctestItem"
    with (
        jax.enable_x64(not doctest),
        jax.numpy_rank_promotion("raise"),
        jax.debug_key_reuse(not doctest),
    ):
        yield
