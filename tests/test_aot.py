"""Oracle: the production compilers of TPUs and of an H200, which count what memory a program needs without the chip.

A packed product whose temporaries are below the dense weight's bytes cannot have unpacked it as a whole.
"""

import pytest

from benchmarks.aot import missing, run_in_its_own_process

pytestmark = pytest.mark.aot


def compiled(device, *arguments):
    if reason := missing(device):
        pytest.skip(reason)
    return run_in_its_own_process("--device", device, *arguments)


@pytest.mark.parametrize("device", ["v5e:2x2", "v6e:2x2", "tpu7x:2x2x1", "h200"])
def test_prepared_products_stay_packed(device):
    results = compiled(device, "--rows", "16", "512", "--named", "llama-3-8b/down_proj", "--asymmetric")
    assert [result["rows"] for result in results] == [16, 512]
    for result in results:
        assert result["layout"] == ("gpu" if device == "h200" else "tpu")
        # codes at half a byte, scales and zero points; the TPU pads rows of scales to whole tiles
        assert result["packed_bytes"] <= result["argument_bytes"] < result["dense_bytes"] / 2
        assert result["temp_bytes"] < result["dense_bytes"]
        assert result["gradient_temp_bytes"] < result["dense_bytes"]
    if device != "h200":
        assert results[0]["temp_bytes"] < results[0]["dense_bytes"] / 8


@pytest.mark.parametrize("device", ["v6e:2x2", "h200"])
def test_neutral_products_with_odd_sizes_compile_in_bounded_memory(device):
    (result,) = compiled(device, "--rows", "16", "--shape", "4001", "4096", "--neutral", "--asymmetric")
    assert result["layout"] == "neutral"
    assert result["temp_bytes"] < result["dense_bytes"]
