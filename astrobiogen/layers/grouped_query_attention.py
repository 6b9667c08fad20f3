"""Grouped-query attention with rotary positions and a key/value cache; loads Hugging Face Llama weights unchanged."""

import dataclasses

import torch
from torch import nn

from astrobiogen import ops
from astrobiogen.kernels.checks import check_int
from astrobiogen.layers.children import reset_children
from astrobiogen.layers.linear import Linear


@dataclasses.dataclass
class KeyValueCache:
    """Keys and values of the positions seen so far, in buffers of fixed length; filled in place by
    `GroupedQueryAttention`. For inference: nothing is differentiated through it.

    Attributes:
        keys: [B, capacity, kv heads, D], already rotated, so that no key is rotated twice.
        values: [B, capacity, kv heads, D].
        length: number of filled positions; set it back to drop the last ones (0 empties the cache).
    """

    keys: torch.Tensor
    values: torch.Tensor
    length: int = 0

    @property
    def capacity(self) -> int:
        """Positions that the buffers hold."""
        return self.keys.shape[1]

    def append(self, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Store [B, S, kv heads, D] behind what is there and return views of everything filled.

        Raises:
            ValueError: the capacity is exceeded, or the shapes do not fit the buffers.
            RuntimeError: `keys` or `values` carries a gradient, which writing into the buffers would lose.
        """
        batch, capacity, heads, dim = self.keys.shape
        for name, new in (("keys", keys), ("values", values)):
            if new.dim() != 4 or (new.shape[0], *new.shape[2:]) != (batch, heads, dim) or new.shape[1] != keys.shape[1]:
                raise ValueError(f"{name} must be [{batch}, S, {heads}, {dim}] as the cache's, got {tuple(new.shape)}")
            if torch.is_grad_enabled() and new.requires_grad:
                raise RuntimeError(f"{name} requires a gradient, but the cache serves inference: use torch.no_grad()")
        end = self.length + keys.shape[1]
        if end > capacity:
            raise ValueError(f"the cache holds {capacity} positions, {end} are needed")
        self.keys[:, self.length : end] = keys
        self.values[:, self.length : end] = values
        self.length = end
        return self.keys[:, :end], self.values[:, :end]


class GroupedQueryAttention(nn.Module):
    """Attention in which groups of num_heads / num_kv_heads query heads share a key and a value head.

    softmax(scale · q kᵀ) v per head, scale = head_dim^(−1/2), q and k rotated when angles are given. Parameters:
    `q_proj`, `k_proj`, `v_proj`, `o_proj`, as in Hugging Face Llama.

    Source: Ainslie et al. 2023, arXiv:2305.13245.

    Args:
        hidden_size: width of the residual stream.
        num_heads: query heads.
        num_kv_heads: key/value heads, divides `num_heads`; default `num_heads` (plain multi-head attention).
        head_dim: default hidden_size / num_heads; any size, also 68.
        bias: biases on q, k and v (as Qwen2).
        causal: each position sees itself and earlier ones.
        window: each position sees only the last `window` positions, itself included.
        softcap: scores are capped as softcap · tanh(score / softcap).
        output_bias: a bias on `o_proj` (Llama with `attention_bias` has it together with the other three).
        interleaved: rotary pairs are columns (2i, 2i + 1) instead of (i, i + rotary/2).
        scale: factor of the scores; default head_dim^(-1/2).

    There is no attention dropout: see `ops.attention`.

    Raises:
        TypeError: a size is not an integer.
        ValueError: sizes do not divide; from `forward`, an argument does not fit.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        bias: bool = False,
        causal: bool = True,
        window: int | None = None,
        softcap: float | None = None,
        *,
        output_bias: bool = False,
        interleaved: bool = False,
        scale: float | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        hidden_size, num_heads = check_int("hidden_size", hidden_size, 1), check_int("num_heads", num_heads, 1)
        kv_heads = num_heads if num_kv_heads is None else check_int("num_kv_heads", num_kv_heads, 0)
        if kv_heads < 1 or num_heads % kv_heads:
            raise ValueError(f"num_kv_heads must divide num_heads = {num_heads}, got {kv_heads}")
        if head_dim is None and hidden_size % num_heads:
            raise ValueError(
                f"num_heads must divide hidden_size = {hidden_size} when head_dim is not given, got {num_heads}"
            )
        self.hidden_size = hidden_size
        self.num_heads = num_heads
        self.num_kv_heads = kv_heads
        self.head_dim = hidden_size // num_heads if head_dim is None else check_int("head_dim", head_dim, 1)
        self.causal = causal
        self.window = window
        self.softcap = softcap
        self.interleaved = interleaved
        self.scale = scale
        q_size, kv_size = num_heads * self.head_dim, kv_heads * self.head_dim
        self.q_proj = Linear(hidden_size, q_size, bias=bias, device=device, dtype=dtype)
        self.k_proj = Linear(hidden_size, kv_size, bias=bias, device=device, dtype=dtype)
        self.v_proj = Linear(hidden_size, kv_size, bias=bias, device=device, dtype=dtype)
        self.o_proj = Linear(q_size, hidden_size, bias=output_bias, device=device, dtype=dtype)

    def reset_parameters(self) -> None:
        """Initialise the projections as `torch.nn.Linear` does."""
        reset_children(self)

    def forward(
        self,
        x: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        cache: KeyValueCache | None = None,
        *,
        position_ids: torch.Tensor | None = None,
        cu_seqlens: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attend within `x` [B, S, hidden]; with `cache`, `x` holds the positions after the cached ones.

        Args:
            x: [B, S, hidden_size].
            position_embeddings: (cos, sin), each [S, rotary/2] or [B, S, rotary/2], the angles of the positions in `x`;
                with `position_ids` tables [L, rotary/2] of all positions (`ops.rope_frequencies`).
            cache: extended in place; for inference, without gradients.
            position_ids: int32 or int64 [S] or [B, S], rows of the tables (`ops.rope_positions` for packed sequences).
            cu_seqlens: int32 or int64 [n + 1], bounds of sequences packed along S; needs B = 1 and no cache.

        Returns:
            [B, S, hidden_size].
        """
        if x.dim() != 3 or x.shape[-1] != self.hidden_size:
            raise ValueError(f"x must be [batch, sequence, hidden = {self.hidden_size}], got {tuple(x.shape)}")
        if cache is not None and cu_seqlens is not None:
            raise ValueError("cu_seqlens and cache exclude each other: the cache holds one sequence per batch entry")
        cos, sin = self._angles(position_embeddings, position_ids)
        dim = self.head_dim
        q, k, v = _heads(self.q_proj(x), dim), _heads(self.k_proj(x), dim), _heads(self.v_proj(x), dim)
        if cache is not None:  # keys are cached rotated, so the op must not rotate them again
            if cos is not None and sin is not None:
                q, k = (ops.rope(states, cos, sin, self.interleaved) for states in (q, k))
                cos = sin = None
            k, v = cache.append(k, v)
        out = ops.attention(
            q,
            k,
            v,
            cos=cos,
            sin=sin,
            causal=self.causal,
            scale=self.scale,
            window=self.window,
            softcap=self.softcap,
            cu_seqlens=cu_seqlens,
            interleaved=self.interleaved,
        )
        return self.o_proj(out.flatten(2))

    def _angles(
        self, tables: tuple[torch.Tensor, torch.Tensor] | None, position_ids: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        if position_ids is None:
            return (None, None) if tables is None else tables
        if tables is None:
            raise ValueError("position_ids need position_embeddings: tables [L, rotary/2] whose rows they name")
        return ops.rope_gather(*tables, position_ids)

    def new_cache(self, batch: int, capacity: int, *, device: torch.device, dtype: torch.dtype) -> KeyValueCache:
        """An empty cache for `batch` sequences of at most `capacity` positions.

        A head starts every 16 bytes, whatever its width (68 columns of bf16 take 72), so that the GPU kernels read it
        in place at full width.
        """
        columns = 16 // dtype.itemsize
        width = -(-self.head_dim // columns) * columns
        buffers = torch.zeros((2, batch, capacity, self.num_kv_heads, width), device=device, dtype=dtype)
        keys, values = buffers[..., : self.head_dim]
        return KeyValueCache(keys, values)

    def extra_repr(self) -> str:
        """Sizes for `print(module)`."""
        return f"heads={self.num_heads}, kv_heads={self.num_kv_heads}, head_dim={self.head_dim}, causal={self.causal}"


def _heads(states: torch.Tensor, dim: int) -> torch.Tensor:
    """[B, S, heads · D] as [B, S, heads, D]; a tensor-parallel projection returns its own share of the heads."""
    batch, length, width = states.shape
    return states.view(batch, length, width // dim, dim)
