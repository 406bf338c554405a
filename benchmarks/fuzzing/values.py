"""Hostile values: what a file can hold where a name, a number, an object or an array is expected."""

import json
import random
from typing import Any

import numpy as np

NUMBERS = (
    *(0, -1, 1, 2, 3, 4, 5, 7, 8, 16, 31, 32, 33, 64, 127, 128, 255, 256, 1000),
    *(2**15, 2**31 - 1, 2**31, 2**32, 2**40, 2**53, 2**63 - 1, 2**63, 2**64 - 1, 2**64, -(2**63), 10**400, 10**4200),
)
PATTERNS = (
    "re:(a+)+$",
    "re:(.*)*!",
    "re:(.*.*)*.*!",
    "re:((([a-z.]*)*)*)*!",
    "re:(a|a)*b",
    "re:(?:.?){60}.{60}!",
    "re:(",
    "re:[",
    "re:(?P<x",
    "re:*",
    "re:a{99999999999999}",
    "re:(.{1000}){1000}",
    "re:(?=(.*)*!)",
    r"re:(.)\1\1",
    "re:" + "(" * 2000,
    "re:" + "(?:" * 300 + "a" + ")*" * 300,
    "re:(?i).*UP_PROJ",
    "re:(?<=x)y",
    "re:" + "|" * 999,
    "+:(.*)*!",
    "-:(.*)*!",
    "(.*)*!",
    "Linear",
    "",
    "re:",
    "re:.*",
    "+:",
    "a" * 3000,
)
STRINGS = (
    "",
    "4",
    "../x",
    "/etc/passwd",
    "a/b",
    "..",
    ".",
    "C:\\x",
    "\\",
    "\0",
    "x\0y",
    "\n",
    "\x1b[2J",
    "\ud800",
    "\udcff.weight",
    "\u202e",
    "\u0663",
    "x" * 300,
    "x" * 5000,
    "model.safetensors",
    "config.json",
    "F32",
    "F4",
    "I32",
    "float16",
    "auto",
    "int",
    "float",
    "marlin",
    "gptq",
    "gptq_v2",
    "awq",
    "gemm",
    "gemv",
    "compressed-tensors",
    "W4A16",
    "NVFP4",
    "default",
    "llama3",
    "longrope",
    "yarn",
    "linear",
    "llama",
    "gemma3",
    "gemma2",
    "phi3",
    "mistral",
    "qwen2",
    "sliding_attention",
    "nf4",
    "0.17.1",
    "9" * 400,
    "9" * 4400,
    "1.5",
    "nan",
    "inf",
    "-0",
    "1e400",
    "true",
)
KEYS = (
    "bits",
    "group_size",
    "sym",
    "desc_act",
    "dynamic",
    "extra_config",
    "checkpoint_format",
    "format",
    "packing_format",
    "is_marlin_format",
    "quant_method",
    "version",
    "w_bit",
    "q_group_size",
    "config_groups",
    "targets",
    "weights",
    "ignore",
    "num_bits",
    "symmetric",
    "strategy",
    "type",
    "input_activations",
    "sparsity_config",
    "transform_config",
    "apply",
    "location",
    "quantization_config",
    "quantization",
    "dtype",
    "torch_dtype",
    "text_config",
    "model_type",
    "architectures",
    "hidden_size",
    "num_hidden_layers",
    "rope_scaling",
    "rope_parameters",
    "rope_type",
    "factor",
    "head_dim",
    "layer_types",
    "sliding_window",
    "sliding_window_pattern",
    "max_window_layers",
    "eos_token_id",
    "bos_token_id",
    "mode",
    "module_quant_configs",
    "original_max_position_embeddings",
    "partial_rotary_factor",
    "short_factor",
    "long_factor",
    "query_pre_attn_scalar",
    "use_sliding_window",
    "full_attention",
    "sliding_attention",
    "truncate",
    "weight_map",
)
SUFFIXES = (
    "qweight",
    "qzeros",
    "scales",
    "g_idx",
    "weight",
    "weight_packed",
    "weight_scale",
    "weight_shape",
    "weight_zero_point",
    "weight_g_idx",
    "weight_global_scale",
    "input_scale",
    "scaled_zeros",
    "bias",
    "SCB",
    "weight.absmax",
    "weight.quant_map",
    "weight.nested_absmax",
    "weight.quant_state.bitsandbytes__nf4",
    "W_q",
    "scale",
    "zero",
    "nbits",
    "shape",
    "biases",
    "qbiases",
    "weight._data",
    "weight._data._data",
    "weight._scale",
    "weight._shift",
    "embedding",
    "embedding_scale",
    "_weight_qdata",
    "_weight_scale",
    "_weight_zero_point",
    "_weight_act_pre_scale",
)


def value(draw: random.Random, depth: int = 0) -> Any:
    """Anything that JSON can say, and NaN and lone surrogates, which Python's says too."""
    kind = draw.randrange(10 if depth < 3 else 7)
    if kind < 2:
        return draw.choice(NUMBERS)
    if kind == 2:
        return draw.choice(
            (None, True, False, 0.5, -0.0, 2.0, 4.0, 32.0, 1e308, float("nan"), float("inf"), -float("inf"))
        )
    if kind == 3:
        return draw.choice(PATTERNS)
    if kind < 7:
        return draw.choice(STRINGS)
    if kind == 7:
        return [value(draw, depth + 1) for _ in range(draw.choice((0, 1, 2, 3, 4, 40)))]
    if kind == 8:
        return {draw.choice((*KEYS, *PATTERNS, *STRINGS)): value(draw, depth + 1) for _ in range(draw.randrange(4))}
    return nested(draw.choice((2, 30, 200, 900, 980)), draw.random() < 0.5)


def nested(depth: int, as_list: bool = True) -> Any:
    found: Any = 0
    for _ in range(depth):
        found = [found] if as_list else {"targets": found}
    return found


def changed(draw: random.Random, tree: Any, depth: int = 0) -> Any:
    """The tree of JSON with one value (or key) replaced, removed, added or doubled; the tree itself is kept."""
    if depth == 0 or (isinstance(tree, dict | list) and tree and draw.random() < 0.8):
        if isinstance(tree, dict):
            return _changed_object(draw, dict(tree), depth)
        if isinstance(tree, list) and tree:
            copy = list(tree)
            at = draw.randrange(len(copy))
            copy[at] = changed(draw, copy[at], depth + 1)
            return draw.choice((copy, copy, copy, copy * 2, copy[:at]))
    return value(draw)


def _changed_object(draw: random.Random, members: dict[str, Any], depth: int) -> Any:
    way = draw.randrange(6)
    if way == 0 or not members:
        members[draw.choice((*KEYS, *STRINGS, *PATTERNS))] = value(draw)
        return members
    key = draw.choice(list(members))
    if way == 1:
        del members[key]
    elif way == 2:
        members[draw.choice((*KEYS, *STRINGS, *PATTERNS))] = members.pop(key)
    elif way == 3 and depth:
        return value(draw)
    else:
        members[key] = changed(draw, members[key], depth + 1)
    return members


def as_text(draw: random.Random, tree: Any) -> bytes:
    """JSON, sometimes with a twin of a key, bytes that are no UTF-8, depth that no parser likes, or cut short."""
    try:
        text = json.dumps(tree).encode()
    except (RecursionError, ValueError):
        text = b'{"a":' * 3000
    if draw.random() < 0.9:
        return text
    way = draw.randrange(6)
    if way == 0 and isinstance(tree, dict) and tree:
        key = draw.choice(list(tree))
        return b"{" + json.dumps(key).encode() + b":" + draw.choice((b"1", b"{}", b"[[")) + b"," + text[1:]
    if way == 1:
        at = draw.randrange(len(text) + 1)
        return text[:at] + draw.choice((b"\xff\xfe", b"\0", b"NaN", b"1" * 5000, b"\xed\xa0\x80")) + text[at:]
    if way == 2:
        return text[: draw.randrange(len(text) + 1)]
    if way == 3:
        return draw.choice(
            (b"[" * 100_000, b'{"a":' * 50_000, b"", b"null", b"\xef\xbb\xbf" + text, b"[]", b'"x"', b"7")
        )
    return flipped(draw, text) if way == 4 else text + b" " * draw.randrange(64)


def flipped(draw: random.Random, content: bytes) -> bytes:
    """A few bytes changed, removed, doubled or put in."""
    held = bytearray(content)
    for _ in range(draw.choice((1, 1, 2, 8))):
        at = draw.randrange(len(held) + 1)
        way = draw.randrange(6)
        if way < 3 and at < len(held):
            held[at] = draw.choice((0, 1, 0x7F, 0x80, 0xFF, draw.randrange(256), held[at] ^ 1 << draw.randrange(8)))
        elif way == 3:
            del held[at : at + draw.choice((1, 4, 8, 64))]
        elif way == 4:
            held[at:at] = draw.randbytes(draw.choice((1, 4, 8, 64)))
        else:
            held[at : at + 8] = draw.choice(NUMBERS[:-2]).to_bytes(9, "little", signed=True)[:8]
    return bytes(held)


def _text(draw: random.Random, content: bytes) -> np.ndarray:
    """Bytes that are a text or JSON, with another text or another JSON."""
    try:
        content = as_text(draw, changed(draw, json.loads(content)))
    except (ValueError, RecursionError):
        content = draw.choice((flipped(draw, content), draw.choice(STRINGS).encode("utf-8", "surrogatepass")))
    return np.frombuffer(content or b"\0", np.uint8)


def array(draw: random.Random, held: np.ndarray) -> np.ndarray:
    """The array with an element, a row or all of it replaced: NaN, infinity, extremes, noise."""
    copy = np.array(np.asarray(held))
    if not copy.size:
        return copy
    if copy.dtype == np.uint8 and copy.ndim == 1 and draw.random() < 0.8:
        return _text(draw, copy.tobytes())
    flat = copy.reshape(-1).view(np.uint8).reshape(copy.size, -1)
    width = flat.shape[1]
    at = slice(None) if draw.random() < 0.3 else draw.randrange(len(flat))
    patterns = [
        b"\0" * width,
        b"\xff" * width,
        b"\x7f" * width,
        b"\x80" + b"\0" * (width - 1),
        b"\0" * (width - 1) + b"\x80",
    ]
    patterns += [b"\0" * (width - 2) + b"\x80\x7f", b"\0" * (width - 2) + b"\x00\x7c", b"\x01" + b"\0" * (width - 1)]
    if draw.random() < 0.3:
        flat[at] = np.frombuffer(draw.randbytes(flat[at].size), np.uint8).reshape(flat[at].shape)
    else:
        flat[at] = np.frombuffer(draw.choice(patterns)[:width].ljust(width, b"\0"), np.uint8)
    return copy
