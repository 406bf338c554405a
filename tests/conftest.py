"""The strict house rules that every test runs under."""

import functools
import gc
import os
import shutil
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
# The workers fill the cores. Threads of BLAS and of torch would wait for each other there, and they wait by spinning.
os.environ["OPENBLAS_NUM_THREADS"] = os.environ["OMP_NUM_THREADS"] = "1"
# Most of these tests' time goes into compiling small programs, which this halves (an extra option that is not known is
# ignored). With JQ4_USERS_COMPILER=1 programs are compiled as users have them: .ci/run runs tests of arithmetic so too.
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + (
    ""
    if os.environ.get("JQ4_USERS_COMPILER")
    else " --xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    " --xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters --xla_cpu_parallel_codegen_split_count=1"
)
os.environ["XLA_FLAGS"] += " --xla_force_host_platform_device_count=8"

import jax
import pytest
from jax._src.interpreters import mlir

# Traces are many objects that live: Python's own thresholds look for cycles among them fifty times as often.
gc.set_threshold(50_000, 10, 5)

# A third of a small program's compiling is filling a new context with MLIR's operations: all programs share one.
mlir.make_ir_context = functools.cache(mlir.make_ir_context)

# Checkpoints wait for a disk many times over: the tests' folders lie in memory where there is room.
_MEMORY, _ROOM = Path("/dev/shm"), 2**30
if os.access(_MEMORY, os.W_OK) and shutil.disk_usage(_MEMORY).free > _ROOM:
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", str(_MEMORY))

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real models and golden slices that stands beside the project; skips where it is not there."""
    folder = Path(__file__).resolve().parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"the shared test data is not beside the project (looked for {folder.name} in ../shared)")
    return folder
