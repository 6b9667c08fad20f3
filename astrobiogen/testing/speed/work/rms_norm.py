"""Launches of RMSNorm at its benchmark sizes; memory-bound."""

from astrobiogen.kernels.cases import CompileCase
from astrobiogen.kernels.rms_norm.samples import BENCHMARK_SIZES, GPU_BENCHMARK_SIZES
from astrobiogen.kernels.rms_norm.triton_kernels import FINAL_COLS, FINAL_ROWS, backward_programs
from astrobiogen.testing.speed.machines import Machine
from astrobiogen.testing.speed.model import Work

HALF, SINGLE = 2, 4  # bytes


def works(case: CompileCase, machine: Machine) -> list[Work]:
    """Forward reads x (and the residual) and writes y (and the sum); backward reads x and grad_y and writes grad_x;
    the last kernel adds the partial weight gradients.
    """
    kind, hidden, _ = case.name.split("/")
    sizes = [size for size in (*BENCHMARK_SIZES, *GPU_BENCHMARK_SIZES) if size.hidden == int(hidden)]
    return [_work(kind, size.rows, size.hidden, case, machine) for size in sizes]


def _work(kind: str, rows: int, hidden: int, case: CompileCase, machine: Machine) -> Work:
    label, row = f"{rows}x{hidden}", rows * hidden * HALF
    programs = backward_programs(rows, hidden, machine.multiprocessors)
    if kind == "weight_final":
        strips, steps = -(-hidden // FINAL_COLS), -(-programs // FINAL_ROWS)
        return Work(label, strips, SINGLE * programs * hidden + HALF * hidden, ((steps,) * strips,))
    add = kind.startswith("add_")
    if kind.endswith("forward"):
        tensors = 4 if add else 2
        return Work(label, -(-rows // case.constexprs["R"]), tensors * row + SINGLE * rows + HALF * hidden)
    steps = -(-rows // case.constexprs["R"])
    trips = tuple(len(range(program, steps, programs)) for program in range(programs))
    tensors = 4 if add else 3
    return Work(label, programs, tensors * row + SINGLE * (rows + programs * hidden) + HALF * hidden, (trips,))
