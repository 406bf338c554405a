"""Oracle: compressed-tensors' own packers, transformers' logits on what jq4 writes, GPTQModel's dequantized weights."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from jq4 import QArray
from jq4.qarray import is_qarray
from tests.foreign_folder import convert, dense64, opened, read_weight, save, weight_of

pytestmark = pytest.mark.filterwarnings("ignore")  # of other people's imports
P = "model.layers.0.mlp.up_proj"


@pytest.fixture(scope="module")
def torch():
    return pytest.importorskip("torch", reason="torch is not installed: pip install -e '.[peers]'")


@pytest.fixture(scope="module")
def peer(torch):
    reason = "compressed-tensors is not installed: pip install -e '.[peers]'"
    return pytest.importorskip("compressed_tensors.compressors", reason=reason)


def written_by_the_peer(peer, torch, form, weights, seed, *, global_scale=None):
    """(its tensors, the weight that it decompresses them to, its quantization_config)."""
    from compressed_tensors.quantization import QuantizationScheme

    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    generator = torch.Generator().manual_seed(seed)
    group = weights.get("group_size") or 96
    state = {
        "weight": torch.randn(24, 96, generator=generator),
        "weight_scale": torch.rand(24, 96 // group, generator=generator) * 0.3 + 0.1,
    }
    if not weights.get("symmetric", True):
        top = 2 ** (weights["num_bits"] - 1)
        state["weight_zero_point"] = torch.randint(-top, top, (24, 96 // group), generator=generator).to(torch.int8)
    if global_scale is not None:
        state["weight_scale"] = (state["weight_scale"] * global_scale).to(torch.float8_e4m3fn).float()
        state["weight_global_scale"] = torch.tensor([global_scale])
    compressor = peer.BaseCompressor.get_value_from_registry(form)
    compressed = compressor.compress(state, scheme)
    if global_scale is None:
        dense = compressor.decompress(compressed, scheme)["weight"].float().numpy()
    else:
        dense = _decompressed_in_float32(torch, compressed, scheme)
    tensors = {f"{P}.{name}": _numpy(tensor) for name, tensor in compressed.items()}
    group_0 = {"targets": ["Linear"], "weights": weights}
    return tensors, dense, {"quant_method": "compressed-tensors", "format": form, "config_groups": {"g": group_0}}


def _decompressed_in_float32(torch, compressed, scheme):
    """What decompress does to NVFP4, without its rounding to bfloat16."""
    from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8
    from compressed_tensors.quantization.lifecycle.forward import dequantize

    levels = unpack_fp4_from_uint8(compressed["weight_packed"], 24, 96, dtype=torch.float32)
    scale, whole = compressed["weight_scale"].float(), compressed["weight_global_scale"]
    return dequantize(levels, scale, args=scheme.weights, global_scale=whole, dtype=torch.float32).numpy()


def _numpy(tensor):
    import ml_dtypes
    import torch

    if tensor.dtype == torch.float8_e4m3fn:
        return tensor.view(torch.uint8).numpy().view(ml_dtypes.float8_e4m3fn)
    return tensor.detach().numpy()


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
def test_integers_that_compressed_tensors_packs_are_read_without_difference(bits, peer, torch, tmp_path):
    for symmetric, group in ((True, 32), (False, 32), (True, None), (False, None)):
        weights = {"num_bits": bits, "symmetric": symmetric, "strategy": "channel", "group_size": group}
        weights["strategy"] = "group" if group else "channel"
        made = written_by_the_peer(peer, torch, "pack-quantized", weights, bits)
        checkpoint = opened(tmp_path, made[0], made[2])
        assert checkpoint.notes == ()
        np.testing.assert_array_equal(dense64(read_weight(checkpoint, f"{P}.weight")).astype(np.float32), made[1])


def test_fp4_that_compressed_tensors_packs_is_read_without_difference(peer, torch, tmp_path):
    weights = {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32, "scale_dtype": "torch.uint8"}
    made = written_by_the_peer(peer, torch, "mxfp4-pack-quantized", weights | {"zp_dtype": "torch.uint8"}, 1)
    q = read_weight(opened(tmp_path / "mx", made[0], made[2]), f"{P}.weight")
    np.testing.assert_array_equal(dense64(q).astype(np.float32), made[1])
    weights = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16}
    made = written_by_the_peer(peer, torch, "nvfp4-pack-quantized", weights, 2, global_scale=700.0)
    q = read_weight(opened(tmp_path / "nv", made[0], made[2]), f"{P}.weight")
    np.testing.assert_allclose(dense64(q), made[1], rtol=5e-7)


def random_qarray(rng, shape, bits, group, symmetric, dtype=np.float16):
    codes = rng.integers(0, 256, (shape[0], shape[1] * bits // 8), dtype=np.uint8)
    groups = shape[1] // group
    scale = (rng.uniform(0.5, 1, (shape[0], groups)) * 0.4 / 2**bits).astype(dtype)
    zeros = None if symmetric else rng.integers(2 ** (bits - 2), 3 * 2 ** (bits - 2), scale.shape).astype(np.uint8)
    return QArray(
        codes=codes, scale=scale, zero_point=zeros, format=f"int{bits}", group_size=group, axis=-1, dtype="float16"
    )


def mxfp4_qarray(rng, shape):
    import ml_dtypes

    codes = rng.integers(0, 256, (shape[0], shape[1] // 2), dtype=np.uint8)
    exponents = rng.integers(119, 123, (shape[0], shape[1] // 32), dtype=np.uint8)
    return QArray(codes=codes, scale=exponents.view(ml_dtypes.float8_e8m0fnu), format="fp4", group_size=32, axis=-1)


LLAMA = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 96, "hidden_size": 64,
    "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 64, "rms_norm_eps": 1e-6, "tie_word_embeddings": True,
}  # fmt: skip


def llama(pick):
    """The weights of a tiny Llama by name; pick(rng, module name, shape) makes each linear one."""
    rng = np.random.default_rng(7)
    shapes = {
        "self_attn.q_proj": (64, 64), "self_attn.k_proj": (32, 64), "self_attn.v_proj": (32, 64),
        "self_attn.o_proj": (64, 64), "mlp.gate_proj": (128, 64), "mlp.up_proj": (128, 64), "mlp.down_proj": (64, 128),
    }  # fmt: skip
    weights = {"model.embed_tokens.weight": rng.normal(size=(96, 64)).astype(np.float16)}
    for layer in (f"model.layers.{i}" for i in range(2)):
        weights |= {f"{layer}.{name}.weight": pick(rng, name, shape) for name, shape in shapes.items()}
        norms = ("input_layernorm", "post_attention_layernorm")
        weights |= {f"{layer}.{norm}.weight": np.ones(64, np.float16) for norm in norms}
    return weights | {"model.norm.weight": np.ones(64, np.float16)}


def logits(torch, folder, **options):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, **options).eval()
    tokens = torch.arange(24).reshape(1, 24) * 3 % 96
    with torch.no_grad():
        return model(tokens).logits.float().numpy()


def logits_of_both(torch, writer, weights, folder, dtype=None, **options):
    """transformers' logits on the file that `writer` makes, and on the same weights dense."""
    dtype = dtype or torch.float32
    held = [weight_of(value, name) for name, value in weights.items()]
    tensors, quantization = convert(writer, held)
    found = logits(torch, save(folder / writer, tensors, quantization, **LLAMA), dtype=dtype, **options)
    dense = {n: dense64(v).astype(np.float32) if is_qarray(v) else v for n, v in weights.items()}
    return found, logits(torch, save(folder / "dense", dense, None, **LLAMA), dtype=dtype)


def test_a_llama_of_many_settings_loads_in_transformers_with_the_same_logits(peer, torch, tmp_path):
    def pick(rng, name, shape):
        if name == "mlp.down_proj":
            return random_qarray(rng, shape, 8, shape[1], True)
        if name == "self_attn.o_proj":
            return random_qarray(rng, shape, 3, 64, True)
        if name == "self_attn.v_proj":
            return rng.normal(size=shape).astype(np.float16)
        return random_qarray(rng, shape, 4, 64 if name.startswith("mlp") else 32, True)

    found, wanted = logits_of_both(torch, "compressed_tensors", llama(pick), tmp_path)
    written = json.loads((tmp_path / "compressed_tensors" / "config.json").read_text())["quantization_config"]
    assert written["format"] == "pack-quantized" and len(written["config_groups"]) == 4
    assert np.abs(wanted).max() > 1
    np.testing.assert_allclose(found, wanted, atol=1e-4, rtol=1e-4)


def test_mxfp4_loads_in_transformers_with_the_same_logits(peer, torch, tmp_path):
    weights = llama(lambda rng, name, shape: mxfp4_qarray(rng, shape))
    found, wanted = logits_of_both(torch, "mxfp4", weights, tmp_path, torch.bfloat16)  # the one dtype that it loads in
    np.testing.assert_array_equal(found, wanted)  # bfloat16 holds these weights


def test_zero_points_load_in_transformers_with_the_same_logits(peer, torch, tmp_path):
    from transformers import CompressedTensorsConfig

    # float32 scales: the peer multiplies in their dtype
    weights = llama(lambda rng, name, shape: random_qarray(rng, shape, 4, 32, False, np.float32))
    # without dequantize, transformers 5.24 with compressed-tensors 0.20 takes packed zero points of no file at all
    dequantize = CompressedTensorsConfig(dequantize=True)
    found, wanted = logits_of_both(torch, "compressed_tensors", weights, tmp_path, quantization_config=dequantize)
    np.testing.assert_allclose(found, wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("writer, bits", [("gptq", 2), ("gptq", 3), ("gptq", 4), ("gptq", 8), ("awq", 4)])
@pytest.mark.parametrize("symmetric", [True, False])
def test_gptqmodel_dequantizes_what_is_written_without_difference(writer, bits, symmetric, torch, tmp_path):
    reason = "GPTQModel is not installed (it builds kernels): pip install gptqmodel"
    gptqmodel = pytest.importorskip("gptqmodel", reason=reason)
    weights = llama(lambda rng, name, shape: random_qarray(rng, shape, bits, 32, symmetric))
    tensors, quantization = convert(writer, [weight_of(value, name) for name, value in weights.items()])
    folder = save(tmp_path, tensors, quantization, **LLAMA)
    for file in (Path(__file__).parents[1] / "models" / "tiny").glob("tokenizer*.json"):  # which GPTQModel asks for
        (folder / file.name).write_bytes(file.read_bytes())
    backend = gptqmodel.BACKEND.GPTQ_TORCH if writer == "gptq" else gptqmodel.BACKEND.AWQ_TORCH
    model = gptqmodel.GPTQModel.load(str(folder), backend=backend, device="cpu", dtype=torch.float16).model
    found = {name: module for name, module in model.named_modules() if hasattr(module, "qweight")}
    assert len(found) == 14
    for name, module in found.items():
        dense = dense64(weights[f"{name}.weight"]).astype(np.float16)  # the peer's kernels have no other dtype
        np.testing.assert_array_equal(_dequantized(module).T.numpy(), dense)


@pytest.mark.parametrize("writer, bits", [("gptq", 8), ("gptq_v2", 4), ("gptq_act_order", 4), ("awq", 4)])
def test_transformers_has_the_logits_of_our_packed_model(writer, bits, torch, tmp_path, monkeypatch):
    for package in ("gptqmodel", *(["optimum"] if writer.startswith("gptq") else [])):
        pytest.importorskip(package, reason=f"transformers loads {writer} by {package}: pip install {package}")
    from transformers import AwqConfig, GPTQConfig

    from models.language_model import LanguageModel

    symmetric = writer in ("gptq", "gptq_act_order")

    def pick(rng, name, shape):
        # the peer rounds weights to float16: few bits of a scale make them exact there
        q = random_qarray(rng, shape, bits, 32, symmetric)
        q = dataclasses.replace(q, scale=(q.scale.view(np.uint16) & (0xFFF0 if bits == 4 else 0xFF00)).view(np.float16))
        order = rng.permutation(shape[1]).astype(np.int32)
        return dataclasses.replace(q, permutation=order) if writer == "gptq_act_order" else q

    weights = llama(pick)
    weights["model.embed_tokens.weight"] = weights["model.embed_tokens.weight"] * np.float16(0.125)
    method = writer.partition("_")[0]
    tensors, quantization = convert(method, [weight_of(value, name) for name, value in weights.items()])
    assert quantization.get("checkpoint_format") == {"awq": None, "gptq_v2": "gptq_v2"}.get(writer, "gptq")
    folder = save(tmp_path / writer, tensors, quantization, **LLAMA)
    kernel = GPTQConfig(bits=bits, backend="gptq_torch") if method == "gptq" else AwqConfig(backend="torch_awq")
    if method == "awq":  # whose kernels round activations to float16: the weights are loaded and dequantized by it
        from gptqmodel.nn_modules.qlinear.torch_awq import AwqTorchLinear

        monkeypatch.setattr(AwqTorchLinear, "forward", lambda self, x: x @ _dequantized(self).float())
    found = logits(torch, folder, dtype=torch.float32, device_map="cpu", quantization_config=kernel)
    ours = LanguageModel.from_folder(folder)
    wanted = np.asarray(ours.logits((np.arange(24).reshape(1, 24) * 3 % 96).astype(np.int32)))
    assert not ours.record.entries and np.abs(wanted).max() > 1
    np.testing.assert_allclose(found, wanted, atol=1e-4, rtol=0)


def _dequantized(module):
    if hasattr(module, "dequantize_weight"):
        return module.dequantize_weight()
    from gptqmodel.quantization.awq.utils.packing_utils import dequantize_gemm

    return dequantize_gemm(module.qweight, module.qzeros, module.scales, module.bits, module.group_size)
