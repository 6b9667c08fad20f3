"""Predictions for a user's own files by a trained model: `python -m astrobiogen.predict`, `astrobiogen.load_model`."""

from astrobiogen.predict.model import TrainedModel, load_model
from astrobiogen.predict.rows import Prediction, Predictions

__all__ = ["Prediction", "Predictions", "TrainedModel", "load_model"]
