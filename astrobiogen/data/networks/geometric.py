"""PyTorch Geometric's graph and batch, loaded when the first one is made: its import takes twice as long as torch's."""

import importlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch_geometric.data import Batch, Data


def graph(**tensors: Any) -> "Data":
    """A `torch_geometric.data.Data` of `tensors`."""
    return importlib.import_module("torch_geometric.data").Data(**tensors)


def batch(graphs: "Sequence[Data]") -> "Batch":
    """The `torch_geometric.data.Batch` of `graphs`."""
    return importlib.import_module("torch_geometric.data").Batch.from_data_list(list(graphs))
