"""What a run is: its configuration, the command line it comes from, and the folder it is written in."""

from astrobiogen.training.config.presets import preset, smoke
from astrobiogen.training.config.schema import (
    MAX_SEED,
    MAX_THREADS,
    MAX_WORKERS,
    PRESETS,
    CheckpointConfig,
    DataConfig,
    DistributedConfig,
    EvaluationConfig,
    MonitorConfig,
    OptimizerConfig,
    PrecisionConfig,
    PresetName,
    RuntimeConfig,
    ScheduleConfig,
    StopConfig,
    TrainConfig,
)
from astrobiogen.training.config.watch import HangConfig, SpikeConfig

__all__ = [
    "MAX_SEED",
    "MAX_THREADS",
    "MAX_WORKERS",
    "PRESETS",
    "CheckpointConfig",
    "DataConfig",
    "DistributedConfig",
    "EvaluationConfig",
    "HangConfig",
    "MonitorConfig",
    "OptimizerConfig",
    "PrecisionConfig",
    "PresetName",
    "RuntimeConfig",
    "ScheduleConfig",
    "SpikeConfig",
    "StopConfig",
    "TrainConfig",
    "preset",
    "smoke",
]
