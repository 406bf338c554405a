"""One computation with two forms: a kernel where a program runs on one device, XLA operations where XLA partitions it.

XLA's partitioner cuts operations that it knows; a kernel it refuses ("Mosaic kernels cannot be automatically
partitioned"). Whether a program will be partitioned is known when it is lowered, not when it is traced, so both forms
are traced and one is lowered, as `jax.lax.platform_dependent` does for platforms. In the body of a `jax.shard_map`
over all mesh axes nothing is left to partition: the kernel. On a mesh with explicit axes types carry shardings, which
a kernel cannot tell: XLA's operations.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.extend
from jax.interpreters import ad, batching, mlir

_either = jax.extend.core.Primitive("alone_or_partitioned")
_either.multiple_results = True


class _Form:
    """A jaxpr as one value. JAX 0.12 asks a primitive that has jaxprs for more than is needed: lowering traces anew."""

    def __init__(self, function: Callable[..., Any], args: Sequence[Any]) -> None:
        self.jaxpr = jax.make_jaxpr(function)(*args)

    def __call__(self, *args: Any) -> Any:
        return jax.extend.core.jaxpr_as_fun(self.jaxpr)(*args)


def alone_or_partitioned(alone: Callable[..., Any], partitioned: Callable[..., Any]) -> Callable[..., Any]:
    """A function of arrays that is `alone` on one device, and `partitioned` in a program that XLA cuts for several."""

    def choose(*args: Any) -> Any:
        mesh = jax.sharding.get_abstract_mesh()
        if not mesh.empty and set(mesh.manual_axes) == set(mesh.axis_names):
            return alone(*args)
        if not mesh.empty and mesh.size > 1 and any(kind == jax.sharding.AxisType.Explicit for kind in mesh.axis_types):
            return partitioned(*args)
        leaves, structure = jax.tree.flatten(args)

        def flat(form: Callable[..., Any]) -> _Form:
            return _Form(lambda *leaves: jax.tree.leaves(form(*jax.tree.unflatten(structure, leaves))), leaves)

        out = _either.bind(*leaves, alone=flat(alone), partitioned=flat(partitioned))
        return jax.tree.unflatten(jax.tree.structure(jax.eval_shape(alone, *args)), out)

    return choose


def _run(*args: Any, alone: _Form, partitioned: _Form) -> list[Any]:
    del partitioned
    return alone(*args)


def _lower(ctx: Any, *args: Any, alone: _Form, partitioned: _Form) -> Any:
    form = partitioned if _is_partitioned(ctx.module_context.axis_context) else alone
    return mlir.lower_fun(form, multiple_results=True)(ctx, *args)


def _is_partitioned(context: Any) -> bool:
    """Whether anything is left to XLA's partitioner: several devices, and axes that no `shard_map` around has taken."""
    if hasattr(context, "num_devices"):
        return context.num_devices > 1
    manual = getattr(context, "manual_axes", frozenset())
    return bool(manual) and manual | set(context.mesh.manual_axes) != set(context.mesh.axis_names)


def _batch(
    args: Sequence[Any], dims: Sequence[Any], *, alone: _Form, partitioned: _Form
) -> tuple[list[Any], list[int]]:
    forms = {"alone": alone, "partitioned": partitioned}
    out = _either.bind(*args, **{name: _Form(jax.vmap(form, tuple(dims)), args) for name, form in forms.items()})
    return out, [0] * len(out)


def _differentiate(
    primals: Sequence[Any], tangents: Sequence[Any], *, alone: _Form, partitioned: _Form
) -> tuple[list[Any], list[Any]]:
    """By XLA's form: a kernel has no derivative but the one that its own caller gives it."""
    del alone
    return jax.jvp(partitioned, list(primals), [ad.instantiate_zeros(tangent) for tangent in tangents])


_either.def_impl(_run)
_either.def_abstract_eval(lambda *_, alone, partitioned: list(alone.jaxpr.out_avals))
mlir.register_lowering(_either, _lower)
batching.primitive_batchers[_either] = _batch
ad.primitive_jvps[_either] = _differentiate
