"""Replace eager layers of an existing model by the library's, in place and with the same parameters."""

import dataclasses
from collections.abc import Callable
from typing import Any

from torch import nn
from torch.nn.utils import parametrize

from astrobiogen.integrations import hugging_face
from astrobiogen.layers import ConvNd, RMSNorm, SwiGLU

# Families whose norm, MLP and attention have exactly the library's formulas: transformers.models.<family>.
FAMILIES = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}
# The rule of kernels/conv_nd on the CPU: its own kernels serve these, everything else is a composition of PyTorch's.
_MOST_INPUTS, _FEWEST_OUTPUTS = 4, 8
_HOOKS = (
    "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks", "_state_dict_hooks",
    "_state_dict_pre_hooks", "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Swap:
    """One layer that was looked at: its name in the model, its class, what it is now (empty: as before) and why."""

    name: str
    was: str
    now: str
    reason: str


class SwapTable(list[Swap]):
    """What `swap_layers` did; prints as a table."""

    @property
    def swapped(self) -> list[Swap]:
        """The layers that were replaced."""
        return [row for row in self if row.now]

    def __str__(self) -> str:
        rows = [
            ("layer", "was", "is", "why"),
            *((row.name, row.was, row.now or "unchanged", row.reason) for row in self),
        ]
        widths = [max(len(row[column]) for row in rows) for column in range(4)]
        return "\n".join("  ".join(text.ljust(width) for text, width in zip(row, widths)).rstrip() for row in rows)


def swap_layers(model: nn.Module) -> SwapTable:
    """Replace layers of `model` in place by the library's; parameters, names and the state dict stay the same objects.

    * `torch.nn.RMSNorm` over the last axis; RMSNorm and SiLU-gated MLP of Hugging Face Llama, Mistral, Qwen2, Qwen3;
    * `torch.nn.Conv1d` to `Conv3d` where the CPU kernels of `ops.conv_nd` serve the shape;
    * attention of these Hugging Face models, through their attention interface (see `register_attention`),
      unless the model was set to "eager".

    Subclasses are left alone, and so are layers that do more than their class says: with hooks, a parametrisation, a
    method replaced on the instance, other parts or another kind of weight. The projections of an MLP stay the same
    modules and are called while they do more than `torch.nn.Linear` does (hooks, pruning, a bias put there), before the
    swap or after it; an MLP whose projections are of another class (an adapter) is left alone.

    Returns:
        every layer of these kinds with what was done and why.

    Raises:
        TypeError: `model` is not a module, or is itself a layer that would have to be replaced.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {type(model).__name__}, expected a torch.nn.Module")
    if _maker(model) is not None:
        raise TypeError(f"model: got a bare {type(model).__name__}, expected a model that contains such layers")
    table = SwapTable()
    made: dict[int, nn.Module] = {}  # a layer that occurs twice is replaced by one and the same
    for prefix, parent in list(model.named_modules()):
        for child_name, child in list(parent._modules.items()):  # named_children() leaves out the second of two names
            if child is None:
                continue
            name = f"{prefix}.{child_name}" if prefix else child_name
            maker = _maker(child)
            if maker is None:
                continue
            new, reason = (made[id(child)], "as before") if id(child) in made else _replacement(child, maker)
            if new is not None:
                made[id(child)] = new
                setattr(parent, child_name, new)
            table.append(Swap(name, type(child).__name__, type(new).__name__ if new is not None else "", reason))
    _swap_attention(model, table)
    return table


Made = tuple[nn.Module | None, str]


def _maker(module: nn.Module) -> Callable[[Any], Made] | None:
    """The function that builds the replacement of a layer of this very class."""
    kind = _kind(module)
    if kind is nn.RMSNorm:
        return _torch_norm
    if kind in (nn.Conv1d, nn.Conv2d, nn.Conv3d):
        return _convolution
    family = _family(kind)
    if family and kind.__name__ == f"{FAMILIES[family]}RMSNorm":
        return _hugging_face_norm
    if family and kind.__name__ == f"{FAMILIES[family]}MLP":
        return _mlp
    return None


def _kind(module: nn.Module) -> type[nn.Module]:
    """The class of `module`; a parametrised module has one of its own, made from it."""
    kind = type(module)
    return kind.__bases__[0] if parametrize.is_parametrized(module) else kind


def _family(kind: type[nn.Module]) -> str:
    parts = kind.__module__.split(".")
    return parts[2] if parts[:2] == ["transformers", "models"] and len(parts) > 3 and parts[2] in FAMILIES else ""


def _replacement(module: nn.Module, maker: Callable[[Any], Made]) -> Made:
    more = _more_than_its_class(module)
    if more:
        return None, more
    new, reason = maker(module)
    if new is not None:
        new.training = module.training  # the children keep theirs
    return new, reason


def _more_than_its_class(module: nn.Module) -> str:
    """What `module` does beyond the `forward` of its class, which its replacement would not do; empty for nothing."""
    if parametrize.is_parametrized(module):
        return "it is parametrised"
    if any(getattr(module, name) for name in _HOOKS):
        return "it has hooks"
    replaced = [name for name, value in module.__dict__.items() if callable(value) and hasattr(type(module), name)]
    if replaced:
        return f"its {replaced[0]} was replaced on the instance"
    own = {name for name, value in {**module._parameters, **module._buffers}.items() if value is not None}
    if not own <= {"weight", "bias"}:
        return f"it has {sorted(own - {'weight', 'bias'})[0]} beside its weight"
    for value in module._parameters.values():
        if value is not None and type(value) is not nn.Parameter:
            return f"its weight is a {type(value).__name__}"
    return ""


def _adopt(new: nn.Module, old: nn.Module) -> nn.Module:
    """Give `new` the very parameters and children of `old` that it has itself, and what others read from `old`."""
    for name, value in old.__dict__.items():
        if not hasattr(new, name):  # variance_epsilon, normalized_shape, config
            new.__dict__[name] = value  # a module hidden there must not become a child
    for name, parameter in old._parameters.items():
        setattr(new, name, parameter)
    for name in new._modules:
        setattr(new, name, old._modules[name])
    return new


def _torch_norm(module: nn.RMSNorm) -> Made:
    if len(module.normalized_shape) != 1 or module.weight is None:
        return None, "normalises several axes" if len(module.normalized_shape) != 1 else "has no weight"
    return _adopt(RMSNorm(module.normalized_shape[0], module.eps, device="meta"), module), "one pass"


def _hugging_face_norm(module: Any) -> Made:
    return _adopt(RMSNorm(len(module.weight), module.variance_epsilon, device="meta"), module), "one pass"


def _mlp(module: Any) -> Made:
    activation, projections = module.act_fn, ("gate_proj", "up_proj", "down_proj")
    name = type(activation).__name__
    if name not in ("SiLU", "SiLUActivation"):
        return None, f"its activation is {name}, expected SiLU"
    more = _more_than_its_class(activation)
    if more:
        return None, f"act_fn: {more}"
    parts = set(module._modules) - {*projections, "act_fn"}
    if parts:
        return None, f"it has {sorted(parts)[0]} beside its projections"
    kinds = {type(getattr(module, part)) for part in projections}
    if kinds != {nn.Linear}:
        other = next(kind for kind in kinds if kind is not nn.Linear)
        return None, f"its projections are not plain torch.nn.Linear but {other.__name__}"
    new = SwiGLU(module.gate_proj.in_features, module.gate_proj.out_features, device="meta")
    return _adopt(new, module), "silu and product in one pass"


def _convolution(module: Any) -> Made:
    inputs, outputs = module.in_channels // module.groups, module.out_channels // module.groups
    if module.weight.device.type != "cpu":
        return None, f"not measured on {module.weight.device.type}"
    if not module.weight.dtype.is_floating_point:
        return None, f"its weight is {module.weight.dtype}"
    if inputs > _MOST_INPUTS or outputs < _FEWEST_OUTPUTS:
        rule = f"at most {_MOST_INPUTS} inputs and at least {_FEWEST_OUTPUTS} outputs per group"
        return None, f"{inputs} -> {outputs} channels per group: the own kernels are for {rule}"
    new = ConvNd(
        len(module.kernel_size), module.in_channels, module.out_channels, module.kernel_size, module.stride,
        module.padding, module.dilation, module.groups, module.bias is not None, module.padding_mode, device="meta",
    )  # fmt: skip
    return _adopt(new, module), "own kernel for few input channels"


def _swap_attention(model: nn.Module, table: SwapTable) -> None:
    for prefix, module in model.named_modules():
        family = _family(type(module))
        if not family or type(module).__name__ != f"{FAMILIES[family]}Attention":
            continue
        if "forward" in module.__dict__:
            table.append(Swap(prefix, type(module).__name__, "", "its forward was replaced on the instance"))
            continue
        config: Any = module.config
        if config._attn_implementation == "eager":  # by choice: these families take sdpa by themselves
            table.append(Swap(prefix, type(module).__name__, "", "the model was asked for eager attention"))
            continue
        if config._attn_implementation != hugging_face.NAME:
            if not hasattr(model, "set_attn_implementation"):
                table.append(Swap(prefix, type(module).__name__, "", "the model has no attention interface"))
                continue
            model.set_attn_implementation(hugging_face.register_attention())  # type: ignore[operator]
        table.append(Swap(prefix, type(module).__name__, "ops.attention", "by the attention interface"))
