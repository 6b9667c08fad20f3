"""What a fused path may assume of a child module, decided anew in every call.

A parent that reads its child's parameters in place of calling it gives the same result only while the child is nothing
but its class: no hook, no adapter, no parametrisation, no forward of its own. Otherwise the parent calls the child.
"""

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.nn.modules import module as nn_module

from astrobiogen import ops

# Not their other subclasses: sharded and quantised weights compute in a way of their own. The last two stand for plain
# tensors while PyTorch traces.
PLAIN_TENSORS = (nn.Parameter, torch.Tensor, FakeTensor, FunctionalTensor)
_PLAIN_OR_NONE = (*PLAIN_TENSORS, type(None))


def globally_hooked() -> bool:
    """Whether a hook on all modules is registered (`torch.nn.modules.module.register_module_forward_hook`, ...)."""
    return bool(nn_module._has_any_global_hook())


def is_plain(module: nn.Module, kinds: tuple[type, ...]) -> bool:
    """Whether calling `module` is the `forward` of one of `kinds` on a plain weight and bias, and nothing else.

    Not with a subclass, hooks, a `forward` set on the instance, a compiled call, or another tensor in the place of a
    parameter (pruning, weight norm, sharding, quantisation). `globally_hooked` is the caller's to ask, once. The
    attributes are read where they lie: this runs in every call.
    """
    if type(module) not in kinds:
        return False
    state = module.__dict__
    if (
        state["_forward_hooks"]
        or state["_forward_pre_hooks"]
        or state["_backward_hooks"]
        or state["_backward_pre_hooks"]
        or "forward" in state
        or "bias" in state
        or state.get("_compiled_call_impl") is not None
    ):
        return False
    parameters = state["_parameters"]
    return (
        "weight" in parameters
        and type(parameters["weight"]) in _PLAIN_OR_NONE
        and type(parameters.get("bias")) in _PLAIN_OR_NONE
    )


def project(module: nn.Module, kinds: tuple[type, ...], x: torch.Tensor) -> torch.Tensor:
    """`module(x)` for a linear layer; through `ops.linear` where it is plain."""
    if is_plain(module, kinds) and not globally_hooked():
        parameters = module._parameters
        weight = parameters["weight"]
        if weight is not None:
            return ops.linear(x, weight, parameters["bias"])
    return module(x)


def reset_children(module: nn.Module) -> None:
    """Call `reset_parameters` of every module inside `module` that has one."""
    for name, part in module.named_modules():
        reset = getattr(part, "reset_parameters", None)
        if name and callable(reset):
            reset()
