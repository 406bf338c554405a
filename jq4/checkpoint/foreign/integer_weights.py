"""What writers of integer formats ask of a weight before they plan it, and how they cast its scales.

A QArray can be more than such a file can say: codebooks, offsets, packed scales, scales of inputs, rotated inputs. What
a target has no tensor for is refused when it is planned, naming the weight; nothing is approximated.
"""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from jq4.checkpoint.foreign.weights import LazyWeight
from jq4.checkpoint.safetensors_files import DTYPES
from jq4.errors import JQ4Error
from jq4.qarray import NEUTRAL, QArray, is_qarray

_ELSEWHERE = "Convert to a format that can (orbax, compressed-tensors, gguf), or dequantize it: --to safetensors."
_EXTRAS = {
    "offset": "a float offset for each group",
    "input_scale": "a scale for each input",
    "activation_scale": "a fixed step of its inputs",
    "permutation": "its inputs permuted (act-order)",
}


def unwritable(weight: LazyWeight, target: str, found: str, wanted: str, remedy: str = _ELSEWHERE) -> JQ4Error:
    """What to raise where `target` cannot hold a weight."""
    return JQ4Error(f"{weight.name}: has {found}; {target} holds {wanted}. {remedy}")


def require_integers(
    weight: LazyWeight,
    target: str,
    *,
    bits: tuple[int, ...],
    ndim: tuple[int, ...] = (2,),
    extras: tuple[str, ...] = (),
) -> QArray:
    """The weight's abstract QArray, if it is integers with scales and perhaps integer zero points along its axis -1."""
    q: QArray = weight.abstract
    form = q.number_format
    if not form.is_integer or form.bits not in bits:
        raise unwritable(weight, target, f"codes of format {q.format}", f"integers of {', '.join(map(str, bits))} bits")
    if q.axis != -1 or q.layout != NEUTRAL or len(q.shape) not in ndim:
        raise unwritable(
            weight, target, f"shape {q.shape} grouped along axis {q.axis} ({q.layout})", "[N, K] grouped along K"
        )
    if q.input_rotation or q.activations:
        raise unwritable(
            weight, target, "inputs that a product rotates or rounds", "weights whose inputs are left as they are"
        )
    for part, words in _EXTRAS.items():
        if getattr(q, part) is not None and part not in extras:
            raise unwritable(weight, target, words, "scales and integer zero points alone")
    if is_qarray(q.scale):
        raise unwritable(weight, target, "packed scales (double quantization)", "scales as they are")
    if q.zero_point is not None and not jnp.issubdtype(q.zero_point.dtype, jnp.integer):
        raise unwritable(weight, target, "zero points between codes (HQQ)", "whole ones")
    return q


def scale_dtype(q: QArray, options: Mapping[str, Any]) -> tuple[str, str, str]:
    """(safetensors' name of the dtype that a float16 family stores scales in, loss, doubt); option `scale_dtype`.

    Without the option scales go to float16: exactly (else `encode` raises) for bfloat16, and with a loss for others.
    """
    source, wanted = jnp.dtype(q.scale.dtype).name, options.get("scale_dtype")
    names = {dtype.name: name for name, dtype in DTYPES.items() if name in ("F16", "BF16", "F32")}
    if wanted not in (None, *names):
        raise JQ4Error(f"option scale_dtype is {wanted!r}, wanted one of {', '.join(names)}")
    target = wanted or "float16"
    if target == source:
        return names[target], "", ""
    if wanted is None and source == "bfloat16":
        return names[target], "", "bfloat16 scales must be exact in float16"
    return names[target], f"scales {source} to {target}", ""


def cast_scales(scale: Any, dtype: str, weight: LazyWeight, *, exactly: bool) -> np.ndarray:
    """Scales in the dtype of safetensors' name; raises where one becomes infinite, or another if it must not."""
    scale = np.asarray(scale)
    with np.errstate(over="ignore", under="ignore"):
        cast = scale.astype(DTYPES[dtype])
    wide, source = cast.astype(np.float32), scale.astype(np.float32)
    if not np.isfinite(source).all():
        raise JQ4Error(f"{weight.name}: its scales hold NaN or infinity; quantize it again from finite weights.")
    changed = int((wide != source).sum())
    if not np.isfinite(wide).all() or (exactly and changed):
        raise JQ4Error(
            f"{weight.name}: {changed} of {scale.size} scales of {scale.dtype} (|scale| from "
            f"{np.abs(source).min():.3g} to {np.abs(source).max():.3g}) are not exact in {DTYPES[dtype].name}. "
            f"Keep them (--scale-dtype {scale.dtype.name}), or round them if they fit (--scale-dtype float16)."
        )
    return cast


def full(part: Any, q: QArray) -> np.ndarray:
    """A scale or zero point [*E, N, G] with its broadcasting 1s written out."""
    return np.broadcast_to(np.asarray(part), (*q.shape[:-1], q.num_groups))
