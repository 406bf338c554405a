"""The algorithms, one a file, behind one signature: method(weight, statistics, encoding, **options) -> QArray.

    weight      float[*B, K, N] (the grouped axis may be any); traced
    statistics  what jq4.observe collected for this weight, or None
    encoding    jq4.rounding.Encoding: format, axis, groups, symmetry, dtypes; static
    options     the method's own, static

A method is a row of the table below; it says which options it takes and whether it needs statistics.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

from jq4.errors import JQ4Error
from jq4.methods import awq, gptq, gptq_options, hqq, rtn
from jq4.qarray import QArray


@dataclasses.dataclass(frozen=True)
class Method:
    """One algorithm.

    Attributes:
      quantize: the function.
      needs_statistics: whether it takes a weight's statistics, with a Hessian.
      options: the names of its options.
      words: those of them that are words, each with the words it may be.
      asymmetric_zero_point: what a rule means by `symmetric: false` that does not say.
      observer: what a rule means that names no observer; None for "absmax" or, asymmetric, "minmax".
      diagnosed: `quantize`, returning (QArray, a NamedTuple of findings about each slice), and calling its further
        argument `release` with the name of each sum of the statistics that was used for the last time; None where there
        are no findings.
    """

    quantize: Callable[..., QArray]
    needs_statistics: bool = False
    options: tuple[str, ...] = ()
    words: tuple[tuple[str, tuple[str, ...]], ...] = ()
    asymmetric_zero_point: str = "integer"
    observer: str | None = None
    diagnosed: Callable[..., Any] | None = None


METHODS: dict[str, Method] = {
    "rtn": Method(rtn.quantize),
    "hqq": Method(
        hqq.quantize,
        options=("lp_norm", "beta", "kappa", "iters", "starts", "max_shrink"),
        asymmetric_zero_point="float",
    ),
    "awq": Method(
        awq.quantize,
        needs_statistics=True,
        options=("multiplier", "ratios", "by_weights", "finalists", "columns"),
        observer="mse",
    ),
    "gptq": Method(
        gptq.quantize,
        needs_statistics=True,
        options=tuple(field.name for field in dataclasses.fields(gptq_options.Options)),
        words=(("actorder", gptq_options.ACTORDERS), ("fallback", tuple(gptq_options.FALLBACKS))),
        observer="mse",
        diagnosed=gptq.diagnosed,
    ),
}


def get_method(name: str) -> Method:
    """The method called `name`; an error that lists the known ones if there is none."""
    if not isinstance(name, str) or name not in METHODS:
        raise JQ4Error(f"unknown method {name!r}: wanted one of {', '.join(METHODS)}")
    return METHODS[name]
