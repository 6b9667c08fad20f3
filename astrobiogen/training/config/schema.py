"""Configuration of a training run: frozen, typed, every value checked once with the name of its key.

Order of precedence: the preset's values, then `--config FILE.yaml`, then single options on the command line.
"""

import dataclasses
import math
from typing import Any, Literal

from astrobiogen.training.config.model import ModelChanges
from astrobiogen.training.config.watch import HangConfig, SpikeConfig

PRESETS = ("tiny", "small", "a5000", "a5000x2", "original")
PresetName = Literal["tiny", "small", "a5000", "a5000x2", "original"]


# More than any machine has processors; OpenMP breaks the process down when it cannot start as many as asked for.
MAX_THREADS = 1024
MAX_WORKERS = 1024
# What every generator that is seeded with it takes: NumPy's and scikit-learn's the least.
MAX_SEED = 2**32 - 1
# Of anything that is counted: products of several of them still fit into 64 bits and a float.
MAX_COUNT = 10**9


def _require(condition: bool, key: str, got: object, expected: str) -> None:
    if not condition:
        raise ValueError(f"{key}: got {got!r}, expected {expected}")


def _require_bounded(part: Any, inside: str) -> None:
    """Of every number below `part`: that it is one, and one to count, index and multiply with."""
    for field in dataclasses.fields(part):
        key, value = inside + field.name, getattr(part, field.name)
        if dataclasses.is_dataclass(value):
            _require_bounded(value, f"{key}.")
        for item in value if isinstance(value, tuple) else (value,):
            if isinstance(item, float):
                _require(math.isfinite(item), key, item, "a finite number")
            elif isinstance(item, int) and key != "seed":
                _require(abs(item) <= MAX_COUNT, key, item, f"at most {MAX_COUNT}")


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Where the samples come from and how they are grouped."""

    path: str = ""
    """Folder of a data set built by `python -m astrobiogen.data build`; empty: the data bundled with the package."""
    batch_size: int = 8
    """Samples per micro-batch."""
    accumulation: int = 1
    """Micro-batches per optimizer update; gradients are weighted by samples over the whole window."""
    block: int = 5
    """Batches are cut from blocks of this many climates times as many organisms, and each distinct climate and graph of
    a batch is encoded once, which saves most of the work on a CPU; 0: random batches in the order of
    `data.EpochSampler`, nothing shared.
    """
    limit: int = 0
    """Use only the first N samples of every split; 0 uses all."""
    roll_longitude: bool = False
    """Turn each climate cube of a training batch by a random longitude, which changes no label and no budget."""
    workers: int = 0
    """Processes that prepare batches beside the training process; 0 prepares them in it. The order does not depend on
    it."""

    def __post_init__(self) -> None:
        _require(self.batch_size >= 1, "data.batch_size", self.batch_size, "at least 1")
        _require(self.accumulation >= 1, "data.accumulation", self.accumulation, "at least 1")
        _require(self.block >= 0, "data.block", self.block, "0 (random batches) or more")
        _require(self.limit >= 0, "data.limit", self.limit, "0 (no limit) or more")
        _require(0 <= self.workers <= MAX_WORKERS, "data.workers", self.workers, f"0 to {MAX_WORKERS}")


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """The update rule."""

    name: Literal["adamw", "adamw8bit", "paged_adamw8bit"] = "adamw"
    """`adamw` is PyTorch's; the 8-bit ones need bitsandbytes >= 0.50 (extra `bnb`)."""
    learning_rate: float = 1e-3
    """Peak learning rate."""
    weight_decay: float = 1e-2
    """Decoupled weight decay; biases, norm weights and every other tensor with fewer than two axes get none."""
    beta1: float = 0.9
    """Decay of the gradient's running mean."""
    beta2: float = 0.999
    """Decay of the squared gradient's running mean."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    clip_norm: float = 1.0
    """Largest global gradient norm; 0 switches clipping off (the norm is logged either way)."""
    ema_decay: float = 0.0
    """Decay of the averaged weights that validation and the final test use; 0 switches averaging off."""

    def __post_init__(self) -> None:
        _require(self.learning_rate > 0, "optimizer.learning_rate", self.learning_rate, "more than 0")
        _require(self.weight_decay >= 0, "optimizer.weight_decay", self.weight_decay, "0 or more")
        _require(0 <= self.beta1 < 1, "optimizer.beta1", self.beta1, "0 <= beta1 < 1")
        _require(0 <= self.beta2 < 1, "optimizer.beta2", self.beta2, "0 <= beta2 < 1")
        _require(self.eps > 0, "optimizer.eps", self.eps, "more than 0")
        _require(self.clip_norm >= 0, "optimizer.clip_norm", self.clip_norm, "0 or more")
        _require(0 <= self.ema_decay < 1, "optimizer.ema_decay", self.ema_decay, "0 <= ema_decay < 1")


@dataclasses.dataclass(frozen=True)
class ScheduleConfig:
    """Learning rate (and, only if asked for, momentum) as a function of the number of real updates."""

    name: Literal["constant", "cosine", "onecycle"] = "onecycle"
    """`onecycle`: cosine up, cosine down (torch's OneCycleLR); `cosine`: linear warm-up, cosine down; `constant`."""
    warmup_fraction: float = 0.1
    """Share of all updates spent on the way up."""
    start_division: float = 10.0
    """The rate starts at the peak divided by this."""
    final_division: float = 100.0
    """The rate ends at its start value divided by this."""
    cycle_momentum: bool = False
    """Let `onecycle` replace beta1, as torch's OneCycleLR does unasked; off: beta1 stays what the optimizer says."""
    base_momentum: float = 0.85
    """beta1 at the peak rate if `cycle_momentum`."""
    max_momentum: float = 0.95
    """beta1 at both ends if `cycle_momentum`."""

    def __post_init__(self) -> None:
        _require(0 <= self.warmup_fraction < 1, "schedule.warmup_fraction", self.warmup_fraction, "0 <= fraction < 1")
        _require(self.start_division >= 1, "schedule.start_division", self.start_division, "at least 1")
        _require(self.final_division >= 1, "schedule.final_division", self.final_division, "at least 1")
        _require(0 <= self.base_momentum < 1, "schedule.base_momentum", self.base_momentum, "0 <= momentum < 1")
        _require(0 <= self.max_momentum < 1, "schedule.max_momentum", self.max_momentum, "0 <= momentum < 1")


@dataclasses.dataclass(frozen=True)
class PrecisionConfig:
    """Number format of the forward pass; weights, gradients and their sums are always fp32."""

    dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """`auto`: fp16 on sm_86 GPUs, bf16 on others that have it, else fp16; on a CPU bf16 if its matrix products measure
    at least 1.5 times as fast as fp32's, else fp32. The choice is printed and kept when the run is resumed.
    """
    initial_scale: float = 65536.0
    """First loss scale (fp16 only)."""
    growth_interval: int = 2000
    """Good updates in a row before the loss scale doubles (fp16 only)."""
    min_scale: float = 1.0
    """Floor of the loss scale: below it gradients of 0 would be divided by 0 (fp16 only)."""
    hysteresis: int = 2
    """Overflows before the loss scale halves (fp16 only)."""
    skip_budget: int = 20
    """Updates that may be skipped for NaN or Inf, in a row and in the whole run, before the run stops with a report.
    In the whole run 1 in 100 of the updates taken may be beside these, and overflows that only lower the loss scale of
    fp16 do not count.
    """

    def __post_init__(self) -> None:
        _require(self.min_scale >= 1.0, "precision.min_scale", self.min_scale, "at least 1.0")
        _require(
            self.initial_scale >= self.min_scale, "precision.initial_scale", self.initial_scale, "at least min_scale"
        )
        _require(self.growth_interval >= 1, "precision.growth_interval", self.growth_interval, "at least 1")
        _require(self.hysteresis >= 1, "precision.hysteresis", self.hysteresis, "at least 1")
        _require(self.skip_budget >= 0, "precision.skip_budget", self.skip_budget, "0 or more")


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """When work is saved and how much of it is kept."""

    every_epochs: int = 1
    """Save after every N epochs; 0: only by time, at the end and on a signal."""
    every_minutes: float = 120.0
    """Save when this much time has passed since the last save, also inside an epoch; 0 switches it off."""
    asynchronous: bool = False
    """Copy the state to host memory and write it in a thread while training goes on; takes host memory of the size of a
    checkpoint. The best model is always written at once.
    """
    keep: int = 3
    """Verified checkpoints to keep besides the best one; at least 2, so that a corrupt newest one has a fallback."""

    def __post_init__(self) -> None:
        _require(self.every_epochs >= 0, "checkpoint.every_epochs", self.every_epochs, "0 or more")
        _require(self.every_minutes >= 0, "checkpoint.every_minutes", self.every_minutes, "0 or more")
        _require(self.keep >= 2, "checkpoint.keep", self.keep, "at least 2")


@dataclasses.dataclass(frozen=True)
class StopConfig:
    """When training ends before the last epoch."""

    metric: Literal["loss", "class_loss", "auroc", "accuracy", "last"] = "loss"
    """Validation figure that chooses the best model and counts for patience: total loss, cross-entropy, AUROC or
    accuracy; `last`: none does, the newest model is taken and patience never ends the run. For a number of epochs fixed
    beforehand, where the validation set is too small to choose by.
    """
    patience: int = 20
    """Epochs without a better validation figure; 0 switches early stopping off."""
    min_delta: float = 0.0
    """Patience takes a figure for better only if it is by more than this; the best model is the best all the same."""
    target_accuracy: float = 0.96
    """Stop when the lower end of the validation accuracy's 95 % Wilson interval passes this; 1 switches it off."""
    max_hours: float = 672.0
    """Wall-clock time of training over all resumed parts, checked at every micro-batch."""

    def __post_init__(self) -> None:
        _require(self.patience >= 0, "stop.patience", self.patience, "0 or more")
        _require(0 <= self.min_delta < math.inf, "stop.min_delta", self.min_delta, "0 or more")
        _require(0 < self.target_accuracy <= 1, "stop.target_accuracy", self.target_accuracy, "0 < accuracy <= 1")
        _require(self.max_hours > 0, "stop.max_hours", self.max_hours, "more than 0")


@dataclasses.dataclass(frozen=True)
class MonitorConfig:
    """What is shown and recorded while training."""

    progress: Literal["auto", "rich", "plain"] = "auto"
    """`rich`: a live progress bar; `plain`: log lines; `auto`: rich on a terminal, else plain."""
    log_every: int = 10
    """Updates between two log lines of plain progress; log.jsonl records every update."""
    level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"
    """Lowest level written to the console and to train.log."""
    tensorboard: bool = False
    """Also write TensorBoard events to <run>/tensorboard (extra `tensorboard`: tensorboardX)."""
    wandb: Literal["off", "offline", "online"] = "off"
    """Also write a Weights & Biases run to <run>/wandb (extra `wandb`); `offline` needs neither network nor key."""
    trackio: bool = False
    """Also write a trackio run, kept on this machine (extra `trackio`)."""
    project: str = "astrobiogen"
    """Project under which W&B and trackio file the run."""
    gpu_seconds: float = 30.0
    """Seconds between two readings of utilisation, memory, power and temperature of every GPU (extra `gpu`:
    nvidia-ml-py); 0 switches them off."""
    log_file: str = ""
    """File for the log lines; empty: <run>/train.log."""

    def __post_init__(self) -> None:
        _require(self.gpu_seconds >= 0, "monitor.gpu_seconds", self.gpu_seconds, "0 (off) or more")
        _require(self.log_every >= 1, "monitor.log_every", self.log_every, "at least 1")


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
    """What is computed on the test set after training."""

    batch_size: int = 96
    """Samples per batch without gradients."""
    bootstrap: int = 1000
    """Replicates of the bootstrap over planets and organisms; 0 leaves intervals out."""
    baselines: bool = True
    """Fit the scikit-learn baselines beside the model."""
    ablation: bool = True
    """Evaluate once more with each modality masked."""
    ablation_limit: int = 0
    """Use only this many test samples, spread evenly, for the ablation; 0: all."""

    def __post_init__(self) -> None:
        _require(self.batch_size >= 1, "evaluation.batch_size", self.batch_size, "at least 1")
        _require(self.bootstrap >= 0, "evaluation.bootstrap", self.bootstrap, "0 or more")
        _require(self.ablation_limit >= 0, "evaluation.ablation_limit", self.ablation_limit, "0 (all) or more")


@dataclasses.dataclass(frozen=True)
class RuntimeConfig:
    """The machine."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto`: cuda if there is one."""
    threads: int = 0
    """CPU threads of PyTorch; 0 leaves PyTorch's choice. Bitwise repeatability holds for one and the same number."""
    deterministic: bool = True
    """Refuse operations that are not deterministic; off is faster on some GPUs."""
    malloc: Literal["keep_pages", "system"] = "keep_pages"
    """`keep_pages`: glibc keeps freed blocks instead of unmapping them (see docs/reliability.md); `system`:
    untouched.
    """
    kernels: Literal["auto", "reference"] = "auto"
    """`auto`: the library's kernels; `reference`: plain PyTorch."""
    preempted_status: int = 75
    """Exit status of a run that a signal has stopped, with a checkpoint to go on from; 75 is EX_TEMPFAIL of sysexits.h:
    try again later. Under torchrun it is 0 whatever is set here, and the file PREEMPTED in the run folder tells."""

    def __post_init__(self) -> None:
        _require(0 <= self.threads <= MAX_THREADS, "runtime.threads", self.threads, f"0 to {MAX_THREADS}")
        _require(0 <= self.preempted_status <= 255, "runtime.preempted_status", self.preempted_status, "0 to 255")


@dataclasses.dataclass(frozen=True)
class DistributedConfig:
    """Several processes, started by torchrun; without effect on one. What makes an update (data.batch_size x
    data.accumulation samples) does not depend on their number.
    """

    strategy: Literal["ddp", "fsdp2"] = "ddp"
    """`ddp`: every process holds the whole model; `fsdp2`: parameters, gradients and optimizer state are sharded."""
    cpu_offload: bool = False
    """fsdp2: keep the shards in host memory and update them there."""
    reshard_after_forward: bool = True
    """fsdp2: free a block's whole parameters between its forward and its backward pass; off: faster, needs more
    memory."""
    reduce_every_round: bool = True
    """fsdp2: sum gradients over processes after each micro-batch, which keeps only shards of them; off: once per
    update, which needs memory for whole gradients. (ddp always sums once per update.)
    """
    timeout_minutes: float = 10.0
    """An exchange between processes that takes longer ends the run with an error."""

    def __post_init__(self) -> None:
        _require(self.timeout_minutes > 0, "distributed.timeout_minutes", self.timeout_minutes, "more than 0")


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """One training run."""

    preset: PresetName = "tiny"
    """Size of the model, and the defaults of everything below that fit it."""
    seed: int = 0
    """Seed of weights, data order, dropout and bootstrap; a run on a CPU is repeatable to the bit."""
    epochs: int = 20
    """Passes over the training set; the schedule is laid out over all of them."""
    model: ModelChanges = dataclasses.field(default_factory=ModelChanges)
    """Changes to the preset's model, null: none: `--model.classification_weight 2`, `--model.cnn_config.depth 3`."""
    data: DataConfig = DataConfig()
    """Samples and batches."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """Update rule."""
    schedule: ScheduleConfig = ScheduleConfig()
    """Learning rate over time."""
    precision: PrecisionConfig = PrecisionConfig()
    """Number formats."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """Saving."""
    stop: StopConfig = StopConfig()
    """Early end."""
    monitor: MonitorConfig = MonitorConfig()
    """Progress and logs."""
    evaluation: EvaluationConfig = EvaluationConfig()
    """Final test."""
    runtime: RuntimeConfig = RuntimeConfig()
    """Machine."""
    distributed: DistributedConfig = DistributedConfig()
    """Several processes."""
    hang: HangConfig = dataclasses.field(default_factory=HangConfig)
    """Time limits."""
    spike: SpikeConfig = dataclasses.field(default_factory=SpikeConfig)
    """Faults of the hardware."""

    def __post_init__(self) -> None:
        _require(0 <= self.seed <= MAX_SEED, "seed", self.seed, f"0 to {MAX_SEED}")
        _require(self.epochs >= 1, "epochs", self.epochs, "at least 1")
        _require_bounded(self, "")
