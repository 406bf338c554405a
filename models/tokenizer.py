"""Text to ids and back: the folder's tokenizer.json, and which tokens begin and end a text."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import tokenizers

from jq4.errors import JQ4Error

_ReadFile = Callable[[str], bytes | None]


class Tokenizer:
    """`tokenizers.Tokenizer` with the model's own beginning and end.

    Attributes:
      inner: the tokenizer as the tokenizers library reads it.
      bos_token_id: the token that begins a text, if the model has one.
      eos_token_ids: the tokens that end a text, by generation_config.json, config.json or tokenizer_config.json.
    """

    def __init__(
        self, inner: tokenizers.Tokenizer, *, bos_token_id: int | None = None, eos_token_ids: Iterable[int] = ()
    ) -> None:
        self.inner = inner
        self.bos_token_id = bos_token_id
        self.eos_token_ids = tuple(eos_token_ids)

    @classmethod
    def from_folder(cls, folder: str | Path) -> "Tokenizer":
        """Reads a Hugging Face folder's tokenizer.json. Raises JQ4Error if it is missing or damaged."""
        tokenizer = cls.from_files(lambda name: _bytes_of(Path(folder) / name), str(folder))
        if tokenizer is None:
            raise JQ4Error(
                f"{Path(folder) / 'tokenizer.json'}: is missing, wanted to read text. "
                "Copy it from the model's folder, or give token ids instead of text."
            )
        return tokenizer

    @classmethod
    def from_files(cls, read: _ReadFile, where: str) -> "Tokenizer | None":
        """The same from `read(name)`, a file's content or None where there is none; None without a tokenizer.json."""
        content = read("tokenizer.json")
        if content is None:
            return None
        try:
            inner = tokenizers.Tokenizer.from_buffer(content)
        except Exception as error:  # the library raises nothing more special
            raise JQ4Error(f"{where}: tokenizer.json cannot be read ({error}). Download it again.") from error
        inner.no_padding()
        inner.no_truncation()
        settings = _settings(read, where)
        bos = _token_ids(inner, settings, "bos")
        return cls(inner, bos_token_id=bos[0] if bos else None, eos_token_ids=_token_ids(inner, settings, "eos"))

    def encode(self, text: str, *, add_special_tokens: bool = True) -> tokenizers.Encoding:
        """The text's tokens; `.ids` are their numbers. Special tokens are those that tokenizer.json adds by itself."""
        try:
            return self.inner.encode(text, add_special_tokens=add_special_tokens)
        except TypeError as error:
            raise JQ4Error(f"the text {text[:40]!r} is not valid Unicode; give it as UTF-8.") from error

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = True) -> str:
        """The text of token ids, without the tokens that begin and end a text, even where tokenizer.json has them as
        ordinary ones."""
        skipped = {self.bos_token_id, *self.eos_token_ids} if skip_special_tokens else set()
        return self.inner.decode(
            [int(one) for one in ids if one not in skipped], skip_special_tokens=skip_special_tokens
        )

    def decode_after(self, before: Iterable[int], ids: Iterable[int]) -> str:
        """The text that ids add to the tokens before them: many tokenizers drop a space where a text begins."""
        before = list(before)
        start, whole = self.decode(before), self.decode([*before, *ids])
        return whole[len(start) :] if whole.startswith(start) else self.decode(ids)


def _bytes_of(file: Path) -> bytes | None:
    return file.read_bytes() if file.is_file() else None


def _settings(read: _ReadFile, where: str) -> list[dict[str, Any]]:
    """The files that may say which tokens begin and end, the first to be believed first."""
    settings = []
    for name in ("generation_config.json", "config.json", "tokenizer_config.json"):
        try:
            parsed = json.loads(read(name) or b"{}")
        except ValueError as error:
            raise JQ4Error(f"{where}: {name} is not JSON ({error}). It is damaged; download it again.") from error
        settings.append(parsed if isinstance(parsed, dict) else {})
    return settings


def _token_ids(inner: tokenizers.Tokenizer, settings: list[dict[str, Any]], which: str) -> tuple[int, ...]:
    for holder in settings:
        ids = holder.get(f"{which}_token_id")
        if ids is not None:
            ids = tuple(ids) if isinstance(ids, list) else (ids,)
            if not all(type(one) is int for one in ids):
                raise JQ4Error(
                    f"{which}_token_id is {holder[f'{which}_token_id']!r}, wanted a token's number or a list."
                )
            return ids
        token = holder.get(f"{which}_token")
        token = token.get("content") if isinstance(token, dict) else token
        found = inner.token_to_id(token) if isinstance(token, str) else None
        if found is not None:
            return (found,)
    return ()
