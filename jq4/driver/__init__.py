"""`quantize_blocks`: a model quantized one block after another, in bounded memory, resumable, one idea a file.

quantize_blocks.py  the order of work, from embeddings to the save
plan.py             what becomes of each leaf, and what of it needs calibration
block.py            one block: its stages, one after another, each on the error of those before it
stage_statistics.py what the leaves of one stage are multiplied by
streams.py          the activations between two blocks, in memory or in a file
store.py            what is done: packed blocks on disk, one file for each part of each leaf
journal.py          how far a killed run was, and whether the next one is the same run
report.py           what became of every leaf of every block
"""

from jq4.driver.quantize_blocks import quantize_blocks as quantize_blocks
from jq4.driver.report import BlocksResult as BlocksResult
from jq4.driver.report import LeafRow as LeafRow
