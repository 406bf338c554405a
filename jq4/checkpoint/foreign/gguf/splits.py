"""How byte-level BPE vocabularies cut a text before they merge: llama.cpp's names, and what tokenizer.json writes.

A GGUF file names the cut (`tokenizer.ggml.pre`), tokenizer.json spells it out as a regular expression. Several names
stand for one expression; the first of them is the one that is written.
"""

from typing import Any

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_REST = r"|\s*[\r\n]+|\s+(?!\S)|\s+"
_WORDS = r"|[^\r\n\p{L}\p{N}]?\p{L}+"

_LLAMA3 = _CONTRACTIONS + _WORDS + r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*" + _REST
_QWEN2 = _CONTRACTIONS + _WORDS + r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*" + _REST
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
    rf"|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*{_REST}"
)
_GPT4O = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_CONTRACTIONS}?|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_CONTRACTIONS}?"
    rf"|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*{_REST}"
)

_BY_EXPRESSION: dict[str, tuple[str, ...]] = {
    _LLAMA3: ("llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral", "dbrx", "smaug-bpe", "lfm2"),
    _QWEN2: ("qwen2", "deepseek-r1-qwen", "megrez"),
    _TEKKEN: ("tekken",),
    _GPT4O: ("gpt-4o", "llama4"),
}
_EXPRESSIONS = {name: expression for expression, names in _BY_EXPRESSION.items() for name in names}
_WHOLE_WORDS_FIRST = {*_BY_EXPRESSION[_LLAMA3], *_BY_EXPRESSION[_TEKKEN]}
_GPT2 = ("gpt-2", "phi-2", "jina-es", "jina-de", "mpt", "olmo", "gigachat")
_DIGITS = ("smollm", "starcoder", "refact", "command-r", "codeshell")


def pre_tokenizer(name: str) -> tuple[dict[str, Any], bool]:
    """tokenizer.json's pre_tokenizer for llama.cpp's name, and whether the name is known (else it is GPT-2's)."""
    if name in _EXPRESSIONS:
        pattern = {"Regex": _EXPRESSIONS[name]}
        split = {"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False}
        return {"type": "Sequence", "pretokenizers": [split, _byte_level(False)]}, True
    if name in _DIGITS:
        digits = {"type": "Digits", "individual_digits": True}
        return {"type": "Sequence", "pretokenizers": [digits, _byte_level(True)]}, True
    return _byte_level(True), name in _GPT2


def takes_whole_words(name: str) -> bool:
    """Whether a word that is a token is taken whole, before any merge."""
    return name in _WHOLE_WORDS_FIRST


def split_name(pre_tokenizer: Any) -> str | None:
    """llama.cpp's name for tokenizer.json's pre_tokenizer, or None."""
    steps = pre_tokenizer or {}
    steps = steps.get("pretokenizers", [steps]) if isinstance(steps, dict) else []
    kinds = [step.get("type") for step in steps]
    if kinds == ["ByteLevel"] and steps[0].get("use_regex", True):
        return _GPT2[0]
    if kinds == ["Digits", "ByteLevel"] and steps[0].get("individual_digits"):
        return _DIGITS[0]
    if kinds == ["Split", "ByteLevel"]:
        expression = (steps[0].get("pattern") or {}).get("Regex", "")
        return next((names[0] for one, names in _BY_EXPRESSION.items() if one == expression), None)
    return None


def _byte_level(use_regex: bool) -> dict[str, Any]:
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": use_regex}
