"""GGUF, llama.cpp's format: one file that holds a model's weights, its settings and its tokenizer. In and out.

container.py            the header: values and tensors, every count and offset checked
block_types.py          the tensor types: sizes, and what a QArray of each looks like
blocks.py super_blocks.py    blocks of 32 and of 256 elements: bytes to codes and scales, and back
qarrays.py              blocks to QArrays, and back byte for byte
names.py                names, and the order of llama's query and key rows
config_in.py tokenizer_in.py    metadata to config.json and tokenizer.json
splits.py               how byte-level vocabularies cut texts
checkpoint.py           all of that as an opened checkpoint
"""

from jq4.checkpoint.foreign.gguf.checkpoint import NAME as NAME
from jq4.checkpoint.foreign.gguf.checkpoint import open_gguf as open_gguf
