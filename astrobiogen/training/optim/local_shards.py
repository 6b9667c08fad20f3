"""8-bit optimizers under FSDP2: bitsandbytes works on ordinary tensors only, so it is given the local shards.

Its moments are quantised in blocks of 256 values of the *local* shard. Saved and loaded by the same number of
processes they are put back to the bit; for another number they are decoded, cut anew and encoded again, which moves
each by at most half a step of the 8-bit code.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from astrobiogen.training.distributed import local_part
from astrobiogen.training.distributed.model import like

_BLOCK = 256
# bitsandbytes puts the quantised part of a saved state under this key.
_WRAPPED = "__bnb_optimizer_quant_state__"
Groups = list[dict[str, Any]]
State = dict[str, Any]


class LocalShardOptimizer(torch.optim.Optimizer):
    """`make(groups)`, an optimizer of bitsandbytes, on the local shards of the parameters of `groups`.

    Learning rates and the like are read from `param_groups` at every step. The moments are not part of `state_dict`:
    see `shard_states` and `restore`.
    """

    def __init__(self, groups: Groups, options: dict[str, Any], make: Callable[..., torch.optim.Optimizer]) -> None:
        super().__init__(groups, options)
        # An empty shard (more processes than rows) has nothing to update.
        shards = [[nn.Parameter(local_part(p).detach()) for p in group["params"]] for group in groups]
        self._pairs = [list(zip(group["params"], own)) for group, own in zip(groups, shards)]
        filled = [[shard for shard in own if shard.numel()] for own in shards]
        self.inner = make([{**group, "params": own} for group, own in zip(groups, filled)], **options)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update the shards from the gradients' shards."""
        if closure is not None:
            raise ValueError("closure: got one, expected None: the loss is not computed here")
        for outer, inner, pairs in zip(self.param_groups, self.inner.param_groups, self._pairs):
            inner.update({key: value for key, value in outer.items() if key != "params"})
            for parameter, shard in pairs:
                shard.data = local_part(parameter).detach()
                shard.grad = None if parameter.grad is None else local_part(parameter.grad)
        self.inner.step()
        for _, shard in self._shards():
            shard.grad = None

    def _shards(self) -> Iterator[tuple[nn.Parameter, nn.Parameter]]:
        for pairs in self._pairs:
            yield from pairs

    def shard_states(self) -> dict[int, State]:
        """State of each local shard that has one, by the parameter's number."""
        return {
            number: dict(self.inner.state[shard])
            for number, (_, shard) in enumerate(self._shards())
            if self.inner.state.get(shard)
        }

    def load_state_dict(self, state_dict: State) -> None:
        """Take over the groups; moments of a run that was not sharded are cut to this process's shards."""
        groups = {"state": {}, "param_groups": state_dict["param_groups"]}
        super().load_state_dict(groups)
        if state_dict["state"]:
            self.restore([state_dict["state"]])

    def restore(self, saved: Sequence[dict[int, State]]) -> None:
        """Put back `shard_states` of all processes of the saved run, by rank."""
        numbered = list(enumerate(self._shards()))
        restore(self.inner, [(number, parameter, shard) for number, (parameter, shard) in numbered], saved)


def restore(
    optimizer: torch.optim.Optimizer,
    places: Sequence[tuple[int, nn.Parameter, nn.Parameter]],
    saved: Sequence[dict[int, State]],
) -> None:
    """Give the bitsandbytes `optimizer` the moments that `saved` holds, by rank and number of parameter.

    Args:
        places: for each parameter its number, the (perhaps sharded) parameter, and the tensor that `optimizer` updates
            for it.
    """
    indices = {
        id(tensor): (group_index, index)
        for group_index, group in enumerate(optimizer.param_groups)
        for index, tensor in enumerate(group["params"])
    }
    for number, parameter, tensor in places:
        parts = [_unwrapped(states[number]) for states in saved if number in states]
        if not parts or not tensor.numel():
            continue
        group_index, index = indices[id(tensor)]
        optimizer.init_state(optimizer.param_groups[group_index], tensor, group_index, index)  # type: ignore[attr-defined]
        state = optimizer.state[tensor]
        state["step"] = parts[0]["step"]
        for moment in ("1", "2"):
            # Shards are split along the first axis, in the order of the ranks.
            whole = torch.cat([_decoded(part, moment) for part in parts]).reshape(parameter.shape)
            _encode(state, moment, local_part(like(parameter, whole)))
        same = _same_cut(parts, state, saved, parameter, tensor)
        if same is not None:
            for name, value in same.items():
                if isinstance(value, torch.Tensor):
                    state[name].copy_(value)


def _same_cut(
    parts: Sequence[State],
    state: State,
    saved: Sequence[dict[int, State]],
    parameter: nn.Parameter,
    tensor: nn.Parameter,
) -> State | None:
    """The saved state of exactly this shard, if the saved run was cut as this one is."""
    mesh = getattr(parameter, "device_mesh", None)
    size, rank = (mesh.size(), mesh.get_local_rank()) if mesh is not None else (1, 0)
    if len(saved) != size or rank >= len(parts):
        return None
    part = parts[rank]  # shards that are empty come last, so the others keep their ranks
    fits = part["state1"].shape == tensor.shape and part["state1"].dtype == state["state1"].dtype
    return part if fits else None


def _unwrapped(state: State) -> State:
    return {**{key: value for key, value in state.items() if key != _WRAPPED}, **state.get(_WRAPPED, {})}


def _decoded(state: State, moment: str) -> torch.Tensor:
    """A moment as flat fp32 values."""
    codes = state[f"state{moment}"].flatten()
    if codes.dtype != torch.uint8:
        return codes.float()
    scales = state[f"absmax{moment}"].repeat_interleave(_BLOCK)[: codes.numel()]
    return state[f"qmap{moment}"][codes.long()] * scales


def _encode(state: State, moment: str, values: torch.Tensor) -> None:
    """Write fp32 `values` into a freshly made state."""
    target = state[f"state{moment}"]
    if target.dtype != torch.uint8:
        target.copy_(values)
        return
    flat = values.flatten()
    blocks = nn.functional.pad(flat, (0, -flat.numel() % _BLOCK)).view(-1, _BLOCK)
    scales = blocks.abs().amax(1)
    table = state[f"qmap{moment}"]
    middles = (table[1:] + table[:-1]) / 2  # a value takes the nearest entry of the (ascending) table
    codes = torch.bucketize(blocks / scales.clamp(min=torch.finfo(torch.float32).tiny)[:, None], middles)
    target.copy_(codes.flatten()[: flat.numel()].view_as(target))
    state[f"absmax{moment}"].copy_(scales)
