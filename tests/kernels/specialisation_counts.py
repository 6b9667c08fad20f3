"""How many times each kernel is compiled over many lengths and batch sizes; run by `test_specialisations.py`.

Kernels are neither compiled nor run: Triton's hook ahead of compilation says which specialisation a launch asks for.
Tensors have no memory, so that 200 sizes of each operator take seconds. Prints kernel -> number as JSON.
"""

import collections
import json
import random
import sys
from collections.abc import Callable
from typing import Any

import torch
from triton import knobs

from astrobiogen.kernels import registry
from astrobiogen.kernels.attention import triton_kernels as attention
from astrobiogen.kernels.conv_nd import triton_kernels as conv_nd
from astrobiogen.kernels.edge_attention import triton_kernels as edge_attention
from astrobiogen.kernels.linear_cross_entropy import triton_kernels as linear_cross_entropy
from astrobiogen.kernels.rms_norm import triton_kernels as rms_norm
from astrobiogen.kernels.rope import triton_kernels as rope
from astrobiogen.kernels.swiglu import triton_kernels as swiglu
from astrobiogen.testing.ptx.launch import host_driver

SIZES = 200
MULTIPROCESSORS = 64
GEOMETRY = ([1] * 3, [1] * 3, [0, 0, 1], [1] * 3, 1)  # stride, padding, mode, dilation, groups


def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def run_rms_norm(batch: int, length: int) -> None:
    x, weight, rstd = empty(batch, length, 4352), empty(4352), empty(batch, length, dtype=torch.float32)
    rms_norm.rms_norm(x, weight, 1e-6)
    rms_norm.rms_norm_backward(x, x, weight, rstd, None)


def run_swiglu(batch: int, length: int) -> None:
    x, packed = empty(batch, length, 11648), empty(batch, length, 2 * 11648)
    swiglu.swiglu(x, x)
    swiglu.swiglu_backward(x, x, x)
    swiglu.swiglu_packed(packed)
    swiglu.swiglu_packed_backward(x, packed)


def run_rope(batch: int, length: int) -> None:
    angles = empty(length, 34, dtype=torch.float32)
    for x in (empty(batch, length, 64, 68), empty(batch, 64, length, 68).transpose(1, 2)):
        rope.rope(x, angles, angles, False, False)


def run_attention(batch: int, length: int) -> None:
    q, k = empty(batch, length, 16, 68), empty(batch, length, 4, 68)
    angles = empty(length, 34, dtype=torch.float32)
    options = (angles, angles, None, None, True, 0.12, 0, 0.0, False)
    out, lse, rest = attention.attention(q, k, k, *options, True)
    attention.attention_backward(q, None, q, k, k, out, lse, rest, *options)


def run_decode(batch: int, length: int) -> None:
    q, k = empty(batch, 1, 16, 68), empty(batch, length, 4, 68)
    attention.attention(q, k, k, None, None, None, None, True, 0.12, 0, 0.0, False, False)


def run_conv_nd(batch: int, length: int) -> None:
    x, weight, bias = empty(batch, 32, 8, 16, length), empty(32, 32, 3, 3, 3), empty(32)
    y, _ = conv_nd.conv_nd(x, weight, bias, *GEOMETRY, 0, False)
    conv_nd.conv_transpose_nd(y, weight, None, *GEOMETRY, list(x.shape[2:]))
    conv_nd.conv_nd_weight_grad(y, x, [3, 3, 3], *GEOMETRY)
    conv_nd.conv_nd_bias_grad(y)


def run_conv_nd_norm(batch: int, length: int) -> None:
    x, weight = empty(batch, 32, 8, 16, length), empty(32, 32, 3, 3, 3)
    for kind, groups in ((2, 1), (3, 8)):
        y, kept, mean, rstd = conv_nd.conv_nd_norm(
            x, weight, weight[0, :, 0, 0, 0], None, None, *GEOMETRY, kind, groups, 1e-6, 1, True
        )
        conv_nd.conv_nd_norm_backward(y, kept, None, None, mean, rstd, kind, groups, 1)


def run_linear_cross_entropy(batch: int, length: int) -> None:
    x, weight = empty(batch * length, 1024), empty(50304, 1024)
    target = empty(batch * length, dtype=torch.int64)
    loss, lse = linear_cross_entropy.linear_cross_entropy(x, weight, target, -100, 0.0, 0.0, 0.0)
    linear_cross_entropy.linear_cross_entropy_backward(
        loss, x, weight, target, lse, -100, 0.0, 0.0, 0.0, True, True
    )  # fmt: skip


def run_edge_attention(batch: int, length: int) -> None:
    nodes, edges = empty(length, 4, 8), 3 * length + batch
    lists = [empty(edges, dtype=torch.int64) for _ in range(3)] + [empty(length + 1, dtype=torch.int64)]
    receiver, sender, order, start = lists
    six = [receiver, sender, order, start, order, start]
    bias = empty(edges, 4)
    out, lse = edge_attention.edge_attention(nodes, nodes, nodes, bias, six, 0.3)
    edge_attention.edge_attention_backward(out, nodes, nodes, nodes, bias, lse, six, 0.3)


RUNS: dict[str, Callable[[int, int], None]] = {
    "rms_norm": run_rms_norm, "swiglu": run_swiglu, "rope": run_rope, "attention": run_attention, "decode": run_decode,
    "conv_nd": run_conv_nd, "conv_nd_norm": run_conv_nd_norm, "linear_cross_entropy": run_linear_cross_entropy,
    "edge_attention": run_edge_attention,
}  # fmt: skip


def main() -> None:
    """Every operator at `SIZES` pairs of batch and length, of 17 to 2048 positions."""
    assert not knobs.runtime.interpret
    assert registry.ops()
    seen: dict[str, set[str]] = collections.defaultdict(set)
    current: list[str] = []

    def note(*, key: str, fn: Any, **_: Any) -> bool:
        seen[f"{current[-1]}: {fn.name.split('.')[-1]}"].add(key)
        return True  # do not compile

    knobs.runtime.jit_cache_hook = note  # type: ignore[assignment]
    draw = random.Random(0)
    sizes = [(draw.randint(1, 33), draw.randint(17, 2048)) for _ in range(SIZES)]
    with host_driver(86, MULTIPROCESSORS):
        for op, run in RUNS.items():
            current.append(op)
            for batch, length in sizes:
                run(batch, length)
    sys.stdout.write(json.dumps({name: len(keys) for name, keys in seen.items()}))


if __name__ == "__main__":
    main()
