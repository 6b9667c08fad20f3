"""The bundled dataset, loaded once, and copies of it that a test may damage."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from astrobiogen import data
from astrobiogen.data.load import SAMPLE_FOLDER


@pytest.fixture(scope="session")
def bundle() -> data.DatasetBundle:
    """The real bundled dataset."""
    return data.load_bundled()


@pytest.fixture
def pack_copy(tmp_path: Path) -> Path:
    """A copy of the bundled pack that the test may change."""
    return Path(shutil.copytree(SAMPLE_FOLDER, tmp_path / "pack"))


@pytest.fixture
def reseal() -> Callable[[Path, str], None]:
    """Write the SHA-256 of a changed file into the manifest: faults must be found by content."""

    def seal(root: Path, name: str) -> None:
        manifest = json.loads((root / "manifest.json").read_text())
        raw = (root / name).read_bytes()
        manifest["files"][name].update(sha256=hashlib.sha256(raw).hexdigest(), bytes=len(raw))
        (root / "manifest.json").write_text(json.dumps(manifest))

    return seal
