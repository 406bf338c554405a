"""Adapters as a checkpoint of jq4's own (jq4.checkpoint): A and B in Orbax, what they mean in the manifest.

    tree      PATH/OF/THE/LEAF/a, PATH/OF/THE/LEAF/b
    recipe    {"lora": {PATH: {"stacked": [-3], "inputs": [-2], "outputs": [-1], "alpha": 16.0, "rslora": false}}}

so that they are replaced whole or not at all, and checked byte by byte, as packed weights are. The layout that PEFT
reads and writes names modules of a model, and is models.peft's.
"""

from collections.abc import Mapping
from typing import Any

from jq4.checkpoint import orbax
from jq4.checkpoint.manifest import ArrayInfo, Manifest, abstract
from jq4.checkpoint.structure import nested
from jq4.errors import CheckpointError
from jq4.paths import flatten_with_paths
from jq4.shardings import Shardings
from jq4.train.adapters.adapter import Adapter, Adapters

_AXES = ("stacked", "inputs", "outputs")


def save_lora(path: Any, adapters: Adapters, *, source: Any = None, overwrite: bool = True) -> None:
    """Writes adapters as the folder `path`, whole or not at all; arguments as jq4.save's."""
    tree = nested({(*name.split("/"), part): getattr(each, part) for name, each in _items(adapters) for part in "ab"})
    described = {name: _described(each) for name, each in _items(adapters)}
    orbax.save(path, tree, recipe={"lora": described}, source=source, overwrite=overwrite)


def restore_lora(path: Any, *, shardings: Shardings = None) -> Adapters:
    """The adapters that `save_lora` wrote; shardings as jq4.restore takes them, by PATH/a and PATH/b.

    Raises:
      CheckpointError: for a folder that holds something else, or is damaged.
    """
    described = _descriptions(path, orbax.read_manifest(path))
    return _assembled(path, described, dict(flatten_with_paths(orbax.restore(path, shardings=shardings))))


def abstract_lora(path: Any) -> Adapters:
    """The adapters that `save_lora` wrote, with shapes in the place of A and B; no array is read.

    Raises:
      CheckpointError: for a folder that holds something else.
    """
    held = orbax.read_manifest(path)
    leaves = {leaf.path: abstract(leaf) for leaf in held.leaves if isinstance(leaf, ArrayInfo)}
    return _assembled(path, _descriptions(path, held), leaves)


def _descriptions(path: Any, held: Manifest) -> Mapping[str, Any]:
    """What the manifest says of each adapter."""
    described = held.recipe.get("lora") if isinstance(held.recipe, Mapping) else None
    if not isinstance(described, Mapping):
        raise CheckpointError(f"{path}: holds no adapters: wanted a folder that jq4.save_lora wrote")
    return described


def _assembled(path: Any, described: Mapping[str, Any], leaves: Mapping[str, Any]) -> Adapters:
    found = {}
    for name, each in described.items():
        try:
            axes = {key: tuple(map(int, each[key])) for key in _AXES}
            kept = {"alpha": float(each["alpha"]), "rslora": bool(each["rslora"])}
            found[name] = Adapter(leaves[f"{name}/a"], leaves[f"{name}/b"], **axes, **kept)
            _ = found[name].shape
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{path}: the adapter of {name} is not as it is described ({error!r})") from error
    return Adapters(found)


def _items(adapters: Adapters) -> list[tuple[str, Adapter]]:
    return list(adapters.by_path.items())


def _described(adapter: Adapter) -> dict[str, Any]:
    axes = {key: list(getattr(adapter, key)) for key in _AXES}
    return {**axes, "alpha": adapter.alpha, "rslora": adapter.rslora}
