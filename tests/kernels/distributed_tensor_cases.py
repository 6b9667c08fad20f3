"""Run by `test_distributed_tensors.py` in each of two processes; process 0 writes what came out to FOLDER/results.json.

RANK=0 WORLD_SIZE=2 MASTER_ADDR=127.0.0.1 MASTER_PORT=... python tests/kernels/distributed_tensor_cases.py FOLDER
"""

import contextlib
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_module, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    PrepareModuleOutput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from astrobiogen import layers, ops

R = Replicate()
Tensors = tuple[torch.Tensor, ...]
# name -> (function, its tensors, placements of the tensors, placements of the results)
Case = tuple[Callable[..., Any], Tensors, Sequence[Placement], Sequence[str]]


def turn(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    return ops.rope(x, cos.detach(), sin.detach())


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, sinks: torch.Tensor
) -> Tensors:
    return ops.attention(q, k, v, cos=cos.detach(), sin=sin.detach(), sinks=sinks, window=4, return_lse=True)


def loss(reduction: str) -> Callable[..., torch.Tensor]:
    def of(x: torch.Tensor, weight: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return ops.linear_cross_entropy(x, weight, target, reduction=reduction, z_loss=1e-3)

    return of


def cases() -> dict[str, Case]:
    """Every op that has a rule, split along every axis that it may be split along, and along one that it may not."""
    torch.manual_seed(0)
    x, other, w = torch.randn(4, 6, 8), torch.randn(4, 6, 8), torch.randn(8)
    matrix, bias, target = torch.randn(10, 8), torch.randn(10), torch.randint(0, 10, (4, 6))
    target[0, 1] = -100
    q, k, v, sinks = torch.randn(2, 6, 4, 8), torch.randn(2, 6, 2, 8), torch.randn(2, 6, 2, 8), torch.randn(4)
    angles = ops.rope_frequencies(6, 8)
    own_angles = tuple(table.repeat(2, 1, 1) for table in angles)
    found: dict[str, Case] = {}
    for axis, result in ((0, "S(0)"), (1, "S(1)"), (2, "R")):
        at = Shard(axis)
        found[f"rms_norm {axis}"] = (ops.rms_norm, (x, w), (at, R), (result,))
        found[f"add_rms_norm {axis}"] = (ops.add_rms_norm, (x, other, w), (at, at, R), (result, result))
        found[f"swiglu {axis}"] = (ops.swiglu, (x, other), (at, at), (f"S({axis})",))
        found[f"swiglu_packed {axis}"] = (ops.swiglu_packed, (x,), (at,), (result,))
    split: list[tuple[str, Sequence[Placement], str]] = [
        ("rows", (Shard(0), R, R), "S(0)"), ("tokens", (Shard(1), R, R), "S(1)"),
        ("outputs", (R, Shard(0), Shard(0)), "S(2)"), ("inputs", (Shard(2), Shard(1), R), "P"),
    ]  # fmt: skip
    for name, places, result in split:
        found[f"linear {name}"] = (ops.linear, (x, matrix, bias), places, (result,))
        found[f"linear {name}, no bias"] = (ops.linear, (x, matrix), places[:2], (result,))
    for axis, result in ((0, "S(0)"), (1, "S(1)"), (2, "S(2)"), (3, "R")):
        found[f"rope {axis}"] = (turn, (q, *angles), (Shard(axis), R, R), (result,))
    for axis, results in ((0, ("S(0)", "S(0)")), (2, ("S(2)", "S(1)")), (1, ("R", "R"))):
        at = Shard(axis)
        found[f"attention {axis}"] = (attend, (q, k, v, *angles, sinks), (at, at, at, R, R, R), results)
    found["rope, own angles"] = (turn, (q, *own_angles), (Shard(0),) * 3, ("S(0)",))
    by_sample = (*(Shard(0),) * 5, R)
    found["attention, own angles"] = (attend, (q, k, v, *own_angles, sinks), by_sample, ("S(0)", "S(0)"))
    one_head = (q, k[:, :, :1], v[:, :, :1])
    found["attention, one key head"] = (ops.attention, one_head, (Shard(2), R, R), ("R",))
    for reduction, result in (("mean", "P"), ("sum", "P"), ("none", "S(0)")):
        found[f"loss {reduction}"] = (loss(reduction), (x, matrix, target), (Shard(0), R, Shard(0)), (result,))
    mlp = (x, matrix, matrix + 1, matrix.T.contiguous())
    found["swiglu_mlp"] = (ops.swiglu_mlp, mlp, (R, Shard(0), Shard(0), Shard(1)), ("P",))
    return found


def short(place: Placement) -> str:
    return f"S({place.dim})" if isinstance(place, Shard) else "R" if place.is_replicate() else "P"


def as_tuple(out: Any) -> Tensors:
    return out if isinstance(out, tuple) else (out,)


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().full_tensor() if isinstance(tensor, DTensor) else tensor.detach()


def error(one: torch.Tensor, other: torch.Tensor) -> float:
    """Largest difference, relative to the largest value."""
    return float((whole(one) - whole(other)).abs().max() / whole(other).abs().max().clamp(min=1e-30))


def run(case: Case, mesh: DeviceMesh) -> dict[str, Any]:
    """Largest error of results and gradients against the same call on ordinary tensors; placements of the results."""
    function, tensors, places, expected = case
    plain = [t.clone().requires_grad_(t.is_floating_point()) for t in tensors]
    spread = [
        distribute_tensor(t, mesh, [place]).requires_grad_(t.is_floating_point()) for t, place in zip(tensors, places)
    ]
    got, wanted = as_tuple(function(*spread)), as_tuple(function(*plain))
    errors = [error(one, other) for one, other in zip(got, wanted)]
    grads = [
        torch.autograd.grad(
            torch.stack([o.square().sum() for o in out]).sum(), [t for t in given if t.requires_grad], allow_unused=True
        )
        for out, given in ((got, spread), (wanted, plain))
    ]
    errors += [error(one, other) for one, other in zip(*grads) if other is not None]
    return {
        "error": max(errors),
        "places": [short(one.placements[0]) for one in got if isinstance(one, DTensor)],
        "expected": list(expected),
    }


class Block(nn.Module):
    """A layer of Llama."""

    def __init__(self, hidden: int, inner: int) -> None:
        super().__init__()
        self.input_norm = layers.RMSNorm(hidden)
        self.attention = layers.GroupedQueryAttention(hidden, 4, 2)
        self.norm = layers.RMSNorm(hidden)
        self.mlp = MLP(hidden, inner)

    def forward(self, x: torch.Tensor, angles: Tensors) -> torch.Tensor:
        branch = self.attention(self.input_norm(x), position_embeddings=angles)
        y, x = self.norm(branch, x)
        return x + self.mlp(y)


class MLP(nn.Module):
    """A SwiGLU block of its parts."""

    def __init__(self, hidden: int, inner: int) -> None:
        super().__init__()
        self.gate_proj = layers.Linear(hidden, inner, bias=False)
        self.up_proj = layers.Linear(hidden, inner, bias=False)
        self.down_proj = layers.Linear(inner, hidden, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(ops.swiglu(self.gate_proj(x), self.up_proj(x)))


class Llama(nn.Module):
    """Two layers and the loss."""

    def __init__(self, hidden: int = 32, inner: int = 64) -> None:
        super().__init__()
        self.rotary = layers.RotaryEmbedding(hidden // 4)
        self.layers = nn.ModuleList(Block(hidden, inner) for _ in range(2))
        self.norm = layers.RMSNorm(hidden)
        self.loss = layers.LinearCrossEntropy(hidden, 12)

    def forward(self, x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        angles = self.rotary(torch.arange(x.shape[1]))
        for layer in self.layers:
            x = layer(x, angles)
        return self.loss(self.norm(x), target)


class Replicated(ParallelStyle):
    """Replicated weights, inputs as they come: for a norm with the residual addition, of which `SequenceParallel` would
    drop the second input, and for the loss."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        return distribute_module(module, device_mesh)


def plan() -> dict[str, Any]:
    """Tensor parallel by heads and by columns, the stream between sharded along the sequence."""
    columns, rows = (
        ColwiseParallel(use_local_output=False),
        RowwiseParallel(output_layouts=Shard(1), use_local_output=False),
    )
    whole_input = PrepareModuleInput(input_layouts=(Shard(1),), desired_input_layouts=(R,))
    result: dict[str, Any] = {
        "rotary": PrepareModuleOutput(output_layouts=(R, R), desired_output_layouts=(R, R), use_local_output=False),
        "norm": SequenceParallel(),
        "loss": Replicated(),
    }
    for layer in ("layers.0", "layers.1"):
        result |= {f"{layer}.input_norm": SequenceParallel(), f"{layer}.norm": Replicated()}
        result |= {f"{layer}.{block}": whole_input for block in ("attention", "mlp")}
        result |= {f"{layer}.attention.{name}_proj": columns for name in "qkv"} | {f"{layer}.attention.o_proj": rows}
        result |= {f"{layer}.mlp.{name}_proj": columns for name in ("gate", "up")} | {f"{layer}.mlp.down_proj": rows}
    return result


def model_and_data() -> tuple[Llama, torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    model = Llama()
    return model, torch.randn(2, 6, 32), torch.randint(0, 12, (2, 6))


def compare(model: nn.Module, result: torch.Tensor) -> dict[str, float]:
    """Relative errors of the loss and of every gradient against one process."""
    single, x, target = model_and_data()
    expected = single(x, target)
    expected.backward()
    errors = {"loss": error(result, expected)}
    for (name, one), other in zip(model.named_parameters(), single.parameters()):
        assert one.grad is not None
        assert other.grad is not None
        errors[name] = error(one.grad, other.grad)
    return errors


def tensor_parallel(mesh: DeviceMesh) -> dict[str, float]:
    model, x, target = model_and_data()
    parallelize_module(model, mesh, plan())
    result = model(distribute_tensor(x, mesh, [Shard(1)]), distribute_tensor(target, mesh, [R]))
    result.backward()
    return compare(model, result)


def fully_sharded(mesh: DeviceMesh) -> dict[str, float]:
    """Both processes see all data, so the mean over them is the whole."""
    model, x, target = model_and_data()
    for layer in model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    result = model(x, target)
    result.backward()
    return compare(model, result)


def compiled(mesh: DeviceMesh) -> float:
    """`torch.compile` with distributed inputs."""
    x, weight = torch.randn(4, 8), torch.randn(8)
    for tensor in (x, weight):
        dist.broadcast(tensor, 0)
    spread = distribute_tensor(x, mesh, [Shard(0)]), distribute_tensor(weight, mesh, [R])

    def both(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return ops.swiglu(ops.rms_norm(x, weight), x)

    return error(torch.compile(both, fullgraph=True, backend="aot_eager")(*spread), both(x, weight))


def refusals(mesh: DeviceMesh) -> dict[str, str]:
    """What ops without a rule say."""
    x = distribute_tensor(torch.randn(2, 4, 8), mesh, [Shard(0)])
    kernel, nodes = (distribute_tensor(torch.randn(*shape), mesh, [R]) for shape in ((4, 4, 1), (2, 2, 4)))
    edges = ops.edge_lists(torch.tensor([0, 1]), torch.tensor([1, 0]), 2)
    calls: dict[str, Callable[[], Any]] = {
        "conv_nd": lambda: ops.conv_nd(x, kernel),
        "conv_nd_norm": lambda: ops.conv_nd_norm(x, kernel, norm="rms"),
        "conv_transpose_nd": lambda: ops.conv_transpose_nd(x, kernel),
        "edge_attention": lambda: ops.edge_attention(nodes, nodes, nodes, None, edges),
    }
    said = {}
    for name, call in calls.items():
        said[name] = "nothing"
        try:
            call()
        except RuntimeError as reason:
            said[name] = str(reason)
    return said


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (2,))
    results: dict[str, Any] = {"compiled": compiled(mesh)}  # first: nothing has met a distributed tensor before
    results["ops"] = {name: run(case, mesh) for name, case in cases().items()}
    results["tensor_parallel"] = tensor_parallel(mesh)
    results["fully_sharded"] = fully_sharded(mesh)
    results["refusals"] = refusals(mesh)
    if dist.get_rank() == 0:
        (folder / "results.json").write_text(json.dumps(results))
    dist.destroy_process_group()


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError):
        main(Path(sys.argv[1]))
