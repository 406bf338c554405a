"""Plans against parameter counts that their makers publish, and against transformers' own models of every family."""

import json

import numpy as np
import pytest

from jq4.architecture import KNOWN, from_config
from jq4.errors import JQ4Error
from jq4.plan import SCHEMES, Scheme, parse_memory, plan

LLAMA_8B = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "tie_word_embeddings": False,
    "max_position_embeddings": 131072,
}
LLAMA_70B = LLAMA_8B | {
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
}
DEEPSEEK_V3 = {
    "model_type": "deepseek_v3",
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "num_hidden_layers": 61,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "vocab_size": 129280,
    "moe_intermediate_size": 2048,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "first_k_dense_replace": 3,
    "moe_layer_freq": 1,
    "kv_lora_rank": 512,
    "q_lora_rank": 1536,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 128,
    "v_head_dim": 128,
    "max_position_embeddings": 163840,
    "tie_word_embeddings": False,
}
KIMI_K2 = DEEPSEEK_V3 | {
    "model_type": "kimi_k2",
    "num_attention_heads": 64,
    "num_key_value_heads": 64,
    "vocab_size": 163840,
    "n_routed_experts": 384,
    "first_k_dense_replace": 1,
    "max_position_embeddings": 131072,
}
MIXTRAL = {
    "model_type": "mixtral",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 32000,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "sliding_window": None,
    "max_position_embeddings": 32768,
}
QWEN3_30B = {
    "model_type": "qwen3_moe",
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "vocab_size": 151936,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 768,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "tie_word_embeddings": False,
    "sliding_window": None,
}


@pytest.mark.parametrize(
    ("config", "total", "active"),
    [  # from the model cards: parameters in billions, and those a token meets
        (LLAMA_8B, 8.030261248, None),
        (LLAMA_70B, 70.553706496, None),
        (MIXTRAL, 46.702792704, 12.88),
        (QWEN3_30B, 30.532122624, 3.3),
        (DEEPSEEK_V3, 671.0264192, 37.6),
        (KIMI_K2, 1026.4, 32.9),
    ],
    ids=["llama-3.1-8b", "llama-3.1-70b", "mixtral-8x7b", "qwen3-30b-a3b", "deepseek-v3", "kimi-k2"],
)
def test_parameters_are_those_of_the_model_cards(config, total, active):
    found = from_config(config)
    assert found.parameters / 1e9 == pytest.approx(total, rel=1e-4)
    assert found.active_parameters / 1e9 == pytest.approx(active or total, rel=0.02)
    assert not found.estimate


_TINY = {
    "hidden_size": 96,
    "intermediate_size": 160,
    "num_hidden_layers": 5,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "vocab_size": 301,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 40}
_ROUTED = _EXPERTS | {"n_routed_experts": 6, "first_k_dense_replace": 2, "n_group": 1, "topk_group": 1}
_LATENT = _ROUTED | {
    "n_shared_experts": 2,
    "kv_lora_rank": 24,
    "q_lora_rank": 30,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 20,
}
_ODD = {
    "llama": {"attention_bias": True},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": _EXPERTS
    | {"num_experts": 6, "shared_expert_intermediate_size": 56, "decoder_sparse_step": 2, "mlp_only_layers": [1]},
    "qwen3_moe": _EXPERTS | {"num_experts": 6},
    "glm4_moe": _ROUTED | {"head_dim": 32, "attention_bias": True},
    "deepseek_v2": _LATENT | {"q_lora_rank": None},
    "deepseek_v3": _LATENT | {"attention_bias": True},
}


@pytest.mark.parametrize("family", sorted(set(KNOWN) - {"kimi_k2"}))  # kimi_k2 is deepseek_v3's class
def test_parameters_are_those_of_transformers(family):
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    config = _TINY | _ODD.get(family, {}) | {"model_type": family}
    with torch.device("meta"):
        theirs = transformers.AutoConfig.for_model(**config)
        model = transformers.AutoModelForCausalLM.from_config(theirs)
    wanted = sum(parameter.numel() for parameter in model.parameters())
    assert from_config(config).parameters == wanted
    assert from_config(theirs.to_dict()).parameters == wanted


def write_config(folder, config):
    path = folder / "config.json"
    path.write_text(json.dumps(config))
    return path


def by_name(planned):
    return {each.name: each for each in planned.schemes}


def test_bytes_of_a_70b_by_hand(tmp_path):
    found = by_name(plan(write_config(tmp_path, LLAMA_70B), context=1000, batch=3))
    linear = 80 * (8192 * 8192 * 2 + 2 * 8192 * 1024 + 3 * 8192 * 28672)
    others = 2 * (2 * 128256 * 8192 + (2 * 80 + 1) * 8192)
    columns = 80 * (8192 * 2 + 2 * 1024 + 2 * 28672 + 8192)
    assert found["FP16"].weights == 2 * linear + others
    assert found["INT8"].weights == linear + 2 * columns + others
    assert found["INT4 g128"].weights == linear // 2 + 2 * linear // 128 + others
    assert found["INT4 g32"].weights == linear // 2 + 2 * linear // 32 + others
    assert found["INT3 g128"].weights == 3 * linear // 8 + 2 * linear // 128 + others
    assert {each.kv_cache for each in found.values()} == {3 * 1000 * 80 * 2 * 8 * 128 * 2}
    assert found["FP16"].read_per_token == 2 * linear + others - 2 * 128256 * 8192  # one row of the embedding is free


def test_latent_attention_keeps_the_latent_alone(tmp_path):
    planned = plan(write_config(tmp_path, KIMI_K2), context=4096)
    assert planned.schemes[0].kv_cache == 61 * (512 + 64) * 4096 * 2
    assert planned.schemes[0].weights == pytest.approx(2.05e12, rel=0.01)


def test_sliding_layers_keep_their_window(tmp_path):
    gemma = {"model_type": "gemma2", **_TINY, "head_dim": 32, "sliding_window": 128, "max_position_embeddings": 8192}
    planned = plan(write_config(tmp_path, gemma), context=1000)
    assert planned.schemes[0].kv_cache == 2 * (2 * 2 * 32) * (2 * 1000 + 3 * 128)
    assert "3 of 5 layers look back 128 tokens" in planned.architecture.notes[0]
    assert plan(write_config(tmp_path, MIXTRAL), context=8).architecture.cache == ((32, 2048, None),)


def test_the_bytes_are_those_that_quantize_makes():
    """Odd K, a short last group, 3 bits: against QArrays made by the quantizer."""
    import jax.numpy as jnp

    from jq4.rounding import quantize_weight

    weight = jnp.asarray(np.random.default_rng(0).normal(size=(77, 5)), jnp.float32)
    for scheme in SCHEMES[1:]:
        packed = quantize_weight(weight, f"int{scheme.bits}", group_size=scheme.group_size)
        assert packed.nbytes == scheme.matrix_bytes(77, 5)


@pytest.mark.parametrize(
    ("memory", "advised", "why"),
    [
        ("200GB", "FP16", "it fits as it is"),
        ("96GB", "INT8", "FP16 does not fit"),
        ("56GB", "INT4 g32", "least loss at 4 bits"),
        ("46GB", "INT4 g128", "g32 does not fit"),
        ("38GB", "INT3 g128", "several times the loss"),
        ("24GB", None, r"INT4 g32 needs 3 of them"),
    ],
)
def test_advice_is_the_best_that_fits(tmp_path, memory, advised, why):
    planned = plan(write_config(tmp_path, LLAMA_70B), memory=parse_memory(memory), context=4096)
    assert planned.advised == advised
    assert why in planned.advice
    for each in planned.schemes:
        assert each.fits == (each.total <= 0.9 * planned.memory)
        assert (each.devices == 1) == each.fits
        assert (each.longest_context >= 4096) == each.fits


def test_the_longest_context_is_the_last_that_fits(tmp_path):
    path = write_config(tmp_path, LLAMA_8B)
    longest = by_name(plan(path, memory=parse_memory("8GB")))["INT4 g32"].longest_context
    assert 1 < longest < 131072
    for context, fits in ((longest, True), (longest + 1, False)):
        assert by_name(plan(path, memory=parse_memory("8GB"), context=context))["INT4 g32"].fits is fits


def test_an_unknown_architecture_is_called_an_estimate(tmp_path):
    planned = plan(write_config(tmp_path, {**LLAMA_8B, "model_type": "llamoid"}))
    assert planned.architecture.estimate
    assert "model_type 'llamoid' is not one jq4 knows" in planned.as_dict()["notes"][0]
    assert planned.architecture.parameters == from_config(LLAMA_8B).parameters


def test_a_model_inside_of_another_is_counted(tmp_path):
    wrapped = {"model_type": "mllama_something", "text_config": LLAMA_8B}
    planned = plan(write_config(tmp_path, wrapped))
    assert planned.architecture.parameters == from_config(LLAMA_8B).parameters
    assert any("only the text model" in note for note in planned.architecture.notes)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not a JSON file"),
        ("[]", "holds a list, wanted an object"),
        ("{}", "num_hidden_layers is None, wanted a positive whole number"),
        (json.dumps(LLAMA_8B | {"hidden_size": -1}), "hidden_size is -1, wanted a positive whole number"),
        (json.dumps(LLAMA_8B | {"vocab_size": "big"}), "vocab_size is 'big'"),
        (json.dumps({k: v for k, v in MIXTRAL.items() if k != "num_experts_per_tok"}), "num_experts_per_tok is None"),
        (json.dumps({k: v for k, v in KIMI_K2.items() if k != "v_head_dim"}), "v_head_dim is None"),
        ('{"model_type": "t5", "d_model": 512}', "not the config.json of a decoder-only transformer"),
    ],
)
def test_bad_configs_are_errors_that_name_the_key(tmp_path, text, message):
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(JQ4Error, match=message) as error:
        plan(path)
    assert "config.json" in str(error.value)


def test_a_folder_without_config_is_an_error(tmp_path):
    with pytest.raises(JQ4Error, match=r"config\.json: there is no such file; give a model's folder"):
        plan(tmp_path)
    with pytest.raises(JQ4Error, match="there is no such file"):
        plan(tmp_path / "nowhere")


def save_tensors(folder, tensors):
    safetensors = pytest.importorskip("safetensors.numpy")
    safetensors.save_file(
        {name: np.zeros(shape, dtype) for name, (shape, dtype) in tensors.items()}, folder / "model.safetensors"
    )


def test_headers_decide_where_they_differ_from_the_config(tmp_path):
    write_config(tmp_path, LLAMA_8B)
    tensors = {
        "model.embed_tokens.weight": ((10, 8), np.float32),
        "model.layers.0.mlp.up_proj.weight": ((6, 8), np.float32),
    }
    save_tensors(tmp_path, tensors)
    planned = plan(tmp_path)
    assert planned.source == "safetensors headers"
    assert planned.architecture.parameters == 128
    assert "the files hold 128" in planned.architecture.notes[-1]
    assert by_name(planned)["INT8"].weights == 2 * 80 + 48 + 2 * 6


def test_a_quantized_checkpoint_is_planned_from_its_config(tmp_path):
    write_config(tmp_path, LLAMA_8B)
    save_tensors(tmp_path, {"model.layers.0.mlp.up_proj.qweight": ((1, 8), np.int32)})
    planned = plan(tmp_path)
    assert planned.source == "config.json"
    assert "quantized already" in planned.architecture.notes[-1]


def test_damaged_headers_are_errors_that_name_the_file(tmp_path):
    write_config(tmp_path, LLAMA_8B)
    save_tensors(tmp_path, {"a": ((10, 8), np.float32)})
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(JQ4Error, match=r"model\.safetensors: not a sound safetensors file"):
        plan(tmp_path)
    file.unlink()
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "../a.safetensors"}}))
    with pytest.raises(JQ4Error, match=r"names the shard '\.\./a\.safetensors', wanted a file name"):
        plan(tmp_path)
    index.write_text(json.dumps({"weight_map": {"a": "b.safetensors"}}))
    with pytest.raises(JQ4Error, match=r"b\.safetensors: the shard is missing"):
        plan(tmp_path)


def test_real_headers_agree_with_their_config(shared_data):
    planned = plan(shared_data / "tinystories-656k")
    assert (planned.source, planned.architecture.parameters) == ("safetensors headers", 656_000)
    assert not planned.architecture.notes


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("40GB", 40 * 10**9),
        ("40 gib", 40 * 2**30),
        ("1.5T", 1_500_000_000_000),
        ("512m", 512_000_000),
        ("8e9", 8 * 10**9),
    ],
)
def test_amounts_of_memory(text, wanted):
    assert parse_memory(text) == wanted


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "0", "12 apples", "1.2.3GB", "nan", "1e999GB"])
def test_amounts_that_are_none(text):
    with pytest.raises(JQ4Error, match="wanted an amount above 0, such as 40GB"):
        parse_memory(text)


def test_packing_fills_up_units():
    assert Scheme("INT3", 3).matrix_bytes(9, 2) == 2 * (6 + 2)
    assert Scheme("INT4", 4, 4).matrix_bytes(9, 2) == 2 * (5 + 2 * 3)
