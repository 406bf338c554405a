"""Oracle: what this process (CPUs) computes, and the text of the error where a name has no form for CPUs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.grouped_int4_matmul import grouped_int4_matmul
from pallas_kernels.int4_matmul import PackedSpec, UnsupportedError, int4_matmul
from pallas_kernels.lowering_platform import by_lowering_platform

SPEC = PackedSpec(128, group_size=32, layout="tpu")
X = jnp.ones((3, 128), jnp.bfloat16)
CODES, SCALE = jnp.zeros((2, 16, 128), jnp.int32), jnp.ones((2, 4, 1, 128), jnp.bfloat16)


def product(x, implementation):
    return int4_matmul(x, CODES[0], SCALE[0], spec=SPEC, implementation=implementation)


def ragged(x, implementation):
    sizes = jnp.asarray((1, 2))
    return grouped_int4_matmul(x, CODES, SCALE, group_sizes=sizes, spec=SPEC, implementation=implementation)


def refuse(platforms):
    return UnsupportedError(f"nothing for {platforms}")


@pytest.mark.parametrize(
    "transformed",
    [
        lambda f: f,
        jax.jit,
        lambda f: jax.grad(lambda x: jnp.sum(f(x).astype(jnp.float32))),
        lambda f: lambda x: jax.vmap(f)(x[None]),
    ],
    ids=["eager", "jit", "grad", "vmap"],
)
def test_a_kernel_named_on_another_platform_is_refused_in_our_words(transformed):
    with pytest.raises(UnsupportedError, match=r"no implementation of 'tpu' takes .*: tpu runs on tpu, not on cpu"):
        transformed(lambda x: product(x, "tpu"))(X)
    with pytest.raises(UnsupportedError, match=r"no implementation of \('tpu', 'mosaic_gpu'\) takes .*not on cpu"):
        transformed(lambda x: product(x, ("tpu", "mosaic_gpu")))(X)
    with pytest.raises(UnsupportedError, match=r"tpu of grouped_int4_matmul runs on tpu, .* is lowered for cpu"):
        transformed(lambda x: ragged(x, "tpu"))(X)


@pytest.mark.parametrize("function", [product, ragged])
def test_for_its_own_platform_it_is_lowered_on_any_machine(function):
    traced = jax.jit(lambda x: function(x, "tpu")).trace(X)
    assert "tpu_custom_call" in traced.lower(lowering_platforms=("tpu",)).as_text()
    with pytest.raises(UnsupportedError):
        traced.lower(lowering_platforms=("cuda",))


def test_the_form_of_the_platform_is_taken_and_the_cpus_by_all_others():
    def run(*forms):
        known = {"cpu": lambda x: x + 1, "tpu": lambda x: x + 2, "gpu": lambda x: x + 3}
        return jax.jit(lambda x: by_lowering_platform({form: known[form] for form in forms}, x, refusal=refuse))

    assert run("cpu")(1) == run("tpu", "cpu")(1) == run("gpu", "tpu", "cpu")(1) == 2
    exported = jax.export.export(run("gpu", "tpu", "cpu"), platforms=("cpu", "tpu", "cuda"))(1)
    np.testing.assert_array_equal(exported.call(1), 2)
    with pytest.raises(UnsupportedError, match=r"nothing for \['cpu'\]"):
        run("tpu", "gpu")(1)
    with pytest.raises(UnsupportedError, match=r"nothing for \['gpu'\]"):
        run("tpu").trace(1).lower(lowering_platforms=("cuda",))
