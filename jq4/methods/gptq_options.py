"""The options of GPTQ (jq4.methods.gptq), checked."""

import dataclasses

from jq4.errors import JQ4Error
from jq4.methods import hqq, rtn

ACTORDERS = ("static", "none")
FALLBACKS = {"hqq": hqq.quantize, "rtn": rtn.quantize}


@dataclasses.dataclass(frozen=True)
class Options:
    """The method's options; see `quantize`."""

    damping: float = 0.01
    refinements: int = 2
    starts: int = 16
    actorder: str = "static"
    correction: float = 1.0
    min_rows: int = 32
    fallback: str = "hqq"

    def __post_init__(self) -> None:
        whole = self.refinements >= 0 and self.starts >= 1 and self.min_rows >= 0
        if not whole or self.damping < 0 or not 0 <= self.correction <= 1:
            raise JQ4Error(
                f"gptq: damping={self.damping}, refinements={self.refinements}, starts={self.starts}, "
                f"correction={self.correction}, min_rows={self.min_rows}: wanted damping >= 0, refinements >= 0, "
                "starts >= 1, 0 <= correction <= 1, min_rows >= 0"
            )
        for name, value, known in (("actorder", self.actorder, ACTORDERS), ("fallback", self.fallback, FALLBACKS)):
            if value not in known:
                raise JQ4Error(f"gptq: {name} is {value!r}, wanted one of {', '.join(known)}")

    @property
    def rows_wanted(self) -> int:
        """min_rows, and one at least: no rows are no reason for weights of zero."""
        return max(self.min_rows, 1)
