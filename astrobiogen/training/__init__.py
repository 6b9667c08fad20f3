"""The trainer: configuration, loop, checkpoints, precision, metrics and reports."""
