"""Functions of the CPU kernels against fp64, at every instruction-set level."""

from collections.abc import Iterator

import pytest
import torch

from astrobiogen import ops
from astrobiogen.kernels import registry

extension = pytest.importorskip("astrobiogen._C", reason="the C++ extension is not built")
LEVELS = extension.cpu_levels()
UNIT = 2.0**-24  # half a unit in the last place of 1


@pytest.fixture(params=LEVELS)
def level(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test at one level, by our kernels; the highest comes back after it."""
    extension.set_cpu_level(request.param)
    with registry.only_ops():
        yield request.param
    extension.set_cpu_level(LEVELS[-1])


@pytest.mark.usefixtures("level")
def test_the_normal_distribution_of_gelu() -> None:
    """gelu(x) = x Phi(x) behind a convolution that copies its input. Phi is right to a relative 6.2 (1 + x^2) 2^-24
    (the fit, its fp32 arithmetic, and e^(-x^2 / 2) of a rounded x^2); two more roundings are the products'."""
    x = torch.linspace(-12.0, 12.0, 100_001)
    weight = torch.zeros(8, 1, 1, 3)
    weight[:, 0, 0, 1] = 1.0
    found = ops.conv_nd(x.view(1, 1, 1, -1), weight, padding=(0, 1), activation="gelu")[0, 0, 0].double()
    wide = x.double()
    exact = wide * torch.special.erfc(-wide / 2**0.5) / 2
    bound = (6.2 * (1 + wide.square()) + 2) * UNIT * exact.abs() + torch.finfo(torch.float32).tiny
    assert ((found - exact).abs() <= bound).all()
    assert float(((found - exact).abs() / bound).max()) > 0.3  # the bound is no looser than it needs to be


@pytest.mark.usefixtures("level")
def test_gelu_far_out() -> None:
    x = torch.tensor([-1e30, -40.0, -0.0, 0.0, 40.0, 1e30, torch.inf, torch.nan])
    found = ops.conv_nd(x.view(1, 1, 1, -1), torch.ones(8, 1, 1, 1), activation="gelu")[0, 0, 0]
    assert torch.equal(found[:-1], torch.tensor([0.0, 0.0, 0.0, 0.0, 40.0, 1e30, torch.inf]))
    assert found[-1].isnan()
