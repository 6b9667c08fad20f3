"""What `swap_layers` did to a model, layer by layer, and the way back."""

import collections
import dataclasses
from collections.abc import Callable

from torch import nn


@dataclasses.dataclass(frozen=True)
class Swap:
    """One layer that was looked at: its name in the model, its class, what it is now (empty: as before) and why."""

    name: str
    was: str
    now: str
    reason: str


class SwapTable(list[Swap]):
    """What `swap_layers` did: one row per norm, MLP, attention, linear layer and convolution of the model. Its `repr`
    is a summary, its `str` the whole table.
    """

    def __init__(self) -> None:
        super().__init__()
        self._undo: list[Callable[[], None]] = []

    @property
    def swapped(self) -> list[Swap]:
        """The layers that were replaced."""
        return [row for row in self if row.now]

    def on_restore(self, undo: Callable[[], None]) -> None:
        """Remember a step of `restore`."""
        self._undo.append(undo)

    def restore(self) -> None:
        """Put the layers that were replaced back where they were, with the parameters and children that their
        replacements have now, and the attention implementation that was chosen before.
        """
        while self._undo:
            self._undo.pop()()

    def __repr__(self) -> str:
        swapped = collections.Counter(row.was for row in self.swapped)
        left = collections.Counter(row.was for row in self if not row.now)
        told = [", ".join(f"{count} {name}" for name, count in kinds.most_common()) for kinds in (swapped, left)]
        return f"swapped {len(self.swapped)} of {len(self)} layers: {told[0] or 'none'}; left: {told[1] or 'none'}"

    def __str__(self) -> str:
        rows = [
            ("layer", "was", "is", "why"),
            *((row.name, row.was, row.now or "unchanged", row.reason) for row in self),
        ]
        widths = [max(len(row[column]) for row in rows) for column in range(4)]
        return "\n".join("  ".join(text.ljust(width) for text, width in zip(row, widths)).rstrip() for row in rows)


def put(parent: nn.Module, name: str, new: nn.Module) -> Callable[[], None]:
    """Set a child of `parent`; returns the way back."""
    old = parent._modules[name]

    def undo() -> None:
        if parent._modules.get(name) is new and old is not None:
            old._parameters.update({key: new._parameters[key] for key in new._parameters if key in old._parameters})
            old._modules.update({key: new._modules[key] for key in new._modules if key in old._modules})
            old.training = new.training
            parent._modules[name] = old

    setattr(parent, name, new)
    return undo
