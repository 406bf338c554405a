"""The TPUs that the kernels know, and which of them a trace is for.

All figures are of one TensorCore: v4 and v5p join two cores to a device (megacore: the grid's parallel steps are dealt
out to both), a device of TPU7x is one of its chip's two cores. Bandwidths are the datasheets'; the clock is the peak
rate over the multiply-adds of a cycle.
"""

import dataclasses
from typing import Any

import jax


@dataclasses.dataclass(frozen=True)
class Chip:
    """One kind of TPU, seen from one core.

    Attributes:
      name: as in "v6e".
      kinds: what `jax.Device.device_kind` says.
      cores: cores of a device.
      clock: cycles a second.
      bandwidth: HBM bytes a second.
      mxu_depth: rows and columns of weights that one pass takes; a smaller product costs as much.
      vmem: bytes that a kernel may take. The chips have more, but a kernel that asks for more than the compiler's own
        default does not get its layer read out of a stack in place (tpu.py).
      block: bytes of the largest block or sum with which a layer was seen to be read out of a stack in place, when
        kernels were compiled within a scan.
      inputs: bytes of x and codes (two of every block, one of resident rows) with which layers of more than LARGE_LAYER
        were seen to be read so; on v6e and TPU7x the limit was not found.
      bf16_vector: whether the vector unit multiplies bf16.
      integer_mxu: whether int8 by int8 products are native.
    """

    name: str
    kinds: tuple[str, ...]
    cores: int
    clock: float
    bandwidth: float
    mxu_depth: int
    vmem: int
    block: int
    inputs: int
    bf16_vector: bool
    integer_mxu: bool


_MIB = 2**20
LARGE_LAYER = 32 * _MIB  # of codes
CHIPS = (
    Chip("v4", ("TPU v4", "TPU v4 lite"), 2, 1.05e9, 0.615e12, 128, 15 * _MIB, 15 * _MIB, 15 * _MIB, False, False),
    Chip("v5e", ("TPU v5 lite", "TPU v5e"), 1, 1.5e9, 0.82e12, 128, 15 * _MIB, 15 * _MIB, 15 * _MIB, False, True),
    Chip("v5p", ("TPU v5", "TPU v5p"), 2, 1.75e9, 1.38e12, 128, 15 * _MIB, _MIB, 7 * _MIB // 2, False, True),
    Chip("v6e", ("TPU v6 lite", "TPU v6e"), 1, 1.755e9, 1.64e12, 256, 30 * _MIB, 3 * _MIB, 30 * _MIB, True, True),
    Chip("tpu7x", ("TPU7x",), 1, 2.2e9, 3.7e12, 256, 30 * _MIB, 3 * _MIB, 30 * _MIB, True, False),
)

# For a TPU program traced where no TPU is in sight (an export on a CPU machine): forms that every chip compiles, in
# the memory of the smallest.
UNKNOWN = dataclasses.replace(CHIPS[3], name="unknown", kinds=(), vmem=15 * _MIB, integer_mxu=False)


def chip_named(name: str) -> Chip:
    """The chip called `name`, or of that device kind; UNKNOWN for others."""
    return next((chip for chip in CHIPS if name == chip.name or name in chip.kinds), UNKNOWN)


def traced_chip() -> Chip:
    """The chip of the abstract mesh around the trace, else of the process's default device, else UNKNOWN.

    `jax.shard_map`, `jax.set_mesh` and `jax.sharding.use_abstract_mesh` put a mesh around a trace, and the mesh knows
    its devices, compile-only ones included.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    return chip_named(device.device_kind if device is not None else _default_kind())


def _default_kind() -> str:
    default: Any = getattr(jax.config, "jax_default_device", None)  # None, a platform's name, or a device
    if default is None or isinstance(default, str):
        default = jax.devices(default)[0]
    return default.device_kind
