"""What may be saved: every leaf is checked before anything is written, and named where it cannot be."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jq4.checkpoint.deferred import Deferred
from jq4.checkpoint.manifest import DTYPES, PARTS
from jq4.errors import CheckpointError, JQ4Error
from jq4.qarray import NEUTRAL, QArray, is_qarray, validate


def is_scalar(leaf: Any) -> bool:
    """A Python scalar or string, kept in the manifest; numpy's scalars are arrays."""
    return isinstance(leaf, bool | int | float | str) and not isinstance(leaf, np.generic)


def check_leaf(path: str, leaf: Any) -> None:
    """Raises CheckpointError, naming `path`, unless `leaf` can be saved as it is."""
    if is_qarray(leaf):
        _check_qarray(path, leaf)
    elif not is_scalar(leaf) and not isinstance(leaf, Deferred):  # which is checked once it is made
        _check_array(path, leaf)


def _check_qarray(path: str, leaf: QArray) -> None:
    for name in PARTS:
        part = getattr(leaf, name)
        if is_qarray(part):
            _check_qarray(f"{path}/{name}", part)
        elif part is not None:
            if leaf.layout == NEUTRAL:  # prepared codes may be int4 in memory, and are bytes again when they are saved
                _check_array(f"{path}/{name}", part)
            if (
                name in ("scale", "offset", "input_scale", "activation_scale")
                and not np.isfinite(np.asarray(part).astype(np.float32)).all()
            ):
                raise CheckpointError(
                    f"{path}: its {name} holds NaN or infinity; quantize it again from finite weights"
                )
    if leaf.layout == NEUTRAL:
        try:
            validate(leaf, path)
        except JQ4Error as error:
            raise CheckpointError(str(error)) from error


def _check_array(path: str, leaf: Any) -> None:
    if isinstance(leaf, Tracer):
        raise CheckpointError(f"{path}: found a traced array; save outside of jit")
    if not isinstance(leaf, jax.Array | np.ndarray | np.generic):
        raise CheckpointError(
            f"{path}: found a {type(leaf).__name__}, wanted an array, a QArray, a number or a string; take it out of "
            "the tree before saving"
        )
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        raise CheckpointError(f"{path}: found a PRNG key; save jax.random.key_data(key), or leave it out of the tree")
    if jnp.dtype(leaf.dtype).name not in DTYPES:
        raise CheckpointError(
            f"{path}: found an array of {leaf.dtype}, wanted one of {', '.join(sorted(DTYPES))}; pack 4-bit "
            "weights as a QArray (jq4.quantize), or cast it"
        )


def as_saved(leaf: Any) -> Any:
    """The leaf with jax and numpy arrays alone in it; a QArray in the neutral layout."""
    if is_qarray(leaf) and leaf.layout != NEUTRAL:
        from jq4.layouts import to_neutral

        leaf = to_neutral(leaf)
    return jax.tree.map(lambda array: array if isinstance(array, jax.Array) else np.asarray(array), leaf)
