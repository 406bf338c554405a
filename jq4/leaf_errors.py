"""What each packed weight lost, slice by slice: in itself, and in the outputs it makes.

For a weight W[K, N], its approximation W' and D = W - W':

    SQNR            10 log10(sum W**2 / sum D**2)                                dB; every weight counts alike
    output error    tr(D^T H D) / tr(W^T H W) = E|x D|**2 / E|x W|**2            0: nothing lost; 1: all

with H = E[x x^T] over the inputs x that the weight met (jq4.observe). The second is what a layer's output lost, and
what GPTQ (Frantar et al. 2022) minimizes. Where H was not collected, its diagonal E[x**2] stands in: exact for inputs
that are uncorrelated, an estimate otherwise; `weighting` says which it was. Leaves stacked by layers or experts give
one figure a slice, and a figure of all slices together: the ratio of the sums.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jq4.errors import JQ4Error
from jq4.paths import find_path, flatten_with_paths
from jq4.qarray import is_qarray
from jq4.sqnr import as_float32, common_unit, decibels

HESSIAN, MEAN_SQUARE = "hessian", "mean_square"
HESSIAN_BYTES = 2**28  # of one leaf, above which its diagonal is collected instead


@dataclasses.dataclass(frozen=True)
class SliceError:
    """One slice of a leaf, at `index` along the leaf's stacked axes; () where it has none."""

    index: tuple[int, ...]
    sqnr_db: float
    output_error: float | None = None
    rows: int | None = None


@dataclasses.dataclass(frozen=True)
class LeafError:
    """A leaf, and its slices where it is stacked.

    Attributes:
      output_error: None where nothing is known of the leaf's inputs.
      weighting: "hessian" (exact) or "mean_square" (its diagonal), or None.
      features: K, the inputs of the weight, where statistics tell it.
      slices: in row-major order of their index.
    """

    path: str
    sqnr_db: float
    output_error: float | None = None
    weighting: str | None = None
    features: int | None = None
    slices: tuple[SliceError, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """Plain data."""
        return dataclasses.asdict(self)


def leaf_errors(
    dense: Any, packed: Any, stats: Any = None, progress: Callable[[int, int], None] | None = None
) -> list[LeafError]:
    """The error of every leaf that is packed in `packed` and dense in `dense`, trees of the same paths.

    Raises:
      JQ4Error: for a packed leaf whose path or shape is not in `dense`.
    """
    exact = dict(flatten_with_paths(dense))
    pairs = [(path, leaf) for path, leaf in flatten_with_paths(packed) if is_qarray(leaf)]
    found = []
    for done, (path, leaf) in enumerate(pairs, 1):
        if path not in exact:
            raise JQ4Error(f"{path}: is packed in the model and not in its reference; give the model it was made from")
        found.append(error_of(path, exact[path], leaf, find_path(stats or {}, path), axis=leaf.axis))
        if progress is not None:
            progress(done, len(pairs))
    return found


def error_of(path: str, weight: Any, approximation: Any, statistics: Any = None, *, axis: int) -> LeafError:
    """The error of one leaf; arrays or QArrays. `axis` is the contracted one, negative."""
    if tuple(weight.shape) != tuple(approximation.shape):
        raise JQ4Error(f"{path}: shape {tuple(approximation.shape)}, but {tuple(weight.shape)} in the reference")
    energies = energies_of(weight, approximation, statistics, axis=axis)
    return error_from(path, energies, weight.shape, statistics, axis=axis)


def energies_of(weight: Any, approximation: Any, statistics: Any = None, *, axis: int) -> dict[str, np.ndarray]:
    """Sums over each slice, f64[*B]: of W**2 and D**2, and of the outputs they make where statistics fit the leaf."""
    statistics = statistics if fits_leaf(weight.shape, axis, statistics) else None
    shape = matrix_shape(weight.shape, axis, statistics)
    unit, energies = jax.device_get(_energies(weight, approximation, _moments(statistics), shape=shape, axis=axis))
    return {name: in_ones(value, unit) for name, value in energies.items()}


def in_ones(energy: Any, unit: Any) -> np.ndarray:
    """f64: energies f32 of numbers in a unit; nan where that is infinite."""
    with np.errstate(invalid="ignore"):
        return np.asarray(energy, np.float64) * np.float64(unit) ** 2


def error_from(
    path: str, energies: Mapping[str, np.ndarray], shape: tuple[int, ...], statistics: Any = None, *, axis: int
) -> LeafError:
    """What the energies of a leaf of `shape`, of all of its slices, say."""
    statistics = statistics if fits_leaf(shape, axis, statistics) else None
    *leading, features, _ = matrix_shape(shape, axis, statistics)
    rows = None if statistics is None else np.asarray(statistics.count)
    slices = tuple(
        SliceError(index, *_ratios(energies, index), None if rows is None else int(rows[index]))
        for index in np.ndindex(*leading)
    )
    summed = {name: value.sum() for name, value in energies.items()}
    return LeafError(
        path, *_ratios(summed, ()), _weighting(statistics), None if statistics is None else features,
        slices if leading else (),
    )  # fmt: skip


def collect_hessians(
    params: Any, axes: Mapping[str, int], limit: int = HESSIAN_BYTES
) -> Callable[[str], tuple[str, ...]]:
    """For jq4.observe's `collect`: a leaf's Hessian where it takes at most `limit` bytes, else its diagonal."""
    shapes = {path: tuple(leaf.shape) for path, leaf in flatten_with_paths(params)}

    def collect(path: str) -> tuple[str, ...]:
        shape, axis = shapes[path], axes.get(path)
        if axis is None or len(shape) < 2:
            return (MEAN_SQUARE,)
        needed = 4 * math.prod(shape[: len(shape) + min(axis, -2)]) * shape[axis] ** 2
        return (MEAN_SQUARE, HESSIAN) if needed <= limit else (MEAN_SQUARE,)

    return collect


def fits_leaf(shape: Any, axis: int, statistics: Any) -> bool:
    """Whether statistics are of the axes of a leaf that end with `axis`, slice by slice."""
    if statistics is None or not (features := _features(statistics)):
        return False
    if not statistics.tells_axes(tuple(shape), axis):
        return False
    leading = tuple(statistics.count.shape)
    return tuple(shape[: len(leading)]) == leading and _features_span(tuple(shape), axis, features) is not None


def matrix_shape(shape: Any, axis: int, statistics: Any) -> tuple[int, ...]:
    """[*B, K, N]: as the statistics see a leaf, or as its last two axes tell."""
    features = shape[axis] if statistics is None else _features(statistics)
    stacked = max(0, len(shape) + min(axis, -2)) if statistics is None else statistics.count.ndim
    leading = tuple(shape[:stacked])
    return (*leading, features, math.prod(shape) // (math.prod(leading) * features))


def _features(statistics: Any) -> int:
    """K, or 0 where nothing but rows was counted."""
    known = (statistics.square_total, statistics.outer_total, statistics.total, statistics.absmax)
    return next((int(sums.shape[-1]) for sums in known if sums is not None), 0)


def _features_span(shape: tuple[int, ...], axis: int, features: int) -> int | None:
    """How many axes, ending with `axis`, make up the features; a DenseGeneral's [H, D, O] has two."""
    size = 1
    for count in range(1, len(shape) + axis + 2):
        size *= shape[axis - count + 1]
        if size == features:
            return count
    return None


def _weighting(statistics: Any) -> str | None:
    """What is known of the inputs."""
    if statistics is None:
        return None
    if statistics.outer_total is not None:
        return HESSIAN
    return None if statistics.square_total is None else MEAN_SQUARE


def _moments(statistics: Any) -> jax.Array | None:
    """H f32[*B, K, K], or its diagonal f32[*B, K]."""
    known = _weighting(statistics)
    return None if known is None else getattr(statistics, known)


@functools.partial(jax.jit, static_argnames=("shape", "axis"))
def _energies(
    weight: Any, approximation: Any, moments: jax.Array | None, *, shape: tuple[int, ...], axis: int
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """(a unit f32[], the energies of weights in that unit, f32[*B]), so that no square overflows."""
    exact, near = (as_matrices(as_float32(leaf), shape, axis) for leaf in (weight, approximation))  # f32[*B, K, N]
    unit = common_unit(exact, near)
    exact, lost = exact / unit, (exact - near) / unit
    energies = {"signal": jnp.sum(exact**2, (-2, -1)), "noise": jnp.sum(lost**2, (-2, -1))}
    if moments is not None:
        energies |= {"output_signal": _output_energy(exact, moments), "output_noise": _output_energy(lost, moments)}
    return unit, energies


def as_matrices(weight: jax.Array, shape: tuple[int, ...], axis: int) -> jax.Array:
    """A leaf as [*B, K, N]: its feature axes, which end with `axis`, moved behind the stacked ones."""
    leading, span = len(shape) - 2, _features_span(weight.shape, axis, shape[-2])
    assert span is not None
    features = [weight.ndim + axis - span + 1 + i for i in range(span)]
    return jnp.moveaxis(weight, features, range(leading, leading + span)).reshape(shape)


def _output_energy(weight: jax.Array, moments: jax.Array) -> jax.Array:
    """E|x W|**2 of each slice, f32[*B], for W[*B, K, N] and H[*B, K, K] or its diagonal [*B, K]."""
    if moments.ndim == weight.ndim:
        made = jnp.einsum("...kl,...ln->...kn", moments, weight, precision="highest")
        return jnp.maximum(jnp.sum(weight * made, (-2, -1)), 0.0)
    return jnp.sum(moments[..., None] * weight**2, (-2, -1))


def _ratios(energies: Mapping[str, np.ndarray], index: tuple[int, ...]) -> tuple[float, float | None]:
    """(SQNR in dB, output error) of one slice; a weight whose inputs were all zero has no output error."""
    signal, noise = energies["signal"][index], energies["noise"][index]
    sqnr_db = decibels(signal, noise)
    if "output_signal" not in energies or energies["output_signal"][index] == 0:
        return sqnr_db, None
    return sqnr_db, float(energies["output_noise"][index] / energies["output_signal"][index])
