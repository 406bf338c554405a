"""Products of real models by name: what tests, benchmarks and tuning measure. Sizes from the models' config.json.

MODEL/qkv_proj   hidden -> (heads + 2 kv_heads) * head_dim       MODEL/o_proj      heads * head_dim -> hidden
MODEL/gate_up    hidden -> 2 * intermediate                      MODEL/gate_proj   hidden -> intermediate (up alike)
MODEL/down_proj  intermediate -> hidden                          odd/...           sizes that fit no tile
"""

from typing import NamedTuple


class Shape(NamedTuple):
    """K rows (contracted), N columns of a weight."""

    k: int
    n: int


class _Model(NamedTuple):
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int

    def shapes(self) -> dict[str, Shape]:
        return {
            "qkv_proj": Shape(self.hidden, (self.heads + 2 * self.kv_heads) * self.head_dim),
            "o_proj": Shape(self.heads * self.head_dim, self.hidden),
            "gate_up": Shape(self.hidden, 2 * self.intermediate),
            "gate_proj": Shape(self.hidden, self.intermediate),
            "down_proj": Shape(self.intermediate, self.hidden),
        }


_MODELS = {
    "llama-3.2-1b": _Model(2048, 8192, 32, 8, 64),
    "qwen3-4b": _Model(2560, 9728, 32, 8, 128),
    "llama-3-8b": _Model(4096, 14336, 32, 8, 128),
    "llama-3-70b": _Model(8192, 28672, 64, 8, 128),
    "llama-2-7b": _Model(4096, 11008, 32, 32, 128),
    "qwen3-32b": _Model(5120, 25600, 64, 8, 128),
    "gemma-3-27b": _Model(5376, 21504, 32, 16, 128),
}

SHAPES: dict[str, Shape] = {
    "square": Shape(4096, 4096),
    **{f"{name}/{part}": shape for name, model in _MODELS.items() for part, shape in model.shapes().items()},
    "odd/short-group": Shape(4000, 4000),
    "odd/prime": Shape(1021, 509),
}

DECODE_ROWS = (1, 16)
PREFILL_ROWS = (512, 2048)
