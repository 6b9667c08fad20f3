"""The language model: a decoder whose prefix tokens carry the domain and the other modalities."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from astrobiogen import ops
from astrobiogen.kernels.values import has_values, require_values
from astrobiogen.layers import GroupedQueryAttention, KeyValueCache, Linear, RMSNorm, RotaryEmbedding, SwiGLU
from astrobiogen.layers.children import globally_hooked, is_plain
from astrobiogen.layers.linear import LINEAR
from astrobiogen.models.common import (
    at_least_float32,
    check_axes,
    masked_mean,
    maybe_checkpoint,
    require,
    resolve_config,
)
from astrobiogen.models.llm_config import DOMAINS, LLMConfig

INITIAL_STD = 0.02  # of every matrix, as in GPT-2 and Llama


class RebuiltLLMIntegration(nn.Module):
    """Decoder-only language model with pre-norm blocks; every switch of `LLMConfig` changes every layer.

    The sequence is [domain token] [one token per modality] [text]. The prefix stands *before* the trunk, so every
    text position of every layer can attend to it, the language-model loss depends on it, and gradients of that loss
    reach the other encoders.

    * Domain conditioning (`use_scientific_reasoning`): a learned vector per domain of `DOMAINS` is the first token.
      Its effect on the loss is that of a one-token soft prompt; nothing more is claimed.
    * A modality token is type_vector + present · projection(features); an absent modality still has its type vector,
      so the sequence has one fixed length and no sample needs a mask for it.

    Text is padded on the right, which is checked. Under the causal mask real tokens never see padding, so no padding
    mask enters attention. Parameter names follow Hugging Face Llama (`embed_tokens`, `layers.N.self_attn.q_proj`,
    `norm`, `lm_head`).

    Args:
        config: an `LLMConfig`; default `LLMConfig()`, the original's sizes.
        **overrides: any field of `LLMConfig`, e.g. ``RebuiltLLMIntegration(hidden_size=136, num_attention_heads=2)``.

    Raises:
        TypeError: an override is no field of `LLMConfig`.
        ValueError: sizes do not fit together.
    """

    def __init__(self, config: LLMConfig | None = None, **overrides: Any) -> None:
        super().__init__()
        config = resolve_config(LLMConfig, config, overrides)
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.num_layers))
        self.norm = _norm(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.use_rope:
            self.rotary = RotaryEmbedding(config.head_dim, theta=config.rope_theta)
        else:
            self.embed_positions = nn.Embedding(config.max_length + config.prefix_length, config.hidden_size)
        if config.use_scientific_reasoning:
            self.embed_domains = nn.Embedding(len(DOMAINS), config.hidden_size)
        if config.modality_dims:
            self.modality_types = nn.Embedding(len(config.modality_dims), config.hidden_size)
            self.modality_projections = nn.ModuleDict(
                {name: nn.Linear(size, config.hidden_size) for name, size in config.modality_dims.items()}
            )
        self.apply(_initialise)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.embed_tokens.weight

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        modality_features: dict[str, torch.Tensor] | None = None,
        modality_present: dict[str, torch.Tensor] | None = None,
        domain: str | torch.Tensor | None = None,
        return_logits: bool = False,
        *,
        numerical_data: torch.Tensor | None = None,
        spectral_data: torch.Tensor | None = None,
    ) -> dict[str, torch.Tensor]:
        """Run the decoder.

        Args:
            input_ids: int64 [B, L], right-padded.
            attention_mask: bool [B, L], True at real tokens; default all.
            labels: int64 [B, L], the tokens themselves, −100 where none counts; the shift by one happens here.
            modality_features: [B, size] per modality named in the configuration; a missing entry counts as absent.
            modality_present: bool [B] per modality; default True for every entry of `modality_features`.
            domain: a name of `DOMAINS` or int64 [B]; default the configured one.
            return_logits: also return the [B, L, V] logits; without it they are never formed.
            numerical_data, spectral_data: the original's names for the features of modalities "numerical" and
                "spectral", which `modality_dims` must hold: {"numerical": 512, "spectral": 1024} in the original.

        Returns:
            ``hidden_states`` [B, L, H] after the final norm, ``features`` [B, H] their mean over real tokens (0 for
            an empty text), with labels ``loss`` (negative log-likelihood in nats, mean over all counted tokens; 0 if
            there is none) and ``token_count``, on request ``logits``.

        Raises:
            ValueError: an axis has the wrong size, a modality or domain is unknown, or a text is padded on the left.
        """
        check_axes("input_ids", input_ids, ("batch", "sequence"))
        batch, length = input_ids.shape
        require(
            length <= self.config.max_length,
            f"input_ids: axis 'sequence' has size {length}, expected at most max_length = {self.config.max_length}",
        )
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids, dtype=torch.bool)
        check_axes("attention_mask", attention_mask, ("batch", "sequence"), {"batch": batch, "sequence": length})
        if has_values(attention_mask):
            mask = attention_mask.bool()
            require_values(
                mask[:, :-1] | ~mask[:, 1:],
                "attention_mask: a real token follows padding, expected padding on the right only",
            )
        features = dict(modality_features or {})
        for name, value in (("numerical", numerical_data), ("spectral", spectral_data)):
            if value is not None:
                features[name] = value
        prefix = self._prefix(batch, input_ids.device, features, modality_present or {}, domain)
        hidden = self._trunk(torch.cat([*prefix, self.embed_tokens(input_ids)], dim=1))
        text = hidden[:, len(prefix) :]
        outputs = {"hidden_states": text, "features": masked_mean(text, attention_mask, axis=1)}
        if labels is not None:
            check_axes("labels", labels, ("batch", "sequence"), {"batch": batch, "sequence": length})
            outputs |= self._loss(text, labels)
        if return_logits:
            outputs["logits"] = self.lm_head(text)
        return outputs

    @torch.no_grad()
    def generate(
        self,
        input_ids: torch.Tensor,
        max_new_tokens: int,
        *,
        modality_features: dict[str, torch.Tensor] | None = None,
        modality_present: dict[str, torch.Tensor] | None = None,
        domain: str | torch.Tensor | None = None,
        temperature: float = 0.0,
        eos_token_id: int | None = None,
        generator: torch.Generator | None = None,
    ) -> torch.Tensor:
        """Continue `input_ids` [B, L] (no padding) by up to `max_new_tokens` tokens, with a key/value cache and without
        dropout, whatever mode the model is in.

        Args:
            input_ids: int64 [B, L], L >= 1.
            max_new_tokens: upper bound on the new tokens.
            modality_features: as in `forward`.
            modality_present: as in `forward`.
            domain: as in `forward`.
            temperature: 0 takes the most likely token; above 0 samples from softmax(logits / temperature).
            eos_token_id: a sequence that has produced it is continued with it; stops when all have.
            generator: source of randomness when sampling.

        Returns:
            int64 [B, L + new].
        """
        check_axes("input_ids", input_ids, ("batch", "sequence"))
        batch, length = input_ids.shape
        require(length >= 1, "input_ids: axis 'sequence' must not be empty")
        require(
            length + max_new_tokens <= self.config.max_length,
            f"sequence {length} + max_new_tokens {max_new_tokens} exceeds max_length = {self.config.max_length}",
        )
        modes = [(module, module.training) for module in self.modules()]
        self.eval()
        try:
            prefix = self._prefix(batch, input_ids.device, modality_features or {}, modality_present or {}, domain)
            return self._continue(prefix, input_ids, max_new_tokens, temperature, eos_token_id, generator)
        finally:
            for module, mode in modes:
                module.training = mode

    def _continue(
        self,
        prefix: list[torch.Tensor],
        tokens: torch.Tensor,
        max_new_tokens: int,
        temperature: float,
        eos_token_id: int | None,
        generator: torch.Generator | None,
    ) -> torch.Tensor:
        """`tokens` with up to `max_new_tokens` more, each from the cached keys and values of those before it."""
        batch = tokens.shape[0]
        x = torch.cat([*prefix, self.embed_tokens(tokens)], dim=1)
        attentions = [module for module in self.modules() if isinstance(module, GroupedQueryAttention)]
        capacity = x.shape[1] + max_new_tokens
        caches = [one.new_cache(batch, capacity, device=x.device, dtype=x.dtype) for one in attentions]
        finished = torch.zeros(batch, dtype=torch.bool, device=tokens.device)
        for _ in range(max_new_tokens):
            token = _pick(self.lm_head(self._trunk(x, caches)[:, -1]), temperature, generator)
            if eos_token_id is not None:
                token = torch.where(finished, eos_token_id, token)
                finished = finished | (token == eos_token_id)
            tokens = torch.cat([tokens, token[:, None]], dim=1)
            if bool(finished.all()):
                break
            x = self.embed_tokens(token)[:, None]
        return tokens

    def _prefix(
        self,
        batch: int,
        device: torch.device,
        features: dict[str, torch.Tensor],
        present: dict[str, torch.Tensor],
        domain: str | torch.Tensor | None,
    ) -> list[torch.Tensor]:
        """The tokens in front of the text, [B, 1, H] each."""
        unknown = (set(features) | set(present)) - set(self.config.modality_dims)
        require(
            not unknown,
            f"modality_features: unknown modalities {sorted(unknown)}, "
            f"expected some of {sorted(self.config.modality_dims)}, the names in modality_dims",
        )
        prefix: list[torch.Tensor] = []
        if self.config.use_scientific_reasoning:
            prefix.append(self.embed_domains(self._domain_index(domain, batch, device))[:, None])
        elif domain is not None:
            raise ValueError("domain is given but use_scientific_reasoning is off")
        dims = self.config.modality_dims
        types = self.modality_types(torch.arange(len(dims), device=device)).unbind() if dims else ()
        for kind, (name, size) in zip(types, dims.items()):
            token = kind.expand(batch, -1)
            if name in features:
                check_axes(
                    f"modality_features[{name!r}]",
                    features[name],
                    ("batch", "feature"),
                    {"batch": batch, "feature": size},
                )
                projected = self.modality_projections[name](features[name])
                if name in present:
                    check_axes(f"modality_present[{name!r}]", present[name], ("batch",), {"batch": batch})
                    projected = projected * present[name][:, None].to(projected.dtype)
                token = token + projected
            prefix.append(token[:, None])
        return prefix

    def _domain_index(self, domain: str | torch.Tensor | None, batch: int, device: torch.device) -> torch.Tensor:
        if isinstance(domain, torch.Tensor):
            check_axes("domain", domain, ("batch",), {"batch": batch})
            return domain
        name = self.config.domain_adaptation if domain is None else domain
        require(name in DOMAINS, f"domain must be one of {DOMAINS}, got {name!r}")
        return torch.full((batch,), DOMAINS.index(name), dtype=torch.long, device=device)

    def _trunk(self, x: torch.Tensor, caches: Sequence[KeyValueCache] | None = None) -> torch.Tensor:
        """All blocks and the final norm on embeddings [B, S, H]; with caches, S positions behind the cached ones."""
        start = caches[0].length if caches else 0
        positions = torch.arange(start, start + x.shape[1], device=x.device)
        angles = None
        if self.config.use_rope:
            angles = self.rotary(positions)
        else:
            x = x + self.embed_positions(positions)
        residual: torch.Tensor | None = None
        for index, layer in enumerate(self.layers):
            cache = caches[index] if caches else None
            x, residual = maybe_checkpoint(
                self.config.use_gradient_checkpointing and cache is None, layer, x, residual, angles, cache
            )
        return _add_norm(self.norm, x, residual)[0]

    def _loss(self, text: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        """Negative log-likelihood of token t + 1 given everything up to t."""
        targets = labels[:, 1:].contiguous()
        states, head = text[:, :-1].reshape(-1, text.shape[-1]), self.lm_head
        if is_plain(head, LINEAR) and head.bias is None and not globally_hooked():
            total = ops.linear_cross_entropy(states, head.weight, targets.reshape(-1), reduction="sum")
        else:  # an adapter or a hook: the head is called, and its logits exist
            total = F.cross_entropy(at_least_float32(head(states)), targets.reshape(-1), reduction="sum")
        count = (targets != -100).sum()
        return {"loss": total / count.clamp(min=1), "token_count": count}


class DecoderLayer(nn.Module):
    """Pre-norm attention and feed-forward; the residual addition is fused with the norm that follows it."""

    def __init__(self, config: LLMConfig) -> None:
        super().__init__()
        self.input_layernorm = _norm(config)
        self.self_attn = GroupedQueryAttention(config.hidden_size, config.num_attention_heads, config.kv_heads)
        self.post_attention_layernorm = _norm(config)
        if config.use_swiglu:
            self.mlp: nn.Module = SwiGLU(config.hidden_size, config.intermediate_size)
        else:
            self.mlp = nn.Sequential(
                Linear(config.hidden_size, config.intermediate_size),
                nn.GELU(),
                Linear(config.intermediate_size, config.hidden_size),
            )
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self,
        x: torch.Tensor,
        residual: torch.Tensor | None,
        angles: tuple[torch.Tensor, torch.Tensor] | None,
        cache: KeyValueCache | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (branch output, residual stream before it); their sum is the block's result."""
        normed, residual = _add_norm(self.input_layernorm, x, residual)
        attended = self.dropout(self.self_attn(normed, angles, cache))
        normed, residual = _add_norm(self.post_attention_layernorm, attended, residual)
        return self.dropout(self.mlp(normed)), residual


def _norm(config: LLMConfig) -> RMSNorm | nn.LayerNorm:
    if config.use_rms_norm:
        return RMSNorm(config.hidden_size, config.norm_eps)
    return nn.LayerNorm(config.hidden_size, config.norm_eps)


def _add_norm(norm: nn.Module, x: torch.Tensor, residual: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """(norm(x + residual), x + residual)."""
    if residual is None:
        return norm(x), x
    if isinstance(norm, RMSNorm):
        return norm(x, residual)
    total = x + residual
    return norm(total), total


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=INITIAL_STD)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)


def _pick(logits: torch.Tensor, temperature: float, generator: torch.Generator | None) -> torch.Tensor:
    if temperature <= 0.0:
        return logits.argmax(-1)
    probabilities = (logits.float() / temperature).softmax(-1)
    return torch.multinomial(probabilities, 1, generator=generator)[:, 0]
