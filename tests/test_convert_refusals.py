"""Oracle: the files themselves: after an error the source and whatever stood in the destination are as they were."""

import dataclasses
import errno
import json
import os
import re
import shutil
from pathlib import Path

import pytest
from test_convert import ROOM, assert_same_tensors, converted, refused

from jq4.cli import main
from tests.small_checkpoints import write_dense, write_gptq
from tests.test_convert_kill import contents


@pytest.fixture
def gptq(tmp_path) -> Path:
    write_gptq(tmp_path / "gptq")
    return tmp_path / "gptq"


def test_dense_weights_are_not_packed_unasked(tmp_path, capsys):
    write_dense(tmp_path / "dense")
    for target in ("gptq", "awq", "compressed-tensors"):
        said = refused(capsys, tmp_path / "dense", tmp_path / "out", "--to", target)
        assert f"--to {target}: all linear layers of the source are dense" in said and "jq4 quantize SRC PACKED" in said
    said = refused(capsys, tmp_path / "dense", tmp_path / "out.gguf", "--to", "gguf")
    assert "say what to quantize them to: --type q4_0" in said
    said = refused(capsys, tmp_path / "dense", tmp_path / "out", "--to", "mxfp4")
    assert "--requantize rounds them to it" in said
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]


def test_destinations_that_would_destroy_something_are_refused(tmp_path, capsys, gptq):
    before = contents(tmp_path)
    for place in (gptq, gptq / "inside", tmp_path):
        said = refused(capsys, gptq, place, "--to", "awq")
        assert f"{place}: is, lies in or holds {gptq}, which is read; choose another folder" in said
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("precious")
    said = refused(capsys, gptq, tmp_path / "thesis", "--to", "awq")
    assert "holds something else than a conversion of jq4 (found chapter.tex, wanted jq4-conversion.json)" in said
    said = refused(capsys, gptq, tmp_path / "thesis" / "chapter.tex", "--to", "awq")
    assert "a file stands there" in said
    assert "writes a file whose name ends in .gguf" in refused(capsys, gptq, tmp_path / "x", "--to", "gguf")
    assert "a folder, whose name does not end in .gguf" in refused(capsys, gptq, tmp_path / "x.gguf", "--to", "awq")
    assert contents(tmp_path) == before | {"thesis/chapter.tex": b"precious"}


def test_an_older_conversion_is_replaced(tmp_path, capsys, gptq):
    converted(capsys, gptq, tmp_path / "out", "--to", "awq")
    converted(capsys, gptq, tmp_path / "out", "--to", "gptq")
    wanted = contents(tmp_path / "out")
    converted(capsys, gptq, tmp_path / "out", "--to", "orbax")
    assert "jq4.json" in contents(tmp_path / "out")
    converted(capsys, gptq, tmp_path / "out", "--to", "gptq")
    assert contents(tmp_path / "out") == wanted
    assert sorted(path.name for path in tmp_path.iterdir()) == ["gptq", "out"]


def test_a_weight_beyond_the_memory_is_named_beforehand(tmp_path, capsys, gptq):
    said = refused(capsys, gptq, tmp_path / "out", "--to", "awq", "--memory", "1MB")
    assert ".weight: converting it takes about" in said
    assert re.search(r"give --memory (0\.[1-9]\d*|[1-9]\d*(\.\d+)?)GB or more", said)
    assert [path.name for path in tmp_path.iterdir()] == ["gptq"]


@pytest.mark.parametrize("target", ["compressed-tensors", "orbax"])
def test_a_full_disk_is_told_and_what_was_written_is_kept(tmp_path, capsys, monkeypatch, gptq, target):
    before, write = contents(gptq), os.write
    calls = iter(range(1_000_000))

    def full(descriptor, data):
        if b'"done"' in bytes(data[:16]) and next(calls) == 6:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(descriptor, data)

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        said = refused(capsys, gptq, tmp_path / "out", "--to", target)
    assert "out: the disk is full: " in said and "are still to be written and " in said
    assert "give the same command again, which goes on from what is written" in said
    assert contents(gptq) == before and not (tmp_path / "out").exists()
    told = converted(capsys, gptq, tmp_path / "out", "--to", target)
    assert told["resumed"] >= 6
    converted(capsys, gptq, tmp_path / "peace", "--to", target)
    assert contents(tmp_path / "out") == contents(tmp_path / "peace")


def test_too_small_a_disk_is_told_beforehand(tmp_path, capsys, monkeypatch, gptq):
    usage = shutil.disk_usage(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
        said = refused(capsys, gptq, tmp_path / "out", "--to", "awq")
    assert "bytes are still to be written and 1,000 are free" in said


def test_what_another_conversion_left_is_not_gone_on_from(tmp_path, capsys, monkeypatch, gptq):
    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("jq4.checkpoint.conversion.fixed_files.FixedFiles.finish", interrupted)
        assert main(["convert", *ROOM, str(gptq), str(tmp_path / "out"), "--to", "awq"]) == 130
    assert "out.partial holds what is written; the same command goes on from there" in capsys.readouterr().err
    said = refused(capsys, gptq, tmp_path / "out", "--to", "gptq")
    assert "holds the unfinished work of another conversion, whose output, to differ" in said and "--restart" in said
    (gptq / "config.json").write_text((gptq / "config.json").read_text() + " ")
    said = refused(capsys, gptq, tmp_path / "out", "--to", "awq")
    assert "whose source differ" in said
    assert converted(capsys, gptq, tmp_path / "out", "--to", "awq", "--restart")["resumed"] == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["gptq", "out"]


def test_records_are_believed_for_their_bytes_alone(tmp_path, capsys, monkeypatch, gptq):
    def interrupted(*_):
        raise KeyboardInterrupt

    tensors = write_gptq(tmp_path / "same")
    with monkeypatch.context() as patch:
        patch.setattr("jq4.checkpoint.conversion.fixed_files.FixedFiles.finish", interrupted)
        assert main(["convert", *ROOM, str(gptq), str(tmp_path / "out"), "--to", "gptq"]) == 130
    written, journal = (
        tmp_path / "out.partial" / "data" / "model.safetensors",
        tmp_path / "out.partial" / "journal.jsonl",
    )
    content = bytearray(written.read_bytes())
    content[-100] ^= 1
    written.write_bytes(content)
    with journal.open("a") as file:
        file.write('{"done":"torn')
    told = converted(capsys, gptq, tmp_path / "out", "--to", "gptq")
    assert told["resumed"] == told["weights"] - 1
    assert_same_tensors(tmp_path / "out", tensors)


def test_strangers_beside_the_destination_are_left_alone(tmp_path, capsys, gptq):
    (tmp_path / "out.partial").mkdir()
    thesis = tmp_path / "out.partial" / "thesis.tex"
    thesis.write_text("precious")
    for restart in ([], ["--restart"]):
        said = refused(capsys, gptq, tmp_path / "out", "--to", "awq", *restart)
        assert "out.partial: holds thesis.tex and no journal, so it is not ours" in said
    assert thesis.read_text() == "precious"


def test_what_is_not_what_was_declared_is_not_put_in_place(tmp_path, capsys, monkeypatch, gptq):
    import jq4.checkpoint.foreign.compressed_tensors_writing as writer

    plan = writer.plan

    def lying(weight, options):
        planned = plan(weight, options)
        if weight.name != "model.layers.1.mlp.down_proj.weight":
            return planned

        def encode(value):
            made = dict(planned.encode(value))
            name = next(name for name in made if name.endswith("_packed"))
            made[name] = made[name] ^ 1
            return made

        return dataclasses.replace(planned, encode=encode)

    monkeypatch.setattr(writer, "plan", lying)
    said = refused(capsys, gptq, tmp_path / "out", "--to", "compressed-tensors", "--verify")
    assert "out: not what was declared: model.layers.1.mlp.down_proj.weight differ from the source" in said
    assert not (tmp_path / "out").exists() and (tmp_path / "out.partial" / "data" / "model.safetensors").exists()


def test_a_source_that_changes_meanwhile_is_told(tmp_path, capsys, monkeypatch, gptq):
    from jq4.checkpoint.conversion.fixed_files import FixedFiles

    finish = FixedFiles.finish

    def meddling(self, records):
        (gptq / "generation_config.json").write_text(json.dumps({"changed": True}))
        finish(self, records)

    monkeypatch.setattr(FixedFiles, "finish", meddling)
    assert "changed while it was converted" in refused(capsys, gptq, tmp_path / "out", "--to", "awq")
    assert not (tmp_path / "out").exists()


def test_options_of_other_targets_are_refused(tmp_path, capsys, gptq):
    said = refused(capsys, gptq, tmp_path / "out", "--to", "awq", "--dtype", "float16")
    assert "--dtype is for --to safetensors, and this is --to awq" in said
    said = refused(capsys, gptq, tmp_path / "out", "--to", "safetensors", "--dtype", "int3")
    assert "--dtype int3: is not a dtype of dense weights, wanted one of float64, float32, float16, bfloat16" in said


@pytest.mark.parametrize("name, content", [
    ("x.pt", b"PK\x03\x04"), ("pytorch_model.bin", b""), ("nameless", b"\x80\x02}q\x00."),
])  # fmt: skip
def test_a_pickle_given_as_a_file_is_called_one(tmp_path, capsys, name, content):
    (tmp_path / name).write_bytes(content)
    assert "is a pickle, which can run any code" in refused(capsys, tmp_path / name, tmp_path / "out", "--to", "orbax")


def test_files_of_other_kinds_are_not_called_damaged(tmp_path, capsys):
    (tmp_path / "m.onnx").write_bytes(b"\x08\x07\x12\x07pytorch")
    said = refused(capsys, tmp_path / "m.onnx", tmp_path / "out", "--to", "orbax")
    assert "neither a safetensors nor a GGUF file" in said


def test_an_adapter_is_no_model(tmp_path, capsys):
    write_dense(tmp_path / "lora")
    (tmp_path / "lora" / "config.json").rename(tmp_path / "lora" / "adapter_config.json")
    said = refused(capsys, tmp_path / "lora", tmp_path / "out", "--to", "orbax")
    assert "holds an adapter (adapter_config.json)" in said and "merge_and_unload" in said


def test_shards_without_index_must_all_be_there(tmp_path, capsys):
    write_gptq(tmp_path / "gptq")
    converted(capsys, tmp_path / "gptq", tmp_path / "cut", "--to", "gptq", "--shard-size", "40kB")
    (tmp_path / "cut" / "model.safetensors.index.json").unlink()
    told = converted(capsys, tmp_path / "cut", tmp_path / "whole", "--to", "awq")
    shards = sorted((tmp_path / "cut").glob("*.safetensors"))
    shards[1].unlink()
    said = refused(capsys, tmp_path / "cut", tmp_path / "out", "--to", "awq")
    assert told["weights"] == 21 and f"holds {len(shards) - 1} of the {len(shards)} shards of 'model'" in said


def test_a_wrong_option_is_told_once(tmp_path, capsys):
    write_dense(tmp_path / "dense")
    said = refused(capsys, tmp_path / "dense", tmp_path / "out.gguf", "--to", "gguf", "--type", "q4_9")
    assert said.count("--type is 'q4_9'") == 1 and "cannot hold" not in said


def test_a_gguf_beside_safetensors_is_told_of(tmp_path, capsys):
    write_gptq(tmp_path / "gptq")
    (tmp_path / "gptq" / "other.gguf").write_bytes(b"GGUF")
    told = converted(capsys, tmp_path / "gptq", tmp_path / "out", "--to", "awq", "--dry-run")
    assert "other.gguf too; its safetensors are read" in told["notes"][0]
