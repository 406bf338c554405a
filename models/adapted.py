"""Adapters that belong to a folder of jq4's own: FOLDER/adapters, beside the packed weights that they are trained for.

The adapters' manifest names the data folder of those weights, which is named by its contents: adapters of other
weights, such as a save that was killed halfway or another model put over this one would leave, are refused, not used.
"""

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from jq4.checkpoint import orbax
from jq4.checkpoint.manifest import MANIFEST
from jq4.errors import JQ4Error
from jq4.record import Record
from jq4.train import restore_lora, save_lora, with_lora
from jq4.train.adapters.saved_adapters import abstract_lora

ADAPTERS = "adapters"


class WithAdapters:
    """A decoder's `apply` of {"params": (params, adapters)}, packed or dense, or of {"params": params} alone."""

    def __init__(self, apply: Callable[..., Any], shardings: Any = None) -> None:
        self._adapted = with_lora(apply, shardings=shardings)

    def __call__(self, variables: Any, *args: Any, **kwargs: Any) -> Any:
        weights = variables["params"]
        if not isinstance(weights, tuple):
            return self._adapted(variables, *args, **kwargs)
        params, adapters = weights
        return self._adapted(({"params": params}, adapters), *args, **kwargs)

    @property
    def record(self) -> Record:
        return self._adapted.record


def save_adapters(folder: Path, adapters: Any) -> None:
    """Writes the adapters of the weights that were just saved in `folder`; removes older ones where there are none."""
    if adapters is not None:
        save_lora(folder / ADAPTERS, adapters, source={"base": orbax.read_manifest(folder).data})
    elif (folder / ADAPTERS / MANIFEST).exists():
        shutil.rmtree(folder / ADAPTERS)


def adapters_of(folder: Path) -> Any:
    """The adapters of a folder's weights; None where it has none. Raises as `place_of` does."""
    place = place_of(folder)
    return None if place is None else restore_lora(place)


def abstract_adapters_of(folder: Path) -> Any:
    """The same with shapes in the place of arrays, none of which is read."""
    place = place_of(folder)
    return None if place is None else abstract_lora(place)


def place_of(folder: Path) -> Path | None:
    """Where the adapters of a folder's weights lie; None where it has none.

    Raises:
      JQ4Error: they were made for other weights than lie there now.
    """
    place = folder / ADAPTERS
    if not (place / MANIFEST).exists():
        return None
    source, here = orbax.read_manifest(place).source, orbax.read_manifest(folder).data
    base = source.get("base") if isinstance(source, Mapping) else None
    if base != here:
        raise JQ4Error(
            f"{place}: adapters of other weights ({base}) than lie in {folder} ({here}): train them anew, or remove "
            f"{place} to run the weights alone"
        )
    return place
