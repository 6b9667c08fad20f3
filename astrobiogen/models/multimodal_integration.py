"""Fusion of any subset of modalities by cross-attention, with adaptive weights that take part in the result."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from astrobiogen.layers import RMSNorm, SwiGLU
from astrobiogen.models.common import at_least_float32, check_axes, require, resolve_config
from astrobiogen.models.original.names import FUSION_NAMES, takes_original_names


@takes_original_names(FUSION_NAMES)
@dataclasses.dataclass(frozen=True)
class FusionConfig:
    """Sizes and switches of `RebuiltMultimodalIntegration`.

    Attributes:
        fusion_dim: token width.
        num_attention_heads: divides `fusion_dim`.
        num_fusion_layers: cross-attention blocks.
        num_latents: learned queries that read the modalities.
        use_adaptive_weighting: weigh the modalities per sample; off: equal weights over those present.
        modality_dropout: probability of hiding a modality from the fusion, in training only; one always stays.
        modality_dropouts: the same for single modalities by name, in place of `modality_dropout`.
        use_modality_heads: predict the classes from each modality alone as well (``modality_logits``).
        dropout: on every branch, in training only.
        modality_dims: feature size of each modality, in order.
    """

    fusion_dim: int = 256
    num_attention_heads: int = 8
    num_fusion_layers: int = 3
    num_latents: int = 4
    use_adaptive_weighting: bool = True
    modality_dropout: float = 0.0
    modality_dropouts: dict[str, float] = dataclasses.field(default_factory=dict)
    use_modality_heads: bool = True
    dropout: float = 0.1
    modality_dims: dict[str, int] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        require(
            self.fusion_dim % self.num_attention_heads == 0,
            f"num_attention_heads = {self.num_attention_heads} must divide fusion_dim = {self.fusion_dim}",
        )
        for name in ("num_fusion_layers", "num_latents"):
            require(getattr(self, name) >= 1, f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("dropout", "modality_dropout"):
            require(0.0 <= getattr(self, name) < 1.0, f"{name} must be in [0, 1), got {getattr(self, name)}")
        for name, value in self.modality_dropouts.items():
            require(0.0 <= value < 1.0, f"modality_dropouts[{name!r}] must be in [0, 1), got {value}")

    @property
    def hiding(self) -> tuple[float, ...]:
        """Probability of hiding each of `modality_dims`.

        Raises:
            ValueError: `modality_dropouts` names a modality that is not there.
        """
        unknown = sorted(set(self.modality_dropouts) - set(self.modality_dims))
        require(
            not unknown, f"modality_dropouts: unknown modalities {unknown}, expected some of {list(self.modality_dims)}"
        )
        return tuple(self.modality_dropouts.get(name, self.modality_dropout) for name in self.modality_dims)


class RebuiltMultimodalIntegration(nn.Module):
    """Features of up to M modalities -> fused vector, two-class logits, regression in [0, 1], modality weights.

    Each modality becomes one token. Learned latents read the tokens through masked cross-attention; next to the
    modalities stands one learned "prior" token that is never masked, so a sample without any modality gets a defined
    answer. The adaptive weights w (softmax over the present modalities of a score of their token) form Σ w·token,
    which is added to what the latents found. A head per modality predicts the classes from that modality alone;
    `compute_multimodal_loss` makes them agree with the fusion.

    Args:
        config: a `FusionConfig` with `modality_dims`.
        **overrides: any of its fields.

    Raises:
        TypeError: an override is no field of `FusionConfig`.
        ValueError: sizes do not fit together or `modality_dims` is empty.
    """

    def __init__(self, config: FusionConfig | None = None, **overrides: Any) -> None:
        super().__init__()
        config = resolve_config(FusionConfig, config, overrides)
        require(bool(config.modality_dims), "modality_dims must name at least one modality")
        self.config = config
        self.hiding = config.hiding
        width = config.fusion_dim
        self.projections = nn.ModuleDict({name: nn.Linear(size, width) for name, size in config.modality_dims.items()})
        self.types = nn.Embedding(len(config.modality_dims), width)
        self.prior = nn.Parameter(0.02 * torch.randn(width))
        self.latents = nn.Parameter(0.02 * torch.randn(config.num_latents, width))
        self.token_norm = RMSNorm(width)
        self.layers = nn.ModuleList(CrossAttentionLayer(config) for _ in range(config.num_fusion_layers))
        if config.use_adaptive_weighting:
            self.score = nn.Linear(width, 1, bias=False)  # a softmax ignores a bias
        if config.use_modality_heads:
            self.modality_heads = nn.ModuleDict({name: nn.Linear(width, 2) for name in config.modality_dims})
        self.norm = RMSNorm(width)
        self.dropout = nn.Dropout(config.dropout)
        self.classification_head = nn.Linear(width, 2)
        self.regression_head = nn.Linear(width, 1)

    def forward(
        self,
        features: dict[str, torch.Tensor],
        present: dict[str, torch.Tensor] | None = None,
        familiarity: dict[str, torch.Tensor] | None = None,
    ) -> dict[str, torch.Tensor]:
        """Fuse.

        Args:
            features: [B, size] per modality; a modality without an entry is absent for all samples. At least one entry.
            present: bool [B] per modality; default True for every entry.
            familiarity: in evaluation, f [B] in [0, 1] per modality: how much it resembles what was trained on. The
                answer is f times that with the modality plus 1 − f times that without it; default 1.

        Returns:
            ``fused_features`` [B, fusion_dim], ``logits`` [B, 2], ``regression`` [B] in [0, 1], ``modality_weights``
            [B, M] (sum 1 over what is present, 0 for what is not), ``modality_logits`` [B, M, 2], ``present`` bool
            [B, M] as used.
        """
        tokens, mask = self._tokens(features, present or {})
        if self.training and max(self.hiding) > 0.0:
            mask = _drop_modalities(mask, self.hiding)
        tokens = self.token_norm(tokens)
        fused, weights = self._fuse(tokens, mask)
        answer = self._heads(fused)
        if not self.training:
            for name, known in (familiarity or {}).items():
                without = self._heads(self._fuse(tokens, self._without(mask, name))[0])
                answer = mean_answer(answer, without, known)
        outputs = {
            "fused_features": fused,
            "logits": answer[0],
            "regression": answer[1],
            "modality_weights": weights,
            "present": mask,
        }
        if self.config.use_modality_heads:
            heads = [head(tokens[:, index]) for index, head in enumerate(self.modality_heads.values())]
            outputs["modality_logits"] = torch.stack(heads, dim=1)
        return outputs

    def _fuse(self, tokens: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Fused vector [B, fusion_dim] and adaptive weights [B, M] from what `mask` [B, M] shows."""
        keys = torch.cat([tokens, self.prior.expand(tokens.shape[0], 1, -1)], dim=1)
        visible = F.pad(mask, (0, 1), value=True)
        latents = self.latents.expand(tokens.shape[0], -1, -1)
        for layer in self.layers:
            latents = layer(latents, keys, visible)
        weights = self._weights(tokens, mask)
        return self.norm(latents.mean(1) + torch.einsum("bm,bmc->bc", weights, tokens)), weights

    def _heads(self, fused: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Class logits [B, 2] and regression [B]."""
        return self.classification_head(self.dropout(fused)), self.regression_head(self.dropout(fused))[:, 0].sigmoid()

    def _without(self, mask: torch.Tensor, hidden: str) -> torch.Tensor:
        """`mask` without one modality, but as it was for a sample that would be left with nothing."""
        kept = mask & torch.tensor([name != hidden for name in self.config.modality_dims], device=mask.device)
        return torch.where(kept.any(1, keepdim=True), kept, mask)

    def _tokens(
        self, features: dict[str, torch.Tensor], present: dict[str, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens [B, M, fusion_dim] and presence [B, M]."""
        dims = self.config.modality_dims
        unknown = (set(features) | set(present)) - set(dims)
        require(not unknown, f"features: unknown modalities {sorted(unknown)}, expected some of {list(dims)}")
        require(len(features) > 0, "features must hold at least one modality")
        first = next(iter(features.values()))
        batch = first.shape[0]
        tokens, masks = [], []
        types = self.types(torch.arange(len(dims), device=first.device)).unbind()
        for kind, (name, size) in zip(types, dims.items()):
            token = kind.expand(batch, -1)
            mask = torch.zeros(batch, dtype=torch.bool, device=first.device)
            if name in features:
                check_axes(
                    f"features[{name!r}]", features[name], ("batch", "feature"), {"batch": batch, "feature": size}
                )
                mask = present.get(name, ~mask)
                check_axes(f"present[{name!r}]", mask, ("batch",), {"batch": batch})
                token = token + self.dropout(self.projections[name](features[name]))
            tokens.append(token)
            masks.append(mask)
        return torch.stack(tokens, dim=1), torch.stack(masks, dim=1)

    def _weights(self, tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Weights [B, M]: softmax over present modalities; all 0 if there is none."""
        if self.config.use_adaptive_weighting:
            scores = at_least_float32(self.score(tokens)[..., 0])
        else:
            scores = at_least_float32(tokens.new_zeros(mask.shape))
        weights = scores.masked_fill(~mask, torch.finfo(torch.float32).min).softmax(-1)
        return weights.masked_fill(~mask, 0.0).to(tokens.dtype)


class CrossAttentionLayer(nn.Module):
    """Pre-norm block: latents attend to the visible tokens, then SwiGLU.

    The key mask differs per sample and there are at most six keys, so PyTorch's attention serves here.
    """

    def __init__(self, config: FusionConfig) -> None:
        super().__init__()
        width = config.fusion_dim
        self.heads = config.num_attention_heads
        self.attention_norm = RMSNorm(width)
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, width, bias=False)
        self.v_proj = nn.Linear(width, width, bias=False)
        self.o_proj = nn.Linear(width, width, bias=False)
        self.mlp_norm = RMSNorm(width)
        self.mlp = SwiGLU(width, 2 * width)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, latents: torch.Tensor, keys: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
        """latents [B, L, C], keys [B, M, C], visible bool [B, M] -> [B, L, C]."""
        q, k, v = (
            projection(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for projection, x in (
                (self.q_proj, self.attention_norm(latents)),
                (self.k_proj, keys),
                (self.v_proj, keys),
            )
        )
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=visible[:, None, None, :])
        attended = self.dropout(self.o_proj(attended.transpose(1, 2).flatten(2)))
        normed, latents = self.mlp_norm(attended, latents)
        return latents + self.dropout(self.mlp(normed))


def mean_answer(
    one: tuple[torch.Tensor, torch.Tensor], other: tuple[torch.Tensor, torch.Tensor], weight: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(logits [B, 2], regression [B]) of weight · `one` + (1 − weight) · `other` in class probabilities and regression,
    for `weight` [B] in [0, 1]."""
    weight = at_least_float32(weight).clamp(1e-30, 1.0)
    logs = [at_least_float32(answer[0]).log_softmax(-1) for answer in (one, other)]
    shares = [weight.log()[:, None], (1.0 - weight).clamp(min=1e-30).log()[:, None]]
    logits = torch.stack([log + share for log, share in zip(logs, shares)]).logsumexp(0)
    regression = weight * one[1] + (1.0 - weight) * other[1]
    return logits.to(one[0].dtype), regression.to(one[1].dtype)


def _drop_modalities(mask: torch.Tensor, probabilities: Sequence[float]) -> torch.Tensor:
    """Hide each present modality with its probability; of a sample that would lose all, the one that was nearest to
    staying stays.
    """
    margin = torch.rand(mask.shape, device=mask.device) - torch.tensor(probabilities, device=mask.device)
    margin = margin.masked_fill(~mask, -torch.inf)
    best = margin == margin.max(dim=1, keepdim=True).values
    return mask & ((margin >= 0.0) | best)
