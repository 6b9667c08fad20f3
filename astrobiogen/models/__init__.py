"""Language model, graph autoencoder, datacube network, two small encoders, their fusion, and the whole system."""

from astrobiogen.models import presets
from astrobiogen.models.common import CountsUpdates
from astrobiogen.models.datacube.cnn import RebuiltDatacubeCNN, cube_from_legacy
from astrobiogen.models.datacube.config import DatacubeConfig
from astrobiogen.models.datacube.physics import AtmosphereBudgets
from astrobiogen.models.graph.vae import GraphVAEConfig, RebuiltGraphVAE
from astrobiogen.models.llm_config import LLMConfig
from astrobiogen.models.llm_integration import RebuiltLLMIntegration
from astrobiogen.models.multimodal_integration import FusionConfig, RebuiltMultimodalIntegration
from astrobiogen.models.multimodal_loss import compute_multimodal_loss
from astrobiogen.models.original.batch import config_from_original, from_original
from astrobiogen.models.planet_encoder import PlanetParameterConfig, PlanetParameterEncoder
from astrobiogen.models.spectrum_encoder import SpectrumConfig, SpectrumEncoder
from astrobiogen.models.system_config import MODALITIES, MultiModalTrainingConfig
from astrobiogen.models.unified_system import UnifiedMultiModalSystem

RebuiltMultiModalIntegration = RebuiltMultimodalIntegration  # the original exports both spellings

__all__ = [
    "MODALITIES",
    "AtmosphereBudgets",
    "CountsUpdates",
    "DatacubeConfig",
    "FusionConfig",
    "GraphVAEConfig",
    "LLMConfig",
    "MultiModalTrainingConfig",
    "PlanetParameterConfig",
    "PlanetParameterEncoder",
    "RebuiltDatacubeCNN",
    "RebuiltGraphVAE",
    "RebuiltLLMIntegration",
    "RebuiltMultiModalIntegration",
    "RebuiltMultimodalIntegration",
    "SpectrumConfig",
    "SpectrumEncoder",
    "UnifiedMultiModalSystem",
    "compute_multimodal_loss",
    "config_from_original",
    "cube_from_legacy",
    "from_original",
    "presets",
]
