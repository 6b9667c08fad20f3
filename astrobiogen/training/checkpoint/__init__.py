"""What is saved, how it is saved, and how a run is put back from it."""

from astrobiogen.training.checkpoint.store import MANIFEST, CheckpointStore, Content, Observer, read, verify

__all__ = ["MANIFEST", "CheckpointStore", "Content", "Observer", "read", "verify"]
