"""The record of what training did not round though the recipe says so: which leaf, where and why.

    unrounded   the recipe means the leaf, and it has no quantizer: the weight is trained dense
    unused      the function does not look at the leaf, at least not in this trace
    inputs      the recipe says that inputs of its products are rounded, and this use of the leaf rounds none
    dense       the weight is rounded, and this use of it is no product that stays packed: `jq4.quantized(f)` will
                dequantize the leaf there, and give the same values

The first three warn, and under `strict` raise: what is trained is not what would be served, or is not trained at all.
"""

from typing import Any

import numpy as np

from jq4.errors import JQ4Error
from jq4.record import DENSE, Record

UNROUNDED, UNUSED, INPUTS = "unrounded", "unused", "inputs"


class UnroundedWarning(UserWarning):
    """Something that the recipe says shall be rounded was not."""


class UnroundedError(JQ4Error):
    """`fake_quantized(f, recipe, strict=True)` met what it could not round."""


class RoundingRecord(Record):
    """Entries of one trace. True if something was not rounded that should be."""

    nothing = "everything that the recipe means was rounded"

    def note_leaf(self, kind: str, path: str, primitive: str, reason: str, value: Any) -> bool:
        nbytes = int(np.prod(value.shape)) * np.dtype(value.dtype).itemsize
        return self.note(kind, path, primitive, reason, nbytes)

    def __bool__(self) -> bool:
        return any(entry.kind != DENSE for entry in self.entries)
