"""Oracle: the production compiler's program for an H200, in whose text a Mosaic GPU kernel is a custom call or is not.

A program is compiled as for another GPU where only the name of the traced device says so: what must be told apart
before lowering is told apart by it.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.aot import environment, missing

pytestmark = pytest.mark.aot

PROGRAM = """
import json, sys, jax, jax.numpy as jnp, jq4
from benchmarks import aot
from jq4.layouts import prepare

mesh = jax.sharding.AbstractMesh(
    (1,), ("chip",), (jax.sharding.AxisType.Auto,), abstract_device=jax.sharding.AbstractDevice(sys.argv[1], 132, "gpu")
)
placed = jax.sharding.SingleDeviceSharding(aot.compile_device("h200"))


def weight():
    scale, zero = jnp.zeros((8, 512), jnp.bfloat16), jnp.zeros((8, 512), jnp.uint8)
    q = jq4.QArray(jnp.zeros((512, 512), jnp.uint8), scale, zero, group_size=128, dtype="bfloat16")
    return prepare(q, "NVIDIA H200", layout="hopper")


def compiled(function, *args):
    args = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=placed), args)
    with jax.sharding.use_abstract_mesh(mesh):
        program = jax.jit(function).trace(*args).lower(lowering_platforms=("cuda",)).compile()
    kernel = 'custom_call_target="mosaic_gpu' in program.as_text()
    return {"kernel": kernel, "temp": program.memory_analysis().temp_size_in_bytes}


def loss(x, q):
    return jnp.sum(jq4.matmul(x, q).astype(jnp.float32))



q = jax.eval_shape(weight)
wide = jax.tree.map(lambda part: jax.ShapeDtypeStruct((4, *part.shape), part.dtype), q)
rows = lambda m, dtype=jnp.bfloat16: jax.ShapeDtypeStruct((m, 1024), dtype)
found = {
    "few": compiled(jq4.matmul, rows(3), q),
    "float16": compiled(lambda x, q: jq4.matmul(x, jq4.qarray_ops.astype(q, "float16")), rows(16, jnp.float16), q),
    "float32": compiled(lambda x, q: jq4.matmul(x, jq4.qarray_ops.astype(q, "float32")), rows(16, jnp.float32), q),
    "many": compiled(jq4.matmul, rows(4096), q),
    "batch": compiled(jq4.matmul, jax.ShapeDtypeStruct((4, 16, 1024), jnp.bfloat16), wide),
    "gradient": compiled(jax.grad(loss), rows(16), q),
}
print(json.dumps(found))
"""


def found_for(kind):
    if reason := missing("h200"):
        pytest.skip(reason)
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, kind],
        env=environment("h200"), cwd=Path(__file__).parents[1], capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_the_kernel_serves_a_hopper_gpu_up_to_many_rows():
    found = found_for("NVIDIA H200")
    served = {name: one["kernel"] for name, one in found.items()}
    assert served == {
        "few": True, "float16": True, "float32": True, "many": False, "batch": True, "gradient": False
    }  # fmt: skip
    assert found["few"]["temp"] < 2 * 1024 * 512  # nothing dense


def test_other_gpus_get_xla_and_nothing_aborts():
    assert not any(one["kernel"] for one in found_for("NVIDIA B200").values())
