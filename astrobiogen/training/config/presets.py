"""The training configurations that go with the presets of the model."""

import dataclasses

from astrobiogen.training.config.schema import (
    PRESETS,
    CheckpointConfig,
    DataConfig,
    DistributedConfig,
    EvaluationConfig,
    OptimizerConfig,
    PrecisionConfig,
    ScheduleConfig,
    StopConfig,
    TrainConfig,
)


def preset(name: str) -> TrainConfig:
    """The training configuration that goes with a model preset.

    `tiny` is chosen for two CPU cores and five minutes; `a5000` and larger keep the original system's 1 x 32
    accumulation, OneCycle shape (30 % up, start at a tenth, end at a thousandth), weight decay, patience and time
    limits.

    Raises:
        ValueError: unknown name.
    """
    if name == "tiny":
        return TrainConfig(
            preset="tiny",
            epochs=8,
            data=DataConfig(batch_size=16),
            optimizer=OptimizerConfig(learning_rate=2e-3, weight_decay=0.05, ema_decay=0.98),
            precision=PrecisionConfig(dtype="fp32"),
            checkpoint=CheckpointConfig(every_minutes=0.5),
            evaluation=EvaluationConfig(ablation_limit=400),
            stop=StopConfig(metric="last", target_accuracy=1.0, max_hours=1.0),
        )
    if name == "small":
        return TrainConfig(
            preset="small",
            epochs=30,
            data=DataConfig(batch_size=8, accumulation=2),
            optimizer=OptimizerConfig(learning_rate=1e-3, weight_decay=0.02),
            precision=PrecisionConfig(dtype="fp32"),
            checkpoint=CheckpointConfig(every_minutes=10.0),
            stop=StopConfig(metric="class_loss", patience=10, max_hours=24.0),
        )
    if name in ("a5000", "a5000x2", "original"):
        return TrainConfig(
            preset=name,
            epochs=200,
            data=DataConfig(batch_size=1, accumulation=32, block=0, workers=4),
            optimizer=OptimizerConfig(
                name="adamw8bit", learning_rate=1e-3 if name == "a5000" else 2e-4, weight_decay=1e-5
            ),
            schedule=ScheduleConfig(warmup_fraction=0.3),
            precision=PrecisionConfig(dtype="fp16"),
            checkpoint=CheckpointConfig(every_epochs=10, keep=5),
            distributed=DistributedConfig(strategy="ddp" if name == "a5000" else "fsdp2"),
        )
    raise ValueError(f"preset: got {name!r}, expected one of {', '.join(PRESETS)}")


def smoke(config: TrainConfig) -> TrainConfig:
    """`config` cut down to a check that everything runs: two epochs on a few samples."""
    return dataclasses.replace(
        config,
        epochs=min(config.epochs, 2),
        data=dataclasses.replace(
            config.data, limit=min(config.data.limit or 32, 32), batch_size=min(config.data.batch_size, 8)
        ),
        evaluation=dataclasses.replace(config.evaluation, bootstrap=min(config.evaluation.bootstrap, 200)),
    )
