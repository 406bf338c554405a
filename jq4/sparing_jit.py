"""`sparing_jit`: `jax.jit` for programs that run a model's own layers where memory is what there is little of.

XLA's CPU compiler orders a program so that much of it can run side by side. Of a block of bf16 weights it makes float32
first, of all of them, and then multiplies: twice the block again. Ordered for memory, each is made when its product
comes (a block of a 7B model: 0.4 of its float32 bytes in temporaries, and not 1.0; compiled for JAX 0.10.2). The values
are the same. Other compilers order for memory by themselves; they do not look at this option.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax

from jq4.jax_compat import is_tracing

_OPTIONS: Any = {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"}


def sparing_jit(function: Callable[..., Any]) -> Callable[..., Any]:
    """`jax.jit(function)`, ordered for memory; in a trace, whose own program it becomes a part of, just that."""
    alone, within = jax.jit(function, compiler_options=_OPTIONS), jax.jit(function)

    @functools.wraps(function)
    def call(*args: Any) -> Any:
        return (within if is_tracing() else alone)(*args)

    return call
