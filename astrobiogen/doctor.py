"""`python -m astrobiogen.doctor`: versions, devices, which kernel serves which operator, and named checks.

Every check prints one line with its verdict and ends the program with exit code 1 if it fails. A warning (for example:
no compiler was there when
astrobiogen was installed, so that the CPU runs plain PyTorch) does not. `--json` prints the same as one JSON object.
"""

import argparse
import contextlib
import dataclasses
import importlib.metadata
import importlib.util
import json
import logging
import os
import pathlib
import platform
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence

import rich.console
import rich.table
import torch
from packaging.version import Version
from rich.markup import escape

import astrobiogen
from astrobiogen import extension, ops
from astrobiogen.kernels import registry
from astrobiogen.training.config import command_line, run_folder
from astrobiogen.training.errors import UserError
from astrobiogen.training.observe import failure
from astrobiogen.training.tools import preflight
from astrobiogen.training.tools.preflight import Check, Verdict

# The oldest versions that the library supports; pyproject.toml says the same to pip.
OLDEST_PYTHON = (3, 11)
OLDEST = {"torch": "2.11", "triton": "3.6", "torch_geometric": "2.6"}
PACKAGES = (
    "torch",
    "triton",
    "torch_geometric",
    "numpy",
    "scikit-learn",
    "safetensors",
    "tokenizers",
    "jsonargparse",
    "rich",
    "bitsandbytes",
    "xarray",
    "python-libsbml",
)
# fp32 rounding of two summation orders over at most 512 standard-normal terms, with a margin of 8.
AGREEMENT = 8 * 512**0.5 * torch.finfo(torch.float32).eps


def environment() -> dict[str, str]:
    """Versions, platform, processor and accelerators, as text."""
    facts = {
        "astrobiogen": astrobiogen.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
    }
    for package in PACKAGES:
        facts[package] = _version(package) or "not installed"
    facts["cpu"] = (
        f"{os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}; {torch.get_num_threads()} threads"
    )
    facts["extension"] = "not built"
    if extension.BUILD_INFO is not None:
        facts["extension"] = f"{extension.CPU_CAPABILITY}, " + ", ".join(
            f"{key} {value}" for key, value in extension.BUILD_INFO.items()
        )
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        facts[f"cuda:{index}"] = (
            f"{properties.name}, sm_{properties.major}{properties.minor}, {properties.total_memory / 2**30:.1f} GiB, "
            f"{properties.multi_processor_count} multiprocessors"
        )
    if torch.cuda.device_count() == 0:
        facts["cuda"] = "no device"
    return facts


def run_checks(subject: preflight.Subject | None) -> Iterator[Check]:
    """The checks in order, each as soon as it is known; `subject`: the run that a preflight is about."""
    yield _python()
    for package, oldest in OLDEST.items():
        yield _oldest(package, oldest)
    yield _extension_check()
    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        for name, probe in _probes().items():
            yield _agreement(name, probe, torch.device(device))
    if subject is not None:
        yield from preflight.carried_out(subject)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the report; return the exit code."""
    return failure.command(_main, arguments)


def _parsed(arguments: Sequence[str]) -> tuple[argparse.Namespace, command_line.Options | None]:
    """The options, and the run that a preflight is about."""
    parser = argparse.ArgumentParser(
        prog="python -m astrobiogen.doctor",
        description="Versions, devices, kernels, and named checks.",
        epilog="With --preflight or --checklist the options of python -m astrobiogen.train name the run: --preset, "
        "--config FILE, --output, --memory, --processes and every key.",
        allow_abbrev=False,
    )
    parser.add_argument("--preflight", action="store_true", help="also carry out twenty rounds on the run to be made")
    parser.add_argument(
        "--checklist",
        nargs="?",
        const="deployment_checklist.md",
        default="",
        metavar="FILE",
        help="the same, and write the deployment checklist with the boxes that they tick (default: %(const)s)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options, rest = parser.parse_known_args(arguments)
    if options.preflight or options.checklist:
        return options, command_line.parse(rest)
    if rest:
        raise UserError(f"{rest[0]}: no option of doctor without --preflight or --checklist; --help lists all")
    return options, None


def _main(arguments: Sequence[str]) -> int:
    options, asked = _parsed(arguments)
    logging.getLogger("astrobiogen").setLevel(logging.ERROR)  # what a check provokes on purpose is not news
    status = astrobiogen.kernel_status()
    with contextlib.ExitStack() as stack:
        subject = None
        if asked is not None:
            scratch = pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="astrobiogen-preflight-")))
            subject = preflight.Subject(asked.config, scratch, asked.output, asked.memory, asked.processes)
        if options.json:
            checks = list(run_checks(subject))
            rows = [dataclasses.asdict(row) for row in status]
            found = [dataclasses.asdict(check) for check in checks]
            report = {"environment": environment(), "kernels": rows, "checks": found}
            sys.stdout.write(json.dumps(report, indent=2) + "\n")
        else:
            checks = _print_report(status, subject)
    if options.checklist and asked is not None:
        what = f"Preset {asked.config.preset}, seed {asked.config.seed}"
        run_folder.write_text(pathlib.Path(options.checklist), preflight.written(checks, environment(), what))
    return int(any(check.verdict == "failed" for check in checks))


def _print_report(status: registry.KernelTable, subject: preflight.Subject | None) -> list[Check]:
    console = rich.console.Console(highlight=False, soft_wrap=True)
    for key, value in environment().items():
        console.print(f"{key:16} {value}", markup=False)
    kernels = rich.table.Table("op", "device", "implementation", "why", title="kernels")
    for row in status:
        kernels.add_row(row.op, row.device, row.implementation, row.reason)
    console.print(kernels)
    colours: dict[Verdict, str] = {"ok": "green", "warning": "yellow", "failed": "red"}
    checks = []
    for check in run_checks(subject):
        checks.append(check)
        console.print(f"[{colours[check.verdict]}]{check.verdict:8}[/] {check.name}: {escape(check.found)}")
    counts = {verdict: sum(check.verdict == verdict for check in checks) for verdict in colours}
    console.print(f"{counts['ok']} checks ok, {counts['warning']} warnings, {counts['failed']} failed")
    return checks


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _python() -> Check:
    oldest = ".".join(map(str, OLDEST_PYTHON))
    verdict: Verdict = "ok" if sys.version_info >= OLDEST_PYTHON else "failed"
    return Check("python", verdict, f"{platform.python_version()}, supported from {oldest}")


def _oldest(package: str, oldest: str) -> Check:
    found = _version(package)
    if found is None:
        return Check(package, "warning", f"not installed; GPU kernels need {package} >= {oldest}")
    return Check(package, "ok" if Version(found) >= Version(oldest) else "failed", f"{found}, supported from {oldest}")


def _extension_check() -> Check:
    if extension.CPU_CAPABILITY is None:
        return Check("C++ kernels", "warning", f"CPU ops run plain PyTorch: {extension.PROBLEM}")
    missing = [name for name in registry.ops() if not registry.has_kernel(name, "CPU")]
    if missing:
        return Check("C++ kernels", "warning", f"no CPU kernel for {', '.join(missing)}: plain PyTorch serves")
    return Check("C++ kernels", "ok", f"loaded, {extension.CPU_CAPABILITY}, for all {len(registry.ops())} ops")


def _probes() -> dict[str, Callable[[torch.device], torch.Tensor]]:
    """One small call per public op; run with the kernels and with the references, the results must agree."""

    def randn(device: torch.device, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(device)

    def angles(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        return randn(device, 9, 34).cos(), randn(device, 9, 34).sin()

    return {
        "rms_norm": lambda d: ops.rms_norm(randn(d, 3, 272), randn(d, 272)),
        "add_rms_norm": lambda d: ops.add_rms_norm(randn(d, 3, 272), randn(d, 3, 272).flip(0), randn(d, 272))[0],
        "swiglu": lambda d: ops.swiglu(randn(d, 3, 45), randn(d, 3, 45).flip(0)),
        "rope": lambda d: ops.rope(randn(d, 2, 9, 4, 68), *angles(d)),
        "attention": lambda d: ops.attention(randn(d, 2, 9, 4, 68), randn(d, 2, 9, 2, 68), randn(d, 2, 9, 2, 68)),
        "conv_nd": lambda d: ops.conv_nd(randn(d, 1, 2, 3, 3, 3, 4, 4), randn(d, 16, 2, 3, 3, 3, 3, 3), padding=1),
        "edge_attention": lambda d: ops.edge_attention(
            randn(d, 5, 2, 8),
            randn(d, 5, 2, 8).flip(0),
            randn(d, 5, 2, 8).flip(1),
            None,
            ops.edge_lists(torch.tensor([0, 0, 4]).to(d), torch.tensor([1, 2, 0]).to(d), 5),
        ),
        "linear_cross_entropy": lambda d: ops.linear_cross_entropy(
            randn(d, 9, 32), randn(d, 70, 32).flip(0), torch.arange(9, device=d)
        ),
    }


def _agreement(name: str, probe: Callable[[torch.device], torch.Tensor], device: torch.device) -> Check:
    label = f"{name} on {device.type}"
    try:
        got = probe(device)
        with astrobiogen.use_kernels("reference"):
            expected = probe(device)
    except (RuntimeError, ValueError, TypeError) as error:
        return Check(label, "failed", f"{type(error).__name__}: {error}")
    error = ((got - expected).abs().max() / expected.abs().max()).item()
    return Check(
        label,
        "ok" if error <= AGREEMENT else "failed",
        f"differs from the reference by {error:.1e} of the largest value",
    )


if __name__ == "__main__":
    sys.exit(main())
