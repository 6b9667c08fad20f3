"""Attention along graph edges against eager and `torch.compile` of the definition.

Bytes: forward reads q, k, v and writes out once (4 n), and reads a row of k and one of v per edge (2 m); backward reads
q, k, v, the gradient, and per edge rows of k, v, q and the gradient, and writes three gradients (7 n + 4 m); n = nodes
x heads x width, m = edges x heads x width elements. Rows per edge come from a cache where k and v fit one. No installed
peer has this op.
"""

import pytest
import torch

from astrobiogen import ops
from astrobiogen.kernels.cases import TensorMaker
from astrobiogen.kernels.edge_attention import reference, samples
from benchmarks.harness import Work
from benchmarks.runner import Bench, verified_modes

DTYPES = (torch.bfloat16, torch.float16) if torch.cuda.is_available() else (torch.float32, torch.bfloat16)


def plain(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor, edges: ops.EdgeLists) -> torch.Tensor:
    """The definition, with the public function's arguments."""
    return reference.edge_attention(q, k, v, bias, edges.receiver, edges.sender, float(q.shape[2]) ** -0.5)[0]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", samples.BENCHMARK_SIZES, ids=lambda s: f"{s.nodes}n{s.edges}e{s.heads}x{s.width}")
def test_edge_attention(bench: Bench, make, size: samples.Size, dtype: torch.dtype) -> None:
    maker: TensorMaker = make(dtype)
    shape = (size.nodes, size.heads, size.width)
    receiver, sender = (maker.randint(0, size.nodes, size.edges) for _ in range(2))
    per_node = size.nodes * size.heads * size.width * dtype.itemsize
    per_edge = size.edges * size.heads * size.width * dtype.itemsize
    rows = bench(
        op="edge_attention",
        size=f"{size.nodes}n{size.edges}e{size.heads}x{size.width}",
        dtype=dtype,
        arguments={
            **{name: maker.randn(*shape) for name in "qkv"},
            "bias": maker.randn(size.edges, size.heads),
            "edges": ops.edge_lists(receiver, sender, size.nodes),
        },
        differentiable=("q", "k", "v", "bias"),
        ours=ops.edge_attention,
        reference=plain,
        work=Work(4 * per_node + 2 * per_edge, 7 * per_node + 4 * per_edge),
        peers=[],
    )
    assert verified_modes(rows) == {"forward", "backward"}
