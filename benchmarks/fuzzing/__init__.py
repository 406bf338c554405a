"""Hostile files: small sound ones of every format, changed to do harm, and opened within limits.

seeds.py        the sound files, as parts
values.py       hostile values: names, numbers, JSON, arrays, bytes
folders.py      folders of safetensors, changed on every level
gguf_files.py   GGUF files, likewise
ours.py         what jq4 itself writes: manifests, checkpoints, journals, recipes
using.py        what is done with a file: opened, read, checked, written again
limits.py       seconds, memory, and JQ4Error as the only way out
paths.py        what is touched outside of the folder
readers.py      which of these make a campaign of `benchmarks.fuzz`
as_bytes.py     the same readers as functions of bytes, for an engine that is guided by coverage
guided.py       one of them under such an engine, Atheris: a process of `benchmarks.fuzz_coverage`
"""
