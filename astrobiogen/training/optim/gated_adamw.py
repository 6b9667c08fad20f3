"""bitsandbytes' 8-bit AdamW, taken or not as a number on the device says: the host never waits to decide.

bitsandbytes has no counterpart of PyTorch's `found_inf`, and its `step` waits for the device after every parameter.
Here a moment in 8 bits is updated by its kernel, beside a copy of what the kernel overwrites, and `torch.where` puts
the copy back where the update was not to be taken: 30 more bytes moved per weight and update, once per accumulation
window. Large tensors are updated in pieces, so that the copies need at most 96 MiB. Small tensors, whose moments
bitsandbytes keeps in fp32, are one call of PyTorch's fused AdamW, which is gated by itself.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch.optim.adamw import adamw

# Weights per piece, of 4 + 1 + 1 bytes; a multiple of bitsandbytes' block of 256, so that pieces change no bit.
_PIECE = 2**24
_BLOCK = 256
Update = Callable[..., None]


class GatedAdamW:
    """To be put before `bitsandbytes.optim.AdamW8bit` or `PagedAdamW8bit` in the bases of a class, see `gated`.

    Attributes:
        found_inf: if not None, a step changes no bit of weights or moments where this number (on the device of the
            weights) is not 0. `settle` must then tell, before the next step, what it was.
    """

    found_inf: torch.Tensor | None = None
    param_groups: list[dict[str, Any]]
    state: dict[torch.Tensor, dict[str, Any]]
    optimizer_name: str
    is_paged: bool
    init_state: Callable[..., None]
    prefetch_state: Callable[..., None]
    update_8bit: Update
    _pending: list[tuple[torch.Tensor, bool]]

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        """One update from the parameters' gradients.

        Raises:
            ValueError: a closure was given.
        """
        if closure is not None:
            raise ValueError("closure: got one, expected None: the loss is not computed here")
        self._pending = []
        bad = None if self.found_inf is None else self.found_inf > 0
        if bad is not None and self._managed():
            if bool(bad):
                return
            bad = None
        for number, group in enumerate(self.param_groups):
            small: dict[int, list[torch.Tensor]] = {}
            for index, parameter in enumerate(group["params"]):
                if parameter.grad is None:
                    continue
                fresh = not self.state[parameter]
                if fresh:
                    self.init_state(group, parameter, number, index)
                state = self.state[parameter]
                state["step"] += 1
                self._pending.append((parameter, fresh))
                if state["state1"].dtype == torch.uint8:
                    self.prefetch_state(parameter)
                    self._step_large(group, parameter, state, bad)
                else:
                    small.setdefault(state["step"], []).append(parameter)
            for steps, parameters in small.items():
                self._step_small(group, parameters, steps)

    def settle(self, skipped: bool) -> None:
        """Say whether the last step was one that `found_inf` kept from being taken: it then counts as none."""
        for parameter, fresh in self._pending if skipped else ():
            if fresh:
                del self.state[parameter]
            else:
                self.state[parameter]["step"] -= 1
        self._pending = []

    def _managed(self) -> bool:
        """Whether moments lie in managed memory, which PyTorch takes for the host's: no operation on the device could
        put them back, so the step is decided on the host.
        """
        return self.is_paged and any(one.is_cuda for group in self.param_groups for one in group["params"])

    def _step_large(
        self, group: dict[str, Any], parameter: torch.Tensor, state: dict[str, Any], bad: torch.Tensor | None
    ) -> None:
        if not parameter.is_contiguous():
            parameter.data = parameter.data.contiguous()
        paged = getattr(state["state1"], "is_paged", False)
        flat = parameter.detach().view(-1)
        assert parameter.grad is not None
        gradient = parameter.grad.reshape(-1)
        for start in range(0, flat.numel(), _PIECE):
            stop = min(start + _PIECE, flat.numel())
            blocks = slice(start // _BLOCK, -(-stop // _BLOCK))
            moments = [state[name].view(-1)[start:stop] for name in ("state1", "state2")]
            for moment in moments:
                moment.is_paged = paged  # type: ignore[attr-defined] # what bitsandbytes marks its tensors with
            scales = [state[name][blocks] for name in ("absmax1", "absmax2")]
            written = [flat[start:stop], *moments, *scales]
            kept = [] if bad is None else [one.clone() for one in written]
            beta1, beta2 = group["betas"]
            type(self).update_8bit(
                self.optimizer_name, gradient[start:stop], written[0], *moments, beta1, beta2, 0.0, 0.0, group["eps"],
                state["step"], group["lr"], state["qmap1"], state["qmap2"], *scales, group["weight_decay"],
            )  # fmt: skip
            for one, old in zip(written, kept):
                torch.where(bad, old, one, out=one)  # type: ignore[arg-type] # nothing is kept if there is no `bad`

    def _step_small(self, group: dict[str, Any], parameters: list[torch.Tensor], steps: int) -> None:
        """`parameters`, whose step number `steps` this is."""
        beta1, beta2 = group["betas"]
        adamw(
            parameters,
            [parameter.grad for parameter in parameters],  # type: ignore[misc]
            [self.state[parameter]["state1"] for parameter in parameters],
            [self.state[parameter]["state2"] for parameter in parameters],
            [],
            list(torch.full((len(parameters),), steps - 1.0, device=parameters[0].device).unbind()),
            fused=True,
            found_inf=self.found_inf,
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )


def gated(library: Any, name: str) -> type[torch.optim.Optimizer]:
    """The optimizer `name` of `library` (the module `bitsandbytes`), with `GatedAdamW`'s step."""
    update = staticmethod(library.functional.optimizer_update_8bit_blockwise)
    return type(f"Gated{name}", (GatedAdamW, getattr(library.optim, name)), {"update_8bit": update})
