"""Checkpoints that others wrote, packed: opened straight into QArrays, and written for others to open.

    weights.py       what an opened checkpoint is: weights by Hugging Face's names, each read when it is asked for
    opening.py       which format a folder or file holds, by its contents
    bit_strings.py   codes to the words that files keep them in, on the host
    partners.py named_tensors.py   the tensors of one weight, found and checked before they are read
    row_blocks.py    weights unpacked, packed and dequantized a block of rows at a time
    flat_groups.py mx_blocks.py linears.py   groups that cross rows; blocks of MXFP4; what is a linear layer by its name
    gptq.py awq.py compressed_tensors.py ...   one format a file: how its tensors make a QArray
    gptq_writing.py awq_writing.py ...         and the way back, where the format is written
    gguf/            the container of llama.cpp

Every packed weight has the axes of a Hugging Face tensor, [N, K] (experts [E, N, K]), and is grouped along K, its
axis -1. Its arrays are numpy's: nothing here computes on a device.
"""

from jq4.checkpoint.foreign.opening import open_checkpoint as open_checkpoint
from jq4.checkpoint.foreign.weights import Checkpoint as Checkpoint
from jq4.checkpoint.foreign.weights import LazyWeight as LazyWeight
