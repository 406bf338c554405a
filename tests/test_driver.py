"""Oracles: jq4.quantize on the whole tree (byte for byte where nothing is calibrated), and the decoder itself."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jq4
from jq4 import qarray
from jq4.chain import TreeSource
from jq4.driver import block as block_module
from jq4.driver import quantize_blocks
from jq4.errors import JQ4Error
from jq4.evaluate import evaluate
from jq4.qarray import is_qarray
from models import chain as chains
from models.chain import LAYERS
from models.config import DecoderConfig
from models.decoder import Decoder
from tests.random_model import CONFIG

SMALL = CONFIG | {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "num_key_value_heads": 1}

decoder_chain = functools.cache(chains.decoder_chain)  # the same functions, so that each is compiled once


def random_params(config):
    """Weights large enough that the logits are not flat."""
    shapes = jax.eval_shape(Decoder(config).init, jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]
    random = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: jnp.asarray(random.normal(0, 0.2, leaf.shape), jnp.float32), shapes)


@pytest.fixture(scope="module")
def config():
    return DecoderConfig.from_hf(SMALL)


def untied(inner):
    return DecoderConfig.from_hf(SMALL | {"tie_word_embeddings": False, "intermediate_size": inner})


@pytest.fixture(scope="module")
def params(config):
    return random_params(config)


@pytest.fixture(scope="module")
def rows(config):
    return np.random.default_rng(1).integers(0, config.vocab_size, (6, 16), np.int32)


def same_bytes(found, wanted):
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    for have, want in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert have.dtype == want.dtype
        np.testing.assert_array_equal(np.asarray(have), np.asarray(want))


@pytest.mark.parametrize("recipe", ["hqq-w4g32-asym", "rtn-w4gt", "nf4-g16"])
def test_without_calibration_it_is_quantize_byte_for_byte(config, params, recipe):
    chain, source = decoder_chain(config), TreeSource(params, LAYERS)
    result = quantize_blocks(chain, source, recipe)
    report = jq4.QuantizeReport()
    same_bytes(result.params, jq4.quantize(params, recipe, report=report))
    assert len(result.report.leaves) == len(report.leaves)
    for mine, theirs in zip(result.report.leaves, report.leaves, strict=True):
        for name in ("path", "shape", "dtype", "status", "format", "group_size", "axis", "dense_nbytes", "nbytes"):
            assert getattr(mine, name) == getattr(theirs, name), (mine.path, name)
        if theirs.is_packed:
            assert mine.sqnr_db == pytest.approx(theirs.sqnr_db, abs=0.01)
    assert len(result.rows) == 7 * config.num_layers and result.calibration_rows is None


def test_a_saved_model_is_the_one_returned(config, params, tmp_path):
    chain, source = decoder_chain(config), TreeSource(params, LAYERS)
    result = quantize_blocks(chain, source, "rtn-w4g16", destination=tmp_path / "out", extra_files={"a.txt": b"b"})
    assert result.params is None
    same_bytes(jq4.restore(tmp_path / "out"), quantize_blocks(chain, source, "rtn-w4g16").params)
    assert jq4.read_manifest(tmp_path / "out").extra_files == ("a.txt",)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


LEARNED = {
    "adaround": {"iterations": 4, "batch_size": 2},
    "distill": {"iterations": 4, "batch_size": 2, "perturbed_rows": 2},
}


@pytest.mark.parametrize(
    ("before", "after", "limit", "inner"),
    [(["rotate"], [], 1.3, 48), (["awq"], ["adaround", "distill"], 0.9, 32)],
)
def test_steps_are_followed(rows, before, after, limit, inner):
    """What is learned compiles anew for every shape, so that there inner weights are of the shape of the others."""
    config = untied(inner)
    params = random_params(config)
    recipe = jq4.Recipe.preset("rtn-w4g16").to_dict()
    recipe |= {"before": before, "after": [{"step": step, **LEARNED[step]} for step in after]}
    chain, source = decoder_chain(config), TreeSource(params, LAYERS)
    result = quantize_blocks(chain, source, jq4.Recipe.from_dict(recipe), rows)
    model, dense = jax.jit(jq4.quantized(Decoder(config).apply, strict=True)), Decoder(config).apply
    wanted = dense({"params": params}, rows)
    plain = jq4.quantize(params, "rtn-w4g16")
    lost, lost_plain = (float(jnp.mean((model({"params": p}, rows) - wanted) ** 2)) for p in (result.params, plain))
    assert lost < limit * lost_plain
    notes = {row.note for row in result.rows}
    assert all("learned" in note for note in notes) if after else notes == {""}


def codes_of(tree):
    leaves = jax.tree.leaves(tree, is_leaf=is_qarray)
    return np.concatenate([np.asarray(qarray.codes_of(leaf)).ravel() for leaf in leaves if is_qarray(leaf)])


@pytest.fixture(scope="module")
def many_rows(config):
    return np.random.default_rng(1).integers(0, config.vocab_size, (128, 16), np.int32)


@pytest.fixture(scope="module")
def calibrated(config, params, many_rows):
    """The params, and what GPTQ makes of them on one device."""
    chain, source = decoder_chain(config), TreeSource(params, LAYERS)
    return params, quantize_blocks(chain, source, "gptq-w4g16", many_rows, batch_size=1)


def test_gptq_fits_each_block_to_the_inputs_it_meets(config, many_rows, calibrated):
    params, result = calibrated
    model = jq4.quantized(Decoder(config).apply, strict=True)
    stats = jq4.observe(model, {"params": params}, [many_rows], collect=("hessian",))
    whole = jq4.quantize(params, "gptq-w4g16", stats)
    first = [jax.tree.map(lambda leaf: leaf[:1], p["layers"]["attention"]["q_proj"]) for p in (result.params, whole)]
    assert np.mean(codes_of(first[0]) != codes_of(first[1])) < 0.01  # what nothing precedes has the same inputs in both

    unseen = np.random.default_rng(2).integers(0, config.vocab_size, (32, 16), np.int32)
    logits = jax.jit(model)
    trees = {"driver": result.params, "whole": whole, "rtn": jq4.quantize(params, "rtn-w4g16")}
    found = {
        name: evaluate(
            lambda tokens, tree=tree: logits({"params": tree}, tokens),
            unseen,
            reference=lambda tokens: logits({"params": params}, tokens),
        ).kld_mean
        for name, tree in trees.items()
    }
    assert found["driver"] < found["whole"] < found["rtn"]
    assert all(0 < row.weighted_error < 0.1 and row.seconds > 0 for row in result.rows)
    assert (result.calibration_rows, result.context) == (128, 16)


def test_the_dense_block_is_let_go_of_before_its_last_stage_is_quantized(config, params, many_rows, monkeypatch):
    """Oracle: the arrays that JAX holds, of the shape of gate_proj and up_proj."""
    held = []
    quantize_leaves = block_module.quantize_leaves

    def watched(leaves, *rest):
        held.append(sum(array.shape == (32, 48) and array.dtype == jnp.float32 for array in jax.live_arrays()))
        return quantize_leaves(leaves, *rest)

    monkeypatch.setattr(block_module, "quantize_leaves", watched)
    quantize_blocks(decoder_chain(config), TreeSource(params, LAYERS), "gptq-w4g16", many_rows[:32])
    assert held == [2, 2, 2, 0] * config.num_layers


def test_eight_devices_give_the_bytes_of_one(config, params, many_rows):
    """Of two blocks, the second fitted to what the first became; scales of 32 bits show the least difference."""
    rule = dataclasses.replace(jq4.Recipe.preset("gptq-w4g16").rules[0], targets=("down_proj",), scale_dtype="float32")
    chain, source = decoder_chain(config), TreeSource(params, LAYERS)
    rows = np.concatenate([many_rows] * 4 + [many_rows[:64]])  # nine units of computation
    one, eight = (quantize_blocks(chain, source, rule, rows, devices=jax.devices()[:count]) for count in (1, 8))
    assert len(one.rows) == config.num_layers == 2
    same_bytes(eight.params, one.params)


def test_poisoned_activations_name_block_and_leaf(config, params, rows, tmp_path):
    chain = decoder_chain(config)

    def poisoned(tree, index, x):
        return chain.block(tree, index, jnp.where(index == 1, jnp.nan, x))

    ill = dataclasses.replace(chain, block=poisoned)
    with pytest.raises(JQ4Error, match=r"block 1: layers/attention/k_proj/kernel: its statistics are not finite"):
        quantize_blocks(ill, TreeSource(params, LAYERS), "gptq-w4g16", rows, destination=tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_calibration_is_asked_for_before_any_work(config, params, tmp_path):
    chain, source = decoder_chain(config), TreeSource(params, LAYERS)
    with pytest.raises(JQ4Error, match=r"recipe gptq-w4g16 needs calibration \(method gptq\), and none was given"):
        quantize_blocks(chain, source, "gptq-w4g16", destination=tmp_path / "out")
    with pytest.raises(JQ4Error, match=r"calibration rows are float64\[2, 3\], wanted integers \[rows, tokens\]"):
        quantize_blocks(chain, source, "gptq-w4g16", np.zeros((2, 3)), destination=tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("options", [{"batch_size": 0}, {"seed": -1}])
def test_numbers_that_are_none_are_refused_before_any_work(config, params, rows, tmp_path, options):
    chain, source = decoder_chain(config), TreeSource(params, LAYERS)
    with pytest.raises(JQ4Error, match=r"batch_size is \d and seed is -?\d: wanted 1 or more, and 0 to 2\*\*31 - 1"):
        quantize_blocks(chain, source, "gptq-w4g16", rows, destination=tmp_path / "out", **options)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("after", [["distill", "autoround"], ["autoround", "autoround"]])
def test_steps_that_would_not_be_followed_are_refused(config, params, rows, after):
    recipe = jq4.Recipe.from_dict(jq4.Recipe.preset("gptq-w4g16").to_dict() | {"after": after})
    with pytest.raises(JQ4Error, match=rf"steps after its rules are {', '.join(after)}: wanted .*, each once"):
        quantize_blocks(decoder_chain(config), TreeSource(params, LAYERS), recipe, rows)


def test_a_table_that_is_only_looked_up_has_no_inputs_to_calibrate_on(rows):
    config = untied(48)
    chain, source = decoder_chain(config), TreeSource(random_params(config), LAYERS)
    recipe = jq4.Recipe.preset("gptq-w4g16", embeddings=True)
    with pytest.raises(JQ4Error, match=r"embed/embedding: its rule looks at what it is multiplied by"):
        quantize_blocks(chain, source, recipe, rows)


@pytest.mark.parametrize("method", ["gptq", "rtn"])
def test_a_poisoned_weight_is_named_and_not_the_inputs_or_outputs_of_its_block(config, params, rows, method):
    down = {"kernel": params["layers"]["mlp"]["down_proj"]["kernel"].at[1, 3].set(jnp.nan)}
    ill = params | {"layers": params["layers"] | {"mlp": params["layers"]["mlp"] | {"down_proj": down}}}
    rules = [jq4.Rule(("down_proj",), method=method), jq4.Rule(("o_proj",), method="gptq")]
    with pytest.raises(JQ4Error, match=r"block 1: layers/mlp/down_proj/kernel: holds NaN or Inf"):
        quantize_blocks(decoder_chain(config), TreeSource(ill, LAYERS), jq4.Recipe(tuple(rules)), rows)


def test_leaves_of_one_stage_may_want_different_numbers_of_rows(config, params, rows):
    rules = [jq4.Rule(("k_proj",), method="gptq", options={"min_rows": 1000}), jq4.Rule(("v_proj",), method="gptq")]
    result = quantize_blocks(decoder_chain(config), TreeSource(params, LAYERS), jq4.Recipe(tuple(rules)), rows)
    starved, fitted = result.rows[:2]
    assert "fewer than 1000 rows" in starved.note and not fitted.note
    assert starved.weighted_error > 0 and fitted.weighted_error > 0


def test_a_poisoned_norm_is_named_and_not_the_weights_behind_it(config, params, rows, tmp_path):
    norm = {"scale": params["layers"]["input_norm"]["scale"].at[1, 3].set(jnp.nan)}
    ill = params | {"layers": params["layers"] | {"input_norm": norm}}
    with pytest.raises(JQ4Error, match=r"block 1: layers/input_norm/scale: holds NaN or Inf"):
        quantize_blocks(
            decoder_chain(config), TreeSource(ill, LAYERS), "smoothquant-w8a8", rows, destination=tmp_path / "out"
        )
    assert list(tmp_path.iterdir()) == []


def test_a_poisoned_embedding_is_found_before_any_block(config, params, rows):
    ill = params | {"embed": {"embedding": params["embed"]["embedding"].at[299, 0].set(jnp.nan)}}
    said = []
    with pytest.raises(JQ4Error, match=r"embed/embedding: holds NaN or Inf"):
        quantize_blocks(
            decoder_chain(config), TreeSource(ill, LAYERS), "rtn-w4g16", rows, progress=lambda *a: said.append(a)
        )
    assert said == []
