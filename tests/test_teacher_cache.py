"""Oracles: predictions in float64 NumPy, the safetensors library, and a cache that was written without being killed."""

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import jq4
from jq4.train import TeacherCache, digest_of_teacher, divergence_from, likeliest
from jq4.train.distillation.teacher_folder import read_manifest

RANDOM = np.random.default_rng(5)
VOCABULARY, LENGTH, K = 40, 6, 4
ROWS = RANDOM.integers(0, VOCABULARY, (11, LENGTH))
PARAMS = {"embed": jnp.asarray(RANDOM.normal(size=(VOCABULARY, VOCABULARY)), jnp.float32)}
SHARD = 4 * LENGTH * (K * 4 + 2)  # bytes: four rows


def apply(params, tokens):
    return params["embed"][tokens]


def write(folder, rows=ROWS, params=PARAMS, **options):
    return TeacherCache.write(folder, apply, params, rows, **{"k": K, "batch_size": 2, "shard_bytes": SHARD, **options})


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "teacher"
    write(folder)
    return folder


def test_rows_are_read_back_as_they_were_predicted(whole):
    cache = TeacherCache.open(
        whole, rows=ROWS.astype(np.int32), teacher=digest_of_teacher(apply, PARAMS, LENGTH), verify=True
    )
    logits = np.asarray(PARAMS["embed"], np.float64)[ROWS]
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    order = np.argsort(-log_p, axis=-1, kind="stable")
    kept = np.take_along_axis(log_p, order[..., :K], -1)
    rest = np.log(np.exp(np.take_along_axis(log_p, order[..., K:], -1)).sum(-1))
    for indices in (np.array([10, 0, 3, 3, 7]), slice(2, 9, 3), 5, np.arange(11) % 2 == 1, np.array([[1, 9], [4, 0]])):
        found = cache[indices]
        np.testing.assert_array_equal(found.tokens, order[indices][..., :K])
        np.testing.assert_allclose(found.log_probabilities, kept[indices], rtol=1e-3)
        np.testing.assert_allclose(found.log_rest, rest[indices], rtol=1e-3)
    assert (len(cache), found.tokens.dtype, found.log_rest.dtype) == (11, np.int32, np.float16)
    student = jnp.asarray(RANDOM.normal(size=(5, LENGTH, VOCABULARY)), jnp.float32)
    there = jax.jit(divergence_from)(cache[:5], student)
    np.testing.assert_array_equal(there, jax.jit(divergence_from)(likeliest(apply(PARAMS, ROWS[:5]), K), student))


def test_its_bytes_are_as_stated(whole):
    cache = TeacherCache.open(whole)
    files = sorted(whole.glob("*.safetensors"))
    assert [len(load_file(file)["tokens"]) for file in files] == [4, 4, 3]  # read by the format's own library
    held = sum(array.nbytes for file in files for array in load_file(file).values())
    assert held == ROWS.size * cache.bytes_a_token == ROWS.size * (K * (2 + 2) + 2)
    wide = dataclasses.replace(cache.job, vocabulary=128_256, k=64)
    assert wide.bytes_a_token == 64 * (4 + 2) + 2
    assert dataclasses.replace(cache.job, dtype="float32").bytes_a_token == K * (2 + 4) + 4


def test_a_killed_writer_is_gone_on_with(whole, tmp_path):
    folder, done = tmp_path / "teacher", []

    def kill(rows_done, rows):
        done.append(rows_done)
        if rows_done == 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(folder, progress=kill)
    with pytest.raises(jq4.CheckpointError, match=r"holds 4 of 11 rows. Call jq4.train.TeacherCache.write again"):
        TeacherCache.open(folder)
    (folder / "predictions-00001.safetensors.partial").write_bytes(b"half of a shard")
    done.clear()
    write(folder, progress=lambda rows_done, rows: done.append((rows_done, rows)))
    assert done == [(6, 11), (8, 11), (10, 11), (11, 11)]
    assert sorted(path.name for path in folder.iterdir()) == sorted(path.name for path in whole.iterdir())
    for path in whole.iterdir():
        assert (folder / path.name).read_bytes() == path.read_bytes()
    done.clear()
    write(folder, batch_size=3, progress=lambda *each: done.append(each))
    assert not done  # all of it is there
    (folder / "predictions-00002.safetensors").unlink()
    write(folder)
    assert (folder / "predictions-00002.safetensors").read_bytes() == (
        whole / "predictions-00002.safetensors"
    ).read_bytes()


def test_the_cache_of_another_job_is_refused(whole):
    before = {path.name: path.read_bytes() for path in whole.iterdir()}
    other = {"embed": PARAMS["embed"] + 1}
    for options, told in (
        ({"params": other}, "teacher is 'sha256:"),
        ({"rows": ROWS[::-1]}, "rows_digest is"),
        ({"k": 5}, "k is 4 and not 5"),
        ({"dtype": "float32"}, "dtype is 'float16' and not 'float32'"),
    ):
        with pytest.raises(jq4.CheckpointError, match=f"holds the predictions of another teacher .*{told}"):
            write(whole, **options)
    with pytest.raises(jq4.CheckpointError, match="rows is 11 and not 10, rows_digest is"):
        TeacherCache.open(whole, rows=ROWS[:10])
    with pytest.raises(jq4.CheckpointError, match="teacher is"):
        TeacherCache.open(whole, teacher=digest_of_teacher(apply, other, LENGTH))
    assert {path.name: path.read_bytes() for path in whole.iterdir()} == before


def test_teachers_of_equal_params_are_told_apart_by_their_functions(whole, tmp_path):
    def warmer(params, tokens):
        return params["embed"][tokens] / 2

    def closing_over(table):
        return lambda params, tokens: params["embed"][tokens] + table

    def with_a_rule(rule):
        @jax.custom_jvp
        def twice(x):
            return 2 * x

        twice.defjvp(rule)
        return lambda params, tokens: twice(params["embed"][tokens])

    ones, twos = jnp.ones((1, 1, VOCABULARY)), jnp.full((1, 1, VOCABULARY), 2.0)
    name = lambda function: digest_of_teacher(function, PARAMS, LENGTH)  # noqa: E731
    rule = lambda primals, tangents: (2 * primals[0], 2 * tangents[0])  # noqa: E731
    within = [jax.jit(jax.checkpoint(jax.jit(closing_over(table)))) for table in (ones, twos)]
    functions = [apply, warmer, closing_over(ones), closing_over(twos), *within, with_a_rule(rule)]
    assert len({name(each) for each in functions}) == len(functions)
    assert name(closing_over(ones)) == name(closing_over(jnp.ones((1, 1, VOCABULARY))))
    assert name(with_a_rule(rule)) == name(with_a_rule(lambda p, t: rule(p, t)))  # its text names Python's functions
    with pytest.raises(jq4.CheckpointError, match="holds the predictions of another teacher"):
        TeacherCache.write(whole, warmer, PARAMS, ROWS, k=K, batch_size=2, shard_bytes=SHARD)
    script = "import test_teacher_cache as t; print(t.digest_of_teacher(t.apply, t.PARAMS, t.LENGTH))"
    run = subprocess.run([sys.executable, "-c", script], cwd=Path(__file__).parent, capture_output=True, text=True)
    assert run.stdout.strip() == name(apply), run.stderr


def damaged(file, change):
    content = bytearray(file.read_bytes())
    file.unlink()
    file.write_bytes(change(content))


def test_a_damaged_cache_is_refused(whole, tmp_path):
    def fresh():
        shutil.rmtree(tmp_path / "teacher", ignore_errors=True)
        return shutil.copytree(whole, tmp_path / "teacher")

    def refused(folder, told, **options):
        with pytest.raises(jq4.JQ4Error, match=told):
            TeacherCache.open(folder, **options)

    name = "predictions-00001.safetensors"
    folder = fresh()
    damaged(folder / name, lambda content: content[:-5])
    refused(folder, f"{name}: not a sound safetensors file")
    (folder / name).unlink()
    refused(folder, f"{name}: cannot be read")
    shutil.copy(folder / "predictions-00002.safetensors", folder / name)
    refused(folder, rf"{name}: holds log_probabilities F16\[3, 6, 4\].* and teacher.json says .*\[4, 6, 4\]")
    shutil.copy(folder / "predictions-00000.safetensors", folder / name)
    TeacherCache.open(folder)
    refused(folder, f"{name}: its SHA-256 is not the manifest's", verify=True)

    folder = fresh()
    tensors = load_file(folder / name)
    tensors["tokens"][0, 0, 0] = VOCABULARY
    size = (folder / name).stat().st_size
    save_file(tensors, folder / name, {"format": "pt"})
    assert (folder / name).stat().st_size == size
    with pytest.raises(jq4.CheckpointError, match="holds what is no prediction over 40 tokens"):
        TeacherCache.open(folder)[4]

    folder = fresh()
    for change, told in (
        (lambda held: held | {"version": 2}, "is of version 2, wanted 1"),
        (lambda held: held | {"format": "other"}, "is not the manifest of a teacher's cache"),
        (lambda held: held | {"job": held["job"] | {"k": "4"}}, "is damaged .k is '4'"),
        (lambda held: held | {"job": held["job"] | {"k": 41}}, "its figures contradict each other"),
        (lambda held: held | {"job": 3}, "is damaged"),
    ):
        held = json.loads((whole / "teacher.json").read_bytes())
        (folder / "teacher.json").write_text(json.dumps(change(held)))
        refused(folder, told)
    (folder / "teacher.json").write_text("{")
    refused(folder, "is not JSON")
    (folder / "teacher.json").unlink()
    refused(folder, "has no teacher.json")
    with pytest.raises(jq4.CheckpointError, match=r"holds predictions-00000.safetensors and no teacher.json"):
        write(folder)


def test_what_cannot_be_written_is_told_and_leaves_nothing(tmp_path):
    for options, told in (
        ({"k": 0}, "k is 0, wanted 1 to 40"),
        ({"k": 41}, "k is 41"),
        ({"rows": ROWS[0]}, r"rows are int64\[6\], wanted tokens"),
        ({"rows": ROWS / 2}, "rows are float64"),
        ({"dtype": "bfloat16"}, "dtype 'bfloat16'"),
        ({"batch_size": 0}, "batch_size 0"),
    ):
        with pytest.raises(jq4.JQ4Error, match=told):
            write(tmp_path / "teacher", **options)
    assert not list(tmp_path.iterdir())
    broken = {"embed": PARAMS["embed"].at[ROWS[3, 2]].set(jnp.nan)}
    row, position = np.argwhere(np.isin(ROWS, ROWS[3, 2]))[0]
    with pytest.raises(jq4.JQ4Error, match=f"not finite at row {row}, position {position}"):
        write(tmp_path / "teacher", params=broken)


def test_a_packed_teacher_and_one_that_rules_tokens_out(tmp_path):
    params = jq4.quantize({"kernel": PARAMS["embed"]}, "rtn-w4g8")
    forward = jq4.quantized(lambda params, tokens: jax.nn.one_hot(tokens, VOCABULARY) @ params["kernel"], strict=True)
    cache = TeacherCache.write(tmp_path / "packed", forward, params, ROWS[:3], k=K)
    dense = jq4.dequantize(params)["kernel"][ROWS[:3]]
    np.testing.assert_array_equal(cache[:].tokens, jax.lax.top_k(dense, K)[1])

    def narrow(params, tokens):
        return jnp.where(jnp.arange(VOCABULARY) < 2, params["embed"][tokens], -jnp.inf)

    cache = TeacherCache.write(tmp_path / "narrow", narrow, PARAMS, ROWS[:2], k=K)
    value, gradient = jax.value_and_grad(lambda logits: divergence_from(cache[:], logits).sum())(
        apply(PARAMS, ROWS[:2])
    )
    assert np.isfinite(value) and np.isfinite(gradient).all() and read_manifest(cache.folder).job.k == K
