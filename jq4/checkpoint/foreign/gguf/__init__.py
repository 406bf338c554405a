"""GGUF, llama.cpp's format: one file that holds a model's weights, its settings and its tokenizer. In and out.

    container.py            the header: values and tensors, every count and offset checked
    block_types.py          the tensor types: sizes, and what a QArray of each looks like
    blocks.py super_blocks.py    blocks of 32 and of 256 elements: bytes to codes and scales, and back
    qarrays.py              blocks to QArrays, and back byte for byte
    names.py                names, and the order of llama's query and key rows
    experts.py expert_settings.py    experts: one tensor for a layer here, a module each at Hugging Face
    config_in.py tokenizer_in.py    metadata to config.json and tokenizer.json; config_out.py tokenizer_out.py: back
    splits.py               how byte-level vocabularies cut texts
    checkpoint.py           all of that as an opened checkpoint
    quantize.py, quantize_blocks.py, quantize_super_blocks.py    dense weights to blocks, as llama.cpp does it
    mixture.py              which type each tensor of a file gets
    repacking.py            packed weights into a type with their codes as they are
    planning.py file_writing.py     the plan of a weight, and the file

To write one: `planned = [plan(weight, options) for weight in by_rows(checkpoint).weights.values()]`, then `write(file,
planned, checkpoint, options)`, where options are {"type": "q4_k_m", "config": checkpoint.config}. `notes(...)` says
what the settings and the tokenizer lose.
"""

from jq4.checkpoint.foreign.gguf.checkpoint import NAME as NAME
from jq4.checkpoint.foreign.gguf.checkpoint import open_gguf as open_gguf
from jq4.checkpoint.foreign.gguf.experts import by_rows as by_rows
from jq4.checkpoint.foreign.gguf.file_writing import notes as notes
from jq4.checkpoint.foreign.gguf.file_writing import outline as outline
from jq4.checkpoint.foreign.gguf.file_writing import write as write
from jq4.checkpoint.foreign.gguf.planning import TYPES as TYPES
from jq4.checkpoint.foreign.gguf.planning import plan as plan
