"""Will it fit? Bytes of weights and of KV cache in each format, from headers alone: `jq4 plan`.

    weights   every linear layer and expert in the format; embedding, output head, router, norms and biases in 16 bits
    packed    ceil(K / unit) * unit * bits / 8 bytes a column of codes, and a 16-bit scale a group and column
    cache     16 bits a number, see jq4.architecture
    fits      weights + cache <= 90 % of the memory: the rest is for activations, compiled programs and the runtime

The figures are for symmetric formats; zero points add a byte a group and column. Nothing is computed with arrays here.
"""

import dataclasses
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jq4.architecture import Architecture, Matrix, from_config
from jq4.checkpoint.safetensors_files import StoredTensor, holds_tensors, open_tensors
from jq4.errors import JQ4Error
from pallas_kernels.packing import packed_length

USABLE = 0.9  # of the memory
DEFAULT_CONTEXT = 8192
_DENSE_NAMES = ("embed", "wte", "wpe", "lm_head", "norm", "router", "mlp.gate.weight", "block_sparse_moe.gate.weight")
_DTYPES_OF_A_DENSE_CHECKPOINT = ("F64", "F32", "F16", "BF16")


@dataclasses.dataclass(frozen=True)
class Scheme:
    """A way to hold the linear layers: `bits` a code, and the codes that share a 16-bit scale (None: a column)."""

    name: str
    bits: int
    group_size: int | None = None

    def matrix_bytes(self, inputs: int, outputs: int) -> int:
        """Bytes of one weight [K = inputs, N = outputs]."""
        if self.bits == 16:
            return 2 * inputs * outputs
        groups = 1 if self.group_size is None else -(-inputs // self.group_size)
        return packed_length(inputs, self.bits) * outputs + 2 * groups * outputs


# from the best quality to the fewest bytes; the order of the advice
SCHEMES = (
    Scheme("FP16", 16),
    Scheme("INT8", 8),
    Scheme("INT4 g32", 4, 32),
    Scheme("INT4 g128", 4, 128),
    Scheme("INT3 g128", 3, 128),
)


@dataclasses.dataclass(frozen=True)
class SchemePlan:
    """Bytes of a model in one scheme. `read_per_token` is what decoding one sequence reads: the speed's limit.

    `longest_context`, `devices` and `fits` are None without a memory; `longest_context` is 0 where nothing fits.
    """

    name: str
    weights: int
    kv_cache: int
    bits_per_weight: float
    read_per_token: int
    fits: bool | None = None
    longest_context: int | None = None
    devices: int | None = None

    @property
    def total(self) -> int:
        return self.weights + self.kv_cache


@dataclasses.dataclass(frozen=True)
class Plan:
    """What `jq4 plan` says."""

    architecture: Architecture
    source: str
    context: int
    batch: int
    memory: int | None
    schemes: tuple[SchemePlan, ...]
    advised: str | None
    advice: str

    def as_dict(self) -> dict[str, Any]:
        arch = self.architecture
        return {
            "model_type": arch.model_type,
            "source": self.source,
            "estimate": arch.estimate,
            "parameters": arch.parameters,
            "active_parameters": arch.active_parameters,
            "context": self.context,
            "batch": self.batch,
            "memory": self.memory,
            "schemes": [{**dataclasses.asdict(each), "total": each.total} for each in self.schemes],
            "advised": self.advised,
            "advice": self.advice,
            "notes": list(arch.notes),
        }


def plan(source: str | Path, *, memory: int | None = None, context: int | None = None, batch: int = 1) -> Plan:
    """Plans for a Hugging Face folder (its headers are read where there are any) or a bare config.json.

    Args:
      memory: bytes of one device, see `parse_memory`.
      context: tokens a sequence; by default 8192 or the model's longest, whichever is less.
      batch: sequences held at a time.

    Raises:
      JQ4Error: no config.json, not JSON, sizes missing or impossible, damaged safetensors headers.
    """
    architecture, described_by = read_architecture(Path(source))
    limit = architecture.max_context
    context = min(DEFAULT_CONTEXT, limit or DEFAULT_CONTEXT) if context is None else context
    if context < 1 or batch < 1:
        raise JQ4Error(f"context {context} and batch {batch}: wanted 1 or more of each")
    if limit and context > limit:
        note = f"a context of {context} is longer than the model's own {limit} (max_position_embeddings)"
        architecture = dataclasses.replace(architecture, notes=(*architecture.notes, note))
    schemes = tuple(_plan_scheme(scheme, architecture, memory, context, batch) for scheme in SCHEMES)
    advised, advice = _advise(schemes, memory)
    return Plan(architecture, described_by, context, batch, memory, schemes, advised, advice)


def _plan_scheme(scheme: Scheme, arch: Architecture, memory: int | None, context: int, batch: int) -> SchemePlan:
    weights = read = 2 * arch.vectors
    packed_bytes = packed_size = 0
    for matrix in arch.matrices:
        each = (scheme if matrix.quantized else SCHEMES[0]).matrix_bytes(matrix.inputs, matrix.outputs)
        weights += matrix.copies * each
        read += round(matrix.active * each)
        if matrix.quantized:
            packed_bytes, packed_size = packed_bytes + matrix.copies * each, packed_size + matrix.size
    cache = 2 * arch.cache_elements(context) * batch
    made = SchemePlan(scheme.name, weights, cache, 8 * packed_bytes / max(1, packed_size), read)
    if memory is None:
        return made
    usable = int(USABLE * memory)
    return dataclasses.replace(
        made,
        fits=made.total <= usable,
        longest_context=_longest_context(arch, usable - weights, batch),
        devices=-(-made.total // max(1, usable)),
    )


def _longest_context(arch: Architecture, room: int, batch: int) -> int:
    """The most tokens a sequence whose cache takes at most `room` bytes, up to the model's own limit."""
    low, high = 0, arch.max_context or 2**24
    while low < high:
        middle = (low + high + 1) // 2
        if 2 * arch.cache_elements(middle) * batch <= room:
            low = middle
        else:
            high = middle - 1
    return low if room >= 0 else 0


def _advise(schemes: tuple[SchemePlan, ...], memory: int | None) -> tuple[str | None, str]:
    by_name = {each.name: each for each in schemes}
    fp16, int4 = by_name["FP16"], by_name["INT4 g32"]
    smaller = f"{fp16.weights / int4.weights:.1f} times fewer bytes than FP16"
    if memory is None:
        return "INT4 g32", (
            f"INT4 g32: {smaller}, and the least loss at 4 bits. Add --memory to see what fits your device."
        )
    fitting = next((each for each in schemes if each.fits), None)
    if fitting is None:
        return None, (
            f"Nothing fits one such device at this context and batch. INT4 g32 needs {int4.devices} of them (sharded), "
            f"INT3 g128 {by_name['INT3 g128'].devices}, FP16 {fp16.devices}."
        )
    reasons = {
        "FP16": f"it fits as it is. For speed, INT4 g32 reads {fp16.read_per_token / int4.read_per_token:.1f} times "
        "fewer bytes a token.",
        "INT8": "FP16 does not fit; 8 bits a channel lose next to nothing. INT4 g32 leaves room for a longer context "
        "or larger batch.",
        "INT4 g32": f"8 bits do not fit; this is the least loss at 4 bits, {smaller}. "
        "Quantize with hqq-w4g32 or a calibrated method, not rtn.",
        "INT4 g128": "g32 does not fit; larger groups save .4 bits a weight and lose more than g32. "
        "Quantize with hqq-w4g128 or a calibrated method, not rtn.",
        "INT3 g128": "nothing larger fits. Expect several times the loss of 4 bits: prefer a shorter context, a second "
        "device or a smaller model at 4 bits.",
    }
    return fitting.name, f"{fitting.name}: {reasons[fitting.name]}"


def read_architecture(source: Path) -> tuple[Architecture, str]:
    """The architecture of a folder or a config.json, and by what it is known."""
    path = source / "config.json" if source.is_dir() else source
    config = _read_config(path)
    architecture = from_config(config, path.name)
    tensors = open_tensors(source) if holds_tensors(source) else {}
    if not tensors:
        return architecture, "config.json"
    if config.get("quantization_config") or any(
        t.dtype not in _DTYPES_OF_A_DENSE_CHECKPOINT for t in tensors.values() if len(t.shape) > 1
    ):
        note = "the weights are quantized already: planned from the shapes in config.json"
        return dataclasses.replace(architecture, notes=(*architecture.notes, note)), "config.json"
    return _with_headers(architecture, tensors), "safetensors headers"


def _read_config(path: Path) -> Mapping[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise JQ4Error(
            f"{path}: there is no such file; give a model's folder that has a config.json, or a config.json"
        ) from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise JQ4Error(f"{path}: not a JSON file ({error}); give a model's config.json") from None
    if not isinstance(config, Mapping):
        raise JQ4Error(f"{path}: holds a {type(config).__name__}, wanted an object with the model's settings")
    return config


def _with_headers(architecture: Architecture, tensors: Mapping[str, StoredTensor]) -> Architecture:
    """The architecture with the matrices that the files really hold; the config's routing says which are active."""
    expected = {matrix.name: matrix for matrix in architecture.matrices}
    experts = [m for m in architecture.matrices if m.name.startswith("experts.")]
    share = experts[0].active / experts[0].copies if experts else 1.0
    matrices, vectors = [], 0
    for name, tensor in tensors.items():
        if len(tensor.shape) < 2:
            vectors += tensor.size
            continue
        copies, (outputs, inputs) = tensor.size // (tensor.shape[-1] * tensor.shape[-2]), tensor.shape[-2:]
        if any(part in name for part in _DENSE_NAMES):
            is_lookup = "lm_head" not in name and "embed" in name and "lm_head" in expected
            matrices.append(Matrix(name, copies, inputs, outputs, 0 if is_lookup else copies, quantized=False))
        else:
            active = copies * share if ".experts." in name else copies
            matrices.append(Matrix(name, copies, inputs, outputs, active))
    found = dataclasses.replace(architecture, matrices=tuple(matrices), vectors=vectors, estimate=False)
    if found.parameters == architecture.parameters:
        return dataclasses.replace(architecture, estimate=False)
    note = f"config.json describes {architecture.parameters:,} parameters, the files hold {found.parameters:,}"
    return dataclasses.replace(found, notes=(*found.notes, note))


_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


def parse_memory(text: str, what: str = "memory") -> int:
    """Bytes of "40GB", "39.5 GiB", "512m", "8e9": decimal units unless there is an i. `what` is told in the error."""
    match = re.fullmatch(r"\s*([0-9.]+(?:e[0-9]+)?)\s*([kmgt]i?)?b?\s*", text.lower())
    try:
        amount = float(match[1]) if match else 0.0
    except ValueError:
        amount = 0.0
    if not match or not 0 < amount < math.inf:
        raise JQ4Error(f"{what} {text!r}: wanted an amount above 0, such as 40GB, 24GiB or 500MB")
    return round(amount * _UNITS[match[2] or ""])
