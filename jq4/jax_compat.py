"""Every seam between the versions of JAX that jq4 runs on (0.10.2 to 0.12): nothing else in jq4 asks for a version.

what                     0.10                           0.11                  0.12
scan's operand counts    num_consts, num_carry          ft_in (a FlatTree)    ft_in
a closed jaxpr           ClosedJaxpr(jaxpr, consts)     the same              Jaxpr with .consts
closed_call, core_call   own primitives                 eval_jaxpr            eval_jaxpr
remat, custom_jvp/vjp    own primitives                 the same, or `call_hi_primitive` under jax_remat3,
                                                        jax_custom_vjp3 and jax_custom_jvp3
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.extend
from jax._src import core, source_info_util

# Primitives that call a jaxpr, by every name they have had: what the interpreter does with each is a method of it.
CALL_LIKE = {
    "jit": "eval_jit",
    "pjit": "eval_jit",
    "closed_call": "eval_call",
    "core_call": "eval_call",
    "call": "eval_call",
    "eval_jaxpr": "eval_call",
    "remat": "eval_remat",
    "remat2": "eval_remat",
    "checkpoint": "eval_remat",
    "scan": "eval_scan",
    "while": "eval_while",
    "cond": "eval_cond",
    "custom_jvp_call": "eval_custom_jvp",
    "custom_vjp_call": "eval_custom_vjp",
    "shard_map": "eval_shard_map",
}
_HIGH = "call_hi_primitive"
_HIGH_KINDS = {
    "RematTraced": "eval_remat",
    "CustomJVPTraced": "eval_custom_jvp",
    "CustomVJPTraced": "eval_custom_vjp",
}


def is_tracing() -> bool:
    """Whether a function is being traced, so that what is called now becomes a part of its program."""
    return not core.trace_state_clean()


def trace(function: Callable[..., Any], *arguments: Any) -> tuple[Any, Any]:
    """The closed jaxpr of `function` and the tree of its outputs' shapes; arguments are arrays, avals or structs."""
    return jax.make_jaxpr(function, return_shape=True)(*arguments)


def stand_in(like: Any, shape: Sequence[int], dtype: Any) -> Any:
    """A ShapeDtypeStruct of another shape and dtype that varies and is sharded over the mesh as `like` does."""
    aval: Any = like if isinstance(like, jax.ShapeDtypeStruct) else jax.typeof(like)
    extra = {}
    varying = getattr(aval, "manual_axis_type", None)
    if varying is not None:
        extra["manual_axis_type"] = varying
    sharding = getattr(aval, "sharding", None)
    if sharding is not None and _is_explicit(sharding):
        extra["sharding"] = sharding
    return jax.ShapeDtypeStruct(tuple(shape), dtype, **extra)


def _is_explicit(sharding: Any) -> bool:
    mesh = getattr(sharding, "mesh", None)
    return mesh is not None and not mesh.empty and any("Explicit" in str(kind) for kind in mesh.axis_types)


def open_jaxpr(jaxpr: Any) -> tuple[Any, Sequence[Any]]:
    """A jaxpr, closed or not, as (jaxpr with eqns, constvars, invars, outvars; the values of its constvars)."""
    return getattr(jaxpr, "jaxpr", jaxpr), getattr(jaxpr, "consts", ())


def constants_of(jaxpr: Any) -> list[Any]:
    """The arrays that a program closes over, and those that the programs within it do, in order."""
    opened, held = open_jaxpr(jaxpr)
    found = list(held)
    for eqn in opened.eqns:
        found += [atom.val for atom in eqn.invars if is_literal(atom) and jax.numpy.ndim(atom.val)]
        for inner in jax.tree.leaves(list(parameters_of(eqn).values())):
            found += constants_of(inner) if hasattr(open_jaxpr(inner)[0], "eqns") else []
    return found


def method_of(eqn: Any) -> str | None:
    """The interpreter's method for a call-like equation; None for any other."""
    name = eqn.primitive.name
    return _HIGH_KINDS.get(type(eqn.params["_prim"]).__name__) if name == _HIGH else CALL_LIKE.get(name)


def called_jaxpr(eqn: Any) -> Any:
    """The jaxpr that an equation calls once, on all its operands."""
    if eqn.primitive.name == _HIGH:
        prim = eqn.params["_prim"]
        if "jaxpr" in prim.params:
            return prim.params["jaxpr"]

        def expand(*flat: Any) -> list[Any]:
            return jax.tree.leaves(prim.expand(*jax.tree.unflatten(prim.in_tree, flat)))

        return trace(expand, *[variable.aval for variable in eqn.invars])[0]
    return eqn.params["jaxpr"] if "jaxpr" in eqn.params else eqn.params["call_jaxpr"]


def parameters_of(eqn: Any) -> dict[str, Any]:
    """An equation's parameters; a high primitive keeps them on an object."""
    return eqn.params["_prim"].params if eqn.primitive.name == _HIGH else eqn.params


def scan_counts(eqn: Any) -> tuple[int, int]:
    """How many of a scan's operands are constants, and how many are carried."""
    if "ft_in" not in eqn.params:
        return eqn.params["num_consts"], eqn.params["num_carry"]
    consts, carry, _ = eqn.params["ft_in"].unpack()
    return len(list(consts)), len(list(carry))


def bind(eqn: Any, values: Sequence[Any]) -> list[Any]:
    """The equation itself, applied to other values."""
    out = eqn.primitive.bind(*values, **eqn.primitive.get_bind_params(eqn.params))
    return list(out) if eqn.primitive.multiple_results else [out]


@contextlib.contextmanager
def context_of(eqn: Any) -> Iterator[None]:
    """The equation's own named scopes, source lines and settings (mesh, metadata) while it is evaluated."""
    stack = source_info_util.current_name_stack() + eqn.source_info.name_stack
    with source_info_util.user_context(eqn.source_info.traceback, name_stack=stack), eqn.ctx.manager:
        yield


def may_have_effects(eqn: Any) -> bool:
    """Whether an equation may matter though nobody uses its outputs: declared effects, or references it may write."""
    return bool(eqn.effects) or not eqn.outvars or any(hasattr(atom.aval, "inner_aval") for atom in eqn.invars)


def is_literal(atom: Any) -> bool:
    return isinstance(atom, jax.extend.core.Literal)


def varying_axes(values: Any) -> frozenset[str]:
    """The manual mesh axes along which any array of a tree is known to differ."""
    axes: frozenset[str] = frozenset()
    for leaf in jax.tree.leaves(values):
        kind = _manual_axes(leaf if isinstance(leaf, jax.ShapeDtypeStruct) else jax.typeof(leaf))
        axes |= frozenset(getattr(kind, "varying", kind) or ())
    return axes


def zeros(struct: Any) -> Any:
    """Zeros of a ShapeDtypeStruct's shape and dtype, which differ along the same manual mesh axes."""
    array = jax.numpy.zeros(struct.shape, struct.dtype)
    varying = tuple(sorted(varying_axes(struct)))
    return jax.lax.pcast(array, varying, to="varying") if varying else array


def _manual_axes(aval: Any) -> Any:
    return getattr(aval, "manual_axis_type", None) or getattr(aval, "mat", None) or getattr(aval, "vma", None)
