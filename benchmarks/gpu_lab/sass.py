"""The machine code of a kernel's PTX: instructions of its inner loop, registers, spills, warnings.

ptxas and nvdisasm come with NVIDIA's toolkit, and with the triton wheel (triton/backends/nvidia/bin): JQ4_CUDA_TOOLS
names their folder, else they are looked for on the PATH.
"""

import dataclasses
import os
import re
import shutil
import subprocess
import tempfile
from collections import Counter
from pathlib import Path

TOOLS = "JQ4_CUDA_TOOLS"
TENSOR = re.compile(r"[HIQ]G?MMA")


@dataclasses.dataclass(frozen=True)
class Counts:
    """What one thread executes in a turn of the inner loop, by the instruction's first word; and the whole kernel's."""

    loop: Counter[str]
    registers: int
    spilled_bytes: int
    stack_bytes: int
    warnings: tuple[str, ...]

    @property
    def instructions(self) -> int:
        return sum(self.loop.values())


def missing() -> str | None:
    """Why nothing can be counted here, or None."""
    absent = [name for name in ("ptxas", "nvdisasm") if _tool(name) is None]
    return f"no {' and no '.join(absent)} on the PATH or in {TOOLS}" if absent else None


def counts_of(ptx: str) -> Counts:
    """Assembles PTX for the target that it names, and counts."""
    target = re.search(r"^\.target (\w+)", ptx, re.M)
    assert target is not None
    with tempfile.TemporaryDirectory() as folder:
        source, binary = Path(folder, "kernel.ptx"), Path(folder, "kernel.cubin")
        source.write_text(ptx)
        command = [f"{_tool('ptxas')}", "-v", f"-arch={target[1]}", str(source), "-o", str(binary)]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
        command = [f"{_tool('nvdisasm')}", "-c", str(binary)]
        listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return Counts(
        inner_loop(listing),
        _number(r"Used (\d+) registers", said),
        _number(r"(\d+) bytes spill stores", said) + _number(r"(\d+) bytes spill loads", said),
        _number(r"(\d+) bytes stack frame", said),
        tuple(line.split(":", 1)[-1].strip() for line in said.splitlines() if "Potential Performance Loss" in line),
    )


def inner_loop(listing: str) -> Counter[str]:
    """Instructions of the shortest loop (a label to a branch back to it) with tensor core instructions in it."""
    labels, code = {}, []
    for line in listing.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label[1]] = len(code)
        elif found := re.search(r"/\*[0-9a-f]{4,6}\*/\s+(.*?);", line):
            code.append(found[1])
    loops = []
    for at, text in enumerate(code):
        branch = re.search(r"\bBRA\b.*?(\.L_x_\d+)", text)
        if branch and labels.get(branch[1], at + 1) <= at:
            body = code[labels[branch[1]] : at + 1]
            if any(TENSOR.search(one) for one in body):
                loops.append(body)
    words = (re.match(r"(?:@!?U?P[\dT]+\s+)?([A-Z0-9_]+)", one) for one in min(loops, key=len, default=[]))
    return Counter(word[1] for word in words if word)


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    assert found is not None, f"no {pattern!r} in what ptxas said:\n{text}"
    return int(found[1])


def search_path() -> str:
    """Folders to look for NVIDIA's tools in."""
    return os.pathsep.join(filter(None, [os.environ.get(TOOLS), os.environ.get("PATH", "")]))


def _tool(name: str) -> str | None:
    return shutil.which(name, path=search_path())
