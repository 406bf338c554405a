"""Oracle: PEFT over transformers, on the same weights: an adapter of either gives the same logits in the other."""

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jq4
from jq4.checkpoint.safetensors_files import read_header, write
from jq4.errors import JQ4Error
from models.config import DecoderConfig
from models.decoder import Decoder
from models.hf import load_config, load_params
from models.layer_runs import in_runs, runs_of
from models.peft import load_peft, save_peft

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
RANDOM = np.random.default_rng(5)
CLOSE = {"rtol": 1e-4, "atol": 1e-4}
PHI3 = {
    "model_type": "phi3", "vocab_size": 61, "hidden_size": 24, "intermediate_size": 36, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": False,
}  # fmt: skip


@pytest.fixture(scope="module")
def peers() -> Any:
    """(torch, transformers, peft)"""
    return tuple(pytest.importorskip(name, reason=f"{name} is not installed: pip install -e '.[peers]'") for name in
                 ("torch", "transformers", "peft"))  # fmt: skip


def drawn(adapters: jq4.Adapters) -> jq4.Adapters:
    """Random numbers in the place of A and B."""
    return jax.tree.map(lambda part: jnp.asarray(RANDOM.normal(0, 0.2, part.shape), jnp.float32), adapters)


def model_of(folder: Path) -> tuple[DecoderConfig, Any]:
    config = load_config(folder)
    return config, {"params": load_params(folder, config, dtype=np.float32)}


def our_logits(config: DecoderConfig, params: Any, adapters: Any, tokens: np.ndarray) -> np.ndarray:
    decoder = Decoder(config, runs=runs_of(params))
    forward = jq4.with_lora(decoder.apply, strict=True)
    return np.asarray(jax.jit(lambda adapters: forward((params, adapters), tokens))(adapters))


def their_logits(torch: Any, model: Any, tokens: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return model.eval()(torch.asarray(tokens.astype(np.int64))).logits.numpy()


def changed_by(adapters: Any, config: DecoderConfig, params: Any, tokens: np.ndarray) -> float:
    return float(
        np.abs(
            our_logits(config, params, adapters, tokens) - our_logits(config, params, jq4.Adapters({}), tokens)
        ).max()
    )


@pytest.fixture(scope="module")
def phi3(tmp_path_factory: pytest.TempPathFactory, peers: Any) -> Path:
    """A tiny Phi-3, whose files keep queries, keys and values in one tensor, and gate and up in another."""
    torch, transformers, _ = peers
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("phi3")
    model = transformers.Phi3ForCausalLM(transformers.Phi3Config(**PHI3, attn_implementation="eager"))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3) if parameter.ndim > 1 else None
    model.save_pretrained(folder)
    return folder


@pytest.mark.filterwarnings("ignore")  # of the peers' own
def test_peft_opens_ours(tmp_path, shared_data, peers):
    """All linear layers of a Llama; ranks differ, so that patterns tell them."""
    torch, transformers, peft = peers
    folder = shared_data / "tinystories-656k"
    config, params = model_of(folder)
    wide = drawn(jq4.lora(params, 6, ["re:attention"], alpha=4.0))
    narrow = drawn(jq4.lora(params, 3, ["re:mlp"], alpha=5.0))
    adapters = jq4.Adapters(wide.by_path | narrow.by_path)
    assert len(adapters.by_path) == 7
    save_peft(tmp_path, config, adapters, base_model="tinystories")
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (2, 17), np.int32)
    base = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(base, tmp_path)
    np.testing.assert_allclose(
        their_logits(torch, theirs, tokens), our_logits(config, params, adapters, tokens), **CLOSE
    )
    assert changed_by(adapters, config, params, tokens) > 0.1
    again = load_peft(tmp_path, config)
    for path, adapter in again.by_path.items():
        known = adapters.by_path[f"params/{path}"]
        assert (adapter.rank, adapter.scaling) == (known.rank, pytest.approx(known.scaling))
        np.testing.assert_array_equal(adapter.a, known.a)
        np.testing.assert_array_equal(adapter.b, known.b)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("rslora", [False, True])
def test_we_open_peft(tmp_path, shared_data, peers, rslora):
    """Some modules, some layers, ranks by module and by layer; beside weights in one stack and in runs."""
    torch, transformers, peft = peers
    folder = shared_data / "tinystories-656k"
    config, params = model_of(folder)
    base = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    options = {"rank_pattern": {"v_proj": 2, "layers.1.self_attn.q_proj": 5}, "alpha_pattern": {"down_proj": 3}}
    wanted = ["q_proj", "v_proj", "layers.1.mlp.down_proj"] if not rslora else ["q_proj", "v_proj", "o_proj", "up_proj"]
    theirs = peft.get_peft_model(
        base, peft.LoraConfig(r=4, lora_alpha=7, target_modules=wanted, use_rslora=rslora, lora_dropout=0.1, **options)
    )
    torch.manual_seed(1)
    for name, parameter in theirs.named_parameters():
        torch.nn.init.normal_(parameter, std=0.2) if "lora_" in name else None
    theirs.save_pretrained(tmp_path)
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (2, 17), np.int32)
    expected = their_logits(torch, theirs, tokens)
    adapters = load_peft(tmp_path, config)
    np.testing.assert_allclose(our_logits(config, params, adapters, tokens), expected, **CLOSE)
    assert changed_by(adapters, config, params, tokens) > 0.1
    cut = in_runs(config, params, (1,))
    np.testing.assert_allclose(
        our_logits(config, cut, load_peft(tmp_path, config, runs=runs_of(cut)), tokens), expected, **CLOSE
    )


@pytest.mark.filterwarnings("ignore")
def test_fused_modules_are_blocks_for_peft_and_shares_for_us(tmp_path, phi3, peers):
    torch, transformers, peft = peers
    config, params = model_of(phi3)
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (2, 9), np.int32)
    # ours: an adapter for queries, values and gate, none for keys and up
    adapters = drawn(jq4.lora(params, 2, ["re:q_proj|v_proj|gate_proj|o_proj"], alpha=6.0))
    scaled = dataclasses.replace(adapters.by_path["params/layers/attention/v_proj/kernel"], alpha=2.0)
    adapters = jq4.Adapters(adapters.by_path | {"params/layers/attention/v_proj/kernel": scaled})
    save_peft(tmp_path / "ours", config, adapters)
    open_model = lambda: transformers.Phi3ForCausalLM.from_pretrained(  # noqa: E731
        phi3, dtype=torch.float32, attn_implementation="eager"
    )
    theirs = peft.PeftModel.from_pretrained(open_model(), tmp_path / "ours")
    np.testing.assert_allclose(
        their_logits(torch, theirs, tokens), our_logits(config, params, adapters, tokens), **CLOSE
    )
    assert read_header(tmp_path / "ours" / "adapter_model.safetensors")[
        "base_model.model.model.layers.0.self_attn.qkv_proj.lora_A.weight"
    ].shape == (4, 24)  # two of rank two
    # theirs: one adapter for all of a module's rows, which stays one when it is written again
    fused = peft.get_peft_model(
        open_model(), peft.LoraConfig(r=3, lora_alpha=4, target_modules=["qkv_proj", "gate_up_proj"])
    )
    for name, parameter in fused.named_parameters():
        torch.nn.init.normal_(parameter, std=0.2) if "lora_" in name else None
    fused.save_pretrained(tmp_path / "theirs")
    read = load_peft(tmp_path / "theirs", config)
    np.testing.assert_allclose(our_logits(config, params, read, tokens), their_logits(torch, fused, tokens), **CLOSE)
    save_peft(tmp_path / "again", config, read)
    first, second = (read_header(tmp_path / name / "adapter_model.safetensors") for name in ("theirs", "again"))
    assert {name: one.shape for name, one in first.items()} == {name: one.shape for name, one in second.items()}
    assert all(np.array_equal(one.read(), second[name].read()) for name, one in first.items())


# What is refused needs no peers ------------------------------------------------------------------------------------

LLAMA = {**PHI3, "model_type": "llama"}
STATED = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["q_proj"], "bias": "none"}
QUERY = "base_model.model.model.layers.0.self_attn.q_proj"


def folder_of(folder: Path, shapes: dict[str, tuple[int, ...]], **stated: Any) -> Path:
    tensors = {name: ("F32", shape, lambda shape=shape: np.ones(shape, np.float32)) for name, shape in shapes.items()}
    write(folder / "adapter_model.safetensors", tensors)
    (folder / "adapter_config.json").write_text(json.dumps(STATED | stated))
    return folder


GOOD = {f"{QUERY}.lora_A.weight": (2, 24), f"{QUERY}.lora_B.weight": (24, 2)}


@pytest.mark.parametrize(
    ("shapes", "stated", "message"),
    [
        (GOOD, {"use_dora": True}, "use_dora is True, which is more than A B beside a weight"),
        (GOOD, {"peft_type": "IA3"}, "peft_type is 'IA3', wanted 'LORA'"),
        (GOOD, {"init_lora_weights": "pissa_niter_16"}, "init_lora_weights is 'pissa_niter_16'"),
        (GOOD, {"init_lora_weights": "loftq"}, "init_lora_weights is 'loftq'"),
        (GOOD, {"use_qalora": True}, "use_qalora is True"),
        (GOOD, {"bias": "all"}, "bias is 'all'"),
        (GOOD, {"r": 3}, "q_proj has rank 2, and adapter_config.json says 3"),
        ({f"{QUERY}.lora_A.weight": (2, 24)}, {}, "q_proj has lora_A alone"),
        (GOOD | {"base_model.model.model.embed_tokens.lora_embedding_A": (2, 61)}, {}, "embed_tokens.lora_embedding_A"),
        ({name: (shape[0], 2) for name, shape in GOOD.items()}, {}, "shape .24, 2., wanted .24, 24. by the model"),
        (
            {name.replace("layers.0", "layers.7"): shape for name, shape in GOOD.items()},
            {},
            "layers.7.self_attn.q_proj",
        ),
    ],
)
def test_more_than_lora_is_refused_by_name(tmp_path, shapes, stated, message):
    config = DecoderConfig.from_hf(LLAMA)
    with pytest.raises(JQ4Error, match=message):
        load_peft(folder_of(tmp_path, shapes, **stated), config)


def test_a_leaf_without_a_module_is_refused(tmp_path):
    config = DecoderConfig.from_hf(LLAMA)
    params = jax.eval_shape(Decoder(config).init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))
    adapters = jq4.lora({"params": {"embed": params["params"]["embed"]}}, 2, ["Embedding"], ignore=[])
    with pytest.raises(JQ4Error, match="embed/embedding: is no linear layer that a llama model has a module for"):
        save_peft(tmp_path, config, adapters)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_is_written_over(tmp_path):
    config = DecoderConfig.from_hf(LLAMA)
    adapters = load_peft(folder_of(tmp_path, GOOD), config)
    save_peft(tmp_path, config, adapters, base_model="another")
    assert json.loads((tmp_path / "adapter_config.json").read_text())["base_model_name_or_path"] == "another"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
