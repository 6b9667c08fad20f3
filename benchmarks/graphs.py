"""CUDA graphs of the calls that are timed, and the stream on which they are captured."""

import contextlib
from collections.abc import Iterator

import torch

from benchmarks.harness import Call


@contextlib.contextmanager
def side_stream(device: torch.device) -> Iterator[None]:
    """Inside, a CUDA stream of its own is the current one: the default stream cannot be captured."""
    if device.type != "cuda":
        yield
        return
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        yield
    torch.cuda.current_stream(device).wait_stream(stream)


def graphed(call: Call) -> Call | None:
    """A replay of `call` as a CUDA graph, or None if it cannot be captured (it synchronises or allocates outside the
    pool).

    Captured on the current stream, which must be that of `side_stream`: a backward runs on the streams of its forward,
    and a capture on another stream would not see it.
    """
    try:
        call()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
            call()
    except RuntimeError:
        torch.cuda.synchronize()
        return None
    return graph.replay
