"""The processes of a run: each by itself, and all together."""

from astrobiogen.training.distributed.world import PeerError, World, local_part
from astrobiogen.training.launch import launched, launched_rank

__all__ = ["PeerError", "World", "launched", "launched_rank", "local_part"]
