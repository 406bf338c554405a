"""Checkpoints that others wrote, packed: opened straight into QArrays, and written for others to open.

    weights.py opening.py writing.py    an opened checkpoint; which reader a folder or file is for; what a writer is

A format:
    gptq.py act_order.py gptq_labels.py gptq_writing.py qweight_layouts.py (GPTQ's from AWQ's)
    awq.py awq_layouts.py awq_writing.py
    compressed_tensors.py compressed_tensors_config.py compressed_tensors_writing.py mxfp4_writing.py
        int_quantized.py padded_words.py fp4_packed.py
    bitsandbytes.py bnb_state.py bnb_nf4.py (its writer) bnb_quantize.py
    mxfp4.py (gpt-oss, both ways) hqq.py torchao.py gemma.py mlx.py quanto.py
    gguf/                               the container of llama.cpp

What formats share:
    partners.py notes.py                the tensors of one weight, found and checked before they are read; remarks
    bit_strings.py transposing.py       codes to the words that files keep them in; words turned over
    row_blocks.py host_dequantize.py    weights packed, and dequantized, a block of rows at a time
    flat_groups.py mx_blocks.py         groups that cross rows; blocks of MXFP4
    integer_weights.py module_patterns.py linears.py    what writers ask of weights and of their names
    file_patterns.py model_dtype.py     regular expressions that come from a file; the dtype that config.json tells

Every packed weight has the axes of a Hugging Face tensor, [N, K] (experts [E, N, K]), and is grouped along K, its
axis -1. Its arrays are numpy's: nothing here computes on a device.
"""

from jq4.checkpoint.foreign.opening import open_checkpoint as open_checkpoint
from jq4.checkpoint.foreign.weights import Checkpoint as Checkpoint
from jq4.checkpoint.foreign.weights import LazyWeight as LazyWeight
