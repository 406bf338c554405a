"""A Hugging Face folder as a target: weights in safetensors, and beside them config.json, tokenizer and a report."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from jq4.checkpoint.conversion import dense
from jq4.checkpoint.conversion.destination import REPORT
from jq4.checkpoint.conversion.fixed_files import FixedFiles
from jq4.checkpoint.conversion.layout import Layout, safetensors_layout
from jq4.checkpoint.conversion.proposal import Proposal
from jq4.checkpoint.conversion.stream import Target
from jq4.checkpoint.foreign.weights import Checkpoint
from jq4.checkpoint.foreign.writing import Planned, Writer
from jq4.checkpoint.manifest import check_relative


def safetensors_target(
    checkpoint: Checkpoint, proposal: Proposal, writer: Writer, options: Mapping[str, Any], shard_bytes: int
) -> Target:
    """The folder that a proposal makes of a checkpoint."""
    quantization = writer.quantization_config(list(proposal.planned), options)
    beside = {check_relative(name, "the source's files"): content for name, content in checkpoint.files.items()}
    config = _config(checkpoint, quantization, options)
    if config is not None:
        beside["config.json"] = _as_json(config)
    beside[REPORT] = _as_json(report_of(proposal, options))
    return fixed_target(proposal.planned, safetensors_layout(proposal.planned, shard_bytes, beside))


def fixed_target(planned: tuple[Planned, ...], layout: Layout, single: str | None = None) -> Target:
    """Files of known layout."""
    sizes = {each.weight.name: sum(layout.places[tensor].nbytes for tensor in each.tensors) for each in planned}
    described = [[name, layout.sizes[name], _sha256(head)] for name, head in layout.heads.items()]
    described += [[name, len(content), _sha256(content)] for name, content in layout.beside.items()]
    return Target(planned, sizes, layout.nbytes, described, lambda folder: FixedFiles(folder, layout), single)


def report_of(proposal: Proposal, options: Mapping[str, Any]) -> dict[str, Any]:
    """What the output says of its own making; the same bytes for the same conversion."""
    from jq4 import __version__

    return {
        "made_by": f"jq4 {__version__} convert",
        "source_format": proposal.source_format,
        "target": proposal.target,
        "options": {name: value for name, value in options.items() if value is not None},
        "lossless": proposal.lossless,
        "weights": proposal.rows(),
    }


def _config(
    checkpoint: Checkpoint, quantization: Mapping[str, Any], options: Mapping[str, Any]
) -> dict[str, Any] | None:
    if checkpoint.config is None and not quantization:
        return None
    config = {key: value for key, value in (checkpoint.config or {}).items() if key != "quantization_config"}
    if options.get("dtype") is not None:
        config = _of_dtype(config, dense.dtype_named(options["dtype"]).name)
    return config | ({"quantization_config": dict(quantization)} if quantization else {})


def _of_dtype(config: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """The settings with another dtype where they state one, for the model or for a part of it."""
    changed = {name: dtype for name in ("torch_dtype", "dtype") if name in config}
    parts = {name: _of_dtype(part, dtype) for name, part in config.items() if isinstance(part, dict)}
    return {**config, **parts, **changed}


def _as_json(value: Any) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
