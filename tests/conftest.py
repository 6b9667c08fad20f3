"""Settings of every test run: the Triton interpreter without a GPU, a fixed seed per test, one thread."""

import os
import zlib
from collections.abc import Iterator

import hypothesis
import pytest
import torch

# Triton reads this once, when a module with `triton.jit` functions is imported; pytest imports this file before any
# test.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

hypothesis.settings.register_profile("repeatable", derandomize=True, deadline=None, max_examples=25, print_blob=True)
hypothesis.settings.load_profile("repeatable")


def pytest_configure(config: pytest.Config) -> None:
    """One thread per process: the tests are small, and workers of pytest-xdist would fight for the cores."""
    del config
    torch.set_num_threads(1)


def pytest_make_parametrize_id(val: object) -> str | None:
    """Name a case of bytes by their length: pytest would print them, and compressed bytes hold the time of day, so
    that two workers could collect different names.
    """
    return f"{len(val)}-bytes" if isinstance(val, bytes) else None


@pytest.fixture(autouse=True)
def seeded(request: pytest.FixtureRequest) -> Iterator[None]:
    """Seed PyTorch from the test's name, so that its numbers depend neither on the order of tests nor on the worker;
    leave no state behind.
    """
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(zlib.crc32(request.node.nodeid.encode()))
        threads = torch.get_num_threads()
        yield
        torch.set_num_threads(threads)
