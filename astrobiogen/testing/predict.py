"""Predicted speed of the Triton kernels on GPUs that this machine does not have, from their machine code.

Per kernel and benchmark size: matrix-unit and other cycles of the inner loops, their loads and stores, spills inside
loops, redundancy (matrix work done over needed), registers, shared memory, programs per multiprocessor, how evenly the
grid fills the multiprocessors, and the time and share of peak that follow. Nothing is measured: `docs/gpu_evidence.md`
says what is modelled and what not.

    python -m astrobiogen.testing.predict attention --arch 86            # print, and compare with the tables
    python -m astrobiogen.testing.predict attention --arch 86 --update   # write the tables anew
"""

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

from astrobiogen.testing import compile_gate
from astrobiogen.testing.compile_gate import TABLES, Tables
from astrobiogen.testing.speed.machines import MACHINES
from astrobiogen.testing.speed.model import Prediction

HEADERS = {"microseconds": "predicted us", "share": "predicted share"}


def render(rows: Sequence[Prediction]) -> str:
    """The rows as a table for a terminal."""
    names = [field.name for field in dataclasses.fields(Prediction) if field.name != "device"]
    lines = [[HEADERS.get(name, name) for name in names]]
    lines += [[f"{getattr(row, name):g}" if name not in ("case", "size", "bound") else getattr(row, name)
               for name in names] for row in rows]  # fmt: skip
    widths = [max(len(line[column]) for line in lines) for column in range(len(names))]
    return "".join("  ".join(text.ljust(width) for text, width in zip(line, widths)).rstrip() + "\n" for line in lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns 1 if a predicted share fell by more than the gate allows."""
    known = compile_gate.ops_with_cases()
    parser = argparse.ArgumentParser(
        prog="python -m astrobiogen.testing.predict",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("ops", nargs="*", help=f"of {', '.join(known)}; all of them if none is named")
    parser.add_argument("--arch", type=int, choices=tuple(MACHINES), help="only this compute capability")
    parser.add_argument("--update", action="store_true", help="write the tables instead of comparing with them")
    parser.add_argument("--recount", action="store_true", help="disassemble all code anew, for another way of counting")
    parser.add_argument("--tables", type=Path, default=TABLES, help="folder of the tables (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args(arguments)
    unknown = set(options.ops) - set(known)
    if unknown:
        parser.error(f"unknown operators: {', '.join(sorted(unknown))}")
    targets = (options.arch,) if options.arch else tuple(MACHINES)
    complaints: list[str] = []
    for op in options.ops or known:
        stored = Tables.load(options.tables, op)
        reuse = dataclasses.replace(stored, loops=[]) if options.recount else stored
        outcomes = compile_gate.measure(op, workers=options.workers, known=reuse, targets=targets)
        errors = [f"{o.row.case} sm_{o.row.target}: {o.error}" for o in outcomes if o.error]
        for target in targets:
            rows = [row for o in outcomes if o.row.target == target for row in o.predicted]
            title = f"{op} on {MACHINES[target].name} (sm_{target}), predicted, not measured"
            sys.stdout.write(f"{title}:\n{render(rows)}\n")
        if options.update and not errors:
            compile_gate.save_speed(options.tables, op, outcomes, stored)
        else:
            errors += compile_gate.losses(outcomes, stored)
        complaints += [f"{op}: {line}" for line in errors]
    sys.stdout.write("".join(f"{line}\n" for line in complaints))
    return min(len(complaints), 1)


if __name__ == "__main__":
    sys.exit(main())
