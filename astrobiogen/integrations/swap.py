"""Replace eager layers of an existing model by the library's, in place and with the same parameters."""

import fnmatch
import functools
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn
from torch.nn.utils import parametrize

from astrobiogen.integrations.attention import swap_attention
from astrobiogen.integrations.causal_loss import swap_loss
from astrobiogen.integrations.formulas import GatedMLP, Norm, mlp_of, norm_of
from astrobiogen.integrations.graph_layers import swap_graph_layers
from astrobiogen.integrations.replacements import FormulaRMSNorm, FormulaSwiGLU
from astrobiogen.integrations.table import Swap, SwapTable, put
from astrobiogen.integrations.trial import Trials
from astrobiogen.kernels.conv_nd.builtin import wins_somewhere
from astrobiogen.layers import ConvNd, RMSNorm, SwiGLU

# The rule of kernels/conv_nd on the CPU where the padding is not zeros: its own kernels serve these, everything else is
# a composition of PyTorch's.
_MOST_INPUTS, _FEWEST_OUTPUTS = 4, 8
_HOOKS = (
    "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks", "_state_dict_hooks",
    "_state_dict_pre_hooks", "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks",
)  # fmt: skip


def swap_layers(model: nn.Module, *, only: Sequence[str] = (), exclude: Sequence[str] = ()) -> SwapTable:
    """Replace layers of `model` in place by the library's; parameters, names and the state dict stay the same objects.

    * RMSNorm, with the weight or 1 + weight, in any class whose `forward` computes it, and `torch.nn.RMSNorm`;
    * SiLU-gated MLPs, with separate or packed gate and up projections, in any class whose `forward` computes them;
    * `torch.nn.Conv1d` to `Conv3d` where the CPU kernels of `ops.conv_nd` are faster than PyTorch's;
    * `TransformerConv`, `GATConv` and `GATv2Conv` of PyTorch Geometric, through `ops.edge_attention`;
    * output layer and loss of causal language models: the loss is computed without the logits, which are multiplied out
      when something asks for their values;
    * attention of Hugging Face models, through their attention interface (see `register_attention`), unless the model
      was set to "eager" or a trial with a few tokens gives other values.

    A class is known by the formula of its `forward`, read from its source, not by its name; the first layer of each
    kind and size is then tried against the original with random input, values and gradients. Layers are left alone that
    do more than their class says: with hooks, a parametrisation, a method replaced on the instance, other parts or
    another kind of weight. The projections of an MLP stay the same modules and are called while they do more than
    `torch.nn.Linear` does (hooks, pruning, a bias put there), before the swap or after it; an MLP whose projections are
    of another class (an adapter) is left alone.

    Args:
        model: any module that contains such layers.
        only: what may be replaced: "norm", "mlp", "convolution", "attention", "graph", "loss", or patterns of layer
            names ("model.layers.0.*"); empty for everything.
        exclude: what stays, in the same words.

    Returns:
        every norm, MLP, attention, linear layer and convolution with what was done and why; its `restore()` takes the
        swap back.

    Raises:
        TypeError: `model` is not a module, is itself a layer that would have to be replaced, or `only` or `exclude` is
            not a sequence of texts.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {type(model).__name__}, expected a torch.nn.Module")
    if _kind(model) in _TORCH_KINDS or _kind_of(model) in ("norm", "mlp"):
        raise TypeError(f"model: got a bare {type(model).__name__}, expected a model that contains such layers")
    wanted = _wanted(only, exclude)
    table, trials = SwapTable(), Trials()
    made: dict[int, nn.Module] = {}  # a layer that occurs twice is replaced by one and the same
    inside: set[int] = set()  # projections of an MLP are told of with it
    for prefix, parent in list(model.named_modules()):
        for child_name, child in list(parent._modules.items()):  # named_children() leaves out the second of two names
            if child is None:
                continue
            name = f"{prefix}.{child_name}" if prefix else child_name
            kind = _kind_of(child)
            if kind == "mlp":
                inside.add(id(child))
            if not kind or (kind == "linear" and id(parent) in inside):
                continue
            if not wanted(kind, name):
                table.append(Swap(name, type(child).__name__, "", "not chosen"))
                continue
            new, reason = (made[id(child)], "as before") if id(child) in made else _replacement(child, kind, trials)
            if new is not None:
                made[id(child)] = new
                table.on_restore(put(parent, child_name, new))
            table.append(Swap(name, type(child).__name__, type(new).__name__ if new is not None else "", reason))
    swap_attention(model, table, functools.partial(wanted, "attention"))
    swap_graph_layers(model, table, wanted, functools.partial(_more_than_its_class, names=None))
    swap_loss(model, table, wanted("loss", "loss"), _more_than_its_class)
    return table


Made = tuple[nn.Module | None, str]
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TORCH_KINDS = (nn.RMSNorm, *_CONVOLUTIONS)
_KINDS = ("norm", "mlp", "convolution", "attention", "graph", "loss", "linear")
_MLP_NAMES = ("MLP", "FeedForward", "FFN")


def _wanted(only: Sequence[str], exclude: Sequence[str]) -> Callable[[str, str], bool]:
    """Whether a layer of a kind and name may be replaced."""
    for argument, words in (("only", only), ("exclude", exclude)):
        if isinstance(words, str) or not all(isinstance(word, str) for word in words):
            raise TypeError(
                f"{argument}: got {words!r}, expected a sequence of kinds {_KINDS} or patterns of layer names"
            )

    def among(words: Sequence[str], kind: str, name: str) -> bool:
        return any(word == kind or fnmatch.fnmatchcase(name, word) for word in words)

    return lambda kind, name: (not only or among(only, kind, name)) and not among(exclude, kind, name)


def _kind_of(module: nn.Module) -> str:
    """The sort of layer that a row is written for: of `_KINDS` without attention, or empty."""
    kind = _kind(module)
    if issubclass(kind, _CONVOLUTIONS) or ("Conv" in kind.__name__ and isinstance(module, nn.modules.conv._ConvNd)):
        return "convolution"
    if issubclass(kind, nn.Linear):
        return "linear"
    if "Norm" in kind.__name__ and not set(module._modules) - {"parametrizations"}:
        return "norm"
    if len(module._modules) >= 2 and (kind.__name__.endswith(_MLP_NAMES) or isinstance(mlp_of(module), GatedMLP)):
        return "mlp"
    return "norm" if set(module._parameters) == {"weight"} and isinstance(norm_of(module), Norm) else ""


def _kind(module: nn.Module) -> type[nn.Module]:
    """The class of `module`; a parametrised module has one of its own, made from it."""
    kind = type(module)
    return kind.__bases__[0] if parametrize.is_parametrized(module) else kind


def _replacement(module: nn.Module, kind: str, trials: Trials) -> Made:
    more = _more_than_its_class(module)
    if more:
        return None, more
    new, reason = _MAKERS[kind](module)
    if new is not None:
        different = "" if kind == "convolution" else trials.difference(new, module)
        if different:
            return None, different
        new.training = module.training  # the children keep theirs
    return new, reason


def _more_than_its_class(module: nn.Module, names: frozenset[str] | None = frozenset({"weight", "bias"})) -> str:
    """What `module` does beyond the `forward` of its class, which its replacement would not do; empty for nothing.

    A parameter
    or buffer that is not one of `names` is more; None leaves them out of it.
    """
    if parametrize.is_parametrized(module):
        return "it is parametrised"
    if type(module).__call__ is not nn.Module.__call__:
        return "its class has a __call__ of its own"
    if any(getattr(module, name) for name in _HOOKS):
        return "it has hooks"
    replaced = [name for name, value in module.__dict__.items() if callable(value) and hasattr(type(module), name)]
    if replaced:
        return f"its {replaced[0]} was replaced on the instance"
    own = {name for name, value in {**module._parameters, **module._buffers}.items() if value is not None}
    if names is not None and not own <= names:
        return f"it has {sorted(own - names)[0]} beside its weight"
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


def _norm(module: Any) -> Made:
    if isinstance(module, nn.RMSNorm) and type(module) is nn.RMSNorm:
        return _torch_norm(module)
    formula = norm_of(module)
    if isinstance(formula, str):
        torch_kind = type(module).__module__.startswith("torch.nn")
        return None, f"no operator here computes a {type(module).__name__}" if torch_kind else formula
    if set(module._parameters) != {"weight"} or module.weight.dim() != 1:
        return None, "it has another weight than one row"
    return _adopt(FormulaRMSNorm(len(module.weight), formula, device="meta"), module), "one pass"


def _mlp(module: Any) -> Made:
    formula = mlp_of(module)
    if isinstance(formula, str):
        return None, formula
    if formula.activation:
        activation = module._modules[formula.activation]
        name = type(activation).__name__
        if name not in ("SiLU", "SiLUActivation"):
            return None, f"its activation is {name}, expected SiLU"
        more = _more_than_its_class(activation)
        if more:
            return None, f"{formula.activation}: {more}"
    projections = (formula.gate, formula.up, formula.down)
    parts = set(module._modules) - {*projections, formula.activation}
    if parts:
        return None, f"it has {sorted(parts)[0]} beside its projections"
    kinds = {type(getattr(module, part)) for part in projections}
    if kinds != {nn.Linear}:
        other = next(kind for kind in kinds if kind is not nn.Linear)
        return None, f"its projections are not plain torch.nn.Linear but {other.__name__}"
    if projections == ("gate_proj", "up_proj", "down_proj"):
        new: nn.Module = SwiGLU(module.gate_proj.in_features, module.gate_proj.out_features, device="meta")
    else:
        new = FormulaSwiGLU(formula)
    return _adopt(new, module), "silu and product in one pass"


def _linear(_module: nn.Module) -> Made:
    return None, "PyTorch's own product"


def _convolution(module: Any) -> Made:
    if type(module) not in _CONVOLUTIONS:
        return None, f"{type(module).__name__} is none of torch.nn.Conv1d to Conv3d"
    if module.weight.device.type != "cpu":
        return None, f"not measured on {module.weight.device.type}"
    if not module.weight.dtype.is_floating_point:
        return None, f"its weight is {module.weight.dtype}"
    inputs, outputs = module.in_channels // module.groups, module.out_channels // module.groups
    if module.padding_mode != "zeros":
        if inputs > _MOST_INPUTS or outputs < _FEWEST_OUTPUTS:
            rule = f"at most {_MOST_INPUTS} inputs and at least {_FEWEST_OUTPUTS} outputs per group"
            return None, f"{inputs} -> {outputs} channels per group: the own kernels are for {rule}"
    elif not wins_somewhere(module.weight.dtype, module.weight.shape, module.stride, module.dilation, module.groups):
        return None, f"{inputs} -> {outputs} channels per group in {module.weight.dtype}: PyTorch's own is as fast"
    new = ConvNd(
        len(module.kernel_size), module.in_channels, module.out_channels, module.kernel_size, module.stride,
        module.padding, module.dilation, module.groups, module.bias is not None, module.padding_mode, device="meta",
    )  # fmt: skip
    return _adopt(new, module), "own kernel where it is faster"


_MAKERS: dict[str, Callable[[Any], Made]] = {
    "norm": _norm, "mlp": _mlp, "convolution": _convolution, "linear": _linear,
}  # fmt: skip
