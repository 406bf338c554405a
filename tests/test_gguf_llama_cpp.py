"""Oracle: llama.cpp itself (xllamacpp): it loads what we write, and goes on with a text as our model does."""

import pytest

from jq4.checkpoint.foreign import gguf, open_checkpoint
from models.language_model import LanguageModel

PROMPT = "Once upon a time, there was a little"
TOKENS = 32


def test_llama_cpp_continues_a_text_as_our_model_does(tmp_path, shared_data):
    llama_cpp = pytest.importorskip("xllamacpp", reason="xllamacpp (llama.cpp) is the oracle here and is not installed")
    checkpoint = open_checkpoint(shared_data / "tinystories-656k")
    options = {"type": "f32", "config": checkpoint.config}
    planned = [gguf.plan(weight, options) for weight in checkpoint.weights.values()]
    gguf.write(tmp_path / "m.gguf", planned, checkpoint, options)
    parameters = llama_cpp.CommonParams()
    parameters.model.path = str(tmp_path / "m.gguf")
    parameters.n_ctx, parameters.n_parallel, parameters.warmup, parameters.verbosity = 256, 1, False, -1
    parameters.cpuparams.n_threads = 1
    server = llama_cpp.Server(parameters)
    answer = server.handle_completions({"prompt": PROMPT, "max_tokens": TOKENS, "temperature": 0})
    model = LanguageModel.from_folder(shared_data / "tinystories-656k")
    assert model.tokenizer is not None
    assert answer["usage"]["prompt_tokens"] == len(model.tokenizer.encode(PROMPT).ids)
    assert answer["choices"][0]["text"] == model.generate([PROMPT], max_new_tokens=TOKENS)[0]
