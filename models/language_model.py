"""The model that users hold: a config, params (dense or packed) and a tokenizer; logits, text, save, open.

A model is Hugging Face's folder, dense or packed by others (config.json and safetensors), a .gguf file, or a folder of
jq4's own (with a jq4.json, see jq4/checkpoint/FORMAT.md), which carries config and tokenizer along. In all cases the
same decoder runs, through `jq4.quantized`: on dense params that is the plain function, on packed ones their products
stay packed, and `record` lists what did not.
"""

import dataclasses
import functools
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jq4.apply import Quantized, quantized
from jq4.checkpoint import orbax
from jq4.checkpoint.deferred import deferred_tree
from jq4.checkpoint.foreign import Checkpoint, open_checkpoint
from jq4.checkpoint.manifest import MANIFEST
from jq4.checkpoint.safetensors_files import parse_json
from jq4.errors import JQ4Error
from jq4.layouts import prepare
from jq4.record import Record
from jq4.shardings import shardings_of
from models.adapted import WithAdapters, adapters_of, save_adapters
from models.config import DecoderConfig
from models.decoder import Decoder
from models.filling import deferred_params_of, params_of
from models.generate import generate
from models.hf import load_config
from models.layer_runs import adapters_in_runs, in_runs, runs_of
from models.tokenizer import Tokenizer

# what travels with the weights, so that a saved folder is a model
_COMPANIONS = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)
_SMALLEST_PROMPT = 16  # prompts are padded to a power of two from here on, so that few lengths are compiled


@dataclasses.dataclass(frozen=True, eq=False)
class LanguageModel:
    """A decoder and its weights. Change one field with `dataclasses.replace(model, params=...)`.

    Attributes:
      config: the architecture.
      params: the tree of Decoder's params; QArray leaves are multiplied packed.
      tokenizer: only text needs one; token ids do without.
      adapters: jq4.Adapters of the params, whose products are added to theirs; None for none.
      dtype: what is computed in. None: bfloat16 for a bfloat16 checkpoint on an accelerator, else float32.
      files: the small files that `save` writes beside the weights, by name.
      apply: `jq4.quantized(Decoder(config).apply)`, told where the packed weights lie; `jq4.with_lora` of it with
        adapters, and then of {"params": (params, adapters)}.
    """

    config: DecoderConfig
    params: Any = dataclasses.field(repr=False)
    tokenizer: Tokenizer | None = None
    dtype: Any = None
    files: Mapping[str, bytes] = dataclasses.field(default_factory=dict, repr=False)
    adapters: Any = None
    apply: Quantized | WithAdapters = dataclasses.field(init=False, repr=False)

    def __post_init__(self) -> None:
        if self.dtype is None:
            narrow = self.config.dtype == "bfloat16" and jax.default_backend() != "cpu"
            object.__setattr__(self, "dtype", jnp.dtype(jnp.bfloat16 if narrow else jnp.float32))
        decoder = Decoder(self.config, dtype=self.dtype, runs=runs_of(self.params))
        transform = quantized if self.adapters is None else WithAdapters
        object.__setattr__(self, "apply", transform(decoder.apply, shardings=shardings_of(self.params)))

    @classmethod
    def from_folder(
        cls, folder: str | Path, *, dtype: Any = None, shardings: Any = None, say: Callable[[str], None] | None = None
    ) -> "LanguageModel":
        """Opens a Hugging Face folder, a .gguf file or a folder of jq4's own, packed weights packed.

        A missing tokenizer is an error only once text is given.

        dtype: what to compute in; the weights keep the dtype they are stored in. shardings: as `jq4.restore` takes
        them, for a folder of jq4's own. say: takes notes for the user, where a file's label and contents disagree.
        Raises JQ4Error, naming the file and what is wrong with it.
        """
        folder = Path(folder)
        if (folder / MANIFEST).exists():
            return cls._of_own(folder, dtype, lambda: orbax.restore(folder, shardings=shardings))
        return cls.from_checkpoint(_opened(folder, say), str(folder), dtype=dtype)

    @classmethod
    def unread(cls, folder: str | Path, *, say: Callable[[str], None] | None = None) -> "LanguageModel":
        """The same model with its params deferred (jq4.checkpoint.deferred): to be changed and saved, not to be run."""
        folder = Path(folder)
        if (folder / MANIFEST).exists():
            return cls._of_own(folder, None, lambda: deferred_tree(folder, orbax.read_manifest(folder)))
        return cls.from_checkpoint(_opened(folder, say), str(folder), fill=deferred_params_of)

    @classmethod
    def _of_own(cls, folder: Path, dtype: Any, params: Callable[[], Any]) -> "LanguageModel":
        held = orbax.read_manifest(folder).extra_files
        files = {name: orbax.read_extra_file(folder, name) for name in _COMPANIONS if name in held}
        if "config.json" not in files:
            raise JQ4Error(
                f"{folder}: holds packed weights and no config.json, so it is no model. Open the "
                "weights alone with jq4.restore, or save them again with LanguageModel.save."
            )
        config = DecoderConfig.from_hf(parse_json(files["config.json"], f"{folder}: config.json"))
        tokenizer = Tokenizer.from_files(files.get, str(folder))
        return cls(config, params(), tokenizer, dtype, files, adapters_of(folder))

    @classmethod
    def from_checkpoint(
        cls, checkpoint: Checkpoint, where: str, *, dtype: Any = None, fill: Callable[..., Any] = params_of
    ) -> "LanguageModel":
        """The model of an opened checkpoint, dense or packed, its params as `fill` makes them; errors name `where`."""
        config = config_of(checkpoint, where)
        files = files_of(checkpoint)
        params = fill(where, checkpoint, config)
        return cls(config, params, Tokenizer.from_files(files.get, where), dtype, files)

    def in_runs_of(self, other: "LanguageModel") -> "LanguageModel":
        """The same model with its layers cut where the other's are too, so that their params have the same paths."""
        held, runs = runs_of(self.params), runs_of(other.params)
        if not runs:
            return self
        adapters = self.adapters and adapters_in_runs(self.config, self.adapters, held, runs)
        return dataclasses.replace(self, params=in_runs(self.config, self.params, runs), adapters=adapters)

    def save(self, folder: str | Path, *, recipe: Any = None, source: Any = None) -> None:
        """Writes a folder of jq4's own, packed leaves packed, whole or not at all. Arguments as jq4.save's."""
        files = dict(self.files)
        files.setdefault("config.json", json.dumps(self.config.to_hf(), indent=2).encode())
        if self.tokenizer is not None:
            files.setdefault("tokenizer.json", self.tokenizer.inner.to_str().encode())
        orbax.save(folder, self.params, recipe=recipe, source=source, extra_files=files)
        save_adapters(Path(folder), self.adapters)

    def prepared(self) -> "LanguageModel":
        """The same model with packed weights laid out for this machine's kernels, once instead of at every call."""
        return dataclasses.replace(self, params=prepare(self.params, jax.devices()[0].device_kind))

    @property
    def weights(self) -> Any:
        """What `apply` takes as "params": the params, with the adapters where there are some."""
        return self.params if self.adapters is None else (self.params, self.adapters)

    @property
    def record(self) -> Record:
        """What the last trace could not keep packed."""
        return self.apply.record

    def logits(self, tokens: Any, mask: Any = None) -> jax.Array:
        """tokens i32[B, T], mask bool[B, T] of what is text -> f32[B, T, V]; compiled once for each shape."""
        tokens = self._checked(tokens)
        mask = None if mask is None else jnp.asarray(mask, bool)
        return _logits(self.weights, tokens, mask, apply=self.apply)

    def generate(
        self,
        prompts: Iterable[str] | Any,
        *,
        mask: Any = None,
        max_new_tokens: int = 64,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 0,
        stop_at_end: bool = True,
    ) -> Any:
        """Continues prompts: a list of texts gives a list of texts (without the prompts), tokens i32[B, T] give
        tokens i32[B, max_new_tokens], a row that ended repeating its end token. Options as models.generate's.

        Raises JQ4Error for text without a tokenizer, an empty prompt, a token outside the vocabulary.
        """
        if isinstance(prompts, str):
            raise JQ4Error(f"prompts is one text ({prompts[:20]!r}), wanted a list of them: [text].")
        as_text = isinstance(prompts, list | tuple) and all(isinstance(one, str) for one in prompts)
        tokens, mask = self._encoded(prompts) if as_text else (prompts, mask)
        ends = self._end_ids() if stop_at_end else ()
        made = generate(
            self.apply,
            self.weights,
            self.config,
            self._checked(tokens),
            mask,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            seed=seed,
            eos_ids=ends,
            dtype=self.dtype,
        )
        if not as_text:
            return made
        rows = zip(np.asarray(tokens), np.asarray(mask), np.asarray(made), strict=True)
        return [self._text(prompt[kept], row, ends) for prompt, kept, row in rows]

    def _encoded(self, prompts: Any) -> tuple[Any, Any]:
        """Texts as tokens i32[B, T] padded on the left, and what is text, bool[B, T]."""
        if not prompts:
            raise JQ4Error("there are no prompts; give at least one text.")
        rows = [self._tokenizer.encode(text).ids or self._beginning() for text in prompts]
        length = max(_SMALLEST_PROMPT, 1 << (max(map(len, rows)) - 1).bit_length())
        tokens, mask = np.zeros((len(rows), length), np.int32), np.zeros((len(rows), length), bool)
        for row, ids in enumerate(rows):
            tokens[row, length - len(ids) :] = ids
            mask[row, length - len(ids) :] = True
        return tokens, mask

    def _beginning(self) -> list[int]:
        bos = self._tokenizer.bos_token_id
        if bos is None:
            raise JQ4Error("an empty prompt, and the model has no token that begins a text; give at least a word.")
        return [bos]

    def _text(self, prompt: np.ndarray, row: np.ndarray, ends: tuple[int, ...]) -> str:
        ended = np.flatnonzero(np.isin(row, ends))
        return self._tokenizer.decode_after(prompt, row[: ended[0]] if ended.size else row)

    @property
    def _tokenizer(self) -> Tokenizer:
        if self.tokenizer is None:
            raise JQ4Error(
                "this model has no tokenizer.json, which text needs. Put the one of the original model into its "
                "folder, or give token ids instead of text."
            )
        return self.tokenizer

    def _end_ids(self) -> tuple[int, ...]:
        of_tokenizer = () if self.tokenizer is None else self.tokenizer.eos_token_ids
        return of_tokenizer or self.config.eos_token_ids

    def _checked(self, tokens: Any) -> jax.Array:
        """tokens as i32[B, T]. JAX would clamp a token outside of the vocabulary without a word."""
        try:
            found = np.asarray(tokens)
        except jax.errors.TracerArrayConversionError:
            return jnp.asarray(tokens, jnp.int32)
        if found.ndim != 2 or not np.issubdtype(found.dtype, np.integer):
            raise JQ4Error(f"tokens are {found.dtype}{list(found.shape)}, wanted integers [batch, length].")
        if found.size and not 0 <= found.min() <= found.max() < self.config.vocab_size:
            raise JQ4Error(
                f"tokens run from {found.min()} to {found.max()}, wanted 0 to {self.config.vocab_size - 1}. "
                "Make them with this model's own tokenizer."
            )
        return jnp.asarray(found, jnp.int32)


def _opened(folder: Path, say: Callable[[str], None] | None) -> Checkpoint:
    """A checkpoint of others; its notes are told."""
    if folder.is_dir():
        load_config(folder)  # its errors come before those of weights
    checkpoint = open_checkpoint(folder)
    if say is not None:
        for note in checkpoint.notes:
            say(note)
    return checkpoint


def config_of(checkpoint: Checkpoint, where: str) -> DecoderConfig:
    """The architecture that a checkpoint states."""
    if checkpoint.config is None:
        raise JQ4Error(f"{where}: there is no config.json with it, so it is no model. Put the original's beside it.")
    return DecoderConfig.from_hf(checkpoint.config)


def files_of(checkpoint: Checkpoint) -> dict[str, bytes]:
    """The small files of a checkpoint that a saved model takes along; config.json without its way of packing."""
    held = {name: content for name, content in checkpoint.files.items() if name in _COMPANIONS}
    if checkpoint.config is None:
        return held
    return {"config.json": json.dumps(checkpoint.config, indent=2).encode()} | held


def companion_files(folder: Path) -> dict[str, bytes]:
    """The small files of a Hugging Face folder that a saved model takes along: config, tokenizer, ..."""
    return {name: (folder / name).read_bytes() for name in _COMPANIONS if (folder / name).is_file()}


@functools.partial(jax.jit, static_argnames="apply")
def _logits(params: Any, tokens: jax.Array, mask: jax.Array | None, *, apply: Callable[..., Any]) -> jax.Array:
    return apply({"params": params}, tokens, mask=mask)
