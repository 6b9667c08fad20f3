"""Other people's kernels, as candidates that take our ops' arguments by name.

A peer that is not installed, or does not run on the device, stays in the table as "absent" with the reason. None is
trusted: the harness holds every peer's output against the fp64 reference before timing it.
"""

import importlib
import importlib.util
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.harness import Candidate

Tensor = torch.Tensor


def load(module: str) -> ModuleType | str:
    """A peer's module, or the reason why there is none (a peer may fail in many ways while it is imported)."""
    if importlib.util.find_spec(module.split(".", 1)[0]) is None:
        return "not installed"
    try:
        return importlib.import_module(module)
    except Exception as error:
        return f"import fails: {type(error).__name__}: {str(error).splitlines()[0][:120] if str(error) else ''}"


def peer(name: str, module: str, device: torch.device, build: Callable[[ModuleType], Callable[..., Any]]) -> Candidate:
    """A candidate from a GPU library, or its absence."""
    if device.type != "cuda":
        return Candidate(name, None, "needs a CUDA device")
    found = load(module)
    if isinstance(found, str):
        return Candidate(name, None, found)
    try:
        return Candidate(name, build(found))
    except AttributeError as error:
        return Candidate(name, None, f"another interface: {error}")


def rms_norm(device: torch.device) -> list[Candidate]:
    """Peers of `ops.rms_norm(x, weight, eps)`."""

    def torch_rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
        return F.rms_norm(x, weight.shape, weight, eps)

    def liger(module: ModuleType) -> Callable[..., Any]:
        function = module.LigerRMSNormFunction
        # in_place=False: the default overwrites the upstream gradient, so that repeated runs would time zeros.
        return lambda x, weight, eps=1e-6: function.apply(x, weight, eps, 0.0, "llama", False)

    def fla(module: ModuleType) -> Callable[..., Any]:
        function = module.rms_norm
        return lambda x, weight, eps=1e-6: function(x, weight, None, eps=eps)

    def quack(module: ModuleType) -> Callable[..., Any]:
        function = module.rmsnorm
        return lambda x, weight, eps=1e-6: function(x, weight, eps=eps)

    def flash(module: ModuleType) -> Callable[..., Any]:
        function = module.rms_norm_fn
        return lambda x, weight, eps=1e-6: function(x, weight, None, eps=eps)

    return [
        Candidate("torch F.rms_norm", torch_rms_norm),
        peer("liger", "liger_kernel.ops.rms_norm", device, liger),
        peer("fla", "fla.modules.layernorm", device, fla),
        peer("quack", "quack.rmsnorm", device, quack),
        peer("flash-attn", "flash_attn.ops.triton.layer_norm", device, flash),
    ]


def add_rms_norm(device: torch.device) -> list[Candidate]:
    """Peers of `ops.add_rms_norm(x, residual, weight, eps)`, which returns (y, sum)."""

    def torch_add(x: Tensor, residual: Tensor, weight: Tensor, eps: float = 1e-6) -> tuple[Tensor, Tensor]:
        total = x + residual
        return F.rms_norm(total, weight.shape, weight, eps), total

    def liger(module: ModuleType) -> Callable[..., Any]:
        function = module.LigerFusedAddRMSNormFunction
        return lambda x, residual, weight, eps=1e-6: function.apply(x, residual, weight, eps, 0.0, "llama", False)

    def flash(module: ModuleType) -> Callable[..., Any]:
        function = module.rms_norm_fn
        return lambda x, residual, weight, eps=1e-6: function(x, weight, None, residual=residual, eps=eps, prenorm=True)

    return [
        Candidate("torch add + F.rms_norm", torch_add),
        peer("liger", "liger_kernel.ops.fused_add_rms_norm", device, liger),
        peer("flash-attn", "flash_attn.ops.triton.layer_norm", device, flash),
    ]


def swiglu(device: torch.device) -> list[Candidate]:
    """Peers of `ops.swiglu(gate, up)`."""

    def torch_swiglu(gate: Tensor, up: Tensor) -> Tensor:
        return F.silu(gate) * up

    def liger(module: ModuleType) -> Callable[..., Any]:
        function = module.LigerSiLUMulFunction
        return lambda gate, up: function.apply(gate, up)

    def fla(module: ModuleType) -> Callable[..., Any]:
        function = module.swiglu
        return lambda gate, up: function(gate, up)

    def flash(module: ModuleType) -> Callable[..., Any]:
        function = module.swiglu
        return lambda gate, up: function(gate, up)

    return [
        Candidate("torch F.silu * up", torch_swiglu),
        peer("liger", "liger_kernel.ops.swiglu", device, liger),
        peer("fla", "fla.modules.activations", device, fla),
        peer("flash-attn", "flash_attn.ops.activations", device, flash),
    ]


def rope(device: torch.device) -> list[Candidate]:
    """Peers of `ops.rope(x, cos, sin, interleaved=False)` with cos, sin [S, rotary/2]."""

    def flash(module: ModuleType) -> Callable[..., Any]:
        function = module.apply_rotary_emb
        return lambda x, cos, sin, interleaved=False: function(x, cos, sin, interleaved)

    def fla(module: ModuleType) -> Callable[..., Any]:
        function = module.rotary_embedding
        return lambda x, cos, sin, interleaved=False: function(x, cos, sin, interleaved)

    def liger(module: ModuleType) -> Callable[..., Any]:
        function = module.LigerRopeFunction

        def call(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> Tensor:
            if interleaved or 2 * cos.shape[-1] != x.shape[-1]:
                raise ValueError("Liger's RoPE rotates the whole head by halves")
            full_cos, full_sin = (torch.cat((t, t), -1).unsqueeze(0) for t in (cos, sin))
            # It works in place on both tensors and needs a key; a copy protects the caller's x.
            q = x.transpose(1, 2).clone(memory_format=torch.contiguous_format)
            rotated, _ = function.apply(q, q[:, :1].clone(), full_cos, full_sin)
            return rotated.transpose(1, 2)

        return call

    return [
        peer("liger", "liger_kernel.ops.rope", device, liger),
        peer("fla", "fla.modules.rotary", device, fla),
        peer("flash-attn", "flash_attn.layers.rotary", device, flash),
    ]


def attention(device: torch.device) -> list[Candidate]:
    """Peers of `ops.attention(q, k, v, causal=True)`: q [B, S, Hq, D], k, v [B, S, Hkv, D], no RoPE, window or
    softcap.
    """

    def sdpa(backend: SDPBackend, expand: bool) -> Callable[..., Any]:
        def call(q: Tensor, k: Tensor, v: Tensor, causal: bool = True) -> Tensor:
            q, k, v = (t.transpose(1, 2) for t in (q, k, v))
            if expand:
                group = q.shape[1] // k.shape[1]
                k, v = (t.repeat_interleave(group, dim=1) for t in (k, v))
            with sdpa_kernel(backend):
                out = F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=not expand)
            return out.transpose(1, 2)

        return call

    def flash(module: ModuleType) -> Callable[..., Any]:
        function = module.flash_attn_func

        def call(q: Tensor, k: Tensor, v: Tensor, causal: bool = True) -> Tensor:
            out = function(q, k, v, causal=causal)
            return out[0] if isinstance(out, tuple) else out  # version 3 returned the log-sum-exp too for a while

        return call

    def xformers(module: ModuleType) -> Callable[..., Any]:
        def call(q: Tensor, k: Tensor, v: Tensor, causal: bool = True) -> Tensor:
            batch, length, heads, width = q.shape
            groups = k.shape[2]
            folded = q.reshape(batch, length, groups, heads // groups, width)
            wide = [t.unsqueeze(3).expand(batch, t.shape[1], groups, heads // groups, width) for t in (k, v)]
            bias = module.fmha.attn_bias.LowerTriangularMask() if causal else None
            return module.memory_efficient_attention(folded, *wide, attn_bias=bias).reshape(q.shape)

        return call

    def cuda_only(name: str, backend: SDPBackend, expand: bool) -> Candidate:
        if device.type != "cuda":
            return Candidate(name, None, "needs a CUDA device")
        return Candidate(name, sdpa(backend, expand))

    return [
        Candidate("sdpa flash", sdpa(SDPBackend.FLASH_ATTENTION, expand=device.type == "cpu")),
        cuda_only("sdpa efficient", SDPBackend.EFFICIENT_ATTENTION, expand=True),
        cuda_only("sdpa cudnn", SDPBackend.CUDNN_ATTENTION, expand=False),
        Candidate("sdpa math", sdpa(SDPBackend.MATH, expand=False)),
        peer("flash-attn", "flash_attn", device, flash),
        peer("flash-attn 3", "flash_attn_interface", device, flash),
        peer("xformers", "xformers.ops", device, xformers),
    ]


def linear_cross_entropy(device: torch.device) -> list[Candidate]:
    """Peers of `ops.linear_cross_entropy(x, weight, target)`: x [T, H], weight [V, H], mean over targets that are
    not -100.
    """

    def torch_eager(x: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(x, weight).float(), target).to(x.dtype)

    def liger(module: ModuleType) -> Callable[..., Any]:
        function = module.LigerFusedLinearCrossEntropyFunction

        def call(x: Tensor, weight: Tensor, target: Tensor) -> Tensor:
            result = function.apply(x, weight, target)
            return result[0] if isinstance(result, tuple) else result

        return call

    def fla(module: ModuleType) -> Callable[..., Any]:
        function = module.fused_linear_cross_entropy_loss
        return lambda x, weight, target: function(x, target, weight)

    return [
        Candidate("torch linear + cross_entropy", torch_eager),
        peer("liger", "liger_kernel.ops.fused_linear_cross_entropy", device, liger),
        peer("fla", "fla.modules.fused_linear_cross_entropy", device, fla),
    ]


def conv_nd(spatial: int) -> list[Candidate]:
    """PyTorch's own convolution for up to three spatial axes (zero padding, stride and dilation as given); none
    above.
    """
    functions: dict[int, Callable[..., Any]] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
    if spatial not in functions:
        return [Candidate(f"torch conv{spatial}d", None, "PyTorch has no convolution above three axes")]
    return [Candidate(f"torch conv{spatial}d", functions[spatial])]
