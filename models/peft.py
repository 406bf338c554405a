"""Adapters as PEFT's folder (adapter_config.json and adapter_model.safetensors), for the families of models/.

PEFT names a module of Hugging Face's model, one of every layer; an adapter of ours is of a leaf that stacks layers:

    base_model.model.model.layers.3.self_attn.q_proj.lora_A.weight  [r, K]  a[3]^T of layers/attention/q_proj/kernel
    base_model.model.model.layers.3.self_attn.q_proj.lora_B.weight  [N, r]  b[3]^T

Where several of our leaves share a module (Phi-3's qkv_proj and gate_up_proj) nothing is refused, and nothing is lost:

    reading    each leaf gets the module's A, and its own rows of B; what is trained from there is trained apart
    writing    A's one below the other and B's along a diagonal of blocks, at the sum of their ranks; or A once, and B's
               one below the other, where all have the same A. Rows of leaves without an adapter are zero

Layers of different ranks (PEFT's rank_pattern), and layers without an adapter, are filled up with zeros. What a folder
says that is no product x A B beside a weight (DoRA's magnitudes, biases, whole modules, embeddings, initializations
that change the base) is refused by name.
"""

import dataclasses
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path as FilePath
from typing import Any

import jax.numpy as jnp
import numpy as np

from jq4.checkpoint.atomic import replace_file
from jq4.checkpoint.safetensors_files import StoredTensor, read_header, read_json, write
from jq4.errors import JQ4Error
from jq4.train import Adapter, Adapters
from models.config import DecoderConfig
from models.layer_runs import LAYERS, bounds, run_name
from models.tensor_names import Place, places

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_TENSOR = re.compile(r"(?:base_model\.model\.)?(?P<module>.+)\.lora_(?P<side>[AB])\.weight")
_MODULE = re.compile(r"(?:.*\.)?layers\.(?P<layer>\d+)\.(?P<rest>.+)")
_HEAD = "lm_head"
_CHANGE_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
_MORE_THAN_LORA = (
    *("use_dora", "lora_bias", "modules_to_save", "fan_in_fan_out", "target_parameters"),
    *("layer_replication", "alora_invocation_tokens", "trainable_token_indices"),
    *("use_qalora", "use_bdlora", "arrow_config", "kasa_config", "monteclora_config"),
)


@dataclasses.dataclass(frozen=True)
class Share:
    """One matrix of a leaf's adapter: A[K, r], B[r, N], and what A B is multiplied by."""

    a: np.ndarray
    b: np.ndarray
    scaling: float


@dataclasses.dataclass(frozen=True)
class Part:
    """A leaf, or a layer of one, that a module's rows belong to."""

    place: Place
    share: Share | None


# Writing ---------------------------------------------------------------------------------------------------------


def save_peft(folder: str | FilePath, config: DecoderConfig, adapters: Adapters, *, base_model: str = "") -> None:
    """Writes adapters of a Decoder's params as the folder that `peft.PeftModel.from_pretrained` opens.

    Args:
      folder: is made; files of these names in it are replaced, adapter_config.json last.
      config: of the decoder.
      adapters: of its params, by `jq4.lora`, packed or dense, in runs or in one stack.
      base_model: what base_model_name_or_path says: the model on the Hub, or its folder.

    Raises:
      JQ4Error: an adapter of a leaf that is no linear layer of the family.
    """
    folder = FilePath(folder)
    by_path = {path.removeprefix("params/"): each for path, each in adapters.by_path.items()}
    rslora = all(each.rslora for each in by_path.values())
    modules = {name: _joined(parts) for name, parts in _modules(config, by_path)}
    tensors: dict[str, np.ndarray] = {}
    for name, share in modules.items():
        tensors[f"{_PREFIX}{name}.lora_A.weight"] = np.ascontiguousarray(share.a.T)
        tensors[f"{_PREFIX}{name}.lora_B.weight"] = np.ascontiguousarray(share.b.T)
    folder.mkdir(parents=True, exist_ok=True)
    described = {name: ("F32", one.shape, lambda one=one: one) for name, one in tensors.items()}
    write(folder / WEIGHTS, described)
    stated = _config_of(config, modules, rslora, base_model)
    replace_file(folder / CONFIG, (json.dumps(stated, indent=2, sort_keys=True) + "\n").encode())


def _modules(config: DecoderConfig, by_path: Mapping[str, Adapter]) -> Iterator[tuple[str, list[Part]]]:
    """The name of each module with an adapter, and its parts in the order of its rows."""
    known, used = _linear_places(config), set()
    for (stored, stacked), leaves in known.items():
        for first, last in _runs(config, by_path) if stacked else [(0, 1)]:
            paths = [_path_in(config, path, first, by_path) if stacked else "/".join(path) for path, _ in leaves]
            if not any(path in by_path for path in paths):
                continue
            used |= set(paths)
            for index in range(last - first):
                parts = [
                    Part(place, _share_of(path, by_path[path], place, index if stacked else None, last - first))
                    if path in by_path
                    else Part(place, None)
                    for path, (_, place) in zip(paths, leaves, strict=True)
                ]
                yield stored.format(layer=first + index), parts
    if left := sorted(set(by_path) - used):
        raise JQ4Error(f"{left[0]}: is no linear layer that a {config.family} model has a module for: leave it out")


def _share_of(path: str, adapter: Adapter, place: Place, index: int | None, layers: int) -> Share:
    inputs, outputs = place.shape
    shape = (inputs, outputs) if index is None else (layers, inputs, outputs)
    plain = (adapter.stacked, adapter.inputs, adapter.outputs) == (() if index is None else (-3,), (-2,), (-1,))
    if adapter.shape != shape or not plain:
        raise JQ4Error(f"{path}: its adapter is for {adapter.shape}, wanted {shape} by the config")
    a, b = (np.asarray(part, np.float32) for part in (adapter.a, adapter.b))
    return Share(a, b, adapter.scaling) if index is None else Share(a[index], b[index], adapter.scaling)


def _joined(parts: list[Part]) -> Share:
    """The parts of a module as one share, whose B is as wide as the module."""
    held = [part.share for part in parts if part.share is not None]
    scaling, same = held[0].scaling, all(np.array_equal(each.a, held[0].a) for each in held)
    ranks = [each.a.shape[1] for each in held]
    b = np.zeros((ranks[0] if same else sum(ranks), parts[0].place.stored[0]), np.float32)
    start = 0
    for part in parts:
        if part.share is None:
            continue
        rank = part.share.a.shape[1]
        b[start : start + rank, slice(*part.place.rows)] = part.share.b * np.float32(part.share.scaling / scaling)
        start += 0 if same else rank
    return Share(held[0].a if same else np.concatenate([each.a for each in held], axis=1), b, scaling)


def _config_of(config: DecoderConfig, modules: Mapping[str, Share], rslora: bool, base_model: str) -> dict[str, Any]:
    ranks = {name: share.a.shape[1] for name, share in modules.items()}
    alphas = {
        name: _number(share.scaling * (ranks[name] ** 0.5 if rslora else ranks[name]))
        for name, share in modules.items()
    }
    rank, alpha = (Counter(each.values()).most_common(1)[0][0] for each in (ranks, alphas))
    return {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base_model, "inference_mode": True,
        "r": rank, "lora_alpha": alpha, "use_rslora": rslora, "lora_dropout": 0.0, "bias": "none",
        "fan_in_fan_out": False, "modules_to_save": None, "init_lora_weights": True,
        "target_modules": _targets(config, modules),
        "rank_pattern": {name: each for name, each in ranks.items() if each != rank},
        "alpha_pattern": {name: each for name, each in alphas.items() if each != alpha},
    }  # fmt: skip


def _targets(config: DecoderConfig, modules: Mapping[str, Share]) -> list[str]:
    """The modules' last names, where all layers have them; else their whole names."""
    counts = Counter(name.rpartition(".")[2] for name in modules)
    whole = all(count == config.num_layers or last == _HEAD for last, count in counts.items())
    return sorted(counts) if whole else sorted(modules)


def _number(value: float) -> float | int:
    return round(value) if abs(value - round(value)) < 1e-9 else value


# Reading ---------------------------------------------------------------------------------------------------------


def load_peft(folder: str | FilePath, config: DecoderConfig, *, runs: tuple[int, ...] = ()) -> Adapters:
    """The adapters of a folder that PEFT or `save_peft` wrote, for a Decoder's params.

    Args:
      folder: with adapter_config.json and adapter_model.safetensors.
      config: of the decoder.
      runs: the first layers of the runs that the params are held in (models.layer_runs.runs_of).

    Returns:
      Adapters by the paths of the params, in float32.

    Raises:
      JQ4Error: what the folder holds is no plain LoRA, or not of this model; it names the file, and the module.
    """
    folder = FilePath(folder)
    stated = _checked(folder / CONFIG, read_json(folder / CONFIG))
    shares = _shares(folder / WEIGHTS, stated)
    found: dict[str, Adapter] = {}
    for (stored, stacked), leaves in _linear_places(config).items():
        for first, last in bounds(config, runs) if stacked else [(0, 1)]:
            names = [stored.format(layer=layer) for layer in range(first, last)]
            held = [shares.pop(name, None) for name in names]
            if not any(held):
                continue
            for path, place in leaves:
                key = (LAYERS, run_name(config, first), *path[1:]) if stacked and runs else path
                found["/".join(key)] = _stacked(folder, names, held, place, stacked, bool(stated.get("use_rslora")))
    if shares:
        raise JQ4Error(
            f"{folder / WEIGHTS}: has an adapter of {next(iter(shares))}, which a {config.family} model with "
            f"{config.num_layers} layers has no linear layer for. Take the model that the adapter was made for."
        )
    return Adapters(found)


def _shares(file: FilePath, stated: Mapping[str, Any]) -> dict[str, Share]:
    """Module, as our tables name it -> its share. All tensors are looked at before any is read."""
    sides: dict[str, dict[str, StoredTensor]] = {}
    for name, tensor in read_header(file).items():
        match = _TENSOR.fullmatch(name)
        if match is None:
            raise JQ4Error(
                f"{file}: tensor {name!r} is no lora_A or lora_B of a linear layer: biases, embeddings, magnitudes "
                "(DoRA) and whole modules are not read. Merge the adapter with PEFT and take the merged model."
            )
        sides.setdefault(match["module"], {})[match["side"]] = tensor
    shares = {}
    for module, pair in sides.items():
        if set(pair) != {"A", "B"}:
            raise JQ4Error(f"{file}: module {module} has lora_{next(iter(pair))} alone. Save the adapter again.")
        a, b = pair["A"], pair["B"]
        if len(a.shape) != 2 or len(b.shape) != 2 or a.shape[0] != b.shape[1]:
            raise JQ4Error(
                f"{file}: module {module} has A of shape {a.shape} and B of {b.shape}, wanted [r, K], [N, r]."
            )
        rank = _by_pattern(stated.get("rank_pattern"), module, stated["r"])
        if a.shape[0] != rank:
            raise JQ4Error(f"{file}: module {module} has rank {a.shape[0]}, and {CONFIG} says {rank}.")
        alpha = _by_pattern(stated.get("alpha_pattern"), module, stated["lora_alpha"])
        scaling = alpha / (rank**0.5 if stated.get("use_rslora") else rank)
        shares[_own_name(module)] = Share(_read(a).T, _read(b).T, scaling)
    return shares


def _stacked(
    folder: FilePath, names: list[str], held: list[Share | None], place: Place, stacked: bool, rslora: bool
) -> Adapter:
    """One leaf's adapter, from those of its layers: zeros where there is none, and up to the largest rank."""
    first = next(share for share in held if share is not None)
    rank, scaling = max(share.a.shape[1] for share in held if share is not None), first.scaling
    inputs, outputs = place.shape
    a, b = np.zeros((len(held), inputs, rank), np.float32), np.zeros((len(held), rank, outputs), np.float32)
    for index, (name, share) in enumerate(zip(names, held, strict=True)):
        if share is None:
            continue
        found = (share.b.shape[1], share.a.shape[0])
        if found != place.stored:
            raise JQ4Error(
                f"{folder / WEIGHTS}: {name} has an adapter for a weight of shape {found}, wanted {place.stored} by "
                "the model's config.json. Take the model that the adapter was made for."
            )
        own = share.a.shape[1]
        a[index, :, :own] = share.a
        b[index, :own] = share.b[:, slice(*place.rows)] * np.float32(share.scaling / scaling)
    alpha = scaling * (rank**0.5 if rslora else rank)
    if stacked:
        return Adapter(jnp.asarray(a), jnp.asarray(b), stacked=(-3,), alpha=alpha, rslora=rslora)
    return Adapter(jnp.asarray(a[0]), jnp.asarray(b[0]), alpha=alpha, rslora=rslora)


def _checked(file: FilePath, stated: Any) -> Mapping[str, Any]:
    """adapter_config.json, if it states a plain LoRA."""
    if not isinstance(stated, Mapping) or stated.get("peft_type") != "LORA":
        found = stated.get("peft_type") if isinstance(stated, Mapping) else type(stated).__name__
        raise JQ4Error(f"{file}: peft_type is {found!r}, wanted 'LORA'.")
    for key in ("r", "lora_alpha"):
        if isinstance(stated.get(key), bool) or not isinstance(stated.get(key), int | float) or stated[key] <= 0:
            raise JQ4Error(f"{file}: {key} is {stated.get(key)!r}, wanted a number above 0.")
    wrong = [key for key in _MORE_THAN_LORA if stated.get(key)]
    wrong += ["bias"] if stated.get("bias", "none") != "none" else []
    wrong += ["init_lora_weights"] if str(stated.get("init_lora_weights")).lower().startswith(_CHANGE_THE_BASE) else []
    if wrong:
        raise JQ4Error(
            f"{file}: {wrong[0]} is {stated[wrong[0]]!r}, which is more than A B beside a weight. Merge the adapter "
            "with PEFT and take the merged model, or train one without it."
        )
    return stated


def _by_pattern(patterns: Any, module: str, otherwise: Any) -> Any:
    """As PEFT looks names up: the first key that is the module's name, or its end after a dot, as a pattern."""
    for key, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({key})$", module):
            return value
    return otherwise


def _read(tensor: StoredTensor) -> np.ndarray:
    return np.asarray(tensor.read()).astype(np.float32)


def _own_name(module: str) -> str:
    """A module's name as our tables have it, whatever stands before its layers."""
    if match := _MODULE.fullmatch(module):
        return f"model.layers.{int(match['layer'])}.{match['rest']}"
    return _HEAD if module.rpartition(".")[2] == _HEAD else module


# Both ------------------------------------------------------------------------------------------------------------


def _linear_places(config: DecoderConfig) -> dict[tuple[str, bool], list[tuple[tuple[str, ...], Place]]]:
    """(module's name with {layer}, whether every layer has one) -> its leaves, in the order of the module's rows."""
    found: dict[tuple[str, bool], list[Any]] = {}
    for path, place in places(config).items():
        if path[-1] == "kernel":
            bare = place.name.removesuffix(".weight")
            name = bare if bare == _HEAD else f"model.{bare}"
            found.setdefault((name, place.stacked), []).append((path, place))
    return found


def _runs(config: DecoderConfig, by_path: Mapping[str, Any]) -> list[tuple[int, int]]:
    """The runs that the adapters' paths tell."""
    named = {path.split("/")[1] for path in by_path if path.startswith(f"{LAYERS}/")}
    firsts = tuple(sorted(int(name) for name in named if name.isdigit()))
    return bounds(config, firsts) if firsts else [(0, config.num_layers)]


def _path_in(config: DecoderConfig, path: tuple[str, ...], first: int, by_path: Mapping[str, Any]) -> str:
    run = "/".join((LAYERS, run_name(config, first), *path[1:]))
    return run if run in by_path else "/".join(path)
