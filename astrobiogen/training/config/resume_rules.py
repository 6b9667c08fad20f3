"""What a run may change when it is resumed, and what its processes may have different: every key of the configuration
is in exactly one of the three groups, with the reason.
"""

# No bit of the weights depends on these.
FREE = {
    "data.path": "the data are compared by their content",
    "data.workers": "batches come in the same order",
    "precision.skip_budget": "says when a run gives up, not what it does until then",
    "checkpoint.every_epochs": "when work is saved",
    "checkpoint.every_minutes": "when work is saved",
    "checkpoint.keep": "how much of it is kept",
    "stop.patience": "when training ends",
    "stop.min_delta": "when training ends",
    "stop.target_accuracy": "when training ends",
    "stop.max_hours": "when training ends",
    "monitor.progress": "what is shown",
    "monitor.log_every": "what is shown",
    "monitor.level": "what is shown",
    "monitor.tensorboard": "what is recorded",
    "monitor.wandb": "what is recorded",
    "monitor.trackio": "what is recorded",
    "monitor.project": "what is recorded",
    "monitor.gpu_seconds": "what is recorded",
    "monitor.log_file": "where it is recorded",
    "evaluation.bootstrap": "of the closing examination",
    "evaluation.baselines": "of the closing examination",
    "evaluation.ablation": "of the closing examination",
    "evaluation.ablation_limit": "of the closing examination",
    "runtime.malloc": "where memory comes from",
    "distributed.timeout_minutes": "when a run gives up",
    "hang.setup_minutes": "when a run gives up",
    "hang.data_minutes": "when a run gives up",
    "hang.step_minutes": "when a run gives up",
    "hang.validation_minutes": "when a run gives up",
    "hang.save_minutes": "when a run gives up",
    "hang.examination_minutes": "when a run gives up",
    "spike.rerun": "a second look at an update leaves its result as it was",
    "spike.factor": "a second look at an update leaves its result as it was",
    "spike.window": "a second look at an update leaves its result as it was",
    "runtime.preempted_status": "what a scheduler is told",
    "checkpoint.asynchronous": "how work is saved",
}
# The same training up to the rounding of sums that are taken in another order; it is said when they change.
ROUNDING = {
    "evaluation.batch_size": "the validation figures are sums over batches",
    "runtime.device": "another device rounds otherwise",
    "runtime.threads": "sums are split over threads",
    "runtime.deterministic": "allows operations that sum in any order",
    "runtime.kernels": "kernels and plain PyTorch round otherwise",
    "distributed.strategy": "gradients are summed in another order",
    "distributed.cpu_offload": "another device rounds otherwise",
    "distributed.reshard_after_forward": "gradients are summed in another order",
    "distributed.reduce_every_round": "gradients are summed in another order",
}
# Another course: refused. A group's name stands for every key in it.
FIXED = {
    "preset": "the model",
    "model": "the model",
    "seed": "weights, order of the data and dropout; the position in an epoch is one in this order",
    "epochs": "the schedule is laid out over all of them",
    "data.batch_size": "the position in an epoch is counted in batches",
    "data.accumulation": "the open update holds so many of them",
    "data.block": "the order of the data",
    "data.limit": "the data",
    "data.roll_longitude": "the data",
    "optimizer": "the update rule",
    "schedule": "the update rule",
    "precision.dtype": "the number format",
    "precision.initial_scale": "the loss scale",
    "precision.growth_interval": "the loss scale",
    "precision.min_scale": "the loss scale",
    "precision.hysteresis": "the loss scale",
    "stop.metric": "the best value so far is one of this figure",
}
# What processes of one run may have different: their own place and machine. In all else they must agree, also in what
# is free when a run is resumed: who saves, stops or evaluates alone waits for the others in vain.
OF_A_PROCESS = {
    "data.path": "each machine may keep the data elsewhere; their content is compared",
    "data.workers": "of this process",
    "monitor.progress": "process 0 shows and records",
    "monitor.log_every": "process 0 shows and records",
    "monitor.level": "process 0 shows and records",
    "monitor.tensorboard": "process 0 shows and records",
    "monitor.wandb": "process 0 shows and records",
    "monitor.trackio": "process 0 shows and records",
    "monitor.project": "process 0 shows and records",
    "monitor.gpu_seconds": "process 0 shows and records",
    "monitor.log_file": "process 0 shows and records",
    "runtime.threads": "of this process",
    "runtime.malloc": "of this process",
}


def group(key: str) -> dict[str, str]:
    """The one of `FREE`, `ROUNDING` and `FIXED` that `key` is in; a key that nobody has classified counts as fixed."""
    for table in (FREE, ROUNDING):
        if key in table:
            return table
    return FIXED


def reason(key: str) -> str:
    """Why `key` may not change, with its name or that of its group."""
    name = key if key in FIXED else key.split(".")[0]
    return f"{name}: {FIXED.get(name, 'not classified')}"
