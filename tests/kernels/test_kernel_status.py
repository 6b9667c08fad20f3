"""`kernel_status` tells the truth for every kind of device, and what a GPU cannot run goes to the reference."""

import warnings
from collections.abc import Callable, Iterator

import pytest
import torch

import astrobiogen
from astrobiogen.kernels import devices, registry
from astrobiogen.testing import compile_gate

ROWS = {"rms_norm", "swiglu", "rope", "attention", "conv_nd", "linear_cross_entropy", "edge_attention"}
Pretend = Callable[..., None]


@pytest.fixture
def pretend(monkeypatch: pytest.MonkeyPatch) -> Iterator[Pretend]:
    """A machine with GPUs of the given capabilities, as far as PyTorch answers."""

    def pretend(*capabilities: tuple[int, int], hip: str | None = None) -> None:
        monkeypatch.setattr(torch.version, "hip", hip)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capabilities[device.index])
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"GPU {device.index}")
        devices.unfit.cache_clear()

    yield pretend
    devices.unfit.cache_clear()


def implementations(device: str) -> set[tuple[str, str]]:
    return {
        (row.implementation, row.reason)
        for row in astrobiogen.kernel_status()
        if row.device == device and row.op in ROWS
    }


def test_every_gpu_has_its_own_rows(pretend: Pretend) -> None:
    pretend((8, 6), (7, 5), (9, 0), (12, 0))
    assert {kind for kind, _ in implementations("cuda:0")} == {"triton"}
    ((kind, reason),) = implementations("cuda:1")
    assert kind == "reference"
    assert "sm_75" in reason
    assert {kind for kind, _ in implementations("cuda:2") | implementations("cuda:3")} == {"triton"}


def test_rocm_takes_the_reference(pretend: Pretend) -> None:
    pretend((9, 0), hip="7.0")
    ((kind, reason),) = implementations("cuda:0")
    assert kind == "reference"
    assert "ROCm" in reason


@pytest.mark.parametrize("kind", ["mps", "xpu"])
def test_another_accelerator_has_rows_and_a_warning(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda **_options: torch.device(kind, 0))
    ((implementation, reason),) = implementations(kind)
    assert implementation == "reference"
    assert kind in reason
    row = registry._status(registry._ENTRIES["rope"], torch.device(kind, 0))
    assert row.reason == reason


def test_a_gpu_without_kernels_warns_once_and_computes(pretend: Pretend, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend((7, 5))
    monkeypatch.setattr(registry, "_WARNED", set())
    reference = registry.reference_of("swiglu")
    launch = registry.launcher("swiglu")
    monkeypatch.setattr(registry, "_tensors", lambda _args: [FakeOnGpu()])
    gate, up = torch.randn(2, 3), torch.randn(2, 3)
    with pytest.warns(UserWarning, match=r"swiglu runs its plain PyTorch reference on cuda:0: .*sm_75"):
        result = launch(gate, up)
    assert torch.equal(result, reference(gate, up))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        launch(gate, up)


class FakeOnGpu:
    """A tensor as far as the registry asks."""

    device = torch.device("cuda", 0)
    layout = torch.strided
    dtype = torch.float32


def test_the_kernels_are_compiled_for_what_the_status_claims() -> None:
    """Every capability takes the tiles of one that the compile gate has a table for, and has as much shared memory."""
    for op in compile_gate.ops_with_cases():
        rows = compile_gate.load(compile_gate.TABLES / f"{op}.csv")
        for capability, tiles in devices.CAPABILITIES.items():
            compiled = [row for row in rows if row.target == tiles]
            assert compiled, (op, tiles)
            assert max(row.shared for row in compiled) <= compile_gate.LIMITS[capability].shared_per_block
