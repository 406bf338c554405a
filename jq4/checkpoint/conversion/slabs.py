"""A weight that is too large to be held, taken a slab of rows at a time: a vocabulary, a stack of experts.

Both sides must lie by rows. The source's reader reads some indices of axis 0 alone (LazyWeight.read_rows), and what the
writer makes of some rows is, tensor by tensor, the rows of what it makes of all (Planned.of_rows): encoding slab
after slab gives the same bytes in the same order. Where a layout has the rows of a weight interleaved (AWQ's words,
GPTQ's where they are written, bitsandbytes' statistics) the weight is held as a whole, as are small ones.

Slabs of a matrix are of whole multiples of 32 rows, so that zero points that are packed along N begin with a word.
"""

from collections.abc import Iterator
from typing import Any

from jq4.checkpoint.foreign.writing import Planned

SLAB_BYTES = 64 * 2**20  # of what is read and what is made of it
_ROWS = 32

Part = tuple[slice, Any]  # indices of axis 0, and the weight's rows there


def slabs(shape: tuple[int, ...], nbytes: int) -> list[slice]:
    """The indices of axis 0 that are taken together, of a weight of `nbytes`; all of them where that is not much."""
    length = shape[0] if shape else 1
    step = length * SLAB_BYTES // max(1, nbytes)
    if len(shape) == 2:
        step = step // _ROWS * _ROWS or _ROWS
    step = max(1, step)
    return [slice(start, min(start + step, length)) for start in range(0, length, step)] or [slice(0, length)]


def parts(planned: Planned, made: int) -> Iterator[Part]:
    """A weight that becomes `made` bytes, slab by slab, each read when it is asked for."""
    cut, weight = _cut(planned, made), planned.weight
    if len(cut) == 1 or weight.read_rows is None:
        yield slice(0, cut[-1].stop), weight.read()
        return
    for rows in cut:
        yield rows, weight.read_rows(rows)


def lies_by_rows(planned: Planned) -> bool:
    """Whether it can be taken in slabs: both the source and the target keep rows apart."""
    return planned.weight.read_rows is not None and bool(planned.of_rows)


def share(planned: Planned, made: int) -> float:
    """Of a weight's bytes, those that the largest slab has."""
    cut = _cut(planned, made)
    return (cut[0].stop - cut[0].start) / max(1, cut[-1].stop)


def _cut(planned: Planned, made: int) -> list[slice]:
    weight = planned.weight
    return slabs(weight.shape, weight.nbytes + made if lies_by_rows(planned) else 0)
