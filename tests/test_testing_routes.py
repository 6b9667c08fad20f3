"""The battery's checks of what PyTorch demands of an op, and of the routes to its implementations: planted faults."""

import pytest
import torch

from astrobiogen import ops, testing
from astrobiogen.kernels import registry
from astrobiogen.kernels.cases import Case
from astrobiogen.kernels.rms_norm import reference as rms_norm_reference
from astrobiogen.kernels.rms_norm import triton_kernels as rms_norm_triton

Tensor = torch.Tensor
PLAIN = Case("3x5", lambda m: {"x": m.randn(3, 5), "weight": m.randn(5)}, ("x", "weight"), gradcheck=True)


def reference(x: Tensor, weight: Tensor) -> Tensor:
    """x * weight + mean(x, last axis)."""
    return x * weight + x.mean(-1, keepdim=True)


def _writes_its_input(x: Tensor, weight: Tensor) -> Tensor:
    y = reference(x, weight)
    x.detach()[0, 0] += 1
    return y


def test_opcheck_finds_a_wrong_fake_and_an_undeclared_mutation() -> None:
    with torch.library._scoped_library("astrobiogen_faults", "DEF") as library:
        library.define("scaled(Tensor x, Tensor weight) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
        library.impl("scaled", reference, "CPU")
        torch.library.register_fake("astrobiogen_faults::scaled", lambda x, _: x.new_empty(x.shape[:1]), lib=library)
        library.define("mutating(Tensor x, Tensor weight) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
        library.impl("mutating", _writes_its_input, "CPU")
        torch.library.register_fake("astrobiogen_faults::mutating", lambda x, _: torch.empty_like(x), lib=library)
        case = Case("3x5", PLAIN.build, ())
        for op in (torch.ops.astrobiogen_faults.scaled.default, torch.ops.astrobiogen_faults.mutating.default):
            with pytest.raises(AssertionError, match="opcheck"):
                testing.check_opcheck(op, case)


def test_opcheck_checks_the_backward_op_too_and_wants_an_op_of_ours() -> None:
    checked = testing.check_opcheck(ops.rms_norm, PLAIN)
    assert checked == ["astrobiogen.rms_norm.default", "astrobiogen.rms_norm_backward.default"]
    with pytest.raises(AssertionError, match="no astrobiogen op was called"):
        testing.check_opcheck(reference, PLAIN)


def test_a_graph_break_is_found() -> None:
    def breaks(x: Tensor, weight: Tensor) -> Tensor:
        torch._dynamo.graph_break()
        return reference(x, weight)

    with pytest.raises(AssertionError, match=r"torch\.compile"):
        testing.check_fullgraph(breaks, PLAIN)
    testing.check_fullgraph(reference, PLAIN)


def test_the_triton_route_reaches_the_launcher_and_is_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("rms_norm", "rms_norm_backward")
    arguments = (ops.rms_norm, rms_norm_reference.rms_norm, PLAIN, torch.float32)
    testing.check_op(*arguments, ops=names, implementation="triton")
    launcher = rms_norm_triton.rms_norm

    def faulty(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        y, rstd = launcher(x, weight, eps)
        y[..., -1] = 0
        return y, rstd

    before = registry.has_kernel("rms_norm", "CPU")
    monkeypatch.setattr(rms_norm_triton, "rms_norm", faulty)
    with pytest.raises(AssertionError, match=r"rms_norm \[triton, .*output 0: largest error"):
        testing.check_op(*arguments, ops=names, implementation="triton")
    assert registry.has_kernel("rms_norm", "CPU") == before
    testing.check_op(*arguments, ops=names)


def test_routes_refuse_what_does_not_exist() -> None:
    with pytest.raises(AssertionError, match="no such op"), testing.route(("rms_nrom",), "cpu"):
        pass
    with pytest.raises(AssertionError, match="no Triton launcher was reached"):
        testing.check_op(reference, reference, PLAIN, torch.float32, ops=("rms_norm",), implementation="triton")
