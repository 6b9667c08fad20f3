"""Configuration of the multi-modal model and of its loss."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from astrobiogen.models.common import require
from astrobiogen.models.datacube.config import DatacubeConfig
from astrobiogen.models.graph.vae import GraphVAEConfig
from astrobiogen.models.llm_config import LLMConfig
from astrobiogen.models.multimodal_integration import FusionConfig
from astrobiogen.models.original.names import SYSTEM_NAMES, takes_original_names
from astrobiogen.models.planet_encoder import PlanetParameterConfig
from astrobiogen.models.spectrum_encoder import SpectrumConfig

MODALITIES = ("climate", "graph", "spectrum", "text", "planet_params")
WEIGHTS = (
    "classification_weight",
    "regression_weight",
    "reconstruction_weight",
    "physics_weight",
    "consistency_weight",
    "llm_weight",
    "graph_weight",
)
PARTS: dict[str, type[Any]] = {
    "llm_config": LLMConfig,
    "graph_config": GraphVAEConfig,
    "cnn_config": DatacubeConfig,
    "fusion_config": FusionConfig,
    "spectrum_config": SpectrumConfig,
    "planet_config": PlanetParameterConfig,
}
# What the original's dictionaries leave open and its batch decides: one epoch, spectra of three columns.
ORIGINAL_SIZES: dict[str, dict[str, Any]] = {
    "cnn_config": {"grid": (12, 1, 10, 32, 64)},
    "spectrum_config": {"channels": 3},
}


def from_dictionaries(given: dict[str, Any]) -> dict[str, Any]:
    """`given` with each part that is a dictionary made, and each that is None left out. Where there is a dictionary,
    sizes that nobody names are those of the original's batch (`ORIGINAL_SIZES`).

    Raises:
        TypeError: a dictionary holds a name that is no field of its part.
    """
    kept: dict[str, Any] = {name: value for name, value in given.items() if value is not None or name not in PARTS}
    if not any(isinstance(kept.get(name), Mapping) for name in PARTS):
        return kept
    for name, sizes in ORIGINAL_SIZES.items():
        part = kept.setdefault(name, {})
        if isinstance(part, Mapping):
            kept[name] = sizes | dict(part)
    parts: dict[str, dict[str, Any]] = {name: {**kept[name]} for name in PARTS if isinstance(kept.get(name), Mapping)}
    return kept | {name: PARTS[name](**part) for name, part in parts.items()}


@takes_original_names(SYSTEM_NAMES, from_dictionaries)
@dataclasses.dataclass(frozen=True)
class MultiModalTrainingConfig:
    """Configuration of `UnifiedMultiModalSystem` and of `compute_multimodal_loss`.

    Attributes:
        llm_config, graph_config, cnn_config, fusion_config, spectrum_config, planet_config: of the parts, each also as
            a dictionary of its fields, as the original has it (see `from_dictionaries` and docs/migration.md).
            `modality_dims` of the language model and of the fusion are filled in by the system from the parts'
            feature sizes and must be empty here.
        modalities: which encoders exist, some of `MODALITIES`.
        use_network_summary: add `NetworkSummary` to the graph features. In evaluation, a metabolic network unlike those
            of the training set, which `remember_networks` takes in, then counts as hidden in the fusion, in proportion.
        summary_share: weight s of a second fusion, with weights of its own, that sees `ClimateStatistics` and
            `NetworkSummary` only: in evaluation the class probabilities and the regression are 1 − s times those of the
            whole fusion plus s times its; the same mean in the classification and regression losses. 0: there is none.
        text_share: share of a batch's samples, drawn anew each time, whose text is read in training (at least one); the
            others count as having none. A pair's text is the one input that no two samples share, so it costs most.
        label_smoothing: of the classification's target, in [0, 1).
        classification_weight, regression_weight, reconstruction_weight, physics_weight, consistency_weight, llm_weight,
            graph_weight: weights of the terms of the loss, >= 0.
        kernels: "auto" (the dispatcher's choice) or "reference" (plain PyTorch for every op).
    """

    llm_config: LLMConfig = dataclasses.field(default_factory=LLMConfig)
    graph_config: GraphVAEConfig = dataclasses.field(default_factory=GraphVAEConfig)
    cnn_config: DatacubeConfig = dataclasses.field(default_factory=DatacubeConfig)
    fusion_config: FusionConfig = dataclasses.field(default_factory=FusionConfig)
    spectrum_config: SpectrumConfig = dataclasses.field(default_factory=SpectrumConfig)
    planet_config: PlanetParameterConfig = dataclasses.field(default_factory=PlanetParameterConfig)
    modalities: tuple[str, ...] = MODALITIES
    use_network_summary: bool = False
    summary_share: float = 0.0
    text_share: float = 1.0
    label_smoothing: float = 0.0
    classification_weight: float = 1.0
    regression_weight: float = 0.5
    reconstruction_weight: float = 0.1
    physics_weight: float = 0.2
    consistency_weight: float = 0.15
    llm_weight: float = 0.3
    graph_weight: float = 0.2
    kernels: Literal["auto", "reference"] = "auto"

    def __post_init__(self) -> None:
        require(bool(self.modalities), "modalities must not be empty")
        for name in self.modalities:
            require(name in MODALITIES, f"modalities must be some of {MODALITIES}, got {name!r}")
        for name in WEIGHTS:
            require(getattr(self, name) >= 0.0, f"{name} must not be negative, got {getattr(self, name)}")
        require(self.kernels in ("auto", "reference"), f"kernels must be 'auto' or 'reference', got {self.kernels!r}")
        require(0.0 < self.text_share <= 1.0, f"text_share must be in (0, 1], got {self.text_share}")
        require(0.0 <= self.summary_share < 1.0, f"summary_share must be in [0, 1), got {self.summary_share}")
        require(0.0 <= self.label_smoothing < 1.0, f"label_smoothing must be in [0, 1), got {self.label_smoothing}")
        for name, kind in PARTS.items():
            part = getattr(self, name)
            if not isinstance(part, kind):
                raise TypeError(f"{name} must be a {kind.__name__} or a dictionary of its fields, got {part!r}")
        for name in ("llm_config", "fusion_config"):
            require(not getattr(self, name).modality_dims, f"{name}.modality_dims is set by the system; leave it empty")
