"""What a comparison found, as one row of the table."""

import dataclasses
from collections.abc import Iterable
from typing import Literal

import torch

from astrobiogen.testing.tolerance import Measurement

Kind = Literal["op", "layer", "model", "training"]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclasses.dataclass(frozen=True)
class Row:
    """One thing in one dtype.

    Attributes:
        kind: what it is.
        name: of the op, layer, model or curve.
        dtype: "float32", "bfloat16" or "float16".
        comparisons: how many tensors were held against eager's.
        forward: largest error of a result, in units of the error allowed: up to 1 is right.
        backward: the same of a gradient; None: there is none to compare.
        failures: what was wrong; empty: nothing.
        note: anything else worth a line.
    """

    kind: Kind
    name: str
    dtype: str
    comparisons: int
    forward: float
    backward: float | None
    failures: tuple[str, ...] = ()
    note: str = ""

    @property
    def ok(self) -> bool:
        """Whether everything was within what is allowed."""
        return not self.failures


def row(kind: Kind, name: str, dtype: torch.dtype, found: Iterable[Measurement], failures: Iterable[str]) -> Row:
    """The row of `found` measurements; a comparison that failed is in `failures` in words."""
    shares: dict[bool, list[float]] = {False: [], True: []}
    for one in found:
        share = one.error / one.allowed if one.allowed else 0.0
        shares[one.quantity.startswith("gradient")].append(share)
    return Row(
        kind,
        name,
        str(dtype).removeprefix("torch."),
        len(shares[False]) + len(shares[True]),
        max(shares[False], default=0.0),
        max(shares[True]) if shares[True] else None,
        tuple(failures),
    )
