"""A tree beside what it is used with: batches may lie on different devices, and each is computed where it lies."""

from collections.abc import Callable
from typing import Any

import jax
from jax.core import Tracer


def beside(tree: Any) -> Callable[[Any], Any]:
    """A function that gives the tree on the device of a batch; a copy for each device is made once."""
    copies: dict[Any, Any] = {}

    def on_device_of(batch: Any) -> Any:
        device = device_of(batch)
        if device is None:
            return tree
        if device not in copies:
            copies[device] = jax.device_put(tree, device) if device_of(tree) is not None else tree
        return copies[device]

    return on_device_of


def device_of(tree: Any) -> Any:
    """The one device that all of a tree's committed arrays are on; None where there is no such device."""
    arrays = [leaf for leaf in jax.tree.leaves(tree) if isinstance(leaf, jax.Array)]
    if any(isinstance(array, Tracer) for array in arrays):
        return None
    devices = {device for array in arrays if array.committed for device in array.devices()}
    return devices.pop() if len(devices) == 1 else None
