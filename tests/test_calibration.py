"""Oracle: the files as this test wrote them; rows are slices of the ids that went in."""

import hashlib
import json

import numpy as np
import pytest

from jq4.calibration import read_calibration
from jq4.errors import JQ4Error


def encode(text):
    return list(text.encode())


def read(file, **options):
    return read_calibration(file, **{"encode": encode, "vocab_size": 256, "context": 8} | options)


def test_text_is_cut_into_rows_and_hashed(tmp_path):
    file = tmp_path / "a.txt"
    file.write_text("abcdefgh" * 5 + "xyz")
    found = read(file)
    np.testing.assert_array_equal(found.rows, [encode("abcdefgh")] * 5)
    assert found.rows.dtype == np.int32
    assert found.as_dict() == {
        "file": "a.txt",
        "sha256": "sha256:" + hashlib.sha256(file.read_bytes()).hexdigest(),
        "rows": 5,
        "context": 8,
        "rows_in_file": 5,
        "chosen": "evenly",
    }


def test_documents_of_jsonl_follow_each_other(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text(
        "\n".join(json.dumps({"id": i, "body": text}) for i, text in enumerate(["abcde", "fgh", "ijklmnop"]))
    )
    np.testing.assert_array_equal(read(file, field="body").rows, [encode("abcdefgh"), encode("ijklmnop")])


def test_ids_flat_and_in_rows(tmp_path):
    np.save(tmp_path / "flat.npy", np.arange(20, dtype=np.int64))
    np.testing.assert_array_equal(read(tmp_path / "flat.npy").rows, np.arange(16).reshape(2, 8))
    np.save(tmp_path / "rows.npy", np.arange(18, dtype=np.uint16).reshape(3, 6))
    np.testing.assert_array_equal(read(tmp_path / "rows.npy").rows, np.arange(18).reshape(3, 6))
    np.testing.assert_array_equal(read(tmp_path / "rows.npy", context=3).rows, np.arange(18).reshape(6, 3))


def test_rows_are_taken_evenly_or_by_seed(tmp_path):
    np.save(tmp_path / "a.npy", np.arange(80))
    taken = read(tmp_path / "a.npy", rows=4)
    assert (taken.rows[:, 0] // 8).tolist() == [0, 2, 5, 7] and taken.rows_in_file == 10
    drawn = read(tmp_path / "a.npy", rows=4, seed=3)
    np.testing.assert_array_equal(drawn.rows, read(tmp_path / "a.npy", rows=4, seed=3).rows)
    assert len(set(drawn.rows[:, 0])) == 4 and drawn.as_dict()["chosen"] == "by seed"
    assert (drawn.rows != read(tmp_path / "a.npy", rows=4, seed=4).rows).any()


@pytest.mark.parametrize(
    ("name", "content", "options", "message"),
    [
        ("a.txt", b"short", {}, "has 5 tokens, fewer than one row of 8: give more text, or a shorter --context"),
        ("a.txt", b"caf\xe9" * 9, {}, "not UTF-8 text"),
        ("a.txt", b"x" * 9, {"encode": None}, "text wants a tokenizer"),
        ("a.txt", b"x" * 9, {"vocab_size": 100}, r"token 120 at \[0\] is outside of the model's vocabulary of 100"),
        ("a.txt", b"x" * 9, {"rows": 0}, "0 rows of 8 tokens: wanted 1 row or more"),
        ("a.jsonl", b'{"text": "abc"}\nnot json', {}, "line 2 is not JSON"),
        ("a.jsonl", b'{"body": "abc"}', {}, "line 1 has no text under 'text' .found body.; name it: --field"),
        ("a.jsonl", b"[1]", {}, "line 1 has no text under 'text'"),
        ("a.jsonl", b"\n", {}, "has 0 tokens, fewer than one row of 8"),
        ("a.npy", b"not numpy", {}, "not a .npy file of numbers"),
    ],
)
def test_what_gives_no_rows_is_told(tmp_path, name, content, options, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(JQ4Error, match=f"{name}.*{message}" if "rows" not in options else message):
        read(tmp_path / name, **options)


def test_arrays_that_are_no_ids(tmp_path):
    for array in (np.zeros((2, 8)), np.zeros((1, 2, 8), int), np.zeros((0,), int)):
        np.save(tmp_path / "a.npy", array)
        with pytest.raises(JQ4Error, match=r"wanted integer token ids \[n\] or \[rows, tokens\]"):
            read(tmp_path / "a.npy")
    with pytest.raises(JQ4Error, match="there is no such file to calibrate with"):
        read(tmp_path / "missing.txt")
