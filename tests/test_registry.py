"""Choosing implementations: `use_kernels`, `kernel_status`, the reference as the default kernel, refusals."""

import subprocess
import sys
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import astrobiogen
from astrobiogen import ops
from astrobiogen.kernels import registry
from astrobiogen.kernels.rms_norm import reference


@pytest.fixture
def inputs() -> tuple[torch.Tensor, torch.Tensor]:
    """x [3, 8] and weight [8] that want gradients."""
    return torch.randn(3, 8, requires_grad=True), torch.randn(8, requires_grad=True)


@pytest.fixture
def cpu_kernel_gone() -> Iterator[None]:
    """Serve `rms_norm` on the CPU by the registry's fallback, as in an install without the extension."""
    entry = registry._ENTRIES["rms_norm"]
    library = torch.library.Library(registry.NAMESPACE, "IMPL")
    warned = set(registry._WARNED)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="(?s).*Overriding a previously registered kernel")
        library.impl("rms_norm", registry._warning_reference("rms_norm", entry.reference), "CPU", allow_override=True)
    registry._WARNED.discard(("rms_norm", "cpu"))
    yield
    library._destroy()
    registry._WARNED.clear()
    registry._WARNED.update(warned)


def test_reference_mode_is_twice_differentiable_and_ends_with_its_block(
    inputs: tuple[torch.Tensor, torch.Tensor],
) -> None:
    x, weight = inputs
    with astrobiogen.use_kernels("reference"):
        assert registry.reference_selected()
        (grad,) = torch.autograd.grad(ops.rms_norm(x, weight).sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(grad.square().sum(), x)
    assert not registry.reference_selected()
    (expected,) = torch.autograd.grad(reference.rms_norm(x, weight).sum(), x, create_graph=True)
    (expected_second,) = torch.autograd.grad(expected.square().sum(), x)
    assert torch.equal(grad, expected)
    assert torch.equal(second, expected_second)


def test_modes_nest_and_survive_an_exception() -> None:
    with astrobiogen.use_kernels("reference"):
        with astrobiogen.use_kernels("auto"):
            assert not registry.reference_selected()
        assert registry.reference_selected()
        with pytest.raises(KeyError), astrobiogen.use_kernels("auto"):
            raise KeyError
        assert registry.reference_selected()
    assert not registry.reference_selected()


def test_modes_overlap_in_threads_and_each_block_ends_only_itself() -> None:
    first, second = astrobiogen.use_kernels("reference"), astrobiogen.use_kernels("reference")
    with ThreadPoolExecutor(1) as one, ThreadPoolExecutor(1) as other:
        one.submit(first.__enter__).result()
        other.submit(second.__enter__).result()
        one.submit(first.__exit__, None, None, None).result()
        assert registry.reference_selected()  # the second block is still open
        other.submit(second.__exit__, None, None, None).result()
    assert not registry.reference_selected()


def test_a_thread_keeps_the_reference_while_another_asks_for_kernels() -> None:
    with astrobiogen.use_kernels("reference"), ThreadPoolExecutor(1) as other:
        block = astrobiogen.use_kernels("auto")
        other.submit(block.__enter__).result()
        assert registry.reference_selected()
        other.submit(block.__exit__, None, None, None).result()
    assert not registry.reference_selected()


def test_many_threads_leave_the_kernels_selected() -> None:
    def work(seed: int) -> None:
        for step in range(200):
            with astrobiogen.use_kernels("reference" if (seed + step) % 2 else "auto"):
                pass

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))
    assert not registry.reference_selected()
    assert not registry._SELECTION._open


def test_an_unknown_mode_is_refused() -> None:
    with (
        pytest.raises(ValueError, match=r"mode must be 'auto' or 'reference', got 'fast'"),
        astrobiogen.use_kernels("fast"),  # pyright: ignore[reportArgumentType]
    ):
        pass


def test_switching_modes_recompiles(inputs: tuple[torch.Tensor, torch.Tensor]) -> None:
    x, weight = inputs
    torch.compiler.reset()
    compiled = torch.compile(ops.rms_norm, fullgraph=True, backend="aot_eager")
    kernels = compiled(x, weight)
    with astrobiogen.use_kernels("reference"):
        plain = compiled(x, weight)
        (grad,) = torch.autograd.grad(plain.sum(), x, retain_graph=True)
    torch.compiler.reset()
    assert torch.equal(plain, reference.rms_norm(x, weight))
    assert torch.allclose(kernels, plain, rtol=1e-5, atol=1e-6)
    assert grad.shape == x.shape


def test_status_names_every_op_on_both_devices_and_prints_a_table() -> None:
    table = astrobiogen.kernel_status()
    assert [(row.op, row.device) for row in table] == [(op, d) for op in registry.ops() for d in ("cpu", "cuda")]
    lines = str(table).splitlines()
    assert len(lines) == len(table) + 1
    assert lines[0].split() == ["op", "device", "implementation", "reason"]
    for row in table:
        assert row.implementation in ("c++", "triton", "reference")
        assert row.reason
        key = row.device.upper()
        assert (row.implementation != "reference") == registry.has_kernel(row.op, key)


@pytest.mark.usefixtures("cpu_kernel_gone")
def test_a_reference_that_stands_in_says_so_once(inputs: tuple[torch.Tensor, torch.Tensor]) -> None:
    x, weight = inputs
    with pytest.warns(UserWarning, match=r"astrobiogen\.rms_norm runs its plain PyTorch reference on cpu"):
        first = ops.rms_norm(x, weight)
    second = ops.rms_norm(x, weight)  # a second warning would be an error
    assert torch.equal(first, second)
    assert torch.equal(first, reference.rms_norm(x, weight))


def test_other_devices_get_shapes_from_the_fake() -> None:
    x, weight = torch.empty(3, 8, device="meta"), torch.empty(8, device="meta")
    y = ops.rms_norm(x, weight)
    assert y.shape == (3, 8)
    assert y.device.type == "meta"


def test_the_second_derivative_is_refused_with_the_way_out(inputs: tuple[torch.Tensor, torch.Tensor]) -> None:
    x, weight = inputs
    (grad,) = torch.autograd.grad(ops.rms_norm(x, weight).square().sum(), x, create_graph=True)
    with pytest.raises(
        RuntimeError, match=r"has no second derivative: differentiate twice with torch\.func .* or under"
    ):
        torch.autograd.grad(grad.sum(), x)


def test_every_op_has_the_rules_that_callers_need() -> None:
    without = {"edge_order"}  # integers in, integers out
    for name in registry.ops():
        qualified = f"{registry.NAMESPACE}::{name}"
        differentiable = torch._C._dispatch_has_kernel_for_dispatch_key(qualified, "Autograd")
        assert differentiable == (name not in without), f"{name}: autograd registration {differentiable}"
        assert torch._C._dispatch_has_kernel_for_dispatch_key(qualified, "Meta"), f"{name}: no fake"
        assert registry.has_kernel(name, "FuncTorchDynamicLayerFrontMode"), f"{name}: no rule inside torch.func"


def test_importing_the_library_loads_no_triton() -> None:
    code = "import sys, astrobiogen; sys.exit('astrobiogen.kernels.rms_norm.triton_kernels' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
