"""The GPUs that the kernels know, and which of them a trace is for.

The kernels are for compute capability 9.0 alone, the only one with wgmma: their compiler ends the whole process where
it meets that for another, so what a trace is for must be known before lowering. Figures are the datasheets'.
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


OTHERS = {  # compute capabilities whose weights are multiplied by XLA's forms, and the first word of their GPUs' names
    "8.0": ("A100", "A800", "A30"),
    "8.6": ("A10", "A40"),
    "8.9": ("L4", "L40", "L40S"),
    "10.0": ("B200", "GB200"),
    "10.3": ("B300", "GB300"),
}


def gpu_named(kind: str) -> Gpu | None:
    """The Hopper GPU of a device kind; None for others."""
    return next((gpu for gpu in HOPPER if kind == gpu.kind or kind.startswith((f"{gpu.kind} ", f"{gpu.kind}-"))), None)


def refusal_of_device(kind: str) -> str | None:
    """Why the kernels are not for a device kind, or None."""
    if gpu_named(kind) is not None:
        return None
    words = kind.replace("-", " ").split()
    found = next((one for one, names in OTHERS.items() if words[:1] == ["NVIDIA"] and set(words[1:2]) & set(names)), "")
    return f"runs on Hopper GPUs (compute capability 9.0), and this is traced for {kind!r}" + (
        f" ({found}, which has no wgmma)" if found else ""
    )


def traced_kind() -> str:
    """The device kind of the abstract mesh around the trace, else of the process's default device."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    if device is not None:
        return device.device_kind
    default = getattr(jax.config, "jax_default_device", None)
    return (jax.devices(default)[0] if default is None or isinstance(default, str) else default).device_kind
