"""Oracle: logits of transformers, which loads what jq4 convert writes of models with packed embeddings and heads."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file
from small_checkpoints import CONFIG, write_dense
from test_convert import ROOM

import jq4
from jq4.cli import main
from models.language_model import LanguageModel

pytestmark = pytest.mark.filterwarnings("ignore")  # of other people's imports
RECIPE = jq4.Recipe.from_dict(
    {"rules": [{"targets": ["Linear", "Embedding"], "num_bits": 4, "group_size": 32, "scale_dtype": "float16"}]}
)
TOKENS = np.random.default_rng(3).integers(0, CONFIG["vocab_size"], (2, 12))


@pytest.fixture(scope="module")
def transformers():
    pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed: pip install -e '.[peers]'")
    return pytest.importorskip("transformers", reason="transformers is not installed: pip install -e '.[peers]'")


@pytest.fixture(scope="module", params=["tied", "untied"])
def packed(request, tmp_path_factory):
    """(a folder of jq4's own with every matrix packed, the model's logits, whether its head is its embedding)."""
    folder, tied = tmp_path_factory.mktemp(request.param), request.param == "tied"
    write_dense(folder / "dense")
    if tied:
        model = LanguageModel.from_folder(folder / "dense")
        config = json.loads((folder / "dense" / "config.json").read_text())
        del model.params["lm_head"]
        files = {"config.json": json.dumps(config | {"tie_word_embeddings": True}).encode()}
        jq4.save(folder / "tied", model.params, extra_files=files)
        model = LanguageModel.from_folder(folder / "tied")
    else:
        model = LanguageModel.from_folder(folder / "dense")
    model = dataclasses.replace(model, params=jq4.quantize(model.params, RECIPE))
    model.save(folder / "packed")
    return folder / "packed", np.asarray(model.logits(TOKENS)), tied


def convert(capsys, *words):
    capsys.readouterr()
    code = main(["convert", *ROOM, *map(str, words), "--verify", "--json"])
    told = capsys.readouterr()
    assert code == 0, told.err
    return json.loads(told.out)


@pytest.mark.parametrize("target", ["compressed-tensors", "bnb-nf4"])
def test_transformers_finds_the_embedding(tmp_path, capsys, transformers, packed, target):
    folder, logits, _ = packed
    requantize = ["--requantize"] if target == "bnb-nf4" else []
    convert(capsys, folder, tmp_path / "out", "--to", target, *requantize)
    import torch

    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    theirs.train()  # without dropout: what is not trained, bitsandbytes multiplies in bfloat16 where the CPU can
    with torch.no_grad():
        found = theirs(torch.tensor(TOKENS)).logits.numpy()
    if requantize:
        logits = LanguageModel.from_folder(tmp_path / "out").logits(TOKENS)
    np.testing.assert_allclose(found, logits, rtol=0, atol=1e-4)


@pytest.mark.parametrize("target", ["compressed-tensors", "gptq", "awq", "bnb-nf4", "mxfp4", "gpt-oss"])
def test_embeddings_and_tied_heads_are_written_dense(tmp_path, capsys, packed, target):
    folder, logits, tied = packed
    requantize = ["--requantize"] if target in ("bnb-nf4", "mxfp4", "gpt-oss") else []
    told = convert(capsys, folder, tmp_path / "out", "--to", target, *requantize)
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert tensors["model.embed_tokens.weight"].dtype == np.float32
    said = [kind for kind in told["kinds"] if kind["kind"] == "model.embed_tokens.weight"]
    assert [kind["unpacked"] for kind in said] == [f"unpacked: what loads {target} takes packed linear layers alone"]
    head_is_dense = not tied and target in ("awq", "gpt-oss")
    dense = {
        name for name, one in tensors.items() if one.ndim == 2 and one.dtype == np.float32 and name.endswith(".weight")
    }
    assert dense == {"model.embed_tokens.weight"} | ({"lm_head.weight"} if head_is_dense else set())
    if not requantize:
        ours = LanguageModel.from_folder(tmp_path / "out")
        np.testing.assert_allclose(ours.logits(TOKENS), logits, rtol=0, atol=1e-4)
        assert any(jq4.qarray.is_qarray(leaf) for leaf in jax.tree.leaves(ours.params, is_leaf=jq4.qarray.is_qarray))
