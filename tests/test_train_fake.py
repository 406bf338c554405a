"""Oracle: the function itself on the dequantized tree, and `jq4.quantized` on what `harden` packed."""

import dataclasses
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, PartitionSpec
from zoo import LAYERS, RULE, WIDTH, arrays_of, jit, model, rows

import jq4
from jq4.activations import Activations
from jq4.train import stages

pytestmark = pytest.mark.arithmetic

RANDOM = np.random.default_rng(11)
CLOSE = {"rtol": 2e-4, "atol": 2e-5}
EIGHT_BITS = Activations()


def recipe_of(**changes):
    return jq4.Recipe((dataclasses.replace(RULE, **changes),))


def begun(m, recipe):
    """(params, quantizers), the scales off the grid by a few per cent."""
    quantizers = jq4.quantizers(m.tree, recipe, axes=m.axes)
    moved = jax.tree.map(lambda part: part * RANDOM.uniform(0.9, 1.1, part.shape).astype(np.float32), quantizers)
    return m.tree, moved


def loss_and_gradients(function, tree, x):
    arrays, rebuild = arrays_of(tree)
    loss = lambda arrays: jnp.sum(jnp.sin(function(rebuild(arrays), x)))  # noqa: E731
    return jit(jax.value_and_grad(loss))(arrays)


def test_a_scanned_and_rematerialized_model_trains_as_its_packed_self():
    """Forward: on dequantized weights. Backward: what reaches the rounded weights reaches the dense ones and steps."""
    m, recipe = model("linen_scan_remat"), recipe_of(scale_dtype="bfloat16")
    pair = begun(m, recipe)
    forward = jq4.fake_quantized(m.function, recipe, strict=True)
    value, gradients = loss_and_gradients(forward, pair, m.x)
    assert not forward.record.entries, forward.record.report()
    dense = jq4.dequantize(jq4.harden(*pair, recipe))
    wanted, dense_gradients = loss_and_gradients(m.function, dense, m.x)
    np.testing.assert_array_equal(value, wanted)
    of_params = gradients[: len(dense_gradients)]
    for found, straight in zip(of_params, dense_gradients, strict=True):
        clipped = (np.asarray(found) == 0) & (np.asarray(straight) != 0)
        np.testing.assert_allclose(np.asarray(found)[~clipped], np.asarray(straight)[~clipped], **CLOSE)
        assert clipped.mean() < 0.3
    assert len(gradients) - len(of_params) == m.packed
    assert all(np.asarray(gradient).any() for gradient in gradients[len(of_params) :])


@pytest.mark.parametrize("name", ["nnx_scan_remat", "nnx_attention", "equinox", "tied_embedding", "experts"])
def test_models_of_every_framework_run_on_what_will_be_packed(name):
    m, recipe = model(name), recipe_of()
    arrays, rebuild = arrays_of((m.tree, jq4.quantizers(m.tree, recipe, axes=m.axes, start=m.qtree)))
    forward = jq4.fake_quantized(m.function, recipe, axes=m.axes, strict=True)
    out = jit(lambda arrays, x: forward(rebuild(arrays), x))(arrays, m.x)
    np.testing.assert_allclose(out, m.expected, rtol=1e-6, atol=1e-6)
    assert not forward.record.entries, forward.record.report()


@pytest.mark.parametrize("kind", ["int", "float"])
def test_inputs_are_rounded_as_the_packed_product_rounds_them(kind):
    m, recipe = model("linen_scan_remat"), recipe_of(input_activations=Activations(type=kind))
    pair = (m.tree, jq4.quantizers(m.tree, recipe))
    forward = jq4.fake_quantized(m.function, recipe, strict=True)
    out = jit(forward)(pair, m.x)
    served = jit(jq4.quantized(m.function, strict=True))(jq4.harden(*pair, recipe), m.x)
    np.testing.assert_allclose(out, served, **CLOSE)
    assert np.abs(np.asarray(out) - np.asarray(m.expected)).max() > 1e-3  # as weights alone give it


def scanned(tree, x):
    """Layers by scan, then experts as a batched product."""
    x = jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, tree["layers"]["kernel"])[0]
    return jnp.einsum("td,edf->etf", x, tree["experts"]["kernel"])


def stacked():
    return {
        "layers": {"kernel": jnp.asarray(RANDOM.normal(0, 0.3, (3, WIDTH, WIDTH)), jnp.float32)},
        "experts": {"kernel": jnp.asarray(RANDOM.normal(0, 0.3, (2, WIDTH, 5)), jnp.float32)},
    }


@pytest.mark.parametrize("kind", ["int", "float"])
def test_learned_steps_of_inputs_are_each_layers_own_and_learned(kind):
    params, x = stacked(), rows()
    recipe = recipe_of(input_activations=Activations(type=kind, strategy="tensor", dynamic=False))
    stats = jq4.observe(scanned, params, [x], collect=("absmax",))
    quantizers = jq4.quantizers(params, recipe, stats)
    assert quantizers.by_path["layers/kernel"].input_step.shape == (3, 1, 1)
    forward = jq4.fake_quantized(scanned, recipe, strict=True)
    value, gradients = jit(jax.value_and_grad(lambda pair: jnp.sum(jnp.sin(forward(pair, x)))))((params, quantizers))
    served = jit(jq4.quantized(scanned, strict=True))(jq4.harden(params, quantizers, recipe), x)
    np.testing.assert_allclose(value, jnp.sum(jnp.sin(served)), rtol=1e-3)
    by_path = gradients[1].by_path
    assert (np.asarray(by_path["layers/kernel"].input_step) != 0).all()
    with pytest.raises(jq4.JQ4Error, match="kernel: input_activations with dynamic false have a step that is learned"):
        forward(params, x)


def test_a_shard_map_and_an_outer_loop():
    tree, x, recipe = stacked(), rows(2), recipe_of(input_activations=EIGHT_BITS)
    f = lambda tree, x: jnp.tanh(x @ tree["layers"]["kernel"][1]) @ tree["experts"]["kernel"][0]  # noqa: E731
    forward = jq4.fake_quantized(f, recipe, strict=True)
    mesh = Mesh(np.array(jax.devices()[:2]), ("data",))
    data, whole = PartitionSpec("data"), PartitionSpec()
    inside = jq4.fake_quantized(
        jax.shard_map(f, mesh=mesh, in_specs=(whole, data), out_specs=data), recipe, strict=True
    )
    outside = jax.shard_map(forward, mesh=mesh, in_specs=(whole, data), out_specs=data)
    looped = lambda tree, x: jax.lax.map(lambda row: forward(tree, row), x)  # noqa: E731
    loss = lambda f: jax.value_and_grad(lambda tree: jnp.sum(jnp.sin(f(tree, x))))(tree)  # noqa: E731
    first, *others = jit(lambda: [loss(each) for each in (forward, inside, outside, looped)])()
    for found in others:
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), found, first)


def test_a_toy_is_learned_and_what_was_learned_is_what_is_packed():
    """Two bits: the quantizers move beside the params, and the loss falls far below that of rounding alone."""
    random = np.random.default_rng(11)  # its own: what others drew before would decide how well it is learned
    target = jnp.asarray(random.normal(0, 0.3, (WIDTH, 6)), jnp.float32)
    x = jnp.asarray(random.normal(size=(64, WIDTH)), jnp.float32)
    f = lambda tree, x: jnp.tanh(x @ tree["kernel"]) @ tree["out"]  # noqa: E731
    params = {"kernel": target, "out": jnp.asarray(random.normal(size=(6, 6)), jnp.float32)}
    y, recipe = f(params, x), recipe_of(num_bits=2, ignore=("out",))
    quantizers = jq4.quantizers(params, recipe)
    forward = jq4.fake_quantized(f, recipe, strict=True)
    optimizer = optax.adam(optax.linear_schedule(3e-3, 0.0, 200))

    def loss(pair):
        return jnp.mean(jnp.square(forward(pair, x) - y))

    @jit
    def train(pair):
        def step(carry, _):
            pair, state = carry
            value, gradient = jax.value_and_grad(loss)(pair)
            with jax.numpy_dtype_promotion("standard"):
                updates, state = optimizer.update(gradient, state, pair)
            return (optax.apply_updates(pair, updates), state), value

        return jax.lax.scan(step, (pair, optimizer.init(pair)), None, length=200)

    (pair, _), losses = train((params, quantizers))
    assert losses[-1] < 0.6 * losses[0]
    moved = pair[1].by_path["kernel"].scale / quantizers.by_path["kernel"].scale
    assert np.abs(np.asarray(moved) - 1).max() > 0.02
    served = jq4.quantized(f, strict=True)(jq4.harden(*pair, recipe), x)
    np.testing.assert_allclose(jnp.mean(jnp.square(served - y)), loss(pair), rtol=1e-4)


def test_training_may_start_at_a_calibrated_solution():
    weight = jnp.asarray(RANDOM.normal(size=(24, 6)), jnp.float32)
    for name in ("rtn-w3g32-asym", "rtn-w4g32", "nf4-g32"):
        recipe = jq4.Recipe.preset(name)
        q = jq4.quantize({"kernel": weight}, recipe)["kernel"]
        codes = jnp.asarray(RANDOM.integers(0, 256, q.codes.shape), jnp.uint8)
        start = {"kernel": dataclasses.replace(q, codes=codes)}  # codes that no rounding to nearest gives
        params = jq4.move_to_codes({"kernel": weight, "bias": weight[0]}, start)
        quantizers = jq4.quantizers(params, recipe, start=start)
        again = jq4.harden(params, quantizers, recipe)
        for mine, theirs in zip(jax.tree.leaves(again["kernel"]), jax.tree.leaves(start["kernel"]), strict=True):
            np.testing.assert_array_equal(np.asarray(mine), np.asarray(theirs))
        np.testing.assert_array_equal(params["bias"], weight[0])


@pytest.mark.parametrize("name", ["rtn-w2g32-asym", "rtn-w3g32", "rtn-w8g32-asym", "nf4-g32"])
def test_training_begins_at_the_codes_of_a_start(name):
    """And at what else the start holds: changed norms, leaves packed by another recipe; the rest as it was."""
    random = np.random.default_rng(0)
    recipe = dataclasses.replace(jq4.Recipe.preset(name), ignore=("other", "norm"))
    layer = {"kernel": random.normal(size=(64, 6)), "norm": np.ones(6), "other": {"kernel": np.eye(64)[:, :6]}}
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.bfloat16), layer) | {"count": jnp.int32(3)}
    other = jq4.quantize(params["other"], "rtn-w8g32")
    q = jq4.quantize({"kernel": params["kernel"]}, recipe)["kernel"]
    codes = jnp.asarray(random.integers(0, 256, q.codes.shape), jnp.uint8)  # that no rounding to nearest gives
    start = {"kernel": dataclasses.replace(q, codes=codes), "norm": 2 * params["norm"], "other": other}
    masters, quantizers = jq4.train.begin_at(params, recipe, start)
    again = jq4.harden(masters, quantizers, recipe)
    for field in ("codes", "scale", "zero_point"):
        np.testing.assert_array_equal(getattr(again["kernel"], field), getattr(start["kernel"], field))
    np.testing.assert_array_equal(masters["norm"], np.full(6, 2, np.float32))
    np.testing.assert_array_equal(masters["other"]["kernel"], other["kernel"].dequantize(jnp.float32))
    assert {leaf.dtype for leaf in jax.tree.leaves((masters["kernel"], masters["norm"]))} == {jnp.dtype("float32")}
    assert masters["count"] == 3 and masters["count"].dtype == jnp.int32
    for wrong in (jq4.quantize({"kernel": jnp.ones((64, 8))}, recipe), start | {"norm": jnp.ones(7)}):
        with pytest.raises(jq4.JQ4Error, match=r"the start's leaf has shape .*, wanted .*, the params'"):
            jq4.train.begin_at(params, recipe, start | wrong)


ROTATING = {"targets": ["**"], "group_size": 16, "input_rotation": "hadamard", "input_activations": {"num_bits": 4}}


@pytest.mark.parametrize("bits", [2, 3])
def test_weights_of_rotated_inputs_are_rounded_as_they_are_packed(bits):
    """The leaf that is trained is W; what is rounded, found anew or from a start, is R^T W."""
    random = np.random.default_rng(0)
    params = {"kernel": jnp.asarray(random.normal(size=(3, 48, 8)), jnp.float32)}
    x = jnp.asarray(random.normal(size=(5, 48)), jnp.float32)
    recipe = jq4.Recipe.from_dict({"rules": [ROTATING | {"num_bits": bits}]})
    function = lambda tree, x: jax.lax.map(lambda kernel: x @ kernel, tree["kernel"])  # noqa: E731
    forward = jq4.fake_quantized(function, recipe, strict=True)
    start = jq4.quantize(params, recipe)
    served = jit(jq4.quantized(function, strict=True))
    np.testing.assert_allclose(jit(forward)(params, x), served(start, x), **CLOSE)
    codes = jnp.asarray(random.integers(0, 256, start["kernel"].codes.shape), jnp.uint8)  # not those of rounding
    start = {"kernel": dataclasses.replace(start["kernel"], codes=codes)}
    pair = jq4.train.begin_at(params, recipe, start)
    hard = jq4.harden(*pair, recipe)
    jax.tree.map(np.testing.assert_array_equal, hard, start)
    np.testing.assert_allclose(jit(forward)(pair, x), served(start, x), **CLOSE)
    gradient = jit(jax.grad(lambda pair: jnp.sum(jnp.sin(forward(pair, x)))))(pair)
    assert np.asarray(gradient[0]["kernel"]).all()
    after = jax.tree.map(lambda leaf, slope: leaf - 0.05 * slope, pair, gradient)
    hard = jq4.harden(*after, recipe)
    np.testing.assert_allclose(jit(forward)(after, x), served(hard, x), **CLOSE)
    with pytest.raises(jq4.JQ4Error, match="and inputs rotated in blocks of 16, int4-token, and the recipe wants"):
        jq4.quantizers(params, dataclasses.replace(recipe.rules[0], input_rotation=None), start=start)
    with pytest.raises(
        jq4.JQ4Error, match="the start rotates inputs, and its codes are of rotated weights: wanted begin_at"
    ):
        jq4.move_to_codes(params, start)
    with pytest.raises(jq4.JQ4Error, match="kernel: input_rotation: 15 inputs, wanted an even number"):
        forward({"kernel": jnp.ones((3, 15, 8))}, x[:, :15])


def test_a_start_is_held_to_the_recipe():
    params = {"kernel": jnp.ones((8, 2))}
    start = jq4.quantize(params, "rtn-w4g4")
    with pytest.raises(jq4.JQ4Error, match=r"kernel: the start is int4 in groups of 4 .* wants int4 in groups of 8"):
        jq4.quantizers(params, "rtn-w4g8", start=start)
    with pytest.raises(jq4.JQ4Error, match=r"and the recipe wants .* with no zero points and inputs int8-token"):
        jq4.quantizers(params, "rtn-w4g4-a8", start=start)
    with pytest.raises(jq4.JQ4Error, match="kernel: the recipe means it, and the start does not hold it packed"):
        jq4.quantizers(params, "rtn-w4g4", start=params)
    with pytest.raises(jq4.JQ4Error, match="kernel: double_quant packs the scales"):
        jq4.quantizers(params, "nf4-dq")
    with pytest.raises(jq4.JQ4Error, match=r"the recipe has steps \(distill\), and training takes rules alone"):
        jq4.fake_quantized(lambda tree: tree, "best-w4g32")(params)
    with pytest.raises(jq4.JQ4Error, match="other/kernel: the quantizers have it, and the params have no such leaf"):
        jq4.harden({"a": params, "b": params}, jq4.quantizers({"other": params}, "rtn-w4g4"), "rtn-w4g4")
    with pytest.raises(jq4.JQ4Error, match=r"scales of shape \(2, 2\), wanted \(4, 2\) \(or 1 on an axis\)"):
        jq4.harden({"kernel": jnp.ones((16, 2))}, jq4.quantizers(params, "rtn-w4g4"), "rtn-w4g4")


@jax.custom_jvp
def own_product(x, w):
    return x @ w


own_product.defjvps(lambda dx, out, x, w: dx @ w, lambda dw, out, x, w: 3 * (x @ dw))


def test_nothing_is_left_unrounded_silently():
    params, x = {"kernel": jnp.ones((WIDTH, 2)), "more": {"kernel": jnp.ones((WIDTH, 2))}}, rows()
    everything = recipe_of(input_activations=EIGHT_BITS)
    cases = {
        "more/kernel: the recipe means it for nothing: the function does not look at it": lambda t: x @ t["kernel"],
        "kernel: inputs are not rounded at dot_general.* contracts axis -1 of the leaf, and groups lie along -2": (
            lambda t: x @ t["more"]["kernel"] @ t["kernel"].T
        ),
        "kernel: inputs are not rounded at integer_pow": lambda t: x @ t["more"]["kernel"] + (t["kernel"] ** 2).sum(),
        "kernel: inputs are not rounded at custom_jvp_call": lambda t: (
            own_product(x, t["kernel"]) + x @ t["more"]["kernel"]
        ),
    }
    for text, f in cases.items():
        with pytest.raises(jq4.UnroundedError, match=text):
            jq4.fake_quantized(f, everything, strict=True)(params)
        loose = jq4.fake_quantized(f, everything)
        with pytest.warns(jq4.UnroundedWarning, match=text):
            loose(params)
        assert loose.record and "kernel" in loose.record.report()
    weights_only = jq4.fake_quantized(
        lambda t: (t["kernel"] ** 2).sum() + x @ t["more"]["kernel"], recipe_of(), None, True
    )
    weights_only(params)  # its values are those of the packed leaf, dequantized there: noted, no error
    assert [(entry.kind, entry.path) for entry in weights_only.record.entries] == [("dense", "kernel")]
    assert not weights_only.record


def test_leaves_without_a_quantizer_are_told():
    params = {"kernel": jnp.ones((8, 2)), "more": {"kernel": jnp.ones((8, 2))}}
    some = jq4.quantizers({"more": params["more"]}, "rtn-w4g4")
    f = lambda tree: jnp.ones((1, 8)) @ tree["kernel"] @ tree["more"]["kernel"].T  # noqa: E731
    text = "^kernel: it is not rounded, though the recipe means it: there is no quantizer for it"
    with pytest.raises(jq4.UnroundedError, match=text):
        jq4.fake_quantized(f, "rtn-w4g4", strict=True)((params, some))
    with pytest.raises(jq4.UnroundedError, match="kernel: the recipe means it, and training did not round it"):
        jq4.harden(params, some, "rtn-w4g4")


def test_a_derivative_of_the_users_own_is_followed_to_the_weight():
    params, x = {"kernel": jnp.asarray(RANDOM.normal(size=(WIDTH, 2)), jnp.float32)}, rows()
    forward = jq4.fake_quantized(lambda tree: own_product(x, tree["kernel"]).sum(), recipe_of())
    gradient = jit(jax.grad(lambda tree: forward(tree)))(params)["kernel"]
    np.testing.assert_allclose(gradient, 3 * np.broadcast_to(np.asarray(x).sum(0)[:, None], (WIDTH, 2)), rtol=1e-5)


def test_weights_are_rounded_a_layer_at_a_time():
    """No copy of the whole stack is alive: the loop's body rounds its slice, and under remat rounds it again."""
    layers, width = 16, 128
    tree = {"kernel": jnp.zeros((layers, width, width))}

    def f(tree, x):
        body = jax.checkpoint(lambda x, w: (jnp.tanh(x @ w), None), prevent_cse=False)
        return jax.lax.scan(body, x, tree["kernel"])[0].sum()

    forward = jq4.fake_quantized(f, recipe_of())
    before = lambda tree, x: f(jq4.fake_quantized(lambda tree: tree, recipe_of())(tree), x)  # noqa: E731
    x = jnp.zeros((4, width))
    temporary = [
        jax.jit(jax.grad(g)).lower(tree, x).compile().memory_analysis().temp_size_in_bytes for g in (forward, before)
    ]
    assert temporary[0] < temporary[1] - 0.8 * 4 * tree["kernel"].size


def test_stages_fall_in_bits_and_keep_the_ranges():
    weight = {"kernel": jnp.asarray(RANDOM.normal(size=(8, 2)), jnp.float32)}
    recipe = jq4.Recipe.preset("rtn-w3g4-asym-a8")
    found = stages(recipe, 100, bits=(8, 4), weights_first=True)
    bits = [(each.recipe.rules[0].num_bits, each.recipe.rules[0].input_activations is None) for each in found]
    assert bits == [(8, True), (4, True), (3, True), (3, False)]
    assert [(each.start, each.stop) for each in found] == [(0, 25), (25, 50), (50, 75), (75, 100)]
    assert found[-1].recipe == recipe and stages(recipe, 7) == (type(found[0])(0, 7, recipe),)
    quantizers, ranges = None, []
    for stage in found:
        quantizers = jq4.quantizers(weight, stage.recipe, start=quantizers)
        q, top = quantizers.by_path["kernel"], 2 ** stage.recipe.rules[0].num_bits - 1
        ends = [-q.scale * q.zero_point, q.scale * (top - q.zero_point)]
        ranges.append(np.stack(ends))
    np.testing.assert_allclose(ranges, [ranges[0]] * 4, rtol=1e-5, atol=1e-6)
    with pytest.raises(jq4.JQ4Error, match=r"bits are \(4, 8\), wanted falling numbers"):
        stages(recipe, 10, bits=(4, 8))


def test_params_alone_and_frameworks_own_first_names():
    """Quantizers of params serve {"params": params}; a tree without any is rounded by scales found anew."""
    m = model("linen_stack")
    inner = m.tree["params"]
    quantizers = jq4.quantizers(inner, recipe_of())
    forward = jq4.fake_quantized(m.function, recipe_of(), strict=True)
    with_pair = jit(forward)((m.tree, quantizers), m.x)
    np.testing.assert_allclose(with_pair, jit(forward)(m.tree, m.x), **CLOSE)
    np.testing.assert_allclose(with_pair, m.expected, **CLOSE)
    assert len(quantizers.by_path) == 2 * LAYERS + 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        jax.eval_shape(forward, (m.tree, quantizers), m.x)
