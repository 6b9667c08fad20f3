"""Figures of a model: in validation, at the end, and against others."""

from astrobiogen.training.evaluation.passes import MODALITIES, Evaluation, evaluate, frozen, mask_modality, untouched
from astrobiogen.training.types import LossFunction

__all__ = ["MODALITIES", "Evaluation", "LossFunction", "evaluate", "frozen", "mask_modality", "untouched"]
