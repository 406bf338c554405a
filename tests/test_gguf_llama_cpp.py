"""Oracle: llama.cpp itself (xllamacpp): it loads what we write, and goes on with a text as the source's model does."""

import os

import numpy as np
import pytest

from jq4.checkpoint.foreign import gguf, open_checkpoint
from models.language_model import LanguageModel
from tests.moe_folders import FAMILIES, write_moe

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
PROMPT = "Once upon a time, there was a little"
TOKENS = 32


@pytest.fixture
def llama_cpp():
    return pytest.importorskip("xllamacpp", reason="xllamacpp (llama.cpp) is the oracle here and is not installed")


def written(folder, file):
    checkpoint = gguf.by_rows(open_checkpoint(folder))
    options = {"type": "f32", "config": checkpoint.config}
    planned = [gguf.plan(weight, options) for weight in checkpoint.weights.values()]
    gguf.write(file, planned, checkpoint, options)


def served(llama_cpp, file):
    parameters = llama_cpp.CommonParams()
    parameters.model.path = str(file)
    parameters.n_ctx, parameters.n_parallel, parameters.warmup, parameters.verbosity = 256, 1, False, -1
    parameters.cpuparams.n_threads = 1
    # in float32 throughout
    parameters.cache_type_k = parameters.cache_type_v = llama_cpp.ggml_type.GGML_TYPE_F32
    parameters.flash_attn_type = llama_cpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    return llama_cpp.Server(parameters)


def test_llama_cpp_continues_a_text_as_our_model_does(tmp_path, shared_data, llama_cpp):
    written(shared_data / "tinystories-656k", tmp_path / "m.gguf")
    server = served(llama_cpp, tmp_path / "m.gguf")
    answer = server.handle_completions({"prompt": PROMPT, "max_tokens": TOKENS, "temperature": 0})
    model = LanguageModel.from_folder(shared_data / "tinystories-656k")
    assert model.tokenizer is not None
    assert answer["usage"]["prompt_tokens"] == len(model.tokenizer.encode(PROMPT).ids)
    assert answer["choices"][0]["text"] == model.generate([PROMPT], max_new_tokens=TOKENS)[0]


@pytest.mark.filterwarnings("ignore")  # of other people's imports
@pytest.mark.parametrize("family", FAMILIES)
def test_llama_cpp_runs_experts_as_transformers_does(family, tmp_path, shared_data, llama_cpp):
    torch = pytest.importorskip("torch", reason="torch is not installed: pip install -e '.[peers]'")
    transformers = pytest.importorskip("transformers", reason="transformers is the oracle here and is not installed")
    write_moe(tmp_path / "hf", family)
    for file in (shared_data / "tinystories-656k").glob("*token*.json"):
        (tmp_path / "hf" / file.name).write_bytes(file.read_bytes())
    model, loading = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "hf", dtype=torch.float32, output_loading_info=True
    )
    assert not loading["missing_keys"] and not loading["unexpected_keys"]
    written(tmp_path / "hf", tmp_path / "m.gguf")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    tokens = tokenizer(PROMPT, return_tensors="pt").input_ids
    with torch.no_grad():
        ours = model.generate(tokens, max_new_tokens=TOKENS, do_sample=False, eos_token_id=None)
        wanted = torch.log_softmax(model(tokens).logits[0, -1], -1).numpy()
    asked = {"prompt": PROMPT, "max_tokens": TOKENS, "temperature": 0, "logprobs": 20, "ignore_eos": True}
    answer = served(llama_cpp, tmp_path / "m.gguf").handle_completions(asked)
    steps = answer["choices"][0]["logprobs"]["content"]
    found = {one["id"]: one["logprob"] for one in steps[0]["top_logprobs"]}
    assert len(found) == 20
    np.testing.assert_allclose(list(found.values()), wanted[list(found)], atol=1e-4, rtol=0)
    assert [one["id"] for one in steps] == ours[0, tokens.shape[1] :].tolist()
