"""Oracle: the TPU compiler, which says what a whole packed model needs on each of eight chips that are not there."""

import json
import subprocess
import sys

import pytest

from benchmarks.aot import environment, missing
from benchmarks.provenance import ROOT

LAYERS, PRODUCTS = 32, 7


@pytest.mark.aot
def test_a_packed_llama_3_8b_decodes_on_eight_v5e_with_a_kernel_for_every_product():
    if reason := missing("v5e:2x4"):
        pytest.skip(reason)
    command = ["benchmarks.tpu_programs", "--model", "llama-3-8b", "--slice", "v5e-8", "--step", "decode"]
    done = subprocess.run(
        [sys.executable, "-m", *command],
        env=environment("v5e:2x4"), cwd=ROOT, capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    (row,) = [json.loads(line) for line in done.stderr.splitlines() if line.startswith("{")]
    assert row["kernels"] == LAYERS * PRODUCTS and (row["dense"], row["relaid"], row["float_weights"]) == (0, 0, 0)
    assert row["collectives"] == {"all-reduce": 2 * LAYERS + 1}  # after o and down of each layer, and the embedding
    packed, heads_and_embedding, cache = 7.0e9 * 0.516, 2 * 2 * 128256 * 4096, 2 * 2 * 32 * 16 * 8192 * 8 * 128
    assert row["argument_bytes"] == pytest.approx((packed + heads_and_embedding + cache) / 8, rel=0.03)
    assert row["temp_bytes"] < 2**24 and row["fits"]
