"""Oracle: transformers' own dequantizer of MLX's affine format, and a bit string of Python integers."""

import numpy as np
import pytest

from jq4.checkpoint.foreign import open_checkpoint
from jq4.errors import JQ4Error
from tests.foreign_folder import dense, read_weight, write_checkpoint


def by_the_book(shape=(6, 128), bits=4, group=64, spelling="biases", seed=0):
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 2**bits, shape)
    rows = [sum(int(code) << (bits * i) for i, code in enumerate(row)) for row in codes.reshape(-1, shape[-1])]
    words = np.frombuffer(b"".join(row.to_bytes(shape[-1] * bits // 8, "little") for row in rows), np.uint32)
    scale, bias = (rng.normal(size=(*shape[:-1], shape[-1] // group)).astype(np.float32) for _ in range(2))
    tensors = {"m.weight": words.reshape(*shape[:-1], -1), "m.scales": scale, f"m.{spelling}": bias}
    expected = codes.astype(np.float32) * np.repeat(scale, group, -1) + np.repeat(bias, group, -1)
    return tensors, expected, {"quantization": {"bits": bits, "group_size": group}}


@pytest.mark.parametrize(("shape", "bits", "group"), [
    ((6, 128), 4, 64), ((5, 64), 2, 32), ((5, 64), 3, 32), ((5, 32), 5, 32), ((5, 64), 6, 32), ((5, 64), 8, 32),
    ((2, 3, 64), 4, 32),
])  # fmt: skip
def test_every_width_by_the_book(shape, bits, group, tmp_path):
    tensors, expected, config = by_the_book(shape, bits, group)
    q = read_weight(write_checkpoint(tmp_path / "m", tensors, config), "m.weight", "mlx")
    np.testing.assert_array_equal(dense(q), expected)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_transformers_says_the_same(bits, tmp_path):
    torch = pytest.importorskip("torch")
    metal = pytest.importorskip("transformers.integrations.metal_quantization", reason="a transformers before 5.23")
    tensors, _, config = by_the_book(bits=bits, spelling="qbiases")
    settings = {"quantization_config": {"quant_method": "metal"} | config["quantization"]}
    q = read_weight(write_checkpoint(tmp_path / "m", tensors, settings), "m.weight", "mlx")
    parts = (torch.tensor(tensors[f"m.{name}"].astype(tensors[f"m.{name}"].dtype.name.lstrip("u"))) for name in
             ("weight", "scales", "qbiases"))  # fmt: skip
    np.testing.assert_array_equal(dense(q), metal._affine_dequantize_tensor(*parts, 64, bits).numpy(), strict=True)


def test_a_module_may_have_its_own_width(tmp_path):
    tensors, _, config = by_the_book()
    other, expected, _ = by_the_book((6, 64), 8, 32)
    tensors |= {f"b.{name[2:]}": array for name, array in other.items()}
    config["quantization"]["b"] = {"bits": 8, "group_size": 32}
    q = read_weight(write_checkpoint(tmp_path / "m", tensors, config), "b.weight")
    np.testing.assert_array_equal(dense(q), expected)


@pytest.mark.parametrize(("change", "settings", "message"), [
    ({"m.biases": None}, {}, "'m.weight' comes without 'm.biases'"),
    ({"m.biases": np.ones((6, 3), np.float32)}, {}, r"'m.biases' has shape \[6, 3\], wanted \[6, 2\]"),
    ({}, {"bits": 8}, r"'m.weight' has shape \[6, 16\] with scales \[6, 2\], wanted rows of 8 \* 64 / 32 words"),
    ({}, {"bits": 7}, "'m.weight' has bits 7 and group_size 64 in config.json, wanted one of"),
    ({}, {"mode": "mxfp4"}, "'m.weight' has the mode 'mxfp4', wanted affine"),
])  # fmt: skip
def test_what_contradicts_itself_is_refused_when_opened(change, settings, message, tmp_path):
    tensors, _, config = by_the_book()
    tensors = {name: array for name, array in (tensors | change).items() if array is not None}
    with pytest.raises(JQ4Error, match=message):
        open_checkpoint(write_checkpoint(tmp_path / "m", tensors, {"quantization": config["quantization"] | settings}))
