"""The deployment checklist, each box ticked by checks."""

import datetime
from collections.abc import Mapping, Sequence
from typing import Any

from astrobiogen.training.tools.preflight.rounds import Check

_KERNELS, _VERSIONS = "kernels", "versions"
# Section -> box -> the checks that tick it: `kernels` and `versions` stand for all of them.
BOXES: dict[str, dict[str, tuple[str, ...]]] = {
    "Before deployment": {
        "Sources compile": ("syntax",),
        "Imports work": ("imports",),
        "Model configuration is right": ("model configuration", "consistency"),
        "Shapes are right": ("shapes",),
        "Batch format is right": ("batch", "data"),
        "Training loop is robust": ("training loop", "feature flow"),
        "Memory optimisations are on, and the run fits": ("memory",),
        "Loss is right": ("loss",),
        "Checkpoints are written": ("checkpoints",),
        "Validation loop works": ("validation loop", "early stopping", "test evaluation"),
    },
    "Ready to be left alone": {
        "Logging": ("logging",),
        "Errors are handled": ("errors",),
        "A checkpoint brings the run back": ("whole",),
        "Resources are given back": ("clean-up", "production readiness"),
        "Experiments are tracked": ("logging", "consistency"),
        "GPU is watched": ("GPU monitor",),
    },
    "This machine": {
        "No path of another machine": ("paths",),
        "Environment variables": ("environment variables", "distributed"),
        "Optional packages": ("imports",),
        "Kernels agree with what stands in for them": (_KERNELS,),
        "Versions of PyTorch and CUDA": (_VERSIONS,),
    },
}


def written(checks: Sequence[Check], facts: Mapping[str, Any], what: str) -> str:
    """The checklist as Markdown: a box is ticked if each of its checks is ok; what was found stands below it.

    Args:
        checks: all that were carried out.
        facts: about the machine.
        what: the run that they are about.
    """
    boxes = [(section, box, _found(checks, names)) for section, of in BOXES.items() for box, names in of.items()]
    ticked = sum(_good(found) for _, _, found in boxes)
    moment = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    lines = ["# Deployment checklist", "", f"{what}, {moment}: {ticked} of {len(boxes)} boxes."]
    lines += ["", *(f"* {name}: {value}" for name, value in facts.items())]
    for section, of in BOXES.items():
        lines += ["", f"## {section}", ""]
        for box in of:
            found = next(one for place, name, one in boxes if (place, name) == (section, box))
            lines.append(f"- [{'x' if _good(found) else ' '}] {box}")
            lines += [f"  - {check.name}: {check.verdict}: {check.found}" for check in found]
    return "\n".join(lines) + "\n"


def _found(checks: Sequence[Check], names: Sequence[str]) -> list[Check]:
    """The checks of a box."""
    devices = (" on cpu", " on cuda")
    groups = {
        _KERNELS: [check for check in checks if check.name.endswith(devices)],
        _VERSIONS: [check for check in checks if check.name in ("python", "torch", "triton", "torch_geometric")],
    }
    named = {check.name: [check] for check in checks}
    return [check for name in names for check in (groups | named).get(name, [])]


def _good(found: Sequence[Check]) -> bool:
    return bool(found) and all(check.verdict == "ok" for check in found)
