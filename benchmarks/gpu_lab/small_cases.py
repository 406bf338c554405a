"""The matrix of products that the compile lab emulates: forms, formats and tails, small enough for that."""

import itertools
from typing import Any

from benchmarks.gpu_lab.cases import Case


def small_cases() -> list[Case]:
    return [
        *dense_cases(), *grouped_cases(), *wide_cases(), *byte_cases(), *transposed_cases(), *mma_cases("a100"),
        *mma_cases("l40s"),
    ]  # fmt: skip


def dense_cases() -> list[Case]:
    """One weight of 4 bits by floats."""
    plans: list[dict[str, Any] | None] = [
        None,
        {"form": "sums", "tile_m": 16, "tile_k": 128, "strips": 2, "splits": 2},
        {"form": "sums", "tile_m": 8, "tile_k": 256, "stages": 2},
        {"form": "weights", "tile_m": 128, "warpgroups": 2, "tile_k": 64, "stages": 3},
        {"form": "weights", "tile_m": 16, "warpgroups": 3, "tile_k": 256, "stages": 4},
        {"form": "sums", "tile_m": 32, "warpgroups": 1, "strips": 2, "splits": 2},
    ]
    sizes = [(1, 300, 64), (1, 512, 320), (20, 300, 320), (20, 512, 64)]
    chosen = [Case(*size, g, z) for size, g, z in itertools.product(sizes, (32, 64, 128, 0), (False, True))]
    planned = [Case(20, 640, 192, 128, zeros, plan=plan) for plan, zeros in itertools.product(plans[1:], (False, True))]
    halves = [
        Case(9, 256, 128, group, True, "float16", scales) for group in (32, 128) for scales in ("float16", "float32")
    ]
    return [*chosen, *planned, *halves, Case(20, 768, 128, 384, True)]


def grouped_cases() -> list[Case]:
    """Experts: tiles of several experts, experts without rows, rows without one, splits, forms."""
    split = {"form": "sums", "tile_m": 8, "tile_k": 128, "splits": 2}
    deep = {"form": "weights", "tile_m": 16, "warpgroups": 2, "tile_k": 128, "strips": 1, "stages": 3}
    return [
        *(Case(m, 256, 64, g, z, experts=4) for m, g, z in itertools.product((3, 40), (32, 128, 0), (False, True))),
        Case(30, 300, 320, 64, True, experts=5),
        Case(24, 512, 128, 128, True, plan=split, experts=3),
        Case(50, 256, 192, 64, plan=deep, experts=3),
        Case(20, 256, 128, 64, True, experts=3, bits=8),
        Case(20, 256, 128, 64, True, experts=3, fits="int8"),
        Case(20, 256, 128, 64, True, experts=3, fits="float8_e4m3fn"),
        Case(9, 256, 64, 128, True, "float16", "float32", experts=2),
    ]


def wide_cases() -> list[Case]:
    """Codes of 8 bits."""
    split = {"form": "sums", "tile_m": 16, "tile_k": 128, "strips": 1, "splits": 2}
    weights = {"form": "weights", "tile_m": 128, "warpgroups": 2, "tile_k": 64, "stages": 3}
    chosen = itertools.product((32, 128, 0), (False, True), ("bfloat16", "float16"))
    planned = itertools.product((split, weights), (False, True))
    return [
        *(Case(20, 300, 128, group, zeros, dtype, bits=8) for group, zeros, dtype in chosen),
        *(Case(20, 640, 192, 128, zeros, plan=plan, bits=8) for plan, zeros in planned),
        Case(1, 512, 320, 64, True, bits=8),
    ]


def byte_cases() -> list[Case]:
    """Rows of int8 and e4m3, by codes of 4 bits, and of int8 by codes of 8 without zero points."""
    kinds = [(4, False, "int8"), (4, True, "int8"), (8, False, "int8")]
    kinds += [(4, False, "float8_e4m3fn"), (4, True, "float8_e4m3fn")]
    sizes = [(20, 300, group) for group in (64, 128, 0)] + [(1, 512, 128), (130, 300, 64), (130, 300, 0)]
    chosen = [
        Case(m, k, 128, group, zeros, bits=bits, fits=fits)
        for (m, k, group), (bits, zeros, fits) in itertools.product(sizes, kinds)
    ]
    split, deep = {"form": "sums", "tile_m": 16, "splits": 2}, {"form": "sums", "tile_m": 8, "tile_k": 256, "strips": 2}
    planned = [Case(20, 640, 192, 128, True, plan=split, fits=fits) for fits in ("int8", "float8_e4m3fn")]
    longer = [Case(5, 1024, 320, group, True, plan=deep, fits="float8_e4m3fn") for group in (64, 256, 0)]
    return [*chosen, *planned, *longer]


def transposed_cases() -> list[Case]:
    """Products by the transpose: x is dy."""
    split = {"form": "transposed", "tile_m": 16, "tile_k": 128, "warpgroups": 2, "stages": 3, "splits": 2}
    chosen = itertools.product((32, 64, 128, 0), (False, True))
    return [
        *(Case(20, 300, 320, group, zeros, transposed=True) for group, zeros in chosen),
        Case(1, 300, 64, 128, True, transposed=True),
        Case(130, 256, 192, 256, True, transposed=True),
        Case(20, 200, 128, 64, True, bits=8, transposed=True),
        Case(20, 200, 128, 64, True, "float16", "float32", transposed=True),
        Case(20, 256, 640, 128, True, plan=split, transposed=True),
        Case(40, 256, 192, 64, True, experts=4, transposed=True),
        Case(24, 200, 320, 128, plan=split | {"tile_m": 8}, experts=3, transposed=True),
    ]


def mma_cases(device: str) -> list[Case]:
    """The products of Ampere and Ada: every block of gpu_blocks_mma.py, and those that are chosen."""
    sizes = [(1, 300, 64), (1, 512, 320), (20, 300, 320), (70, 512, 128)]
    chosen = itertools.product(sizes, (32, 64, 128, 0), (False, True))
    wide = itertools.product((32, 128, 0), (False, True), ("bfloat16", "float16"))
    halves = itertools.product((32, 128), ("float16", "float32"))
    blocks: list[tuple[str, int, int, int]] = [  # form, rows, strips, depth
        *(("sums", rows, strips, 256) for rows in (8, 16) for strips in (1, 2)),
        *(("sums", 32, 2, 128), ("sums", 64, 1, 128), ("weights", 16, 2, 256), ("weights", 64, 2, 128)),
        *(("weights", 128, 1, 128), ("column", 64, 2, 128), ("column", 128, 1, 128)),
    ]
    return [
        *(Case(*size, group, zeros, device=device) for size, group, zeros in chosen),
        *(Case(20, 300, 128, group, zeros, dtype, bits=8, device=device) for group, zeros, dtype in wide),
        *(Case(9, 256, 128, group, True, "float16", scales, device=device) for group, scales in halves),
        *(
            Case(40, 512, 128, _group_of(form), True, plan=mma_plan(form, *block), device=device)
            for form, *block in blocks
        ),
        Case(20, 768, 128, 384, True, device=device),
        Case(20, 768, 128, 128, True, plan=mma_plan("sums", 16, 2, 128) | {"splits": 3}, device=device),
    ]


def _group_of(form: str) -> int:
    return 0 if form == "column" else 128


def mma_plan(form: str, tile_m: int, strips: int, tile_k: int) -> dict[str, Any]:
    return {"form": form, "tile_m": tile_m, "warpgroups": 1, "tile_k": tile_k, "stages": 2, "strips": strips}
