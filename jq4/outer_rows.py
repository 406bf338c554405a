"""A sum of outer products that is not summed yet: its rows, which are added to a total where that lies.

A batch's sum of x x^T takes 4*K*K bytes beside the total that it is added to; its rows take 4*M*K. So where they take
less the rows are kept, and the total takes up a strip of their product at a time.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

_STRIP = 512


@functools.partial(jax.tree_util.register_dataclass, data_fields=("x", "y"), meta_fields=())
@dataclasses.dataclass(frozen=True)
class OuterRows:
    """sum_m x_m y_m^T, f32[*B, K, N], as its rows x f32[*B, M, K] and y f32[*B, M, N]; a y of None is x, and N is K."""

    x: jax.Array
    y: jax.Array | None = None

    @property
    def are_less(self) -> bool:
        """Whether the rows take less memory than their sum."""
        rows, features = self.x.shape[-2:]
        if self.y is None:
            return rows < features
        outputs = self.y.shape[-1]
        return rows * (features + outputs) < features * outputs

    def total(self) -> jax.Array:
        """The sum, f32[*B, K, N], by one product."""
        return self._product(self.x)

    def added_to(self, total: jax.Array) -> jax.Array:
        """f32[*B, K, N], a total and the sum; in the total's own memory under `jit` that takes it over."""
        features = total.shape[-2]
        whole, rest = divmod(features, _STRIP)
        if whole:
            total = jax.lax.fori_loop(0, whole, lambda i, held: self._add_strip(held, i * _STRIP, _STRIP), total)
        return self._add_strip(total, whole * _STRIP, rest) if rest else total

    def beside(self, other: "OuterRows") -> "OuterRows":
        """Both sums together."""
        return jax.tree.map(lambda mine, theirs: jnp.concatenate([mine, theirs], axis=-2), self, other)

    def _product(self, x: jax.Array) -> jax.Array:
        """x^T y, f32[*B, k, N], of some columns of x."""
        return jnp.einsum("...mk,...ml->...kl", x, self.x if self.y is None else self.y, precision="highest")

    def _add_strip(self, total: jax.Array, start: jax.Array | int, width: int) -> jax.Array:
        mine = jax.lax.dynamic_slice_in_dim(self.x, start, width, self.x.ndim - 1)
        product = jax.lax.optimization_barrier(self._product(mine))  # one rounding, wherever it is added
        held = jax.lax.dynamic_slice_in_dim(total, start, width, total.ndim - 2)
        return jax.lax.dynamic_update_slice_in_dim(total, held + product, start, total.ndim - 2)
