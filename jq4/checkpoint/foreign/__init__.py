"""Checkpoints that others wrote, packed: opened straight into QArrays, and written for others to open.

    weights.py       what an opened checkpoint is: weights by Hugging Face's names, each read when it is asked for
    opening.py       which format a folder or file holds, by its contents
    bit_strings.py   codes to the words that files keep them in, on the host
    gptq.py awq.py ...   one format a file: how its tensors make a QArray, and (where it is written) the way back

Every packed weight has the axes of a Hugging Face tensor, [N, K] (experts [E, N, K]), and is grouped along K, its
axis -1. Its arrays are numpy's: nothing here computes on a device.
"""

from jq4.checkpoint.foreign.opening import open_checkpoint as open_checkpoint
from jq4.checkpoint.foreign.weights import Checkpoint as Checkpoint
from jq4.checkpoint.foreign.weights import LazyWeight as LazyWeight
