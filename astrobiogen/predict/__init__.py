"""Predictions for a user's own files by a trained model: `python -m astrobiogen.predict`, `astrobiogen.load_model`."""

import importlib
import typing

from astrobiogen.system import extras

if typing.TYPE_CHECKING:
    from astrobiogen.predict.model import TrainedModel, load_model
    from astrobiogen.predict.rows import Prediction, Predictions

__all__ = ["Prediction", "Predictions", "TrainedModel", "load_model"]

_MODULES = {"Prediction": "rows", "Predictions": "rows", "TrainedModel": "model", "load_model": "model"}


def require_packages() -> None:
    """ModuleNotFoundError that names the extra unless what reads climates and networks is installed."""
    extras.require(__name__, "data", ("libsbml", "netCDF4", "xarray", "cf_xarray", "pint", "zarr"))


def __getattr__(name: str) -> typing.Any:
    """A public name, loaded on first use with the packages that it needs."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    require_packages()
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
