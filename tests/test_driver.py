"""Oracles: jq4.quantize on the whole tree (byte for byte where nothing is calibrated), and the decoder itself."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jq4
from jq4.chain import TreeSource
from jq4.driver import quantize_blocks
from models.chain import LAYERS, decoder_chain
from models.config import DecoderConfig
from models.decoder import Decoder
from tests.random_model import CONFIG

SMALL = CONFIG | {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "num_key_value_heads": 1}


@pytest.fixture(scope="module")
def config():
    return DecoderConfig.from_hf(SMALL)


@pytest.fixture(scope="module")
def untied_config():
    return DecoderConfig.from_hf(SMALL | {"tie_word_embeddings": False})


@pytest.fixture(scope="module")
def params(config):
    return Decoder(config).init(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]


@pytest.fixture(scope="module")
def rows(config):
    return np.random.default_rng(1).integers(0, config.vocab_size, (6, 16), np.int32)


def same_bytes(found, wanted):
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    for have, want in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert have.dtype == want.dtype
        np.testing.assert_array_equal(np.asarray(have), np.asarray(want))


@pytest.mark.parametrize("recipe", ["rtn-w4g32", "hqq-w4g16-asym", "rtn-w4gt", "nf4-g16"])
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
    "autoround": {"iterations": 4, "batch_size": 2},
    "distill": {"iterations": 4, "batch_size": 2, "perturbed_rows": 2},
}


@pytest.mark.parametrize(
    ("before", "after", "limit"),
    [(["rotate"], [], 1.3), (["smoothquant"], ["autoround"], 1.0), (["awq"], ["autoround", "distill"], 0.9)],
)
def test_steps_are_followed(untied_config, rows, before, after, limit):
    params = Decoder(untied_config).init(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]
    recipe = jq4.Recipe.preset("rtn-w4g16").to_dict()
    recipe |= {"before": before, "after": [{"step": step, **LEARNED[step]} for step in after]}
    chain, source = decoder_chain(untied_config), TreeSource(params, LAYERS)
    result = quantize_blocks(chain, source, jq4.Recipe.from_dict(recipe), rows)
    model, dense = jax.jit(jq4.quantized(Decoder(untied_config).apply, strict=True)), Decoder(untied_config).apply
    wanted = dense({"params": params}, rows)
    plain = jq4.quantize(params, "rtn-w4g16")
    lost, lost_plain = (float(jnp.mean((model({"params": p}, rows) - wanted) ** 2)) for p in (result.params, plain))
    assert lost < limit * lost_plain
    notes = {row.note for row in result.rows}
    assert all("learned" in note for note in notes) if after else notes == {""}
