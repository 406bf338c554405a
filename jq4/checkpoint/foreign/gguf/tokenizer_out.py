"""tokenizer.ggml.* made of tokenizer.json, tokenizer_config.json and generation_config.json.

Byte-level BPE becomes "gpt2": tokens, merges, and the name of the way in which texts are cut. BPE over pieces with
"\u2581" for spaces becomes "llama": there llama.cpp merges by the score of what comes of a merge, so that a token's
score is minus the rank of the first merge that makes it. The merges are written too, for readers that take them.
"""

import json
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from jq4.checkpoint.foreign.gguf.splits import split_name
from jq4.checkpoint.safetensors_files import parse_json
from jq4.errors import JQ4Error

NORMAL, UNKNOWN, CONTROL, OF_THE_USER, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
_NEVER_MERGED = -1e9
_BYTE = re.compile("<0x[0-9A-F]{2}>")


def tokenizer_metadata(
    files: Mapping[str, bytes], config: Mapping[str, Any], vocabulary: int
) -> tuple[dict[str, Any], list[str]]:
    """The values, and notes on what they do not say. `vocabulary`: rows of the embedding, as many as tokens."""
    if "tokenizer.json" not in files:
        ids = _Source({}, config).special_ids()
        values = {"tokenizer.ggml.model": "none"} | {f"tokenizer.ggml.{key}": value for key, value in ids.items()}
        return values, ["there is no tokenizer.json: llama.cpp gets token ids, and no text"]
    source = _Source(files, config)
    if source.model.get("type") != "BPE":
        raise JQ4Error(
            f"tokenizer.json: the model is {source.model.get('type')!r}, wanted BPE, which is what the models that are "
            "written have. Take away tokenizer.json to write the weights without one."
        )
    values, notes = source.byte_level() if source.is_byte_level else source.pieces()
    if not source.is_byte_level:
        values["scores"] = source.scores(vocabulary)
    common = {"tokens": source.tokens(vocabulary), "token_type": source.types(vocabulary)}
    values = {**values, **common, **source.special_ids(), **source.ends()}
    metadata = {f"tokenizer.ggml.{key}": value for key, value in values.items()}
    if source.dropped(vocabulary):
        notes.append(f"{source.dropped(vocabulary)} tokens beyond the embedding's {vocabulary} rows are left out")
    template = source.chat_template()
    return metadata | ({"tokenizer.chat_template": template} if template else {}), notes


class _Source:
    """The files, parsed."""

    def __init__(self, files: Mapping[str, bytes], config: Mapping[str, Any]) -> None:
        parsed = {
            name: parse_json(files.get(name, b"{}"), name)
            for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json")
        }
        self.whole, self.config, self.generation = parsed.values()
        self.model_config = config
        self.template = files.get("chat_template.jinja")
        self.model: dict[str, Any] = self.whole.get("model") or {}
        self.added = {one["id"]: one for one in self.whole.get("added_tokens") or []}
        self.numbers: dict[str, int] = dict(self.model.get("vocab") or {})
        self.numbers |= {one["content"]: number for number, one in self.added.items()}

    @property
    def is_byte_level(self) -> bool:
        return '"ByteLevel"' in json.dumps([self.whole.get("pre_tokenizer"), self.whole.get("decoder")])

    def byte_level(self) -> tuple[dict[str, Any], list[str]]:
        name = split_name(self.whole.get("pre_tokenizer"))
        notes = [] if name else ["tokenizer.json cuts texts in a way that has no name: llama.cpp may find other tokens"]
        return {"model": "gpt2", "pre": name or "default", "merges": self.merges()}, notes

    def pieces(self) -> tuple[dict[str, Any], list[str]]:
        pairs = self._pairs()
        values: dict[str, Any] = {"model": "llama", "pre": "default", "add_space_prefix": self._has_prefix()}
        if not any(" " in part for pair in pairs for part in pair):
            values["merges"] = self.merges()
        return values, []

    def scores(self, vocabulary: int) -> np.ndarray:
        """f32[V]: minus the rank of the first merge that makes a token."""
        scores = np.full(vocabulary, _NEVER_MERGED, np.float32)
        for rank, (left, right) in enumerate(self._pairs()):
            number = self.numbers.get(left + right, vocabulary)
            if number < vocabulary and scores[number] == np.float32(_NEVER_MERGED):
                scores[number] = -rank
        return scores

    def merges(self) -> list[str]:
        return [f"{left} {right}" for left, right in self._pairs()]

    def _pairs(self) -> list[tuple[str, str]]:
        merges = self.model.get("merges") or []
        pairs = [tuple(one.split(" ", 1)) if isinstance(one, str) else tuple(one) for one in merges]
        if not all(len(one) == 2 for one in pairs):
            raise JQ4Error("tokenizer.json: holds a merge that is no pair of tokens. It is damaged; download it again.")
        return pairs  # pyright: ignore[reportReturnType]

    def tokens(self, vocabulary: int) -> list[str]:
        by_number = {number: token for token, number in self.numbers.items()}
        return [by_number.get(i, f"[PAD{i}]") for i in range(vocabulary)]

    def types(self, vocabulary: int) -> np.ndarray:
        kinds = np.full(vocabulary, UNUSED, np.int32)
        unknown = None if self.is_byte_level else self.model.get("unk_token")
        for token, number in self.numbers.items():
            if number < vocabulary:
                kinds[number] = self._type(token, number, unknown)
        return kinds

    def _type(self, token: str, number: int, unknown: Any) -> int:
        if token == unknown:
            return UNKNOWN
        if number in self.added:
            return CONTROL if self.added[number].get("special") else OF_THE_USER
        return BYTE if self.model.get("byte_fallback") and _BYTE.fullmatch(token) else NORMAL

    def dropped(self, vocabulary: int) -> int:
        return sum(number >= vocabulary for number in self.numbers.values())

    def special_ids(self) -> dict[str, int]:
        ids = {
            f"{name}_token_id": number
            for name, key in (("bos", "bos"), ("eos", "eos"), ("unknown", "unk"), ("padding", "pad"))
            if (number := self._special(key)) is not None
        }
        ends = self.generation.get("eos_token_id")
        others = [one for one in ends if one != ids.get("eos_token_id")] if isinstance(ends, list) else []
        return ids | ({"eot_token_id": others[-1]} if others else {})

    def _special(self, key: str) -> int | None:
        token = self.config.get(f"{key}_token")
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str) and token in self.numbers:
            return self.numbers[token]
        number = self.generation.get(f"{key}_token_id", self.model_config.get(f"{key}_token_id"))
        number = number[0] if isinstance(number, list) and number else number
        return number if type(number) is int else None

    def ends(self) -> dict[str, bool]:
        """Whether a text gets its first and last token from the tokenizer itself."""
        template = _find(self.whole.get("post_processor"), "TemplateProcessing")
        parts = [(part.get("SpecialToken") or {}).get("id") for part in (template or {}).get("single") or []]
        bos, eos = self._special("bos"), self._special("eos")
        found = [self.numbers.get(part) if isinstance(part, str) else None for part in parts] or [None]
        return {
            "add_bos_token": found[0] is not None and found[0] == bos,
            "add_eos_token": len(found) > 1 and found[-1] is not None and found[-1] == eos,
        }

    def chat_template(self) -> str | None:
        if self.template is not None:
            return self.template.decode()
        found = self.config.get("chat_template")
        if isinstance(found, list):  # several, by name
            found = next((one.get("template") for one in found if one.get("name") == "default"), None)
        return found if isinstance(found, str) else None

    def _has_prefix(self) -> bool:
        if _find(self.whole.get("normalizer"), "Prepend"):
            return True
        spaces = _find(self.whole.get("pre_tokenizer"), "Metaspace") or _find(self.whole.get("normalizer"), "Metaspace")
        if spaces is None:
            return False
        return spaces.get("prepend_scheme", "always" if spaces.get("add_prefix_space", True) else "never") != "never"


def _find(step: Any, kind: str) -> dict[str, Any] | None:
    """The first step of a kind in a step of tokenizer.json, or in its sequence."""
    if not isinstance(step, dict):
        return None
    if step.get("type") == kind:
        return step
    inner = step.get("normalizers") or step.get("pretokenizers") or step.get("processors") or step.get("decoders") or []
    return next((found for one in inner if (found := _find(one, kind))), None)
