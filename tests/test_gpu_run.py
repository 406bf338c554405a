"""Oracle: the script's own figures, read back; on a CPU XLA's forms serve in the kernel's stead, checked by float64."""

import json

import jax
import jax.numpy as jnp
import pytest

from benchmarks import gpu_run
from benchmarks.gpu_lab import running
from benchmarks.gpu_lab.cases import Case
from benchmarks.gpu_lab.rivals import UnavailableError
from pallas_kernels.int4_matmul.shapes import SHAPES, Shape


def test_the_script_runs_from_ceilings_to_decoding(tmp_path, monkeypatch):
    monkeypatch.setattr(running, "MOST_COPIES", 3)
    pytest.importorskip("matplotlib")
    figures, drawn = tmp_path / "figures.json", tmp_path / "plot.png"
    monkeypatch.setitem(SHAPES, "odd/prime", Shape(256, 128))
    monkeypatch.setattr(gpu_run, "EXPERTS", {"few": (3, 128, 64)})
    words = "--rows 1 3 --named odd/prime --rival mosaic_gpu xla-bf16 tinygemm --cases 3 --repeats 1"
    words += " --kind w4a16 experts --tokens 2 --tiny --ceiling-size 64 --ceiling-megabytes 1"
    code = gpu_run.main([*words.split(), "--json", str(figures), "--plot", str(drawn)])
    found = json.loads(figures.read_text())
    assert code == 0 and found["correctness"] == {"cases": 3, "wrong": []}
    assert found["kernel"].startswith("xla's forms") and drawn.stat().st_size > 0
    timed = [(row["kind"], row["rows"]) for row in found["rows"]]
    assert timed == [("w4a16", 1), ("w4a16", 3), ("experts", 3)]
    for row in found["rows"]:
        assert row["speedup"] >= 0 and row["bytes_share"] >= 0 and "tinygemm: unavailable" in row  # rounded: may be 0.0
    assert found["tokens_per_second"]["packed"] != 0


def test_a_repeat_launches_short_programs_often_and_long_ones_once(monkeypatch):
    assert [running.launches_for(once) for once in (1e-6, 1e-3, 0.2)] == [running.MOST_LAUNCHES, 5, 1]
    monkeypatch.setattr(running, "launches_for", lambda once: 4)
    launched = []

    def product(x, weight):
        jax.debug.callback(lambda: launched.append(weight is None))
        return x + weight

    assert running.seconds_of(product, 1.0, [jnp.ones(3)] * 2, repeats=3) > 0
    jax.effects_barrier()
    assert len(launched) == 2 * (1 + 1 + 3 * 4)


def test_a_wrong_product_stops_the_script(tmp_path, monkeypatch):
    monkeypatch.setattr(running, "ours", lambda x, q: x[:, :1] * 0 + 1)
    figures = tmp_path / "figures.json"
    words = ["--cases", "2", "--repeats", "1", "--ceiling-size", "64", "--ceiling-megabytes", "1"]
    assert gpu_run.main([*words, "--json", str(figures)]) == 1
    found = json.loads(figures.read_text())
    assert len(found["correctness"]["wrong"]) == 2 and "rows" not in found


def test_what_cannot_run_says_why(monkeypatch):
    def absent(case, repeats):
        raise UnavailableError("it is not installed")

    monkeypatch.setitem(gpu_run.RIVALS, "gemlite", absent)
    row = gpu_run.timed(Case(1, 64, 64), ["gemlite"], 1)
    assert row["gemlite: unavailable"] == "it is not installed"


@pytest.mark.parametrize("kind", [*gpu_run.KINDS, "a quarter of the rows without an expert"])
def test_products_of_every_kind_are_held_to_float64(kind):
    """XLA's forms on a CPU: what is asked for and what is wanted must agree before a kernel is judged by them."""
    case = Case(9, 128, 64, 64, True, **gpu_run.KINDS.get(kind, {}), experts=0 if kind in gpu_run.KINDS else 4)
    case = case if kind != "experts" else Case(9, 128, 64, 64, True, experts=3, bits=8)
    assert running.error_of(case, seed=5) < 0.01
