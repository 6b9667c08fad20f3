"""What a run tells: logs, records, trackers, and what it says when it hangs or fails."""

from astrobiogen.training.observe.monitor import Monitor, read_log

__all__ = ["Monitor", "read_log"]
