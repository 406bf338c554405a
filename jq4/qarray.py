"""QArray: a packed weight that is an ordinary pytree leaf.

    w[..., k, ...] = level(code[..., k, ...]) * scale[..., k // group_size, ...] (+ offset[..., k // group_size, ...])

where `level` is the format's (code - 2**(bits-1) for integers, a table for nf4 and fp4), or code - zero_point where
there are integer zero points. The grouped axis `axis` is the one that the weight is contracted along.

Invariants (written with the grouped axis K second to last; it may be any, and it is counted from the end, so that
slices along leading axes stay valid under `scan` and `vmap`):

    codes       u8[*B, bytes(K), N]     pallas_kernels.packing along `axis`, `padding` codes fill the last unit
    scale       float[*B, G, N]         G = ceil(K / group_size); any axis but the grouped one may be 1 (broadcast)
    zero_point  u8[*B, G, N] or None    integer formats only; a float where a foreign file has them between codes (HQQ)
    offset      float[*B, G, N] or None  G may be 1 as well, for one offset of all groups (packed scales)
    permutation i32[*B, K] or None      packed row k holds the weight's row permutation[k] (act-order files)
    input_scale float[*B, K, 1] or None multiplies row k of the weight; a product multiplies its inputs instead (AWQ)
    activation_scale f32[*B, 1, 1] or None  the step of the inputs' own codes where it is fixed (jq4.activations)

`shape` is derived from `codes`, so a slice of a QArray (a layer under `scan`, a shard of whole groups under
`shard_map`) is a QArray. Other layouts than "neutral" hold the same codes re-packed for one backend's kernel:
see jq4.layouts.prepare.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jq4.errors import JQ4Error
from jq4.formats import Format, get_format
from jq4.input_rotation import rotated
from jq4.jax_compat import is_tracing
from pallas_kernels import packing

NEUTRAL = "neutral"

PARTS = ("codes", "scale", "zero_point", "offset", "permutation", "input_scale", "activation_scale")
_STATIC = ("format", "group_size", "axis", "padding", "dtype", "layout", "activations", "input_rotation")


@functools.partial(jax.tree_util.register_dataclass, data_fields=PARTS, meta_fields=_STATIC)
@dataclasses.dataclass(frozen=True)
class QArray:
    """A weight held as packed codes and scales; a pytree, see the module's text for shapes and dtypes.

    Attributes:
      format: name of the number format, a key of jq4.formats.FORMATS.
      group_size: codes along `axis` that share a scale; at least K means one group.
      axis: the grouped (contraction) axis, negative.
      padding: codes that only fill the last packing unit.
      dtype: name of the dtype that dequantizing gives.
      layout: "neutral" (what is saved and compared) or a backend's own.
      activations: what a product rounds its inputs to, a name of jq4.activations; "" leaves them as they are.
      input_rotation: b, where a product first rotates its inputs, and codes hold the weight rotated, in blocks of b
        along `axis` (jq4.input_rotation); 0 where not.
    """

    codes: Any
    scale: Any
    zero_point: Any = None
    offset: Any = None
    permutation: Any = None
    input_scale: Any = None
    activation_scale: Any = None
    format: str = "int4"
    group_size: int = 128
    axis: int = -2
    padding: int = 0
    dtype: str = "float32"
    layout: str = NEUTRAL
    activations: str = ""
    input_rotation: int = 0

    @property
    def number_format(self) -> Format:
        return get_format(self.format)

    @property
    def bits(self) -> int:
        return self.number_format.bits

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the dense weight."""
        if self.layout != NEUTRAL:
            from jq4.layouts import logical_shape

            return logical_shape(self)
        shape = list(self.codes.shape)
        shape[self.axis] = shape[self.axis] * 8 // self.bits - self.padding
        return tuple(shape)

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> int:
        return int(np.prod(self.shape))

    @property
    def num_groups(self) -> int:
        return -(-self.shape[self.axis] // self.group_size)

    @property
    def nbytes(self) -> int:
        """True bytes held on the device: codes, scales, zero points, offsets, permutation, scales of inputs."""
        return sum(leaf_nbytes(leaf) for leaf in jax.tree.leaves(self))

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.nbytes / self.size

    def dequantize(self, dtype: Any = None) -> jax.Array:
        """The dense weight, computed in float32 and cast to `dtype` (default: the QArray's own)."""
        return dequantize_array(self, dtype)

    def __repr__(self) -> str:
        groups = f"group_size={self.group_size}, axis={self.axis}"
        try:
            shape = list(self.shape)
        except (AttributeError, TypeError, IndexError):  # a tree_map made leaves that are not arrays
            shape = "?"
        inputs = f", activations={self.activations}" if self.activations else ""
        return f"QArray({self.format}{shape}, {groups}, dtype={self.dtype}, layout={self.layout}{inputs})"


def is_qarray(value: Any) -> bool:
    return isinstance(value, QArray)


def holds_qarrays(tree: Any) -> bool:
    """Whether some leaf of a tree is a QArray."""
    return any(map(is_qarray, jax.tree.leaves(tree, is_leaf=is_qarray)))


def leaf_nbytes(leaf: Any) -> int:
    """Bytes of one array on the device; int4 and uint4 take half a byte an element."""
    bits = {"int4": 4, "uint4": 4, "int2": 2, "uint2": 2}.get(jnp.dtype(leaf.dtype).name)
    size = int(np.prod(leaf.shape))
    return -(-size * bits // 8) if bits else size * jnp.dtype(leaf.dtype).itemsize


def codes_of(q: QArray) -> jax.Array:
    """The unpacked codes u8[*B, K, N] of a neutral QArray, in packed order (before any permutation)."""
    unpack = _unpacked if _stands_alone(q) else packing.unpack
    return unpack(q.codes, q.bits, q.axis, q.shape[q.axis])


_unpacked = jax.jit(packing.unpack, static_argnums=(1, 2, 3))


def _stands_alone(q: QArray) -> bool:
    """Whether what is computed of a QArray now is a program of its own: not a part of a trace, nor numpy's work."""
    return isinstance(q.codes, jax.Array) and not is_tracing()


def levels_of(codes: jax.Array, format: Format, dtype: Any = jnp.float32) -> jax.Array:
    """Codes u8[...] to levels (code - center, or the codebook's entry) of `dtype`."""
    if format.levels is None:
        return codes.astype(jnp.int8 if format.bits < 8 else jnp.int16).astype(dtype) - jnp.asarray(
            format.center, dtype
        )
    return jnp.take(jnp.asarray(format.levels, dtype), codes.astype(jnp.int32), axis=0)


def dequantize_array(q: QArray, dtype: Any = None) -> jax.Array:
    """The dense weight of a QArray in any layout, computed in float32, cast to `dtype` or q.dtype."""
    if q.layout != NEUTRAL:
        from jq4.layouts import to_neutral

        q = to_neutral(q)
    dtype = jnp.dtype(dtype or q.dtype)
    return (_at_once if _stands_alone(q) and _rounds_alike(q) else _dequantized)(q, dtype)


def _rounds_alike(q: QArray) -> bool:
    """Whether its dequantization as one compiled program has the bits that it has a step at a time.

    It has where a level meets its scale and nothing after: it might fuse that product with a sum, or leave out the
    rounding of a scale that was itself dequantized.
    """
    more = (q.offset, q.permutation, q.input_scale)
    return all(part is None for part in more) and not q.input_rotation and not is_qarray(q.scale)


def _dequantized(q: QArray, dtype: Any) -> jax.Array:
    axis, length = q.axis, q.shape[q.axis]
    spread = functools.partial(spread_groups, group_size=q.group_size, axis=axis, length=length)
    codes = codes_of(q)
    if q.zero_point is None:
        levels = levels_of(codes, q.number_format)
    else:
        levels = codes.astype(jnp.float32) - spread(q.zero_point).astype(jnp.float32)
    weight = levels * spread(dense(q.scale).astype(jnp.float32))
    if q.offset is not None:
        weight = weight + spread(dense(q.offset).astype(jnp.float32))
    if q.permutation is not None:
        weight = _unpermute(weight, q.permutation, axis)
    if q.input_rotation:
        weight = rotated(weight, q.input_rotation, axis)
    if q.input_scale is not None:
        weight = weight * q.input_scale.astype(jnp.float32)
    return weight.astype(dtype)


_at_once = jax.jit(_dequantized, static_argnums=1)  # one program, and no dense array but the result


def dense(value: Any) -> Any:
    """The value itself, or what it dequantizes to."""
    return dequantize_array(value) if is_qarray(value) else value


def spread_groups(values: jax.Array, group_size: int, axis: int, length: int) -> jax.Array:
    """One value a group [..., G, ...] to one a row [..., K, ...] along `axis`; other axes keep their broadcasting 1."""
    groups = values.shape[axis]
    if groups == 1:
        return values
    axis = axis % values.ndim
    wide = jnp.broadcast_to(
        jnp.expand_dims(values, axis + 1), (*values.shape[: axis + 1], group_size, *values.shape[axis + 1 :])
    )
    wide = wide.reshape(*values.shape[:axis], groups * group_size, *values.shape[axis + 1 :])
    return jax.lax.slice_in_dim(wide, 0, length, axis=axis)


def _unpermute(weight: jax.Array, permutation: jax.Array, axis: int) -> jax.Array:
    inverse = jnp.argsort(permutation, axis=-1)  # i32[*B, K]
    moved = jnp.moveaxis(weight, axis, -1)
    batch = permutation.ndim - 1
    index = inverse.reshape(*inverse.shape[:-1], *(1,) * (moved.ndim - 1 - batch), inverse.shape[-1])
    return jnp.moveaxis(jnp.take_along_axis(moved, index, axis=-1), -1, axis)


def validate(q: QArray, path: str = "QArray") -> QArray:
    """Checks the invariants by shapes and dtypes alone; returns `q`, or raises JQ4Error naming `path`."""
    if q.group_size < 1:
        raise JQ4Error(f"{path}: group_size is {q.group_size}, wanted 1 or more")
    if q.axis >= 0 or -q.axis > q.codes.ndim:
        raise JQ4Error(f"{path}: axis {q.axis} is not a negative axis of a {q.codes.ndim}-d weight")
    if jnp.dtype(q.codes.dtype) != jnp.uint8:
        raise JQ4Error(f"{path}: codes are {q.codes.dtype}, wanted packed uint8")
    for name in ("scale", "zero_point", "offset"):
        part = getattr(q, name)
        if part is None:
            continue
        wanted = list(q.shape)
        wanted[q.axis] = q.num_groups
        fits = len(part.shape) == len(wanted) and all(
            have in ((want,) if i == q.axis % q.ndim and name != "offset" else (want, 1))
            for i, (have, want) in enumerate(zip(part.shape, wanted, strict=True))
        )
        if not fits:
            raise JQ4Error(
                f"{path}: {name} has shape {tuple(part.shape)}, wanted {tuple(wanted)} (or 1 on an axis other than the "
                f"grouped one) for {q.format} of shape {q.shape} in groups of {q.group_size} along axis {q.axis}"
            )
        if is_qarray(part):
            validate(part, f"{path}.{name}")
    _validate_inputs(q, path)
    return q


def _validate_inputs(q: QArray, path: str) -> None:
    """input_scale has the grouped axis whole, activation_scale has 1 there; any other axis is whole or 1."""
    block = q.input_rotation
    if block and (block < 2 or block & (block - 1) or q.shape[q.axis] % block):
        raise JQ4Error(
            f"{path}: input_rotation is {block}, wanted 0 or a power of two that divides {q.shape[q.axis]}, the inputs"
        )
    if q.activations.endswith("-tensor") != (q.activation_scale is not None):
        found = "none" if q.activation_scale is None else f"one of shape {tuple(q.activation_scale.shape)}"
        raise JQ4Error(
            f"{path}: activations {q.activations!r} with activation_scale {found}: a fixed step is what 'tensor' has"
        )
    for name, whole in (("input_scale", True), ("activation_scale", False)):
        part = getattr(q, name)
        if part is None:
            continue
        wanted = list(q.shape)
        wanted[q.axis] = q.shape[q.axis] if whole else 1
        grouped = q.axis % q.ndim
        if len(part.shape) != q.ndim or not all(
            have == want or (have == 1 and axis != grouped)
            for axis, (have, want) in enumerate(zip(part.shape, wanted, strict=True))
        ):
            raise JQ4Error(
                f"{path}: {name} has shape {tuple(part.shape)}, wanted {tuple(wanted)} or 1 on an axis other than the "
                f"grouped one, {q.axis}, of {q.shape}"
            )
