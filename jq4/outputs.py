"""What a traced function returns that is no array: kept aside during the trace, and put back afterwards."""

from typing import Any

import jax
import numpy as np


def is_array(leaf: Any) -> bool:
    """Whether a leaf is traced: an array, or the shape of one."""
    return isinstance(leaf, (jax.Array, np.ndarray, jax.ShapeDtypeStruct))


class Outputs:
    """The tree of a function's outputs, and those of its leaves that are no arrays, kept aside during the trace."""

    def arrays_of(self, tree: Any) -> list[Any]:
        self.leaves, self.structure = jax.tree.flatten(tree)
        self.dynamic = [place for place, leaf in enumerate(self.leaves) if is_array(leaf)]
        arrays = [self.leaves[place] for place in self.dynamic]
        self.leaves = [None if place in self.dynamic else leaf for place, leaf in enumerate(self.leaves)]
        return arrays

    def rebuild(self, arrays: list[Any]) -> Any:
        leaves = list(self.leaves)
        for place, array in zip(self.dynamic, arrays, strict=True):
            leaves[place] = array
        return jax.tree.unflatten(self.structure, leaves)
