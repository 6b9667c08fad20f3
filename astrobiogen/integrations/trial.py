"""A layer against the one that it is to replace, on random input."""

import torch
from torch import nn

_ROWS = 3
# Of the largest value. Both round in their own order; another formula is off by about one.
_LIMITS = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}


class Trials:
    """Trials of replacements, one for each class and size."""

    def __init__(self) -> None:
        self._told: dict[object, str] = {}

    def difference(self, ours: nn.Module, theirs: nn.Module) -> str:
        """Why `ours` and `theirs` are not the same function of x [3, H] and of their common parameters, empty if they
        are or cannot be tried (a model without storage): outputs and gradients within a few roundings.
        """
        held = next(iter(theirs.parameters()), None)
        if held is None or held.is_meta or type(held) is not nn.Parameter or held.dtype not in _LIMITS:
            return ""
        shapes = tuple((name, tuple(one.shape), one.dtype, one.device) for name, one in theirs.named_parameters())
        key = (type(theirs), shapes, repr(ours))
        if key not in self._told:
            generator = torch.Generator().manual_seed(0)
            x = torch.randn(_ROWS, held.shape[-1], generator=generator).to(held.device, held.dtype)
            self._told[key] = _difference(ours, theirs, x)
        return self._told[key]


def _difference(ours: nn.Module, theirs: nn.Module, x: torch.Tensor) -> str:
    for got, expected in zip(_results(ours, x), _results(theirs, x), strict=True):
        if (got is None) != (expected is None):
            return "a parameter is used by one and not by the other"
        if got is None or expected is None:
            continue
        if got.dtype != expected.dtype or got.shape != expected.shape:
            return f"a trial gave {got.dtype} {tuple(got.shape)} for {expected.dtype} {tuple(expected.shape)}"
        limit = _LIMITS[x.dtype] * float(expected.abs().max())
        if not float((got.double() - expected.double()).abs().max()) <= limit:
            return "a trial with random input gave other values"
    return ""


def _results(module: nn.Module, x: torch.Tensor) -> list[torch.Tensor | None]:
    held = [parameter for parameter in module.parameters() if parameter.requires_grad]
    given = x.detach().clone().requires_grad_()
    with torch.enable_grad():
        out = module(given)
        weights = torch.linspace(-1.0, 1.0, out.numel(), device=out.device).view_as(out).sin()
        grads = torch.autograd.grad((out.double() * weights).sum(), [given, *held], allow_unused=True)
    return [out.detach(), *grads]
