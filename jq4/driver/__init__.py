"""`quantize_blocks`: a model quantized one block after another, in bounded memory, resumable, one idea a file.

quantize_blocks.py  the order of work, from embeddings to the save
job.py              what the run has to do, decided before any work, and its identity
plan.py             what becomes of each leaf, and what of it needs calibration
calibration_rows.py whether a recipe needs rows to calibrate with, and whether these are rows
blocks.py           the blocks one after another, with the activations that run through them
equalized.py        the steps before the rules: rotated sources, scales moved between a block's leaves
block.py            one block: its stages, one after another, each on the error of those before it
stage_statistics.py what the leaves of one stage are multiplied by
streams.py          the activations between two blocks, in memory or in a file
end_to_end.py       the step after the last block: all of them learned together
rows_learned.py     the report's rows of what was learned
store.py            what is done: packed blocks on disk, one file for each part of each leaf
journal.py          how far a killed run was, and whether the next one is the same run
report.py           what became of every leaf of every block
"""

from jq4.driver.quantize_blocks import quantize_blocks as quantize_blocks
from jq4.driver.report import BlocksResult as BlocksResult
from jq4.driver.report import LeafRow as LeafRow
