"""Grouped-query attention with rotary positions and a key/value cache; loads Hugging Face Llama weights unchanged."""

import dataclasses

import torch
from torch import nn

from astrobiogen import ops


@dataclasses.dataclass
class KeyValueCache:
    """Keys and values of the positions seen so far, in buffers of fixed length; filled in place by
    `GroupedQueryAttention`.

    Attributes:
        keys: [B, capacity, kv heads, D], already rotated.
        values: [B, capacity, kv heads, D].
        length: number of filled positions.
    """

    keys: torch.Tensor
    values: torch.Tensor
    length: int = 0

    def append(self, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Store [B, S, kv heads, D] behind what is there and return views of everything filled.

        Raises:
            ValueError: the capacity is exceeded.
        """
        end = self.length + keys.shape[1]
        if end > self.keys.shape[1]:
            raise ValueError(f"the cache holds {self.keys.shape[1]} positions, {end} are needed")
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
        bias: biases on q, k and v (as Qwen2); `o_proj` has none.
        causal: each position sees itself and earlier ones.
        window: each position sees only the last `window` positions, itself included.
        softcap: scores are capped as softcap · tanh(score / softcap).

    Raises:
        ValueError: sizes do not divide; from `forward`, the last axis of `x` is not `hidden_size`.
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
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        if kv_heads < 1 or num_heads % kv_heads:
            raise ValueError(f"num_kv_heads must divide num_heads = {num_heads}, got {kv_heads}")
        if head_dim is None and hidden_size % num_heads:
            raise ValueError(
                f"num_heads must divide hidden_size = {hidden_size} when head_dim is not given, got {num_heads}"
            )
        self.hidden_size = hidden_size
        self.num_heads = num_heads
        self.num_kv_heads = kv_heads
        self.head_dim = hidden_size // num_heads if head_dim is None else head_dim
        self.causal = causal
        self.window = window
        self.softcap = softcap
        q_size, kv_size = num_heads * self.head_dim, kv_heads * self.head_dim
        self.q_proj = nn.Linear(hidden_size, q_size, bias=bias, device=device, dtype=dtype)
        self.k_proj = nn.Linear(hidden_size, kv_size, bias=bias, device=device, dtype=dtype)
        self.v_proj = nn.Linear(hidden_size, kv_size, bias=bias, device=device, dtype=dtype)
        self.o_proj = nn.Linear(q_size, hidden_size, bias=False, device=device, dtype=dtype)

    def forward(
        self,
        x: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        cache: KeyValueCache | None = None,
    ) -> torch.Tensor:
        """Attend within `x` [B, S, hidden]; with `cache`, `x` holds the positions after the cached ones.

        Args:
            x: [B, S, hidden_size].
            position_embeddings: (cos, sin), each [S, rotary/2] or [B, S, rotary/2], the angles of the positions in `x`.
            cache: extended in place; for inference, without gradients.
        """
        if x.dim() != 3 or x.shape[-1] != self.hidden_size:
            raise ValueError(f"x must be [batch, sequence, hidden = {self.hidden_size}], got {tuple(x.shape)}")
        batch, length, _ = x.shape
        q = self.q_proj(x).view(batch, length, self.num_heads, self.head_dim)
        k = self.k_proj(x).view(batch, length, self.num_kv_heads, self.head_dim)
        v = self.v_proj(x).view(batch, length, self.num_kv_heads, self.head_dim)
        cos, sin = (None, None) if position_embeddings is None else position_embeddings
        if cache is not None:  # keys are cached rotated, so the op must not rotate them again
            if cos is not None and sin is not None:
                q, k = ops.rope(q, cos, sin), ops.rope(k, cos, sin)
                cos = sin = None
            k, v = cache.append(k, v)
        out = ops.attention(q, k, v, cos=cos, sin=sin, causal=self.causal, window=self.window, softcap=self.softcap)
        return self.o_proj(out.reshape(batch, length, self.num_heads * self.head_dim))

    def new_cache(self, batch: int, capacity: int, *, device: torch.device, dtype: torch.dtype) -> KeyValueCache:
        """An empty cache for `batch` sequences of at most `capacity` positions."""
        shape = (batch, capacity, self.num_kv_heads, self.head_dim)
        return KeyValueCache(
            torch.zeros(shape, device=device, dtype=dtype), torch.zeros(shape, device=device, dtype=dtype)
        )

    def extra_repr(self) -> str:
        """Sizes for `print(module)`."""
        return f"heads={self.num_heads}, kv_heads={self.num_kv_heads}, head_dim={self.head_dim}, causal={self.causal}"
