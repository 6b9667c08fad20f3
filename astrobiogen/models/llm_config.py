"""Configuration of the language model."""

import dataclasses

from astrobiogen.models.common import require
from astrobiogen.models.original.names import LLM_NAMES, takes_original_names

DOMAINS = ("astrobiology", "climate_science", "molecular_biology", "planetary_science", "spectroscopy")


def default_kv_heads(num_attention_heads: int) -> int:
    """A quarter of the heads if that divides them, else a half, else all of them: the original system's rule."""
    for heads in (num_attention_heads // 4, num_attention_heads // 2):
        if heads and num_attention_heads % heads == 0:
            return heads
    return num_attention_heads


@takes_original_names(LLM_NAMES)
@dataclasses.dataclass(frozen=True)
class LLMConfig:
    """Sizes and switches of `RebuiltLLMIntegration`.

    Attributes:
        hidden_size: width H of the residual stream.
        num_attention_heads: query heads; must divide `hidden_size`.
        num_kv_heads: key/value heads with `use_gqa`; None takes a quarter of the heads.
        num_layers: decoder blocks.
        vocab_size: V.
        intermediate_size: width of the feed-forward block.
        max_length: longest text in tokens; sizes the table of learned positions when `use_rope` is off.
        tie_word_embeddings: the output projection shares the embedding's weight.
        dropout: on both branches of every block, in training only.
        rope_theta: base of the rotary frequencies.
        norm_eps: epsilon of every norm.
        use_scientific_reasoning: domain conditioning, see `RebuiltLLMIntegration`.
        domain_adaptation: the domain used when a call names none; one of `DOMAINS`.
        use_rope: rotary positions in every layer; off: one table of learned positions.
        use_gqa: grouped key/value heads in every layer; off: as many as query heads.
        use_rms_norm: RMSNorm everywhere; off: LayerNorm.
        use_swiglu: SwiGLU in every layer; off: a two-matrix GELU block of the same intermediate size.
        use_gradient_checkpointing: recompute each block in the backward pass.
        modality_dims: feature size of each modality that enters as a prefix token; empty for a pure language model.
    """

    hidden_size: int = 4352
    num_attention_heads: int = 64
    num_kv_heads: int | None = None
    num_layers: int = 56
    vocab_size: int = 32_000
    intermediate_size: int = 13_968
    max_length: int = 512
    tie_word_embeddings: bool = False
    dropout: float = 0.0
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-6
    use_scientific_reasoning: bool = True
    domain_adaptation: str = "astrobiology"
    use_rope: bool = True
    use_gqa: bool = True
    use_rms_norm: bool = True
    use_swiglu: bool = True
    use_gradient_checkpointing: bool = False
    modality_dims: dict[str, int] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        require(
            self.hidden_size % self.num_attention_heads == 0,
            f"num_attention_heads = {self.num_attention_heads} must divide hidden_size = {self.hidden_size}",
        )
        require(
            self.num_attention_heads % self.kv_heads == 0,
            f"num_kv_heads = {self.kv_heads} must divide num_attention_heads = {self.num_attention_heads}",
        )
        for name in ("num_layers", "vocab_size", "intermediate_size", "max_length"):
            require(getattr(self, name) >= 1, f"{name} must be at least 1, got {getattr(self, name)}")
        require(0.0 <= self.dropout < 1.0, f"dropout must be in [0, 1), got {self.dropout}")
        require(
            self.domain_adaptation in DOMAINS,
            f"domain_adaptation must be one of {DOMAINS}, got {self.domain_adaptation!r}",
        )
        require(
            not self.use_rope or self.head_dim % 2 == 0,
            f"rotary positions need an even head dimension, got {self.head_dim}",
        )

    @property
    def head_dim(self) -> int:
        """Columns per head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def kv_heads(self) -> int:
        """Key/value heads in every layer."""
        if not self.use_gqa:
            return self.num_attention_heads
        return self.num_kv_heads or default_kv_heads(self.num_attention_heads)

    @property
    def prefix_length(self) -> int:
        """Tokens in front of the text: the domain token and one per modality."""
        return int(self.use_scientific_reasoning) + len(self.modality_dims)
