"""Oracle: none but the promise. Files that were found, by `benchmarks.fuzz` or by thought, to crash, hang or grow."""

import json
import os
import struct

import numpy as np
import pytest

from benchmarks.fuzzing import folders, gguf_files
from benchmarks.fuzzing.limits import bounded_memory, outcome
from benchmarks.fuzzing.seeds import GGUF, SEEDS, Folder
from benchmarks.fuzzing.using import laid, use_checkpoint
from jq4 import JQ4Error, Recipe
from jq4.checkpoint.conversion.progress import JOURNAL, folder_of, journal_for
from jq4.checkpoint.foreign import open_checkpoint
from jq4.checkpoint.safetensors_files import INDEX, SINGLE
from models.config import DecoderConfig
from tests.small_checkpoints import CONFIG

P = "model.layers.0.mlp.up_proj"


def refused(path) -> str:
    """What opening and reading a file says; it must refuse, within a second and a bounded memory."""
    with bounded_memory():
        what, said = outcome(lambda: use_checkpoint(path), traced=True)
    assert what == "refused", said
    return said


def folder_seed(reader: str, number: int = 0) -> Folder:
    seed = SEEDS[reader][number]()
    assert isinstance(seed, Folder)
    return seed


def gguf_seed(number: int = 0) -> GGUF:
    seed = SEEDS["gguf"][number]()
    assert isinstance(seed, GGUF)
    return seed


def folder_of_seed(folder, reader, number=0, tensors=None, quantization=None):
    """A sound folder with some tensors (None removes one) and some of quantization_config replaced."""
    seed = folder_seed(reader, number)
    ((name, held),) = seed.shards.items()
    held = {key: array for key, array in (held | (tensors or {})).items() if array is not None}
    config = dict(seed.config)
    config["quantization_config"] = config.get("quantization_config", {}) | (quantization or {})
    folder.mkdir(exist_ok=True)
    laid(folder, folders.sound(Folder({name: held}, config, seed.metadata)))
    return folder


def safetensors(folder, header, data=b"", config=b"{}"):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    laid(folder, {SINGLE: len(text).to_bytes(8, "little") + text + data, "config.json": config})
    return folder


def entry(dtype="F32", shape=(1,), offsets=(0, 4)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


HEADERS = {
    "an empty tensor beyond any address": ({"w": entry(shape=(0, 2**62), offsets=(0, 0))}, "wanted one that a machine"),
    "a size that no text can hold": ({"w": entry(shape=[10**3000] * 2)}, "wanted a list of whole numbers"),
    "more axes than numpy has": (
        {"w": entry(shape=[1] * 70)},
        "'w' has shape .*wanted a list of whole numbers, 32 at most",
    ),
    "a lone surrogate": ({"\ud800": entry()}, r"a tensor is called '\\ud800', wanted a name of printable characters"),
    "NUL": ({"a\0b": entry()}, r"a tensor is called 'a\\x00b'"),
    "what a terminal obeys": ({"\x1b[2J": entry()}, r"a tensor is called '\\x1b\[2J'"),
    "an entry as deep as a parser goes": (b'{"w":' + b"[" * 900 + b"]" * 900 + b"}", "'w' is described by"),
    "an entry deeper than that": (b'{"w":' + b"[" * 90_000, "its header does not parse"),
    "a shape that is long": ({"w": entry(shape=["x" * 9000])}, r"'w' has shape \['xxx"),
}


@pytest.mark.parametrize("name", HEADERS)
def test_headers_of_safetensors(name, tmp_path):
    header, text = HEADERS[name]
    said = refused(safetensors(tmp_path, header, bytes(4)))
    with pytest.raises(JQ4Error, match=text):
        raise JQ4Error(said)
    assert SINGLE in said and len(said) < 3100


@pytest.mark.parametrize("place", [SINGLE, "config.json", INDEX])
@pytest.mark.parametrize("kind", ["folder", "pipe", "device"])
def test_what_is_no_regular_file_is_never_read(place, kind, tmp_path):
    """A pipe would wait for ever, and a link to a device never ends."""
    safetensors(tmp_path, {"w": entry()}, bytes(4))
    if place == INDEX:
        (tmp_path / SINGLE).unlink()
    file = tmp_path / place
    file.unlink(missing_ok=True)
    {"folder": file.mkdir, "pipe": lambda: os.mkfifo(file), "device": lambda: file.symlink_to("/dev/zero")}[kind]()
    said = refused(tmp_path)
    assert f"{place}: is not a regular file" in said or "found neither" in said


@pytest.mark.parametrize("shard", ["../x", "/etc/passwd", "a/b", "", "..", "\0", "\ud800", "x" * 300])
def test_shards_outside_of_the_folder(shard, tmp_path):
    laid(tmp_path, {INDEX: json.dumps({"weight_map": {"w": shard}}).encode()})
    assert "wanted a file name without folders" in (said := refused(tmp_path)) or "the shard is missing" in said


@pytest.mark.parametrize("config", [b"[" * 900 + b"]" * 900, b'{"a":' * 200 + b"1" + b"}" * 200])
def test_a_config_that_is_nested_too_deep(config, tmp_path):
    said = refused(safetensors(tmp_path, {"w": entry()}, bytes(4), config))
    assert "config.json: is nested in more than 64 levels" in said


PATTERNS = ("re:(a+)+$", "re:(.*)*!", "re:((([a-z.]*)*)*)*!", "re:(?:.?){60}.{60}!")


@pytest.mark.parametrize("pattern", PATTERNS)
def test_expressions_that_would_take_years(pattern, tmp_path):
    groups = {"group_0": {"targets": [pattern], "weights": {"num_bits": 4, "group_size": 32}}}
    name = "a" * 200
    moved = {f"{name}.{part}": array for part, array in _parts("compressed-tensors").items()}
    folder = folder_of_seed(tmp_path, "compressed-tensors", 0, moved, {"config_groups": groups})
    with bounded_memory():
        what, said = outcome(lambda: use_checkpoint(folder))
    assert what == "opened" or "it takes too long" in said, said
    for key in ("dynamic", "extra_config"):
        folder_of_seed(tmp_path, "gptq", 0, None, {key: {pattern.removeprefix("re:"): {"bits": 4}}})
        with bounded_memory():
            what, said = outcome(lambda: use_checkpoint(tmp_path))
        assert what == "opened", said


def _parts(reader):
    held = folder_seed(reader).shards[SINGLE]
    return {name.removeprefix(f"{P}."): array for name, array in held.items() if name.startswith(P)}


SCALAR = np.array(1, np.int32)
FOLDERS = {
    "a qweight without axes": (
        "gptq",
        0,
        {f"{P}.qweight": SCALAR},
        {},
        r"up_proj.qweight' is I32\[\], wanted two axes",
    ),
    "qzeros without axes": ("gptq", 0, {f"{P}.qzeros": SCALAR}, {}, r"up_proj.qzeros' is I32\[\], wanted two axes"),
    "a format that is a list": (
        "gptq",
        0,
        {f"{P}.scales": None},
        {"checkpoint_format": []},
        "scales' is missing or empty",
    ),
    "an expression that is none": ("gptq", 0, {}, {"dynamic": {"(": {}}}, r"dynamic: '\(' is not a regular expression"),
    "an expression of 2,000 levels": ("gptq", 0, {}, {"extra_config": {"(" * 2000: {}}}, "is not a regular expression"),
    "a repeat beyond any count": ("gptq", 0, {}, {"dynamic": {"a{99999999999}": {}}}, "repetition number is too large"),
    "int-quantized of one row": (
        "compressed-tensors",
        5,
        {f"{P}.weight": np.ones(8, np.int8), f"{P}.weight_scale": np.ones(1, np.float16)},
        {},
        r"up_proj.weight' is I8\[8\], wanted a matrix",
    ),
    "a global scale whose inverse is infinite": (
        "compressed-tensors",
        7,
        {f"{P}.weight_global_scale": np.array([1e-45], np.float32)},
        {},
        "weight_global_scale' holds 1 scales that are NaN, infinite or a zero",
    ),
    "scales of no group": (
        "gemma",
        0,
        {f"{P}.weight_scale": np.zeros((8, 0), np.float32)},
        {},
        r"weight_scale' has shape \[8, 0\], wanted",
    ),
    "an offset beyond float": (
        "bitsandbytes",
        1,
        {
            f"{P}.weight.quant_state.bitsandbytes__nf4": np.frombuffer(
                json.dumps(
                    {
                        "quant_type": "nf4",
                        "blocksize": 64,
                        "dtype": "bfloat16",
                        "shape": [16, 128],
                        "nested_blocksize": 256,
                        "nested_dtype": "float32",
                        "nested_offset": 10**400,
                    }
                ).encode(),
                np.uint8,
            )
        },
        {},
        "has nested_offset 1000.*wanted a finite number",
    ),
    "scales of NaN": (
        "awq",
        0,
        {f"{P}.scales": np.full((6, 24), np.nan, np.float16)},
        {},
        "up_proj.scales' holds 144 values that are NaN or infinite",
    ),
    "a permutation out of range": (
        "gptq",
        3,
        {f"{P}.g_idx": np.full(96, 2**31 - 1, np.int32)},
        {},
        "up_proj.g_idx' .*wanted 3 groups 0 to 2",
    ),
    "a group index below all": (
        "gptq",
        3,
        {f"{P}.g_idx": np.full(96, -(2**31), np.int32)},
        {},
        "up_proj.g_idx' .*wanted",
    ),
}


@pytest.mark.parametrize("name", FOLDERS)
def test_folders_of_packed_weights(name, tmp_path):
    reader, number, tensors, quantization, text = FOLDERS[name]
    said = refused(folder_of_seed(tmp_path, reader, number, tensors, quantization))
    with pytest.raises(JQ4Error, match=text):
        raise JQ4Error(said)


def test_metadata_of_torchao_that_is_no_text(tmp_path):
    seed = folder_seed("torchao")
    laid(tmp_path, folders.sound(Folder(seed.shards, seed.config, {"tensor_names": '["\ud800"]'})))
    assert r"its metadata names '\ud800' and does not describe it" in refused(tmp_path)


def test_an_error_says_nothing_that_a_terminal_obeys_and_is_short():
    said = str(JQ4Error("\x1b[2J\ud800 a\u202eb" + "x" * 10_000 + " the remedy"))
    assert said.startswith(r"\x1b[2J\ud800 a\u202eb") and said.endswith("the remedy") and len(said) < 3100


def gguf(folder, tensors=None, number=0, **metadata):
    seed = gguf_seed(number)
    values = {**seed.metadata, **{key.replace("__", "."): value for key, value in metadata.items()}}
    held = {name: one for name, one in {**seed.tensors, **(tensors or {})}.items() if one is not None}
    (folder / "m.gguf").write_bytes(gguf_files.sound(GGUF(values, held)))
    return folder / "m.gguf"


KINDS = {
    "general.architecture": ["llama", "x"],
    "general.name": np.array([1, 2], np.int32),
    "tokenizer.ggml.model": np.array([1, 2], np.int32),
    "tokenizer.ggml.pre": ["a", "b"],
    "tokenizer.ggml.add_bos_token": np.array([True, False]),
    "split.count": np.array([1, 2], np.int32),
}


@pytest.mark.parametrize("key", KINDS)
def test_a_gguf_value_that_is_an_array_where_one_is_wanted(key, tmp_path):
    said = refused(gguf(tmp_path, **{key.replace(".", "__"): KINDS[key]}))
    assert f"m.gguf: not a sound GGUF file: {key} is a " in said and "wanted a single value" in said


def test_a_gguf_of_two_thousand_million_layers(tmp_path):
    for number, architecture in ((0, "llama"), (2, "gemma2")):
        said = refused(gguf(tmp_path, None, number, **{f"{architecture}__block_count": 2**31 - 1}))
        assert f"{architecture}.block_count is 2147483647, wanted no more than" in said


def test_a_rotation_of_two_thousand_million_dimensions(tmp_path):
    file = gguf(tmp_path, None, 4, llama__rope__dimension_count=2**31 - 2)
    with bounded_memory():
        what, said = outcome(lambda: open_checkpoint(file), traced=True)
    assert what == "opened", said


def test_factors_that_are_not_numbers(tmp_path):
    seed = gguf_seed(4)
    kind, shape, _ = seed.tensors["rope_freqs.weight"]
    for value in (np.nan, 0.0, -1.0):
        held = {"rope_freqs.weight": (kind, shape, np.full(shape, value, np.float32).tobytes())}
        assert "'rope_freqs.weight' holds" in (said := refused(gguf(tmp_path, held, 4))) and "above 0" in said


def test_a_norm_that_is_a_signalling_nan(tmp_path):
    """Found by `benchmarks.fuzz_coverage`: taking 1 from it made numpy warn. Dense weights are read as they are."""
    seed = gguf_seed(2)
    kind, shape, _ = seed.tensors["blk.0.attn_norm.weight"]
    held = {"blk.0.attn_norm.weight": (kind, shape, np.full(shape, 0x7F800001, np.uint32).tobytes())}
    file = gguf(tmp_path, held, 2)
    with bounded_memory():
        what, said = outcome(lambda: use_checkpoint(file))
    assert what == "opened", said


def test_a_layer_whose_number_has_five_thousand_digits(tmp_path):
    seed = gguf_seed(0)
    name = f"blk.{'9' * 5000}.attn_q.weight"
    content = gguf_files.sound(seed)
    old, new = b"blk.0.attn_q.weight", name.encode()
    at = content.index(old)
    head = content[: at - 8] + struct.pack("<Q", len(new)) + new + content[at + len(old) :]
    (tmp_path / "m.gguf").write_bytes(head)
    with bounded_memory():
        what, said = outcome(lambda: use_checkpoint(tmp_path / "m.gguf"))
    assert what != "misbehaved", said


@pytest.mark.parametrize(
    "change, text",
    [
        ({"vocab_size": 10**400}, "vocab_size is 1000.*wanted a positive whole number"),
        ({"bos_token_id": {"a": 1}}, "a value is not of the kind that its key wants"),
        ({"model_type": "gemma2", "query_pre_attn_scalar": 16, "attn_logit_softcapping": []}, "not of the kind"),
        ({"num_hidden_layers": 2**31}, "num_hidden_layers is 2147483648, wanted at most 10000"),
    ],
)
def test_values_of_config_json(change, text):
    with pytest.raises(JQ4Error, match=text):
        hash(DecoderConfig.from_hf({**CONFIG, "num_hidden_layers": 1, **change}))


BOMB = "".join(
    f"{b}: &{b} [{', '.join([f'*{a}'] * 9) if a else 'x'}]\n" for a, b in zip("_abcdefgh", "abcdefghi", strict=True)
)


@pytest.mark.parametrize(
    "text, wanted",
    [
        (BOMB.replace("*_, " * 8 + "*_", "x") + "rules: *i\n", "its aliases stand for more than 100000 values"),
        ("rules: &a [*a]", "its aliases stand for more than 100000 values"),
        ("rules: " + "[" * 1000 + "]" * 1000, "nested in more than 64 levels"),
        ("rules: [{targets: ['re:" + "(" * 3000 + "']}]", "targets has"),
        ("rules: [{targets: ['re:a{99999999999}']}]", "not a regular expression: the repetition number is too large"),
    ],
)
def test_recipes(text, wanted, tmp_path):
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(JQ4Error, match=wanted):
        Recipe.load(tmp_path / "r.yaml")


@pytest.mark.parametrize(
    "line",
    [
        {"done": []},
        {"done": "w"},
        {"done": "w", "wrote": 3},
        {"done": "w", "wrote": {"../x": [1, "a"]}},
        {"done": "w", "wrote": {"/etc/x": [1, "a"]}},
        {"done": "w", "wrote": {"x": [1]}},
        {"identity": 3},
    ],
)
def test_a_line_of_a_journal_that_no_journal_writes_ends_it(line, tmp_path):
    folder = folder_of(tmp_path / "out")
    folder.mkdir()
    good = {"done": "v", "wrote": {"v.weight": "0" * 64}}
    lines = [{"identity": {"to": "x"}}, good, line, {"done": "after", "wrote": {}}]
    (folder / JOURNAL).write_text("".join(json.dumps(one) + "\n" for one in lines))
    with journal_for(tmp_path / "out", {"to": "x"}, False) as journal:
        assert list(journal.records) == ["v"]


def test_the_seeds_are_sound(tmp_path):
    """What is refused above is refused for what was changed."""
    for makers in SEEDS.values():
        for make in makers:
            seed = make()
            if isinstance(seed, Folder):
                laid(tmp_path, folders.sound(seed))
                use_checkpoint(tmp_path)
            else:
                (tmp_path / "m.gguf").write_bytes(gguf_files.sound(seed))
                use_checkpoint(tmp_path / "m.gguf")
