"""A convolution over five axes of a climate cube: python examples/conv5d_climate.py

Axes: month, geological epoch, pressure level, latitude, longitude. Months and longitudes are periodic, latitudes pass
over the pole, levels and epochs end.
"""

import torch

from astrobiogen.layers import Conv5d


def main() -> None:
    """Convolve, differentiate, and show that turning the planet turns the result."""
    torch.manual_seed(0)
    cube = torch.randn(1, 2, 12, 2, 5, 16, 32)  # [B, variables, month, epoch, level, latitude, longitude]
    layer = Conv5d(
        2, 8, kernel_size=(3, 1, 3, 3, 3), padding=(1, 0, 1, 1, 1),
        padding_mode=("circular", "zeros", "replicate", "pole", "circular"), activation="silu",
    )  # fmt: skip
    features = layer(cube)
    features.square().mean().backward()
    turned = layer(cube.roll(8, dims=-1))
    difference = float((turned - features.roll(8, dims=-1)).abs().max().detach())
    print(f"{tuple(cube.shape)} -> {tuple(features.shape)}; gradient norm {float(layer.weight.grad.norm()):.3f}")
    print(f"turned planet against turned result: {difference:.1e}")


if __name__ == "__main__":
    main()
