"""A block of one linear layer, for the tests of learned rounding."""

import itertools
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

import jq4


def as_block(kernel: Any) -> Any:
    return {"layers": {"kernel": jnp.asarray(kernel) if isinstance(kernel, np.ndarray) else kernel}}


def linear(tree: Any, index: Any, x: Any) -> Any:
    return x @ tree["layers"]["kernel"]


def heavy_tailed(*shape: int) -> Any:
    return np.random.default_rng(0).standard_t(4, shape).astype(np.float32) * np.float32(0.05)


def problem(name: str = "rtn-w4g32") -> Any:
    """(dense block, packed block, inputs, targets), the inputs depending on each other."""
    random = np.random.default_rng(5)
    inputs = (random.standard_normal((12, 16, 6)) @ random.standard_normal((6, 64))).astype(np.float32)
    weight = heavy_tailed(64, 24)
    return as_block(weight), as_block(jq4.quantize({"kernel": weight}, name)["kernel"]), inputs, inputs @ weight


def error_of(packed: Any, inputs: np.ndarray, targets: np.ndarray) -> Any:
    return np.square(inputs @ np.asarray(packed["layers"]["kernel"].dequantize()) - targets).mean(dtype=np.float64)


class SmallLayer(NamedTuple):
    """8 weights, dense and packed, their inputs and targets, and the errors of all 2**8 roundings, the least first."""

    dense: Any
    packed: Any
    inputs: np.ndarray
    targets: np.ndarray
    weight: np.ndarray
    errors: list[float]

    def error(self, block: Any) -> float:
        return _error(np.asarray(block["layers"]["kernel"].dequantize()), self.weight, self.inputs)


def small_layer(seed: int) -> SmallLayer:
    """On inputs so correlated that to round to nearest is far from best."""
    random = np.random.default_rng(seed)
    inputs = (random.standard_normal((16, 16, 1)) @ random.standard_normal((1, 8))).astype(np.float32)
    inputs += 0.3 * random.standard_normal(inputs.shape).astype(np.float32)
    weight = random.uniform(-0.9, 0.9, (8, 1)).astype(np.float32)
    packed = as_block(jq4.quantize({"kernel": weight}, "rtn-w4gc")["kernel"])
    scale = np.asarray(packed["layers"]["kernel"].scale, np.float32)
    low = np.floor(weight / scale)
    rounded = [low + np.asarray(up, np.float32)[:, None] for up in itertools.product((0, 1), repeat=8)]
    errors = sorted(_error(np.clip(codes, -8, 7) * scale, weight, inputs) for codes in rounded)
    return SmallLayer(as_block(weight), packed, inputs, inputs @ weight, weight, errors)


def _error(kernel: np.ndarray, weight: np.ndarray, inputs: np.ndarray) -> Any:
    return np.square(inputs @ (kernel - weight)).mean()
