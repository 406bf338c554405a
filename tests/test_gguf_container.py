"""Oracle: gguf-py, whose writer's files we read and whose reader reads ours. And headers that lie: an error each."""

import random
import struct

import numpy as np
import pytest

from jq4.checkpoint.foreign import open_checkpoint
from jq4.checkpoint.foreign.gguf.block_types import BY_NAME
from jq4.checkpoint.foreign.gguf.container import read_container
from jq4.checkpoint.foreign.gguf.file_writing import header
from jq4.errors import JQ4Error

METADATA = {
    "general.architecture": "mine",
    "a.flag": True,
    "a.size": 7,
    "a.ratio": 0.5,
    "a.names": ["x", "\u2581y", ""],
    "a.kinds": np.array([1, -2], np.int32),
}
TENSORS = {"w": (BY_NAME["F32"], (3, 4)), "q": (BY_NAME["Q4_0"], (2, 64))}
GOLDEN = (
    "47475546030000000100000000000000010000000000000001000000000000006b0400000007000000"
    "0100000000000000770200000004000000000000000300000000000000000000000000000000000000"
)


def _file(path, metadata=METADATA, tensors=TENSORS, version=3):
    content = header(metadata, tensors)
    data = bytes(range(64)) + bytes(4 * 18 + 24)
    path.write_bytes(content[:4] + struct.pack("<I", version) + content[8:] + data)
    return path


def test_golden_bytes_of_a_header():
    content = header({"k": 7}, {"w": (BY_NAME["F32"], (3, 4))})
    assert content.hex() == GOLDEN + "00" * (96 - len(GOLDEN) // 2)


@pytest.mark.parametrize("version", [2, 3])
def test_what_is_written_is_read(tmp_path, version):
    container = read_container(_file(tmp_path / "a.gguf", version=version))
    assert container.version == version
    assert {key: value for key, value in container.metadata.items() if key != "a.kinds"} == {
        key: value for key, value in METADATA.items() if key != "a.kinds"
    }
    np.testing.assert_array_equal(container.metadata["a.kinds"], METADATA["a.kinds"])
    assert {name: (one.kind, one.shape) for name, one in container.tensors.items()} == TENSORS
    assert container.tensors["w"].blocks().tobytes() == bytes(range(48))
    assert container.tensors["q"].start - container.tensors["w"].start == 64


def test_gguf_py_reads_what_is_written(tmp_path):
    gguf = pytest.importorskip("gguf", reason="gguf is the oracle here and is not installed")
    reader = gguf.GGUFReader(_file(tmp_path / "a.gguf"))
    found = {key: reader.fields[key].contents() for key in METADATA}
    assert found == {**METADATA, "a.kinds": [1, -2]}
    assert [(one.name, tuple(one.shape), one.tensor_type.name) for one in reader.tensors] == [
        ("w", (4, 3), "F32"),
        ("q", (64, 2), "Q4_0"),
    ]
    assert reader.tensors[0].data.tobytes() == bytes(range(48))


def test_what_gguf_py_writes_is_read(tmp_path):
    gguf = pytest.importorskip("gguf", reason="gguf is the oracle here and is not installed")
    writer = gguf.GGUFWriter(tmp_path / "b.gguf", "mine")
    writer.add_uint64("big", 2**40)
    writer.add_float64("precise", 0.1)
    writer.add_int8("small", -3)
    writer.add_array("names", ["a", "b"])
    writer.add_array("numbers", [0.5, 2.0])
    writer.add_tensor("w", np.arange(6, dtype=np.float32).reshape(2, 3))
    writer.add_tensor("h", np.arange(4, dtype=np.float16))
    for step in ("write_header_to_file", "write_kv_data_to_file", "write_tensors_to_file", "close"):
        getattr(writer, step)()
    container = read_container(tmp_path / "b.gguf")
    found = container.metadata
    assert (found["big"], found["precise"], found["small"], found["names"]) == (2**40, 0.1, -3, ["a", "b"])
    np.testing.assert_array_equal(found["numbers"], np.float32([0.5, 2]))
    checkpoint = open_checkpoint(tmp_path / "b.gguf")
    assert checkpoint.config is None
    assert checkpoint.notes == ("the architecture 'mine' is not known: weights keep GGUF's names; there is no config",)
    np.testing.assert_array_equal(checkpoint.weights["w"].read(), np.arange(6, dtype=np.float32).reshape(2, 3))
    np.testing.assert_array_equal(checkpoint.weights["h"].read(), np.arange(4, dtype=np.float16))


def _raw(tensors: list[bytes], values: list[bytes] = (), count=None, version=3, tail=256, magic=b"GGUF") -> bytes:
    counts = struct.pack("<QQ", len(tensors) if count is None else count, len(values))
    return magic + struct.pack("<I", version) + counts + b"".join([*values, *tensors]) + bytes(tail)


def _text(text) -> bytes:
    content = text if isinstance(text, bytes) else text.encode()
    return struct.pack("<Q", len(content)) + content


def _tensor(name="w", dims=(4,), kind=0, offset=0) -> bytes:
    return _text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


def _value(key, kind, content: bytes) -> bytes:
    return _text(key) + struct.pack("<I", kind) + content


LIES = {
    "short": (b"GGUF", "it has 4 bytes"),
    "magic": (_raw([], magic=b"GGML"), "begins with b'GGML'"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "is big-endian"),
    "version 1": (_raw([], version=1), "is version 1 of GGUF, wanted 2 or 3"),
    "many tensors": (_raw([], count=2**60), "the number of tensors is 1152921504606846976, wanted no more than"),
    "many values": (b"GGUF" + struct.pack("<IQQ", 3, 0, 2**63) + bytes(64), "the number of values is 9223372036854775"),
    "long key": (_raw([], [struct.pack("<Q", 2**50)]), "a key has 1125899906842624 bytes"),
    "key not UTF-8": (_raw([], [_value(b"\xff", 4, bytes(4))]), r"a key is b'\\xff', wanted UTF-8"),
    "key twice": (_raw([], [_value("k", 4, bytes(4))] * 2), "the key 'k' is there twice"),
    "long array": (_raw([], [_value("k", 9, struct.pack("<IQ", 12, 2**61))]), "the length of the value of 'k' is 230"),
    "many strings": (_raw([], [_value("k", 9, struct.pack("<IQ", 8, 2**61))]), "the length of the value of 'k' is 230"),
    "array of arrays": (_raw([], [_value("k", 9, struct.pack("<IQ", 9, 1))]), "has the type 9, wanted one of 0 to 12"),
    "unknown value": (_raw([], [_value("k", 77, bytes(4))]), "the value of 'k' has the type 77"),
    "a third truth": (_raw([], [_value("k", 7, b"\2")]), "holds a truth value other than 0 and 1"),
    "alignment": (_raw([], [_value("general.alignment", 4, struct.pack("<I", 24))]), "general.alignment is 24"),
    "no alignment": (_raw([], [_value("general.alignment", 4, bytes(4))]), "general.alignment is 0"),
    "tensor twice": (_raw([_tensor(), _tensor()]), "tensor 'w' is there twice"),
    "many dimensions": (_raw([_tensor(dims=(1,) * 5)]), "tensor 'w' has 5 dimensions, wanted 1 to 4"),
    "huge": (_raw([_tensor(dims=(2**62, 2**62))]), "wanted it in the file"),
    "nothing": (_raw([_tensor(dims=(0, 3))]), r"tensor 'w' has the shape \(0, 3\)"),
    "half a block": (_raw([_tensor(dims=(48,), kind=2)]), "whole blocks of 32"),
    "not read": (_raw([_tensor(dims=(256,), kind=10)]), "tensor 'w' has the type Q2_K, wanted one of F32.*Q4_K_M"),
    "unknown type": (_raw([_tensor(kind=4000)]), "tensor 'w' has the type number 4000"),
    "misaligned": (_raw([_tensor(offset=8)]), "tensor 'w' lies at 8, wanted a multiple of 32"),
    "outside": (_raw([_tensor(offset=2**40)]), "tensor 'w' has 16 bytes at .*wanted it in the file"),
    "overlap": (_raw([_tensor("a", (16,)), _tensor("b", (4,), offset=32)]), "tensors 'a' and 'b' overlap"),
    "a packed row": (_raw([_tensor(dims=(32,), kind=2)]), "tensor 'w' is a row in Q4_0, wanted a matrix"),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_header_that_lies_is_refused(lie, tmp_path):
    content, message = LIES[lie]
    file = tmp_path / "bad.gguf"
    file.write_bytes(content)
    with pytest.raises(JQ4Error, match=rf"bad\.gguf: .*{message}"):
        open_checkpoint(file)


def test_every_truncation_and_every_changed_byte_is_an_error_or_a_file(tmp_path, shared_data):
    whole = _file(tmp_path / "a.gguf").read_bytes()
    file = tmp_path / "bad.gguf"
    for length in range(len(whole) - 24):
        file.write_bytes(whole[:length])
        with pytest.raises(JQ4Error, match=r"bad\.gguf"):
            open_checkpoint(file)
    model, draw = shared_data / "gguf" / "tinystories-656k-q4_0.gguf", random.Random(0)
    content, end = model.read_bytes(), min(one.start for one in read_container(model).tensors.values())
    for _ in range(60):
        changed = bytearray(content)
        for _ in range(draw.randint(1, 4)):
            changed[draw.choice([draw.randrange(700), draw.randrange(end - 1500, end)])] = draw.randrange(256)
        file.write_bytes(changed)
        try:
            for weight in open_checkpoint(file).weights.values():
                weight.read()
        except JQ4Error as error:
            assert "bad.gguf" in str(error) or "blk." in str(error)


def test_a_missing_file_is_an_error_that_names_it(tmp_path):
    with pytest.raises(JQ4Error, match=r"none\.gguf: cannot be read \(No such file"):
        open_checkpoint(tmp_path / "none.gguf")
