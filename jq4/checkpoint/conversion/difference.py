"""How far two weights are apart, summed up a block at a time."""

import math

import numpy as np


class Difference:
    """max |w' - w| and |w' - w| / |w| (Frobenius) of what was added."""

    def __init__(self) -> None:
        self.largest, self._error, self._norm = 0.0, 0.0, 0.0

    def add(self, found: np.ndarray, wanted: np.ndarray) -> None:
        """Blocks of one shape; NaN or infinity on one side alone counts as infinitely far."""
        found, wanted = found.astype(np.float64), wanted.astype(np.float64)
        same = (found == wanted) | (np.isnan(found) & np.isnan(wanted))
        off = np.where(same, 0.0, np.nan_to_num(np.abs(np.where(same, 0.0, found - wanted)), nan=np.inf))
        self.largest = max(self.largest, float(off.max(initial=0.0)))
        self._error += float(np.square(off).sum())
        self._norm += float(np.square(np.nan_to_num(wanted, posinf=0.0, neginf=0.0)).sum())

    @property
    def relative(self) -> float:
        if not self._error:
            return 0.0
        return math.sqrt(self._error / self._norm) if self._norm else math.inf

    def as_dict(self) -> dict[str, float]:
        return {"max": self.largest, "relative": self.relative}
