"""Every layer with kernels against the same layer in plain PyTorch."""

import dataclasses
from collections.abc import Callable

import torch
from torch import nn

from astrobiogen import layers
from astrobiogen.testing.tolerance import Subject
from astrobiogen.validate import modules
from astrobiogen.validate.rows import Row, row

Inputs = tuple[torch.Tensor, ...]


@dataclasses.dataclass(frozen=True)
class Sample:
    """How to make a layer, and a shape of its input: head dimension 68 and odd sizes where it has any."""

    make: Callable[[], nn.Module]
    shape: tuple[int, ...] = ()
    inputs: Callable[[torch.dtype], Inputs] | None = None
    plain: Callable[[], nn.Module] | None = None  # PyTorch's own layer, where there is one that it serves as

    def draw(self, dtype: torch.dtype) -> Inputs:
        """Inputs from PyTorch's generator."""
        return self.inputs(dtype) if self.inputs else (torch.randn(self.shape, dtype=torch.float64).to(dtype),)


SAMPLES: dict[str, Sample] = {
    "Linear": Sample(lambda: layers.Linear(67, 33), (37, 67)),
    "RMSNorm": Sample(lambda: layers.RMSNorm(272), (37, 272)),
    "SwiGLU": Sample(lambda: layers.SwiGLU(68, 181), (37, 68)),
    "RotaryEmbedding": Sample(lambda: layers.RotaryEmbedding(68), inputs=lambda _: (torch.arange(900, 1000),)),
    "GroupedQueryAttention": Sample(lambda: layers.GroupedQueryAttention(272, 4, 1), (2, 37, 272)),
    "LinearCrossEntropy": Sample(
        lambda: layers.LinearCrossEntropy(68, 301),
        inputs=lambda dtype: (torch.randn(37, 68, dtype=torch.float64).to(dtype), torch.randint(301, (37,))),
    ),
    "ConvNd": Sample(lambda: layers.ConvNd(2, 3, 8, 3, padding=1, padding_mode="circular"), (2, 3, 17, 13)),
    "Conv1d": Sample(lambda: layers.Conv1d(3, 8, 3, 1, 1), (2, 3, 67), plain=lambda: nn.Conv1d(3, 8, 3, 1, 1)),
    "Conv2d": Sample(
        lambda: layers.Conv2d(4, 8, 3, 2, 1, groups=2),
        (2, 4, 17, 13),
        plain=lambda: nn.Conv2d(4, 8, 3, 2, 1, groups=2),
    ),
    "Conv3d": Sample(lambda: layers.Conv3d(2, 8, (1, 2, 3)), (2, 2, 5, 7, 9), plain=lambda: nn.Conv3d(2, 8, (1, 2, 3))),
    "Conv4d": Sample(lambda: layers.Conv4d(2, 8, 3, padding=1), (1, 2, 4, 3, 5, 6)),
    "Conv5d": Sample(lambda: layers.Conv5d(2, 8, 3, padding=1), (1, 2, 4, 3, 3, 5, 6)),
    "ConvTransposeNd": Sample(
        lambda: layers.ConvTransposeNd(2, 3, 8, 2, 2), (2, 3, 9, 7), plain=lambda: nn.ConvTranspose2d(3, 8, 2, 2)
    ),
    "ConvTranspose1d": Sample(
        lambda: layers.ConvTranspose1d(3, 8, 3, 2, 1, 1), (2, 3, 67), plain=lambda: nn.ConvTranspose1d(3, 8, 3, 2, 1, 1)
    ),
    "ConvTranspose2d": Sample(
        lambda: layers.ConvTranspose2d(4, 8, 3, 2, 1), (2, 4, 9, 7), plain=lambda: nn.ConvTranspose2d(4, 8, 3, 2, 1)
    ),
    "ConvTranspose3d": Sample(
        lambda: layers.ConvTranspose3d(2, 8, (1, 2, 3)),
        (2, 2, 5, 4, 6),
        plain=lambda: nn.ConvTranspose3d(2, 8, (1, 2, 3)),
    ),
    "ConvTranspose4d": Sample(lambda: layers.ConvTranspose4d(2, 8, 2, 2), (1, 2, 3, 2, 4, 3)),
    "ConvTranspose5d": Sample(lambda: layers.ConvTranspose5d(2, 8, (1, 2, 1, 3, 2)), (1, 2, 2, 3, 2, 4, 3)),
    "ConvNormAct": Sample(lambda: layers.ConvNormAct(2, 3, 8, 3, "group", norm_groups=2, padding=1), (2, 3, 17, 13)),
}
NO_SAMPLE = {"KeyValueCache": "holds the keys and values of one generation, and is no module"}


def _call(layer: nn.Module, inputs: Inputs) -> dict[str, torch.Tensor]:
    """Results by number, a scalar loss among them."""
    results = layer(*inputs)
    return {f"output {k}": one for k, one in enumerate((results,) if isinstance(results, torch.Tensor) else results)}


def check(name: str, dtype: torch.dtype, device: torch.device) -> Row:
    """Hold one layer, with weights and input in `dtype`, against eager."""
    sample = SAMPLES[name]

    def draw(seed: int) -> tuple[modules.Tensors, modules.Tensors, modules.Tensors]:
        torch.manual_seed(seed)
        layer = sample.make().to(device=device, dtype=dtype)
        plain = sample.plain().to(device=device, dtype=dtype) if sample.plain else None
        if plain is not None:
            plain.load_state_dict(layer.state_dict())
        return modules.three(layer, tuple(value.to(device) for value in sample.draw(dtype)), _call, plain=plain)

    return row("layer", name, dtype, *modules.compare(Subject(name, "sample", dtype), draw))
