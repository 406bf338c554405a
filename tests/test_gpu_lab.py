"""Oracle: numpy in float64, for what the production compiler makes of the kernel, emulated instruction by instruction.

The emulator itself is held to instructions worked out by hand from the PTX ISA, and must notice programs that race.
"""

import re
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest

from benchmarks import aot
from benchmarks.gpu_compile import emulated
from benchmarks.gpu_lab import sass
from benchmarks.gpu_lab.alu import OPERATIONS
from benchmarks.gpu_lab.cases import Case, operands
from benchmarks.gpu_lab.compiling import compiled, missing
from benchmarks.gpu_lab.device import run_kernel
from benchmarks.gpu_lab.host_code import DevicePointer, Launch, TensorMap, launch_of
from benchmarks.gpu_lab.memory import WrongProgramError, swizzled
from benchmarks.gpu_lab.ptx import parse
from benchmarks.gpu_lab.races import Races
from benchmarks.gpu_lab.small_cases import mma_plan, small_cases
from benchmarks.gpu_lab.tensor_cores import left_fragments, right_fragments, summed_in_fixed_point
from benchmarks.gpu_lab.warpgroup import Warpgroup

CHOSEN = [
    Case(1, 512, 320, 128),
    Case(20, 300, 64, 64, True),
    Case(20, 768, 128, 384, True),
    Case(20, 300, 320, 32, True),
    Case(1, 512, 64, 0, True, "float16", "float32"),
    Case(20, 640, 192, 128, True, plan={"form": "sums", "tile_m": 16, "splits": 2}),
    Case(130, 256, 128, 64, plan={"form": "weights", "tile_m": 128, "warpgroups": 2, "tile_k": 64}),
    Case(16, 512, 192, 128, plan={"form": "sums", "tile_m": 16, "tile_k": 256, "warpgroups": 3, "strips": 1}),
    Case(40, 300, 128, 64, True, experts=4),
    Case(24, 512, 128, 128, plan={"form": "sums", "tile_m": 8, "splits": 2}, experts=3),
    Case(20, 300, 128, 128, True, bits=8),
    Case(20, 300, 128, 128, True, fits="int8"),
    Case(20, 256, 128, 0, bits=8, fits="int8"),
    Case(20, 300, 128, 64, True, fits="float8_e4m3fn"),
    Case(1, 1024, 320, 0, fits="float8_e4m3fn"),
    Case(20, 200, 192, 64, True, transposed=True),
    Case(24, 200, 128, 64, True, experts=3, transposed=True),
]
CHOSEN_BY_MMA = [
    Case(1, 512, 128, 128, device="a100"),
    Case(1, 1536, 128, 128, plan=mma_plan("sums", 8, 2, 256), device="a100"),
    Case(20, 300, 64, 64, True, device="a100"),
    Case(16, 512, 128, 128, plan=mma_plan("sums", 16, 2, 256), device="a100"),
    Case(20, 768, 128, 32, True, plan=mma_plan("sums", 16, 2, 128) | {"splits": 3}, device="a100"),
    Case(20, 300, 128, 32, True, bits=8, device="a100"),
    Case(20, 300, 320, 32, True, device="l40s"),
    Case(1, 512, 64, 0, True, "float16", "float32", device="l40s"),
    Case(130, 256, 64, 32, device="l40s"),
]


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return rows_of(CHOSEN, tmp_path_factory)


@pytest.fixture(scope="module")
def rows_by_mma(tmp_path_factory):
    return rows_of(CHOSEN_BY_MMA, tmp_path_factory)


def rows_of(cases, tmp_path_factory):
    if reason := next(filter(None, (missing(case.device) for case in cases)), None):
        pytest.skip(reason)
    return list(compiled(cases, tmp_path_factory.mktemp("dump")))


def check_product(case, row):
    assert "error" not in row, row["error"]
    rounding = 2**-10 if case.dtype == "float16" else 2**-8
    of_sums = 2**-10 if case.fits == "float8_e4m3fn" else 1e-6
    assert emulated(case, row, seed=3) < (of_sums if row["plan"]["splits"] > 1 else rounding)


@pytest.mark.aot
@pytest.mark.parametrize("case", CHOSEN, ids=str)
def test_the_compiled_kernel_computes_the_product(rows, case):
    row = rows[CHOSEN.index(case)]
    check_product(case, row)
    assert (".s32.s8.s8" in row["ptx"]) == (case.fits == "int8")
    assert (".f32.e4m3.e4m3" in row["ptx"]) == (case.fits == "float8_e4m3fn")


@pytest.mark.aot
@pytest.mark.parametrize("case", CHOSEN_BY_MMA, ids=str)
def test_the_compiled_kernel_of_mma_computes_the_product(rows_by_mma, case):
    row = rows_by_mma[CHOSEN_BY_MMA.index(case)]
    check_product(case, row)
    assert f".target sm_{aot.CAPABILITIES[case.device].replace('.', '')}" in row["ptx"]


@pytest.mark.aot
@pytest.mark.parametrize("what, found", [("cp.async.wait_group", "has not waited for"), ("bar.sync", "no barrier")])
def test_the_emulator_notices_warps_of_mma_that_do_not_wait(rows_by_mma, what, found):
    case, row = CHOSEN_BY_MMA[1], rows_by_mma[1]
    hasty, count = re.subn(rf"^\s*{re.escape(what)}\s.*$", "", row["ptx"], flags=re.M)
    given = operands(case, row["plan"])
    assert count > 1
    with pytest.raises(WrongProgramError, match=f"a warp .*{found}"):
        run_kernel(parse(hasty), launch_of(row["host"]), given.arrays)


@pytest.mark.aot
def test_the_emulator_notices_a_program_that_does_not_wait(rows):
    case, row = CHOSEN[0], rows[0]
    waiting = "mbarrier.try_wait.parity.shared.b64 P1,"
    hasty = row["ptx"].replace(waiting, "setp.eq.b32 P1, 0, 0; //")
    assert hasty.count("setp.eq.b32 P1, 0, 0; //") == row["ptx"].count(waiting) > 1
    given = operands(case, row["plan"])
    try:
        run_kernel(parse(hasty), launch_of(row["host"]), given.arrays)
    except WrongProgramError:
        return
    assert not np.allclose(given.result, given.wanted, rtol=0.02, atol=0.5)


@pytest.mark.aot
def test_the_emulator_notices_that_registers_are_never_given_back(rows):
    case, row = CHOSEN[5], rows[5]
    greedy, count = re.subn(r"(setmaxnreg\.inc\S*\s+)224;", r"\g<1>232;", row["ptx"])
    assert row["plan"]["warpgroups"] == 2 and count > 0
    with pytest.raises(WrongProgramError, match=r"nothing can go on: .*setmaxnreg\.inc"):
        run_kernel(parse(greedy), launch_of(row["host"]), operands(case, row["plan"]).arrays)


@pytest.mark.aot
def test_few_rows_take_few_instructions_and_nothing_is_spilled(rows):
    if reason := sass.missing():
        pytest.skip(reason)
    for case, row in zip(CHOSEN, rows, strict=True):
        counts = sass.counts_of(row["ptx"])
        assert counts.spilled_bytes == counts.stack_bytes == 0 and not counts.warnings
        depth, strips = row["plan"]["tile_k"], row["plan"]["strips"]
        name = {"int8": "IGMMA", "float8_e4m3fn": "QGMMA"}.get(case.fits, "HGMMA")
        assert counts.loop[name] == strips * depth // (32 if case.fits else 16)
        if case.rows == 1:
            assert counts.instructions / (strips * depth / 2) <= {1: 2.7, 2: 2.1}[strips]


@pytest.mark.aot
def test_mma_of_few_rows_takes_few_instructions_and_nothing_is_spilled(rows_by_mma):
    if reason := sass.missing():
        pytest.skip(reason)
    for case, row in zip(CHOSEN_BY_MMA, rows_by_mma, strict=True):
        counts, plan = sass.counts_of(row["ptx"]), row["plan"]
        assert counts.spilled_bytes == counts.stack_bytes == 0
        if case.k == 1536:  # the only one with more steps than are unrolled
            assert counts.loop["HMMA"] == plan["strips"] * (plan["tile_m"] // 8) * (plan["tile_k"] // 16)
            assert counts.instructions / (plan["strips"] * plan["tile_k"] / 2) <= 2.7


def test_the_matrix_has_every_form_and_format():
    cases = small_cases()
    assert {case.group_size for case in cases} >= {0, 32, 64, 128}
    assert {case.dtype for case in cases} == {"bfloat16", "float16"}
    assert any(case.plan and case.plan.get("splits", 1) > 1 for case in cases)
    kinds = {(case.bits, case.fits, case.transposed, case.experts > 0) for case in cases}
    assert {(4, "int8", False, True), (8, "int8", False, False), (8, "", False, True)} < kinds
    assert {(8, "", True, False), (4, "", True, True), (4, "float8_e4m3fn", False, True)} < kinds


def run(name, *operands_of):
    first, *rest = name.split(".")
    values = [np.full(128, operand, kind) for operand, kind in operands_of]
    result = OPERATIONS[first](rest, values)
    assert (result == result[0]).all()
    return int(result[0])


U16, U32, U64 = np.uint16, np.uint32, np.uint64


def test_instructions_do_what_the_isa_says():
    assert run("lop3.b32", (0xABCD1234, U32), (0x000F000F, U32), (0x43004300, U32), (0x6A, U32)) == 0x430D4304
    assert run("prmt.b32", (0x33221100, U32), (0x77665544, U32), (0x7531, U32)) == 0x77553311
    assert run("vabsdiff4.u32.u32.u32", (0x80790508, U32), (0x80800808, U32), (0, U32)) == 0x00070300
    assert run("shr.s32", (0x80000000, U32), (4, U32)) == 0xF8000000
    assert run("bfe.s32", (0x00000F80, U32), (7, U32), (5, U32)) == 0xFFFFFFFF
    assert run("bfe.u32", (0x00000F80, U32), (7, U32), (5, U32)) == 0x1F
    assert run("mul.wide.s32", (0xFFFFFFFF, U32), (2, U32)) == 2**64 - 2
    assert run("mul.hi.u32", (0x80000000, U32), (6, U32)) == 3
    assert run("cvt.s64.s32", (0xFFFFFFFE, U32)) == 2**64 - 2
    assert run("cvt.rn.bf16x2.f32", (0x3F800000, U32), (0x40000000, U32)) == 0x3F804000  # 1 in the high half, 2 below
    assert run("sub.rn.bf16x2", (0x430F4300, U32), (0x43084308, U32)) == 0x40E0C100  # 143 - 136 = 7, 128 - 136 = -8
    assert run("mul.rn.f16x2", (0x3C00C000, U32), (0x40003800, U32)) == 0x4000BC00  # 1 * 2, -2 * 0.5
    assert run("cvt.f32.bf16", (0xC100, U16)) == 0xC1000000
    assert run("fma.rn.f32", (0x40000000, U32), (0x40400000, U32), (0x3F800000, U32)) == 0x40E00000  # 2 * 3 + 1
    assert run("selp.b32", (7, U32), (9, U32), (False, np.bool_)) == 9
    assert run("setp.eq.and.b32", (1, U32), (1, U32), (True, np.bool_)) == 1
    assert run("mad.lo.s32", (3, U32), (5, U32), (0xFFFFFFFF, U32)) == 14


@pytest.mark.parametrize(("bits", "place"), [(4, 0), (4, 4), (8, 0)])
def test_codes_in_the_lowest_bits_of_bf16_become_levels_by_one_multiply_add(bits, place):
    """For all codes and zero points (u - z) * LEVELS_STEP, exactly, in both halves (mosaic_gpu_registers.py)."""
    pytest.importorskip("jax.experimental.pallas.mosaic_gpu")
    from pallas_kernels.int4_matmul.mosaic_gpu_registers import LEVELS_STEP, power_of_two

    def of_pairs(name, *operands_of):
        first, *rest = name.split(".")
        return OPERATIONS[first](rest, [np.asarray(part, np.uint32) for part in operands_of])

    twice, minus = 0x10001, 0x80008000
    codes, zeros = (part.ravel() for part in np.meshgrid(np.arange(2**bits), np.arange(2**bits)))
    largest = np.full(codes.shape, power_of_two(127) * twice | minus)
    below = of_pairs("fma.rn.bf16x2", zeros * twice, largest, np.zeros(codes.shape))
    factor = np.full(codes.shape, power_of_two(127 - place) * twice)
    level = of_pairs("fma.rn.bf16x2", (codes << place) * twice, factor, below)
    wanted = ((codes - zeros) * LEVELS_STEP).astype(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(wanted.astype(np.float64), (codes - zeros) * LEVELS_STEP)
    np.testing.assert_array_equal(level.view(ml_dtypes.bfloat16).reshape(-1, 2), np.stack([wanted, wanted], -1))
    middle = power_of_two(bits - 7) | 0x8000  # of symmetric weights
    assert np.array(middle, np.uint16).view(ml_dtypes.bfloat16) == -(2 ** (bits - 1)) * LEVELS_STEP


def test_fragments_of_mma_lie_as_the_isa_draws_them():
    """m16n8k16's right operand: lane 5 of warp 1 holds rows 2, 3 and 10, 11 of column 1."""
    registers = np.zeros((128, 2), np.uint32)
    registers[37] = [0x40003F80, 0x40804040]  # bf16: 1, 2; 3, 4
    matrix = right_fragments(registers, "bf16")
    assert matrix.shape == (4, 16, 8) and np.count_nonzero(matrix) == 4
    np.testing.assert_array_equal(matrix[1, [2, 3, 10, 11], 1], [1, 2, 3, 4])


def test_e4m3_fragments_lie_as_those_of_int8_do():
    registers = np.zeros((128, 4), np.uint32)
    registers[37] = [0x0F080100, 0x8F888180, 0x7E565038, 0]  # 0, 1, 8, 15 of 512ths; the same, negative; 1, 8, 14, 448
    matrix = left_fragments(registers, "e4m3")
    np.testing.assert_array_equal(matrix[17, 4:8] * 512, [0, 1, 8, 15])
    np.testing.assert_array_equal(matrix[25, 4:8] * 512, [0, -1, -8, -15])
    np.testing.assert_array_equal(matrix[17, 20:24], [1, 8, 14, 448])
    assert matrix.shape == (64, 32) and np.count_nonzero(matrix) == 10


def test_products_of_e4m3_are_summed_in_fourteen_bits():
    """Beside 1 what is below 2^-13 is lost, and of what is above the part below it; -2^-20 is -2^-13 once cut off."""
    left = np.array([[1.0, 2.0**-13, 2.0**-14, 3 * 2.0**-14]])
    right, nothing = np.ones((1, 4)), np.zeros((1, 1), np.float32)
    assert summed_in_fixed_point(nothing, left, right) == 1 + 2 * 2.0**-13
    assert summed_in_fixed_point(nothing, left[:, 1:], right[:, 1:]) == 6 * 2.0**-14
    assert summed_in_fixed_point(np.ones((1, 1), np.float32), left[:, 1:], right[:, 1:]) == 1 + 2 * 2.0**-13
    assert summed_in_fixed_point(nothing, np.array([[1.0, -(2.0**-20)]]), right[:, :2]) == 1 - 2.0**-13
    assert summed_in_fixed_point(nothing, 0 * left, right) == 0


def test_warps_may_touch_what_others_touched_after_a_barrier_alone():
    def touched(*steps):
        races = Races(64)
        for name, *given in steps:
            getattr(races, name)(*given)

    def at(place, warp):
        return np.array([place]), 4, np.array([warp])

    touched(("write", *at(0, 0)), ("read", *at(0, 0)), ("read", *at(4, 1)), ("barrier",), ("write", *at(0, 1)))
    touched(("write", *at(0, 0), 0), ("settle", 1), ("barrier",), ("read", *at(0, 1)))
    with pytest.raises(WrongProgramError, match="a warp reads what it has not waited for"):
        touched(("write", *at(0, 0), 0), ("barrier",), ("read", *at(0, 0)))
    racing = [
        [("write", *at(0, 0)), ("read", *at(3, 1))],
        [("read", *at(0, 0)), ("write", *at(0, 1))],
        [("read", *at(0, 0)), ("write", *at(0, 1), 0)],
        [("write", *at(0, 0), 0), ("barrier",), ("settle", 1), ("read", *at(0, 1))],
    ]
    for steps in racing:
        with pytest.raises(WrongProgramError, match=r"a warp .* with no barrier between"):
            touched(*steps)


def test_int8_fragments_lie_as_the_isa_draws_them():
    """wgmma m64nNk32: thread 37 (warp 1, lane 5) holds rows 17 and 25, columns 4 to 7 and 20 to 23."""
    registers = np.zeros((128, 4), np.uint32)
    registers[37] = [0x04030201, 0x08070605, 0x0C0B0A09, 0xF00F0E0D]
    matrix = left_fragments(registers, "s8")
    assert matrix.shape == (64, 32) and np.count_nonzero(matrix) == 16
    np.testing.assert_array_equal(matrix[17, 4:8], [1, 2, 3, 4])
    np.testing.assert_array_equal(matrix[25, 4:8], [5, 6, 7, 8])
    np.testing.assert_array_equal(matrix[17, 20:24], [9, 10, 11, 12])
    np.testing.assert_array_equal(matrix[25, 20:24], [13, 14, 15, -16])


@pytest.mark.parametrize("transposed", [False, True])
def test_matrices_are_dealt_out_as_the_isa_says(transposed):
    """Thread 5 of a warp holds elements 2 and 3 of row 1, or of column 1; matrices are those of threads 0-7, 8-15."""
    block = SimpleNamespace(program=None, index=(0, 0, 0))
    one = Warpgroup(block, 0)
    one.registers["%rd1"] = np.arange(128, dtype=np.uint64) * np.uint64(16)
    first, second = one._matrices("[%rd1]", 2, transposed)
    element = [(2, 1), (3, 1)] if transposed else [(1, 2), (1, 3)]
    np.testing.assert_array_equal(first[5], [16 * row + 2 * column for row, column in element])
    np.testing.assert_array_equal(second - first, 128)
    np.testing.assert_array_equal(first[32:64] - first[:32], 32 * 16)


def test_swizzles_exchange_chunks_within_rows():
    """cuTensorMap's 128-byte swizzle: row r of 8 has its chunk c at chunk c ^ r."""
    places = swizzled(np.arange(0, 1024, 16), 128).reshape(8, 8) // 16 % 8
    np.testing.assert_array_equal(places, np.arange(8)[:, None] ^ np.arange(8))
    np.testing.assert_array_equal(swizzled(np.arange(256), 16), np.arange(256))


HOST = """\
define void @name_mosaic_gpu(ptr %0, ptr %1) {
  %3 = load ptr, ptr %1, align 8
  %4 = insertvalue { ptr, ptr, i64, [2 x i64], [2 x i64] } undef, ptr %3, 1
  %5 = insertvalue { ptr, ptr, i64, [2 x i64], [2 x i64] } %4, i64 0, 2
  %6 = extractvalue { ptr, ptr, i64, [2 x i64], [2 x i64] } %5, 1
  %7 = alloca [128 x i8], i64 1, align 64
  %8 = alloca i64, i64 1, align 8
  store i64 256, ptr %8, align 4
  %9 = alloca i64, i64 1, align 8
  store i64 1, ptr %9, align 4
  %10 = alloca i64, i64 1, align 8
  %11 = getelementptr inbounds nuw i64, ptr %10, i64 0
  store i64 64, ptr %11, align 4
  call void @mosaic_gpu_init_tma_desc(ptr %7, ptr %6, i64 7, i64 1, ptr %8, ptr %9, i64 16, ptr %10)
  %12 = getelementptr ptr, ptr %1, i32 1
  %13 = load ptr, ptr %12, align 8
  %14 = alloca { ptr, [128 x i8] }, align 8
  %15 = alloca [2 x i64], align 8
  %16 = getelementptr { ptr, [128 x i8] }, ptr %14, i32 0, i32 0
  store ptr %13, ptr %16, align 8
  store ptr %16, ptr %15, align 8
  %17 = getelementptr i64, ptr %15, i32 1
  store ptr %7, ptr %17, align 8
  call void @mosaic_gpu_launch_kernel(ptr %0, GRID, i32 384, i32 1, i32 1, i32 9000, ptr %15)
  ret void
}
""".replace("GRID", "i32 3, i32 2, i32 1, i32 0, i32 0, i32 0")


def test_host_code_tells_the_launch():
    tiles = TensorMap(array=0, offset=0, sizes=(256,), strides=(1,), swizzle=16, box=(64,))
    assert launch_of(HOST) == Launch((3, 2, 1), 384, 9000, (DevicePointer(1), {0: tiles}))


LISTING = """\
.L_x_0:
        /*0000*/                   LDS.128 R4, [R2] ;
.L_x_1:
        /*0010*/                   LOP3.LUT R8, R4, 0xf000f, R9, 0x6a, !PT ;
        /*0020*/                   HGMMA.64x16x16.F32.BF16 R24, R8, gdesc[UR4], R24 ;
        /*0030*/              @P0  BRA `(.L_x_1) ;
        /*0040*/                   FADD R1, R2, R3 ;
        /*0050*/              @!P1 BRA `(.L_x_0) ;
"""


def test_the_inner_loop_is_the_shortest_with_tensor_cores():
    assert sass.inner_loop(LISTING) == {"LOP3": 1, "HGMMA": 1, "BRA": 1}
