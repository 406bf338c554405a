"""g_idx: which group each input row of a GPTQ weight belongs to, and the permutation that makes groups contiguous.

    w[k, n] = scale[g_idx[k], n] * (code[k, n] - zero[g_idx[k], n])

With act-order (`desc_act`) GPTQ fits the rows in order of importance and gives groups in that order, so that g_idx is
not sorted. A stable sort of the rows by group gives blocks of group_size, which is what a QArray holds: packed row j is
the weight's row permutation[j]. Nothing is lost, and the way back is g_idx[permutation[j]] = j // group_size.

Entries may be negative (-1 is the last group), as in Python; all -1 is "never set" in compressed-tensors. Where the
sorted groups are not whole blocks (but for a short last one) there is no QArray for the weight, and it is refused.
"""

import numpy as np

from jq4.checkpoint.foreign.bit_strings import unpack
from jq4.checkpoint.foreign.partners import contradiction
from jq4.checkpoint.foreign.row_blocks import packed_by_rows
from jq4.checkpoint.safetensors_files import StoredTensor


def permutation_of(stored: StoredTensor, length: int, group_size: int) -> np.ndarray | None:
    """i32[K] that sorts the rows into groups; None where they are sorted. Raises JQ4Error for what no QArray holds."""
    groups = -(-length // group_size)
    wanted = (np.arange(length) // group_size).astype(np.int64)
    if stored.dtype not in ("I32", "I64") or stored.shape != (length,):
        raise contradiction(stored, f"I32[{length}], the group of each input")
    found = np.asarray(stored.read()).astype(np.int64)
    if np.array_equal(found, wanted) or (found == -1).all():
        return None
    found = np.where(found < 0, found + groups, found)
    order = np.argsort(found, kind="stable")
    if not np.array_equal(found[order], wanted):
        raise contradiction(
            stored,
            f"{groups} groups 0 to {groups - 1} of {group_size} inputs each (but for a short last one)",
            "Its groups are of other sizes, which cannot be packed; dequantize it with the software that wrote it.",
        )
    return None if np.array_equal(order, np.arange(length)) else order.astype(np.int32)


def sorted_by_group(
    codes: np.ndarray, bits: int, stored: StoredTensor, length: int, group_size: int
) -> tuple[np.ndarray, np.ndarray]:
    """(packed codes u8[N, bytes(K)] with each group's together, the permutation i32[K] that was done)."""
    permutation = permutation_of(stored, length, group_size)
    if permutation is None:
        permutation = np.arange(length, dtype=np.int32)
    return reordered(codes, bits, permutation), permutation


def group_index(length: int, group_size: int, permutation: np.ndarray | None = None) -> np.ndarray:
    """g_idx i32[K] of rows that are sorted by `permutation`."""
    groups = (np.arange(length) // group_size).astype(np.int32)
    if permutation is None:
        return groups
    index = np.empty_like(groups)
    index[permutation] = groups
    return index


def reordered(codes: np.ndarray, bits: int, order: np.ndarray) -> np.ndarray:
    """Packed codes u8[N, bytes(K)] with code j taken from place order[j]."""

    def moved(rows: slice) -> np.ndarray:
        return np.take(unpack(codes[rows], bits, len(order)), order, axis=1)

    return packed_by_rows((len(codes), len(order)), bits, moved)
