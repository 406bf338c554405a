"""Oracle: packed_oracle's dequantization in float64, of weights of every kind, as a whole."""

import jax
import numpy as np
import pytest
from packed_checkpoint import Kind, random_qarray

from jq4.checkpoint.foreign.host_dequantize import dense_rows, finite_rows, host_dequantize, some_rows
from jq4.errors import JQ4Error
from jq4.qarray import is_qarray
from tests.foreign_folder import dense64

pytestmark = pytest.mark.arithmetic

KINDS = {
    "symmetric": Kind(),
    "zero points": Kind(zero=True),
    "3 bits, offsets": Kind("int3", offset=True),
    "act-order": Kind("int8", permuted=True),
    "codebook": Kind("nf4", scale=np.float32),
}


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_rows_are_those_of_the_whole(kind, monkeypatch):
    monkeypatch.setattr("jq4.checkpoint.foreign.row_blocks.ELEMENTS", 4 * 40)
    random = np.random.default_rng(0)
    one, other = (random_qarray(random, (11, 40), kind, of_inputs) for of_inputs in (1, 2))
    expected = np.stack([dense64(one), dense64(other)])
    stacked = jax.tree.map(lambda *parts: np.stack(parts), one, other)
    np.testing.assert_allclose(host_dequantize(stacked), expected, rtol=1e-6, atol=1e-7)
    found = np.full(expected.shape, np.nan, np.float32)
    cuts = []
    for at, block in dense_rows(stacked, multiple=3):
        found[at] = block
        cuts.append((at[0], at[1].start, at[1].stop))
    assert cuts == [(i, start, min(start + 3, 11)) for i in (0, 1) for start in (0, 3, 6, 9)]
    np.testing.assert_array_equal(found, host_dequantize(stacked))
    assert all(is_qarray(block) for _, block in some_rows(stacked))


def test_packed_scales_and_values_that_are_not_finite():
    q = random_qarray(np.random.default_rng(0), (16, 40), Kind("nf4", scale="packed"))
    ((_, found),) = dense_rows(q)
    np.testing.assert_array_equal(found, host_dequantize(q))
    found[5, 3] = np.nan
    with pytest.raises(JQ4Error, match=r"^w: holds NaN or infinity in rows 0 to 15; mend the source"):
        list(finite_rows(found, "w"))
    with pytest.raises(JQ4Error, match=r"^w: holds NaN or infinity in rows 0 to 15 of matrix \(1,\)"):
        list(finite_rows(np.stack([np.ones_like(found), found]), "w"))
