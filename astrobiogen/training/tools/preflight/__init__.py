"""What a long run wants to know before it begins: twenty rounds of checks on its own configuration, for `doctor`."""

from astrobiogen.training.tools.preflight.checklist import written
from astrobiogen.training.tools.preflight.rounds import MORE, ROUNDS, Check, Verdict, carried_out
from astrobiogen.training.tools.preflight.subject import Subject

__all__ = ["MORE", "ROUNDS", "Check", "Subject", "Verdict", "carried_out", "written"]
