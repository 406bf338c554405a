"""What PTX instructions without memory compute, for all threads of a warpgroup at a time: numpy vectors of 128.

Registers hold bits: uint16, uint32 and uint64, or bool for predicates; an instruction's suffix says what they mean.
`OPERATIONS` maps a name's first word to a function of (suffixes, operands) -> result.
"""

from collections.abc import Callable, Sequence
from typing import Any

import ml_dtypes
import numpy as np

WIDTHS = {"b8": 8, "u8": 8, "s8": 8, "b16": 16, "u16": 16, "s16": 16, "f16": 16, "bf16": 16, "f16x2": 32, "bf16x2": 32}
WIDTHS |= {"b32": 32, "u32": 32, "s32": 32, "f32": 32, "b64": 64, "u64": 64, "s64": 64, "f64": 64, "pred": 1}
BITS: dict[int, Any] = {1: np.bool_, 8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}
SIGNED: dict[int, Any] = {16: np.int16, 32: np.int32, 64: np.int64}
HALVES: dict[str, Any] = {
    "f16x2": np.float16,
    "bf16x2": ml_dtypes.bfloat16,
    "f16": np.float16,
    "bf16": ml_dtypes.bfloat16,
}


def bits_type(suffix: str) -> Any:
    return BITS[WIDTHS[suffix]]


def as_type(value: np.ndarray, suffix: str) -> np.ndarray:
    """Bits as numbers of the suffix's type."""
    if suffix in HALVES:
        return value.view(np.uint16).reshape(len(value), -1).view(HALVES[suffix])
    if suffix in ("f32", "f64"):
        return value.view({"f32": np.float32, "f64": np.float64}[suffix])
    return value.view(SIGNED[WIDTHS[suffix]]) if suffix[0] == "s" else value


def as_bits(value: np.ndarray, suffix: str) -> np.ndarray:
    """Numbers as bits."""
    if suffix in HALVES:
        rounded = np.ascontiguousarray(value.astype(HALVES[suffix]))
        return rounded.view(np.uint16).reshape(len(value), -1).view(bits_type(suffix))[:, 0]
    return np.ascontiguousarray(value).view(bits_type(suffix))


def _numbers(function: Callable[..., np.ndarray]) -> Callable[..., np.ndarray]:
    """Of numbers of the last suffix's type; halves are computed in float64 and rounded once."""

    def run(suffixes: Sequence[str], operands: Sequence[np.ndarray]) -> np.ndarray:
        suffix = suffixes[-1]
        typed = [as_type(operand, suffix) for operand in operands]
        if suffix in HALVES:
            typed = [part.astype(np.float64) for part in typed]
        with np.errstate(over="ignore", invalid="ignore"):
            return as_bits(np.asarray(function(*typed)), suffix)

    return run


def _fma(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    wide = np.float64 if a.dtype.kind == "f" else a.dtype
    return (a.astype(wide) * b.astype(wide) + c.astype(wide)).astype(a.dtype)


def _multiply(suffixes: Sequence[str], operands: Sequence[np.ndarray]) -> np.ndarray:
    """mul.lo, mul.hi, mul.wide; mul of floats."""
    suffix = suffixes[-1]
    if suffix in HALVES or suffix.startswith("f"):
        return _numbers(np.multiply)(suffixes, operands)
    a, b = (as_type(operand, suffix) for operand in operands)
    width = WIDTHS[suffix]
    if suffixes[0] == "wide":
        wider = {16: "32", 32: "64"}[width]
        return as_bits(a.astype(f"i{int(wider) // 8}") * b.astype(f"i{int(wider) // 8}"), f"b{wider}")
    if suffixes[0] == "hi":
        high = [int(x) * int(y) >> width for x, y in zip(a, b, strict=True)]
        return np.array([value & (2**width - 1) for value in high], bits_type(suffix))
    with np.errstate(over="ignore"):
        return as_bits(a * b, suffix)


def _multiply_add(suffixes: Sequence[str], operands: Sequence[np.ndarray]) -> np.ndarray:
    a, b, c = operands
    with np.errstate(over="ignore"):
        return _multiply(suffixes, (a, b)) + c


def _shift(left: bool) -> Callable[..., np.ndarray]:
    def run(suffixes: Sequence[str], operands: Sequence[np.ndarray]) -> np.ndarray:
        value, by = as_type(operands[0], suffixes[-1]), operands[1].astype(np.int64)
        by = np.minimum(by, WIDTHS[suffixes[-1]] - 1) if not left else by
        return as_bits(
            np.left_shift(value, by.astype(value.dtype)) if left else np.right_shift(value, by.astype(value.dtype)),
            suffixes[-1],
        )

    return run


def _compare(suffixes: Sequence[str], operands: Sequence[np.ndarray]) -> np.ndarray:
    """setp.CMP[.BOOL].type: with a third operand, joined with it."""
    compare = {
        "eq": np.equal,
        "ne": np.not_equal,
        "lt": np.less,
        "le": np.less_equal,
        "gt": np.greater,
        "ge": np.greater_equal,
    }
    a, b = (as_type(operand, suffixes[-1]) for operand in operands[:2])
    result = compare[suffixes[0]](a, b)
    join = {"and": np.logical_and, "or": np.logical_or}
    return join[suffixes[1]](result, operands[2]) if len(operands) == 3 else result


def _select(suffixes: Sequence[str], operands: Sequence[np.ndarray]) -> np.ndarray:
    del suffixes
    return np.where(operands[2], operands[0], operands[1])


def _lookup(suffixes: Sequence[str], operands: Sequence[np.ndarray]) -> np.ndarray:
    """lop3: each bit of the result is that bit of the table which the three operands' bits count to."""
    del suffixes
    a, b, c, table = operands
    result = np.zeros_like(a)
    for index in range(8):
        if int(table[0]) >> index & 1:
            part = (a if index & 4 else ~a) & (b if index & 2 else ~b) & (c if index & 1 else ~c)
            result |= part
    return result


def _permute(suffixes: Sequence[str], operands: Sequence[np.ndarray]) -> np.ndarray:
    """prmt: four bytes chosen from the eight of b:a."""
    del suffixes
    both = operands[0].astype(np.uint64) | operands[1].astype(np.uint64) << np.uint64(32)
    result = np.zeros_like(operands[0])
    for place in range(4):
        choice = operands[2] >> np.uint32(4 * place) & np.uint32(15)
        byte = (both >> (choice & np.uint32(7)).astype(np.uint64) * np.uint64(8)).astype(np.uint8)
        sign = np.where(byte & 0x80, 0xFF, 0).astype(np.uint8)
        result |= np.where(choice & 8, sign, byte).astype(np.uint32) << np.uint32(8 * place)
    return result


def _difference(suffixes: Sequence[str], operands: Sequence[np.ndarray]) -> np.ndarray:
    """vabsdiff4.u32.u32.u32: |a - b| of four unsigned bytes; the third operand is what a masked one would keep."""
    assert tuple(suffixes) == ("u32", "u32", "u32"), f"vabsdiff4.{'.'.join(suffixes)}"
    a, b = (operand.view(np.uint8).astype(np.int16) for operand in operands[:2])
    return np.abs(a - b).astype(np.uint8).view(np.uint32)


def _field(suffixes: Sequence[str], operands: Sequence[np.ndarray]) -> np.ndarray:
    """bfe: bits [position, position + length)."""
    suffix, width = suffixes[-1], WIDTHS[suffixes[-1]]
    value, position, length = operands[0], int(operands[1][0]), int(operands[2][0])
    kept = as_type(value << bits_type(suffix)(width - position - length), suffix)
    return as_bits(kept >> kept.dtype.type(width - length), suffix)


def _convert(suffixes: Sequence[str], operands: Sequence[np.ndarray]) -> np.ndarray:
    """cvt[.rnd].to.from; two f32 become a pair of halves, the first in the high one."""
    to, kind = suffixes[-2:]
    if to.endswith("x2"):
        pair = np.stack([as_type(operands[1], kind), as_type(operands[0], kind)], -1)
        return as_bits(pair, to)
    value = as_type(operands[0], kind)
    value = value[:, 0] if kind in HALVES else value
    if to in HALVES:
        return as_bits(value[:, None], to)
    if to == "f32":
        return as_bits(value.astype(np.float32), to)
    assert not kind.startswith("f") and kind not in HALVES, f"cvt.{to}.{kind}"
    number = value.astype(np.int64) if kind[0] == "s" else value.astype(np.uint64)
    return number.astype(bits_type(to))


OPERATIONS: dict[str, Callable[[Sequence[str], Sequence[np.ndarray]], np.ndarray]] = {
    "add": _numbers(np.add), "sub": _numbers(np.subtract), "min": _numbers(np.minimum), "max": _numbers(np.maximum),
    "neg": _numbers(np.negative), "and": _numbers(np.bitwise_and), "or": _numbers(np.bitwise_or),
    "xor": _numbers(np.bitwise_xor), "not": _numbers(np.invert), "fma": _numbers(_fma), "mul": _multiply,
    "div": _numbers(np.floor_divide), "rem": _numbers(np.remainder),
    "mad": _multiply_add, "shl": _shift(left=True), "shr": _shift(left=False), "setp": _compare, "selp": _select,
    "lop3": _lookup, "prmt": _permute, "vabsdiff4": _difference, "bfe": _field, "cvt": _convert,
    "mov": lambda _, operands: operands[0], "cvta": lambda _, operands: operands[0],
}  # fmt: skip
