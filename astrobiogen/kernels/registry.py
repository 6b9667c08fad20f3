"""Registration of the library's operators and the choice between their implementations.

Every operator is a `torch.library` op in the namespace `astrobiogen`. PyTorch's dispatcher picks the implementation:

* ``CUDA``: Triton kernels, imported on the first call that needs them, so that a machine without Triton can import us;
* ``CPU``: C++ kernels, registered by the compiled extension `astrobiogen._C`;
* every other case: the plain PyTorch reference, with one warning: other devices, and GPUs that the Triton kernels are
  not compiled for (see `devices.py`).

Under a transform of `torch.func` (grad, vmap, jvp and what is built from them) and under forward-mode automatic
differentiation every op runs its reference: PyTorch's own operators have all those rules, a kernel has one gradient.

`use_kernels("reference")` bypasses the ops and runs the plain references under ordinary autograd, for comparisons.
"""

import contextlib
import dataclasses
import functools
import importlib
import importlib.util
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from torch.autograd import forward_ad

from astrobiogen import extension
from astrobiogen.kernels import autocast, devices, operand_rules

NAMESPACE = "astrobiogen"
LIBRARY = torch.library.Library(NAMESPACE, "DEF")

Mode = Literal["auto", "reference"]
_Selected = Literal["auto", "reference", "ops"]


class _Selection:
    """What `use_kernels` has chosen, for the whole process.

    `mode` is a plain attribute, so that `torch.compile` guards on it: it reads a ContextVar or a thread's own value
    once and keeps it. Where the open blocks of several threads differ, "reference" holds: it is right for all of them.
    """

    def __init__(self) -> None:
        self.mode: _Selected = "auto"
        self._lock = threading.Lock()
        self._open: list[
            tuple[int, _Selected, object]
        ] = []  # thread, mode, which block; a thread's innermost block is last

    def enter(self, mode: _Selected, block: object) -> None:
        """Open `block` in this thread."""
        with self._lock:
            self._open.append((threading.get_ident(), mode, block))
            self._choose()

    def leave(self, block: object) -> None:
        """Close `block`, wherever it stands among the open ones."""
        with self._lock:
            self._open = [entry for entry in self._open if entry[2] is not block]
            self._choose()

    def _choose(self) -> None:
        innermost = {thread: mode for thread, mode, _ in self._open}.values()
        self.mode = "reference" if "reference" in innermost else "ops" if "ops" in innermost else "auto"


@dataclasses.dataclass(frozen=True)
class _Entry:
    """One operator: the plain function that defines it and where its Triton launcher lives."""

    name: str
    reference: Callable[..., Any]
    triton: str  # "module:function"; empty for an op that has no Triton kernel yet
    cpu_rule: str  # which of several C++ implementations serves a call; empty where there is one
    operands: tuple[Any, ...]  # as `operand_rules.parse` gives them
    also: Callable[..., None] | None

    def check(self, args: tuple[Any, ...]) -> None:
        """Raise for arguments that no kernel takes."""
        operand_rules.check(self.name, self.operands, args)
        if self.also is not None:
            self.also(*args)


@dataclasses.dataclass(frozen=True)
class KernelStatus:
    """Which implementation serves one op on one device type, and why."""

    op: str
    device: str
    implementation: str
    reason: str


class KernelTable(tuple[KernelStatus, ...]):
    """The rows of `kernel_status()`; prints as an aligned table."""

    def __str__(self) -> str:
        rows = [("op", "device", "implementation", "reason")]
        rows += [(row.op, row.device, row.implementation, row.reason) for row in self]
        widths = [max(len(row[column]) for row in rows) for column in range(3)]
        return "\n".join("  ".join([*(cell.ljust(width) for cell, width in zip(row, widths)), row[3]]) for row in rows)


# Kinds of calls that an op's launcher remembers as checked: a lookup takes a quarter of the checks' time.
_SIGNATURES = 4096
_SELECTION = _Selection()
_ENTRIES: dict[str, _Entry] = {}
_WARNED: set[tuple[str, str]] = set()


def define(
    schema: str,
    *,
    operands: str,
    reference: Callable[..., Any],
    fake: Callable[..., Any],
    triton: str = "",
    cpu_rule: str = "",
    also: Callable[..., None] | None = None,
) -> None:
    """Define the op `schema`, with its reference as the default kernel.

    Args:
        schema: PyTorch op schema without the namespace, e.g. ``"rope(Tensor x, Tensor cos) -> Tensor"``.
        reference: plain PyTorch with the op's exact signature and results; serves every device that has no kernel.
        fake: returns empty outputs of the right shape, dtype and device, touching no data.
        triton: ``"module:function"`` of the CUDA launcher, imported on the first CUDA call.
        operands: dtypes and shapes of the tensors, as `operand_rules` reads them.
        also: called with the op's arguments before the launcher, for what `operands` cannot say; raises.
        cpu_rule: for `kernel_status`, where the C++ kernel chooses between implementations by a call's sizes: the rule.
    """
    name = schema.split("(", 1)[0]
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.register_fake(f"{NAMESPACE}::{name}", _refusing_a_mixture(name, fake), lib=LIBRARY)
    _ENTRIES[name] = _Entry(name, reference, triton, cpu_rule, operand_rules.parse(schema, operands), also)
    LIBRARY.impl(name, _warning_reference(name, reference), "CompositeExplicitAutograd")
    plain = functools.partial(autocast.reference, reference)
    # The key that every call meets first inside a transform of torch.func, whichever transform it is.
    LIBRARY.impl(name, plain, "FuncTorchDynamicLayerFrontMode")
    if "Tensor[]" in schema:  # the older vmap of is_grads_batched repeats an op for each member, but not with lists
        LIBRARY.impl(name, plain, "Batched")
    if triton and importlib.util.find_spec("triton") is not None:
        LIBRARY.impl(name, launcher(name), "CUDA")


def differentiable(name: str, *, backward: Callable[..., Any], setup_context: Callable[..., None]) -> None:
    """Give op `name` its gradient formula; forward-mode derivatives are those of its reference.

    Not by `torch.library.register_autograd`: an op registered there drops a forward-mode tangent without a word.

    Args:
        name: a defined op.
        backward: ``(ctx, *gradients of the outputs) -> gradients of the inputs``, one per argument of the schema (None
            for a list of tensors as for a number). It must call ops only, so that it dispatches and compiles like the
            forward.
        setup_context: ``(ctx, inputs, output)``, saves what `backward` reads.
    """
    op = getattr(getattr(torch.ops, NAMESPACE), name).default
    reference = _ENTRIES[name].reference

    def forward(ctx: Any, *args: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            output = op(*args)
        setup_context(ctx, args, output)
        return output

    members = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    formula: Any = type(f"{name}_formula", (torch.autograd.Function,), members)

    def differentiate(*args: Any) -> Any:
        if forward_ad._current_level >= 0:
            return autocast.reference(reference, *args)
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*args):
            return formula.apply(*args)
        with torch._C._AutoDispatchBelowAutograd():
            return op(*args)

    LIBRARY.impl(name, differentiate, "Autograd")


def refuse_second_derivative(name: str) -> None:
    """Make differentiating through the backward op `name` an error; without this PyTorch only warns and may return
    wrong values."""

    def keep_nothing(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        del ctx, inputs, output

    def refuse(ctx: Any, *grads: torch.Tensor) -> None:
        del ctx, grads
        raise RuntimeError(
            f"astrobiogen::{name} has no second derivative: differentiate twice with torch.func (grad, hessian) or "
            "under `astrobiogen.use_kernels('reference')`, which run plain PyTorch, or drop `create_graph=True`."
        )

    differentiable(name, backward=refuse, setup_context=keep_nothing)


def refuse_derivative(name: str, constant: torch.Tensor, why: str) -> None:
    """ValueError if a derivative with respect to the argument `name`, a constant of its op, is being asked for."""
    if constant.requires_grad:
        raise ValueError(f"{name} must not require a gradient ({why}), got requires_grad=True; detach it")
    if forward_ad._current_level >= 0 and forward_ad.unpack_dual(constant).tangent is not None:
        raise ValueError(f"{name} must not carry a forward-mode tangent ({why}); detach it")


def reference_selected() -> bool:
    """True inside `use_kernels("reference")`."""
    return _SELECTION.mode == "reference"


def builtins_allowed() -> bool:
    """False inside `use_kernels("reference")` and `only_ops()`: a public function may not call PyTorch's in place of
    its op."""
    return _SELECTION.mode == "auto"


@contextlib.contextmanager
def only_ops() -> Iterator[None]:
    """Serve every public function by its op inside the block, also where one of PyTorch's is faster: for tests of a
    kernel."""
    block = object()
    _SELECTION.enter("ops", block)
    try:
        yield
    finally:
        _SELECTION.leave(block)


@contextlib.contextmanager
def use_kernels(mode: Mode) -> Iterator[None]:
    """Choose the implementation of every op inside the `with` block, for the whole process.

    Blocks nest, and may overlap in any order in several threads: a block ends only itself. While the innermost blocks
    of two threads differ, "reference" holds for both.

    Args:
        mode: ``"auto"`` (the default outside any block: the dispatcher's choice, see `kernel_status`) or
            ``"reference"`` (plain PyTorch under ordinary autograd, twice differentiable).

    Raises:
        ValueError: `mode` is neither of the two.
    """
    if mode not in ("auto", "reference"):
        raise ValueError(f"mode must be 'auto' or 'reference', got {mode!r}")
    block = object()
    _SELECTION.enter(mode, block)
    try:
        yield
    finally:
        _SELECTION.leave(block)


def kernel_status() -> KernelTable:
    """Say which implementation serves each op on each device of this machine, and why.

    Returns:
        A tuple of `KernelStatus` rows (``op``, ``device``, ``implementation`` "c++" | "triton" | "reference",
        ``reason``) that prints as a table: the CPU, every GPU that PyTorch calls CUDA ("cuda" alone if there is none),
        and another accelerator if PyTorch has one.
    """
    rows: list[KernelStatus] = []
    for entry in _ENTRIES.values():
        rows.append(_cpu_status(entry))
        rows += [_gpu_status(entry, device) for device in devices.gpus()]
        rows += [_other_status(entry, device) for device in devices.others()]
    return KernelTable(rows)


def ops() -> tuple[str, ...]:
    """Names of all registered ops, in the order of definition."""
    return tuple(_ENTRIES)


def reference_of(name: str) -> Callable[..., Any]:
    """The plain PyTorch function that defines op `name`, with the op's arguments and results.

    Raises:
        KeyError: no such op.
    """
    return _ENTRIES[name].reference


def triton_launcher(name: str) -> str:
    """``"module:function"`` of the CUDA launcher of op `name`; empty if it has none.

    Raises:
        KeyError: no such op.
    """
    return _ENTRIES[name].triton


def operands_of(name: str) -> tuple[Any, ...]:
    """What op `name` demands of its tensors, as `operand_rules.check` takes it."""
    return _ENTRIES[name].operands


def launcher(name: str) -> Callable[..., Any]:
    """The CUDA kernel of op `name`: its Triton launcher, imported by the first call, behind the checks that the C++
    kernels have in themselves."""
    entry = _ENTRIES[name]
    module_name, function_name = entry.triton.split(":")
    accepted: set[Any] = set()
    serve = _warning_reference(name, entry.reference)

    def launch(*args: Any) -> Any:
        if devices.unfit(_tensors(args)[0].device):
            return serve(*args)
        signature = operand_rules.signature(args)
        if signature not in accepted:
            entry.check(args)
            if len(accepted) < _SIGNATURES:
                accepted.add(signature)
        return getattr(importlib.import_module(module_name), function_name)(*args)

    return launch


def has_kernel(name: str, dispatch_key: str) -> bool:
    """True if op `name` has a kernel of its own on `dispatch_key` ("CPU" or "CUDA"), not only the reference."""
    # `_dispatch_has_kernel_for_dispatch_key` also counts the default, CompositeExplicitAutograd; the dump lists real
    # registrations.
    registered = torch._C._dispatch_dump(f"{NAMESPACE}::{name}").splitlines()
    return any(line.startswith(f"{dispatch_key}:") for line in registered)


def _cpu_status(entry: _Entry) -> KernelStatus:
    if has_kernel(entry.name, "CPU"):
        return KernelStatus(entry.name, "cpu", "c++", entry.cpu_rule or "the extension astrobiogen._C is loaded")
    return KernelStatus(entry.name, "cpu", "reference", extension.PROBLEM or "the extension has no kernel for this op")


def _gpu_status(entry: _Entry, device: torch.device) -> KernelStatus:
    if not entry.triton:
        return KernelStatus(entry.name, str(device), "reference", "this op has no Triton kernel")
    if importlib.util.find_spec("triton") is None:
        return KernelStatus(entry.name, str(device), "reference", "Triton is not installed")
    if not torch.cuda.is_available():
        return KernelStatus(entry.name, str(device), "triton", "registered; no CUDA device on this machine")
    if unfit := devices.unfit(device):
        return KernelStatus(entry.name, str(device), "reference", unfit)
    return KernelStatus(entry.name, str(device), "triton", f"CUDA device {torch.cuda.get_device_name(device)}")


def _other_status(entry: _Entry, device: torch.device) -> KernelStatus:
    return KernelStatus(entry.name, device.type, "reference", f"there are no kernels for devices of type {device.type}")


def _status(entry: _Entry, device: torch.device) -> KernelStatus:
    if device.type == "cpu":
        return _cpu_status(entry)
    return _gpu_status(entry, device) if device.type == "cuda" else _other_status(entry, device)


def _tensors(args: tuple[Any, ...]) -> list[torch.Tensor]:
    """All tensors among the arguments of an op, those in lists too."""
    flat = [one for arg in args for one in (arg if isinstance(arg, list) else [arg])]
    return [one for one in flat if isinstance(one, torch.Tensor)]


def _refusing_a_mixture(name: str, fake: Callable[..., Any]) -> Callable[..., Any]:
    """`fake`, but not for tensors of which only some are on the device meta: the dispatcher sends them here, and the
    results would be uninitialised memory. What a kernel would refuse is refused on the device meta too."""

    def checked(*args: Any) -> Any:
        devices = {tensor.device.type for tensor in _tensors(args)}
        if "meta" in devices and len(devices) > 1:
            raise ValueError(f"{NAMESPACE}::{name}: all tensors must be on one device, got {sorted(devices)}")
        if devices == {"meta"} and all(type(size) is int for tensor in _tensors(args) for size in tensor.shape):
            _ENTRIES[name].check(args)
        return fake(*args)

    return checked


def _left_to_reference(name: str, device: torch.device, args: tuple[Any, ...]) -> bool:
    """True for float64 where there is a kernel: it hands that dtype on to the reference if loops would be slower."""
    return any(tensor.dtype == torch.float64 for tensor in _tensors(args)) and _serves(name, device.type.upper())


_serves = functools.cache(has_kernel)


def _warning_reference(name: str, reference: Callable[..., Any]) -> Callable[..., Any]:
    def serve(*args: Any) -> Any:
        layouts = {tensor.layout for tensor in _tensors(args)} - {torch.strided}
        if layouts:  # the dispatcher sends them here, also where all kernels are built
            raise ValueError(f"{NAMESPACE}::{name}: all tensors must be dense, got {layouts.pop()}")
        device = next((tensor.device for tensor in _tensors(args)), torch.device("cpu"))
        unwarned = device.type != "meta" and (name, str(device)) not in _WARNED
        if unwarned and not _left_to_reference(name, device, args):
            _WARNED.add((name, str(device)))
            reason = _status(_ENTRIES[name], device).reason
            warnings.warn(f"astrobiogen.{name} runs its plain PyTorch reference on {device}: {reason}", stacklevel=2)
        return autocast.reference(reference, *args)

    return serve
