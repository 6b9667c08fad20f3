"""The trainer: configuration, loop, checkpoints, precision, metrics and reports."""

from astrobiogen.system import extras

extras.require(
    __name__,
    "train",
    ("jsonargparse", "matplotlib", "rich", "safetensors", "scipy", "sklearn", "tokenizers", "torch_geometric", "yaml"),
)
