"""Configuration of what watches over a run: time limits of its sections, and what is done about a spike of the loss."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class HangConfig:
    """Minutes that a section of the run may last without a sign of progress before the process says what hung, writes
    the stacks of all threads to `<run>/hang-process-<rank>.txt` and ends with exit code 3; 0: without limit.
    """

    setup_minutes: float = 60.0
    """Reading the data, building the model, loading a checkpoint."""
    data_minutes: float = 15.0
    """Waiting for a batch (a data-loading process that hangs, a file system that stalls)."""
    step_minutes: float = 30.0
    """Forward, backward and update of a micro-batch, its exchanges between processes included."""
    validation_minutes: float = 30.0
    """A batch of the validation."""
    save_minutes: float = 60.0
    """Writing a checkpoint."""
    examination_minutes: float = 240.0
    """A batch of the closing examination, or all of its baselines and intervals."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if not value >= 0:
                raise ValueError(f"hang.{field.name}: got {value!r}, expected 0 (no limit) or more")


@dataclasses.dataclass(frozen=True)
class SpikeConfig:
    """What tells faults of the data or the model from faults of the hardware."""

    rerun: bool = False
    """Run the micro-batches of an update a second time, from the same state, if its loss or gradient is not finite or
    its loss is a spike, and report whether the result is the same to the bit; costs one wait for the device per update.
    """
    factor: float = 3.0
    """A loss is a spike if it is larger than this many times the median of the last ones."""
    window: int = 50
    """How many losses that median is taken over; none is called a spike before there are as many."""

    def __post_init__(self) -> None:
        if not self.factor > 1:
            raise ValueError(f"spike.factor: got {self.factor!r}, expected more than 1")
        if self.window < 1:
            raise ValueError(f"spike.window: got {self.window!r}, expected at least 1")
