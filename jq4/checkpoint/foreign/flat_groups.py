"""Groups that run through a row-major weight [*B, N, K] as if it were one row: a group may cross the end of a row.

Where the size divides K they are groups of rows. Else rows are cut finer, into groups of gcd(K, size): each of these
lies within one flat group, whose scale is repeated. Exact, and more scales are held than the file has.
"""

import math

import numpy as np


def row_group_size(width: int, size: int) -> int:
    """The longest group along rows of `width` that lies within one flat group of `size`."""
    return math.gcd(width, size)


def by_rows(values: np.ndarray, shape: tuple[int, ...], size: int) -> np.ndarray:
    """One value a flat group [ceil(B*N*K / size)] as one a group of a row [*B, N, K / row_group_size]."""
    fine = row_group_size(shape[-1], size)
    flat = values.reshape(-1)
    if fine != size:
        flat = flat[np.arange(math.prod(shape) // fine) * fine // size]
    return flat.reshape(*shape[:-1], shape[-1] // fine)
