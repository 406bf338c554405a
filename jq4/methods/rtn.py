"""Round to nearest: each weight takes the code nearest to it, given the range that an observer finds for its group.

No statistics, no search over codes: the floor that every other method is measured against. All of it is in
jq4.rounding; this file gives it the signature of a method.
"""

from typing import Any

import jax

from jq4.qarray import QArray
from jq4.rounding import Encoding, encode_weight, find_parameters


def quantize(weight: jax.Array, statistics: Any, encoding: Encoding) -> QArray:
    """Rounds a weight float[*B, K, N]; `statistics` are not looked at."""
    del statistics
    return encode_weight(weight, encoding, find_parameters)
