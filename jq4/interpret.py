"""A jaxpr interpreter for functions of special values, through every call-like primitive. Knows no quantization.

An equation none of whose inputs is special is bound again untouched, so what is not of interest lowers to what it
always lowered to. One with special inputs is, in this order,

    call-like   (jit, remat, scan, while, cond, custom_jvp, custom_vjp, shard_map): recursed into through JAX's public
                function of that name, the special values passing as the pytrees they are
    ruled       `rule(eqn, values)` returned the outputs, special or not
    left        every special input goes through `densify`, and the equation is bound

A subclass says what is special (`is_special`; such a value is a registered pytree), what the rules are, and how a
special value turns into the array it stands for. It may override any `eval_*`: each takes an equation and the list of
its input values, and returns the list of its outputs.

Equations whose results nobody uses are skipped, and a value is dropped after its last use.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jq4 import jax_compat

Values = list[Any]


class Interpreter:
    """Evaluates jaxprs over arrays and special values."""

    # What a subclass says -------------------------------------------------------------------------------------

    def is_special(self, value: Any) -> bool:
        """Whether `value` is not an array but a pytree that stands for one."""
        raise NotImplementedError

    def rule(self, eqn: Any, values: Values) -> Values | None:
        """The outputs of an equation with at least one special input; None where there is no rule."""
        raise NotImplementedError

    def densify(self, value: Any, eqn: Any, reason: str = "") -> Any:
        """The array that a special value stands for, because `eqn` needs it."""
        raise NotImplementedError

    def before_slicing(self, value: Any, eqn: Any) -> Any:
        """A special value in the form whose every leaf can be cut along its leading axis (for scan), or densified."""
        return value

    def enter_shard_map(self, value: Any, spec: Any, mesh: Any) -> tuple[Any, Any]:
        """A special value as a shard_map can cut it, and the PartitionSpecs of its leaves; `spec` is the array's."""
        return value, jax.tree.map(lambda _: spec, value)

    def inside_loop(self, value: Any) -> Any:
        """A special value of which a scan has just cut the leaves along their leading axis."""
        return value

    def leaving_loop(self, value: Any, eqn: Any) -> Any:
        """A special value of a pass of a scan, whose leaves the scan will stack, or densified."""
        return value

    def within(self, jaxpr: Any, values: Sequence[Any]) -> tuple[Values, Any]:
        """The outputs of a program inside remat or a scan, and what leaves it besides: a pytree of arrays, or None."""
        return self.evaluate(jaxpr, values), None

    def absorb(self, found: Any, /) -> None:
        """Takes up what left such a program besides its outputs; out of a scan it comes stacked."""

    def inside_shard_map(self, value: Any) -> Any:
        """A special value of which a shard_map has just cut the leaves."""
        return value

    def for_tangents(self) -> "Interpreter":
        """The interpreter of a tangent rule, whose operations JAX must be able to transpose."""
        return self

    def constrain(self, value: Any, sharding: Any) -> Any:
        """A value, special or not, under a sharding that an inner jit asked for."""
        return value if self.is_special(value) else jax.lax.with_sharding_constraint(value, sharding)

    # The loop -------------------------------------------------------------------------------------------------

    def evaluate(self, jaxpr: Any, values: Sequence[Any]) -> Values:
        """The outputs of a jaxpr (closed or without constants) for the values of its inputs."""
        jaxpr, consts = jax_compat.open_jaxpr(jaxpr)
        environment: dict[Any, Any] = dict(zip(jaxpr.constvars, consts, strict=True))
        environment |= dict(zip(jaxpr.invars, values, strict=True))

        def read(atom: Any) -> Any:
            return atom.val if jax_compat.is_literal(atom) else environment[atom]

        for eqn, dying in _live_equations(jaxpr):
            with jax_compat.context_of(eqn):
                outputs = self.equation(eqn, [read(atom) for atom in eqn.invars])
            environment.update(zip(eqn.outvars, outputs, strict=True))
            for variable in dying:
                environment.pop(variable, None)
        return [read(atom) for atom in jaxpr.outvars]

    def equation(self, eqn: Any, values: Values) -> Values:
        """The outputs of one equation."""
        if not any(map(self.is_special, values)):
            return jax_compat.bind(eqn, values)
        method = jax_compat.method_of(eqn)
        if method is not None:
            return getattr(self, method)(eqn, values)
        outputs = self.rule(eqn, values)
        return jax_compat.bind(eqn, self.dense(values, eqn)) if outputs is None else outputs

    def dense(self, values: Sequence[Any], eqn: Any, reason: str = "") -> Values:
        """The values with every special one densified."""
        return [self.densify(value, eqn, reason) if self.is_special(value) else value for value in values]

    # Calls ----------------------------------------------------------------------------------------------------

    def eval_call(self, eqn: Any, values: Values) -> Values:
        """A plain call: evaluated in place."""
        return self.evaluate(jax_compat.called_jaxpr(eqn), values)

    def eval_jit(self, eqn: Any, values: Values) -> Values:
        """An inner jit is evaluated in place; the shardings that it fixed stay."""
        values = [self._constrained(*pair) for pair in zip(values, eqn.params["in_shardings"], strict=True)]
        outputs = self.evaluate(eqn.params["jaxpr"], values)
        return [self._constrained(*pair) for pair in zip(outputs, eqn.params["out_shardings"], strict=True)]

    def _constrained(self, value: Any, sharding: Any) -> Any:
        return self.constrain(value, sharding) if isinstance(sharding, jax.sharding.Sharding) else value

    def eval_remat(self, eqn: Any, values: Values) -> Values:
        parameters, jaxpr = jax_compat.parameters_of(eqn), jax_compat.called_jaxpr(eqn)
        if parameters.get(
            "differentiated"
        ):  # already the backward pass: only keep it from being merged with the forward
            return self.evaluate(jaxpr, jax.lax.optimization_barrier(values))
        remat = jax.checkpoint(
            lambda *inner: self.within(jaxpr, inner),
            prevent_cse=parameters.get("prevent_cse", True),
            policy=parameters["policy"],
        )
        outputs, found = remat(*values)
        self.absorb(found)
        return outputs

    def eval_cond(self, eqn: Any, values: Values) -> Values:
        """Special outputs must be the same in every branch: those that pass through unchanged do not enter the cond."""
        which, operands = values[0], values[1:]
        branches = eqn.params["branches"]
        sources = [forwarded_inputs(branch) for branch in branches]
        passing = {
            place: operands[source]
            for place, source in enumerate(sources[0])
            if source is not None
            and all(other[place] == source for other in sources)
            and self.is_special(operands[source])
        }

        def branch_function(jaxpr: Any) -> Callable[..., Values]:
            def run(*inner: Any) -> Values:
                outputs = self.evaluate(jaxpr, inner)
                kept = [output for place, output in enumerate(outputs) if place not in passing]
                return self.dense(kept, eqn, "a branch of the cond returns it")

            return run

        functions = [branch_function(branch) for branch in branches]
        if platforms := eqn.params.get("branches_platforms"):
            outputs = _by_platform(platforms, functions, operands)
        else:
            outputs = jax.lax.switch(which, functions, *operands)
        return merge_placed(passing, outputs)

    # Loops ----------------------------------------------------------------------------------------------------

    def eval_scan(self, eqn: Any, values: Values) -> Values:
        num_consts, num_carry = jax_compat.scan_counts(eqn)
        jaxpr = eqn.params["jaxpr"]
        consts, carry, xs = values[:num_consts], values[num_consts:][:num_carry], values[num_consts + num_carry :]
        xs = [self.before_slicing(x, eqn) if self.is_special(x) else x for x in xs]
        fixed, moving = self.split_carry(eqn, carry, jaxpr, num_consts)

        def body(moving: Values, slices: Values) -> tuple[Values, tuple[Values, Any]]:
            slices = [self.inside_loop(each) if self.is_special(each) else each for each in slices]
            outputs, found = self.within(jaxpr, [*consts, *merge_placed(fixed, moving), *slices])
            kept = [output for place, output in enumerate(outputs[:num_carry]) if place not in fixed]
            ys = [self.leaving_loop(y, eqn) if self.is_special(y) else y for y in outputs[num_carry:]]
            return self.dense(kept, eqn, "the scan carries it on changed"), (ys, found)

        options = {name: eqn.params[name] for name in ("length", "reverse", "unroll")}
        moving, (ys, found) = jax.lax.scan(body, moving, xs, **options)
        self.absorb(found)
        return [*merge_placed(fixed, moving), *ys]

    def eval_while(self, eqn: Any, values: Values) -> Values:
        cond_jaxpr, body_jaxpr = eqn.params["cond_jaxpr"], eqn.params["body_jaxpr"]
        num_cond, num_body = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
        cond_consts, body_consts = values[:num_cond], values[num_cond:][:num_body]
        fixed, moving = self.split_carry(eqn, values[num_cond + num_body :], body_jaxpr, num_body)

        def condition(moving: Values) -> Any:
            return self.evaluate(cond_jaxpr, [*cond_consts, *merge_placed(fixed, moving)])[0]

        def body(moving: Values) -> Values:
            outputs = self.evaluate(body_jaxpr, [*body_consts, *merge_placed(fixed, moving)])
            kept = [output for place, output in enumerate(outputs) if place not in fixed]
            return self.dense(kept, eqn, "the loop carries it on changed")

        return merge_placed(fixed, jax.lax.while_loop(condition, body, moving))

    def split_carry(self, eqn: Any, carry: Values, body: Any, before: int) -> tuple[dict[int, Any], Values]:
        """Special values that the body carries on unchanged, by their place; and the rest of the carry, dense."""
        sources = forwarded_inputs(body)
        fixed = {i: value for i, value in enumerate(carry) if self.is_special(value) and sources[i] == before + i}
        moving = [value for i, value in enumerate(carry) if i not in fixed]
        return fixed, self.dense(moving, eqn, "the loop carries it on changed")

    # Custom derivatives -----------------------------------------------------------------------------------------

    def eval_custom_jvp(self, eqn: Any, values: Values) -> Values:
        """The user's rule is traced on dense stand-ins and evaluated on the special values."""
        jaxpr, moving = jax_compat.called_jaxpr(eqn), self._differentiable(eqn, values)
        if not moving:
            return self.evaluate(jaxpr, values)

        @jax.custom_jvp
        def call(*inner: Any) -> Values:
            return self.evaluate(jaxpr, inner)

        @call.defjvp
        def _(primals: Values, tangents: Values) -> tuple[Values, Values]:
            def dense_jvp(dense: Values, dense_tangents: Values) -> Any:
                return jax.jvp(_function_of(eqn, dense, moving), [dense[i] for i in moving], dense_tangents)

            rule, out = jax_compat.trace(dense_jvp, _avals(eqn), [eqn.invars[i].aval for i in moving])
            outputs = self.for_tangents().evaluate(rule, [*primals, *(tangents[i] for i in moving)])
            num_out = len(jax.tree.leaves(out[0]))
            return outputs[:num_out], self.dense(outputs[num_out:], eqn)

        return call(*values)

    def eval_custom_vjp(self, eqn: Any, values: Values) -> Values:
        """The user's forward and backward rules, traced on dense stand-ins and evaluated on the special values.

        Residuals that are inputs stay special. Special inputs and integers get no cotangent.
        """
        jaxpr, moving = jax_compat.called_jaxpr(eqn), self._differentiable(eqn, values)
        if not moving:
            return self.evaluate(jaxpr, values)

        @jax.custom_vjp
        def call(*inner: Any) -> Values:
            return self.evaluate(jaxpr, inner)

        def forward(*inner: Any) -> tuple[Values, Any]:
            def dense_forward(*dense: Any) -> Any:
                return jax.vjp(_function_of(eqn, list(dense), moving), *[dense[i] for i in moving])

            rule, (out, pullback) = jax_compat.trace(dense_forward, *_avals(eqn))
            outputs = self.evaluate(rule, inner)
            num_out = len(jax.tree.leaves(out))
            return outputs[:num_out], jax.tree.unflatten(jax.tree.structure(pullback), outputs[num_out:])

        def backward(pullback: Any, cotangents: Values) -> tuple[Any, ...]:
            residuals, structure = jax.tree.flatten(pullback, is_leaf=self.is_special)

            def dense_backward(dense: Values, dense_cotangents: Values) -> Any:
                return jax.tree.unflatten(structure, dense)(dense_cotangents)

            stand_ins = [self.aval(residual) for residual in residuals]
            rule, _ = jax_compat.trace(dense_backward, stand_ins, [variable.aval for variable in eqn.outvars])
            gradients = self.dense(self.evaluate(rule, [*residuals, *cotangents]), eqn)
            by_place = dict(zip(moving, gradients, strict=True))
            return tuple(by_place.get(place) for place in range(len(values)))

        call.defvjp(forward, backward)
        return call(*values)

    def aval(self, value: Any) -> Any:
        """What a trace is given for a value: the array itself, or a struct of what a special one stands for."""
        return (
            jax_compat.stand_in(jax.tree.leaves(value)[0], value.shape, value.dtype)
            if self.is_special(value)
            else value
        )

    def _differentiable(self, eqn: Any, values: Values) -> list[int]:
        return [
            place
            for place, (variable, value) in enumerate(zip(eqn.invars, values, strict=True))
            if not self.is_special(value) and jnp.issubdtype(variable.aval.dtype, jnp.inexact)
        ]

    # Meshes -----------------------------------------------------------------------------------------------------

    def eval_shard_map(self, eqn: Any, values: Values) -> Values:
        parameters = eqn.params
        mesh = parameters["mesh"]
        entering = [
            self.enter_shard_map(value, spec, mesh) if self.is_special(value) else (value, spec)
            for value, spec in zip(values, parameters["in_specs"], strict=True)
        ]

        def run(*shards: Any) -> Values:
            shards = tuple(self.inside_shard_map(each) if self.is_special(each) else each for each in shards)
            return self.dense(self.evaluate(parameters["jaxpr"], shards), eqn, "the shard_map returns it")

        mapped = jax.shard_map(
            run, mesh=mesh, in_specs=tuple(specs for _, specs in entering), out_specs=list(parameters["out_specs"]),
            axis_names=set(parameters["newly_manual_axes"]), check_vma=parameters["check_vma"],
        )  # fmt: skip
        return mapped(*(value for value, _ in entering))


def forwarded_inputs(jaxpr: Any) -> list[int | None]:
    """For each output of a jaxpr, the input that it is, unchanged, or None."""
    jaxpr, _ = jax_compat.open_jaxpr(jaxpr)
    source: dict[Any, int] = {variable: place for place, variable in enumerate(jaxpr.invars)}
    for eqn in jaxpr.eqns:
        for out, place in zip(eqn.outvars, _forwarded_operands(eqn), strict=True):
            if place is not None and (operand := eqn.invars[place]) in source:
                source[out] = source[operand]
    return [None if jax_compat.is_literal(atom) else source.get(atom) for atom in jaxpr.outvars]


def _forwarded_operands(eqn: Any) -> list[int | None]:
    """For each output of an equation, the operand that it is, unchanged, or None."""
    method, parameters = jax_compat.method_of(eqn), eqn.params
    if method in ("eval_jit", "eval_call", "eval_remat"):
        places = forwarded_inputs(jax_compat.called_jaxpr(eqn))
        return [
            place if place is not None and not jax_compat.is_literal(eqn.invars[place]) else None for place in places
        ]
    if method == "eval_scan":
        num_consts, num_carry = jax_compat.scan_counts(eqn)
        return _unmoved(eqn, forwarded_inputs(parameters["jaxpr"])[:num_carry], num_consts, num_consts)
    if method == "eval_while":
        consts = parameters["body_nconsts"]
        return _unmoved(eqn, forwarded_inputs(parameters["body_jaxpr"]), consts, parameters["cond_nconsts"] + consts)
    if method == "eval_cond":
        each = [forwarded_inputs(branch) for branch in parameters["branches"]]
        return [
            1 + first if first is not None and all(first == other for other in rest) and
            not jax_compat.is_literal(eqn.invars[1 + first]) else None
            for first, *rest in zip(*each, strict=True)
        ]  # fmt: skip
    return [None] * len(eqn.outvars)


def _unmoved(eqn: Any, sources: list[int | None], before: int, offset: int) -> list[int | None]:
    kept: list[int | None] = [
        offset + place if source == before + place and not jax_compat.is_literal(eqn.invars[offset + place]) else None
        for place, source in enumerate(sources)
    ]
    return kept + [None] * (len(eqn.outvars) - len(kept))


def _live_equations(jaxpr: Any) -> list[tuple[Any, list[Any]]]:
    """The equations whose results are used or that have effects, each with the variables that die with it."""
    needed = {atom for atom in jaxpr.outvars if not jax_compat.is_literal(atom)}
    live = []
    for eqn in reversed(jaxpr.eqns):
        if needed.isdisjoint(eqn.outvars) and not jax_compat.may_have_effects(eqn):
            continue
        operands = {atom for atom in eqn.invars if not jax_compat.is_literal(atom)}
        unused = [variable for variable in eqn.outvars if variable not in needed]
        live.append((eqn, [*(operands - needed), *unused]))
        needed |= operands
    return live[::-1]


def _by_platform(platforms: Any, functions: list[Callable[..., Values]], operands: Values) -> Values:
    """A cond that JAX decides at lowering, by the platform: each branch's platforms, None for all the others."""
    chosen = {name: function for names, function in zip(platforms, functions, strict=True) for name in names or ()}
    others = [function for names, function in zip(platforms, functions, strict=True) if names is None]
    return jax.lax.platform_dependent(*operands, default=others[0] if others else None, **chosen)


def merge_placed(placed: dict[int, Any], rest: Sequence[Any]) -> Values:
    """The values of `rest` in order, with `placed` at its places."""
    remaining = iter(rest)
    return [placed[i] if i in placed else next(remaining) for i in range(len(placed) + len(rest))]


def _avals(eqn: Any) -> Values:
    return [variable.aval for variable in eqn.invars]


def _function_of(eqn: Any, dense: Values, moving: list[int]) -> Callable[..., Values]:
    """The equation as a function of some of its inputs, the others being fixed."""

    def function(*inputs: Any) -> Values:
        merged = list(dense)
        for place, value in zip(moving, inputs, strict=True):
            merged[place] = value
        return jax_compat.bind(eqn, merged)

    return function
