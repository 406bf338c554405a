"""Low-rank adapters (Hu et al. 2021, "LoRA") as a pytree beside the params: what a weight learns, and nothing else.

    W'[*B, K, N] = W + scaling * A B      a f32[*B, K, r]     b f32[*B, r, N]     scaling = alpha / r

`scaling` is alpha / sqrt(r) with `rslora` (Kalajdzievski 2023), under which large ranks learn as fast as small ones.

K and N may be several axes each, and *B are those that stack matrices (layers, experts). Which of a leaf's axes are
which is told by negative numbers, so that a DenseGeneral's [L, H, D, O], contracted over H and D, has a[L, H, D, r] and
b[L, r, O], one matrix of rank r a layer.

In the tree stand `a` and `b` alone: `optax.adamw(1e-4).init(adapters)` holds two numbers for each of theirs, and none
for the weights.
"""

import dataclasses
import functools
from typing import Any

import jax

from jq4.errors import JQ4Error
from jq4.train.adapters.labelled import product

RANK = 0  # the rank's own axis, among a leaf's negative ones
ROWS = "rows"  # the axis of keys that lists the rows which they are for


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("a", "b", "dropout_keys"),
    meta_fields=("stacked", "inputs", "outputs", "alpha", "rslora", "dropout"),
)
@dataclasses.dataclass(frozen=True)
class Adapter:
    """What one leaf learns.

    Attributes:
      a: f32[*B, *K, r], axes of the leaf `stacked`, then `inputs`, then the rank.
      b: f32[*B, r, *N], where N are its `outputs`.
      dropout_keys: key[*B] or key[*B, R], by which inputs of A are dropped in this call; None where they are not.
      stacked, inputs, outputs: the leaf's axes, negative, ascending.
      alpha: scaling is alpha / r, or alpha / sqrt(r) with `rslora`.
      dropout: the share of the inputs that is dropped where there are keys, the rest being scaled up.
    """

    a: Any
    b: Any
    dropout_keys: Any = None
    stacked: tuple[int, ...] = ()
    inputs: tuple[int, ...] = (-2,)
    outputs: tuple[int, ...] = (-1,)
    alpha: float = 1.0
    rslora: bool = False
    dropout: float = 0.0

    @property
    def rank(self) -> int:
        return self.a.shape[-1]

    @property
    def scaling(self) -> float:
        return self.alpha / (self.rank**0.5 if self.rslora else self.rank)

    @property
    def a_axes(self) -> tuple[int, ...]:
        return (*self.stacked, *self.inputs, RANK)

    @property
    def b_axes(self) -> tuple[int, ...]:
        return (*self.stacked, RANK, *self.outputs)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the leaf."""
        sizes = dict(zip((*self.a_axes, *self.b_axes), (*self.a.shape, *self.b.shape), strict=True))
        return tuple(sizes[axis] for axis in range(1 - len(sizes), 0))

    def layer(self, i: int) -> "Adapter":
        """That of slice `i` along the first of the stacked axes."""
        a, b = self.a[i], self.b[i]
        keys = None if self.dropout_keys is None else self.dropout_keys[i]
        return dataclasses.replace(self, a=a, b=b, dropout_keys=keys, stacked=self.stacked[1:])

    def delta(self) -> jax.Array:
        """scaling * A B with the axes of the leaf, f32: as large as the dense leaf."""
        axes = range(-len(self.shape), 0)
        return product(self.a, self.a_axes, self.b, self.b_axes, axes, "highest") * self.scaling

    def __repr__(self) -> str:
        try:
            return f"Adapter({list(self.shape)}, rank={self.rank}, scaling={self.scaling:g})"
        except (
            AttributeError,
            TypeError,
            IndexError,
            KeyError,
            ValueError,
        ):  # a tree_map made leaves that are no arrays
            return "Adapter(?)"


@functools.partial(jax.tree_util.register_dataclass, data_fields=("by_path",), meta_fields=())
@dataclasses.dataclass(frozen=True)
class Adapters:
    """The adapters of a tree's leaves, by path: what is trained, by any optimizer."""

    by_path: dict[str, Adapter]

    @property
    def size(self) -> int:
        """How many numbers are trained."""
        return sum(leaf.size for each in self.by_path.values() for leaf in (each.a, each.b))

    def with_dropout(self, rate: float, key: Any) -> "Adapters":
        """The same, whose products drop a share `rate` of their inputs (and A's alone) as `key` says; for one step.

        Products with one leaf share what they drop, unless they are slices of a stack. With key[R], a key for each of
        R rows, what is dropped of a row depends on its key alone, and not on the rows beside it: the first axis of
        inputs that no weight has (a batch's) is then R long. Rows sorted by expert are dropped by the first key alone.
        """
        if not 0 <= rate < 1:
            raise JQ4Error(f"dropout is {rate}, wanted a share of at least 0 and below 1")
        keys = self._keys_from(key) if not key.ndim else jax.vmap(self._keys_from, out_axes=-1)(key)
        return Adapters({
            path: dataclasses.replace(each, dropout_keys=keys[path], dropout=float(rate))
            for path, each in self.by_path.items()
        })  # fmt: skip

    def _keys_from(self, key: Any) -> dict[str, Any]:
        """Path -> key[*B] of each adapter."""
        found = {}
        for each, (path, adapter) in zip(jax.random.split(key, len(self.by_path)), self.by_path.items(), strict=True):
            stack = adapter.a.shape[: len(adapter.stacked)]
            found[path] = jax.random.split(each, stack) if stack else each
        return found

    def __repr__(self) -> str:
        return f"Adapters({', '.join(self.by_path)})"


def split_pair(tree: Any) -> tuple[Any, Adapters | None]:
    """(params, adapters) of such a pair; (the tree, None) of a tree of params alone."""
    if isinstance(tree, tuple) and len(tree) == 2 and isinstance(tree[1], Adapters):
        return tree
    return tree, None
