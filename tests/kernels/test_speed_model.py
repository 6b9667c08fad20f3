"""The static speed model on machine code written by hand, and on the two published kernels that it is calibrated on."""

import dataclasses
from pathlib import Path

import pytest

from astrobiogen.kernels.cases import CompileCase
from astrobiogen.testing import compile_gate
from astrobiogen.testing.compile_gate import LoopRow, Outcome, Row, Tables
from astrobiogen.testing.gate import tables
from astrobiogen.testing.predict import render
from astrobiogen.testing.speed import loops, model, sass
from astrobiogen.testing.speed.machines import MACHINES, Machine
from astrobiogen.testing.speed.model import Kernel, Prediction, Work
from astrobiogen.testing.speed.work import attention, edge_attention

CALIBRATION = Path(__file__).parents[1] / "compile_gate" / "calibration.csv"
A5000 = MACHINES[86]

LISTING = """
.text.kernel:
        /*0000*/                   MOV R1, c[0x0][0x28] ;
        /*0010*/              @!P1 LDG.E.128 R4, [R20.64] ;
        /*0020*/                   STL [R1], R9 ;
.L_x_1:
        /*0030*/                   IADD3 R0, R0, 0x1, RZ ;
.L_x_0:
        /*0040*/                   LDSM.16.M88.4 R8, [R3] ;
        /*0050*/                   LDG.E.64 R30, [R20.64] ;
        /*0060*/                   HMMA.16816.F32.BF16 R8, R8, R4, RZ ;
        /*0070*/                   HMMA.1688.F32.TF32 R8, R8, R4, RZ ;
        /*0080*/                   MUFU.EX2 R9, R9 ;
        /*0090*/                   FADD R9, R31, R9 ;
        /*00a0*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*00b0*/               @P0 BRA `(.L_x_0) ;
        /*00c0*/              @!P2 BRA `(.L_x_1) ;
        /*00d0*/                   STG.E.128 [R2.64], R8 ;
        /*00e0*/                   EXIT ;
.L_x_2:
        /*00f0*/                   BRA `(.L_x_2);
        /*0100*/                   NOP;
"""


def test_loops_and_what_is_in_them_are_found() -> None:
    listing = sass.parse(LISTING)
    assert [(loop.first, loop.last, loop.parent) for loop in sass.loops(listing)] == [(3, 12, -1), (4, 11, 0)]
    once, outer, inner = loops.count(LISTING)
    assert (once.loop, outer.loop, inner.loop, inner.parent) == (-1, 0, 1, 0)
    assert (once.spills, once.load_bytes, once.store_bytes, once.issued) == (1, 512, 512, 5)
    assert (outer.issued, outer.alu) == (2, 2)
    assert inner.mma == 16 * 8 * 16 + 2 * 16 * 8 * 8  # TF32 takes twice the time
    assert (inner.issued, inner.special, inner.shared, inner.barriers) == (8, 8, 4 + 2, 1)
    assert (inner.loads, inner.waits, inner.ahead, inner.load_bytes) == (1, 1, 3, 256)
    assert loops.spills_in_loops([once, outer, inner]) == 0
    assert loops.spills_in_loops(loops.count(LISTING.replace("MUFU.EX2 R9, R9", "LDL R9, [R1]"))) == 1


def test_of_two_alternatives_the_longer_one_counts() -> None:
    short, long = (
        "  /*0010*/ STG.E R1, R2 ;\n  /*0020*/ EXIT ;\n",
        "  /*0030*/ STG.E.64 R1, R2 ;\n  /*0040*/ FADD R1, R1, R1 ;\n",
    )
    (once,) = loops.count(f"  /*0000*/ @!P0 BRA `(.L_x_0) ;\n{short}.L_x_0:\n{long}  /*0050*/ EXIT ;\n")
    assert (once.issued, once.store_bytes) == (4, 256)
    (once,) = loops.count(f"  /*0000*/ @!P0 BRA `(.L_x_0) ;\n{long}.L_x_0:\n  /*0050*/ EXIT ;\n")
    assert (once.issued, once.store_bytes) == (4, 256)


def test_matrix_instructions_of_warp_groups_are_counted_by_their_quarter() -> None:
    (once,) = loops.count("        /*0000*/   HGMMA.64x128x16.F32.BF16 R24, R24, gdesc[UR8], RZ, !UPT, gsb0 ;\n")
    assert once.wgmma == 64 * 128 * 16 // 4
    with pytest.raises(ValueError, match=r"unknown shape: HMMA\.884"):
        loops.count("        /*0000*/   HMMA.884.F32.F32 R8, R8, R4, RZ ;\n")


def test_loads_that_are_used_in_the_next_iteration_hide_their_latency() -> None:
    body = ".L_x_0:\n  /*0000*/ FADD R1, R2, R3 ;\n  /*0010*/ LDG.E R2, [R4.64] ;\n  /*0020*/ @P0 BRA `(.L_x_0) ;\n"
    assert loops.count(body)[1].ahead == 1
    assert loops.count(body.replace("FADD R1, R2", "FADD R1, R5"))[1].ahead == 2


def test_programs_fill_the_multiprocessors_in_order() -> None:
    assert model.makespan([3, 3, 2, 2], 2) == (5, 1.0)
    assert model.makespan([1, 1, 1], 2) == (2, 0.75)
    assert model.makespan([], 4) == (0, 1.0)


def _facts(loop: int, **amounts: int) -> loops.Facts:
    names = [field.name for field in dataclasses.fields(loops.Facts)][2:]
    return loops.Facts(loop, -1, **{name: amounts.get(name, 0) for name in names})


def _kernel(**amounts: int) -> Kernel:
    return Kernel(8, 200, 0, (_facts(-1, issued=100), _facts(0, **amounts)))


def test_a_loop_of_matrix_work_alone_reaches_the_sustained_peak() -> None:
    programs, trips, fma = 64, 10_000, 2048
    work = Work("all", programs, 1.0, ((trips,) * programs,), needed=float(8 * programs * trips * fma))
    row = model.predict("kernel", _kernel(mma=fma, issued=1), work, A5000)
    overlap = 1 / (1 + model.EXPOSED / 16)  # one of 17 issue slots is not hidden
    assert row.share == pytest.approx(A5000.sustained / A5000.clock * overlap, rel=0.01)
    assert (row.bound, row.redundancy, row.makespan, row.resident) == ("matrix", 1.0, 1.0, 1)


def test_other_work_redundancy_and_an_uneven_grid_cost_time() -> None:
    def microseconds(programs: int = 64, trips: int = 1000, **amounts: int) -> float:
        work = Work("some", programs, 1.0, ((trips,) * programs,), needed=1.0)
        return model.predict("kernel", _kernel(mma=2048, **amounts), work, A5000).microseconds

    alone = microseconds(issued=1)
    assert microseconds(issued=16) > 1.2 * alone
    assert microseconds(issued=64) > 3.5 * alone
    assert microseconds(issued=1, barriers=4) > 2 * alone
    assert microseconds(programs=65, issued=1) == pytest.approx(2 * alone, rel=0.01)


def test_a_stream_is_bound_by_memory() -> None:
    kernel = Kernel(4, 32, 0, (_facts(-1, issued=40, loads=2, waits=2, ahead=1, load_bytes=1024),))
    row = model.predict("copy", kernel, Work("large", 2**16, 6.0 * 2**26), A5000)
    assert (row.bound, row.share) == ("memory", model.STREAM)


def test_a_description_that_does_not_fit_the_code_is_refused() -> None:
    with pytest.raises(ValueError, match="1 hot loops, the description 2"):
        model.predict("kernel", _kernel(mma=8), Work("s", 2, 1.0, ((1, 1), (1, 1))), A5000)
    with pytest.raises(ValueError, match="does 128 multiply-adds of 1000 needed"):
        model.predict("kernel", _kernel(mma=8), Work("s", 2, 1.0, ((1, 1),), needed=1000.0), A5000)
    with pytest.raises(ValueError, match="no program fits"):
        model.predict("kernel", dataclasses.replace(_kernel(mma=8), shared=2**20), Work("s", 1, 1.0), A5000)


def test_an_unrolled_loop_counts_several_iterations() -> None:
    work = Work("s", 64, 1.0, ((90,) * 64,), needed=8.0 * 64 * 90 * 2048, step=8.0 * 2048)
    assert model.predict("kernel", _kernel(mma=9 * 2048, issued=9), work, A5000).redundancy == 1.0


@pytest.mark.parametrize("kind", ["forward", "grad_query", "grad_key"])
def test_attention_visits_every_tile_that_a_query_sees(kind: str) -> None:
    block_m, block_n = 32, 64
    constants = {"BLOCK_M": block_m, "BLOCK_N": block_n, "ONE_LOOP": False}
    case = CompileCase(f"{kind}/64/bf16", None, {}, constants, (), 4)
    (work,) = [work for work in attention.works(case, A5000) if work.size == "1x4096x32:8x64"]
    tiles = sum(  # of a head: those whose first key is not behind their last query
        n * block_n <= m * block_m + block_m - 1 for m in range(4096 // block_m) for n in range(4096 // block_n)
    )
    assert sum(map(sum, work.trips)) == 32 * tiles
    assert work.needed == attention.PRODUCTS[kind] * 32 * 64 * (4096 * 4097 // 2)
    assert attention.works(dataclasses.replace(case, name=f"{kind}/64/bf16/window"), A5000) == []


def test_a_random_graph_has_its_edges() -> None:
    degrees = edge_attention.degrees(8256, 36_800)
    assert len(degrees) == 8256
    assert sum(degrees) == pytest.approx(36_800, rel=0.01)


@dataclasses.dataclass(frozen=True)
class _Published:
    """A kernel with a published speed, as a share of the matrix units' peak."""

    code: str
    machine: Machine
    kernel: tuple[int, int, int]  # warps, registers, bytes of shared memory
    work: Work
    share: float


# The A100 of Triton's regression tests ran at 1.35 GHz, and its shares are of the peak at that clock.
A100 = Machine("A100 40 GB", 80, 108, 1.35e9, 1.35e9, 256, 0, 1.555e12, 47)
FLASH_TILES, FLASH_PROGRAMS = 4096 // 128, 4 * 32 * 4096 // 128  # batch 4, 32 heads, 4,096 tokens, 128 x 128 tiles
PUBLISHED = (
    # triton-lang/triton, python/test/regression/test_performance.py: fp16 8192^3.
    _Published(
        "triton-matmul", A100, (8, 214, 49_152),
        Work("8192", 2048, 6.0 * 8192**2, ((256,) * 2048,), needed=8192.0**3), 0.77,
    ),
    # gpu-mode/ring-attention issue 10: FlashAttention-2 forward, head size 64, on an RTX A5000, 81.7 of 111 TFLOP/s.
    # One key tile is peeled off the loop.
    _Published(
        "flash-attention-2", A5000, (4, 255, 49_152),
        Work(
            "4096", FLASH_PROGRAMS, 8.0 * 4 * 32 * 4096 * 64, ((FLASH_TILES - 1,) * FLASH_PROGRAMS,),
            needed=2.0 * 4 * 32 * 4096 * (4096 - 128) * 64,
        ),
        81.7 / 111.1 * (FLASH_TILES - 1) / FLASH_TILES,
    ),
)  # fmt: skip


@pytest.mark.parametrize("published", PUBLISHED, ids=lambda one: one.code)
def test_published_kernels_are_predicted(published: _Published) -> None:
    facts = tuple(row for row in tables.load(CALIBRATION, LoopRow) if row.code == published.code)
    row = model.predict(published.code, Kernel(*published.kernel, facts), published.work, published.machine)
    assert row.share == pytest.approx(published.share, rel=0.04)


def _outcome(share: float) -> tuple[Outcome, Tables]:
    row = Row("forward/64", 86, "3.7.1", 4, 40, 4096, 0, 0, 0, 4, 1, 0.5, "0" * 16)
    prediction = Prediction("forward/64", "s", "RTX A5000", 40, 0, 1, 1, 1.0, 1, 1, 0, 1.0, 1.0, "matrix", 9.0, share)
    return Outcome(row, False, False, predicted=(prediction,)), Tables([row], [], [prediction])


def test_a_lost_twentieth_is_found() -> None:
    outcome, stored = _outcome(0.5)
    assert compile_gate.losses([outcome], stored) == []
    slower = dataclasses.replace(outcome, predicted=(dataclasses.replace(outcome.predicted[0], share=0.47),))
    assert "predicted share of peak 0.5 -> 0.47" in compile_gate.losses([slower], stored)[0]
    hardly = dataclasses.replace(outcome, predicted=(dataclasses.replace(outcome.predicted[0], share=0.48),))
    assert compile_gate.losses([hardly], stored) == []
    assert "no predicted speed" in compile_gate.losses([outcome], dataclasses.replace(stored, predicted=[]))[0]
    assert "no launch any more" in compile_gate.losses([dataclasses.replace(outcome, predicted=())], stored)[0]
    other = dataclasses.replace(slower, row=dataclasses.replace(slower.row, triton="9.9.9"))
    assert compile_gate.losses([other], stored) == []


def test_tables_survive_the_round_trip_and_keep_other_devices(tmp_path: Path) -> None:
    outcome, stored = _outcome(0.5)
    foreign = dataclasses.replace(stored.predicted[0], device="H200")
    loop = LoopRow(**dataclasses.asdict(_facts(0, issued=3)), code="0" * 16)
    compile_gate.save(tmp_path / "op.csv", stored.rows)
    compile_gate.save_speed(
        tmp_path, "op", [dataclasses.replace(outcome, loops=(loop,))], dataclasses.replace(stored, predicted=[foreign])
    )
    assert Tables.load(tmp_path, "op") == Tables(stored.rows, [loop], [foreign, stored.predicted[0]])


def test_the_command_says_predicted_everywhere() -> None:
    header = render(_outcome(0.5)[1].predicted).splitlines()[0]
    assert "predicted us" in header
    assert "predicted share" in header
