"""A function compiled for a chip that is not there, and the last stage of the compiler's dump.

libtpu reads LIBTPU_INIT_ARGS once, so the dump's folder is set in the environment before jax is imported
(`environment`), and one process compiles many programs into it: `fresh` empties it before each. Without a folder
nothing is dumped, which is several times faster.
"""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks import aot
from benchmarks.tpu_lab.chips import Chip

DUMP = "JQ4_LLO_DUMP"


def environment(dump: Path | None = None) -> dict[str, str]:
    """The environment of a process that compiles for TPUs, and dumps the compiler's stages into a folder."""
    env = aot.environment("v5e")
    env.pop("LIBTPU_INIT_ARGS", None)
    if dump is not None:
        env |= {DUMP: str(dump), "LIBTPU_INIT_ARGS": f"--xla_jf_dump_to={dump} --xla_jf_dump_llo_text=true"}
    return env


def dump_folder() -> Path | None:
    """Where this process dumps to."""
    return Path(os.environ[DUMP]) if DUMP in os.environ else None


def fresh() -> None:
    """Empties the dump's folder."""
    if (folder := dump_folder()) is not None:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)


def devices(chip: Chip, topology: str | None = None) -> Any:
    """Compile-only devices of a chip's smallest topology, or of another of its topologies."""
    from jax.experimental import topologies

    return topologies.get_topology_desc(topology or chip.topology, platform="tpu", **chip.options).devices


@contextlib.contextmanager
def on(chip: Chip) -> Iterator[Any]:
    """One device; within, kernels that ask what chip they are traced for get its answer."""
    import jax

    device = devices(chip)[0]
    described = jax.sharding.AbstractDevice(device.device_kind, device.num_cores, "tpu")
    auto = (jax.sharding.AxisType.Auto,)
    mesh = jax.sharding.AbstractMesh((1,), ("chip",), auto, abstract_device=described)
    with jax.sharding.use_abstract_mesh(mesh):
        yield device


def traced(chip: Chip, function: Any, arguments: Any) -> Any:
    """`function` traced on ShapeDtypeStructs for one device of the chip: what `compiled` takes."""
    import jax

    with on(chip) as device:
        sharding = jax.sharding.SingleDeviceSharding(device)
        placed = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), arguments)
        return jax.jit(function).trace(*placed)


def compiled(chip: Chip, trace: Any) -> Any:
    """The executable of a trace. A kernel is lowered, and refused, here."""
    with on(chip):
        return trace.lower(lowering_platforms=("tpu",)).compile()
