"""The arguments of a call, flattened: which leaves are traced, how the first argument's are called, and the trace."""

from collections.abc import Callable, Sequence
from typing import Any

import jax

from jq4 import jax_compat
from jq4.outputs import Outputs, is_array
from jq4.paths import leaf_path
from jq4.qarray import is_qarray


class Arguments:
    """The leaves of (args, kwargs).

    Attributes:
      leaves: all of them.
      traced: the places of those that are arrays, or QArrays where these are leaves.
      paths: place -> path within the first argument, of its leaves.
    """

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any], is_leaf: Any = None) -> None:
        keyed, self._structure = jax.tree_util.tree_flatten_with_path((args, kwargs), is_leaf=is_leaf)
        self.leaves = [leaf for _, leaf in keyed]
        self.traced = [place for place, leaf in enumerate(self.leaves) if is_array(leaf) or is_qarray(leaf)]
        self.paths = {place: leaf_path(keys[2:]) for place, (keys, _) in enumerate(keyed) if _is_of_first(keys)}

    @property
    def arrays(self) -> list[Any]:
        return [self.leaves[place] for place in self.traced]

    def trace(self, function: Callable[..., Any], arrays: Sequence[Any]) -> tuple[Any, Outputs]:
        """(the jaxpr of `function` of arrays, or shapes, in the place of the traced leaves; what it returns)."""
        outputs = Outputs()

        def call(*arrays: Any) -> list[Any]:
            merged = list(self.leaves)
            for place, array in zip(self.traced, arrays, strict=True):
                merged[place] = array
            args, kwargs = jax.tree.unflatten(self._structure, merged)
            return outputs.arrays_of(function(*args, **kwargs))

        jaxpr, _ = jax_compat.trace(call, *arrays)
        return jaxpr, outputs


def _is_of_first(keys: Any) -> bool:
    return keys[0].idx == 0 and keys[1].idx == 0
