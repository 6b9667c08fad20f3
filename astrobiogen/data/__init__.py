"""Real data for "habitat x viability": climate cubes, metabolic networks, spectra, text and planet parameters, paired
and labelled.

>>> from astrobiogen import data
>>> bundle = data.load_bundled()
>>> batch = data.collate([bundle.train[i] for i in range(4)])

This is the read side; it needs the packages of `astrobiogen[train]`. What makes data sets (`python -m astrobiogen.data
build`) is `astrobiogen.datatools` and needs those of `astrobiogen[data]`; it is not imported here.
"""

from astrobiogen.system import extras

extras.require(__name__, "train", ("tokenizers", "torch_geometric"))

from astrobiogen.data import synthetic
from astrobiogen.data.baseline_features import baseline_features, summary_features
from astrobiogen.data.batches.batch import HabitatBatch, validate
from astrobiogen.data.batches.collate import MODALITIES, collate
from astrobiogen.data.batches.sampler import EpochSampler
from astrobiogen.data.climates.axes import from_canonical, to_canonical
from astrobiogen.data.controls import without_near_surface
from astrobiogen.data.corpus import load_corpus
from astrobiogen.data.dataset import DatasetBundle, HabitatDataset, Sample
from astrobiogen.data.errors import DataError
from astrobiogen.data.load import SAMPLE_FOLDER, load, load_bundled
from astrobiogen.data.spec import DataSpec
from astrobiogen.data.storage.identity import content_digest

__all__ = [
    "MODALITIES",
    "SAMPLE_FOLDER",
    "DataError",
    "DataSpec",
    "DatasetBundle",
    "EpochSampler",
    "HabitatBatch",
    "HabitatDataset",
    "Sample",
    "baseline_features",
    "collate",
    "content_digest",
    "from_canonical",
    "load",
    "load_bundled",
    "load_corpus",
    "summary_features",
    "synthetic",
    "to_canonical",
    "validate",
    "without_near_surface",
]
