"""Language model, graph autoencoder, datacube network, two small encoders, their fusion, and the whole system."""

from astrobiogen.models import presets as presets
from astrobiogen.models._common import CountsUpdates as CountsUpdates
from astrobiogen.models.datacube_cnn import RebuiltDatacubeCNN as RebuiltDatacubeCNN
from astrobiogen.models.datacube_cnn import cube_from_legacy as cube_from_legacy
from astrobiogen.models.datacube_config import DatacubeConfig as DatacubeConfig
from astrobiogen.models.graph_vae import GraphVAEConfig as GraphVAEConfig
from astrobiogen.models.graph_vae import RebuiltGraphVAE as RebuiltGraphVAE
from astrobiogen.models.llm_config import LLMConfig as LLMConfig
from astrobiogen.models.llm_integration import RebuiltLLMIntegration as RebuiltLLMIntegration
from astrobiogen.models.multimodal_integration import FusionConfig as FusionConfig
from astrobiogen.models.multimodal_integration import RebuiltMultimodalIntegration as RebuiltMultimodalIntegration
from astrobiogen.models.multimodal_loss import compute_multimodal_loss as compute_multimodal_loss
from astrobiogen.models.physics import AtmosphereBudgets as AtmosphereBudgets
from astrobiogen.models.planet_encoder import PlanetParameterConfig as PlanetParameterConfig
from astrobiogen.models.planet_encoder import PlanetParameterEncoder as PlanetParameterEncoder
from astrobiogen.models.spectrum_encoder import SpectrumConfig as SpectrumConfig
from astrobiogen.models.spectrum_encoder import SpectrumEncoder as SpectrumEncoder
from astrobiogen.models.unified_system import MODALITIES as MODALITIES
from astrobiogen.models.unified_system import MultiModalTrainingConfig as MultiModalTrainingConfig
from astrobiogen.models.unified_system import UnifiedMultiModalSystem as UnifiedMultiModalSystem

__all__ = [
    "MODALITIES",
    "AtmosphereBudgets",
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
    "RebuiltMultimodalIntegration",
    "SpectrumConfig",
    "SpectrumEncoder",
    "UnifiedMultiModalSystem",
    "compute_multimodal_loss",
    "cube_from_legacy",
    "presets",
]
