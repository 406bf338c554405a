"""Oracle: the formulas of the formats, spelled out in numpy; safetensors, gguf and torch; jq4.save for its folder."""

import itertools
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

import jq4
from jq4.checkpoint.foreign import open_checkpoint
from jq4.cli import main
from tests.small_checkpoints import GROUP, LINEAR, dequantized_gptq, write_dense, write_gptq

MODULE = "model.layers.1.mlp.down_proj"
ROOM = ("--memory", "64GB")  # a process that ran other tests holds more than the 1 GB that is the default


@pytest.fixture
def gptq(tmp_path) -> tuple[Path, dict[str, np.ndarray]]:
    return tmp_path / "gptq", write_gptq(tmp_path / "gptq")


def converted(capsys: Any, *words: Any) -> dict[str, Any]:
    """What `jq4 convert WORDS --json` prints."""
    capsys.readouterr()
    code = main(["convert", *ROOM, *map(str, words), "--json"])
    told = capsys.readouterr()
    assert code == 0, told.err
    return json.loads(told.out)


def refused(capsys: Any, *words: Any) -> str:
    """The one line of a conversion that ends with exit code 1."""
    capsys.readouterr()
    assert main(["convert", *ROOM, *map(str, words)]) == 1
    told = capsys.readouterr()
    assert told.err.startswith("jq4 convert: error: ") and told.err.count("\n") == 1, told.err
    return told.err


def assert_same_tensors(folder: Path, wanted: dict[str, np.ndarray]) -> None:
    found = load_file(folder / "model.safetensors")
    assert set(found) == set(wanted)
    for name, array in wanted.items():
        assert found[name].dtype == array.dtype and found[name].tobytes() == array.tobytes(), name


@pytest.mark.parametrize("symmetric", [True, False])
def test_gptq_to_awq_to_compressed_tensors_and_back_gives_the_same_bytes(tmp_path, capsys, symmetric):
    tensors = write_gptq(tmp_path / "gptq", symmetric=symmetric)
    steps = ["gptq", "awq", "compressed-tensors", "orbax", "gptq again"]
    for before, after in itertools.pairwise(steps):
        told = converted(capsys, tmp_path / before, tmp_path / after, "--to", after.split()[0], "--verify")
        assert told["from"] == before and told["lossless"] and not told["notes"]
        assert {kind["loss"] for kind in told["kinds"]} == {""}
        assert all(one["largest"] == 0 and one["same_codes"] in (True, None) for one in told["verified"])
        assert sum(one["same_codes"] is True for one in told["verified"]) == 2 * len(LINEAR)
    assert_same_tensors(tmp_path / "gptq again", tensors)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(steps)


def test_compressed_tensors_hold_what_the_formula_of_gptq_gives(tmp_path, capsys, gptq):
    source, tensors = gptq
    converted(capsys, source, tmp_path / "out", "--to", "compressed-tensors")
    found = load_file(tmp_path / "out" / "model.safetensors")
    packed = found[f"{MODULE}.weight_packed"].view(np.uint32)
    codes = np.stack([packed >> (4 * i) & 15 for i in range(8)], 2).reshape(packed.shape[0], -1)
    scale = np.repeat(found[f"{MODULE}.weight_scale"].astype(np.float32), GROUP, 1)
    np.testing.assert_array_equal((codes.astype(np.float32) - 8) * scale, dequantized_gptq(tensors, MODULE))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "compressed-tensors"
    assert (tmp_path / "out" / "generation_config.json").read_text() == "{}"


def test_dense_safetensors_hold_the_dequantized_weights_in_shards(tmp_path, capsys, gptq):
    source, tensors = gptq
    told = converted(
        capsys,
        source,
        tmp_path / "out",
        "--to",
        "safetensors",
        "--dtype",
        "float32",
        "--shard-size",
        "150kB",
        "--verify",
    )
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())["weight_map"]
    assert len(set(index.values())) > 2
    found = {name: load_file(tmp_path / "out" / file)[name] for name, file in index.items()}
    np.testing.assert_array_equal(found[f"{MODULE}.weight"], dequantized_gptq(tensors, MODULE))
    assert told["lossless"] and all(one["largest"] == 0 for one in told["verified"])
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quantization_config" not in config and config["torch_dtype"] == "float32"


def test_a_cast_rounds_as_torch_does_and_says_so(tmp_path, capsys):
    torch = pytest.importorskip("torch")
    from safetensors.torch import load_file as load_torch

    tensors = write_dense(tmp_path / "dense")
    told = converted(capsys, tmp_path / "dense", tmp_path / "out", "--to", "safetensors", "--dtype", "bf16", "--verify")
    found = load_torch(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(found[name], torch.tensor(one).bfloat16()) for name, one in tensors.items())
    assert not told["lossless"] and told["kinds"][0]["loss"] == "float32 rounded to bfloat16"
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    worst = max(one["relative"] for one in told["verified"])
    assert 2**-11 < worst < 2**-8


def test_a_folder_of_our_own_is_the_model_that_the_source_is(tmp_path, capsys, gptq):
    from models.language_model import LanguageModel

    converted(capsys, gptq[0], tmp_path / "out", "--to", "orbax", "--verify")
    ours, theirs = jq4.restore(tmp_path / "out"), LanguageModel.from_folder(gptq[0]).params
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for one, other in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_array_equal(np.asarray(one), np.asarray(other))
    assert LanguageModel.from_folder(tmp_path / "out").config == LanguageModel.from_folder(gptq[0]).config


def test_weights_that_make_no_model_keep_their_names_in_the_bytes_of_jq4_save(tmp_path, capsys, gptq):
    source = gptq[0]
    (source / "config.json").write_text(json.dumps({"model_type": "strange"}))
    told = converted(capsys, source, tmp_path / "out", "--to", "orbax", "--verify")
    assert "the weights keep their own names" in told["notes"][-1]
    weights = open_checkpoint(source).weights
    tree = {name: jax.tree.map(np.asarray, weight.read()) for name, weight in weights.items()}
    jq4.save(tmp_path / "saved", tree)
    (ours,), (saved,) = (list((tmp_path / name).glob("data-*/arrays-00000")) for name in ("out", "saved"))
    files = [path.relative_to(saved) for path in sorted(saved.rglob("*")) if path.is_file()]
    assert files == [path.relative_to(ours) for path in sorted(ours.rglob("*")) if path.is_file()]
    assert all((ours / name).read_bytes() == (saved / name).read_bytes() for name in files)
    converted(capsys, tmp_path / "out", tmp_path / "back", "--to", "gptq", "--verify")
    assert_same_tensors(tmp_path / "back", gptq[1])


def test_a_folder_without_config_json_gets_none(tmp_path, capsys, gptq):
    (gptq[0] / "config.json").unlink()
    told = converted(capsys, gptq[0], tmp_path / "out", "--to", "orbax", "--verify")
    assert "there is no config.json with it" in told["notes"][-1]
    assert not [path for path in (tmp_path / "out").rglob("*") if path.name == "config.json"]
    converted(capsys, tmp_path / "out", tmp_path / "back", "--to", "gptq", "--verify")
    assert_same_tensors(tmp_path / "back", gptq[1])
    assert list(json.loads((tmp_path / "back" / "config.json").read_text())) == ["quantization_config"]


def test_large_arrays_are_written_in_chunks(tmp_path, capsys, monkeypatch, gptq):
    monkeypatch.setattr("jq4.checkpoint.conversion.zarr_arrays.CHUNK_BYTES", 1024)
    monkeypatch.setattr("jq4.checkpoint.foreign.writing.PIECE_BYTES", 1000)
    monkeypatch.setattr("jq4.checkpoint.foreign.row_blocks.ELEMENTS", 250)
    converted(capsys, gptq[0], tmp_path / "ours", "--to", "orbax")
    converted(capsys, tmp_path / "ours", tmp_path / "back", "--to", "gptq", "--verify")
    assert_same_tensors(tmp_path / "back", gptq[1])


def test_what_a_target_cannot_hold_is_refused_and_rounded_again_on_demand(tmp_path, capsys, shared_data):
    source = shared_data / "gguf" / "tinystories-656k-q4_1.gguf"
    said = refused(capsys, source, tmp_path / "out", "--to", "gptq")
    assert "cannot hold 14 of 20 weights as they are; --requantize rounds them again, to the nearest that" in said
    assert "nothing was written: model.layers.0.self_attn.q_proj.weight (and 13 others): has a float offset" in said
    assert list(tmp_path.iterdir()) == []
    told = converted(capsys, source, tmp_path / "out", "--to", "gptq", "--requantize", "--verify")
    verified = {one["name"]: one for one in told["verified"]}
    for name, error in told["requantized"].items():
        assert verified[name]["loss"] == "rounded again, to int4 in groups of 32"
        assert verified[name]["relative"] == pytest.approx(error["relative"], rel=1e-4)
        assert 0 < error["relative"] < 0.1
    assert len(told["requantized"]) == 14 and not told["lossless"]


def test_a_gguf_file_comes_back_by_way_of_others(tmp_path, capsys, shared_data):
    gguf = pytest.importorskip("gguf")
    source = shared_data / "gguf" / "tinystories-656k-q4_0.gguf"
    steps = {"ct": "compressed-tensors", "ours": "orbax", "back.gguf": "gguf"}
    for name, target in steps.items():
        told = converted(capsys, source, tmp_path / name, "--to", target, "--verify")
        assert told["lossless"] and all(one["largest"] == 0 for one in told["verified"])
        source = tmp_path / name
    original = shared_data / "gguf" / "tinystories-656k-q4_0.gguf"
    wanted, found = ({t.name: t for t in gguf.GGUFReader(file).tensors} for file in (original, tmp_path / "back.gguf"))
    assert set(found) == set(wanted)
    table, kept = wanted.pop("token_embd.weight"), found["token_embd.weight"].data  # dense in compressed-tensors
    np.testing.assert_array_equal(kept, gguf.dequantize(table.data, table.tensor_type))
    for name, tensor in wanted.items():
        assert found[name].tensor_type == tensor.tensor_type
        np.testing.assert_array_equal(found[name].data, tensor.data)


def test_a_dry_run_tells_and_writes_nothing(tmp_path, capsys, gptq):
    told = converted(capsys, gptq[0], tmp_path / "out", "--to", "awq", "--dry-run")
    kinds = {kind["kind"]: kind for kind in told["kinds"]}
    kind = kinds["model.layers.*.mlp.down_proj.weight"]
    assert (kind["number"], kind["from"], kind["to"], kind["loss"]) == (2, "int4 g32 scales float16", "awq", "")
    assert kind["bytes"] == 2 * (64 * 64 + 64 * 4 * 2)
    assert "verified" not in told and not (tmp_path / "out").exists()
    assert main(["convert", *ROOM, str(gptq[0]), str(tmp_path / "out"), "--to", "awq", "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "gptq -> awq: lossless" in shown and max(map(len, shown.splitlines())) <= 80


def test_names_are_keys_and_never_paths(tmp_path, capsys):
    from jq4.checkpoint.safetensors_files import write

    (tmp_path / "in").mkdir()
    names = ["../outside.weight", "/tmp/x", "a/b/../../../c"]
    write(
        tmp_path / "in" / "model.safetensors", {n: ("F32", (2, 3), lambda: np.ones((2, 3), np.float32)) for n in names}
    )
    for target in ("safetensors", "orbax"):
        converted(capsys, tmp_path / "in", tmp_path / "out" / target, "--to", target)
    assert sorted(jq4.restore(tmp_path / "out" / "orbax")) == sorted(names)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["orbax", "safetensors"]


def test_mxfp4_goes_through_its_three_layouts_and_nf4_through_ours(tmp_path, capsys):
    write_dense(tmp_path / "dense")
    told = converted(capsys, tmp_path / "dense", tmp_path / "mx", "--to", "mxfp4", "--requantize", "--verify")
    assert len(told["requantized"]) == 2 * len(LINEAR)
    assert all(0.05 < error["relative"] < 0.15 for error in told["requantized"].values())
    converted(capsys, tmp_path / "dense", tmp_path / "nf4", "--to", "bnb-nf4")
    for name, steps in {"mx": ("gpt-oss", "orbax", "mxfp4"), "nf4": ("orbax", "bnb-nf4")}.items():
        source = tmp_path / name
        for target in steps:
            told = converted(capsys, source, tmp_path / f"{name}-{target}", "--to", target, "--verify")
            assert told["lossless"] and all(one["largest"] == 0 for one in told["verified"])
            source = tmp_path / f"{name}-{target}"
        assert_same_tensors(source, load_file(tmp_path / name / "model.safetensors"))
    said = refused(capsys, tmp_path / "nf4", tmp_path / "out", "--to", "mxfp4")
    assert "cannot hold 14 of 21 weights as they are; --requantize rounds them again" in said


def test_nested_statistics_of_bitsandbytes_go_through_ours_byte_for_byte(tmp_path, capsys):
    from jq4.checkpoint.foreign import bnb_nf4
    from tests.foreign_folder import as_folder

    write_dense(tmp_path / "dense")
    source = open_checkpoint(tmp_path / "dense")
    as_folder(tmp_path / "padded", source.weights.values(), bnb_nf4, {"double_quant": True}, source.config)
    # the JSON of a weight that is quantized now is filled up; of one that was read it is bitsandbytes' own
    for before, after in itertools.pairwise(("padded", "first", "ours", "again")):
        target = "orbax" if after == "ours" else "bnb-nf4"
        told = converted(capsys, tmp_path / before, tmp_path / after, "--to", target, "--verify")
        assert told["lossless"] and all(one["largest"] == 0 for one in told["verified"])
    first = load_file(tmp_path / "first" / "model.safetensors")
    states = [one.tobytes() for name, one in first.items() if "quant_state" in name]
    assert len(states) == 14 and all(one == json.dumps(json.loads(one)).encode() for one in states)
    assert_same_tensors(tmp_path / "again", first)


def test_experts_go_through_all_layouts_of_mxfp4_and_back(tmp_path, capsys):
    from tests.foreign_folder import save

    draw = np.random.default_rng(0)
    tensors = {"model.layers.0.mlp.router.weight": draw.normal(size=(4, 64)).astype(np.float32)}
    for name, rows in (("gate_up_proj", 128), ("down_proj", 64)):
        experts = f"model.layers.0.mlp.experts.{name}"
        tensors[f"{experts}_blocks"] = draw.integers(0, 256, (4, rows, 2, 16), dtype=np.uint8)
        tensors[f"{experts}_scales"] = draw.integers(118, 130, (4, rows, 2), dtype=np.uint8)
    save(tmp_path / "gpt-oss", tensors, {"quant_method": "mxfp4"}, model_type="gpt_oss")
    steps = ["gpt-oss", "mxfp4", "orbax", "compressed-tensors", "gpt-oss again"]
    for before, after in itertools.pairwise(steps):
        told = converted(capsys, tmp_path / before, tmp_path / after, "--to", after.split()[0], "--verify")
        assert told["lossless"] and all(one["largest"] == 0 for one in told["verified"])
    assert_same_tensors(tmp_path / "gpt-oss again", tensors)
