"""Oracle: llama-quantize's rules as published, exact codes and scales, and the bytes of files that others wrote."""

import dataclasses

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from gguf_inputs import random_blocks

import jq4
from jq4.checkpoint.foreign import gguf, open_checkpoint
from jq4.checkpoint.foreign.bit_strings import pack
from jq4.checkpoint.foreign.gguf import qarrays
from jq4.checkpoint.foreign.gguf.block_types import BY_NAME, PACKED
from jq4.checkpoint.foreign.gguf.container import read_container
from jq4.checkpoint.foreign.gguf.mixture import chosen_type
from jq4.checkpoint.foreign.host_dequantize import host_dequantize
from jq4.checkpoint.foreign.weights import Checkpoint, LazyWeight
from jq4.errors import JQ4Error
from jq4.qarray import QArray

CONFIG = {
    "model_type": "llama", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 8,
}  # fmt: skip
NAME = "model.layers.0.mlp.up_proj.weight"


def _plan(value, kind, name=NAME, **config):
    abstract = jax.tree.map(lambda part: jax.ShapeDtypeStruct(part.shape, part.dtype), value)
    return gguf.plan(LazyWeight(name, abstract, lambda: value), {"type": kind, "config": {**CONFIG, **config}})


def _round_trip(value, kind, name=NAME):
    """(the plan, the type's name, what the blocks that it makes hold)."""
    planned = _plan(value, kind, name)
    ((_, (type_name, shape)),) = planned.tensors.items()
    (blocks,) = planned.encode(value).values()
    assert shape == value.shape
    return planned, type_name, qarrays.to_qarray(BY_NAME[type_name], blocks)


def _symmetric(format="int4", bits=4, group=32, scale_dtype=np.float16, length=128, rows=6):
    random = np.random.default_rng(0)
    codes = random.integers(0, 2**bits, (rows, length)).astype(np.uint8)
    scale = random.normal(0, 1, (rows, -(-length // group))).astype(np.float16).astype(scale_dtype)
    return QArray(pack(codes, bits), scale, format=format, group_size=group, axis=-1, dtype="bfloat16")


def test_the_mixture_is_that_of_llama_quantize():
    for kind, name, shape, layers, wanted in (
        ("q4_0", "token_embd.weight", (100, 64), 1, "Q4_0"),
        ("q4_0", "output.weight", (100, 64), 1, "Q8_0"),  # Q6_K, which 64 is no multiple for
        ("q4_0", "output.weight", (100, 256), 1, "Q6_K"),
        ("q4_0", "blk.0.attn_k.weight", (8, 100), 1, "F16"),
        ("q4_k_m", "token_embd.weight", (100, 64), 1, "Q5_0"),
        ("q4_k_m", "output.weight", (100, 64), 1, "Q8_0"),
        ("q4_k_m", "blk.0.attn_v.weight", (8, 64), 1, "Q8_0"),
        ("q4_k_m", "blk.0.attn_q.weight", (8, 256), 1, "Q4_K"),
        ("q4_k_m", "blk.0.attn_qkv.weight", (8, 256), 1, "Q5_K"),
        ("q4_k", "blk.0.attn_v.weight", (8, 256), 1, "Q4_K"),
        ("q8_0", "output.weight", (100, 256), 1, "Q8_0"),
        ("f16", "blk.0.attn_norm.weight", (256,), 1, "F32"),
        ("bf16", "blk.0.attn_q.bias", (256,), 1, "F32"),
        ("bf16", "output.weight", (8, 100), 1, "BF16"),
    ):
        assert chosen_type(kind, name, shape, layers, False).name == wanted, (kind, name)
    assert chosen_type("q4_k_m", "token_embd.weight", (100, 256), 1, True).name == "Q6_K"
    finer = [
        i for i in range(30) if chosen_type("q4_k_m", f"blk.{i}.ffn_down.weight", (8, 256), 30, False).name == "Q6_K"
    ]
    assert finer == [0, 1, 2, 5, 8, 11, 14, 17, 20, 23, 26, 27, 28, 29]


@pytest.mark.parametrize("kind", PACKED, ids=lambda kind: kind.name)
def test_what_is_a_type_is_kept_byte_for_byte(kind):
    blocks = random_blocks(kind, 4, 512 // kind.length)
    q = qarrays.to_qarray(kind, blocks)
    planned = _plan(q, "keep")
    assert (planned.tensors, planned.loss, planned.doubt) == ({"blk.0.ffn_up.weight": (kind.name, (4, 512))}, "", "")
    np.testing.assert_array_equal(planned.encode(q)["blk.0.ffn_up.weight"], blocks)


@pytest.mark.parametrize("kind", ["q4_0", "q4_1", "q8_0"])
def test_a_file_of_others_keeps_its_tensors_byte_for_byte(kind, tmp_path, shared_data):
    source = shared_data / "gguf" / f"tinystories-656k-{kind}.gguf"
    checkpoint = open_checkpoint(source)
    for asked in ("keep", kind):
        options = {"type": asked, "config": checkpoint.config}
        planned = [gguf.plan(weight, options) for weight in checkpoint.weights.values()]
        assert not any(one.loss or one.doubt for one in planned)
        gguf.write(tmp_path / "m.gguf", planned, checkpoint, options)
        found, wanted = read_container(tmp_path / "m.gguf"), read_container(source)
        assert set(found.tensors) == set(wanted.tensors)
        for name, one in wanted.tensors.items():
            assert found.tensors[name].kind == one.kind
            np.testing.assert_array_equal(found.tensors[name].blocks(), one.blocks(), err_msg=name)


@pytest.mark.parametrize("group", [32, 64, 128, 1000])
def test_symmetric_codes_are_repacked_with_their_scales_repeated(group):
    q = _symmetric(group=group, length=128)
    planned, kind, back = _round_trip(q, "q4_0")
    assert (kind, planned.loss, planned.doubt) == ("Q4_0", "", "")
    np.testing.assert_array_equal(back.codes, q.codes)
    np.testing.assert_array_equal(host_dequantize(back), host_dequantize(q))


@pytest.mark.parametrize(
    ("format", "bits", "kind"), [("int8", 8, "q8_0"), ("iq4_nl", 4, "iq4_nl"), ("int5", 5, "q5_0")]
)
def test_other_formats_have_a_type_too(format, bits, kind):
    q = _symmetric(format, bits)
    planned, _, back = _round_trip(q, kind)
    assert planned.loss == ""
    np.testing.assert_array_equal(host_dequantize(back), host_dequantize(q))


def test_rows_of_queries_move_packed():
    q = _symmetric(rows=8)
    planned, _, back = _round_trip(q, "q4_0", "model.layers.0.self_attn.q_proj.weight")
    assert list(planned.tensors) == ["blk.0.attn_q.weight"]
    np.testing.assert_array_equal(host_dequantize(back), host_dequantize(q)[[0, 2, 1, 3, 4, 6, 5, 7]])


def test_mxfp4_in_neighbouring_nibbles_becomes_halves():
    random = np.random.default_rng(0)
    scale = random.integers(120, 130, (6, 4)).astype(np.uint8).view(ml_dtypes.float8_e8m0fnu)
    q = QArray(pack(random.integers(0, 16, (6, 128)).astype(np.uint8), 4), scale, format="fp4", group_size=32, axis=-1)
    planned, kind, back = _round_trip(q, "keep")
    assert (kind, planned.loss, planned.doubt) == ("MXFP4", "", "")
    np.testing.assert_array_equal(host_dequantize(back), host_dequantize(q))


def test_scales_that_must_fit_are_a_doubt_and_then_an_error():
    q = _symmetric(scale_dtype=ml_dtypes.bfloat16)
    q = dataclasses.replace(q, scale=np.abs(q.scale))
    planned, _, back = _round_trip(q, "q4_0")
    assert (planned.loss, planned.doubt) == ("", "every scale must be a float16")
    np.testing.assert_array_equal(host_dequantize(back), host_dequantize(q))
    q.scale[2, 1] = 1e-9
    with pytest.raises(JQ4Error, match=rf"^{NAME}: the scale 9.*e-10 is not a float16, which Q4_0 keeps.*--type"):
        planned.encode(q)


def test_zero_points_become_offsets_and_the_codes_stay():
    q = _symmetric()
    zero = np.random.default_rng(1).integers(0, 16, q.scale.shape).astype(np.uint8)
    planned, kind, back = _round_trip(dataclasses.replace(q, zero_point=zero), "q4_1")
    assert (kind, planned.loss) == ("Q4_1", "offsets rounded to float16")
    np.testing.assert_array_equal(back.codes, q.codes)
    wanted = host_dequantize(dataclasses.replace(q, zero_point=zero))
    np.testing.assert_allclose(host_dequantize(back), wanted, rtol=0, atol=2**-11 * 15 * np.abs(q.scale).max())


def test_what_has_no_place_is_quantized_anew_and_called_a_loss():
    q = jax.tree.map(np.asarray, jq4.quantize({"w": jnp.ones((4, 256))}, "nf4-g32", axes={"w": -1})["w"])
    assert _plan(q, "q4_0").loss == "dequantized, and quantized anew to Q4_0"
    assert _plan(q, "f16").loss == "dequantized, and rounded to F16"
    assert _plan(np.ones((4, 64), np.float32), "q4_k_m").loss == "quantized to Q5_0"
    assert _plan(np.ones((4, 64), ml_dtypes.bfloat16), "f32").loss == ""
    assert _plan(np.ones((4, 64), ml_dtypes.bfloat16), "f16").loss == "bfloat16 rounded to F16"
    with pytest.raises(JQ4Error, match=rf"^{NAME}: no GGUF type holds QArray\(nf4.*Say --type"):
        _plan(q, "keep")


def test_what_a_file_has_no_place_for():
    one = np.ones((4, 64), np.float32)
    assert _plan(one, "f32", "model.layers.0.self_attn.rotary_emb.inv_freq").tensors == {}
    assert "no pictures" in _plan(one, "f32", "vision_tower.x.weight").loss
    with pytest.raises(
        JQ4Error, match=r"^model.layers.0.mlp.router.weight: has no name in a GGUF file of architecture"
    ):
        _plan(one, "f32", "model.layers.0.mlp.router.weight")
    with pytest.raises(JQ4Error, match=r"model_type is 'mamba', which cannot be written as GGUF. Supported: gemma2"):
        _plan(one, "f32", model_type="mamba")
    with pytest.raises(JQ4Error, match=r"--type is 'q9', wanted one of f32, "):
        _plan(one, "q9")
    with pytest.raises(JQ4Error, match=r"is beyond F16. Write it with --type bf16"):
        _plan(one, "f16").encode(one * np.float32(1e6))


def test_a_write_that_fails_leaves_what_was_there(tmp_path, shared_data):
    checkpoint = open_checkpoint(shared_data / "gguf" / "tinystories-656k-q4_0.gguf")
    options = {"type": "keep", "config": checkpoint.config}
    planned = [gguf.plan(weight, options) for weight in checkpoint.weights.values()]

    def fail(value):
        raise JQ4Error("the tenth")

    planned[10] = dataclasses.replace(planned[10], encode=fail)
    file, steps = tmp_path / "m.gguf", []
    file.write_bytes(b"old")
    with pytest.raises(JQ4Error, match="the tenth"):
        gguf.write(file, planned, checkpoint, options, lambda done, total: steps.append(done / total))
    assert file.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [file]
    assert len(steps) == 10 and steps == sorted(steps)


def test_what_llama_cpp_does_otherwise_is_said():
    embedding = LazyWeight("model.embed_tokens.weight", jax.ShapeDtypeStruct((8, 64), np.float32), lambda: None)

    def notes(**config):
        options = {"type": "f32", "config": {**CONFIG, **config}}
        checkpoint = Checkpoint("safetensors", {}, options["config"])
        return gguf.notes([gguf.plan(embedding, options)], checkpoint, options)[:-1]

    assert notes() == []
    assert notes(model_type="mistral", sliding_window=16) == [
        "sliding_window 16 is kept for jq4: llama.cpp lets a Mistral look at all of the text"
    ]
    assert "rope_type 'dynamic' has no form in GGUF" in notes(rope_scaling={"type": "dynamic", "factor": 2.0})[0]
    assert (
        "llama.cpp takes 32 for a gemma2 of 2 layers"
        in notes(model_type="gemma2", head_dim=32, query_pre_attn_scalar=7)[0]
    )
