"""Compile-only devices: the real TPU and GPU compilers on a machine that has neither.

    TPU   libtpu (pip install libtpu) describes a topology and compiles for it.
    GPU   the CUDA plugin without its CUDA libraries, in a folder of its own:
              pip install --no-deps --target DIR jax-cuda13-plugin==$JAX jax-cuda13-pjrt==$JAX
          and JQ4_CUDA_PLUGIN=DIR; the chip is described in benchmarks/targets/.

The environment must be set before jax is imported (`environment`), so everything here runs in its own process:

    python -m benchmarks.aot --device v6e:2x2 --rows 16            # or --device h200
    {"device": "v6e:2x2", "rows": 16, "layout": "tpu", "temp_bytes": 0, ...}

`temp_bytes` is the compiler's own count of temporaries: if it is below the dense weight's bytes, nothing was unpacked
as a whole.
"""

import argparse
import contextlib
import dataclasses
import functools
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from pallas_kernels.int4_matmul.shapes import SHAPES

TARGETS = Path(__file__).parent / "targets"
CUDA_PLUGIN = "JQ4_CUDA_PLUGIN"

LAYERS = 4  # of a stack

# What jax.devices()[0].device_kind says there, by the name of the topology or target.
DEVICE_KINDS = {
    "v4": "TPU v4",
    "v5e": "TPU v5e",
    "v5p": "TPU v5p",
    "v6e": "TPU v6 lite",
    "tpu7x": "TPU7x",
    "h200": "NVIDIA H200",
    "a100": "NVIDIA A100-SXM4-80GB",
    "l40s": "NVIDIA L40S",
}
CAPABILITIES = {"h200": "9.0", "a100": "8.0", "l40s": "8.9"}


def environment(device: str) -> dict[str, str]:
    """The environment in which a process can compile for `device`."""
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    if is_gpu(device):
        env["PYTHONPATH"] = os.pathsep.join(filter(None, [env.get("PYTHONPATH"), env[CUDA_PLUGIN]]))
        env["XLA_FLAGS"] = "--xla_gpu_cuda_data_dir=."
    else:
        env.pop("XLA_FLAGS", None)
    return env


def is_gpu(device: str) -> bool:
    return (TARGETS / f"{device}.txtpb").is_file()


def missing(device: str) -> str | None:
    """Why this machine cannot compile for `device`, or None."""
    from importlib.util import find_spec

    if is_gpu(device):
        return None if os.environ.get(CUDA_PLUGIN) else f"{CUDA_PLUGIN} names no folder with the CUDA plugin"
    return None if find_spec("libtpu") else "libtpu is not installed"


def compile_device(device: str) -> Any:
    """A jax.Device to compile for: a topology ("v6e:2x2", "tpu7x:2x2x1") or a target file's name ("h200")."""
    from jax.experimental import topologies

    if is_gpu(device):
        target = (TARGETS / f"{device}.txtpb").read_text()
        topology = topologies.get_topology_desc("gpu", platform="cuda", target_config=target, topology="1x1x1")
    else:
        topology = topologies.get_topology_desc(device, platform="tpu")
    return topology.devices[0]


def compile_for(device: str, function: Any, *args: Any, donate: tuple[int, ...] = ()) -> Any:
    """The compiled executable of `function` on ShapeDtypeStructs `args`, all on one device, traced as for it.

    `donate` are numbers of arguments whose memory the results may take.
    """
    import jax

    target = compile_device(device)
    sharding = jax.sharding.SingleDeviceSharding(target)
    placed = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), args)
    platform = "cuda" if is_gpu(device) else "tpu"
    with contextlib.nullcontext() if is_gpu(device) else abstractly(target):
        return jax.jit(function, donate_argnums=donate).trace(*placed).lower(lowering_platforms=(platform,)).compile()


def abstractly(target: Any) -> Any:
    """The context in which kernels that ask what TPU they are traced for get `target`."""
    import jax

    described = jax.sharding.AbstractDevice(target.device_kind, target.num_cores, "tpu")
    auto = (jax.sharding.AxisType.Auto,)
    mesh = jax.sharding.AbstractMesh((1,), ("chip",), auto, abstract_device=described)
    return jax.sharding.use_abstract_mesh(mesh)


def traced_for_gpu(device: str, cores: int) -> Any:
    """The context in which kernels are traced for a GPU target, which tells its compute capability.

    Mosaic GPU asks the traced device for it, and takes what does not tell, as JAX's AbstractDevice, for a Hopper GPU.
    """
    import jax

    described = _telling_device()(DEVICE_KINDS[device], cores, "gpu", CAPABILITIES[device])
    auto = (jax.sharding.AxisType.Auto,)
    return jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((1,), ("chip",), auto, abstract_device=described))


@functools.cache
def _telling_device() -> Any:
    import jax

    @dataclasses.dataclass(frozen=True)
    class TellingDevice(jax.sharding.AbstractDevice):
        compute_capability: str = ""

    return TellingDevice


def packed_weight(
    device: str, k: int, n: int, group_size: int, asymmetric: bool, prepared: bool, scales: str = "bfloat16"
) -> Any:
    """The ShapeDtypeStructs of a QArray int4[k, n]."""
    import jax
    import jax.numpy as jnp

    from jq4.layouts import prepare
    from jq4.qarray import QArray

    def weight() -> QArray:
        groups = -(-k // group_size)
        zero_point = jnp.zeros((groups, n), jnp.uint8) if asymmetric else None
        codes, scale = jnp.zeros((-(-k // 2), n), jnp.uint8), jnp.zeros((groups, n), scales)
        q = QArray(codes, scale, zero_point, group_size=group_size, padding=k % 2, dtype="bfloat16")
        return prepare(q, DEVICE_KINDS[device.split(":")[0]]) if prepared else q

    return jax.eval_shape(weight)


def measure_matmul(
    device: str, rows: int, k: int, n: int, group_size: int, asymmetric: bool, prepared: bool
) -> dict[str, Any]:
    """Compiles jq4.matmul and its gradient by x for bf16 rows; the compiler's counts of bytes."""
    import jax
    import jax.numpy as jnp

    from jq4.matmul import matmul

    q = packed_weight(device, k, n, group_size, asymmetric, prepared)
    x = jax.ShapeDtypeStruct((rows, k), jnp.bfloat16)
    start = time.perf_counter()
    forward = compile_for(device, matmul, x, q)
    back = compile_for(device, jax.grad(lambda x, q: jnp.sum(matmul(x, q).astype(jnp.float32))), x, q)
    return {
        "device": device, "jax": jax.__version__, "rows": rows, "k": k, "n": n, "group_size": group_size,
        "asymmetric": asymmetric, "layout": q.layout,
        "dense_bytes": 2 * k * n, "packed_bytes": q.nbytes,
        "argument_bytes": forward.memory_analysis().argument_size_in_bytes,
        "temp_bytes": forward.memory_analysis().temp_size_in_bytes,
        "gradient_temp_bytes": back.memory_analysis().temp_size_in_bytes,
        "bytes_accessed": (forward.cost_analysis() or {}).get("bytes accessed"),  # a GPU has none
        "seconds": round(time.perf_counter() - start, 1),
    }  # fmt: skip


def measure_stack(
    device: str, rows: int, k: int, n: int, group_size: int, asymmetric: bool, scales: str = "bfloat16"
) -> dict[str, Any]:
    """Compiles a `lax.scan` over LAYERS stacked weights, and its gradient: what is copied, and what kernels run."""
    import jax
    import jax.numpy as jnp

    from jq4.matmul import matmul

    layer = packed_weight(device, k, n, group_size, asymmetric, True, scales)
    stack = jax.tree.map(lambda part: jax.ShapeDtypeStruct((LAYERS, *part.shape), part.dtype), layer)
    x = jax.ShapeDtypeStruct((rows, k), jnp.bfloat16)

    def scanned(x: Any, stack: Any) -> Any:
        return jax.lax.scan(lambda total, q: (total + jnp.sum(matmul(x, q).astype(jnp.float32)), None), 0.0, stack)[0]

    forward = compile_for(device, scanned, x, stack)
    back = compile_for(device, jax.grad(scanned), x, stack)
    return {
        "device": device, "jax": jax.__version__, "rows": rows, "k": k, "n": n, "group_size": group_size,
        "asymmetric": asymmetric, "scales": scales, "layer_codes_bytes": k * n // 2, "dense_bytes": 2 * k * n,
        "temp_bytes": forward.memory_analysis().temp_size_in_bytes,
        "gradient_temp_bytes": back.memory_analysis().temp_size_in_bytes,
        "kernel": "tpu_custom_call" in forward.as_text(),
        "gradient_kernel": "int4_matmul_transposed" in back.as_text(),
    }  # fmt: skip


def run_in_its_own_process(*arguments: str, timeout: float = 300) -> list[dict[str, Any]]:
    """`python -m benchmarks.aot ARGUMENTS`, with the environment its device needs; the JSON lines it printed."""
    device = arguments[arguments.index("--device") + 1]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.aot", *arguments],
        env=environment(device), cwd=Path(__file__).parents[1], capture_output=True, text=True, timeout=timeout,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"compiling for {device} failed:\n{done.stderr[-3000:]}")
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--device", required=True, help='a TPU topology ("v6e:2x2") or a target ("h200")')
    parser.add_argument("--rows", type=int, nargs="+", default=[16])
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--shape", type=int, nargs=2, default=[4096, 4096], metavar=("K", "N"))
    size.add_argument("--named", choices=sorted(SHAPES), help="a shape of a real model")
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--asymmetric", action="store_true")
    parser.add_argument("--scales", choices=("bfloat16", "float32"), default="bfloat16", help="of a stack")
    parser.add_argument("--stacked", action="store_true", help="a scan over a stack of layers, on a TPU")
    parser.add_argument("--neutral", action="store_true", help="do not prepare the weight for the device")
    options = parser.parse_args()
    k, n = SHAPES[options.named] if options.named else options.shape
    for rows in options.rows:
        if options.stacked:
            result = measure_stack(options.device, rows, k, n, options.group_size, options.asymmetric, options.scales)
            print(json.dumps(result), flush=True)
            continue
        result = measure_matmul(options.device, rows, k, n, options.group_size, options.asymmetric, not options.neutral)
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
