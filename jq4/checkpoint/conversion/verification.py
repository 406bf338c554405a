"""Proves a conversion: the output is opened with jq4's own reader and compared with the source, weight by weight.

    same codes, scales, zero points, groups and order    the weights are equal, without unpacking them
    otherwise                                            both are dequantized a few rows at a time, in
                                                         float32, and the difference is measured

A weight that was declared lossless must differ by nothing (FP4's zero may change its sign). One that was not has its
error told. Dense weights are compared as numbers, in the wider dtype of the two.
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from jq4.checkpoint.conversion.difference import Difference
from jq4.checkpoint.conversion.proposal import Proposal, form_of
from jq4.checkpoint.conversion.slabs import slabs
from jq4.checkpoint.foreign.host_dequantize import dense_rows
from jq4.checkpoint.foreign.weights import Checkpoint, LazyWeight
from jq4.formats import get_format
from jq4.freed_pages import give_back_freed_pages, give_back_mapped_pages
from jq4.qarray import QArray, is_qarray

MISSING, LEFT_OUT = "missing", "left out"


@dataclasses.dataclass(frozen=True)
class Verified:
    """One weight of the source, as the output holds it.

    Attributes:
      loss: what was declared lost; "" for nothing.
      found: the form that was read again, MISSING, or LEFT_OUT where that was declared.
      same_codes, same_scales: None where the forms have no codes in common to compare.
      largest, relative: max |w' - w|, and |w' - w| / |w|; None where there is nothing to compare.
    """

    name: str
    loss: str
    found: str
    same_codes: bool | None = None
    same_scales: bool | None = None
    largest: float | None = None
    relative: float | None = None

    @property
    def holds(self) -> bool:
        """Whether it is what was declared."""
        return self.found == LEFT_OUT or (self.found != MISSING and (bool(self.loss) or self.largest == 0))


def verify(
    source: Checkpoint, output: Checkpoint, proposal: Proposal, progress: Callable[[int, int], None]
) -> list[Verified]:
    """Compares every weight of the source with the output's of the same name."""
    verified = []
    for i, planned in enumerate(proposal.planned):
        progress(i, len(proposal.planned))
        name = planned.weight.name
        found = next((held for one in _names(name, source) if (held := output.weights.get(one)) is not None), None)
        if not planned.tensors:
            verified.append(Verified(name, planned.loss, LEFT_OUT))
        elif found is None or found.shape != planned.weight.shape:
            verified.append(Verified(name, planned.loss, MISSING))
        else:
            verified.append(_compared(source.weights[name], found, planned.loss))
    return verified


def _names(name: str, source: Checkpoint) -> tuple[str, ...]:
    """What a weight may be called in the output: a tied head is the embedding, experts are modules or parameters."""
    twins = {"lm_head.weight": "model.embed_tokens.weight", "model.embed_tokens.weight": "lm_head.weight"}
    tied = (source.config or {}).get("tie_word_embeddings") and name in twins
    other = name.removesuffix(".weight") if name.endswith(".weight") else f"{name}.weight"
    return (name, twins[name] if tied else other)


def _compared(weight: LazyWeight, found: LazyWeight, loss: str) -> Verified:
    codes, scales, difference = None, None, Difference()
    for wanted_value, found_value in _in_slabs(weight, found):
        same_codes, same_scales = _same_parts(wanted_value, found_value)
        codes, scales = _both(codes, same_codes), _both(scales, same_scales)
        if not (same_codes and same_scales):
            for (_, block), (_, other) in zip(dense_rows(found_value), dense_rows(wanted_value), strict=True):
                difference.add(block, other)
                for value in (wanted_value, found_value):
                    give_back_mapped_pages(value)
        give_back_freed_pages()
    return Verified(weight.name, loss, form_of(found), codes, scales, difference.largest, difference.relative)


def _in_slabs(weight: LazyWeight, found: LazyWeight) -> Iterator[tuple[Any, Any]]:
    """Both, or where both can be read by rows a slab of them at a time."""
    if weight.read_rows is None or found.read_rows is None:
        yield weight.read(), found.read()
        return
    for rows in slabs(weight.shape, weight.nbytes + found.nbytes):
        yield weight.read_rows(rows), found.read_rows(rows)


def _both(one: bool | None, other: bool | None) -> bool | None:
    """None before there is anything to compare."""
    return other if one is None else one and other


def _same_parts(one: Any, other: Any) -> tuple[bool | None, bool | None]:
    """Whether two packed weights have the same codes (and zero points, order), and the same scales (and offsets)."""
    if not (is_qarray(one) and is_qarray(other)):
        return None, None
    length = one.shape[one.axis]
    if (one.format, one.axis, min(one.group_size, length)) != (other.format, other.axis, min(other.group_size, length)):
        return None, None
    codes = (
        _equal(one.codes, other.codes)
        and _equal(*(_zero_points(each) for each in (one, other)))
        and _equal(one.permutation, other.permutation)
    )
    named = ("scale", "offset", "input_scale", "activation_scale")
    return codes, all(_equal(getattr(one, name), getattr(other, name)) for name in named)


def _zero_points(q: QArray) -> Any:
    """An integer format's zero points, its center where it has none."""
    return q.zero_point if q.zero_point is not None else np.uint8(get_format(q.format).center)


def _equal(one: Any, other: Any) -> bool:
    """Whether two parts hold the same numbers; one may be spelled out where the other is broadcast."""
    if one is None or other is None:
        return one is other
    if is_qarray(one) or is_qarray(other):
        both = is_qarray(one) and is_qarray(other)
        return both and all(codes_and_scales is True for codes_and_scales in _same_parts(one, other))
    one, other = np.asarray(one), np.asarray(other)
    try:
        shape = np.broadcast_shapes(one.shape, other.shape)
    except ValueError:
        return False
    if one.dtype != other.dtype:
        one, other = one.astype(np.float64), other.astype(np.float64)
    return bool(np.array_equal(np.broadcast_to(one, shape), np.broadcast_to(other, shape)))
