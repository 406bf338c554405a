"""What a backend's kernel wants to find in memory: `prepare` re-packs once, losslessly; `to_neutral` undoes it.

    layout    codes                   scale, zero_point, offset   for
    neutral   u8 bytes along `axis`   the weight's own axes       what is saved and compared; also the CPU's own
    tpu       i32[*B, ceil(K/8), N]   [*B, G, 1, N]               rows of scales that a kernel can address one by one
              int8[*B, K, N]          the same                    of 8-bit integers, code - 128
    gpu       int4[*B, N, K]          [*B, N, G]                  K contiguous, as the tensor cores read it
    hopper    i32[*B, N/64, 2*b*Kp]   [*B, G, N]                  how wgmma and mma take their left operand

Words hold eight codes, row 8r + j in bits 4j to 4j + 3 of word r, which is how a TPU holds int4: from a stack of layers
its compiler reads 32-bit words in place, and copies the layer where they are int4. What no TPU kernel takes (groups of
other than multiples of 32 rows) is int4[*B, K, N] there, for XLA. int4 elements, in words or not, hold code - 8, also
where codes are indices of a codebook (nf4, fp4), which a TPU alone has a layout for, as for 8-bit integers. Zero
points stay u8, counted in unsigned codes. `axis` of a prepared QArray tells which of its two last logical axes is K: -2
for [..., K, N], -1 for [..., N, K]. The order in memory is the layout's, so that transposing a prepared weight moves
nothing.

The hopper layout (pallas_kernels/int4_matmul/gpu_fragments.py; b bits, 4 or 8; Kp is K filled up to a multiple of 128)
is made only where `prepare` is told so, as its kernels have not run on a GPU; a weight that it does not take (64 must
divide N, one scale for each column and group) gets the gpu layout.

A CPU reads neutral bytes as fast as any other order (benchmarks/cpu_matmul.py: even and odd codes are multiplied by
the even and odd columns of x), so "cpu" leaves them alone. What a backend has no layout for stays neutral: other bits,
other codebooks, zero points between codes, activation-ordered weights, weights grouped along neither of their last two
axes, and embedding tables (leaves called "embedding"), whose rows are gathered.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from jq4.errors import JQ4Error
from jq4.qarray import NEUTRAL, QArray, is_qarray
from jq4.qarray_ops import plain_scales
from pallas_kernels import packing
from pallas_kernels.int4_matmul.gpu_chips import KNOWN, gpu_named
from pallas_kernels.int4_matmul.gpu_fragments import STRIP, of_fragments, padded_length, to_fragments
from pallas_kernels.int4_matmul.mosaic_gpu import layout_refusal
from pallas_kernels.int4_matmul.spec import GPU, HOPPER, TPU, PackedSpec
from pallas_kernels.int4_matmul.tiles import Packed
from pallas_kernels.int4_matmul.tpu import refusal
from pallas_kernels.int4_matmul.words import int4_to_words, words_to_int4
from pallas_kernels.int4_matmul.xla import as_int4

_GPUS = (
    "H200", "H100", "H20", "H800", "GH200", "A100", "A800", "A30", "A10", "L40S", "L40", "L4", "B200", "B300", "GB200",
)  # fmt: skip
DEVICE_LAYOUTS: dict[str, str] = {
    "cpu": NEUTRAL,
    **dict.fromkeys(
        ("TPU v4", "TPU v4 lite", "TPU v5 lite", "TPU v5e", "TPU v5", "TPU v5p", "TPU v6 lite", "TPU v6e", "TPU7x"), TPU
    ),
    **{f"NVIDIA {name}": GPU for name in _GPUS},
}


def layout_of_device(device_kind: str) -> str:
    """The layout for a device kind as JAX spells it; a GPU's may carry a suffix ("NVIDIA H100 80GB HBM3")."""
    if device_kind in DEVICE_LAYOUTS:
        return DEVICE_LAYOUTS[device_kind]
    family = device_kind.replace("-", " ").split(" ")[:2]
    if family[0] == "NVIDIA" and (layout := DEVICE_LAYOUTS.get(" ".join(family))):
        return layout
    raise JQ4Error(
        f"no layout is known for device kind {device_kind!r}: wanted one of {', '.join(sorted(DEVICE_LAYOUTS))} "
        "(jax.devices()[0].device_kind says what this machine has; the neutral layout runs anywhere without prepare)"
    )


def prepare(tree: Any, device_kind: str, *, layout: str | None = None) -> Any:
    """The tree with every QArray in the layout that the kernels of `device_kind` read; nothing is rounded.

    Args:
      tree: any pytree; leaves that are not QArrays are returned as they are.
      device_kind: "cpu", "TPU v6 lite", "NVIDIA H200", ...: what `jax.devices()[0].device_kind` says.
      layout: "hopper" for the Mosaic GPU kernels of Hopper, Ampere and Ada GPUs; None is the device's own.

    Raises:
      JQ4Error: an unknown device kind, or a layout that is not for it; the message lists the known ones.
    """
    own = layout_of_device(device_kind)
    if layout not in (None, own) and (layout != HOPPER or gpu_named(device_kind, KNOWN) is None):
        raise JQ4Error(
            f"layout {layout!r} is not for {device_kind!r}: wanted None, {own!r}, or 'hopper' on a Hopper, Ampere or "
            f"Ada GPU ({', '.join(gpu.kind for gpu in KNOWN)})"
        )
    layout = layout or own

    def one(path: Any, leaf: Any) -> Any:
        if not is_qarray(leaf) or leaf.layout == layout:
            return leaf
        neutral = to_neutral(leaf)
        if layout == HOPPER and _has_layout(neutral, path, HOPPER) and _has_fragments(neutral):
            return _in_fragments(neutral)
        return _relaid(neutral, own) if own != NEUTRAL and _has_layout(neutral, path, own) else neutral

    return jax.tree_util.tree_map_with_path(one, tree, is_leaf=is_qarray)


def to_neutral(q: QArray) -> QArray:
    """The same weight in the neutral layout: codes, scales and zero points equal bit for bit."""
    return q if q.layout == NEUTRAL else _neutral(q)


def logical_shape(q: QArray) -> tuple[int, ...]:
    """The shape of the dense weight of a prepared QArray."""
    *batch, rows, columns = q.codes.shape
    if q.layout == HOPPER:
        rows, columns = STRIP * rows, columns // (2 * q.bits) - q.padding
    if _in_words(q):
        rows = 8 * rows - q.padding
    stored_axis = -2 if q.layout == TPU else -1
    return (*batch, rows, columns) if q.axis == stored_axis else (*batch, columns, rows)


_FORMATS = {TPU: ("int4", "int8", "nf4", "fp4"), HOPPER: ("int4", "int8")}  # others: int4


def _has_layout(q: QArray, path: Any, layout: str) -> bool:
    if q.zero_point is not None and jnp.issubdtype(q.zero_point.dtype, jnp.floating):
        return False
    if q.format not in _FORMATS.get(layout, ("int4",)) or (not q.number_format.is_integer and not _fits_words(q)):
        return False
    named_embedding = any(str(getattr(key, "key", getattr(key, "name", ""))) == "embedding" for key in path)
    return q.axis in (-1, -2) and q.ndim >= 2 and q.permutation is None and not named_embedding


@functools.partial(jax.jit, static_argnums=1)
def _relaid(q: QArray, layout: str) -> QArray:
    q = plain_scales(q)
    length, orientation = q.shape[q.axis], "kn" if q.axis == -2 else "nk"
    spec = PackedSpec(length, q.bits, q.number_format.levels, q.group_size, orientation)
    packed, _ = as_int4(Packed(q.codes, q.scale, q.zero_point, q.offset), spec, layout)
    padding = 0
    if layout == TPU and q.bits == 4 and _fits_words(q):
        packed, padding = packed._replace(codes=int4_to_words(packed.codes)), -length % 8
    return dataclasses.replace(q, **packed._asdict(), padding=padding, layout=layout)


def _fits_words(q: QArray) -> bool:
    """Whether the TPU kernel takes the groups."""
    return refusal(PackedSpec(q.shape[q.axis], group_size=q.group_size, layout=TPU)) is None


def _has_fragments(q: QArray) -> bool:
    """Whether the kernel of the hopper layout takes a weight."""
    columns = q.shape[-3 - q.axis]
    return (
        columns % STRIP == 0
        and all(part is None or part.shape[-3 - q.axis] == columns for part in (q.scale, q.zero_point, q.offset))
        and layout_refusal(PackedSpec(q.shape[q.axis], q.bits, group_size=q.group_size)) is None
    )


@jax.jit
def _in_fragments(q: QArray) -> QArray:
    q = plain_scales(q)
    length = q.shape[q.axis]
    codes = packing.unpack(q.codes, q.bits, q.axis, length)
    parts = {"scale": q.scale, "zero_point": q.zero_point, "offset": q.offset}
    if q.axis == -1:
        codes = codes.swapaxes(-1, -2)
        parts = {name: None if part is None else part.swapaxes(-1, -2) for name, part in parts.items()}
    padding = padded_length(length) - length
    return dataclasses.replace(q, codes=to_fragments(codes, q.bits), padding=padding, layout=HOPPER, **parts)


def _in_words(q: QArray) -> bool:
    return q.layout == TPU and jnp.dtype(q.codes.dtype) == jnp.int32


@jax.jit
def _neutral(q: QArray) -> QArray:
    stored_axis = -1 if q.layout == GPU else -2
    if q.layout == HOPPER:
        codes = of_fragments(q.codes, q.shape[q.axis], q.bits)
    else:
        codes = words_to_int4(q.codes, q.shape[q.axis]) if _in_words(q) else q.codes
        codes = (codes.astype("int16") + q.number_format.center).astype("uint8")
    parts = {"scale": q.scale, "zero_point": q.zero_point, "offset": q.offset}
    if q.layout == TPU:
        parts = {name: None if part is None else part.squeeze(-2) for name, part in parts.items()}
    if q.axis != stored_axis:
        codes = codes.swapaxes(-1, -2)
        parts = {name: None if part is None else part.swapaxes(-1, -2) for name, part in parts.items()}
    padding = packing.padding_of(codes.shape[q.axis], q.bits)
    return dataclasses.replace(q, codes=packing.pack(codes, q.bits, q.axis), padding=padding, layout=NEUTRAL, **parts)
