"""Valid raw calls to start from: what the public functions pass to `torch.ops` on the cases of `samples.py`."""

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from astrobiogen.kernels import registry
from astrobiogen.kernels.attention import op as attention
from astrobiogen.kernels.attention import samples as attention_samples
from astrobiogen.kernels.cases import Case
from astrobiogen.kernels.conv_nd import norm as conv_nd_norm
from astrobiogen.kernels.conv_nd import op as conv_nd
from astrobiogen.kernels.conv_nd import samples as conv_nd_samples
from astrobiogen.kernels.edge_attention import samples as edge_attention_samples
from astrobiogen.kernels.linear import op as linear
from astrobiogen.kernels.linear import samples as linear_samples
from astrobiogen.kernels.linear_cross_entropy import op as linear_cross_entropy
from astrobiogen.kernels.linear_cross_entropy import samples as linear_cross_entropy_samples
from astrobiogen.kernels.rms_norm import op as rms_norm
from astrobiogen.kernels.rms_norm import samples as rms_norm_samples
from astrobiogen.kernels.rope import op as rope
from astrobiogen.kernels.rope import samples as rope_samples
from astrobiogen.kernels.swiglu import op as swiglu
from astrobiogen.kernels.swiglu import samples as swiglu_samples
from astrobiogen.kernels.swiglu_mlp import op as swiglu_mlp
from astrobiogen.kernels.swiglu_mlp import samples as swiglu_mlp_samples
from astrobiogen.testing import inputs

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# A call of more elements is slow and shows nothing more.
MOST_ELEMENTS = 80_000
# Of one operator; beyond, further cases repeat what the others do.
MOST_CALLS = 200


@dataclasses.dataclass(frozen=True)
class Call:
    """One valid call of `torch.ops.<namespace>.<op>`, and the case and dtype that it was seen in."""

    op: str
    origin: str
    arguments: tuple[Any, ...]
    keywords: Mapping[str, Any]

    @property
    def name(self) -> str:
        """Without namespace and overload."""
        return self.op.split("::")[1].split(".")[0]

    @property
    def overload(self) -> Any:
        """The operator."""
        namespace, name, overload = self.op.replace("::", ".").split(".")
        return getattr(getattr(getattr(torch.ops, namespace), name), overload)


def _sources() -> Iterator[tuple[Callable[..., Any], Sequence[Case]]]:
    norms = [
        conv_nd_samples.norm_case(kind, *shape, activation=activation)
        for kind, activation in (("rms", "silu"), ("layer", "gelu"), ("group", "silu"))
        for shape in conv_nd_samples.NORM_SHAPES
    ]
    yield attention.attention, attention_samples.CASES
    yield conv_nd.conv_nd, conv_nd_samples.CASES
    yield conv_nd.conv_transpose_nd, conv_nd_samples.TRANSPOSED_CASES
    yield conv_nd_norm.conv_nd_norm, norms
    yield edge_attention_samples.edge_attention, edge_attention_samples.CASES
    yield linear.linear, linear_samples.CASES
    yield linear_cross_entropy.linear_cross_entropy, linear_cross_entropy_samples.CASES
    yield rms_norm.rms_norm, rms_norm_samples.CASES
    yield rms_norm.add_rms_norm, [rms_norm_samples.with_residual(case) for case in rms_norm_samples.CASES]
    yield rope.rope, rope_samples.CASES
    yield swiglu.swiglu, swiglu_samples.CASES
    yield swiglu.swiglu_packed, swiglu_samples.PACKED_CASES
    yield swiglu_mlp.swiglu_mlp, swiglu_mlp_samples.CASES


class _Recorder(TorchDispatchMode):
    """Keeps a copy of the arguments of every call in `namespace`."""

    def __init__(self, namespace: str) -> None:
        super().__init__()
        self.namespace = namespace
        self.origin = ""
        self.calls: list[Call] = []
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        keywords = kwargs or {}
        if func.namespace == self.namespace and self.counts[str(func)] < MOST_CALLS and _serves(func, args):
            self.counts[str(func)] += 1
            name = f"{func.namespace}::{str(func).split('.', 1)[1]}"
            self.calls.append(Call(name, self.origin, tuple(_copy(a) for a in args), dict(keywords)))
        return func(*args, **keywords)


def record(namespace: str = registry.NAMESPACE) -> list[Call]:
    """The valid calls, forward and backward, in an order that is always the same.

    Args:
        namespace: "astrobiogen" for the library's operators; "aten" for those of PyTorch that the plain references
            call on the same cases, as something to compare with.

    Raises:
        RuntimeError: an operator of the library was never called: `_sources` lacks it.
    """
    recorder = _Recorder(namespace)
    mode = "auto" if namespace == registry.NAMESPACE else "reference"
    with registry.use_kernels(mode):
        for function, cases in _sources():
            for case in cases:
                for dtype in DTYPES:
                    _record_case(recorder, function, case, dtype)
    if namespace != registry.NAMESPACE:
        return recorder.calls
    products = [
        dataclasses.replace(call, op="astrobiogen::swiglu_backward_product.default")
        for call in recorder.calls
        if call.op == "astrobiogen::swiglu_backward.default"
    ]
    calls = recorder.calls + products  # only a layer calls this one
    missing = set(registry.ops()) - {call.name for call in calls}
    if missing:
        raise RuntimeError(f"no valid call of {sorted(missing)} was seen: give `calls._sources` its cases")
    return calls


def _record_case(recorder: _Recorder, function: Callable[..., Any], case: Case, dtype: torch.dtype) -> None:
    arguments = inputs.build(case, dtype)
    tensors = [value for value in arguments.values() if isinstance(value, torch.Tensor)]
    if sum(tensor.numel() for tensor in tensors) > MOST_ELEMENTS:
        return
    for name in case.differentiable:
        arguments[name] = arguments[name].detach().requires_grad_()
    recorder.origin = f"{inputs.name_of(function)} {case.name} {str(dtype).removeprefix('torch.')}"
    with recorder:
        outputs = [out for out in inputs.as_tuple(function(**arguments)) if out.requires_grad]
        if outputs:
            draw = inputs.maker(dtype, "cpu", 1)
            torch.autograd.backward(outputs, [draw.randn(*out.shape, dtype=out.dtype) for out in outputs])


def _serves(func: Any, arguments: Sequence[Any]) -> bool:
    """Whether `func` computes something from a tensor: no views, nothing in place, no factories."""
    alone = any(isinstance(argument, torch.Tensor) for argument in arguments)
    return alone and not func.is_view and not func._schema.is_mutable


def _copy(value: Any) -> Any:
    """`value` with tensors of their own, strides kept."""
    if isinstance(value, (list, tuple)):
        return [_copy(one) for one in value]
    if not isinstance(value, torch.Tensor):
        return value
    source = value.detach()
    if source.numel() == 0:
        return torch.empty_strided(source.shape, source.stride(), dtype=source.dtype)
    extent = 1 + sum((n - 1) * s for n, s in zip(source.shape, source.stride()))
    flat = source.as_strided((extent,), (1,), source.storage_offset()).clone()
    return flat.as_strided(source.shape, source.stride())
