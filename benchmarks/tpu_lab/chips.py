"""What a TPU can do at best, per device of JAX; published peaks, from which the clock follows.

A device of JAX is a chip, except TPU7x's, which is one of a chip's two cores with its half of the bandwidth. The two
cores of v4 and v5p are one device (megacore): the compiler splits a parallel axis of a kernel's grid between them.
Every core of v4 to v5p has four 128x128 MXUs, of v6e and TPU7x two 256x256 that take two rows a cycle, so that

    clock = peak bf16 FLOP/s / (2 * cores * MACs per cycle)
"""

import dataclasses
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class Chip:
    """One device that JAX sees.

    Attributes:
      topology: a small one, for get_topology_desc.
      device_kind: JAX's name for it.
      cores: TensorCores of one device.
      macs: bf16 multiply-adds that the MXUs of one core do in a cycle.
      peak: bf16 FLOP/s of the device.
      bandwidth: HBM bytes a second of the device.
      hbm: HBM bytes of the device.
      vmem: VMEM bytes of a core.
      options: further arguments of get_topology_desc.
    """

    name: str
    topology: str
    device_kind: str
    cores: int
    macs: int
    peak: float
    bandwidth: float
    hbm: int
    vmem: int
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def clock(self) -> float:
        """Cycles a second."""
        return self.peak / (2 * self.cores * self.macs)


_SMALL_MXUS, _LARGE_MXUS = 4 * 128 * 128, 2 * 2 * 256 * 256

CHIPS: dict[str, Chip] = {
    chip.name: chip
    for chip in (
        Chip(
            "v4",
            "v4:2x2x1",
            "TPU v4",
            2,
            _SMALL_MXUS,
            275e12,
            1228e9,
            32 * 2**30,
            16 * 2**20,
            {"chip_config_name": "megacore"},
        ),
        Chip("v5e", "v5e:2x2", "TPU v5 lite", 1, _SMALL_MXUS, 197e12, 819e9, 16 * 2**30, 128 * 2**20),
        Chip("v5p", "v5p:2x2x1", "TPU v5", 2, _SMALL_MXUS, 459e12, 2765e9, 95 * 2**30, 64 * 2**20),
        Chip("v6e", "v6e:2x2", "TPU v6 lite", 1, _LARGE_MXUS, 918e12, 1640e9, 32 * 2**30, 128 * 2**20),
        Chip("tpu7x", "tpu7x:2x2x1", "TPU7x", 1, _LARGE_MXUS, 2307e12 / 2, 7380e9 / 2, 96 * 2**30, 64 * 2**20),
    )
}
