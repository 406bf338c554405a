"""The strict house rules that every test runs under."""

import os
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
# Tests spend their time in compiling small programs, which these flags make twice as quick. Flags of your own come after
# them and win: XLA_FLAGS="--xla_backend_optimization_level=2 ..." compiles as for users.
QUICK_COMPILER = [
    "--xla_backend_optimization_level=0",
    "--xla_llvm_disable_expensive_passes=true",
    "--xla_cpu_use_fusion_emitters=false",
]
os.environ["XLA_FLAGS"] = " ".join(
    [*QUICK_COMPILER, "--xla_force_host_platform_device_count=8", os.environ.get("XLA_FLAGS", "")]
)

import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real models and golden slices that stands beside the project; skips where it is not there."""
    folder = Path(__file__).resolve().parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"the shared test data is not beside the project (looked for {folder.name} in ../shared)")
    return folder
