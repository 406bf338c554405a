"""Weights and blocks that are the same on every machine, for the tests of GGUF."""

import numpy as np

from jq4.checkpoint.foreign.gguf.block_types import BlockType


def hard_weights(rows: int = 16, length: int = 512) -> np.ndarray:
    """f32[rows, length] by exact arithmetic: long tails, one sign only, constants, zeros, ties, tiny and large."""
    i = np.arange(rows * length, dtype=np.uint64)
    mixed = (i * np.uint64(2654435761) + np.uint64(12345)) % np.uint64(2**32)
    mixed = (mixed ^ (mixed >> np.uint64(15))) * np.uint64(2246822519) % np.uint64(2**32)
    uniform = mixed.astype(np.float64) / 2**31 - 1
    weights = (uniform**3).astype(np.float32).reshape(rows, length)
    weights[1] = np.abs(weights[1])
    weights[2] = -np.abs(weights[2])
    weights[3] = 0
    weights[4] = 0.25
    weights[5] = -0.25
    weights[6, ::3] = 0
    weights[7] *= np.float32(2**-40)
    weights[8] *= np.float32(2**10)
    weights[9] = np.rint(weights[9] * 7) / 4
    weights[10] = 0
    weights[10, ::77] = 1
    weights[11] = uniform.reshape(rows, length)[11].astype(np.float32)
    return weights


def random_blocks(kind: BlockType, rows: int, count: int, seed: int = 0) -> np.ndarray:
    """u8[rows, count, nbytes]: random bytes, with factors that are numbers of ordinary size and of either sign."""
    random = np.random.default_rng(seed)
    blocks = random.integers(0, 256, (rows, count, kind.nbytes), np.uint8)
    if kind.name == "MXFP4":
        blocks[..., 0] = random.integers(1, 255, (rows, count))
        return blocks
    for at in [208] if kind.name == "Q6_K" else [0, 2] if kind.has_offset else [0]:
        blocks[..., at : at + 2] = random.normal(0, 1, (rows, count, 1)).astype(np.float16).view(np.uint8)
    return blocks
