"""Oracles: HQQ's own packer and dequantizer (where installed), and its layout written out in numpy."""

import numpy as np
import pytest

from jq4.checkpoint.foreign import open_checkpoint
from jq4.errors import JQ4Error
from tests.foreign_folder import dense, read_weight, write_checkpoint


def text(value):
    return np.frombuffer(value.encode(), np.uint8)


def packed_by_the_book(codes, nbits):
    """Codes [R, C] by slices of the rows, the first in the top bits."""
    fields = {4: 2, 2: 4, 3: 10}.get(nbits, 1)
    step = -(-codes.shape[0] // fields)
    filled = np.zeros((fields * step, codes.shape[1]), np.int32 if nbits == 3 else np.uint8)
    filled[: codes.shape[0]] = codes
    packed = np.zeros((step, codes.shape[1]), filled.dtype)
    for i in range(fields):
        packed |= filled[i * step : (i + 1) * step] << (nbits * (fields - 1 - i) if fields > 1 else 0)
    return packed


def by_the_book(shape, nbits, group_size, axis, seed=0):
    """The tensors of a module "m", and the weight that they mean."""
    rng = np.random.default_rng(seed)
    groups = shape[0] * shape[1] // group_size
    rows, columns = (groups, group_size) if axis == 1 else (group_size, groups)
    codes = rng.integers(0, 2**nbits, (rows, columns), dtype=np.uint8)
    parts = (groups, 1) if axis == 1 else (1, groups)
    scale, zero = rng.uniform(0.5, 1, parts).astype(np.float32), rng.uniform(5, 9, parts).astype(np.float32)
    packing = {4: "4bit_u8", 3: "3bit_32", 2: "2bit_u8"}.get(nbits, "8bit_u8")
    tensors = {
        "m.W_q": packed_by_the_book(codes, nbits), "m.scale": scale, "m.zero": zero, "m.nbits": np.int32(nbits),
        "m.group_size": np.int32(group_size), "m.axis": np.int32(axis), "m.shape": np.asarray(shape, np.int64),
        "m.packing": text(packing), "m.compute_dtype": text("torch.float32"), "m.view_as_float": np.uint8(0),
        "m.quant_scale": np.uint8(0), "m.quant_zero": np.uint8(0), "m.bias": np.ones(shape[0], np.float32),
    }  # fmt: skip
    return tensors, ((codes - zero) * scale).reshape(shape)


@pytest.mark.parametrize(("nbits", "axis"), [(2, 1), (3, 1), (4, 1), (5, 1), (8, 1), (3, 0), (4, 0)])
def test_bits_and_axes_by_the_book(nbits, axis, tmp_path):
    tensors, expected = by_the_book((24, 32), nbits, 8, axis)
    q = read_weight(write_checkpoint(tmp_path / "m", tensors), "m.weight", "hqq")
    np.testing.assert_array_equal(dense(q), expected)
    checkpoint = open_checkpoint(tmp_path / "m")
    assert set(checkpoint.weights) == {"m.weight", "m.bias"}
    assert (q.axis, q.group_size) == ((-1, 8) if axis == 1 else (-2, 8))
    assert [note.startswith("groups run along the outputs (axis 0)") for note in checkpoint.notes] == [True] * (
        1 - axis
    )


@pytest.mark.parametrize(("shape", "group_size", "held"), [((12, 20), 8, 4), ((7, 6), 14, 2), ((4, 32), 64, 32)])
def test_groups_that_cross_rows_are_cut_finer(shape, group_size, held, tmp_path):
    tensors, expected = by_the_book(shape, 3, group_size, 1)
    q = read_weight(write_checkpoint(tmp_path / "m", tensors), "m.weight")
    assert q.group_size == held
    np.testing.assert_array_equal(dense(q), expected)


@pytest.mark.parametrize("nbits", [3, 4])
def test_codes_viewed_as_floats_are_the_same(nbits, tmp_path):
    tensors, expected = by_the_book((24, 32), nbits, 8, 1)
    tensors |= {"m.W_q": tensors["m.W_q"].view(np.float32), "m.view_as_float": np.uint8(1)}
    q = read_weight(write_checkpoint(tmp_path / "m", tensors), "m.weight")
    np.testing.assert_array_equal(dense(q), expected)


@pytest.mark.parametrize(("change", "message"), [
    ({"m.zero": None}, "'m.W_q' comes without 'm.zero'"),
    ({"m.axis": None}, "'m.W_q' comes without 'm.axis'"),
    ({"m.scale": np.ones((96, 2), np.float32)}, r"'m.scale' has shape \[96, 2\], wanted \[any, 1\]"),
    ({"m.scale": np.ones((95, 1), np.float32), "m.zero": np.ones((95, 1), np.float32)}, "has 95 scales, wanted"),
    ({"m.zero": np.ones((95, 1), np.float32)}, r"'m.zero' has shape \[95, 1\], wanted \[96, 1\]"),
    ({"m.W_q": np.ones((47, 8), np.uint8)}, r"'m.W_q' is U8\[47, 8\], wanted 48 rows of 384 bytes"),
    ({"m.nbits": np.int32(1), "m.packing": text("1bit_u8")}, "1 bits packed as '1bit_u8', wanted one of 8bit_u8, 4bit"),
    ({"m.quant_scale": np.uint8(1)}, r"'m.W_q' has a packed scale \(quant_scale\), wanted floats"),
    ({"m.axis": np.int32(2)}, "axis 2, shape"),
    ({"m.nbits": np.ones(2, np.int32)}, r"'m.nbits' has shape \[2\], wanted one value"),
])  # fmt: skip
def test_what_contradicts_itself_is_refused_when_opened(change, message, tmp_path):
    tensors, _ = by_the_book((24, 32), 4, 8, 1)
    tensors = {name: array for name, array in (tensors | change).items() if array is not None}
    with pytest.raises(JQ4Error, match=message):
        open_checkpoint(write_checkpoint(tmp_path / "m", tensors))


def test_what_cannot_be_held_is_refused(tmp_path):
    tensors, _ = by_the_book((20, 32), 4, 8, 0)
    with pytest.raises(JQ4Error, match=r"groups of 8 along axis 0 of \[20, 32\], wanted groups that divide its rows"):
        open_checkpoint(write_checkpoint(tmp_path / "m", tensors))
    tensors, _ = by_the_book((24, 32), 8, 8, 1)
    weight = open_checkpoint(write_checkpoint(tmp_path / "n", tensors | {"m.nbits": np.int32(5)})).weights["m.weight"]
    with pytest.raises(JQ4Error, match=r"'m.W_q' holds the code 255, wanted at most 31 for 5 bits"):
        weight.read()


@pytest.mark.filterwarnings("ignore")  # of the peers' own
@pytest.mark.parametrize(("nbits", "axis", "options"), [
    (4, 1, {}), (4, 0, {}), (3, 1, {}), (2, 0, {}), (8, 1, {"group_size": None}), (4, 1, {"view_as_float": True}),
])  # fmt: skip
def test_what_hqq_writes_means_what_hqq_says(nbits, axis, options, tmp_path):
    quantize = pytest.importorskip("hqq.core.quantize", reason="HQQ is not installed")
    import torch

    torch.manual_seed(0)
    settings = quantize.BaseQuantizeConfig(**{"nbits": nbits, "group_size": 16, "axis": axis} | options)
    module = quantize.HQQLinear(torch.nn.Linear(64, 32), settings, compute_dtype=torch.float32, device="cpu")
    module.encoded_state_dict = True
    tensors = {f"m.{name}": tensor.detach().numpy() for name, tensor in module.state_dict().items()}
    q = read_weight(write_checkpoint(tmp_path / "m", tensors), "m.weight", "hqq")
    np.testing.assert_array_equal(dense(q), module.dequantize().detach().numpy())
