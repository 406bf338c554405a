"""How each weight is held in a GGUF file, from its description alone. The types come from mixture.py.

`options`: {"type": a key of mixture.FILE_TYPES or "keep", "config": the checkpoint's config}. "keep" gives every packed
weight the type that holds it as it is, and a dense one the type of its dtype.

A packed weight whose codes have a place in its type (or in the file's main type, where the mixture wants a finer one)
keeps them; any other is dequantized and quantized anew, and the plan calls that a loss.
"""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from jq4.checkpoint.foreign.gguf import qarrays
from jq4.checkpoint.foreign.gguf.block_types import BY_NAME, BlockType
from jq4.checkpoint.foreign.gguf.config_out import Settings
from jq4.checkpoint.foreign.gguf.experts import as_stored, targets_of
from jq4.checkpoint.foreign.gguf.mixture import FILE_TYPES, KEEP, chosen_type, file_type, stays_float
from jq4.checkpoint.foreign.gguf.names import gguf_name, is_shifted_norm, permuted_heads, to_llama_order
from jq4.checkpoint.foreign.gguf.quantize import quantized_blocks
from jq4.checkpoint.foreign.gguf.repacking import Repacking, natural_type, repacking
from jq4.checkpoint.foreign.host_dequantize import host_dequantize
from jq4.checkpoint.foreign.weights import LazyWeight
from jq4.checkpoint.foreign.writing import Planned
from jq4.errors import JQ4Error
from jq4.qarray import is_qarray

TYPES = (*FILE_TYPES, KEEP)  # what --type may be
_RECOMPUTED = re.compile(r"rotary_emb\.(inv_freq|cos_cached|sin_cached)$")
_OF_IMAGES = re.compile(r"^(model\.)?(vision_tower|multi_modal_projector)\.")
_DENSE = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


def plan(weight: LazyWeight, options: Mapping[str, Any]) -> Planned:
    """The tensors of one weight: their GGUF names, their type's name as dtype, their shapes in Hugging Face's order.
    An expert is a share of a tensor, by the name that experts.py tells.

    A weight that a GGUF file has no place for (pictures) has no tensors; `loss` says what is left out. A tied head is
    planned as the embedding, and written where the embedding itself is not among the weights.
    """
    settings = Settings(options.get("config"))
    if _RECOMPUTED.search(weight.name):
        return Planned(weight, {}, lambda _: {})
    if _OF_IMAGES.match(weight.name):
        return Planned(
            weight, {}, lambda _: {}, loss="left out: a GGUF file of a text model holds no pictures' weights"
        )
    name = gguf_name(weight.name, settings.architecture)
    targets = [as_stored(name, weight.shape)] if name else targets_of(weight.name, weight.shape, settings.architecture)
    if not targets:
        raise JQ4Error(
            f"{weight.name}: has no name in a GGUF file of architecture {settings.architecture!r}. "
            "Take the config.json that belongs to these weights."
        )
    if name is None and settings.architecture == "gpt-oss":
        _check_rows(weight, settings)
    if name == "output.weight" and settings.tied:
        name = "token_embd.weight"
        targets = [as_stored(name, weight.shape)]
    name = name or targets[0].name.partition("#")[0]
    heads = permuted_heads(name, settings.architecture, settings.heads)
    kind, way = _type_and_way(weight, name, options, settings)
    loss, doubt = (way.loss, way.doubt) if way else (_loss(weight, kind), "")
    shifted = is_shifted_norm(name, settings.architecture)
    if shifted:
        loss = loss or "kept as 1 + w, which rounds w to 2**-24"

    def encode(value: Any) -> Mapping[str, np.ndarray]:
        blocks = _encoded(value, kind, way, weight.name, shifted)
        ordered = to_llama_order(blocks, heads, weight.name)
        return {one.name: one.of(ordered) for one in targets}

    anew = weight.packed and way is None and kind.dtype is None
    tensors = {one.name: (kind.name, one.shape) for one in targets}
    return Planned(weight, tensors, encode, loss, doubt, requantized=anew)


def _check_rows(weight: LazyWeight, settings: Settings) -> None:
    """Of gpt-oss' experts the rows are cut, so they must be rows."""
    wanted = 2 * settings.size("intermediate_size") if "gate_up" in weight.name else settings.size("hidden_size")
    if len(weight.shape) < 2 or weight.shape[1] != wanted:
        raise JQ4Error(
            f"{weight.name}: has shape {list(weight.shape)}, wanted {wanted} rows an expert by config.json. "
            "Take the config.json that belongs to these weights."
        )


def file_type_number(options: Mapping[str, Any], planned: list[Planned]) -> int:
    """general.file_type: for "keep", that of the type with the most elements."""
    if options.get("type") != KEEP:
        return file_type(str(options.get("type"))).number
    sizes: dict[str, int] = {}
    for one in planned:
        for kind, shape in one.tensors.values():
            sizes[kind] = sizes.get(kind, 0) + int(np.prod(shape))
    main = max(sizes, key=lambda kind: sizes[kind], default="F32")
    numbers = {one.base: one.number for one in reversed(FILE_TYPES.values())} | {"MXFP4": 38, "IQ4_XS": 30}
    return numbers.get(main, 0)


def _type_and_way(
    weight: LazyWeight, name: str, options: Mapping[str, Any], settings: Settings
) -> tuple[BlockType, Repacking | None]:
    asked = str(options.get("type"))
    if asked == KEEP:
        kind = natural_type(weight.abstract) if weight.packed else BY_NAME[_DENSE.get(weight.format, "F32")]
        if kind is None:
            raise JQ4Error(
                f"{weight.name}: no GGUF type holds {weight.abstract!r} as it is. "
                f"Say --type, one of {', '.join(FILE_TYPES)}; it is then quantized anew."
            )
        if kind.dtype is not None and (len(weight.shape) < 2 or stays_float(name) or kind.name == "F64"):
            kind = BY_NAME["F32"]
        return kind, repacking(kind, weight.abstract) if weight.packed else None
    kind = chosen_type(asked, name, weight.shape, settings.layers, settings.tied, settings.experts)
    if weight.packed and kind.dtype is None:
        for one in (kind, BY_NAME[file_type(asked).base]):
            way = repacking(one, weight.abstract)
            if way is not None:
                return one, way
    return kind, None


def _loss(weight: LazyWeight, kind: BlockType) -> str:
    if kind.dtype is None:
        return f"dequantized, and quantized anew to {kind.name}" if weight.packed else f"quantized to {kind.name}"
    if weight.packed:
        return "" if kind.name == "F32" else f"dequantized, and rounded to {kind.name}"
    exact = weight.abstract.dtype == kind.dtype or (kind.name == "F32" and weight.format in _DENSE)
    return "" if exact else f"{weight.format} rounded to {kind.name}"


def _encoded(value: Any, kind: BlockType, way: Repacking | None, name: str, shifted: bool) -> np.ndarray:
    """The blocks [..., B, nbytes] of a weight, or the dense array [...] in the type's dtype."""
    if way is not None:
        return qarrays.to_blocks(kind, way.form(value, name))
    dense = host_dequantize(value) if is_qarray(value) else np.asarray(value)
    if kind.dtype is None:
        return quantized_blocks(kind, dense, name)
    if shifted:
        dense = dense.astype(np.float32) + np.float32(1)
    with np.errstate(over="ignore"):
        stored = dense.astype(kind.dtype)
    if np.isinf(stored).any() and np.isfinite(dense).all():
        raise JQ4Error(
            f"{name}: {np.abs(dense.astype(np.float32)).max():.3g} is beyond {kind.name}. Write it with --type bf16."
        )
    return stored
