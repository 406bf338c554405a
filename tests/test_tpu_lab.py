"""Oracle: counts done by hand on a recorded excerpt of the TPU compiler's dump; and the compiler itself (marker aot).

The lab reads what the compiler wrote. What it must not do is read it wrongly, so the excerpts are the compiler's lines
(cut to a few bundles and renumbered), and the wanted figures were counted on them by eye.
"""

import json
import math

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl

from benchmarks.aot import missing
from benchmarks.tpu_lab import bundles, cells, hlo, traffic
from benchmarks.tpu_lab.chips import CHIPS
from benchmarks.tpu_lab.contenders import CONTENDERS, Case
from benchmarks.tpu_lab.jobs import Job, run
from benchmarks.tpu_lab.model import time_of

# A kernel with a fori_loop of 8 and one whose length is data, in a grid of 32 (v6e), cut to 14 bundles.
BUNDLES = """\
= control target key start
LH: loop header
LB: loop body
= control target key end

     0   :  { %s1 = inlined_call_operand.hbm [shape: bf16[16,8192]]  ;;  %s2 = smov 0 } /* entry bundle: %kk.1 */
   0x1   :  { %8 = vsyncpa [#allocation5], 0 } /* Start region 1 */
   0x2 LB: > { %s1203_s25 = sphi %s1259_s25, %s22_s25 } /* Start region 132 */
   0x3   : > { %1022 = sbr.rel (%p1263_p2) target = $region28 }
   0x4 LB: >> { %s245_s28 = sphi 0, %s238_s28 } /* Start region 110 :: Start region 45 */
   0x5   : >> { %p235_p9 = scmp.ge.s32.totalorder %s238_s28, 8 /* loop exit test */  ;;  %v1 = vld [vmem:[#allocation2]] }
   0x6   : >> { %v2 = vadd.f32 %v1, %v1  ;;  %237 = sbr.rel (!%p235_p9) target = $region110 }
   0x7   : > { %693 = sbr.rel (%p681_p2) target = $region115 } /* Start region 114 :: Start region 116 */
   0x8 LB: >> { %v3 = vadd.f32 1.5, %v2 } /* Start region 121 :: Start region 52 */
   0x9   : >> { %450 = sbr.rel (!%p454_p6) target = $region121 }
   0xa PF: > { %vst = vst [vmem:[#allocation2]] %v3 } /* Start/End empty region 115 :: Start region 55 */
   0xb PF: > { %s9 = sld [smem:[#allocation9]]  ;;  %p1452_p12 = scmp.ge.s32.totalorder %s23_s26, 34 /* loop exit test */ }
   0xc   : > { %22 = sbr.rel (!%p1452_p12) target = $region132 } /* Start/End empty region 28 */
   0xd   :  { %end = vsyncpa [#allocation5], 1 }
"""  # noqa: E501
UTILIZATION = """\
== CAPACTIY:
MATMUL, VALU, VLOAD, VLOAD:FILL, VSTORE, VSTORE:SPILL
    2     4     3     3     2     2
== UTILIZATION:
""" + "\n".join(["0 0 0 0 0 0"] * 4 + ["1 4 0 0 0 0", "2 2 3 3 0 0", "2 4 0 0 2 1"] + ["0 1 0 0 0 0"] * 7)  # fmt: skip


def test_loops_and_their_trips_are_read_from_branches_back_and_exit_tests():
    schedule = bundles.parse(BUNDLES, UTILIZATION)
    (outer,) = schedule.loops
    assert schedule.bundles == 14
    assert (outer.first, outer.last, outer.trips) == (2, 12, 34)
    assert [(loop.first, loop.last, loop.trips) for loop in outer.inner] == [(4, 6, 8), (8, 9, None)]
    assert schedule.unknown_trips == 1
    assert outer.bundles == 6 + 8 * 3 + 2  # of its own, eight times three, and twice-two once
    assert schedule.cycles() == 3 + 34 * 32
    assert schedule.cycles(steps=32) == 3 + 32 * 32  # two of the 34 trips only fill and drain the pipeline
    assert schedule.cycles(steps=7) == schedule.cycles()  # another loop's number of steps


def test_the_hottest_loop_and_its_units_are_found():
    schedule = bundles.parse(BUNDLES, UTILIZATION)
    loop = schedule.hottest
    assert loop is not None and (loop.first, loop.last) == (4, 6)
    units = schedule.utilization(loop)
    assert units == {
        "MATMUL": round(5 / 6, 3), "VALU": round(10 / 12, 3), "VLOAD": round(3 / 9, 3),
        "VLOAD:FILL": round(3 / 9, 3), "VSTORE": round(2 / 6, 3), "VSTORE:SPILL": round(1 / 6, 3),
    }  # fmt: skip
    assert schedule.spills == 4


def test_a_dump_is_read_by_operation_and_the_programs_frame_left_out(tmp_path):
    for name in (
        "17-kk.1-72-final_bundles.txt",
        "17-<late-finalization>-71-final_bundles.txt",
        "9-TLP-3-final_bundles.txt",
    ):
        (tmp_path / name).write_text(BUNDLES)
    (tmp_path / "17-kk.1-70-final_hlo-static-per-bundle-utilization.txt").write_text(UTILIZATION)
    (tmp_path / "17-kk.1-70-schedule-analysis_final_bundles.txt").write_text("Schedule analysis:\n")
    found = bundles.read_dump(tmp_path)
    assert list(found) == ["kk.1"]
    assert found["kk.1"] == bundles.parse(BUNDLES, UTILIZATION)


PROGRAM = """\
HloModule jit_f, is_scheduled=true

%body (arg: (s32[], f32[8,128])) -> (s32[], f32[8,128]) {
  %arg = (s32[]{:T(128)}, f32[8,128]{1,0:T(8,128)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%arg), index=0
  %x = f32[8,128]{1,0:T(8,128)} get-tuple-element(%arg), index=1
  %kernel.2 = f32[8,128]{1,0:T(8,128)} custom-call(%x), custom_call_target="tpu_custom_call", backend_config={"used_scoped_memory_configs":[{"memory_space":"1","offset":"0","size":"4096"}]}
  %all-reduce.1 = f32[8,128]{1,0:T(8,128)} all-reduce(%kernel.2), to_apply=%add
  ROOT %out = (s32[]{:T(128)}, f32[8,128]{1,0:T(8,128)}) tuple(%i, %all-reduce.1)
}

%fused (param_0: s4[64,256], param_1: s32[]) -> bf16[8,256] {
  %param_0 = s4[64,256]{1,0:T(64,128)(8,1)E(4)} parameter(0)
  %param_1 = s32[]{:T(128)S(6)} parameter(1)
  %slice = s4[8,256]{1,0:T(8,128)(8,1)E(4)} dynamic-slice(%param_0, %param_1, %param_1), dynamic_slice_sizes={8,256}
  ROOT %convert = bf16[8,256]{1,0:T(8,128)(2,1)} convert(%slice)
}

ENTRY %main (w: s4[64,256], x: f32[8,128]) -> f32[8,128] {
  %w = s4[64,256]{1,0:T(64,128)(8,1)E(4)} parameter(0)
  %x.1 = f32[8,128]{1,0:T(8,128)} parameter(1)
  %zero = s32[]{:T(128)} constant(0)
  %unpack = bf16[8,256]{1,0:T(8,128)(2,1)S(1)} fusion(%w, %zero), kind=kLoop, calls=%fused, backend_config={"window_config":{"estimated_cycles":"77","iteration_bounds":["3","2"]}}
  %init = (s32[]{:T(128)}, f32[8,128]{1,0:T(8,128)}) tuple(%zero, %x.1)
  %loop = (s32[]{:T(128)}, f32[8,128]{1,0:T(8,128)}) while(%init), condition=%cond, body=%body, backend_config={"known_trip_count":{"n":"32"}}
  ROOT %result = f32[8,128]{1,0:T(8,128)} get-tuple-element(%loop), index=1
}

%cond (arg.1: (s32[], f32[8,128])) -> pred[] {
  %arg.1 = (s32[]{:T(128)}, f32[8,128]{1,0:T(8,128)}) parameter(0)
  ROOT %lt = pred[]{:T(128)} constant(true)
}

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[]{:T(128)} parameter(0)
  %b = f32[]{:T(128)} parameter(1)
  ROOT %sum = f32[]{:T(128)} add(%a, %b)
}
"""  # noqa: E501


def test_operations_run_as_often_as_their_loop_and_move_what_lies_in_hbm():
    program = hlo.Program(PROGRAM)
    operations = {one.name: one for one in program.operations()}
    assert set(operations) == {"unpack", "kernel.2", "all-reduce.1"}
    assert operations["kernel.2"].times == 32 and operations["kernel.2"].scoped == 4096
    assert operations["kernel.2"].nbytes == 2 * 8 * 128 * 4
    assert (operations["unpack"].steps, operations["unpack"].estimate) == (6, 77)
    assert operations["unpack"].nbytes == 8 * 256 // 2 + 4  # a slice of the weight and the index; the result is in VMEM
    assert program.custom_calls() == 32
    assert program.floats_of_shape({(8, 256)}) == 1 and program.floats_of_shape({(64, 256)}) == 0
    assert program.collectives() == {"all-reduce": 32}


def test_a_kernels_traffic_counts_a_block_when_its_index_changes():
    def kernel(x_ref, w_ref, out_ref):
        out_ref[...] = jnp.dot(x_ref[...], w_ref[...].astype(jnp.bfloat16)).astype(out_ref.dtype)

    def product(x, w):
        return pl.pallas_call(
            kernel,
            grid=(2, 3),
            in_specs=[pl.BlockSpec((16, 256), lambda i, j: (i, 0)), pl.BlockSpec((256, 128), lambda i, j: (0, j))],
            out_specs=pl.BlockSpec((16, 128), lambda i, j: (i, j)),
            out_shape=jax.ShapeDtypeStruct((32, 320), jnp.bfloat16),
        )(x, w)

    x, w = jax.ShapeDtypeStruct((32, 256), jnp.bfloat16), jax.ShapeDtypeStruct((256, 320), jnp.int4)
    (found,) = traffic.kernels(jax.make_jaxpr(jax.jit(product))(x, w))
    once_a_row_block, again_for_each, written = 2 * 32 * 256, 2 * 256 * 320 // 2, 2 * 32 * 320
    assert found.steps == 6
    assert found.nbytes == once_a_row_block + again_for_each + written


def test_time_is_the_slowest_of_three_limits_on_published_peaks():
    v5e = CHIPS["v5e"]
    assert v5e.clock == pytest.approx(1.5e9, rel=0.01)  # what KERNELS says of it, too
    found = time_of(v5e, cycles=1500, macs=65536, nbytes=8190)
    assert found.bundles == pytest.approx(1.0, rel=0.01)
    assert found.mxu == pytest.approx(1 / 1500, rel=0.01)
    assert found.hbm == pytest.approx(0.01)
    assert found.modelled == found.bundles and found.bound == "bundles"


def test_the_matrix_is_whole_and_goes_on_where_it_stopped(tmp_path):
    jobs = cells.matrix()
    assert len({cells.key(job.row) for job in jobs}) == len(jobs) == 5 * 7 * 4 * 2 * len(cells.MATRIX_SHAPES)
    file = tmp_path / "cells.jsonl"
    statuses = ["ok", "refused", "failed"]
    rows = [job.row | {"status": status, "error": ""} for job, status in zip(jobs, statuses, strict=False)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"chip": "v4", "cut sh')
    done = cells.read(file)
    assert cells.left(jobs, done) == jobs[2:]
    assert cells.summary(done.values())["by_chip"] == {"v4": {"ok": 1, "refused": 1, "failed": 1}}


@pytest.mark.parametrize("contender", ["xla-dequantize", "xla-grouped"])
@pytest.mark.parametrize("asymmetric", [False, True])
def test_what_we_compare_with_computes_the_same_product(contender, asymmetric):
    """XLA's forms against the dense weight: a yardstick that did less work would be none."""
    case = Case(8, 256, 128, group_size=64, asymmetric=asymmetric, dtype="float32")
    (program,) = CONTENDERS[contender](case, CHIPS["v5e"])
    keys = jax.random.split(jax.random.key(0), 4)
    x = jax.random.normal(keys[0], (8, 256))
    codes = jax.random.randint(keys[1], (256, 128), -8, 8)
    scale = jax.random.uniform(keys[2], (4, 1, 128), jnp.float32, 0.5, 1.5)
    zero_point = jax.random.randint(keys[3], (4, 1, 128), 0, 16).astype(jnp.uint8) if asymmetric else None
    shift = 0 if zero_point is None else zero_point.astype(jnp.float32) - 8
    dense = ((codes.astype(jnp.float32).reshape(4, 64, 128) - shift) * scale).reshape(256, 128)
    found = program.function(x, codes.astype(jnp.int4), scale, zero_point)
    assert jnp.max(jnp.abs(found - x @ dense)) <= 1e-5 * jnp.max(jnp.abs(x @ dense))


# --- with the compiler ---------------------------------------------------------------------------------------------


def skip_without_libtpu():
    if reason := missing("v5e:2x2"):
        pytest.skip(reason)


@pytest.mark.aot
def test_a_sample_of_the_matrix_compiles_or_is_refused_while_tracing():
    skip_without_libtpu()
    rows = list(run(cells.sample(), dump=False))
    assert len(rows) == 6 * len(CHIPS)
    assert [row for row in rows if row["status"] == "failed"] == []


@pytest.mark.aot
def test_decoding_is_bound_by_the_memory_and_several_times_faster_than_bf16():
    skip_without_libtpu()
    case = {"rows": 16, "k": 8192, "n": 28672, "group_size": 128, "asymmetric": False}
    jobs = [Job(chip, contender, case) for chip in ("v5e", "v6e") for contender in ("tpu", "pallas-bf16")]
    rows = {(row["chip"], row["contender"]): row for row in run(jobs, dump=True)}
    for chip in ("v5e", "v6e"):
        ours, dense = rows[chip, "tpu"], rows[chip, "pallas-bf16"]
        assert (ours["status"], ours["bound"]) == ("ok", "HBM"), ours
        assert ours["bundles_us"] < ours["hbm_us"]
        assert ours["spills"] <= ours["step_bundles"] / 6  # they are among the bundles, which the memory hides
        assert dense["us"] / ours["us"] >= 3.8
        assert math.isclose(dense["hbm_us"], 1e6 * 2 * 8192 * 28672 / CHIPS[chip].bandwidth, rel_tol=0.02)


@pytest.mark.aot
def test_prefill_is_bound_by_the_mxu_where_weights_are_unpacked_in_float32():
    """In blocks of 512 rows v5p took 6 % more bundles than its MXU takes cycles, in blocks of 256 0.3 %."""
    skip_without_libtpu()
    (row,) = run([Job("v5p", "tpu", {"rows": 512, "k": 4096, "n": 14336, "group_size": 128})], dump=True)
    assert row["status"] == "ok" and row["us"] <= 1.01 * row["mxu_us"], row
