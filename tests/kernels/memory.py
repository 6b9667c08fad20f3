"""How much memory a call takes at most."""

from collections.abc import Callable
from typing import Any

import torch


def peak_bytes(call: Callable[[], object]) -> int:
    """Most bytes that PyTorch's allocator held at once over what was there before, results included."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        held = call()
    recorded: Any = profiler.profiler
    events = [event for event in recorded.kineto_results.events() if event.name() == "[memory]"]
    del held
    level = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        level += event.nbytes()
        peak = max(peak, level)
    return peak
