"""A checkpoint of one format to one of another, weight by weight; jq4.checkpoint.convert puts the parts together.

    proposal.py        what will be done of each weight, before anything is read: its form, what is lost or refused
    unpacked.py        packed weights that what loads the target takes dense alone: embeddings, tied heads
    requantize.py      the nearest form that a target can hold, where it cannot hold what there is
    dense.py           the writer of dense safetensors, and weights unpacked a few rows at a time
    layout.py          where every byte of the output goes: shards, headers, index
    fixed_files.py     output files of known layout, filled in any order
    orbax_files.py     jq4's own folders, filled slice by slice, in arrays of zarr_arrays.py
    safetensors_target.py gguf_target.py    what else belongs to an output of these formats
    destination.py     what may be written to, and the rename that makes it so
    progress.py        the journal: which weights are done, by the digests of what was written
    slabs.py           large weights, a slab of rows at a time, where source and target both lie by rows
    stream.py          a few weights at a time through reading, encoding and writing, within a bound of memory
    verification.py    the output read again and compared with the source; difference.py sums up how far they are apart

Nothing here knows of models: which weights make which leaf of jq4's own folders is told by who calls (models.filling).
"""
