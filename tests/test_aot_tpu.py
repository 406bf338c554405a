"""Oracle: the production compiler of TPUs (libtpu), which says what a program needs and holds without the chip.

Every cell of the matrix (chips, rows, groups, shapes, zero points) is the affair of benchmarks/tpu_compile.py; here, of
each chip, what a scanned model does: a stack of layers, decoding and prefilling, and the gradient.
"""

import pytest

from benchmarks.aot import missing, run_in_its_own_process

pytestmark = pytest.mark.aot

FLOAT32 = ("--scales", "float32")
DEVICES = ["v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1"]


def compiled(device, *arguments):
    if reason := missing(device):
        pytest.skip(reason)
    return run_in_its_own_process("--device", device, *arguments)


@pytest.mark.parametrize("device", DEVICES)
def test_a_scan_reads_its_layers_in_place(device):
    (result,) = compiled(device, "--stacked", "--rows", "16", "--shape", "4096", "14336", "--asymmetric")
    assert result["kernel"] and result["gradient_kernel"]
    assert result["temp_bytes"] < result["layer_codes_bytes"] / 2  # scales may be copied, codes not
    assert result["gradient_temp_bytes"] < result["layer_codes_bytes"] / 2


@pytest.mark.parametrize("device", ["v4:2x2x1", "v5e:2x2", "v6e:2x2"])
def test_a_scan_of_large_layers_reads_them_in_place_for_128_rows(device):
    (result,) = compiled(device, "--stacked", "--rows", "128", "--shape", "8192", "28672")
    assert result["kernel"] and result["temp_bytes"] < result["layer_codes_bytes"] / 2


@pytest.mark.parametrize("device", ["v4:2x2x1", "v6e:2x2"])
def test_odd_sizes_and_many_rows_go_by_the_kernel(device):
    results = compiled(device, "--stacked", "--rows", "1", "300", "--shape", "4001", "1500", "--group-size", "64")
    for result in results:
        assert result["kernel"] and result["gradient_kernel"]
        assert result["temp_bytes"] < result["dense_bytes"] / 2


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", [("4096", "11008"), ("8576", "4096")], ids=["columns", "groups"])
def test_blocks_that_stick_out_read_float32_scales_in_place(device, shape):
    """Scales of 32 bits are read out of the stack by the kernel itself, whose compiler cannot write into such a block:
    once it died where the last block of a weight sticks out (QLoRA on nf4 with double quantization, v5e)."""
    (result,) = compiled(device, "--stacked", "--rows", "256", "--shape", *shape, "--group-size", "64", *FLOAT32)
    assert result["kernel"] and result["gradient_kernel"]
    assert result["temp_bytes"] < result["layer_codes_bytes"] / 2
    assert result["gradient_temp_bytes"] < result["layer_codes_bytes"] / 2
