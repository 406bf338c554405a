"""Small models of every framework, unmodified, as pure functions f(tree, x): what quantized(f) must run packed.

Each `Model` carries the contraction axes of its weights where their names do not tell them. Sizes are odd enough that
a confusion of axes fails, and small enough that a test takes a second.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jq4.quantize import dequantize, quantize
from jq4.rule import Rule

WIDTH, HIDDEN, LAYERS, VOCABULARY, EXPERTS = 16, 32, 2, 40, 3
RULE = Rule(targets=("Linear", "Embedding"), ignore=("re:bias|scale",), group_size=8, scale_dtype="float32")

# A quick compiler for tiny programs: their compilation is what these tests spend their time on.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


@dataclasses.dataclass(frozen=True)
class Model:
    """A function, its dense tree, an input, and how many of its leaves are packed."""

    function: Callable[[Any, Any], Any]
    tree: Any
    x: Any
    packed: int
    axes: dict[str, int] = dataclasses.field(default_factory=dict)
    vmaps_by_x: bool = True  # JAX's own ragged_dot has no batching rule for rows alone

    @functools.cached_property
    def qtree(self) -> Any:
        """The tree quantized to int4 in groups of 8."""
        return quantize(self.tree, RULE, axes=self.axes)

    @functools.cached_property
    def dense(self) -> Any:
        """The oracle's tree: what the packed weights stand for."""
        _, rebuild = arrays_of(self.tree)
        packed_arrays, rebuild_packed = arrays_of(self.qtree)
        return rebuild(jit(lambda arrays: arrays_of(dequantize(rebuild_packed(arrays)))[0])(packed_arrays))

    @functools.cached_property
    def expected(self) -> Any:
        """The oracle: the function on the dequantized tree."""
        arrays, rebuild = arrays_of(self.dense)
        return jit(lambda arrays, x: self.function(rebuild(arrays), x))(arrays, self.x)


def arrays_of(tree: Any) -> tuple[list[jax.Array], Callable[[list[Any]], Any]]:
    """The tree's arrays (those of a QArray one by one), and the function that puts others in their places."""
    leaves, structure = jax.tree.flatten(tree)
    places = [place for place, leaf in enumerate(leaves) if isinstance(leaf, jax.Array)]

    def rebuild(arrays: list[Any]) -> Any:
        merged = list(leaves)
        for place, array in zip(places, arrays, strict=True):
            merged[place] = array
        return jax.tree.unflatten(structure, merged)

    return [leaves[place] for place in places], rebuild


class LinenBlock(nn.Module):
    width: int = WIDTH
    hidden: int = HIDDEN

    @nn.compact
    def __call__(self, x, _=None):
        h = nn.LayerNorm()(x)
        h = nn.Dense(self.hidden, name="up_proj")(h)
        h = nn.Dense(self.width, use_bias=False, name="down_proj")(nn.gelu(h))
        return x + h, None


class LinenStack(nn.Module):
    @nn.compact
    def __call__(self, x):
        for i in range(LAYERS):
            x, _ = LinenBlock(name=f"layer_{i}")(x)
        return nn.Dense(5, name="output")(x)


class LinenScanRemat(nn.Module):
    layers: int = LAYERS
    width: int = WIDTH
    hidden: int = HIDDEN

    @nn.compact
    def __call__(self, x):
        block = nn.remat(LinenBlock, prevent_cse=False)
        scanned = nn.scan(block, variable_axes={"params": 0}, split_rngs={"params": True}, length=self.layers)
        x, _ = scanned(self.width, self.hidden, name="layers")(x, None)
        return nn.Dense(5, name="output")(x)


class LinenConv(nn.Module):
    @nn.compact
    def __call__(self, x):  # [B, H, W, C]
        x = nn.gelu(nn.Conv(16, (2, 3), strides=2, name="stem")(x))
        x = nn.gelu(nn.Conv(24, (1, 2), kernel_dilation=2, padding="VALID", name="wide")(x))
        return nn.Dense(5, name="output")(x.mean(axis=(1, 2)))


class LinenTied(nn.Module):
    @nn.compact
    def __call__(self, ids):
        table = nn.Embed(VOCABULARY, WIDTH, name="embed")
        return table.attend(nn.tanh(nn.Dense(WIDTH, name="mix")(table(ids))))


class NNXBlock(nnx.Module):
    def __init__(self, rngs):
        self.norm = nnx.RMSNorm(WIDTH, rngs=rngs)
        self.up_proj = nnx.Linear(WIDTH, HIDDEN, rngs=rngs)
        self.down_proj = nnx.Linear(HIDDEN, WIDTH, use_bias=False, rngs=rngs)

    def __call__(self, x):
        return x + self.down_proj(nnx.silu(self.up_proj(self.norm(x))))


class NNXStack(nnx.Module):
    def __init__(self, rngs):
        self.layers = nnx.List([NNXBlock(rngs) for _ in range(LAYERS)])
        self.output = nnx.Linear(WIDTH, 5, rngs=rngs)

    def __call__(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.output(x)


class NNXScanRemat(nnx.Module):
    def __init__(self, rngs):
        @nnx.split_rngs(splits=LAYERS)
        @nnx.vmap(in_axes=(0,), out_axes=0)
        def create(rngs):
            return NNXBlock(rngs)

        self.layers = create(rngs)
        self.output = nnx.Linear(WIDTH, 5, rngs=rngs)

    def __call__(self, x):
        @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
        @nnx.remat(prevent_cse=False)
        def forward(layer, x):
            return layer(x)

        return self.output(forward(self.layers, x))


class EquinoxModel(eqx.Module):
    first: eqx.nn.Linear
    second: eqx.nn.Linear
    activation: Callable
    name: str = eqx.field(static=True)

    def __call__(self, x):  # [T, D]
        return jax.vmap(self.second)(self.activation(jax.vmap(self.first)(x)))


def _filled(shapes: Any) -> Any:
    """Arrays of these shapes, normal and small: quicker than compiling an initializer."""
    generator = np.random.default_rng(0)

    def fill(leaf: Any) -> Any:
        if not isinstance(leaf, jax.ShapeDtypeStruct):
            return leaf
        return jnp.asarray(generator.normal(scale=0.3, size=leaf.shape), leaf.dtype)

    return jax.tree.map(fill, shapes)


def _linen(module: nn.Module, x: Any, packed: int, axes: dict[str, int] | None = None) -> Model:
    return Model(module.apply, _filled(jax.eval_shape(module.init, jax.random.key(0), x)), x, packed, axes or {})


def _nnx(make: Callable[[nnx.Rngs], nnx.Module], x: Any, packed: int, axes: dict[str, int] | None = None) -> Model:
    graph, state = nnx.split(nnx.eval_shape(lambda: make(nnx.Rngs(0))), nnx.Param)
    return Model(lambda state, x: nnx.merge(graph, state)(x), _filled(state), x, packed, axes or {})


def _attention(rngs: nnx.Rngs) -> nnx.Module:
    return nnx.MultiHeadAttention(2, WIDTH, decode=False, rngs=rngs)


def _equinox() -> Model:
    def make(key: jax.Array) -> EquinoxModel:
        first, second = eqx.nn.Linear(WIDTH, HIDDEN, key=key), eqx.nn.Linear(HIDDEN, 5, key=key)
        return EquinoxModel(first, second, jax.nn.gelu, "two")

    model = _filled(eqx.filter_eval_shape(make, jax.random.key(1)))
    return Model(lambda model, x: jax.vmap(model)(x), model, rows(2), 2)


def _mixture_of_experts() -> Model:
    shapes = {"router": (WIDTH, EXPERTS), "up": (EXPERTS, WIDTH, HIDDEN), "down": (EXPERTS, HIDDEN, WIDTH)}
    tree = {name: {"kernel": jax.ShapeDtypeStruct(shape, jnp.float32)} for name, shape in shapes.items()}
    return Model(top1_experts, _filled(tree), rows(2), 3, vmaps_by_x=False)


def top1_experts(tree, x):
    """Each row by the expert that its router picks: rows sorted by expert, `lax.ragged_dot`, rows put back."""
    flat = x.reshape(-1, WIDTH)
    expert = jnp.argmax(flat @ tree["router"]["kernel"], axis=-1)
    order = jnp.argsort(expert)
    sizes = jnp.bincount(expert, length=EXPERTS).astype(jnp.int32)
    hidden = jax.nn.gelu(jax.lax.ragged_dot(flat[order], tree["up"]["kernel"], sizes))
    out = jax.lax.ragged_dot(hidden, tree["down"]["kernel"], sizes)
    return out[jnp.argsort(order)].reshape(x.shape)


def rows(*batch: int) -> jax.Array:
    """Inputs f32[*batch, 4, WIDTH]."""
    return jnp.asarray(np.random.default_rng(7).normal(size=(*batch, 4, WIDTH)), jnp.float32)


def images() -> jax.Array:
    """Inputs f32[2, 9, 8, 8]: batch, height, width, channels."""
    return jnp.asarray(np.random.default_rng(9).normal(size=(2, 9, 8, 8)), jnp.float32)


def tokens() -> jax.Array:
    """Token ids i32[2, 4]."""
    return jnp.asarray(np.random.default_rng(8).integers(0, VOCABULARY, (2, 4)), jnp.int32)


ATTENTION_AXES = {"query/kernel": -3, "key/kernel": -3, "value/kernel": -3, "out/kernel": -2}

MODELS: dict[str, Callable[[], Model]] = {
    "linen_stack": lambda: _linen(LinenStack(), rows(2), 2 * LAYERS + 1),
    "linen_scan_remat": lambda: _linen(LinenScanRemat(), rows(2), 3),
    "nnx_stack": lambda: _nnx(NNXStack, rows(2), 2 * LAYERS + 1),
    "nnx_scan_remat": lambda: _nnx(NNXScanRemat, rows(2), 3),
    "equinox": _equinox,
    "convolution": lambda: _linen(LinenConv(), images(), 3),
    "tied_embedding": lambda: _linen(LinenTied(), tokens(), 2),
    "nnx_attention": lambda: _nnx(_attention, rows(2), 4, ATTENTION_AXES),
    "experts": _mixture_of_experts,
}


def packed(shape: tuple[int, ...], axis: int = -2, group_size: int = 8, seed: int = 0, **options: Any) -> Any:
    """A random f32 weight of this shape, quantized to int4 along `axis`."""
    weight = (np.random.default_rng(seed).normal(size=shape) / 4).astype(np.float32)
    rule = Rule(targets=("kernel",), group_size=group_size, scale_dtype="float32", **options)
    return _quantized(weight, rule, axis)


@functools.partial(jit, static_argnums=(1, 2))
def _quantized(weight: Any, rule: Rule, axis: int) -> Any:
    return quantize({"kernel": weight}, rule, axes={"kernel": axis})["kernel"]


@functools.cache
def model(name: str) -> Model:
    """The model of this name, made once."""
    return MODELS[name]()
