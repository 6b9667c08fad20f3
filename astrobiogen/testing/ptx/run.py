"""Command line of the emulator's battery; see `astrobiogen.testing.ptx.battery`."""

import argparse
import sys
import time
from collections.abc import Sequence

import torch

from astrobiogen.testing import check_op
from astrobiogen.testing.ptx import battery
from astrobiogen.testing.ptx.launch import ARCHITECTURES

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what is asked for; returns 1 if anything failed."""
    known = battery.batteries()
    parser = argparse.ArgumentParser(prog="python -m astrobiogen.testing.ptx.run", description=battery.__doc__)
    parser.add_argument("ops", nargs="*", help=f"of {', '.join(known)}; all of them if none is named")
    parser.add_argument("--case", action="append", help="only cases with this name; may be repeated")
    parser.add_argument("--dtype", action="append", choices=DTYPES, help="only this one; may be repeated")
    parser.add_argument("--arch", type=int, default=86, choices=ARCHITECTURES)
    parser.add_argument("--card", action="store_true", help="run on this machine's GPU instead of the emulator")
    parser.add_argument("--short", action="store_true", help="few cases, at least one per kernel, in fp16")
    options = parser.parse_args(arguments)
    unknown = set(options.ops) - set(known)
    if unknown:
        parser.error(f"unknown operators: {', '.join(sorted(unknown))}")
    if options.card and not torch.cuda.is_available():
        parser.error("--card: PyTorch finds no CUDA device")
    implementation = "triton" if options.card else f"sm_{options.arch}"
    torch.set_num_threads(1)
    ran = failed = 0
    for name in options.ops or known:
        one = known[name]
        for case in one.cases:
            if (options.case and case.name not in options.case) or (options.short and case.name not in one.short):
                continue
            for kind in options.dtype or (("fp16",) if options.short else DTYPES):
                start = time.perf_counter()
                try:
                    check_op(
                        one.function, one.reference, case, DTYPES[kind], ops=one.names,
                        implementation=implementation,  # type: ignore[arg-type]
                    )  # fmt: skip
                    verdict = "ok"
                except Exception as error:  # every case is reported, whatever one of them does
                    verdict = f"{type(error).__name__}: {error}"
                ran, failed = ran + 1, failed + (verdict != "ok")
                seconds = time.perf_counter() - start
                sys.stdout.write(f"{name}/{case.name}/{kind} {implementation}: {verdict} ({seconds:.1f} s)\n")
                sys.stdout.flush()
    sys.stdout.write(f"{ran} cases, {failed} failed\n")
    return int(failed > 0 or ran == 0)


if __name__ == "__main__":
    sys.exit(main())
