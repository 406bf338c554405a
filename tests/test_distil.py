"""Oracle: the function itself with its hidden states returned, and with float32 params."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from zoo import LAYERS, RULE, WIDTH, jit, model, rows

import jq4
from jq4.train import Lesson, TeacherCache, divergence, inputs_of, self_distill

RANDOM = np.random.default_rng(4)
CLOSE = {"rtol": 2e-5, "atol": 1e-6}


# The inputs of leaves ------------------------------------------------------------------------------------------------


def by_hand(params, x):
    """The zoo's scanned and rematerialized Linen model, layer by layer, with its hidden states."""
    hidden, states, params = x, [], params["params"]
    for i in range(LAYERS):
        layer = jax.tree.map(lambda leaf, i=i: leaf[i], params["layers"])
        norm = layer["LayerNorm_0"]
        centred = hidden - hidden.mean(-1, keepdims=True)
        normal = centred / jnp.sqrt(jnp.square(centred).mean(-1, keepdims=True) + 1e-6)
        up = (normal * norm["scale"][None, None] + norm["bias"][None, None]) @ layer["up_proj"]["kernel"]
        states.append(jax.nn.gelu(up + layer["up_proj"]["bias"][None, None]))
        hidden = hidden + states[-1] @ layer["down_proj"]["kernel"]
    out = params["output"]
    return hidden @ out["kernel"] + out["bias"][None, None], jnp.stack(states), hidden


def test_hidden_states_and_their_gradients_come_through_scan_and_remat():
    m = model("linen_scan_remat")
    down, head = "params/layers/down_proj/kernel", "params/output/kernel"
    watched = inputs_of(m.function, ["down_proj", "output"])

    def ours(params):
        out, inputs = watched(params, m.x)
        assert set(inputs) == {down, head}
        return jnp.sum(jnp.sin(out)) + jnp.sum(jnp.cos(inputs[down])) + jnp.sum(jnp.square(inputs[head])), inputs

    def theirs(params):
        out, states, last = by_hand(params, m.x)
        return jnp.sum(jnp.sin(out)) + jnp.sum(jnp.cos(states)) + jnp.sum(jnp.square(last)), {down: states, head: last}

    (found, inputs), gradients = jit(jax.value_and_grad(ours, has_aux=True))(m.tree)
    (wanted, states), wanted_gradients = jit(jax.value_and_grad(theirs, has_aux=True))(m.tree)
    np.testing.assert_allclose(found, wanted, rtol=1e-5)
    program = str(jax.make_jaxpr(watched)(m.tree, m.x))
    assert "remat" in program or "checkpoint" in program
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-4)  # noqa: E731
    jax.tree.map(close, inputs, states)
    jax.tree.map(close, gradients, wanted_gradients)


@pytest.mark.parametrize(
    ("name", "targets", "shapes"),
    [
        ("linen_scan_remat", "re:down_proj|output", [(LAYERS, 2, 4, 32), (2, 4, 16)]),
        ("nnx_scan_remat", "down_proj", [(LAYERS, 2, 4, 32)]),
        ("tied_embedding", "embed", [(2, 4, WIDTH)]),
        ("convolution", "wide", [(2, 5, 4, 16)]),
    ],
)
def test_dense_packed_and_fake_quantized_models_tell_the_same_inputs(name, targets, shapes):
    """On what the packed leaves stand for, all three see one model; and nothing goes dense for it."""
    m, recipe = model(name), jq4.Recipe((RULE,))
    watched = inputs_of(m.function, targets)
    packed, fake = jq4.quantized(watched, strict=True), jq4.fake_quantized(watched, recipe, axes=m.axes, strict=True)
    quantizers = jq4.quantizers(m.tree, recipe, axes=m.axes, start=m.qtree)
    (out, inputs), (of_packed, packed_inputs), (of_fake, fake_inputs) = jit(
        lambda dense, qtree, pair: (watched(dense, m.x), packed(qtree, m.x), fake(pair, m.x))
    )(m.dense, m.qtree, (m.tree, quantizers))
    assert not packed.record.entries and not fake.record.entries
    assert [each.shape for each in inputs.values()] == shapes
    np.testing.assert_allclose(out, m.expected, rtol=1e-5, atol=1e-5)
    for found in (of_packed, of_fake, packed_inputs, fake_inputs):
        wanted = inputs if isinstance(found, dict) else out
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), found, wanted)


def test_a_leaf_of_several_products_and_one_that_a_loop_shares():
    w, x = jnp.asarray(RANDOM.normal(size=(2, WIDTH, WIDTH)), jnp.float32) / 4, rows(2)
    _, inputs = inputs_of(lambda t, x: jnp.tanh(x @ t["w"][0]) @ t["w"][1], "w")({"w": w}, x)
    np.testing.assert_allclose(inputs["w"][1], jnp.tanh(x @ w[0]), rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(inputs["w"][0], x)

    def shared(tree, x):
        return jax.lax.fori_loop(0, 3, lambda i, x: jnp.tanh(x @ tree["w"]), x)

    out, inputs = jit(inputs_of(shared, "w"))({"w": w[0]}, x)
    assert inputs["w"].shape == (3, *x.shape)
    np.testing.assert_allclose(jnp.tanh(inputs["w"][2] @ w[0]), out, rtol=1e-5, atol=1e-6)


def test_what_cannot_be_seen_is_named():
    tree, x = {"a": {"kernel": jnp.ones((WIDTH, WIDTH))}, "b": {"kernel": jnp.ones((WIDTH, WIDTH))}}, rows()
    f = lambda t, x: jax.lax.while_loop(lambda x: x.sum() < 0, lambda x: x @ t["a"]["kernel"], x)  # noqa: E731
    with pytest.raises(jq4.JQ4Error, match="a/kernel goes into a while loop, out of which its inputs cannot come"):
        inputs_of(f, "a")(tree, x)
    with pytest.raises(jq4.JQ4Error, match="b/kernel is multiplied by nothing in f: f does not look at it"):
        inputs_of(f, "b")(tree, x)
    with pytest.raises(jq4.JQ4Error, match="a/kernel is multiplied by nothing in f: it is seen in add alone"):
        inputs_of(lambda t, x: x @ t["b"]["kernel"] + (t["a"]["kernel"] + 1)[:1], "a")(tree, x)
    with pytest.raises(jq4.JQ4Error, match=r"no weight is called 'c'. The tree has a/kernel, b/kernel"):
        inputs_of(f, "c")(tree, x)
    with pytest.raises(jq4.JQ4Error, match=r"transform f last, as jq4.quantized\(jq4.train.inputs_of"):
        inputs_of(jq4.quantized(f), "a")
    with pytest.raises(jq4.JQ4Error, match=r"takes dense params. Call jq4.quantized\(jq4.train.inputs_of"):
        inputs_of(f, "a")(jq4.quantize(tree, RULE), x)


# The whole of it -----------------------------------------------------------------------------------------------------


def test_a_dense_model_is_taught_to_its_packed_self(tmp_path):
    """Either way lowers the divergence that two bits cost; what comes back is packed; a whole cache is as the model."""
    m = model("tied_embedding")
    text = np.asarray(np.random.default_rng(6).integers(0, 40, (16, 4)), np.int32)
    recipe = jq4.Recipe.preset("rtn-w2g32")
    start = jq4.quantize(m.tree, recipe)
    served = jq4.quantized(m.function, strict=True)
    apart = jit(lambda tree: jnp.mean(divergence(served(tree, text), m.function(m.tree, text))))
    cache = TeacherCache.write(tmp_path, m.function, m.tree, text, k=40, dtype="float32")
    told = []
    options = {"start": start, "steps": 30, "optimizer": optax.adam(1e-2)}
    hidden = Lesson(hidden=("mix",), hidden_weight=0.01)
    of_model, of_cache = (
        self_distill(m.function, m.tree, recipe, text, lesson=hidden, teacher=teacher, **options, progress=progress)
        for teacher, progress in ((None, lambda *each: told.append(each)), (cache, None))
    )
    assert apart(of_model) < 0.5 * apart(start)
    np.testing.assert_allclose(apart(of_cache), apart(of_model), rtol=0.05)
    self_distill(m.function, m.tree, recipe, text, start=jq4.quantizers(m.tree, recipe), steps=1)  # ranges alone
    assert [each[:2] for each in told] == [(25, 30), (30, 30)] and min(each[2] for each in told) > 0
    with pytest.raises(jq4.JQ4Error, match=r"is of other rows than these, \(16, 4\)"):
        self_distill(m.function, m.tree, recipe, text[::-1], teacher=cache, steps=1)
    with pytest.raises(jq4.JQ4Error, match=r"the mask has shape \(16,\), wanted the rows' \(16, 4\)"):
        self_distill(m.function, m.tree, recipe, text, mask=text[:, 0] > 0)


def test_narrow_params_learn_as_wide_ones_do():
    """Steps that bfloat16 is too narrow for are not lost."""
    m = model("tied_embedding")
    narrow = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), m.tree)
    text = np.asarray(np.random.default_rng(5).integers(0, 40, (4, 4)), np.int32)
    function = lambda tree, tokens: m.function(jax.tree.map(lambda leaf: leaf.astype(jnp.float32), tree), tokens)  # noqa: E731
    recipe, told = jq4.Recipe.preset("rtn-w2g32"), []
    for tree in (m.tree, narrow):
        self_distill(
            function, tree, recipe, text, steps=200, optimizer=optax.adam(3e-4), batch_size=4,
            progress=lambda *each: told.append(each[2]),
        )  # fmt: skip
    wide, narrow_loss = told[7], told[15]
    assert wide < 0.6 * told[0] and narrow_loss < 1.3 * wide


def test_counts_and_indices_beside_the_weights_stay_as_they_are():
    m = model("tied_embedding")
    text = np.asarray(np.random.default_rng(5).integers(0, 40, (4, 4)), np.int32)
    tree = {"model": m.tree, "order": jnp.arange(3, -1, -1), "count": np.int32(7)}
    function = lambda tree, tokens: m.function(tree["model"], tokens[:, tree["order"]]) / tree["count"].astype(float)  # noqa: E731
    recipe = jq4.Recipe.preset("rtn-w2g32")
    for start in (None, jq4.quantize(tree, recipe)):
        found = self_distill(function, tree, recipe, text, start=start, steps=2, batch_size=4)
        np.testing.assert_array_equal(found["order"], tree["order"])
        assert (found["count"], found["order"].dtype) == (7, jnp.int32)


def test_impossible_lessons_are_refused():
    for given in ({"share": 1.5}, {"temperature": 0.0}):
        with pytest.raises(jq4.JQ4Error, match=r"share is .* and temperature .*, wanted a share from 0 to 1"):
            Lesson(**given)
