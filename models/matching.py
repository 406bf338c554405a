"""Which weights of a checkpoint make each leaf of the decoder: names, shapes and dtypes are checked, nothing is read.

A packed weight has the name and the shape that the dense one has, so that a packed model is matched as a dense one is.
"""

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import numpy as np

from jq4.checkpoint.foreign import Checkpoint, LazyWeight
from jq4.checkpoint.safetensors_files import DTYPES
from jq4.errors import JQ4Error
from models.config import DecoderConfig
from models.tensor_names import Path, Place, places

_FLOATS = ("F64", "F32", "F16", "BF16")
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_MARK = "layers.0.input_layernorm.weight"  # what stands before it is the prefix of the body's names
# recomputed from the config, or of a cache of fewer bits than ours
_HARMLESS = re.compile(r"rotary_emb\.(inv_freq|cos_cached|sin_cached)$|\.self_attn\.[kv]_(cache_)?scale$")
_OF_IMAGES = re.compile(r"^(model\.)?(vision_tower|multi_modal_projector)\.")


def matched_weights(where: str, checkpoint: Checkpoint, config: DecoderConfig) -> dict[Path, list[LazyWeight]]:
    """The weights of every leaf, one for each layer, after all names, shapes and dtypes are found to be as wanted.

    Raises JQ4Error, naming `where` and the tensor.
    """
    held = checkpoint.weights
    prefix = _prefix(held)
    heads = {prefix.removesuffix("model.") + "lm_head.weight", "lm_head.weight"} & set(held)
    aliases = {"lm_head.weight": next(iter(sorted(heads)), "lm_head.weight")}
    shared = prefix + "embed_tokens.weight"
    if config.tied_embeddings and shared not in held:
        aliases[shared] = aliases["lm_head.weight"]
    elif config.tied_embeddings and heads:
        _check_same(where, held[shared], held[aliases["lm_head.weight"]])
    matched, missing = {}, []
    for path, place in places(config).items():
        names = [_full_name(place, prefix, layer) for layer in (range(config.num_layers) if place.stacked else [None])]
        names = [aliases.get(name, name) for name in names]
        missing += [name for name in names if name not in held]
        matched[path] = [_checked(where, held[name], place) for name in names if name in held]
    if missing:
        raise _missing(where, missing, checkpoint, config)
    used = {weight.name for each in matched.values() for weight in each} | heads
    extra = [name for name in held if name not in used and not _ignored(name, held, config)]
    if extra:
        raise JQ4Error(
            f"{where}: found {_listed(extra)}, which a {config.family} model with "
            f"{config.num_layers} layers has no place for. Take the config.json that belongs to these weights."
        )
    return matched


def check_dense(where: str, checkpoint: Checkpoint) -> None:
    """Raises JQ4Error where a checkpoint holds packed weights."""
    if any(weight.packed for weight in checkpoint.weights.values()):
        raise _packed(where, checkpoint.format, known=True)


def _prefix(names: Iterable[str]) -> str:
    found = sorted(name.removesuffix(_MARK) for name in names if name.endswith(_MARK))
    return found[0] if found else "model."


def _full_name(place: Place, prefix: str, layer: int | None) -> str:
    return place.name if place.name == "lm_head.weight" else prefix + place.name.format(layer=layer)


def _checked(where: str, weight: LazyWeight, place: Place) -> LazyWeight:
    if weight.shape != place.stored:
        raise JQ4Error(
            f"{where}: tensor {weight.name!r} has shape {weight.shape}, wanted {place.stored} by config.json. "
            "Take the config.json that belongs to these weights."
        )
    if not weight.packed and _dtype_name(weight) not in _FLOATS:
        raise JQ4Error(
            f"{where}: tensor {weight.name!r} is {_dtype_name(weight)}, wanted one of {', '.join(_FLOATS)}. "
            "The checkpoint is quantized in a way that jq4 does not read: take the dense original."
        )
    return weight


def _dtype_name(weight: LazyWeight) -> str:
    return _NAMES.get(np.dtype(weight.abstract.dtype), str(weight.abstract.dtype))


def _check_same(where: str, embedding: LazyWeight, head: LazyWeight) -> None:
    if embedding.abstract == head.abstract:
        parts = zip(jax.tree.leaves(embedding.read()), jax.tree.leaves(head.read()), strict=True)
        if all(np.array_equal(one, other) for one, other in parts):
            return
    raise JQ4Error(
        f"{where}: {head.name!r} differs from {embedding.name!r}, but config.json says that they are one "
        '(tie_word_embeddings). Write "tie_word_embeddings": false in config.json if the head is its own.'
    )


def _packed(where: str, method: Any, known: bool) -> JQ4Error:
    """`known`: whether jq4 has read them as packed weights."""
    instead = (
        "these are run as they are by jq4 eval and jq4 generate, and written in other formats by jq4 convert --to"
        if known
        else "jq4 does not read these"
    )
    return JQ4Error(
        f"{where}: the weights are packed ({method}), wanted dense ones. Take the dense original; {instead}."
    )


def _missing(where: str, missing: list[str], checkpoint: Checkpoint, config: DecoderConfig) -> JQ4Error:
    stated = json.loads(config.source or "{}").get("quantization_config") or checkpoint.quantization
    if stated.get("quant_method") and not any(weight.packed for weight in checkpoint.weights.values()):
        return _packed(where, stated["quant_method"], known=False)
    remedy = "Take the config.json that belongs to these weights, or download them again."
    if missing == ["lm_head.weight"]:
        remedy = 'Write "tie_word_embeddings": true in config.json if the head is the embedding.'
    return JQ4Error(f"{where}: missing {_listed(missing)}; found {len(checkpoint.weights)} other tensors. {remedy}")


def _ignored(name: str, held: Mapping[str, LazyWeight], config: DecoderConfig) -> bool:
    if _HARMLESS.search(name) or (config.family == "gemma3_text" and _OF_IMAGES.match(name)):
        return True
    return _is_idle_bias(name, held)


def _is_idle_bias(name: str, held: Mapping[str, LazyWeight]) -> bool:
    """Packers write a bias of zeros beside weights that never had one."""
    weight = held.get(name.removesuffix(".bias") + ".weight")
    return name.endswith(".bias") and weight is not None and weight.packed and not np.any(held[name].read())


def _listed(names: list[str]) -> str:
    shown = ", ".join(repr(name) for name in names[:3])
    return f"{len(names)} tensor{'s' * (len(names) > 1)}: {shown}{', ...' * (len(names) > 3)}"
