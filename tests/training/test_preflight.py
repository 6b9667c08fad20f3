"""`doctor --preflight`: named checks that find what is wrong."""

import json

import pytest
import torch

from astrobiogen import doctor
from astrobiogen.training import config
from astrobiogen.training.tools import preflight


def test_every_check_passes_and_there_are_twenty(capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.main(["--preflight", "--json"]) == 0
    checks = json.loads(capsys.readouterr().out)["checks"]
    names = [check["name"] for check in checks]
    assert len(set(names)) == len(names) >= 20
    assert {"presets", "held-out groups", "training step", "checkpoint", "disk", "bundled data"} <= set(names)
    assert all(check["found"] for check in checks)


def test_a_failing_check_is_named_and_ends_with_1(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(_name: str) -> config.TrainConfig:
        raise ValueError("epochs: got 0")

    only = list(preflight.checks(torch.device("cpu")))[:1]
    monkeypatch.setattr(preflight, "checks", lambda _device: iter(only))
    monkeypatch.setattr(config, "preset", broken)
    assert doctor.main(["--preflight", "--json"]) == 1
    checks = {check["name"]: check for check in json.loads(capsys.readouterr().out)["checks"]}
    assert checks["presets"] == {"name": "presets", "verdict": "failed", "found": "ValueError: epochs: got 0"}
