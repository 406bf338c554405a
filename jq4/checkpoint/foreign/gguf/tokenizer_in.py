"""tokenizer.json and tokenizer_config.json made of tokenizer.ggml.*: byte-level BPE ("gpt2"), SentencePiece ("llama").

A "gpt2" vocabulary is what tokenizer.json would hold: tokens and merges; how texts are cut is a name (splits.py).
A "llama" one has a score a token instead of merges: pieces are merged into the token with the best score first. As
tokenizers' BPE wants merges, every way to put a token together of two others becomes one, in the order of the scores;
Gemma's scores do not follow its merges, the order of its tokens does. Where a file has merges all the same, they hold.

A token's type: 1 normal, 2 unknown, 3 control (special), 4 of the user (always whole, not special), 5 unused, 6 a byte.
"""

import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from jq4.checkpoint.foreign.gguf.splits import pre_tokenizer, takes_whole_words
from jq4.errors import JQ4Error

UNKNOWN, CONTROL, OF_THE_USER = 2, 3, 4
SPACE = "\u2581"
_LONGEST = 256  # characters of a token that merges are made for; every piece of a longer one would be tried
_SPECIAL = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}


def tokenizer_files(metadata: Mapping[str, Any], where: str) -> tuple[dict[str, bytes], list[str]]:
    """The small files by name, and notes; none where there is no tokenizer, or one of a kind that is not read."""
    read = _Vocabulary(metadata, where)
    kind = metadata.get("tokenizer.ggml.model")
    if kind is None or kind == "none" or not read.tokens:
        return {}, []
    if kind not in ("gpt2", "llama"):
        return {}, [f"tokenizer.ggml.model is {kind!r}, which is not read (gpt2 and llama are): no tokenizer.json"]
    tokenizer, notes = _byte_level(read) if kind == "gpt2" else _sentence_piece(read)
    settings = _settings(read, kind == "llama")
    files = {"tokenizer.json": tokenizer, "tokenizer_config.json": settings, "generation_config.json": _ids(read)}
    return {name: json.dumps(content, ensure_ascii=False).encode() for name, content in files.items()}, notes


class _Vocabulary:
    """tokenizer.ggml.* with their kinds checked."""

    def __init__(self, metadata: Mapping[str, Any], where: str) -> None:
        self.metadata, self.where = metadata, where
        self.architecture = str(metadata.get("general.architecture"))
        self.tokens: list[str] = self._strings("tokens")
        self.types = self._numbers("token_type")
        self.pre = str(metadata.get("tokenizer.ggml.pre", "default"))

    def _strings(self, key: str) -> list[str]:
        value = self.metadata.get(f"tokenizer.ggml.{key}", [])
        if not isinstance(value, list):
            raise self._error(key, type(value).__name__, "a list of strings")
        return value

    def _numbers(self, key: str) -> list[Any]:
        value = self.metadata.get(f"tokenizer.ggml.{key}")
        if value is None:
            return []
        if not isinstance(value, np.ndarray) or len(value) != len(self.tokens):
            found = f"{len(value)} values" if isinstance(value, np.ndarray | list) else repr(value)
            raise self._error(key, found, f"{len(self.tokens)} numbers, one a token")
        return value.tolist()

    def scores(self) -> list[float]:
        return self._numbers("scores") or [-float(i) for i in range(len(self.tokens))]

    def merges(self) -> list[list[str]]:
        merges = [one.split(" ") for one in self._strings("merges")]
        wrong = next((one for one in merges if len(one) != 2), None)
        if wrong is not None:
            raise self._error("merges", f"{' '.join(wrong)!r}", "two tokens with a space between")
        return merges

    def flag(self, key: str, default: bool) -> bool:
        return bool(self.metadata.get(f"tokenizer.ggml.{key}", default))

    def id_of(self, which: str) -> int | None:
        found = self.metadata.get(f"tokenizer.ggml.{which}_token_id")
        if found is None or (type(found) is int and found == 2**32 - 1):
            return None
        if type(found) is not int or not 0 <= found < len(self.tokens):
            raise self._error(f"{which}_token_id", repr(found), f"a token's number below {len(self.tokens)}")
        return found

    def _error(self, key: str, found: str, wanted: str) -> JQ4Error:
        return JQ4Error(
            f"{self.where}: tokenizer.ggml.{key} has {found}, wanted {wanted}. The file is damaged; download it again."
        )


def _byte_level(read: _Vocabulary) -> tuple[dict[str, Any], list[str]]:
    step, known = pre_tokenizer(read.pre)
    notes = [] if known else [f"tokenizer.ggml.pre is {read.pre!r}, which is not known: texts are cut as GPT-2 does"]
    vocabulary = _numbered(read.tokens)
    model = _model(vocabulary, _known(read.merges(), vocabulary), ignore_merges=takes_whole_words(read.pre))
    byte_level = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
    normalizer = {"type": "NFC"} if read.pre == "qwen2" else None
    return _tokenizer(read, model, normalizer, step, byte_level), notes


def _sentence_piece(read: _Vocabulary) -> tuple[dict[str, Any], list[str]]:
    gemma = read.architecture.startswith("gemma")
    tokens = [_respelled(one) for one in read.tokens] if gemma else read.tokens
    vocabulary = _numbered(tokens)
    scores = [-float(i) for i in range(len(tokens))] if gemma else read.scores()
    merges = _known(read.merges(), vocabulary) or merges_of(vocabulary, scores, _special_ids(read))
    unknown = read.id_of("unknown")
    if unknown is None:
        unknown = next((i for i, kind in enumerate(read.types) if kind == UNKNOWN), None)
    model = _model(
        vocabulary, merges, unk_token=None if unknown is None else tokens[unknown], fuse_unk=True, byte_fallback=True
    )
    prefix = read.flag("add_space_prefix", not gemma)
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    steps = [{"type": "Prepend", "prepend": SPACE}] if prefix else []
    back = [{"type": "Replace", "pattern": {"String": SPACE}, "content": " "}, {"type": "ByteFallback"}]
    back += [{"type": "Fuse"}, *([{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefix else [])]
    decoder = {"type": "Sequence", "decoders": back}
    return _tokenizer(read, model, {"type": "Sequence", "normalizers": [*steps, replace]}, None, decoder), []


def merges_of(vocabulary: Mapping[str, int], scores: list[float], whole: set[int]) -> list[list[str]]:
    """Every pair of tokens that makes a token (but those in `whole`), the best score first; ties as transformers'."""
    found = []
    for token, number in vocabulary.items():
        if number in whole or len(token) > _LONGEST:
            continue
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in vocabulary and right in vocabulary:
                found.append((-scores[number], -len(left), number, vocabulary[left], left, right))
    return [[left, right] for *_, left, right in sorted(found)]


def _special_ids(read: _Vocabulary) -> set[int]:
    return {i for i, kind in enumerate(read.types) if kind in (UNKNOWN, CONTROL)}


def _numbered(tokens: list[str]) -> dict[str, int]:
    """A token that stands twice keeps its first number, as in llama.cpp."""
    vocabulary: dict[str, int] = {}
    for number, token in enumerate(tokens):
        vocabulary.setdefault(token, number)
    return vocabulary


def _known(merges: list[list[str]], vocabulary: Mapping[str, int]) -> list[list[str]]:
    """Merges of tokens into a token: tokenizers reads no others."""
    return [one for one in merges if one[0] in vocabulary and one[1] in vocabulary and one[0] + one[1] in vocabulary]


def _respelled(token: str) -> str:
    """Gemma's runs of spaces, which its files spell out."""
    return SPACE * len(token) if token and not token.strip(" ") else token


def _model(vocabulary: dict[str, int], merges: list[list[str]], **settings: Any) -> dict[str, Any]:
    model = {
        "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
        "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
    }  # fmt: skip
    return model | settings | {"vocab": vocabulary, "merges": merges}


def _tokenizer(read: _Vocabulary, model: Any, normalizer: Any, cut: Any, decoder: Any) -> dict[str, Any]:
    spelled = {number: token for token, number in model["vocab"].items()}
    added = [
        {
            "id": number, "content": spelled.get(number, read.tokens[number]), "single_word": False, "lstrip": False,
            "rstrip": False, "normalized": False, "special": kind != OF_THE_USER,
        }
        for number, kind in enumerate(read.types)
        if kind in (CONTROL, OF_THE_USER) and number in spelled
    ]  # fmt: skip
    return {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "normalizer": normalizer,
        "pre_tokenizer": cut, "post_processor": _ends_added(read), "decoder": decoder, "model": model,
    }  # fmt: skip


def _ends_added(read: _Vocabulary) -> dict[str, Any] | None:
    """Adds the tokens that begin and end a text, where the file wants it."""
    first, last = read.id_of("bos"), read.id_of("eos")
    first = first if adds_bos(read.metadata) else None
    last = last if read.flag("add_eos_token", False) else None
    if first is None and last is None:
        return None

    def special(number: int | None, kind: int) -> list[dict[str, Any]]:
        return [] if number is None else [{"SpecialToken": {"id": read.tokens[number], "type_id": kind}}]

    def sequence(letter: str, kind: int) -> list[dict[str, Any]]:
        return [*special(first, kind), {"Sequence": {"id": letter, "type_id": kind}}, *special(last, kind)]

    used = [one for one in (first, last) if one is not None]
    named = {read.tokens[one]: {"id": read.tokens[one], "ids": [one], "tokens": [read.tokens[one]]} for one in used}
    pair = [*sequence("A", 0), *sequence("B", 1)]
    return {"type": "TemplateProcessing", "single": sequence("A", 0), "pair": pair, "special_tokens": named}


def adds_bos(metadata: Mapping[str, Any]) -> bool:
    """Whether a text begins with its token; where a file is silent, as llama.cpp has it."""
    kind, pre = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre")
    silent = kind == "llama" or pre in ("llama-bpe", "llama3", "llama-v3", "tekken")
    return bool(metadata.get("tokenizer.ggml.add_bos_token", silent))


def _settings(read: _Vocabulary, sentence_piece: bool) -> dict[str, Any]:
    settings: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 10**30}
    for key, which in _SPECIAL.items():
        number = read.id_of(which)
        if number is not None:
            settings[f"{key}_token"] = read.tokens[number]
    settings |= {"add_bos_token": adds_bos(read.metadata), "add_eos_token": read.flag("add_eos_token", False)}
    settings["clean_up_tokenization_spaces"] = False
    template = read.metadata.get("tokenizer.chat_template")
    return settings | ({"chat_template": template} if isinstance(template, str) else {})


def _ids(read: _Vocabulary) -> dict[str, Any]:
    """generation_config.json: every token that ends a text or a turn."""
    ends = [one for which in ("eos", "eot", "eom") if (one := read.id_of(which)) is not None]
    first = read.id_of("bos")
    ids: dict[str, Any] = {} if first is None else {"bos_token_id": first}
    return ids | ({"eos_token_id": list(dict.fromkeys(ends))} if ends else {})
