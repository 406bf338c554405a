"""Weights that are not one tensor each in GGUF: experts, which llama.cpp keeps together, one tensor for a layer.

    GGUF                          Hugging Face
    blk.3.ffn_gate_exps [E, I, D] model.layers.3.mlp.experts.7.gate_proj.weight        [I, D]   Qwen 2 and 3
                                  model.layers.3.block_sparse_moe.experts.7.w1.weight  [I, D]   Mixtral
                                  model.layers.3.mlp.experts.gate_up_proj     [E, 2I, D] (packed) or [E, D, 2I] (dense)
                                                   gpt-oss: of all experts, its rows (and biases) gate, up, gate, up
    blk.3.ffn_gate_up_exps [E, 2I, D]    both of an expert, one below the other: some newer files
    blk.3.ffn_gate_inp_shexp [D]         the gate of Qwen 2's shared expert, a matrix of one row

An expert that is a module is a *share* of its layer's tensor: its blocks lie together there, so that it is read,
planned, written and proven by itself, and a layer's experts never are in memory at once. A share is planned under the
tensor's name and its own number, "blk.3.ffn_gate_exps.weight#7"; `whole_tensors` makes the file's tensors of shares.
Everything is done to blocks u8[..., N, B, nbytes] or dense arrays [..., N, K] alike, whatever they hold.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from jq4.checkpoint.foreign.gguf.block_types import BlockType
from jq4.checkpoint.foreign.gguf.container import GGUFTensor, damaged
from jq4.checkpoint.foreign.gguf.names import layer_and_stem
from jq4.checkpoint.foreign.weights import Checkpoint, LazyWeight
from jq4.errors import JQ4Error

MOST_EXPERTS = 4096  # of a layer: beyond any model, and a weight is made for each

_GATE, _UP, _DOWN, _GATE_UP = "ffn_gate_exps", "ffn_up_exps", "ffn_down_exps", "ffn_gate_up_exps"
_QWEN = ("mlp", {_GATE: "gate_proj", _UP: "up_proj", _DOWN: "down_proj"})
# architecture -> where a layer has its experts, and what the modules of one are called
_MODULES = {
    "llama": ("block_sparse_moe", {_GATE: "w1", _UP: "w3", _DOWN: "w2"}),
    "qwen2moe": _QWEN,
    "qwen3moe": _QWEN,
}
_ONE_ROW = "ffn_gate_inp_shexp"
_MODULE_NAME = re.compile(r"(?:model\.)?layers\.([0-9]{1,9})\.(\w+)\.experts\.([0-9]{1,4})\.(\w+)\.weight")
_ALL_EXPERTS = "model.layers.{layer}.mlp.experts.{part}"
_ALL_NAME = re.compile(r"(?:model\.)?layers\.([0-9]{1,9})\.mlp\.experts\.(gate_up_proj|down_proj)(?:\.weight|(_bias))?")
_SHARE = re.compile(r"(.+)#([0-9]+)")


@dataclasses.dataclass(frozen=True)
class Target:
    """One of the tensors (or shares of one) that a weight becomes: `of` takes its blocks out of the weight's."""

    name: str
    shape: tuple[int, ...]
    of: Callable[[np.ndarray], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Made:
    """A weight made of tensors: its rows are what `of` makes of theirs; `turned` where a dense one is [..., K, N]."""

    name: str
    tensors: tuple[GGUFTensor, ...]
    shape: tuple[int, ...]
    of: Callable[[list[np.ndarray]], np.ndarray]
    turned: bool = False


def targets_of(name: str, shape: tuple[int, ...], architecture: str) -> list[Target]:
    """The tensors that a weight of experts becomes, its rows [..., N, K] along axis -2; none for any other weight."""
    module, (parent, words) = _MODULE_NAME.fullmatch(name), _MODULES.get(architecture, ("", {}))
    stem = next((one for one, word in words.items() if module and (parent, word) == (module[2], module[4])), None)
    if module and stem:
        return [Target(f"blk.{int(module[1])}.{stem}.weight#{int(module[3])}", shape, _same)]
    every = _ALL_NAME.fullmatch(name)
    if every and architecture == "gpt-oss":
        stem, ending = f"blk.{int(every[1])}.", ".bias" if every[3] else ".weight"
        if every[2] == "down_proj":
            return [Target(f"{stem}{_DOWN}{ending}", shape, _same)]
        half = (shape[0], shape[1] // 2, *shape[2:]) if len(shape) > 1 else shape
        return [Target(f"{stem}{one}{ending}", half, _every_second(k)) for k, one in enumerate((_GATE, _UP))]
    return []


def as_stored(name: str, shape: tuple[int, ...]) -> Target:
    """The tensor of a weight that is one: as it is, or without the axis of its only row."""
    if layer_and_stem(name)[1] == _ONE_ROW and len(shape) == 2 and shape[0] == 1:
        return Target(name, shape[1:], lambda blocks: blocks[0])
    return Target(name, shape, _same)


def made_of(tensor: GGUFTensor, tensors: Mapping[str, GGUFTensor], architecture: str, count: int) -> list[Made] | None:
    """The weights that a tensor of experts makes, perhaps with others; None for a tensor that is one weight, or has no
    place in this architecture. `count` is how many experts the metadata tell.
    """
    layer, stem = layer_and_stem(tensor.name)
    if stem == _ONE_ROW and architecture == "qwen2moe" and len(tensor.shape) == 1:
        name = f"model.layers.{layer}.mlp.shared_expert_gate.weight"
        return [Made(name, (tensor,), (1, *tensor.shape), lambda arrays: arrays[0][None])]
    if architecture == "gpt-oss" and stem in (_GATE, _UP, _DOWN):
        return _of_all_experts(tensor, tensors, layer, stem, count)
    parent, words = _MODULES.get(architecture, ("", {}))
    if not parent or stem not in (*words, _GATE_UP) or not tensor.name.endswith(".weight"):
        return None
    _check_count(tensor, 3, count)
    made = []
    for word, first, last in _rows_of_words(tensor, words, stem):
        for expert in range(count):
            name = f"model.layers.{layer}.{parent}.experts.{expert}.{word}.weight"
            made.append(Made(name, (tensor,), (last - first, tensor.shape[2]), _rows_of(expert, first, last)))
    return made


def whole_tensors(
    described: Mapping[str, tuple[BlockType, tuple[int, ...]]], count: int
) -> tuple[dict[str, tuple[BlockType, tuple[int, ...]]], dict[str, tuple[str, int]]]:
    """The tensors of a file, in order, with those of shares made one; and of each share, (its tensor, its number).

    Raises JQ4Error where a layer's experts are not `count` alike.
    """
    whole: dict[str, tuple[BlockType, tuple[int, ...]]] = {}
    shares: dict[str, tuple[str, int]] = {}
    numbers: dict[str, set[int]] = {}
    for name, (kind, shape) in described.items():
        share = _SHARE.fullmatch(name)
        if share is None:
            whole[name] = kind, shape
            continue
        tensor, expert = share[1], int(share[2])
        held = whole.setdefault(tensor, (kind, (count, *shape)))
        if held != (kind, (count, *shape)):
            raise JQ4Error(
                f"{tensor}: expert {expert} is {kind.name}{list(shape)} and others are {held[0].name}"
                f"{list(held[1][1:])}; in GGUF a layer's experts are one tensor. Say --type, so that all are alike."
            )
        numbers.setdefault(tensor, set()).add(expert)
        shares[name] = tensor, expert
    for tensor, found in numbers.items():
        if found != set(range(count)):
            raise JQ4Error(
                f"{tensor}: found {len(found)} experts, the last of them {max(found)}, wanted {count} by config.json. "
                "Take the config.json that belongs to these weights, and all of its shards."
            )
    return whole, shares


def by_rows(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint with gpt-oss' dense experts as [E, N, K], as packed ones are; transformers has [E, K, N].

    Those of a layer whose gate_up_proj is no [E, D, 2I] are as they should be already.
    """
    config = checkpoint.config or {}
    if config.get("model_type") != "gpt_oss":
        return checkpoint
    turned = {
        _ALL_NAME.fullmatch(name)[1]  # pyright: ignore[reportOptionalSubscript]
        for name, weight in checkpoint.weights.items()
        if name.endswith(".mlp.experts.gate_up_proj") and _is_turned(weight, config)
    }
    weights = {}
    for name, weight in checkpoint.weights.items():
        found = _ALL_NAME.fullmatch(name)
        held = found and not found[3] and not weight.packed and found[1] in turned and len(weight.shape) == 3
        weights[name] = _transposed(weight) if held else weight
    return dataclasses.replace(checkpoint, weights=weights)


def _is_turned(weight: LazyWeight, config: Mapping[str, Any]) -> bool:
    return not weight.packed and len(weight.shape) == 3 and weight.shape[1] == config.get("hidden_size")


def _transposed(weight: LazyWeight) -> LazyWeight:
    import jax

    outer, rows, width = weight.shape
    abstract = jax.ShapeDtypeStruct((outer, width, rows), weight.abstract.dtype)
    by_experts = weight.read_rows
    return dataclasses.replace(
        weight,
        abstract=abstract,
        read=lambda: np.swapaxes(weight.read(), -1, -2),
        read_rows=None if by_experts is None else lambda experts: np.swapaxes(by_experts(experts), -1, -2),
    )


def _of_all_experts(
    tensor: GGUFTensor, tensors: Mapping[str, GGUFTensor], layer: int, stem: str, count: int
) -> list[Made] | None:
    """gpt-oss: gate and up are one weight, made where the gate stands."""
    ending = tensor.name.rpartition(".")[2]
    _check_count(tensor, 3 if ending == "weight" else 2, count)
    suffix, turned = ("", tensor.kind.dtype is not None) if ending == "weight" else ("_bias", False)
    if stem == _DOWN:
        name = _ALL_EXPERTS.format(layer=layer, part="down_proj") + suffix
        return [Made(name, (tensor,), tensor.shape, lambda arrays: arrays[0], turned)]
    gate, up = (tensors.get(f"blk.{layer}.{one}.{ending}") for one in (_GATE, _UP))
    if gate is None or up is None or (gate.kind, gate.shape) != (up.kind, up.shape):
        return None
    if tensor is up:
        return []
    name = _ALL_EXPERTS.format(layer=layer, part="gate_up_proj") + suffix
    return [Made(name, (gate, up), (count, 2 * gate.shape[1], *gate.shape[2:]), _alternating, turned)]


def _check_count(tensor: GGUFTensor, rank: int, count: int) -> None:
    if len(tensor.shape) != rank or tensor.shape[0] != count or not 0 < count <= MOST_EXPERTS:
        wanted = (
            f"{rank} axes, the first of them of {count} experts, as expert_count says, and of {MOST_EXPERTS} at most"
        )
        raise damaged(tensor.file, f"tensor {tensor.name!r} has shape {list(tensor.shape)}", wanted)


def _rows_of_words(tensor: GGUFTensor, words: Mapping[str, str], stem: str) -> list[tuple[str, int, int]]:
    """(Hugging Face's word, the first row, the one after the last) of what an expert's rows are."""
    rows = tensor.shape[1]
    if stem != _GATE_UP:
        return [(words[stem], 0, rows)]
    if rows % 2:
        raise damaged(tensor.file, f"tensor {tensor.name!r} has {rows} rows an expert", "an even number, gate and up")
    return [(words[_GATE], 0, rows // 2), (words[_UP], rows // 2, rows)]


def _rows_of(expert: int, first: int, last: int) -> Callable[[list[np.ndarray]], np.ndarray]:
    return lambda arrays: arrays[0][expert, first:last]


def _same(blocks: np.ndarray) -> np.ndarray:
    return blocks


def _every_second(first: int) -> Callable[[np.ndarray], np.ndarray]:
    return lambda blocks: blocks[:, first::2]


def _alternating(arrays: list[np.ndarray]) -> np.ndarray:
    """[E, I, ...] and [E, I, ...] as [E, 2I, ...]."""
    gate, up = arrays
    return np.stack([gate, up], 2).reshape(gate.shape[0], 2 * gate.shape[1], *gate.shape[2:])
