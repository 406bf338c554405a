"""Oracle: the production compiler's program for an H200, in whose text a Mosaic GPU kernel is a custom call or is not.

A program is compiled as for another GPU where only the name of the traced device says so: what must be told apart
before lowering is told apart by it.
"""

import json
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from benchmarks.aot import DEVICE_KINDS, environment, missing
from pallas_kernels.int4_matmul.gpu_chips import FIRST_WITH_MMA

pytestmark = pytest.mark.aot

PROGRAM = """
import json, sys, jax, jax.numpy as jnp, jq4
from benchmarks import aot
from jq4.layouts import prepare
from jq4.matmul import ragged_dot

kind, target, *names = sys.argv[1:]  # a target that is not h200 tells its compute capability
placed = jax.sharding.SingleDeviceSharding(aot.compile_device(target))


def weight(bits=4):
    scale, zero = jnp.zeros((8, 512), jnp.bfloat16), jnp.zeros((8, 512), jnp.uint8)
    codes = jnp.zeros((128 * bits, 512), jnp.uint8)
    q = jq4.QArray(codes, scale, zero, group_size=128, dtype="bfloat16", format=f"int{bits}")
    return prepare(q, "NVIDIA H200", layout="hopper")


def traced():
    if target != "h200":
        return aot.traced_for_gpu(target, 108)
    described, auto = jax.sharding.AbstractDevice(kind, 132, "gpu"), (jax.sharding.AxisType.Auto,)
    return jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((1,), ("chip",), auto, abstract_device=described))


def compiled(function, *args):
    args = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=placed), args)
    jax.clear_caches()
    with traced():
        program = jax.jit(function).trace(*args).lower(lowering_platforms=("cuda",)).compile()
    kernel = 'custom_call_target="mosaic_gpu' in program.as_text()
    return {"kernel": kernel, "temp": program.memory_analysis().temp_size_in_bytes}


def loss(x, q):
    return jnp.sum(jq4.matmul(x, q).astype(jnp.float32))


def ragged(x, q):
    return ragged_dot(x, q, jnp.full(4, 3, jnp.int32))


def ragged_loss(x, q):
    return jnp.sum(ragged(x, q).astype(jnp.float32))


q = jax.eval_shape(weight)
stack = jax.tree.map(lambda part: jax.ShapeDtypeStruct((4, *part.shape), part.dtype), q)
rows = lambda m, dtype=jnp.bfloat16: jax.ShapeDtypeStruct((m, 1024), dtype)
programs = {
    "few": (jq4.matmul, rows(3), q),
    "float16": (lambda x, q: jq4.matmul(x, jq4.qarray_ops.astype(q, "float16")), rows(16, jnp.float16), q),
    "float32": (lambda x, q: jq4.matmul(x, jq4.qarray_ops.astype(q, "float32")), rows(16, jnp.float32), q),
    "eight bits": (jq4.matmul, rows(3), jax.eval_shape(lambda: weight(8))),
    "many": (jq4.matmul, rows(4096), q),
    "batch": (jq4.matmul, jax.ShapeDtypeStruct((4, 16, 1024), jnp.bfloat16), stack),
    "experts": (ragged, rows(12), stack),
    "gradient": (jax.grad(loss), rows(16), q),
    "gradient of experts": (jax.grad(ragged_loss), rows(12), stack),
    "gradient of many": (jax.grad(loss), rows(4096), q),
}
print(json.dumps({name: compiled(*programs[name]) for name in names or programs}))
"""


SHARDED = """
import json, numpy, jax, jax.numpy as jnp
from benchmarks import aot
from jax.experimental import topologies
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec as P
from pallas_kernels.grouped_int4_matmul import grouped_int4_matmul
from pallas_kernels.int4_matmul import PackedSpec, int4_matmul

target = (aot.TARGETS / "h200.txtpb").read_text()
two = topologies.get_topology_desc("gpu", platform="cuda", target_config=target, topology="1x1x2").devices
mesh, spec = Mesh(numpy.array(two), ("model",)), PackedSpec(256, layout="hopper")
traced = AbstractMesh((2,), ("model",), (AxisType.Auto,), abstract_device=AbstractDevice("NVIDIA H200", 132, "gpu"))


def dense(x, codes, scale):
    return int4_matmul(x, codes, scale, spec=spec)


def experts(x, codes, scale, sizes):
    return grouped_int4_matmul(x, codes, scale, group_sizes=sizes, spec=spec)


def compiled(function, args, specs, out):
    args = [jax.ShapeDtypeStruct(*a, sharding=NamedSharding(mesh, s)) for a, s in zip(args, specs)]
    with jax.sharding.use_abstract_mesh(traced):
        mapped = jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=out)
        text = jax.jit(mapped).trace(*args).lower(lowering_platforms=("cuda",)).compile().as_text()
    return ['custom_call_target="mosaic_gpu' in text, "all-reduce" in text]


x = ((16, 256), jnp.bfloat16)
one = (x, ((4, 2048), jnp.int32), ((2, 256), jnp.bfloat16))
many = (x, ((3, 4, 2048), jnp.int32), ((3, 2, 256), jnp.bfloat16), ((3,), jnp.int32))
columns, of_many = P(None, "model"), (P(), P(None, "model"), P(None, None, "model"), P())
gradient = jax.grad(lambda *args: jnp.sum(experts(*args).astype(jnp.float32)))
print(json.dumps({
    "dense": compiled(dense, one, (P(), P("model"), columns), columns),
    "experts": compiled(experts, many, of_many, columns),
    "gradient": compiled(gradient, many, of_many, P()),
}))
"""


def found_for(*arguments, program=PROGRAM):
    if reason := missing("h200"):
        pytest.skip(reason)
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        env=environment("h200"), cwd=Path(__file__).parents[1], capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_the_kernel_serves_a_hopper_gpu_up_to_many_rows():
    found = found_for("NVIDIA H200", "h200")
    served = {name: one["kernel"] for name, one in found.items()}
    assert served == {
        "few": True, "float16": True, "float32": True, "eight bits": True, "many": False, "batch": True,
        "experts": True, "gradient": True, "gradient of experts": True, "gradient of many": False,
    }  # fmt: skip
    for name in ("few", "eight bits", "gradient", "experts", "gradient of experts"):
        assert found[name]["temp"] < 2 * 1024 * 512, name  # nothing dense


@pytest.mark.parametrize("kind", ["NVIDIA B200", "NVIDIA A100-SXM4-80GB", "NVIDIA L40S"])
def test_other_gpus_get_xla_and_nothing_aborts(kind):
    found = found_for(kind, "h200", "few", "experts", "gradient of experts")
    assert not any(one["kernel"] for one in found.values())


@pytest.mark.parametrize("target", ["a100", "l40s"])
def test_ampere_and_ada_are_served_by_mma_up_to_many_rows_and_gradients_by_xla(target):
    names = ("few", "float32", "eight bits", "many", "batch", "experts", "gradient")
    found = found_for(DEVICE_KINDS[target], target, *names)
    served = {name: one["kernel"] for name, one in found.items()}
    if jax.__version_info__ < FIRST_WITH_MMA:
        assert not any(served.values())
        return
    of_kernel = {"few", "float32", "eight bits", "batch"}
    assert served == {name: name in of_kernel for name in names}
    assert max(found[name]["temp"] for name in ("few", "eight bits")) < 2 * 1024 * 512  # nothing dense


def test_a_shard_of_columns_is_multiplied_by_the_kernel_and_gradients_are_summed():
    found = found_for(program=SHARDED)
    assert found == {"dense": [True, False], "experts": [True, False], "gradient": [True, True]}
