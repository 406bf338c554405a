"""Layers that cannot be stacked as one, because they are packed unlike: runs of consecutive layers that are alike.

A leaf of the decoder's params holds all layers, [L, ...], and has one structure. A file whose layers differ (Q4_K_M
has more bits in some, mixed-precision recipes too) is held as runs instead, each stacked and scanned on its own:

    layers/mlp/up_proj/kernel         [L, K, N]     all alike: the normal case
    layers/00/mlp/up_proj/kernel      [3, K, N]     layers 0, 1, 2
    layers/03/mlp/up_proj/kernel      [1, K, N]     layer 3, ...

so that the params themselves tell the runs, by the numbers of their first layers. Compiling takes as long for a run as
for a whole stack: what is traded for bits that vary is the time to compile.
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from jq4.qarray import is_qarray
from jq4.qarray_ops import slice_in_dim
from jq4.train import Adapters
from models.config import DecoderConfig

LAYERS = "layers"


def run_name(config: DecoderConfig, first: int) -> str:
    """The key of the run that begins with layer `first`; names sort as numbers do."""
    return str(first).zfill(len(str(config.num_layers - 1)))


def runs_of(params: Mapping[str, Any]) -> tuple[int, ...]:
    """The first layers of the runs that params are held in; empty where all layers are one stack."""
    layers = params.get("params", params).get(LAYERS, {}) if isinstance(params, Mapping) else {}
    named = isinstance(layers, Mapping) and bool(layers) and all(str(key).isdigit() for key in layers)
    return tuple(sorted(int(key) for key in layers)) if named else ()


def bounds(config: DecoderConfig, runs: Sequence[int]) -> list[tuple[int, int]]:
    """(first layer, the one after the last) of every run; of all layers where there are no runs."""
    return list(itertools.pairwise((*(runs or (0,)), config.num_layers)))


def alike_runs(kinds: Sequence[Any]) -> tuple[int, ...]:
    """The first layers of the runs of equal kinds, one kind a layer; empty where all are equal."""
    firsts = tuple(i for i, kind in enumerate(kinds) if i == 0 or kind != kinds[i - 1])
    return firsts if len(firsts) > 1 else ()


def in_runs(config: DecoderConfig, params: Mapping[str, Any], runs: Sequence[int]) -> dict[str, Any]:
    """The same params with a run beginning at each of these layers too, so that models in other runs compare."""
    if "params" in params:
        return {**params, "params": in_runs(config, params["params"], runs)}
    held = runs_of(params)
    cut = {}
    for first, pieces in _pieces(config, held, runs).items():
        tree = params[LAYERS][run_name(config, first)] if held else params[LAYERS]
        for start, stop in pieces:
            cut[run_name(config, start)] = _cut(tree, start - first, stop - first)
    return {**params, LAYERS: cut} if cut else dict(params)


def adapters_in_runs(config: DecoderConfig, adapters: Adapters, held: Sequence[int], runs: Sequence[int]) -> Adapters:
    """The adapters of params in the runs `held`, for the same params `in_runs`."""
    pieces = _pieces(config, held, runs)
    if not pieces:
        return adapters
    cut = {}
    for path, adapter in adapters.by_path.items():
        above, layers, inner = path.partition(f"{LAYERS}/")
        if not layers:
            cut[path] = adapter
            continue
        run, _, leaf = inner.partition("/") if held else ("0", "", inner)
        for start, stop in pieces[int(run)]:
            name = f"{above}{layers}{run_name(config, start)}/{leaf}"
            cut[name] = _cut(adapter, start - int(run), stop - int(run))
    return Adapters(cut)


def _pieces(config: DecoderConfig, held: Sequence[int], runs: Sequence[int]) -> dict[int, list[tuple[int, int]]]:
    """The first layer of each run that is held -> the bounds of those that it is cut into; nothing if all stay."""
    wanted = sorted({*(held or (0,)), *runs})
    if len(wanted) == 1 or tuple(wanted) == tuple(held):
        return {}
    return {
        first: list(itertools.pairwise((*(layer for layer in wanted if first <= layer < last), last)))
        for first, last in bounds(config, held)
    }


def _cut(tree: Any, start: int, stop: int) -> Any:
    def cut(leaf: Any) -> Any:
        return slice_in_dim(leaf, start, stop) if is_qarray(leaf) else leaf[start:stop]

    return jax.tree.map(cut, tree, is_leaf=is_qarray)
