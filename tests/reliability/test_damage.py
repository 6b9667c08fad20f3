"""A short form of `python -m tests.reliability.damage_checkpoints`."""

import random
from pathlib import Path

from tests.reliability.damage_checkpoints import experiment


def test_every_damage_is_noticed_and_the_checkpoint_before_is_used(tmp_path: Path) -> None:
    result = experiment(tmp_path, flips=300, cuts=150, every_byte=False, generator=random.Random(3))
    assert result["unnoticed"] == []
    assert set(result["files"]) == {  # type: ignore[call-overload]
        *("average.safetensors", "data.json", "gradients.safetensors", "manifest.json", "model.safetensors"),
        *("training.json", "training.safetensors"),
    }
    assert sum(result["damages_per_file"].values()) == 450  # type: ignore[attr-defined]
