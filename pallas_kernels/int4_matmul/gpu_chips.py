"""The GPUs that the kernels know, and which of them a trace is for.

The kernel is for compute capability 9.0 alone: its compiler ends the whole process where it meets wgmma for another
(Blackwell), so what a trace is for must be known before lowering. Figures are the datasheets'.
"""

import dataclasses

import jax


@dataclasses.dataclass(frozen=True)
class Gpu:
    """One kind of Hopper GPU.

    Attributes:
      kind: how `jax.Device.device_kind` begins.
      cores: streaming multiprocessors.
      clock: cycles a second.
      bandwidth: HBM bytes a second.
      cache_bandwidth: bytes a second from L2.
      shared_memory: bytes that a block may take.
    """

    kind: str
    cores: int
    clock: float
    bandwidth: float
    cache_bandwidth: float = 5.5e12
    shared_memory: int = 232448


LANES = 128  # threads that a core issues to in a cycle
MACS = 2048  # bf16 multiply-adds of a core in a cycle

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


def gpu_named(kind: str) -> Gpu | None:
    """The Hopper GPU of a device kind; None for others."""
    return next((gpu for gpu in HOPPER if kind == gpu.kind or kind.startswith((f"{gpu.kind} ", f"{gpu.kind}-"))), None)


def traced_kind() -> str:
    """The device kind of the abstract mesh around the trace, else of the process's default device."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    if device is not None:
        return device.device_kind
    default = getattr(jax.config, "jax_default_device", None)
    return (jax.devices(default)[0] if default is None or isinstance(default, str) else default).device_kind
