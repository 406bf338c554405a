"""What a conversion will do, said before anything is read: each weight's form, what is lost, and what cannot be.

Writers plan a weight from its description alone (jq4.checkpoint.foreign.writing), so all of this is known from
headers. A weight that the target cannot hold is an error that names it, unless it may be rounded again, to the nearest
form of the target (jq4.checkpoint.conversion.requantize); then it counts as lost, and by how much is measured while it
is made.
"""

import dataclasses
import importlib
import re
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from jq4.checkpoint.conversion import dense, orbax_files
from jq4.checkpoint.conversion.layout import nbytes_of
from jq4.checkpoint.conversion.requantize import MXFP4, Requantizer
from jq4.checkpoint.conversion.unpacked import plan_dense, wants_dense
from jq4.checkpoint.foreign.weights import Checkpoint, LazyWeight
from jq4.checkpoint.foreign.writing import WRITERS, Planned, Writer
from jq4.errors import JQ4Error
from jq4.qarray import is_qarray

_NEED_PACKED = ("compressed-tensors", "gptq", "awq")
_PACK_DENSE = ("bnb-nf4", "gpt-oss")  # these quantize the linear layers of a dense source
_EVERYTHING = "re:."
_TOLD = 3


@dataclasses.dataclass(frozen=True)
class Proposal:
    """Each weight as it will be written.

    Attributes:
      planned: in the source's order.
      sources: the source's weights, of which some may be planned in another form (the requantizer's).
      source_format, target: their names.
      requantizer: what rounds again the weights that the target cannot hold; None where that was not asked for.
    """

    planned: tuple[Planned, ...]
    sources: Mapping[str, LazyWeight]
    source_format: str
    target: str
    requantizer: Requantizer | None = None

    @property
    def lossless(self) -> bool:
        """Whether reading the output gives the same codes, scales and numbers."""
        return not any(each.loss for each in self.planned)

    def rows(self) -> list[dict[str, Any]]:
        """What becomes of each kind of weight, in plain data."""
        rows: dict[tuple[str, ...], dict[str, Any]] = {}
        for each in self.planned:
            weight = self.sources[each.weight.name]
            told = {
                "kind": re.sub(r"(?<![A-Za-z0-9_])\d+(?![A-Za-z0-9_])", "*", weight.name),
                "from": form_of(weight),
                "to": form_made(each, self.target),
                "loss": each.loss,
                "doubt": each.doubt,
                "unpacked": each.unpacked,
            }
            row = rows.setdefault(tuple(told.values()), {**told, "number": 0, "bytes": 0, "bytes_made": 0})
            row["number"] += 1
            row["bytes"] += weight.nbytes
            row["bytes_made"] += made_bytes(each)
        return list(rows.values())


def propose(
    checkpoint: Checkpoint, target: str, writer: Writer, options: Mapping[str, Any], requantize: bool = False
) -> Proposal:
    """Plans every weight.

    Raises JQ4Error that lists the first weights that the target cannot hold, and why.
    """
    weights = checkpoint.weights.values()
    if not checkpoint.weights:
        raise JQ4Error("the source holds no weights; give a folder that does")
    unpacked = {weight.name for weight in weights if wants_dense(weight, target, checkpoint.config)}
    some_packed = any(weight.packed and weight.name not in unpacked for weight in weights)
    if target in _NEED_PACKED and not some_packed:
        raise JQ4Error(
            f"--to {target}: all linear layers of the source are dense, and {target} packs what was quantized before; "
            "quantize it first (jq4 quantize SRC PACKED --recipe ...) and convert PACKED"
        )
    if target == MXFP4 and not requantize and not some_packed:
        raise JQ4Error(f"--to {target}: all linear layers of the source are dense; --requantize rounds them to it")
    if some_packed and target in _PACK_DENSE and not requantize:
        options = {**options, "ignore": (_EVERYTHING,)}  # whoever packed it left these dense
    requantizer = Requantizer(target) if requantize else None
    planned: list[Planned] = []
    refused: dict[str, str] = {}
    for weight in weights:
        try:
            dense_alone = weight.name in unpacked
            planned.append(plan_dense(weight, target) if dense_alone else _plan(weight, writer, options, requantizer))
        except JQ4Error as error:
            refused[weight.name] = str(error)
    if refused:
        _raise_what_holds_for_all(target, refused)
        reasons = _reasons(refused)
        more = f" (and {len(reasons) - _TOLD} more)" if len(reasons) > _TOLD else ""
        remedy = ""
        if not requantize and any(_is_rounded_again(checkpoint.weights[name], writer, options) for name in refused):
            remedy = "; --requantize rounds them again, to the nearest that the target holds"
        raise JQ4Error(
            f"--to {target}: cannot hold {len(refused)} of {len(weights)} weights as they are{remedy}; nothing was "
            f"written: {'; '.join(reasons[:_TOLD])}{more}"
        )
    return Proposal(tuple(planned), checkpoint.weights, checkpoint.format, target, requantizer)


def _raise_what_holds_for_all(target: str, refused: Mapping[str, str]) -> None:
    """An option or a config that no weight can be planned with is not said weight by weight."""
    said = set(refused.values())
    if len(said) == 1 and len(refused) > 1:
        raise JQ4Error(f"--to {target}: {said.pop()}")


def _reasons(refused: Mapping[str, str]) -> list[str]:
    """Each reason once, with the first weight that has it."""
    names: dict[str, list[str]] = {}
    for name, said in refused.items():
        names.setdefault(said.removeprefix(f"{name}: "), []).append(name)
    others = {said: f" (and {_others(len(held) - 1)})" if len(held) > 1 else "" for said, held in names.items()}
    return [said if held[0] in said else f"{held[0]}{others[said]}: {said}" for said, held in names.items()]


def _others(count: int) -> str:
    return "1 other" if count == 1 else f"{count} others"


def left_out(proposal: Proposal, kept: Collection[str]) -> Proposal:
    """The proposal of an output that has no place for other weights than those `kept`."""
    return dataclasses.replace(
        proposal,
        planned=tuple(
            each
            if each.weight.name in kept
            else dataclasses.replace(each, tensors={}, loss="left out: the model has no place for it, or another one's")
            for each in proposal.planned
        ),
    )


def writer_of(target: str) -> Writer:
    """The module that writes a target."""
    for name in (dense.__name__, orbax_files.__name__, *(f"jq4.checkpoint.foreign.{each}" for each in WRITERS)):
        module = importlib.import_module(name)
        if target == module.NAME:
            return module  # pyright: ignore[reportReturnType]
    raise JQ4Error(f"--to {target}: there is no such format to write")


def form_of(weight: LazyWeight) -> str:
    """How a weight is held: "int4 g128 asym act-order", or its dtype."""
    if not weight.packed:
        return weight.format
    q = weight.abstract
    length = weight.shape[q.axis]
    scale = f"packed {q.scale.format}" if is_qarray(q.scale) else np.dtype(q.scale.dtype).name
    said = [q.format, "channel" if q.group_size >= length else f"g{q.group_size}"]
    said += ["asym"] if q.zero_point is not None else []
    said += ["offset"] if q.offset is not None else []
    said += ["act-order"] if q.permutation is not None else []
    said += ["input scale"] if q.input_scale is not None else []
    return " ".join([*said, f"scales {scale}"])


def form_made(planned: Planned, target: str) -> str:
    """How the target holds a weight: the dtype of its one tensor, or the target's name where it has several."""
    dtypes = [dtype for dtype, _ in planned.tensors.values()]
    return dtypes[0] if len(dtypes) == 1 else target if dtypes else "nothing"


def made_bytes(planned: Planned) -> int:
    """Bytes of the tensors that a weight becomes."""
    return sum(nbytes_of(dtype, shape) for dtype, shape in planned.tensors.values())


def _plan(weight: LazyWeight, writer: Writer, options: Mapping[str, Any], requantizer: Requantizer | None) -> Planned:
    if requantizer is not None and requantizer.packs(weight, options):
        return requantizer.plan(weight, writer, options, why="")
    try:
        planned = writer.plan(weight, options)
    except JQ4Error as error:
        if requantizer is None or not requantizer.takes(weight):
            raise
        return requantizer.plan(weight, writer, options, why=str(error))
    if planned.requantized and requantizer is None:
        raise JQ4Error(f"{weight.name}: {form_of(weight)} would be {planned.loss}")
    return planned


def _is_rounded_again(weight: LazyWeight, writer: Writer, options: Mapping[str, Any]) -> bool:
    """Whether a weight would be taken if it may be rounded again."""
    try:
        _plan(weight, writer, options, Requantizer(writer.NAME))
    except JQ4Error:
        return False
    return True
