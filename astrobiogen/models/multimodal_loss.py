"""The one loss of the multi-modal model, in training and evaluation alike."""

from typing import Any

import torch
import torch.nn.functional as F

from astrobiogen.models.common import at_least_float32
from astrobiogen.models.system_config import MODALITIES, MultiModalTrainingConfig


def compute_multimodal_loss(
    outputs: dict[str, Any], batch: dict[str, Any], config: MultiModalTrainingConfig, annotations: None = None
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Weighted sum of seven terms, each a mean over the samples that have what it needs (0 if none has).

    * classification: cross-entropy of ``logits`` against ``habitability_label``, smoothed by ``label_smoothing``
    * regression: squared error of ``regression`` against ``habitability_fraction``; both terms are means over the two
      fusions where there are two (`summary_share`)
    * reconstruction: squared error of the decoded cube, in standard deviations
    * physics: violations of the decoded cube's water and energy budgets
    * consistency: KL(fused prediction || single-modality prediction), mean over a sample's modalities; the fused side
      is held fixed
    * llm: negative log-likelihood of the next token, mean over all tokens of the samples whose text is present
    * graph: reconstruction, KL divergence and balances of the graph autoencoder

    Args:
        outputs: of `UnifiedMultiModalSystem`.
        batch: what it was given, with ``habitability_label`` int64 [B] and, for the regression,
            ``habitability_fraction`` [B].
        config: holds the weights.
        annotations: an argument of the original's, which multiplies the whole loss by the mean quality of the samples;
            only None is taken: multiply the result.

    Returns:
        (loss, parts): a scalar to differentiate, and the seven unweighted terms plus ``total``, detached.

    Raises:
        TypeError: `annotations` are given.
        KeyError: the batch holds no ``habitability_label``.
    """
    if annotations is not None:
        raise TypeError("annotations are not read: multiply the loss by the mean quality of the batch yourself")
    present = dict(zip(MODALITIES, outputs["present"].unbind(1)))
    logits = at_least_float32(outputs["logits"])
    zero = logits.sum() * 0.0
    label = batch["habitability_label"]
    parts = {"classification": zero, "regression": zero}
    readings = _readings(outputs, config.summary_share)
    for weight, chosen, regression in readings:
        error = F.cross_entropy(at_least_float32(chosen), label, label_smoothing=config.label_smoothing)
        parts["classification"] = parts["classification"] + weight * error
        fraction = batch.get("habitability_fraction")
        if fraction is not None:
            error = F.mse_loss(at_least_float32(regression), fraction.to(at_least_float32(regression).dtype))
            parts["regression"] = parts["regression"] + weight * error
    cnn, graph, text = outputs["cnn_outputs"], outputs["graph_vae_outputs"], outputs["llm_outputs"]
    parts["reconstruction"] = _mean(cnn["reconstruction_loss"], present["climate"]) if cnn else zero
    parts["physics"] = _mean(cnn["physics_loss"], present["climate"]) if cnn else zero
    parts["consistency"] = _consistency(at_least_float32(readings[0][1]), outputs["fusion_outputs"])
    parts["llm"] = text.get("loss", zero)
    parts["graph"] = _mean(graph["loss_per_sample"], present["graph"]) if graph else zero
    total = zero
    for name, value in parts.items():
        total = total + getattr(config, f"{name}_weight") * value
    return total, {name: value.detach() for name, value in (parts | {"total": total}).items()}


def _readings(outputs: dict[str, Any], share: float) -> list[tuple[float, torch.Tensor, torch.Tensor]]:
    """(weight, logits, regression) of each fusion."""
    fusion = outputs["fusion_outputs"]
    if "second_logits" not in fusion:
        return [(1.0, outputs["logits"], outputs["regression"])]
    weights = {"first": 1.0 - share, "second": share}
    return [(weight, fusion[f"{which}_logits"], fusion[f"{which}_regression"]) for which, weight in weights.items()]


def _mean(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean of `values` [B] over `mask`; 0 where nothing is. Hidden entries may hold NaN."""
    kept = torch.where(mask, at_least_float32(values), 0.0)
    return kept.sum() / mask.sum().clamp(min=1)


def _consistency(logits: torch.Tensor, fusion: dict[str, torch.Tensor]) -> torch.Tensor:
    """KL(fused || modality) in nats, mean over the modalities of a sample, then over samples that have one."""
    target = logits.detach().log_softmax(-1)
    single = at_least_float32(fusion["modality_logits"]).log_softmax(-1)
    divergence = (target.exp()[:, None] * (target[:, None] - single)).sum(-1)
    mask = fusion["present"]
    per_sample = torch.where(mask, divergence, 0.0).sum(1) / mask.sum(1).clamp(min=1)
    return _mean(per_sample, mask.any(1))
