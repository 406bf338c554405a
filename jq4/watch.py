"""The interpreter that watches: it computes `f` as it is, and learns what each weight is multiplied by.

It is `jq4.interpret` with another rule set than `jq4.quantized`'s: a weight is a `Watched` value, moving its axes keeps
it watched, and a product with it (dot_general, ragged_dot_general, convolution) notes which axis of the leaf is
contracted and adds statistics of the other operand to the current frame. Anything else just computes on the array.

Frames are how sums leave a loop without side effects. The body of a scan is run with a frame of its own; what it
gathered for a weight that the scan slices is stacked by the scan (a layer's statistics stay a layer's), what it
gathered for any other is carried along and summed. A `while` carries, a `cond` returns zeros for what the other
branches saw, a `shard_map` sums over the mesh axes that the inputs differ along.
"""

import contextlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jq4 import jax_compat, watch_rules
from jq4.errors import JQ4Error
from jq4.interpret import Interpreter, Values, merge_placed
from jq4.statistics import ProductAxes, WeightStatistics, merge, over_devices
from jq4.watched import Atom, Watched


class Key(NamedTuple):
    """Whose statistics, in which loops they were taken, and which axes of the leaf their leading axes are."""

    path: str
    loops: tuple[tuple[int, int], ...]
    leading: tuple[int, ...]
    features: tuple[int, ...]


Frame = dict[Key, WeightStatistics]


class Watcher(Interpreter):
    """Evaluates a jaxpr with Watched weights.

    Attributes:
      collects: what to collect for the leaf at a path, some of jq4.statistics.COLLECTABLE.
      frame: the statistics gathered at this level of the program.
      contracted: path -> the axis (negative) that products contract.
      products: path -> all axes of the first product.
      looked_up: path -> the axis of rows that were looked up in the leaf.
      pair_axes: path -> the axis of size two along which a leaf holds its dense and its quantized self
        (jq4.observe_pair).
    """

    def __init__(
        self, collects: Callable[[str], frozenset[str]], pair_axes: Mapping[str, int] = MappingProxyType({})
    ) -> None:
        self.collects = collects
        self.pair_axes = pair_axes
        self.frame: Frame = {}
        self.contracted: dict[str, int] = {}
        self.products: dict[str, ProductAxes] = {}
        self.looked_up: dict[str, int] = {}
        self._loop_numbers = itertools.count()
        self._depth = 0
        self._widened: dict[int, tuple[Any, Any]] = {}

    @property
    def axes(self) -> dict[str, int]:
        """Path -> the axis to group along: the contracted one; the rows' own for a leaf that is only looked up."""
        return {**self.looked_up, **self.contracted}

    # What the interpreter asks ----------------------------------------------------------------------------------

    def is_special(self, value: Any) -> bool:
        return isinstance(value, Watched)

    def densify(self, value: Watched, eqn: Any, reason: str = "") -> Any:
        return value.array

    def rule(self, eqn: Any, values: Values) -> Values | None:
        apply = watch_rules.RULES.get(eqn.primitive.name)
        return None if apply is None else apply(self, eqn, values)

    def equation(self, eqn: Any, values: Values) -> Values:
        outputs = super().equation(eqn, values)
        if eqn.primitive.name in ("pvary", "pcast"):
            self._widened |= {id(out): (out, value) for out, value in zip(outputs, values, strict=True)}
        return outputs

    def narrowed(self, x: Any) -> Any:
        """x before a shard_map's type check spread it over mesh axes along which it is the same."""
        while id(x) in self._widened:
            x = self._widened[id(x)][1]
        return x

    def compute(self, eqn: Any, values: Values) -> Values:
        """The equation on the arrays."""
        return jax_compat.bind(eqn, self.dense(values, eqn))

    # Statistics -------------------------------------------------------------------------------------------------

    def note_contraction(self, weight: Watched, features: list[Atom], batch: Iterable[Atom] = ()) -> None:
        contracted = {atom.axis for atom in features}
        self.contracted.setdefault(weight.path, max(contracted))
        stacked = {axis for _, axis in weight.loops} | {atom.axis for atom in (*weight.indexed, *batch)}
        axes = ProductAxes(tuple(sorted(contracted)), tuple(sorted(stacked)))
        self.products.setdefault(weight.path, axes)

    def add(self, weight: Watched, batch: list[Atom], features: list[Atom], statistics: WeightStatistics) -> None:
        """Adds statistics [*batch, K] of one product with `weight` to the frame."""
        for index, atom in zip(weight.indices, weight.indexed, strict=True):  # [*B, ...] -> [size, *B, ...], else zeros
            statistics = jax.tree.map(
                lambda leaf, i=index, n=atom.size: jnp.zeros((n, *leaf.shape), leaf.dtype).at[i].set(leaf), statistics
            )
        leading = (*(atom.axis for atom in reversed(weight.indexed)), *(atom.axis for atom in batch))
        key = Key(weight.path, weight.loops, leading, tuple(sorted({atom.axis for atom in features})))
        self.frame[key] = merge(self.frame[key], statistics) if key in self.frame else statistics

    @property
    def is_at_top(self) -> bool:
        """Whether what is added now is the program's own, and no loop's to stack or to carry."""
        return self._depth == 0

    @contextlib.contextmanager
    def new_frame(self) -> Iterator[Frame]:
        outer, self.frame = self.frame, {}
        self._depth += 1
        try:
            yield self.frame
        finally:
            self.frame = outer
            self._depth -= 1

    def run(self, jaxpr: Any, values: Values) -> tuple[Values, Frame]:
        """The outputs of a jaxpr, dense, and what was gathered in it."""
        with self.new_frame() as frame:
            outputs = self.evaluate(jaxpr, values)
        return [value.array if self.is_special(value) else value for value in outputs], frame

    def absorb(self, frame: Frame) -> None:
        for key, statistics in frame.items():
            self.frame[key] = merge(self.frame[key], statistics) if key in self.frame else statistics

    # Calls: nothing is differentiated here, so they are evaluated in place --------------------------------------

    def eval_remat(self, eqn: Any, values: Values) -> Values:
        return self.eval_call(eqn, values)

    def eval_custom_jvp(self, eqn: Any, values: Values) -> Values:
        return self.eval_call(eqn, values)

    def eval_custom_vjp(self, eqn: Any, values: Values) -> Values:
        return self.eval_call(eqn, values)

    # Control flow -----------------------------------------------------------------------------------------------

    def eval_scan(self, eqn: Any, values: Values) -> Values:
        num_consts, num_carry = jax_compat.scan_counts(eqn)
        jaxpr, loop = eqn.params["jaxpr"], next(self._loop_numbers)
        consts, carry, xs = values[:num_consts], values[num_consts:][:num_carry], values[num_consts + num_carry :]
        xs = [x.array if self.is_special(x) and not x.can_be_scanned() else x for x in xs]
        fixed, moving = self.split_carry(eqn, carry, jaxpr, num_consts)

        def body(moving: Values, slices: Values) -> tuple[Values, Values, Frame]:
            slices = [s.slice_of(loop) if self.is_special(s) else s for s in slices]
            outputs, frame = self.run(jaxpr, [*consts, *merge_placed(fixed, moving), *slices])
            kept = [output for place, output in enumerate(outputs[:num_carry]) if place not in fixed]
            return kept, outputs[num_carry:], frame

        gathered = jax.eval_shape(lambda m, x: body(m, _first_slices(x))[2], moving, xs)

        def step(state: Any, slices: Values) -> Any:
            moving, sums = state
            kept, ys, frame = body(moving, slices)
            stacked = {key: value for key, value in frame.items() if _is_sliced(key, loop)}
            return (kept, {key: merge(sums[key], frame[key]) for key in sums}), (ys, stacked)

        zeros = {key: _zeros(value) for key, value in gathered.items() if not _is_sliced(key, loop)}
        options = {name: eqn.params[name] for name in ("length", "reverse", "unroll")}
        (moving, sums), (ys, stacked) = jax.lax.scan(step, (moving, zeros), xs, **options)
        self.absorb(sums)
        self.absorb({_out_of_loop(key): value for key, value in stacked.items()})
        return [*merge_placed(fixed, moving), *ys]

    def eval_while(self, eqn: Any, values: Values) -> Values:
        cond_jaxpr, body_jaxpr = eqn.params["cond_jaxpr"], eqn.params["body_jaxpr"]
        num_cond, num_body = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
        cond_consts, body_consts = values[:num_cond], values[num_cond:][:num_body]
        fixed, moving = self.split_carry(eqn, values[num_cond + num_body :], body_jaxpr, num_body)

        def body(moving: Values) -> tuple[Values, Frame]:
            outputs, frame = self.run(body_jaxpr, [*body_consts, *merge_placed(fixed, moving)])
            return [output for place, output in enumerate(outputs) if place not in fixed], frame

        def step(state: Any) -> Any:
            kept, frame = body(state[0])
            return kept, {key: merge(state[1][key], frame[key]) for key in state[1]}

        def condition(state: Any) -> Any:
            return self.run(cond_jaxpr, [*cond_consts, *merge_placed(fixed, state[0])])[0][0]

        moving, sums = jax.lax.while_loop(
            condition, step, (moving, _zeros(jax.eval_shape(lambda m: body(m)[1], moving)))
        )
        self.absorb(sums)
        return merge_placed(fixed, moving)

    def eval_cond(self, eqn: Any, values: Values) -> Values:
        which, operands, branches = values[0], values[1:], eqn.params["branches"]
        gathered: dict[Key, Any] = {}
        for branch in branches:
            gathered |= jax.eval_shape(lambda *inner, branch=branch: self.run(branch, list(inner))[1], *operands)

        def branch_function(jaxpr: Any) -> Callable[..., Any]:
            def run(*inner: Any) -> Any:
                outputs, frame = self.run(jaxpr, list(inner))
                return outputs, {key: frame[key] if key in frame else _zeros(gathered[key]) for key in gathered}

            return run

        outputs, frame = jax.lax.switch(which, [branch_function(branch) for branch in branches], *operands)
        self.absorb(frame)
        return outputs

    def eval_shard_map(self, eqn: Any, values: Values) -> Values:
        parameters = eqn.params
        manual = frozenset(parameters["newly_manual_axes"])
        layouts = {
            value.path: mesh_axes_of(value, spec)
            for value, spec in zip(values, parameters["in_specs"], strict=True)
            if self.is_special(value)
        }
        specs = tuple(
            jax.tree.map(lambda _, spec=spec: spec, value) if self.is_special(value) else spec
            for value, spec in zip(values, parameters["in_specs"], strict=True)
        )
        keys: list[Key] = []

        def run(*shards: Any) -> tuple[Values, list[WeightStatistics]]:
            shards = tuple(shard.localised() if self.is_special(shard) else shard for shard in shards)
            outputs, frame = self.run(parameters["jaxpr"], list(shards))
            keys[:] = sorted(frame)
            return outputs, [self._over_devices(eqn, frame[key], _named(key, layouts[key.path])) for key in keys]

        def mapped(out_specs: Any, function: Callable[..., Any]) -> Callable[..., Any]:
            return jax.shard_map(
                function, mesh=parameters["mesh"], in_specs=specs, out_specs=out_specs,
                axis_names=set(manual), check_vma=parameters["check_vma"],
            )  # fmt: skip

        # A first trace says what is gathered, so that the second can say how it lies over the mesh.
        out_specs = list(parameters["out_specs"])
        jax.eval_shape(mapped(out_specs, lambda *shards: run(*shards)[0]), *values)
        gathered_specs = [statistics_specs(key, layouts[key.path], self.collects(key.path)) for key in keys]
        outputs, gathered = mapped((out_specs, gathered_specs), run)(*values)
        self.absorb(dict(zip(keys, gathered, strict=True)))
        return outputs

    def _over_devices(self, eqn: Any, statistics: WeightStatistics, named: frozenset[str]) -> WeightStatistics:
        """Sums over the mesh axes that the rows differ along; over all of them where JAX does not track it."""
        manual = frozenset(eqn.params["newly_manual_axes"])
        differing = jax_compat.varying_axes(statistics) if eqn.params["check_vma"] else manual
        return over_devices(statistics, (manual & differing) - named)


def mesh_axes_of(value: Watched, spec: Any) -> dict[int, Any]:
    """Axis of the leaf -> the mesh axes that a PartitionSpec lays it over."""
    entries = (*spec, *[None] * (len(value.shape) - len(spec)))
    return {run[0].axis: entry for run, entry in zip(value.axes, entries, strict=True) if run and entry is not None}


def _named(key: Key, layout: dict[int, Any]) -> frozenset[str]:
    """The mesh axes along which statistics differ because their own axes lie along them."""
    entries = [layout[axis] for axis in (*key.leading, *key.features) if axis in layout]
    return frozenset(name for entry in entries for name in (entry if isinstance(entry, tuple) else (entry,)))


def statistics_specs(key: Key, layout: dict[int, Any], collect: frozenset[str]) -> WeightStatistics:
    """How statistics of a sharded weight lie over the mesh: as the weight's own axes do."""
    leading = [layout.get(axis) for axis in key.leading]
    sharded = [axis for axis in key.features if axis in layout]
    if sharded and ("hessian" in collect or sharded != [key.features[0]]):
        raise JQ4Error(
            f"{key.path}: its inputs are sharded along axis {sharded[-1]} over mesh axis {layout[sharded[-1]]!r}, so "
            "no device sees all of them: a Hessian cannot be collected. Collect without it, or replicate that axis"
        )
    rows = PartitionSpec(*leading, layout.get(key.features[0]))
    return WeightStatistics(
        count=PartitionSpec(*leading),
        absmax=rows if "absmax" in collect else None,
        total=rows if "mean" in collect else None,
        square_total=rows if "mean_square" in collect else None,
        outer_total=PartitionSpec(*leading, None, None) if "hessian" in collect else None,
    )


def _is_sliced(key: Key, loop: int) -> bool:
    return bool(key.loops) and key.loops[-1][0] == loop


def _out_of_loop(key: Key) -> Key:
    (_, axis), loops = key.loops[-1], key.loops[:-1]
    return key._replace(loops=loops, leading=(axis, *key.leading))


def _first_slices(xs: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf[0], xs)


def _zeros(structs: Any) -> Any:
    return jax.tree.map(jax_compat.zeros, structs)
