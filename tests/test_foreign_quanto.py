"""Oracles: quanto's own writer and dequantizer (where installed), and its layout written out in numpy."""

import numpy as np
import pytest

from jq4.checkpoint.foreign import open_checkpoint
from jq4.errors import JQ4Error
from tests.foreign_folder import dense, read_weight, write_checkpoint


def by_the_book(shape=(6, 64), bits=4, group=32, layer="up_proj", bias=True, seed=0):
    rng = np.random.default_rng(seed)
    rows = shape[0] * shape[1] // group
    codes = rng.integers(0, 2**bits, (rows, group), dtype=np.uint8)
    step = -(-rows * bits // 8)
    packed = np.zeros((step, group), np.uint8)
    for row in range(rows):
        packed[row % step] |= codes[row] << (bits * (row // step))
    scale, shift = rng.uniform(0.5, 1, (rows, 1)).astype(np.float32), rng.normal(size=(rows, 1)).astype(np.float32)
    name = f"m.{layer}"
    tensors = {
        f"{name}.weight._data._data": packed, f"{name}.weight._scale": scale, f"{name}.weight._shift": shift,
        f"{name}.input_scale": np.float32(1), f"{name}.output_scale": np.float32(1),
    }  # fmt: skip
    if bias:
        tensors[f"{name}.bias"] = np.ones(shape[0], np.float32)
    return tensors, (codes * scale - shift).reshape(shape)


@pytest.mark.parametrize(
    ("shape", "bits", "group"), [((6, 64), 4, 32), ((5, 32), 4, 32), ((6, 64), 2, 16), ((7, 32), 2, 32)]
)
def test_groups_by_the_book(shape, bits, group, tmp_path):
    tensors, expected = by_the_book(shape, bits, group)
    folder = write_checkpoint(tmp_path / "m", tensors)
    np.testing.assert_array_equal(dense(read_weight(folder, "m.up_proj.weight", "quanto")), expected)
    assert set(open_checkpoint(folder).weights) == {"m.up_proj.weight", "m.up_proj.bias"}


@pytest.mark.parametrize(("layer", "config"), [
    ("down_proj", {"intermediate_size": 64}), ("q_proj", {"text_config": {"hidden_size": 64}}),
    ("o_proj", {"num_attention_heads": 4, "head_dim": 16, "hidden_size": 32}), ("o_proj", {"hidden_size": 64}),
])  # fmt: skip
def test_config_tells_the_shape_where_there_is_no_bias(layer, config, tmp_path):
    tensors, expected = by_the_book(layer=layer, bias=False)
    folder = write_checkpoint(tmp_path / "m", tensors, config)
    np.testing.assert_array_equal(dense(read_weight(folder, f"m.{layer}.weight")), expected)


def test_bytes_and_rounded_activations(tmp_path):
    codes, scale = np.arange(-60, 60, dtype=np.int8).reshape(4, 30), np.linspace(1, 2, 4, dtype=np.float32)[:, None]
    tensors = {"m.weight._data": codes, "m.weight._scale": scale, "m.input_scale": np.float32(0.5)}
    folder = write_checkpoint(tmp_path / "m", tensors)
    np.testing.assert_array_equal(dense(read_weight(folder, "m.weight", "quanto")), codes * scale)
    assert open_checkpoint(folder).notes == (
        "1 scales of activations (m.input_scale, ...): their rounding is not applied",
    )


@pytest.mark.parametrize(("change", "message"), [
    ({"_shift": None}, "_data._data' comes without 'm.x.weight._shift'"),
    ({"_scale": np.ones((13, 1), np.float32)}, r"'m.x.weight._shift' has shape \[12, 1\], wanted \[13, 1\]"),
    ({"_data._data": np.ones((5, 32), np.uint8)}, r"has shape \[5, 32\], wanted rows of 2 or 4 codes a byte of 12"),
    ({"bias": None}, "holds 384 weights whose shape is told by neither the file nor config.json"),
    ({"bias": np.ones(8, np.float32)}, "has groups of 32 and 384 weights, wanted whole rows of 48 columns"),
    ({"_data": np.ones((4, 4), np.uint8)}, "'m.x.weight._data' has dtype U8, wanted I8"),
])  # fmt: skip
def test_what_contradicts_itself_is_refused_when_opened(change, message, tmp_path):
    change = {f"m.x.{'' if name == 'bias' else 'weight.'}{name}": array for name, array in change.items()}
    tensors = {name: array for name, array in (by_the_book(layer="x")[0] | change).items() if array is not None}
    with pytest.raises(JQ4Error, match=message):
        open_checkpoint(write_checkpoint(tmp_path / "m", tensors))


@pytest.mark.filterwarnings("ignore")  # of the peers' own
@pytest.mark.parametrize("kind", ["qint4", "qint2", "qint8"])
def test_what_quanto_writes_means_what_quanto_says(kind, tmp_path):
    quanto = pytest.importorskip("optimum.quanto", reason="quanto is not installed")
    import torch

    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(256, 48))
    quanto.quantize(model, weights=getattr(quanto, kind))
    quanto.freeze(model)
    tensors = {name: tensor.detach().numpy() for name, tensor in model.state_dict().items()}
    q = read_weight(write_checkpoint(tmp_path / "m", tensors), "0.weight", "quanto")
    theirs = model[0].weight.dequantize().detach().numpy()
    np.testing.assert_array_equal(dense(q), theirs, strict=True)
