"""The GPUs that the kernels know, and which of them a trace is for.

mosaic_gpu.py is for compute capability 9.0 alone, the only one with wgmma: its compiler ends the whole process where it
meets that for another. mosaic_gpu_mma.py is for 8.0 and 8.9, and its compiler takes 9.0 for what it is not told. So
what a trace is for must be known before lowering. Figures are the datasheets'.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax


@dataclasses.dataclass(frozen=True)
class Gpu:
    """One kind of GPU.

    Attributes:
      kind: how `jax.Device.device_kind` begins.
      cores: streaming multiprocessors.
      clock: cycles a second.
      bandwidth: HBM bytes a second.
      cache_bandwidth: bytes a second from L2.
      shared_memory: bytes that a block may take.
      macs: bf16 multiply-adds of a core in a cycle.
    """

    kind: str
    cores: int
    clock: float
    bandwidth: float
    cache_bandwidth: float = 5.5e12
    shared_memory: int = 232448
    macs: int = 2048


FIRST_WITH_MMA = (0, 11, 2)
LANES = 128  # threads that a core issues to in a cycle

# Longer names first: "NVIDIA H100 PCIe" is not the H100 that "NVIDIA H100 80GB HBM3" is.
HOPPER = (
    Gpu("NVIDIA GH200", 132, 1.755e9, 4.0e12),
    Gpu("NVIDIA H100 PCIe", 114, 1.62e9, 2.0e12),
    Gpu("NVIDIA H100 NVL", 132, 1.59e9, 3.9e12),
    Gpu("NVIDIA H100", 132, 1.755e9, 3.35e12),
    Gpu("NVIDIA H200", 132, 1.755e9, 4.8e12),
    Gpu("NVIDIA H800", 132, 1.755e9, 3.35e12),
    Gpu("NVIDIA H20", 78, 1.755e9, 4.0e12),
)
_A100, _ADA = (4.0e12, 166912, 1024), (4.0e12, 101376, 512)
AMPERE = (  # and Ada
    Gpu("NVIDIA A100-SXM4-40GB", 108, 1.41e9, 1.555e12, *_A100),
    Gpu("NVIDIA A100-PCIE-40GB", 108, 1.41e9, 1.555e12, *_A100),
    Gpu("NVIDIA A100", 108, 1.41e9, 2.039e12, *_A100),
    Gpu("NVIDIA A800", 108, 1.41e9, 2.039e12, *_A100),
    Gpu("NVIDIA A30", 56, 1.44e9, 0.933e12, *_A100),
    Gpu("NVIDIA L40S", 142, 2.52e9, 0.864e12, *_ADA),
    Gpu("NVIDIA L40", 142, 2.49e9, 0.864e12, 4.0e12, 101376, 256),
    Gpu("NVIDIA L4", 58, 2.04e9, 0.3e12, *_ADA),
)
KNOWN = (*HOPPER, *AMPERE)

CAPABILITIES = {  # and the first word of their GPUs' names
    "8.0": ("A100", "A800", "A30"),
    "8.6": ("A10", "A40"),
    "8.9": ("L4", "L40", "L40S"),
    "10.0": ("B200", "GB200"),
    "10.3": ("B300", "GB300"),
}


def gpu_named(kind: str, among: Sequence[Gpu] = HOPPER) -> Gpu | None:
    """The GPU of a device kind; None for others."""
    return next((gpu for gpu in among if kind == gpu.kind or kind.startswith((f"{gpu.kind} ", f"{gpu.kind}-"))), None)


def refusal_of_device(kind: str) -> str | None:
    """Why the kernels of Hopper are not for a device kind, or None."""
    if gpu_named(kind) is not None:
        return None
    found = _capability_of(kind)
    return f"runs on Hopper GPUs (compute capability 9.0), and this is traced for {kind!r}" + (
        f" ({found}, which has no wgmma)" if found else ""
    )


def refusal_of_mma(kind: str) -> str | None:
    """Why the kernel of Ampere and Ada is not for a device kind, or not with this JAX, or None."""
    if gpu_named(kind, AMPERE) is None:
        found = f" ({capability})" if (capability := _capability_of(kind)) else ""
        known = ", ".join(gpu.kind for gpu in AMPERE)
        return (
            f"knows, of compute capability 8.0 and 8.9, {known}, and this is traced for {kind!r}{found}: XLA's forms "
            "serve it, best in another layout than hopper (jq4.prepare without layout='hopper')"
        )
    if reason := refusal_of_jax():
        return reason
    if not _compiler_is_told(kind):
        return (
            f"cannot be compiled here for {kind!r}: Mosaic GPU takes a device that does not say its compute capability "
            "for a Hopper GPU; compile on one of its kind"
        )
    return None


def refusal_of_jax() -> str | None:
    """Why this JAX has nothing to write the kernel of Ampere and Ada in, or None."""
    if jax.__version_info__ >= FIRST_WITH_MMA:
        return None
    wanted = ".".join(map(str, FIRST_WITH_MMA))
    return f"takes JAX {wanted} or later, whose Mosaic GPU has mma.sync, and this is JAX {jax.__version__}"


def _capability_of(kind: str) -> str:
    words = kind.replace("-", " ").split()
    names = CAPABILITIES.items()
    return next((one for one, of in names if words[:1] == ["NVIDIA"] and set(words[1:2]) & set(of)), "")


def _compiler_is_told(kind: str) -> bool:
    """Whether the traced device tells its compute capability, or the default one does and is of its kind."""
    devices = (jax.sharding.get_abstract_mesh().abstract_device, _default_device())
    return any(one is not None and one.device_kind == kind and hasattr(one, "compute_capability") for one in devices)


def traced_kind() -> str:
    """The device kind of the abstract mesh around the trace, else of the process's default device."""
    return (jax.sharding.get_abstract_mesh().abstract_device or _default_device()).device_kind


def _default_device() -> Any:
    default = getattr(jax.config, "jax_default_device", None)
    return jax.devices(default)[0] if default is None or isinstance(default, str) else default
