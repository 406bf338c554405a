"""Oracles: torchao's own writer and dequantizer (where installed), and its layouts written out element by element."""

import json

import ml_dtypes
import numpy as np
import pytest

from jq4.checkpoint.foreign import open_checkpoint
from jq4.checkpoint.safetensors_files import read_metadata
from jq4.errors import JQ4Error
from tests.foreign_folder import dense, read_weight, write_checkpoint

BF16 = ml_dtypes.bfloat16


def described(kind, names=("qdata", "scale", "zero_point"), **data):
    dtypes = {name: {"_type": "torch.dtype", "_data": data.pop(name)} for name in list(data) if name.endswith("dtype")}
    return json.dumps({"_type": kind, "_data": data | dtypes, "_tensor_data_names": list(names)})


def write(folder, tensors, **entries):
    """Entries by name, "/" for "."."""
    entries = {name.replace("/", "."): entry for name, entry in entries.items()}
    return write_checkpoint(folder, tensors, None, {"tensor_names": json.dumps(list(entries))} | entries)


def int4_tensor(shape=(6, 64), group=16, seed=0):
    """Arrays of m.weight, the signed codes and what they mean."""
    rng = np.random.default_rng(seed)
    *outer, rows, width = shape
    codes = rng.integers(-8, 8, shape, dtype=np.int8)
    nibbles = codes.view(np.uint8) & 15
    scale = rng.uniform(0.5, 1, (*outer, width // group, rows)).astype(BF16)
    zero = rng.normal(size=scale.shape).astype(BF16)
    tensors = {
        "m._weight_qdata": (nibbles[..., ::2] | nibbles[..., 1::2] << 4).view(np.int8),
        "m._weight_scale": scale, "m._weight_zero_point": zero, "m.bias": np.ones(rows, np.float32),
    }  # fmt: skip
    spread = [np.repeat(np.swapaxes(one, -1, -2).astype(np.float32), group, axis=-1) for one in (scale, zero)]
    return tensors, codes * spread[0] + spread[1]


PLAIN = json.dumps({"_type": "Tensor"})


@pytest.mark.parametrize("shape", [(6, 64), (2, 3, 32)])
def test_int4_tensor_by_the_book(shape, tmp_path):
    tensors, expected = int4_tensor(shape)
    entry = described(
        "Int4Tensor", block_size=[1] * (len(shape) - 1) + [16], shape=list(shape), activation_dtype="bfloat16"
    )
    q = read_weight(write(tmp_path / "m", tensors, **{"m/weight": entry, "m/bias": PLAIN}), "m.weight", "torchao")
    np.testing.assert_array_equal(dense(q, np.float32), expected)
    assert q.dtype == "bfloat16" and set(open_checkpoint(tmp_path / "m").weights) == {"m.weight", "m.bias"}


def test_scales_of_inputs_and_rounded_inputs(tmp_path):
    tensors, expected = int4_tensor()
    tensors["m._weight_act_pre_scale"] = np.linspace(1, 2, 64, dtype=np.float32)
    entry = described("Int4Tensor", block_size=[1, 16], shape=[6, 64], activation_dtype="float8_e4m3fn")
    q = read_weight(write(tmp_path / "m", tensors, **{"m/weight": entry}), "m.weight")
    np.testing.assert_allclose(dense(q, np.float32), expected * tensors["m._weight_act_pre_scale"], rtol=1e-6)
    (note,) = open_checkpoint(tmp_path / "m").notes
    assert note == "1 weights (m.weight, ...) round their inputs in torchao; that is not applied"


@pytest.mark.parametrize(("bits", "group"), [(4, 16), (3, 64), (8, 32), (2, 16)])
def test_unpacked_codes_by_the_book(bits, group, tmp_path):
    rng, half = np.random.default_rng(0), 2 ** (bits - 1)
    codes, zero = (rng.integers(-half, half, shape, dtype=np.int8) for shape in ((6, 64), (6, 64 // group)))
    scale = rng.uniform(0.5, 1, zero.shape).astype(np.float32)
    entry = described("IntxUnpackedToInt8Tensor", target_dtype=f"int{bits}", block_size=[1, group], dtype="float32")
    tensors = {"m._weight_qdata": codes, "m._weight_scale": scale, "m._weight_zero_point": zero}
    folder = write(tmp_path / "m", tensors, **{"m/weight": entry})
    expected = (codes.astype(np.float32) - np.repeat(zero, group, 1)) * np.repeat(scale, group, 1)
    q = read_weight(folder, "m.weight")
    np.testing.assert_array_equal(dense(q), expected)
    assert (q.format, q.zero_point.dtype) == (f"int{bits}", np.uint8)
    tensors["m._weight_zero_point"] = zero.astype(np.float32) + np.float32(0.25)
    q = read_weight(write(tmp_path / "n", tensors, **{"m/weight": entry}), "m.weight")
    np.testing.assert_allclose(dense(q), expected - 0.25 * np.repeat(scale, group, 1), rtol=1e-5, atol=1e-5)


def test_tiles_by_the_book(tmp_path):
    rng, (rows, width, group) = np.random.default_rng(0), (20, 200, 32)
    codes = rng.integers(0, 16, (24, 1024), dtype=np.uint32)
    words = np.zeros((3, 8, 32, 4), np.uint32)
    for n in range(24):
        for k in range(1024):
            r, c = k % 128, k % 2
            i, kk = divmod(r, 32)
            h, p = divmod(kk, 16)
            words[n // 8, k // 128, n % 8 * 4 + p % 8 // 2, i] |= codes[n, k] << (4 * (2 * h + p // 8 + 4 * c))
    both = rng.uniform(0.5, 1, (1024 // group, 24, 2)).astype(BF16)
    entry = described(
        "Int4TilePackedTo4dTensor", ("qdata", "scale_and_zero"), block_size=[1, group], shape=[rows, width]
    )
    tensors = {"m._weight_qdata": words.view(np.int32), "m._weight_scale_and_zero": both}
    q = read_weight(write(tmp_path / "m", tensors, **{"m/weight": entry}), "m.weight")
    scale, zero = (np.repeat(both[..., i].T.astype(np.float32), group, 1) for i in (0, 1))
    expected = (codes.astype(np.float32) - 8) * scale + zero
    np.testing.assert_array_equal(dense(q, np.float32), expected[:rows, :width])


@pytest.mark.parametrize(("entry", "change", "message"), [
    (described("MXTensor"), {}, "'m._weight_qdata' is a MXTensor, wanted Int4Tensor or IntxUnpackedToInt8Tensor"),
    (described("Int4Tensor", block_size=[1, 16]), {}, "has shape None, wanted 2 whole numbers above 0"),
    (described("Int4Tensor", block_size=[2, 16], shape=[6, 64]), {}, r"has block_size \[2, 16\], wanted groups along"),
    (described("Int4Tensor", block_size=[1, 16], shape=[6, 66]), {}, "wanted two codes a byte of"),
    (described("Int4Tensor", block_size=[1, 16], shape=[6, 64]), {"m._weight_scale": None},
     "without 'm._weight_scale'"),
    (described("Int4Tensor", block_size=[1, 16], shape=[6, 64]),
     {"m._weight_qdata": None, "x._weight_qdata": np.ones(1)},
     "m.weight: the file comes without 'm._weight_qdata'"),
    (described("IntxUnpackedToInt8Tensor", target_dtype="int1", block_size=[1, 16]), {}, "of 'int1', wanted I8"),
    ("[]", {}, r"its metadata describes 'm.weight' as \[\], wanted _type and _data"),
    ("{", {}, "metadata of 'm.weight': is not JSON"),
    (PLAIN, {}, "'m._weight_qdata' is not told of in the header's metadata"),
])  # fmt: skip
def test_what_contradicts_itself_is_refused_when_opened(entry, change, message, tmp_path):
    tensors = {name: array for name, array in (int4_tensor()[0] | change).items() if array is not None}
    with pytest.raises(JQ4Error, match=message):
        open_checkpoint(write(tmp_path / "m", tensors, **{"m/weight": entry}))


def test_codes_beyond_their_type_are_refused_when_read(tmp_path):
    tensors = {"m._weight_qdata": np.full((2, 16), 4, np.int8), "m._weight_scale": np.ones((2, 1), np.float32)}
    tensors["m._weight_zero_point"] = np.zeros((2, 1), np.int8)
    entry = described("IntxUnpackedToInt8Tensor", target_dtype="int3", block_size=[1, 16], dtype="float32")
    with pytest.raises(JQ4Error, match="holds codes beyond int3, wanted -4 to 3"):
        open_checkpoint(write(tmp_path / "m", tensors, **{"m/weight": entry})).weights["m.weight"].read()


def test_metadata_is_texts(tmp_path):
    header = json.dumps({"__metadata__": {"a": 1}}).encode()
    (tmp_path / "a.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(JQ4Error, match=r"its __metadata__ is \"\{'a': 1\}\", wanted an object of texts"):
        read_metadata(tmp_path / "a.safetensors")


@pytest.mark.filterwarnings("ignore")  # of the peers' own
@pytest.mark.parametrize("bits", [4, 3, 8])
def test_what_torchao_writes_means_what_torchao_says(bits, tmp_path):
    quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    support = pytest.importorskip("torchao.prototype.safetensors.safetensors_support")
    import torch
    from safetensors.torch import save_file
    from torchao.quantization.granularity import PerGroup

    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 32))
    settings = quantization.IntxWeightOnlyConfig(getattr(torch, f"int{bits}"), PerGroup(32))
    quantization.quantize_(model, settings)
    tensors, metadata = support.flatten_tensor_state_dict(dict(model.state_dict()))
    save_file(tensors, tmp_path / "model.safetensors", metadata)
    q = read_weight(tmp_path, "0.weight", "torchao")
    np.testing.assert_array_equal(dense(q), model[0].weight.dequantize().detach().numpy(), strict=True)
