"""The original system's batch as one of ours, and the sizes that it decides."""

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from astrobiogen.models.batch_keys import batch_size, check_keys
from astrobiogen.models.common import check_axes, require
from astrobiogen.models.datacube.cnn import CUBE_AXES, cube_from_legacy
from astrobiogen.models.datacube.config import AXES, DatacubeConfig
from astrobiogen.models.system_config import MultiModalTrainingConfig

ORIGINAL_KEYS = (
    "run_ids", "planet_params", "climate_datacube", "metabolic_graph", "spectroscopy", "text_description",
    "habitability_label", "metadata", "input_ids", "attention_mask", "labels", "data_completeness", "quality_scores",
)  # fmt: skip
NEVER_FILLED = ("data_completeness", "quality_scores")  # the original's loader gives None
TENSORS = (
    "run_ids", "planet_params", "climate_datacube", "spectroscopy", "habitability_label", "input_ids",
    "attention_mask", "labels",
)  # fmt: skip
PHYSICAL = 10.0  # a standardised quantity has no mean this far from 0


def from_original(
    batch: Mapping[str, Any],
    tokenizer: Any = None,
    *,
    max_length: int = 512,
    wavelengths: torch.Tensor | None = None,
) -> dict[str, Any]:
    """The original system's batch as `UnifiedMultiModalSystem` takes it; values are kept, nothing is made up.

    * ``climate_datacube`` [B, V, month, lat, lon, lev] becomes [B, V, month, 1, lev, lat, lon]; one with the seven axes
      of the original's documents stays. An epoch that is zero everywhere counts as absent (``climate_mask``).
    * ``spectroscopy`` [B, W, C] keeps its columns, the first of which is the wavelength; points that are not finite
      are masked. ``planet_params`` [B, P] likewise.
    * ``text_description`` becomes ``input_ids``, padded on the right, ``attention_mask`` and ``labels``, unless the
      batch brings ``input_ids``; None is an absent text.
    * ``metabolic_graph`` stays; without ``stoichiometry`` it has no biochemical constraints (`graph_tensors`).

    Args:
        batch: with some of the original's keys; an entry that is None counts as left out.
        tokenizer: of transformers (called with a list of texts) or of tokenizers (`encode_batch`).
        max_length: longest text in tokens; longer ones are cut.
        wavelengths: float [W] in micrometres, in place of the first column of ``spectroscopy``.

    Raises:
        ValueError: an unknown key, a wrong number of axes, or a text without a tokenizer.
        TypeError: a tensor was expected.
    """
    check_keys(batch, ORIGINAL_KEYS)
    given = {key: value for key, value in batch.items() if value is not None}
    for key in NEVER_FILLED:
        require(key not in given, f"{key}: nothing reads it; weigh the samples' loss yourself and leave it out")
    for key in TENSORS:
        if key in given and not isinstance(given[key], torch.Tensor):
            raise TypeError(f"{key} must be a tensor, got {type(given[key]).__name__}")
    texts = given.get("text_description")
    if isinstance(texts, str):
        raise TypeError("text_description must be a list of texts, one per sample, got a single str")
    size = len(texts) if texts is not None else batch_size(given)
    made = {key: value for key, value in given.items() if key not in ("climate_datacube", "spectroscopy")}
    made.setdefault("run_ids", torch.arange(size))
    if "climate_datacube" in given:
        made |= _climate(given["climate_datacube"])
    if "spectroscopy" in given:
        made |= _spectrum(given["spectroscopy"], wavelengths)
    if "planet_params" in given:
        made |= _planet(given["planet_params"])
    if "input_ids" in given or texts is not None:
        made |= _text(given, texts, tokenizer, max_length)
    return made


def config_from_original(batch: Mapping[str, Any], **given: Any) -> MultiModalTrainingConfig:
    """A configuration with the sizes of a batch of `from_original`: the grid of its cube (with the default patches, or
    their common divisors with the grid), columns of its spectra, planet parameters, node features.

    Args:
        batch: as `from_original` returns it.
        **given: arguments of `MultiModalTrainingConfig`, parts as dictionaries; what they name goes before the batch.
    """
    sizes: dict[str, dict[str, Any]] = {"llm_config": {}}
    if "climate_datacube" in batch:
        sizes["cnn_config"] = _cube_sizes(batch["climate_datacube"])
    if "spectroscopy" in batch:
        sizes["spectrum_config"] = {"channels": batch["spectroscopy"].shape[-1]}
    if "planet_params" in batch:
        sizes["planet_config"] = {"n_parameters": batch["planet_params"].shape[-1]}
    if "metabolic_graph" in batch:
        sizes["graph_config"] = {"node_features": batch["metabolic_graph"].x.shape[-1]}
    for name, part in sizes.items():
        asked = given.get(name)
        if asked is None or isinstance(asked, Mapping):
            given[name] = part | dict(asked or {})
    return MultiModalTrainingConfig(**given)


def _cube_sizes(cube: torch.Tensor) -> dict[str, Any]:
    """Fields of `DatacubeConfig` that follow from a cube of seven axes."""
    variables, grid, default = cube.shape[1], tuple(cube.shape[2:]), DatacubeConfig()
    patch = tuple(math.gcd(size, step) for size, step in zip(grid, default.patch_size))
    stem = [size // step for size, step in zip(grid, patch)]
    tokens = tuple(math.gcd(size, step) for size, step in zip(stem, default.vit_patch_size))
    sizes = {"grid": grid, "patch_size": patch, "vit_patch_size": tokens}
    return sizes | {"input_variables": variables, "output_variables": variables}


def _climate(cube: torch.Tensor) -> dict[str, torch.Tensor]:
    """Cube with seven axes, and which epochs hold anything."""
    if cube.dim() != len(CUBE_AXES):
        names = ("batch", "variable", "climate_time", "lat", "lon", "lev")
        check_axes("climate_datacube", cube, names)
        cube = cube_from_legacy(cube).contiguous()
    require(bool(cube.isfinite().all()), "climate_datacube holds values that are NaN or infinite")
    means = cube.mean([axis for axis in range(cube.dim()) if axis != 1])
    remedy = "standardise it, and put mean and deviation in cube_mean and cube_std"
    _warn_of_units(f"climate_datacube: variable {int(means.abs().argmax())}", float(means.abs().max()), remedy)
    axes = [axis for axis, name in enumerate(CUBE_AXES) if name not in ("batch", AXES[1])]
    return {"climate_datacube": cube, "climate_mask": (cube != 0).sum(axes) > 0}


def _spectrum(spectrum: torch.Tensor, wavelengths: torch.Tensor | None) -> dict[str, torch.Tensor]:
    """Spectrum with its wavelengths in column 0, and which points hold a value."""
    check_axes("spectroscopy", spectrum, ("batch", "wavelength", "channel"))
    if wavelengths is not None:
        check_axes("wavelengths", wavelengths, ("wavelength",), {"wavelength": spectrum.shape[1]})
        first = wavelengths.to(spectrum).expand(spectrum.shape[:2])
        spectrum = torch.cat([first[..., None], spectrum[..., 1:]], dim=-1)
    mask = spectrum.isfinite().all(-1)
    spectrum = spectrum.masked_fill(~mask[..., None], 0.0)
    if bool((spectrum[..., 0] <= 0.0)[mask].any()):
        warnings.warn(
            "spectroscopy: column 0 is read as the wavelength in micrometres and holds values that are not positive; "
            "give wavelengths=",
            stacklevel=3,
        )
    return {"spectroscopy": spectrum, "spectroscopy_mask": mask}


def _planet(parameters: torch.Tensor) -> dict[str, torch.Tensor]:
    """Parameters and which are known."""
    check_axes("planet_params", parameters, ("batch", "parameter"))
    mask = parameters.isfinite()
    parameters = parameters.masked_fill(~mask, 0.0)
    size = float(parameters.abs().sum() / mask.sum().clamp(min=1))
    _warn_of_units("planet_params", size, "take off the training set's mean, and divide by its deviation")
    return {"planet_params": parameters, "planet_params_mask": mask}


def _text(
    given: Mapping[str, Any], texts: Sequence[str | None] | None, tokenizer: Any, max_length: int
) -> dict[str, torch.Tensor]:
    """Token numbers padded on the right, which are real, and the targets."""
    if "input_ids" in given:
        ids = given["input_ids"]
        mask = given["attention_mask"].bool() if "attention_mask" in given else torch.ones_like(ids, dtype=torch.bool)
    else:
        require(tokenizer is not None, "text_description needs a tokenizer: from_original(batch, tokenizer)")
        rows = [row[:max_length] for row in _numbers(texts or (), tokenizer)]
        ids = torch.zeros(len(rows), max(1, *(len(row) for row in rows)), dtype=torch.long)
        mask = torch.zeros_like(ids, dtype=torch.bool)
        for place, row in enumerate(rows):
            ids[place, : len(row)] = torch.tensor(row, dtype=torch.long)
            mask[place, : len(row)] = True
    labels = given["labels"] if "labels" in given else ids.masked_fill(~mask, -100)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def _numbers(texts: Sequence[str | None], tokenizer: Any) -> list[list[int]]:
    """Token numbers of each text; none for an absent one."""
    words = [text or "" for text in texts]
    call: Callable[[list[str]], Any] | None = tokenizer if callable(tokenizer) else None
    if call is not None:
        rows = [list(row) for row in call(words)["input_ids"]]
    elif hasattr(tokenizer, "encode_batch"):
        rows = [list(row.ids) for row in tokenizer.encode_batch(words)]
    else:
        raise TypeError(f"tokenizer must be one of transformers or tokenizers, got {type(tokenizer).__name__}")
    return [row if text else [] for text, row in zip(texts, rows)]


def _warn_of_units(name: str, mean: float, remedy: str) -> None:
    if mean > PHYSICAL:
        warnings.warn(f"{name} has values of {mean:.4g}: the models take standardised ones; {remedy}", stacklevel=4)
