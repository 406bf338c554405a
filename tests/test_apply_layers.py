"""Oracle: the transform's own record on other people's layers, traced only: axes found, quantized, all packed."""

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from zoo import RULE

from jq4.apply import explain
from jq4.axes import contraction_axes
from jq4.qarray import is_qarray
from jq4.quantize import quantize

ROWS = jax.ShapeDtypeStruct((2, 4, 16), jnp.float32)  # [B, T, D]
IMAGES = jax.ShapeDtypeStruct((2, 9, 8, 8), jnp.float32)  # [B, H, W, C]
IMAGE = jax.ShapeDtypeStruct((8, 9, 8), jnp.float32)  # [C, H, W]
TOKENS = jax.ShapeDtypeStruct((2, 4), jnp.int32)


def of_rows(x):
    return jax.ShapeDtypeStruct(x.shape[1:], x.dtype)


LINEN = {
    "attention": (nn.MultiHeadDotProductAttention(2, qkv_features=16), (ROWS, ROWS), 4),
    "transposed convolution": (nn.ConvTranspose(8, (3, 3), strides=(2, 2)), (IMAGES,), 1),
    "causal convolution": (nn.Conv(8, (3,), padding="CAUSAL"), (ROWS,), 1),
    "circular convolution": (nn.Conv(8, (3,), padding="CIRCULAR"), (ROWS,), 1),
    "local convolution": (nn.ConvLocal(4, (2, 2)), (IMAGES,), 1),
    "gru": (nn.RNN(nn.GRUCell(16)), (ROWS,), 6),
    "lstm": (nn.RNN(nn.OptimizedLSTMCell(16)), (ROWS,), 8),
    "dense general": (nn.DenseGeneral((2, 8), axis=(-2, -1)), (ROWS,), 1),
    "einsum": (nn.Einsum((16, 2, 8), "btd,dhk->bthk"), (ROWS,), 1),
}
NNX = {
    "convolution": (lambda rngs: nnx.Conv(8, 16, (3, 3), rngs=rngs), IMAGES, 1),
    "embedding": (lambda rngs: nnx.Embed(40, 16, rngs=rngs), TOKENS, 1),
    "linear general": (lambda rngs: nnx.LinearGeneral(16, (2, 8), rngs=rngs), ROWS, 1),
    "einsum": (lambda rngs: nnx.Einsum("btd,dhk->bthk", (16, 2, 8), rngs=rngs), ROWS, 1),
    "lora": (lambda rngs: nnx.LoRALinear(16, 16, lora_rank=2, rngs=rngs), ROWS, 3),
}
EQUINOX = {
    "attention": (lambda key: eqx.nn.MultiheadAttention(2, 16, key=key), lambda m, x: m(x, x, x), of_rows(ROWS), 4),
    "convolution": (lambda key: eqx.nn.Conv2d(8, 16, 3, key=key), lambda m, x: m(x), IMAGE, 1),
    "transposed convolution": (lambda key: eqx.nn.ConvTranspose2d(8, 16, 3, key=key), lambda m, x: m(x), IMAGE, 1),
    "gru": (lambda key: eqx.nn.GRUCell(16, 16, key=key), lambda m, x: jax.vmap(m)(x, x), of_rows(ROWS), 2),
    "mlp": (lambda key: eqx.nn.MLP(16, 4, 32, 2, key=key), lambda m, x: jax.vmap(m)(x), of_rows(ROWS), 3),
    "embedding": (lambda key: eqx.nn.Embedding(40, 16, key=key), lambda m, x: jax.vmap(m)(x), of_rows(TOKENS), 1),
}


def assert_all_packed(function, shapes, inputs, count):
    """Of the tree of shapes, `count` leaves are packed, and the function runs on all of them so."""
    axes = contraction_axes(function, shapes, *inputs)
    leaves, structure = jax.tree.flatten(shapes)
    places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, jax.ShapeDtypeStruct)]

    def packed(arrays):
        merged = list(leaves)
        for i, array in zip(places, arrays, strict=True):
            merged[i] = array
        quantized = jax.tree.leaves(quantize(jax.tree.unflatten(structure, merged), RULE, axes=axes), is_leaf=is_qarray)
        return [leaf for leaf in quantized if is_qarray(leaf) or isinstance(leaf, jax.Array)]

    merged = list(leaves)
    for i, leaf in zip(places, jax.eval_shape(packed, [leaves[i] for i in places]), strict=True):
        merged[i] = leaf
    assert sum(map(is_qarray, merged)) == count
    record = explain(function, jax.tree.unflatten(structure, merged), *inputs)
    assert not record.entries, record.report()


@pytest.mark.parametrize("name", LINEN)
def test_linen(name):
    module, inputs, count = LINEN[name]
    assert_all_packed(module.apply, jax.eval_shape(module.init, jax.random.key(0), *inputs), inputs, count)


@pytest.mark.parametrize("name", NNX)
def test_nnx(name):
    make, x, count = NNX[name]
    graph, state = nnx.split(nnx.eval_shape(lambda: make(nnx.Rngs(0))), nnx.Param)
    assert_all_packed(lambda state, x: nnx.merge(graph, state)(x), state, (x,), count)


@pytest.mark.parametrize("name", EQUINOX)
def test_equinox(name):
    make, call, x, count = EQUINOX[name]
    assert_all_packed(call, eqx.filter_eval_shape(make, jax.random.key(0)), (x,), count)
