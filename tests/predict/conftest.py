"""Checkpoints of small untrained models on the bundled data, and a user's files beside them."""

import dataclasses
import gzip
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from astrobiogen.training import checkpoint
from astrobiogen.training.batches import assemble
from astrobiogen.training.config import DataConfig, as_dict, parser, preset
from tests.data.raw_files import climate, network


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two checkpoints as a run's best ones are: other weights, the same data."""
    wanted = as_dict.to_dict(dataclasses.replace(preset("tiny"), data=DataConfig(limit=8)))
    one_layer = {part: {"num_layers": 1} for part in ("llm_config", "graph_config")}
    config = parser.from_dict(wanted | {"model": one_layer})
    bundle = assemble.load_bundle(config)
    folders = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        model = assemble.assemble(config, bundle).task.model
        documents = {"best": {"config": as_dict.to_dict(config), "epoch": 0}, "data": bundle.statistics()}
        store = checkpoint.CheckpointStore(tmp_path_factory.mktemp(f"run{seed}"), keep=2)
        folders.append(store.save(1, checkpoint.Content({"model": dict(model.state_dict())}, documents)))
    return folders


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """climates/ with two epochs of a planet, a Zarr store and half a file; networks/ with two and half a one."""
    for name in ("climates", "networks"):
        (tmp_path / name).mkdir()
    for epoch in (0, 1):
        climate(4.0 * epoch, 1).to_netcdf(tmp_path / f"climates/new_g{epoch}.nc", engine="netcdf4")
    climate(-8.0, 1).to_zarr(tmp_path / "climates/mine.zarr", consolidated=False)
    whole = (tmp_path / "climates/new_g0.nc").read_bytes()
    (tmp_path / "climates/half.nc").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "networks/a.json").write_bytes(network(12, True))
    (tmp_path / "networks/b.json.gz").write_bytes(gzip.compress(network(15, False)))
    (tmp_path / "networks/half.json.gz").write_bytes(gzip.compress(network(15, False))[:80])
    return tmp_path


@pytest.fixture
def asked(files: Path) -> Callable[..., list[str]]:
    """The options that name `files`."""

    def options(*more: str) -> list[str]:
        return ["--climates", str(files / "climates"), "--networks", str(files / "networks"), "--device", "cpu", *more]

    return options
