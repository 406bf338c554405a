"""What jq4 convert does between its arguments and what it prints: opens, proposes, writes, verifies."""

import argparse
import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jq4.checkpoint.conversion.proposal import Proposal
from jq4.checkpoint.conversion.stream import Target
from jq4.checkpoint.foreign import Checkpoint


@dataclasses.dataclass(frozen=True)
class Work:
    """A conversion that is planned: the opened source, what becomes of each weight, and the files that this makes."""

    source: Checkpoint
    proposal: Proposal
    target: Target
    options: Mapping[str, Any]

    def as_dict(self) -> dict[str, Any]:
        """What jq4 convert --json prints, and --dry-run stops after."""
        return {
            "from": self.proposal.source_format,
            "to": self.proposal.target,
            "lossless": self.proposal.lossless,
            "notes": list(self.source.notes),
            "kinds": self.proposal.rows(),
            "bytes_before": sum(weight.nbytes for weight in self.source.weights.values()),
            "bytes": self.target.nbytes,
        }


def prepare(source: Path, target: str, options: Mapping[str, Any], requantize: bool, shard_size: str) -> Work:
    """Opens the source and plans every weight; nothing is written."""
    from jq4.checkpoint.conversion.gguf_target import GGUFWriter, gguf_target
    from jq4.checkpoint.conversion.proposal import propose, writer_of
    from jq4.checkpoint.conversion.safetensors_target import safetensors_target
    from jq4.checkpoint.foreign import gguf
    from jq4.plan import parse_memory

    opened = open_any(source)
    if target == "gguf":
        opened = gguf.by_rows(opened)
        options = {"config": opened.config, "type": options["type"] or _kept_type(opened)}
        proposal = propose(opened, target, GGUFWriter(), options, requantize)
        said = gguf.notes(list(proposal.planned), opened, options)
        opened = dataclasses.replace(opened, notes=(*opened.notes, *said))
        return Work(opened, proposal, gguf_target(opened, proposal, options), {"type": options["type"]})
    writer = writer_of(target)
    proposal = propose(opened, target, writer, options, requantize)
    if target == "orbax":
        return _to_orbax(source, opened, proposal)
    made = safetensors_target(opened, proposal, writer, options, parse_memory(shard_size, "--shard-size"))
    return Work(opened, proposal, made, options)


def _kept_type(opened: Checkpoint) -> str:
    from jq4.checkpoint.conversion.gguf_target import KEEP
    from jq4.errors import JQ4Error

    if not any(weight.packed for weight in opened.weights.values()):
        raise JQ4Error("--to gguf: the weights of the source are dense; say what to quantize them to: --type q4_0, ...")
    return KEEP


def _to_orbax(source: Path, opened: Checkpoint, proposal: Proposal) -> Work:
    """A model that jq4 runs as the decoder's params; of any other, each weight under its own name."""
    from jq4.checkpoint.conversion.orbax_files import SingleLeaf, orbax_target
    from jq4.checkpoint.conversion.proposal import left_out
    from jq4.errors import JQ4Error
    from models.filling import lazy_leaves
    from models.language_model import config_of, files_of

    try:
        leaves = lazy_leaves(str(source), opened, config_of(opened, str(source)))
    except JQ4Error as error:
        said = f"no model that jq4 runs ({error}); the weights keep their own names, for jq4.restore"
        opened = dataclasses.replace(opened, notes=(*opened.notes, said))
        leaves = [SingleLeaf(weight) for weight in opened.weights.values()]
    proposal = left_out(proposal, {weight.name for leaf in leaves for weight in leaf.slices})
    origin = {"converted_from": proposal.source_format, "folder": source.resolve().name}
    return Work(opened, proposal, orbax_target(leaves, files_of(opened), source=origin), {})


def carry_out(work: Work, source: Path, destination: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Writes the destination, and proves it where that is asked for."""
    from jq4.checkpoint.convert import convert
    from jq4.cli import _terminal
    from jq4.plan import parse_memory

    verified: list[dict[str, Any]] | None = None

    def check(made: Path) -> None:
        nonlocal verified
        verified = _verified(work, made, destination)

    with _terminal.progress("converting") as step:
        done = convert(
            source,
            destination,
            work.target,
            about={"to": work.proposal.target, "options": work.options},
            memory=None if arguments.memory is None else parse_memory(arguments.memory, "--memory"),
            restart=arguments.restart,
            requantizer=work.proposal.requantizer,
            check=check if arguments.verify else None,
            progress=lambda done, total: step(-(-done // 10**6), -(-total // 10**6)),
        )
    errors = {} if work.proposal.requantizer is None else work.proposal.requantizer.errors
    return {"weights": done.weights, "resumed": done.resumed, "requantized": errors, "verified": verified}


def open_any(path: Path) -> Checkpoint:
    """The checkpoint in a folder or file of any format, one of jq4's own too."""
    from jq4.checkpoint.foreign import open_checkpoint
    from jq4.checkpoint.named_weights import checkpoint_of_names, holds_named_weights
    from jq4.cli import _models
    from models.as_checkpoint import checkpoint_of_folder

    if not _models.is_checkpoint(path):
        return open_checkpoint(path)
    return checkpoint_of_names(path) if holds_named_weights(path) else checkpoint_of_folder(path)


def _verified(work: Work, made: Path, destination: Path) -> list[dict[str, Any]]:
    from jq4.checkpoint.conversion.verification import verify
    from jq4.checkpoint.foreign.gguf import by_rows
    from jq4.cli import _terminal
    from jq4.errors import CheckpointError

    output = open_any(made)
    with _terminal.progress("verifying") as step:
        found = verify(work.source, by_rows(output) if output.format == "gguf" else output, work.proposal, step)
    wrong = [each.name for each in found if not each.holds]
    if wrong:
        more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise CheckpointError(
            f"{destination}: not what was declared: {', '.join(wrong[:5])}{more} differ from the source; nothing was "
            f"put there, and the result lies in {made}"
        )
    return [dataclasses.asdict(each) for each in found]
