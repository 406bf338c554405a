"""Which type each tensor gets, as llama.cpp's llama-quantize chooses it.

Rows (norms, biases), the routers of experts and their biases stay F32. The head, or the embedding that is the head too,
gets Q6_K in every type but the eight-bit and the dense ones. Q4_K_M gives Q6_K to the values and the down projections
of the first and the last eighth of the layers and of every third one between, and Q5_K to queries, keys and values in
one. A model of eight experts gets Q8_0 for keys and values, and in Q4_K_M Q5_K for the outputs of attention. A row that
is no whole number of super-blocks gets the next type of 32 elements: Q4_K -> Q5_0, Q5_K -> Q5_1, Q6_K -> Q8_0; where 32
does not divide it either, F16.
"""

from dataclasses import dataclass

from jq4.checkpoint.foreign.gguf.block_types import BY_NAME, BlockType
from jq4.checkpoint.foreign.gguf.names import layer_and_stem
from jq4.errors import JQ4Error


@dataclass(frozen=True)
class FileType:
    """What a file is asked to be: its matrices' type, and llama.cpp's number for it."""

    base: str
    number: int


KEEP = "keep"  # every packed weight in the type that holds it as it is
FILE_TYPES = {
    "f32": FileType("F32", 0),
    "f16": FileType("F16", 1),
    "q4_0": FileType("Q4_0", 2),
    "q4_1": FileType("Q4_1", 3),
    "q8_0": FileType("Q8_0", 7),
    "q5_0": FileType("Q5_0", 8),
    "q5_1": FileType("Q5_1", 9),
    "q4_k": FileType("Q4_K", 14),
    "q4_k_m": FileType("Q4_K", 15),
    "q5_k": FileType("Q5_K", 16),
    "q6_k": FileType("Q6_K", 18),
    "iq4_nl": FileType("IQ4_NL", 25),
    "bf16": FileType("BF16", 32),
}
_EIGHT = 8
_FALLBACK = {"Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}


def file_type(name: str) -> FileType:
    if name not in FILE_TYPES:
        raise JQ4Error(f"--type is {name!r}, wanted one of {', '.join([*FILE_TYPES, KEEP])}.")
    return FILE_TYPES[name]


def chosen_type(
    type_name: str, name: str, shape: tuple[int, ...], layers: int, tied: bool, experts: int = 0
) -> BlockType:
    """The type of a GGUF tensor of this name and shape in a file of a type, for a model of `layers` layers."""
    stem = layer_and_stem(name)[1]
    if len(shape) < 2 or stays_float(name):
        return BY_NAME["F32"]
    wanted = file_type(type_name).base
    if BY_NAME[wanted].dtype is not None:
        return BY_NAME[wanted]
    if stem == "output" or (tied and stem == "token_embd"):
        wanted = wanted if wanted == "Q8_0" else "Q6_K" if shape[-1] % BY_NAME[wanted].length == 0 else "Q8_0"
    elif experts == _EIGHT and stem in ("attn_k", "attn_v"):
        wanted = "Q8_0"
    elif type_name == "q4_k_m":
        wanted = "Q5_K" if experts == _EIGHT and stem == "attn_output" else _medium(name, layers)
    return _fitting(wanted, shape[-1])


def stays_float(name: str) -> bool:
    """Whether llama.cpp wants a tensor of this name in float32, a matrix too."""
    stem = layer_and_stem(name)[1]
    return stem.endswith("norm") or stem.startswith("ffn_gate_inp") or not name.endswith(".weight")


def _medium(name: str, layers: int) -> str:
    layer, stem = layer_and_stem(name)
    eighth = layers // 8
    more = layer < eighth or layer >= 7 * layers // 8 or (layer - eighth) % 3 == 2
    if stem == "attn_qkv":
        return "Q5_K"
    if (stem == "attn_v" or stem.startswith("ffn_down")) and more:
        return "Q6_K"
    return "Q5_K" if stem == "attn_v" and layers == 80 else "Q4_K"


def _fitting(wanted: str, length: int) -> BlockType:
    if length % BY_NAME[wanted].length:
        wanted = _FALLBACK.get(wanted, wanted)
    return BY_NAME["F16" if length % BY_NAME[wanted].length else wanted]
