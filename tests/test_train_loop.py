"""Oracles: the run that nobody stopped, the bigger batch, one device, optax's own Adam, and numpy's permutations."""

import dataclasses
import functools
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec

import jq4
from jq4.errors import CheckpointError, JQ4Error
from jq4.train.running.loop import begin, make_step, train
from jq4.train.running.mesh import placed_over, rows_over, shardings_over, training_mesh
from jq4.train.running.metrics import Metrics, read_metrics
from jq4.train.running.optimizer import OptimizerOptions, make_optimizer, rate_for, rate_schedule
from jq4.train.running.rows import ShuffledRows
from jq4.train.running.run_folder import METRICS, run_folder
from jq4.train.running.states import States

STEPS, K, N = 12, 16, 32
ROWS = np.random.default_rng(0).integers(0, K, (13, 4), np.int32)
OPTIMIZER = make_optimizer(OptimizerOptions(0.02, warmup=2, weight_decay=0.1), STEPS)
RECIPE = jq4.Recipe.of(jq4.recipe.Rule(num_bits=4, group_size=8, targets=("re:.*kernel",)))


def forward(tree, tokens):
    """A function with a scan over stacked kernels, as models have it: tokens [B, T] -> [B, T, K]."""
    x = tree["embedding"][tokens]
    x, _ = jax.lax.scan(lambda x, kernel: (x + jnp.tanh(x @ kernel["kernel"]), None), x, tree["layers"])
    return x @ tree["embedding"].T


rounded = jq4.fake_quantized(forward, RECIPE, strict=True)


def loss(trained, fixed, part):
    noise = jax.vmap(lambda key: jax.random.normal(key, (4, K)))(jax.random.wrap_key_data(part["key"]))
    wanted = forward(fixed, part["tokens"]) + noise / 8
    return jnp.mean(jnp.square(rounded(trained, part["tokens"]) - wanted))


def params(seed):
    random = np.random.default_rng(seed)
    return {
        "embedding": jnp.asarray(random.normal(size=(K, N)), jnp.float32),
        "layers": {"kernel": jnp.asarray(random.normal(size=(2, N, N)) / 8, jnp.float32)},
    }


def pair():
    return params(0), jq4.quantizers(params(0), RECIPE)


class Kept:
    """A keeper in memory."""

    def __init__(self):
        self.losses, self.states = [], {}

    def figures(self, step, figures):
        assert step == len(self.losses) + 1 and figures["seconds"] > 0
        self.losses.append(figures["loss"])

    def keep(self, state, step):
        self.states[step] = jax.tree.map(np.array, state)


def every(steps):
    return lambda step: step % steps == 0


@functools.cache
def placing(mesh):
    """(shardings of the state, the step compiled for them, how batches are placed)."""
    if mesh is None:
        return None, make_step(loss, OPTIMIZER), lambda batch: batch
    shardings = shardings_over(mesh, jax.eval_shape(lambda: begin(pair(), OPTIMIZER)), smallest=64)
    return shardings, make_step(loss, OPTIMIZER, shardings), lambda batch: jax.device_put(batch, rows_over(mesh))


def losses_of(*, parts=1, mesh=None, keeper=None):
    keeper, (shardings, step, place) = keeper or Kept(), placing(mesh)
    state = jax.device_put(begin(pair(), OPTIMIZER), shardings)
    fixed = params(1) if mesh is None else placed_over(mesh, params(1))
    batches = ShuffledRows(ROWS, 8, parts, seed=3)
    state = train(step, state, fixed, batches, steps=STEPS, keeper=keeper, keep_when=every(5), place=place)
    return keeper.losses, state


@pytest.fixture(scope="module")
def undisturbed():
    kept = Kept()
    losses, state = losses_of(keeper=kept)
    assert losses[-1] < 0.8 * losses[0] and sorted(kept.states) == [5, 10, 12]
    return losses, jax.tree.map(np.array, state)


def test_parts_of_a_batch_give_the_gradient_of_the_whole(undisturbed):
    losses, state = losses_of(parts=4)
    np.testing.assert_allclose(losses, undisturbed[0], rtol=1e-4)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4), state.trained, undisturbed[1].trained)


@pytest.mark.parametrize("fsdp", [1, 2, 4])
def test_four_devices_learn_what_one_does(undisturbed, fsdp):
    mesh = training_mesh(fsdp, jax.devices()[:4])
    losses, state = losses_of(mesh=mesh)
    np.testing.assert_allclose(losses, undisturbed[0], rtol=1e-4)
    kernel = state.trained[0]["layers"]["kernel"]
    scale = state.trained[1].by_path["layers/kernel"].scale
    for leaf in (kernel, scale, state.optimizer[1].mu[0]["layers"]["kernel"]):
        assert leaf.sharding.spec == (PartitionSpec(None, None, "fsdp") if fsdp > 1 else PartitionSpec())
        assert leaf.addressable_shards[0].data.size * fsdp == leaf.size


def run_in(folder, *, stop_after=None, mesh=None, identity=0, restart=False, keep_every=5):
    """(losses that the folder tells, steps it went on from)."""
    asked = 0

    def stop():
        nonlocal asked
        asked += 1
        return stop_after is not None and asked > stop_after

    shardings, step, place = placing(mesh)
    with run_folder(folder, {"run": identity}, restart) as held:
        like = jax.eval_shape(lambda: begin(pair(), OPTIMIZER))
        if mesh is not None:
            like = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), like, shardings)
        state = held.state(like, lambda: jax.device_put(begin(pair(), OPTIMIZER), shardings))
        assert int(state.step) == held.resumed
        fixed, batches = params(1) if mesh is None else placed_over(mesh, params(1)), ShuffledRows(ROWS, 8, seed=3)
        train(
            step,
            state,
            fixed,
            batches,
            steps=STEPS,
            keeper=held,
            keep_when=every(keep_every),
            place=place,
            stop=stop,
        )
    return [row["loss"] for row in read_metrics(folder / METRICS)], held.resumed


def test_stopped_and_resumed_it_gives_the_same_losses_to_the_last_bit(tmp_path, undisturbed):
    losses, resumed = run_in(tmp_path / "run", stop_after=3)
    assert (losses, resumed) == (undisturbed[0][:3], 0)
    losses, resumed = run_in(tmp_path / "run", stop_after=2)  # at a step whose state is kept anyway
    assert (losses, resumed) == (undisturbed[0][:5], 3)
    losses, resumed = run_in(tmp_path / "run", stop_after=2)
    assert (losses, resumed) == (undisturbed[0][:7], 5)
    with (tmp_path / "run" / METRICS).open("a") as file:  # as a kill leaves it: told, and not kept
        file.write('{"step": 8, "loss": 0.5}\n{"step": 9, "lo')
    assert run_in(tmp_path / "run") == (undisturbed[0], 7)


def test_resumed_on_several_devices_it_gives_their_own_losses(tmp_path):
    mesh = training_mesh(2, jax.devices()[:4])
    wanted, _ = run_in(tmp_path / "peace", mesh=mesh)
    run_in(tmp_path / "run", mesh=mesh, stop_after=6)
    assert run_in(tmp_path / "run", mesh=mesh) == (wanted, 6)


def test_a_state_moves_to_other_devices(tmp_path, undisturbed):
    run_in(tmp_path / "run", stop_after=6)
    losses, resumed = run_in(tmp_path / "run", mesh=training_mesh(4, jax.devices()[:4]))
    assert resumed == 6 and losses[:6] == undisturbed[0][:6]
    np.testing.assert_allclose(losses, undisturbed[0], rtol=1e-4)


def test_another_run_is_not_gone_on_from(tmp_path):
    run_in(tmp_path / "run", stop_after=2)
    with pytest.raises(JQ4Error, match=r"unfinished work of another run, whose run differ.*--restart"):
        run_in(tmp_path / "run", identity=1)
    assert run_in(tmp_path / "run", identity=1, restart=True)[1] == 0
    (tmp_path / "run" / "notes.txt").touch()
    with pytest.raises(JQ4Error, match=r"holds notes.txt, which no training wrote"):
        run_in(tmp_path / "run", identity=1)


def test_one_process_works_in_a_folder(tmp_path):
    with (
        run_folder(tmp_path / "run", {}, False),
        pytest.raises(CheckpointError, match="another run is at work there"),
        run_folder(tmp_path / "run", {}, False),
    ):
        pass


def test_a_state_is_what_it_was_when_it_was_kept(tmp_path):
    """It is written while steps take its buffers over."""
    state = {"a": jnp.arange(2.0**20, dtype=jnp.float32)}
    change = jax.jit(lambda state: {"a": state["a"] * 2 + 1}, donate_argnums=0)
    states = States(tmp_path / "states")
    wanted = np.array(state["a"])
    states.save(1, state)
    for _ in range(20):
        state = change(state)
    states.wait()
    like = {"a": jax.ShapeDtypeStruct((2**20,), jnp.float32, sharding=state["a"].sharding)}
    np.testing.assert_array_equal(states.restore(1, like)["a"], wanted)
    with pytest.raises(CheckpointError, match="cannot be written or read"):
        states.restore(7, like)
    states.close()


def test_divergence_is_told_and_not_kept():
    kept, losses = Kept(), iter([1.0, 2.0, np.nan, 1.0])
    with pytest.raises(JQ4Error, match="step 3: the loss is nan: the training diverged; lower the rate"):
        train(
            lambda state, *_: (state, {"loss": jnp.float32(next(losses))}),
            begin(pair(), OPTIMIZER), None, ShuffledRows(ROWS, 8), steps=4, keeper=kept, keep_when=every(3),
        )  # fmt: skip
    assert kept.losses == [1.0, 2.0] and not kept.states


def test_looking_and_keeping_are_no_part_of_a_steps_seconds(monkeypatch):
    """A clock that goes on by a second whenever it is asked, and by a thousand where somebody looks or keeps."""
    now, told, looked = itertools.count(), [], []
    monkeypatch.setattr("jq4.train.running.loop.time.perf_counter", lambda: float(next(now) + 1000 * len(looked)))
    kept = Kept()
    kept.figures = lambda step, figures: told.append(figures["seconds"])
    kept.keep = lambda state, step: looked.append(step)
    train(
        lambda state, *_: (state, {"loss": jnp.float32(1)}),
        begin(pair(), OPTIMIZER), None, ShuffledRows(ROWS, 8), steps=6, keeper=kept, keep_when=every(4),
        look_when=every(2), look=lambda state, step: looked.append(step),
    )  # fmt: skip
    assert looked == [2, 4, 4, 6, 6] and len(told) == 6 and max(told) < 10


def test_rows_come_once_an_epoch_in_an_order_that_the_step_tells():
    rows = np.arange(10, dtype=np.int32)[:, None] * np.ones(3, np.int32)
    batches = ShuffledRows(rows, 4, 2, seed=5)
    seen = np.concatenate([batches[step]["tokens"].reshape(4, 3)[:, 0] for step in range(5)])
    orders = [np.random.default_rng((5, epoch)).permutation(10) for epoch in (0, 1)]
    np.testing.assert_array_equal(seen, np.concatenate(orders))
    np.testing.assert_array_equal(batches[3]["tokens"], ShuffledRows(rows, 4, 2, seed=5)[3]["tokens"])
    keys = np.concatenate([batches[step]["key"].reshape(4, 2) for step in range(5)])
    assert len(np.unique(keys, axis=0)) == 20
    np.testing.assert_array_equal(ShuffledRows(rows, 4, 1, seed=5)[2]["key"][0], batches[2]["key"].reshape(4, 2))
    for wrong in ({"batch_size": 5, "parts": 2}, {"batch_size": 0}):
        with pytest.raises(JQ4Error, match="wanted parts of equal size"):
            ShuffledRows(rows, **wrong)
    with pytest.raises(JQ4Error, match=r"rows have shape \(3,\)"):
        ShuffledRows(rows[0], 1)


def test_what_is_known_of_rows_goes_along_with_them():
    rows = np.arange(10, dtype=np.int32)[:, None] * np.ones(3, np.int32)
    known = {"square": rows[:, 0] ** 2, "text": np.stack([rows, -rows], 1)}

    class Tree:
        def __getitem__(self, numbers):
            return {name: held[numbers] for name, held in known.items()}

    batch = ShuffledRows(rows, 4, 2, seed=5, along={"known": Tree()})[3]
    first = batch["tokens"][..., 0]
    np.testing.assert_array_equal(batch["known"]["square"], first**2)
    np.testing.assert_array_equal(batch["known"]["text"][..., 1, :], -batch["tokens"])


def test_a_run_in_two_parts_has_one_schedule():
    """The rate of a step is that of the whole run; moments begin anew."""
    options, tree = OptimizerOptions(0.1, "linear", clip=0, relative=False), {"w": jnp.ones((2,))}
    whole, second = make_optimizer(options, 10), make_optimizer(options, 10, 4)
    state, other = whole.init(tree), second.init(tree)
    with jax.numpy_dtype_promotion("standard"):
        for _ in range(4):
            _, state = whole.update({"w": jnp.ones((2,))}, state, tree)
        updates, _ = whole.update({"w": jnp.ones((2,))}, state, tree)
        begun, _ = second.update({"w": jnp.ones((2,))}, other, tree)
    np.testing.assert_allclose(begun["w"], -rate_schedule(options, 10)(4), rtol=1e-4)
    np.testing.assert_allclose(updates["w"], begun["w"], rtol=1e-4)  # gradients that never changed


def test_a_grain_dataset_is_batches_too(undisturbed):
    grain = pytest.importorskip("grain")
    ours = ShuffledRows(ROWS, 8, seed=3)
    batches = grain.MapDataset.range(STEPS).map(lambda step: ours[step])
    kept = Kept()
    train(
        placing(None)[1],
        begin(pair(), OPTIMIZER),
        params(1),
        batches,
        steps=STEPS,
        keeper=kept,
        keep_when=every(9),
    )
    assert kept.losses == undisturbed[0]


def test_the_optimizer_is_adam_by_shares_of_a_leaf():
    options = OptimizerOptions(0.1, "linear", warmup=3, clip=0)
    ours, adam = make_optimizer(options, 10), optax.scale_by_adam(b2=0.99)
    tree = {"w": jnp.asarray([[3.0, -4.0]]), "zero": jnp.zeros((2,))}
    gradient = {"w": jnp.asarray([[0.5, 0.1]]), "zero": jnp.asarray([1.0, -2.0])}
    state, other = ours.init(tree), adam.init(tree)
    for step in range(5):
        with jax.numpy_dtype_promotion("standard"):
            updates, state = ours.update(gradient, state, tree)
            plain, other = adam.update(gradient, other, tree)
        rate = [0.025, 0.05, 0.075, 0.1, 0.1 * 6 / 7][step]
        np.testing.assert_allclose(updates["w"], -rate * np.sqrt(12.5) * plain["w"], rtol=1e-5)
        np.testing.assert_allclose(updates["zero"], -rate * 1e-3 * plain["zero"], rtol=1e-5)
        np.testing.assert_allclose(rate_schedule(options, 10)(step), rate, rtol=1e-5)


def test_the_rate_is_for_the_fewest_bits():
    two, three, four, eight = (jq4.Recipe.preset(f"rtn-w{bits}g32") for bits in (2, 3, 4, 8))
    assert rate_for(two) == rate_for(three) == 5e-3
    np.testing.assert_allclose(rate_for(four), 5e-3 / 7)
    np.testing.assert_allclose(rate_for(eight), 5e-3 / 127)
    mixed = dataclasses.replace(eight, rules=(*eight.rules, *four.rules))
    assert rate_for(mixed) == rate_for(four)
    np.testing.assert_allclose(rate_for(four, learned=True), 5e-3 / 7 * 0.3)
    of_inputs = {bits: jq4.Recipe.preset(f"gptq-w4g32-a{bits}") for bits in (8, 4)}
    assert rate_for(of_inputs[8], learned=True) == rate_for(four, learned=True)
    assert rate_for(of_inputs[4], learned=True) == rate_for(four)
    assert rate_for(two, learned=True) == 5e-3


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"rate": 0.0}, "rate is 0.0, wanted a number above 0"),
        ({"rate": float("nan")}, "rate is nan"),
        ({"rate": 0.1, "clip": -1.0}, "clip is -1.0, wanted a number of 0 or more"),
        ({"rate": 0.1, "schedule": "step"}, "schedule is 'step', wanted one of cosine, linear, constant"),
        ({"rate": 0.1, "warmup": 10}, "warmup is 10 of 10 steps, wanted fewer"),
    ],
)
def test_optimizers_that_cannot_be_are_refused(wrong, message):
    with pytest.raises(JQ4Error, match=message):
        make_optimizer(OptimizerOptions(**wrong), 10)


def test_a_mesh_wants_a_divisor_of_the_devices():
    with pytest.raises(JQ4Error, match="fsdp is 3, wanted a divisor of the 4 devices"):
        training_mesh(3, jax.devices()[:4])


def test_packed_leaves_are_cut_by_whole_groups():
    packed = jq4.quantize(params(0), RECIPE)
    mesh = training_mesh(4, jax.devices()[:4])
    q = placed_over(mesh, packed)["layers"]["kernel"]
    np.testing.assert_array_equal(q.dequantize(), packed["layers"]["kernel"].dequantize())
    assert shardings_over(mesh, packed, smallest=1)["layers"]["kernel"].codes.spec == PartitionSpec(None, None, "fsdp")


def test_metrics_are_cut_to_what_was_kept(tmp_path):
    file = tmp_path / "metrics.jsonl"
    for done, wanted in ((0, []), (2, [1, 2])):
        metrics = Metrics(file, done)
        assert [row["step"] for row in read_metrics(file)] == wanted
        for step in range(done + 1, 5):
            metrics.add({"step": step})
        metrics.sync()
        metrics.close()
    assert [json.loads(line)["step"] for line in file.read_text().splitlines()] == [1, 2, 3, 4]
