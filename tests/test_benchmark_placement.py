"""A benchmark times every candidate, and the copy, on several sets of tensors at other addresses."""

import torch

from benchmarks.harness import Work
from benchmarks.placement import LINE_BYTES, PAGE_BYTES, Placement
from benchmarks.runner import Bench


def test_a_moved_tensor_keeps_values_and_layout() -> None:
    base = torch.randn(12, 40)
    for tensor in (base, base[::2, 3:20], base.t(), torch.randn(5, 1).expand(5, 7), torch.randint(0, 9, (4,))):
        moved = Placement(0).moved(tensor)
        assert torch.equal(moved, tensor)
        assert (moved.stride(), moved.dtype) == (tensor.stride(), tensor.dtype)
        assert moved.data_ptr() != tensor.data_ptr()
        assert (moved.data_ptr() - tensor.data_ptr()) % LINE_BYTES == 0
    assert Placement(0).moved("mean") == "mean"


def test_placements_differ_in_the_distance_between_tensors() -> None:
    one, other = torch.randn(2, 2**20).unbind(0)
    distances = set()
    for seed in range(8):
        place = Placement(seed)
        first, second = place.moved(one), place.moved(other)
        distances.add((second.data_ptr() - first.data_ptr()) % PAGE_BYTES)
    assert len(distances) > 3
    assert all(distance % LINE_BYTES == 0 for distance in distances)


def test_every_candidate_is_timed_at_every_placement() -> None:
    """Same values at new addresses for each placement; the share of a copy lies within its own range."""
    seen: dict[str, set[int]] = {"ours": set(), "eager": set()}

    def candidate(name: str):
        def call(x: torch.Tensor, scale: float) -> torch.Tensor:
            if x.dtype == torch.float32:
                seen[name].add(x.data_ptr())
            return x * scale

        return call

    rows: list = []
    bench = Bench(torch.device("cpu"), quick=True, rows=rows)
    added = bench(
        op="scale",
        size="4096",
        dtype=torch.float32,
        arguments={"x": torch.randn(4096), "scale": 3.0},
        differentiable=("x",),
        ours=candidate("ours"),
        reference=candidate("eager"),
        work=Work(2 * 4096 * 4, 2 * 4096 * 4),
    )
    count = bench.settings.placements
    assert count > 1
    # backward runs no forward of its own, so the addresses are those of both modes' placements and the original
    assert all(len(addresses) > count for addresses in seen.values())
    timed = [row for row in added if row.status == "ok"]
    assert {row.placements for row in timed} == {count}
    for row in timed:
        if row.candidate in seen:
            assert 0 < row.share_low <= row.share_of_copy <= row.share_high
            assert row.rounds >= bench.settings.rounds
