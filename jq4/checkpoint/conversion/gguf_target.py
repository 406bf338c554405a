"""A .gguf file as a target: its header first, then each tensor at its place."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from jq4.checkpoint.conversion.layout import Layout, Place
from jq4.checkpoint.conversion.proposal import Proposal
from jq4.checkpoint.conversion.safetensors_target import fixed_target
from jq4.checkpoint.conversion.stream import Target
from jq4.checkpoint.foreign import gguf
from jq4.checkpoint.foreign.gguf.names import layer_and_stem
from jq4.checkpoint.foreign.host_dequantize import some_rows
from jq4.checkpoint.foreign.weights import Checkpoint
from jq4.checkpoint.foreign.writing import Planned

KEEP = "keep"
_FILE = "model.gguf"
_IN_LLAMA_ORDER = ("attn_q", "attn_k")  # their rows move, so that they are encoded as a whole


class GGUFWriter:
    """The module jq4.checkpoint.foreign.gguf as a Writer."""

    NAME: str = "gguf"

    def plan(self, weight: Any, options: Mapping[str, Any]) -> Planned:
        planned = gguf.plan(weight, options)
        moved = any(layer_and_stem(name)[1] in _IN_LLAMA_ORDER for name in planned.tensors)
        if len(planned.tensors) != 1 or moved or len(weight.shape) < 2:
            return planned
        if weight.packed and not planned.requantized:
            return dataclasses.replace(planned, by_rows=tuple(planned.tensors))
        return dataclasses.replace(planned, pieces=_by_rows(planned.encode))

    def quantization_config(self, planned: list[Planned], options: Mapping[str, Any]) -> dict[str, Any]:
        """None: the file tells each tensor's type."""
        del planned, options
        return {}


def gguf_target(checkpoint: Checkpoint, proposal: Proposal, options: Mapping[str, Any]) -> Target:
    """The file that a proposal makes of a checkpoint."""
    written, head, lying, size = gguf.outline(list(proposal.planned), checkpoint, options)
    places = {name: Place(_FILE, start, stop - start) for name, (start, stop) in lying.items()}
    return fixed_target(tuple(written), Layout({_FILE: head}, {_FILE: size}, places), single=_FILE)


def _by_rows(encode: Callable[[Any], Mapping[str, np.ndarray]]) -> Callable[[Any], Iterator[np.ndarray]]:
    """A tensor whose rows are encoded each by itself, a few at a time."""

    def pieces(value: Any) -> Iterator[np.ndarray]:
        for _, block in some_rows(value):
            yield from encode(block).values()

    return pieces
