"""Oracles: torch's kl_div and cross entropy, float64 NumPy, and the function itself with its hidden states returned."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from zoo import LAYERS, RULE, WIDTH, jit, model, rows

import jq4
from jq4.train import (
    Lesson,
    TeacherCache,
    cosine_distance,
    distillation_loss,
    divergence,
    hidden_loss,
    inputs_of,
    jensen_shannon,
    likeliest,
    mean_over,
    next_token,
    relative_error,
    reverse_divergence,
    self_distill,
)

RANDOM = np.random.default_rng(4)
LOGITS, TEACHER = (jnp.asarray(RANDOM.normal(0, 2, (2, 5, 12)), jnp.float32) for _ in range(2))
TOKENS = jnp.asarray(RANDOM.integers(0, 12, (2, 5)), jnp.int32)
MASK = jnp.asarray([[True] * 5, [True] * 3 + [False] * 2])
CLOSE = {"rtol": 2e-5, "atol": 1e-6}


def as_torch(array, gradient=False):
    return torch.tensor(np.array(array), dtype=torch.float64, requires_grad=gradient)


def torch_kl(target, of, temperature):
    """KL(target || of) at each position, by torch, of logits."""
    log_p, log_q = (torch.log_softmax(each / temperature, -1) for each in (target, of))
    return temperature**2 * torch.nn.functional.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_both_divergences_and_their_gradients_are_torchs(temperature):
    for ours, theirs in (
        (divergence, lambda q, p: torch_kl(p, q, temperature)),
        (reverse_divergence, lambda q, p: torch_kl(q, p, temperature)),
    ):
        found = jit(
            jax.value_and_grad(lambda q, p, ours=ours: ours(q, p, temperature=temperature).sum(), argnums=(0, 1))
        )
        value, (gradient, of_teacher) = found(LOGITS, TEACHER)
        student = as_torch(LOGITS, gradient=True)
        wanted = theirs(student, as_torch(TEACHER)).sum()
        wanted.backward()
        np.testing.assert_allclose(value, wanted.item(), **CLOSE)
        np.testing.assert_allclose(gradient, student.grad.numpy(), rtol=1e-4, atol=1e-5)
        assert not np.asarray(of_teacher).any()


def test_jensen_shannon_is_between():
    p, q = (torch.softmax(as_torch(each) / 2, -1).numpy() for each in (TEACHER, LOGITS))
    for share in (0.5, 0.1):
        m = share * p + (1 - share) * q
        wanted = 4 * (share * (p * np.log(p / m)).sum(-1) + (1 - share) * (q * np.log(q / m)).sum(-1))
        found = jit(lambda a, b, share=share: jensen_shannon(a, b, share, 2.0))(LOGITS, TEACHER)
        np.testing.assert_allclose(found, wanted, **CLOSE)
    small = jensen_shannon(LOGITS, TEACHER, 1e-3) / 1e-3
    np.testing.assert_allclose(small, divergence(LOGITS, TEACHER), rtol=0.1)
    assert (np.asarray(jensen_shannon(40 * LOGITS, TEACHER)) <= np.log(2) + 1e-6).all()  # bounded, as KL is not
    with pytest.raises(jq4.JQ4Error, match=r"share is 1.0, wanted between 0 and 1"):
        jensen_shannon(LOGITS, TEACHER, 1.0)


def test_a_mixture_over_text_alone_is_torchs():
    """Whatever finite padding holds, it changes neither the loss nor its gradients."""
    text = np.array(MASK)
    student = as_torch(LOGITS, gradient=True)
    soft = torch_kl(as_torch(TEACHER), student, 2.0)[torch.tensor(text)].mean()
    both = torch.tensor(text[:, 1:] & text[:, :-1])
    hard = torch.nn.functional.cross_entropy(student[:, :-1][both], torch.tensor(np.array(TOKENS))[:, 1:][both].long())
    (0.7 * soft + 0.3 * hard).backward()
    spoilt = jnp.where(MASK[..., None], TEACHER, 1e4 * TEACHER[::-1])
    loss = lambda q: distillation_loss(q, TOKENS, spoilt, MASK, share=0.7, temperature=2.0)  # noqa: E731
    value, gradient = jit(jax.value_and_grad(loss))(LOGITS)
    np.testing.assert_allclose(value, (0.7 * soft + 0.3 * hard).item(), **CLOSE)
    np.testing.assert_allclose(gradient, student.grad.numpy(), **CLOSE)
    np.testing.assert_allclose(next_token(LOGITS, TOKENS)[both.numpy()].mean(), hard.item(), **CLOSE)
    kept = likeliest(TEACHER, 12, "float32")
    np.testing.assert_allclose(
        distillation_loss(LOGITS, TOKENS, kept), jnp.mean(divergence(LOGITS, TEACHER)), rtol=1e-4
    )
    assert mean_over(jnp.ones((3, 2, 5)), jnp.zeros((2, 5), bool)) == 0


def test_losses_say_what_they_cannot():
    with pytest.raises(jq4.JQ4Error, match=r"temperature is 2.0, and the teacher's likeliest tokens are kept at 1"):
        distillation_loss(LOGITS, TOKENS, likeliest(TEACHER, 3), temperature=2.0)
    with pytest.raises(jq4.JQ4Error, match=r"there is no teacher, and its share is 1.0"):
        distillation_loss(LOGITS, TOKENS, None)
    with pytest.raises(jq4.JQ4Error, match=r"mask has shape \(2, 5\), and what it is for \(2, 5, 3\)"):
        mean_over(jnp.ones((2, 5, 3)), MASK)
    with pytest.raises(jq4.JQ4Error, match=r"wanted the same leaves of student and teacher, .* not in both: a, b"):
        hidden_loss({"a": LOGITS}, {"b": LOGITS})


def test_a_token_that_is_ruled_out_adds_nothing():
    ruled = TEACHER.at[..., 3].set(-jnp.inf)
    wanted = torch_kl(as_torch(ruled), as_torch(LOGITS), 1.0).nan_to_num(0)
    value, gradient = jit(jax.value_and_grad(lambda q: divergence(q, ruled).sum()))(LOGITS)
    p, q = (torch.softmax(as_torch(each), -1) for each in (ruled, LOGITS))
    wanted = torch.where(p > 0, p * (p.log() - q.log()), 0).sum()
    np.testing.assert_allclose(value, wanted, rtol=1e-5)
    np.testing.assert_allclose(gradient, (q - p).numpy(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("distance", [jensen_shannon, reverse_divergence])
def test_what_both_rule_out_is_as_if_it_were_not_there(distance):
    """Such as the tokens that fill up a vocabulary; the bounded one is finite where only one rules out."""
    ruled, student = (each.at[..., -2:].set(-jnp.inf) for each in (TEACHER, LOGITS))
    value, gradient = jit(jax.value_and_grad(lambda q: distance(q, ruled).sum()))(student)
    wanted, of_rest = jit(jax.value_and_grad(lambda q: distance(q, TEACHER[..., :-2]).sum()))(LOGITS[..., :-2])
    np.testing.assert_allclose(value, wanted, **CLOSE)
    np.testing.assert_allclose(gradient, jnp.pad(of_rest, ((0, 0), (0, 0), (0, 2))), **CLOSE)
    if distance is jensen_shannon:
        for q, p in ((LOGITS, ruled), (student, TEACHER)):
            value, gradient = jit(jax.value_and_grad(lambda q, p: jensen_shannon(q, p).sum()))(q, p)
            assert np.isfinite(value) and np.isfinite(gradient).all()


def test_hidden_distances_are_their_formulas():
    x, y = (np.asarray(each, np.float64) for each in (LOGITS, TEACHER))
    np.testing.assert_allclose(relative_error(LOGITS, TEACHER), ((x - y) ** 2).sum(-1) / (y**2).sum(-1), rtol=1e-5)
    cosine = torch.nn.functional.cosine_similarity(as_torch(LOGITS), as_torch(TEACHER), dim=-1)
    np.testing.assert_allclose(cosine_distance(LOGITS, TEACHER), 1 - cosine.numpy(), rtol=1e-4, atol=1e-6)
    assert relative_error(LOGITS, LOGITS).max() == 0 and relative_error(LOGITS, 0 * TEACHER).max() == 0
    layers = {"deep": jnp.stack([LOGITS, TEACHER, LOGITS]), "last": LOGITS}
    wanted = {"deep": jnp.stack([TEACHER, TEACHER, LOGITS]), "last": TEACHER}
    text = np.asarray(MASK)
    each = (((x - y) ** 2).sum(-1) / (y**2).sum(-1))[text].mean()
    np.testing.assert_allclose(hidden_loss(layers, wanted, MASK), (each / 3 + each) / 2, rtol=1e-5)


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
    text = np.asarray(RANDOM.integers(0, 40, (16, 4)), np.int32)
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
    assert [each[:2] for each in told] == [(25, 30), (30, 30)] and told[0][2] > told[1][2] > 0
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


def test_impossible_lessons_are_refused():
    for given in ({"share": 1.5}, {"temperature": 0.0}):
        with pytest.raises(jq4.JQ4Error, match=r"share is .* and temperature .*, wanted a share from 0 to 1"):
            Lesson(**given)
