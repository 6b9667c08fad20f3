"""A training step on a GPU waits for it nowhere. The device "meta" stands in for it: whoever asks for a value there
gets an error, and the library is told that values are there."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch_geometric.data import Batch

from astrobiogen import ops
from astrobiogen.kernels import values
from astrobiogen.models import MultiModalTrainingConfig, UnifiedMultiModalSystem, compute_multimodal_loss, presets


def on_device(value: Any) -> Any:
    """Tensors of the same shapes without values."""
    if isinstance(value, dict):
        return {name: on_device(one) for name, one in value.items()}
    movable: Any = value
    return movable.to("meta") if isinstance(value, torch.Tensor | Batch) else value


@pytest.fixture
def pretend(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device whose tensors pass for having values."""
    monkeypatch.setattr(values, "WITHOUT_VALUES", ())


@pytest.mark.usefixtures("pretend")
def test_a_training_step_reads_no_value(
    spec: Any, make_batch: Callable[..., dict[str, Any]],
    quiet: Callable[[MultiModalTrainingConfig], MultiModalTrainingConfig],
) -> None:  # fmt: skip
    batch = on_device(make_batch(3, spec))
    system = UnifiedMultiModalSystem(quiet(presets.tiny(spec))).train().to("meta")
    loss, parts = compute_multimodal_loss(system(batch), batch, system.config)
    assert loss.device.type == parts["graph"].device.type == "meta"
    loss.backward()
    torch.optim.AdamW(system.parameters(), foreach=True).step()
    with pytest.raises(RuntimeError, match="meta"):
        float(loss)


@pytest.mark.usefixtures("pretend")
def test_lists_of_edges_and_positions_read_no_value() -> None:
    index = torch.zeros(5, dtype=torch.int64, device="meta")
    assert ops.edge_lists(index, index, 3).by_sender.device.type == "meta"
    table = torch.zeros(8, 4, device="meta")
    assert ops.rope_gather(table, table, index)[0].shape == (5, 4)
    assert ops.rope_positions(index, 8).shape == (8,)


@pytest.mark.parametrize("wrong", [-1, 3])
def test_a_wrong_end_is_found_on_the_host(wrong: int) -> None:
    right = torch.tensor([0, 1, 2])
    with pytest.raises(ValueError, match=rf"sender must be in \[0, 3\), got values from .*{wrong}"):
        ops.edge_lists(right, torch.tensor([0, wrong, 1]), 3)
