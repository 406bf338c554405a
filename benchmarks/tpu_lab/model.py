"""The time of a compiled program, as the slowest of three limits:

    time = max(bundles / clock, MACs / MXU rate, HBM bytes / bandwidth)

Bundles are those that one core issues, from the compiler's own schedule; the MXU's rate is that of bf16 operands, and
bounds what a schedule cannot show (a bundle that waits for a busy MXU); bytes and bandwidth are of the whole device.
Operations that follow one another are added up within each limit, as if transfers overlapped all of the arithmetic:
that favours programs of several operations, so it is not our kernels that it flatters.
"""

import dataclasses

from benchmarks.tpu_lab.chips import Chip


@dataclasses.dataclass(frozen=True)
class Time:
    """Microseconds by each limit."""

    bundles: float
    mxu: float
    hbm: float

    @property
    def modelled(self) -> float:
        return max(self.bundles, self.mxu, self.hbm)

    @property
    def bound(self) -> str:
        limits = {"HBM": self.hbm, "MXU": self.mxu, "bundles": self.bundles}
        return max(limits, key=lambda name: limits[name])


def time_of(chip: Chip, cycles: int, macs: int, nbytes: int) -> Time:
    """cycles: bundles that one core issues. macs, nbytes: of the device."""
    return Time(
        bundles=1e6 * cycles / chip.clock,
        mxu=1e6 * macs / (chip.macs * chip.cores * chip.clock),
        hbm=1e6 * nbytes / chip.bandwidth,
    )


def ideal(chip: Chip, macs: int, nbytes: int) -> float:
    """What nothing on this chip can go below, in microseconds: a roofline."""
    return time_of(chip, 0, macs, nbytes).modelled
