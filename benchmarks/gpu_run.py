"""The GPU kernels on a Hopper, Ampere or Ada GPU: right first, then fast, against what else there is.

    python -m benchmarks.gpu_run --json FILE --plot FILE.png

Needs no network, and of jq4's dependencies all; torch and gemlite are compared with where they are. In turn:

    ceilings      bytes read and bf16 products a second, by XLA on this device
    correctness   forms, formats and tails against float64; free memory is NaN, operands are fresh. If anything is
                  wrong, the rest is not run
    speed         1 to 4096 rows on the products of Llama 3 8B and 70B: by codes of 4 and 8 bits, of rounded rows, by
                  the transpose; and rows of experts, of Mixtral's and Qwen3's sizes
    decoding      tokens a second of an 8B-shaped decoder with random weights, packed and bf16

On Ampere and Ada, whose kernel has none of the others, the speed of w4a16 and w8a16 alone is taken. Without a GPU of
these XLA's forms serve in the kernel's stead (`device` and `kernel` in the figures say so), which tests this script
alone.
"""

import argparse
import dataclasses
import itertools
import sys
from collections.abc import Iterator
from typing import Any

import jax
from rich.console import Console

from benchmarks.gpu_lab import decoding
from benchmarks.gpu_lab.cases import Case
from benchmarks.gpu_lab.rivals import RIVALS, UnavailableError
from benchmarks.gpu_lab.running import TOLERANCE, ceilings, error_of
from benchmarks.gpu_lab.small_cases import small_cases
from benchmarks.provenance import publish
from pallas_kernels.int4_matmul.gpu_chips import gpu_named, refusal_of_mma
from pallas_kernels.int4_matmul.shapes import SHAPES

ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 4096)
NAMED = (
    *("llama-3-8b/qkv_proj", "llama-3-8b/o_proj", "llama-3-8b/gate_up", "llama-3-8b/down_proj"),
    *("llama-3-70b/gate_proj", "llama-3-70b/down_proj"),
)


KINDS: dict[str, dict[str, Any]] = {
    "w4a16": {},
    "w8a16": {"bits": 8},
    "w4a8": {"fits": "int8"},
    "w4afp8": {"fits": "float8_e4m3fn"},
    "w8a8": {"bits": 8, "fits": "int8"},
    "gradient": {"transposed": True},
    "experts": {},
}
OF_MMA = ("w4a16", "w8a16")
EXPERTS = {"mixtral-8x7b": (8, 4096, 14336), "qwen3-30b-a3b": (128, 2048, 768)}  # experts, K, N of up_proj


def kernel_of(kind: str) -> str | None:
    """The implementation that serves a device kind, or None."""
    if gpu_named(kind) is not None:
        return "mosaic_gpu"
    return "mosaic_gpu_mma" if refusal_of_mma(kind) is None else None


def correctness_cases(kernel: str | None) -> list[Case]:
    """Those that the compile lab emulates, other numbers of rows, and float32 rows; plans are the chosen ones."""
    device = "a100" if kernel == "mosaic_gpu_mma" else "h200"
    chosen = [case for case in small_cases() if case.plan is None and case.device == device]
    more = [Case(rows, 1024, 768, group, True) for rows, group in itertools.product((7, 64, 100, 300), (32, 128, 0))]
    return [*chosen, *more, *(Case(rows, 512, 256, 128, True, "float32") for rows in (1, 20))]


def wrong_cases(cases: list[Case], console: Console, seed: int) -> list[str]:
    """What is not right, or did not run."""
    wrong = []
    for i, case in enumerate(cases):
        try:
            error: Any = error_of(case, seed + i)
        except Exception as problem:  # a kernel's failure has no common type
            error = f"{type(problem).__name__}: {str(problem)[:300]}"
        if isinstance(error, str) or not error < TOLERANCE[case.dtype]:
            wrong.append(f"{case}: {error}")
            console.print(wrong[-1], style="red")
    return wrong


def timed(case: Case, rivals: list[str], repeats: int) -> dict[str, Any]:
    """Microseconds of each rival, or why there are none."""
    row: dict[str, Any] = dataclasses.asdict(case)
    for name in rivals:
        try:
            row[name] = round(1e6 * RIVALS[name](case, repeats), 2)
        except UnavailableError as reason:
            row[f"{name}: unavailable"] = str(reason)
    return row


def speed_cases(kinds: list[str], options: argparse.Namespace) -> Iterator[tuple[str, str, Case]]:
    """(kind, product, case) of everything that is timed."""
    for kind, group, count in itertools.product(kinds, options.group_size, options.rows):
        if kind == "experts":
            sizes = {name: (k, n, experts) for name, (experts, k, n) in EXPERTS.items() if count > 1}
        else:
            sizes = {name: (*SHAPES[name], 0) for name in options.named}
        for name, (k, n, experts) in sizes.items():
            yield kind, name, Case(count, k, n, group, experts=experts, **KINDS[kind])


def with_rates(row: dict[str, Any], limits: dict[str, float]) -> dict[str, Any]:
    """A row with our share of the measured ceilings and our gain on XLA's bf16."""
    us, weights = row.get("mosaic_gpu"), row["k"] * row["n"]
    if us is None:
        return row
    case = Case(**{field.name: row[field.name] for field in dataclasses.fields(Case)})
    row["bytes_share"] = round(case.nbytes / us * 1e6 / limits["read_bytes_per_second"], 3)
    row["flops_share"] = round(2 * row["rows"] * weights / us * 1e6 / limits["bf16_flops"], 3)
    if "xla-bf16" in row:
        row["speedup"] = round(row["xla-bf16"] / us, 2)
    return row


def plot(rows: list[dict[str, Any]], file: str) -> None:
    """Speed-ups over XLA's bf16 by rows of x, a panel for each dense product by codes of 4 bits."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    rows = [row for row in rows if row["kind"] == "w4a16"]
    sizes = list(dict.fromkeys((row["k"], row["n"]) for row in rows))
    figure, panels = plt.subplots(1, len(sizes), figsize=(4 * len(sizes), 3.6), squeeze=False, sharey=True)
    for panel, (k, n) in zip(panels[0], sizes, strict=True):
        own = [row for row in rows if (row["k"], row["n"]) == (k, n) and "xla-bf16" in row]
        for name in RIVALS:
            points = [(row["rows"], row["xla-bf16"] / row[name]) for row in own if name in row]
            if points:
                panel.plot(*zip(*points, strict=True), "o-", ms=3, label=name)
        panel.set(xscale="log", xlabel="rows of x", title=f"{k} x {n}")
        panel.grid(alpha=0.3)
    panels[0][0].set_ylabel("times XLA's bf16 speed")
    panels[0][-1].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(file, dpi=130)
    plt.close(figure)


def run(options: argparse.Namespace, console: Console) -> dict[str, Any]:
    kernel = kernel_of(jax.devices()[0].device_kind)
    found: dict[str, Any] = {"kernel": kernel or "xla's forms: no GPU here that a kernel serves"}
    found["ceilings"] = ceilings(options.repeats, options.ceiling_size, options.ceiling_megabytes)
    console.print(found)
    cases = correctness_cases(kernel)[: options.cases]
    found["correctness"] = {"cases": len(cases), "wrong": wrong_cases(cases, console, options.seed)}
    if found["correctness"]["wrong"]:
        return found
    found["rows"] = []
    kinds = [kind for kind in options.kind if kernel != "mosaic_gpu_mma" or kind in OF_MMA]
    for kind, name, case in speed_cases(kinds, options):
        row = {"product": name, "kind": kind, **timed(case, options.rival, options.repeats)}
        found["rows"].append(with_rates(row, found["ceilings"]))
        console.print(found["rows"][-1])
    if options.tokens:
        config = decoding.config_of(decoding.TINY if options.tiny else decoding.LLAMA_3_8B)
        for what, packed in (("packed", True), ("bf16", False)):
            rate = decoding.tokens_per_second(config, packed, options.batch, options.tokens)
            found.setdefault("tokens_per_second", {})[what] = round(rate, 1)
        console.print(found["tokens_per_second"])
    return found


def main(words: list[str] | None = None) -> int:
    options = arguments(words)
    console = Console(stderr=True)
    found = run(options, console)
    if options.json:
        publish(options.json, "gpu_run", found)
    if options.plot and any(row["kind"] == "w4a16" for row in found.get("rows", ())):
        plot(found["rows"], options.plot)
    return 1 if found["correctness"]["wrong"] else 0


def arguments(words: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rows", type=int, nargs="+", default=list(ROWS))
    parser.add_argument("--named", nargs="+", choices=sorted(SHAPES), default=list(NAMED))
    parser.add_argument("--group-size", type=int, nargs="+", default=[128], help="0: one scale for each column")
    parser.add_argument("--kind", nargs="+", choices=list(KINDS), default=list(KINDS), help="of products")
    parser.add_argument("--rival", nargs="+", choices=list(RIVALS), default=list(RIVALS))
    parser.add_argument("--cases", type=int, help="of correctness, at most so many")
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tokens", type=int, default=128, help="of decoding; 0 leaves it out")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--tiny", action="store_true", help="decode a tiny model")
    parser.add_argument("--ceiling-size", type=int, default=8192)
    parser.add_argument("--ceiling-megabytes", type=int, default=2048)
    parser.add_argument("--json", help="where to write the figures")
    parser.add_argument("--plot", help="where to draw them")
    return parser.parse_args(words)


if __name__ == "__main__":
    sys.exit(main())
