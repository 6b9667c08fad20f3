"""Where `read_log` was before it moved to `astrobiogen.training.observe`."""

from astrobiogen.training.observe.monitor import Monitor, read_log

__all__ = ["Monitor", "read_log"]
