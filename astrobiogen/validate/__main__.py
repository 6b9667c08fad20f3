"""`python -m astrobiogen.validate`: kernels against plain PyTorch, forward and backward, in every dtype.

Every operator on the sample cases of its tests (flagship and odd shapes), every layer, every model on real samples, and
training curves with and without kernels. A row tells the largest error in units of the error allowed: twice that of
eager in the same dtype against fp64, three times for gradients. Exit status: 0 all rows are right, 1 one is not.
"""

import argparse
import dataclasses
import json
import platform
import sys
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

import astrobiogen
from astrobiogen.system import console
from astrobiogen.system.extras import Later
from astrobiogen.validate import layers, operators
from astrobiogen.validate.rows import DTYPES, Kind, Row

if typing.TYPE_CHECKING:
    from astrobiogen.validate.curves import Curves

# They need the extra `train`; operators and layers do not.
models = Later("astrobiogen.validate.models")
curves = Later("astrobiogen.validate.curves")
picture = Later("astrobiogen.validate.picture")

KINDS: tuple[Kind, ...] = ("op", "layer", "model", "training")


def main(given: Sequence[str] | None = None) -> int:
    """Compare, print, write; return the exit status."""
    with console.best_effort():
        return _main(given)


def _main(given: Sequence[str] | None) -> int:
    options = _arguments(given)
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    rows: list[Row] = []
    tell = _quiet if options.json else _say
    for row in _compared(options.only, device):
        rows.append(row)
        tell(_line(row))
    trained: Curves = {}
    if "training" in options.only and options.steps:
        trained = curves.measured(options.steps, device, lambda name: tell(f"training {name} ..."))
        for row in curves.judged(trained):
            rows.append(row)
            tell(_line(row))
    wrong = [row for row in rows if not row.ok]
    title = f"kernels against eager on {device.type}: {len(rows) - len(wrong)} of {len(rows)} rows right"
    report = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "cpu",
        "versions": {"astrobiogen": astrobiogen.__version__, "torch": torch.__version__},
        "rows": [dataclasses.asdict(row) | {"ok": row.ok} for row in rows],
        "curves": trained,
    }
    if options.json:
        _say(json.dumps(report, indent=1))
    tell(title)
    if options.output is not None:
        options.output.mkdir(parents=True, exist_ok=True)
        (options.output / "validate.json").write_text(json.dumps(report, indent=1) + "\n")
        picture.draw(options.output / "validate.png", rows, trained, title)
        tell(f"{options.output / 'validate.json'}, {options.output / 'validate.png'}")
    return int(bool(wrong))


def _arguments(given: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m astrobiogen.validate", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--only", nargs="+", choices=KINDS, default=list(KINDS), help="default: all of them")
    parser.add_argument("--steps", type=int, default=200, help="updates of a training curve; 0: none (default 200)")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda if there is one")
    parser.add_argument("--output", type=Path, metavar="DIR", help="write validate.json and validate.png there")
    parser.add_argument("--json", action="store_true", help="print one JSON object in place of the table")
    options = parser.parse_args(given)
    if options.steps < 0:
        parser.error(f"argument --steps: must be 0 or more, got {options.steps}")
    return options


def _compared(only: Sequence[Kind], device: torch.device) -> Iterator[Row]:
    """Rows of operators, layers and models, each as soon as it is known."""
    for kind, names, check in (
        ("op", lambda: operators.OPERATORS, operators.check),
        ("layer", lambda: layers.SAMPLES, layers.check),
        ("model", lambda: models.MODELS, lambda *what: models.check(*what)),
    ):
        for name in names() if kind in only else ():
            for dtype in DTYPES:
                yield check(name, dtype, device)


def _line(row: Row) -> str:
    backward = "" if row.backward is None else f"backward {row.backward:5.2f}"
    line = (
        f"{'ok' if row.ok else 'WRONG':6}{row.kind:9}{row.name:29}{row.dtype:9}{row.comparisons:5} compared   "
        f"forward {row.forward:5.2f}   {backward:14} {row.note}"
    )
    return "\n".join([line.rstrip(), *(f"      {failure}" for failure in row.failures)])


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def _quiet(_: str) -> None:
    """Nothing beside the JSON object."""


if __name__ == "__main__":
    sys.exit(main())
