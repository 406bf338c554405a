"""The algorithms, one a file, behind one signature: method(weight, statistics, encoding, **options) -> QArray.

    weight      float[*B, K, N] (the grouped axis may be any); traced
    statistics  what jq4.observe collected for this weight, or None
    encoding    jq4.rounding.Encoding: format, axis, groups, symmetry, dtypes; static
    options     the method's own, static

A method is a row of the table below; it says which options it takes and whether it needs statistics.
"""

import dataclasses
from collections.abc import Callable

from jq4.errors import JQ4Error
from jq4.methods import hqq, rtn
from jq4.qarray import QArray


@dataclasses.dataclass(frozen=True)
class Method:
    """One algorithm: the function, what it is told by, and what a preset of its name means by `-asym`."""

    quantize: Callable[..., QArray]
    needs_statistics: bool = False
    options: tuple[str, ...] = ()
    asymmetric_zero_point: str = "integer"


METHODS: dict[str, Method] = {
    "rtn": Method(rtn.quantize),
    "hqq": Method(
        hqq.quantize,
        options=("lp_norm", "beta", "kappa", "iters", "starts", "max_shrink"),
        asymmetric_zero_point="float",
    ),
}


def get_method(name: str) -> Method:
    """The method called `name`; an error that lists the known ones if there is none."""
    if not isinstance(name, str) or name not in METHODS:
        raise JQ4Error(f"unknown method {name!r}: wanted one of {', '.join(METHODS)}")
    return METHODS[name]
