"""What every test runs under: the CPU, and a cache folder of its own.

Set before jax is first imported. JAX's own cache of compiled programs stays off: on CPU, programs compiled beside
others that came from it lose functions when they are written (jaxlib 0.12.0). A test that needs several devices runs
its code in a process of its own with JAX_NUM_CPU_DEVICES set: eight fake devices in this one would make every
dispatch three times slower.
"""

import gc
import os
from pathlib import Path

import pytest

CACHE = Path(__file__).resolve().parent.parent / ".cache"

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.pop("JAX_COMPILATION_CACHE_DIR", None)
# Nothing a test keeps may land in the user's own cache, nor depend on what lies there.
os.environ.setdefault("XDG_CACHE_HOME", str(CACHE))
# Mosaic's GPU interpreter holds a thread of XLA's pool for every warpgroup that waits for another; two are too few.
os.environ.setdefault("NPROC", str(max(4, os.cpu_count() or 1)))


# Files that take longest: they come first where several processes share the tests, so that none is left with one at
# the end while the others are idle.
LONGEST = """
    test_mesh test_cpu_kinds test_several_hosts test_tpu_attention test_tpu_planted_errors test_gpu_attention
    test_gpu_planted_errors test_gpu_triton test_tpu_compile test_speculation test_engine test_windows
    test_quantised_engines test_choose test_examples test_random_requests test_quantise test_replicas test_formats
    test_packaging test_kept_weights test_starts_at_once test_steps test_grouped_matmul
""".split()


def pytest_configure(config):
    """Programs of the fast tests run a few times: XLA compiles them in a hurry, unless a test asks for more."""
    if "not slow" in config.option.markexpr:
        from quick_compile import QUICK  # imports jax, which reads what is set above, and which clients do not have

        os.environ.setdefault("XLA_FLAGS", QUICK)


@pytest.fixture(scope="module")
def fully_compiled():
    """Of a module whose engines promise the same tokens in every company: they hold in such programs as users have."""
    import quick_compile

    with quick_compile.fully_compiled():
        yield


def pytest_collection_modifyitems(config, items):
    if hasattr(config, "workerinput"):
        rank = {name: place for place, name in enumerate(LONGEST)}
        items.sort(key=lambda item: rank.get(item.path.stem, len(rank)))


def pytest_collection_finish():
    gc.freeze()  # what thousands of tests are made of is not gone through again at each collection of garbage
