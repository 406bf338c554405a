"""Oracles: small models as torchao, quanto, HQQ and mlx-lm quantize and save them, each dequantized by its own code."""

import os

import numpy as np
import pytest

from jq4.checkpoint.foreign import open_checkpoint
from models.language_model import LanguageModel
from tests.foreign_folder import dense
from tests.small_checkpoints import LINEAR, VOCABULARY, write_dense

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
pytestmark = pytest.mark.filterwarnings("ignore")  # of other people's imports
TOKENS = (np.arange(24).reshape(1, 24) * 3 % VOCABULARY).astype(np.int32)
LAYERS = 2


def modules(model):
    return {name: module for name, module in model.named_modules() if name.endswith(tuple(LINEAR))}


def loaded(folder, **options):
    torch = pytest.importorskip("torch", reason="torch is not installed: pip install -e '.[peers]'")
    transformers = pytest.importorskip(
        "transformers", reason="transformers is not installed: pip install -e '.[peers]'"
    )
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, device_map="cpu", **options)


def by_torchao(folder, out, bits, whole_rows=False):
    torchao = pytest.importorskip("torchao.quantization", reason="torchao is not installed: pip install torchao")
    torch = pytest.importorskip("torch")
    from transformers import TorchAoConfig

    kind = {4: torch.int4, 8: torch.int8}[bits]
    how = torchao.Int8WeightOnlyConfig()
    if not whole_rows:
        how = torchao.IntxWeightOnlyConfig(weight_dtype=kind, granularity=torchao.PerGroup(32))
    model = loaded(folder, quantization_config=TorchAoConfig(how))
    model.save_pretrained(out)
    return {name: module.weight.dequantize() for name, module in modules(model).items()}


def by_torchao_in_rows(folder, out, bits):
    return by_torchao(folder, out, bits, whole_rows=True)


def by_quanto(folder, out, bits):
    quanto = pytest.importorskip("optimum.quanto", reason="quanto is not installed: pip install optimum-quanto")
    kind = {4: quanto.qint4, 8: quanto.qint8, 2: quanto.qint2}[bits]
    model = quanto.QuantizedModelForCausalLM.quantize(loaded(folder), weights=kind, exclude="lm_head")
    model.save_pretrained(out)
    return {name: module.weight.dequantize() for name, module in modules(model).items()}


def by_hqq(folder, out, bits):
    hqq = pytest.importorskip("hqq.models.hf.base", reason="HQQ is not installed: pip install hqq")
    import torch
    from hqq.core.quantize import BaseQuantizeConfig

    model, config = loaded(folder), BaseQuantizeConfig(nbits=bits, group_size=32)
    whole = hqq.AutoHQQHFModel
    whole.quantize_model(model, quant_config=config, compute_dtype=torch.float32, device="cpu")
    whole.save_to_safetensors(model, str(out))
    return {name: module.dequantize() for name, module in modules(model).items()}


@pytest.mark.parametrize(
    ("peer", "bits"),
    [(by_torchao, 4), (by_torchao_in_rows, 8), (by_quanto, 4), (by_quanto, 8), (by_hqq, 4), (by_hqq, 3)],
)
def test_a_model_has_the_weights_and_the_logits_of_its_own_dequantization(peer, bits, tmp_path):
    write_dense(tmp_path / "dense", LAYERS)
    wanted = peer(tmp_path / "dense", tmp_path / "packed", bits)
    checkpoint = open_checkpoint(tmp_path / "packed")
    assert len(wanted) == LAYERS * len(LINEAR)
    assert {name for name, weight in checkpoint.weights.items() if weight.packed} == {
        f"{name}.weight" for name in wanted
    }
    for name, theirs in wanted.items():
        q = checkpoint.weights[f"{name}.weight"].read()
        assert q.format == f"int{bits}"
        np.testing.assert_array_equal(dense(q, np.float32), theirs.detach().float().numpy(), err_msg=name)
    model, state = loaded(tmp_path / "dense"), {f"{name}.weight": theirs for name, theirs in wanted.items()}
    model.load_state_dict(state, strict=False)
    ours = LanguageModel.from_folder(tmp_path / "packed")
    found = np.asarray(ours.logits(TOKENS))
    assert not ours.record.entries and np.abs(found).max() > 1
    import torch

    with torch.no_grad():
        expected = model(torch.tensor(TOKENS, dtype=torch.int64)).logits.numpy()
    np.testing.assert_allclose(found, expected, atol=1e-4, rtol=0)


def test_what_mlx_lm_converts_runs_as_in_mlx(tmp_path, shared_data):
    convert = pytest.importorskip("mlx_lm.convert", reason="mlx-lm is not installed: pip install mlx-cpu mlx-lm")
    import mlx.core as mx
    from mlx_lm.utils import load_model

    write_dense(tmp_path / "dense", LAYERS)
    for file in (shared_data / "tinystories-656k").glob("*token*.json"):  # which mlx-lm asks for
        (tmp_path / "dense" / file.name).write_bytes(file.read_bytes())
    kept = {"quantize": True, "q_group_size": 32, "q_bits": 4, "dtype": "float32"}
    convert.convert(str(tmp_path / "dense"), str(tmp_path / "mlx"), **kept)
    peer, _ = load_model(tmp_path / "mlx")
    checkpoint = open_checkpoint(tmp_path / "mlx")
    packed = {name: weight for name, weight in checkpoint.weights.items() if weight.packed}
    assert len(packed) == LAYERS * len(LINEAR) + 2  # the embedding and the head too
    held = dict(peer.named_modules())
    for name, weight in packed.items():
        module = held[name.removesuffix(".weight")]
        theirs = mx.dequantize(module.weight, module.scales, module.biases, group_size=32, bits=4)
        np.testing.assert_array_equal(dense(weight.read(), np.float32), np.array(theirs), err_msg=name)
    ours = LanguageModel.from_folder(tmp_path / "mlx")
    found = np.asarray(ours.logits(TOKENS))
    assert not ours.record.entries and np.abs(found).max() > 1
    np.testing.assert_allclose(found, np.array(peer(mx.array(TOKENS))), atol=1e-4, rtol=0)
