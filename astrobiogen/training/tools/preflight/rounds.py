"""The rounds in their order, and how each is carried out."""

import dataclasses
import subprocess
from collections.abc import Callable, Iterator
from typing import Literal

from astrobiogen.system.extras import MissingExtraError
from astrobiogen.training.errors import UserError
from astrobiogen.training.tools.preflight import integration, readiness, static
from astrobiogen.training.tools.preflight.subject import NotHereError, Subject

Verdict = Literal["ok", "warning", "failed"]
# Beyond the rounds of the original's report: what its deployment checklist asks for and no round answers.
ROUNDS: dict[str, Callable[[Subject], str]] = {
    "syntax": static.syntax,
    "imports": static.imports,
    "model configuration": static.model_configuration,
    "shapes": static.shapes,
    "batch": static.batch,
    "training loop": integration.training_loop,
    "memory": static.memory,
    "loss": static.loss,
    "checkpoints": integration.checkpoints,
    "validation loop": integration.validation_loop,
    "distributed": integration.distributed,
    "data": static.data_parts,
    "logging": integration.logging_,
    "early stopping": integration.early_stopping,
    "errors": integration.errors,
    "feature flow": static.feature_flow,
    "consistency": readiness.consistency,
    "test evaluation": readiness.test_evaluation,
    "production readiness": readiness.production,
    "whole": readiness.interrupted_and_resumed,
}
MORE: dict[str, Callable[[Subject], str]] = {
    "clean-up": readiness.clean_up,
    "GPU monitor": readiness.gpu_monitor,
    "paths": readiness.paths,
    "environment variables": readiness.environment_variables,
}


@dataclasses.dataclass(frozen=True)
class Check:
    """One named check: what was found, and whether that will do."""

    name: str
    verdict: Verdict
    found: str


def carried_out(subject: Subject) -> Iterator[Check]:
    """Every check on `subject`, each as soon as it is known."""
    for name, check in (ROUNDS | MORE).items():
        yield _of(name, check, subject)


def _of(name: str, check: Callable[[Subject], str], subject: Subject) -> Check:
    try:
        return Check(name, "ok", check(subject))
    except NotHereError as error:
        return Check(name, "warning", str(error))
    except (UserError, MissingExtraError) as error:
        return Check(name, "failed", str(error))
    except (
        ArithmeticError, AttributeError, ImportError, LookupError, OSError, RuntimeError, SyntaxError, TypeError,
        ValueError, subprocess.SubprocessError,
    ) as error:  # fmt: skip
        return Check(name, "failed", f"{type(error).__name__}: {' '.join(str(error).split())[:400]}")
