"""The form for the platform that a program is lowered for, and a clear error where it has none.

`jax.lax.platform_dependent` chooses while a program is lowered: one that is exported or compiled for a TPU on a CPU
machine holds the TPU's form. Where no form is for the platform JAX says that a rule for one of its own primitives is
missing. So the other platforms get a form as well, the first one behind an identity that refuses to be lowered; nothing
but that one knows the platform, as tracing does not.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.extend
from jax import lax
from jax.interpreters import batching, mlir

Refusal = Callable[[Sequence[str]], Exception]

_OURS = {"cuda": "gpu", "rocm": "gpu"}
_refused = jax.extend.core.Primitive("refused_platform")


def by_lowering_platform(forms: Mapping[str, Callable[..., Any]], *args: Any, refusal: Refusal) -> Any:
    """The form of the platform being lowered for; "gpu" is cuda and rocm. Others take the CPU's, where there is one.

    Args:
      forms: functions of `args` by platform: "cpu", "tpu", "gpu".
      args: arrays, and trees of them; the first is an array.
      refusal: the error for the platforms that a program is lowered for where no form is for one of them; hashable.
    """
    per = {}
    if "tpu" in forms:
        per["tpu"] = forms["tpu"]
    if "gpu" in forms:
        per["cuda"] = per["rocm"] = forms["gpu"]
    if "cpu" in forms and not per:
        return forms["cpu"](*args)
    if "cpu" in forms:
        return lax.platform_dependent(*args, **per, default=forms["cpu"])
    form = next(iter(forms.values()))

    def refused(x: Any, *rest: Any) -> Any:
        return form(_refused.bind(x, refusal=refusal), *rest)

    return lax.platform_dependent(*args, **per, default=refused)


def _lower(ctx: Any, x: Any, *, refusal: Refusal) -> Any:
    names: Sequence[str] = ctx.platforms or ctx.module_context.platforms
    raise refusal([_OURS.get(name, name) for name in names])


_refused.def_impl(lambda x, **_: x)
_refused.def_abstract_eval(lambda x, **_: x)
mlir.register_lowering(_refused, _lower)
batching.defvectorized(_refused)
