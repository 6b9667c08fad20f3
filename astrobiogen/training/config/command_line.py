"""Command line of `python -m astrobiogen.train`."""

import argparse
import dataclasses
import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jsonargparse

from astrobiogen.training.config import requeue, run_config, run_folder
from astrobiogen.training.config.as_dict import changed_on_resume, flatten, refusal, to_dict
from astrobiogen.training.config.parser import Parser, complaint
from astrobiogen.training.config.presets import preset, smoke
from astrobiogen.training.config.schema import PRESETS, TrainConfig
from astrobiogen.training.errors import UserError

_FILE = "--config"
_DESCRIPTION = """Train the multi-modal model. Without any option: the tiny preset on the bundled data, on the CPU, in a
few minutes. Values come from the preset, then --config FILE.yaml, then single options."""

_EXAMPLES = """examples:
  python -m astrobiogen.train                                    tiny preset, bundled data, a few minutes
  python -m astrobiogen.train --smoke                            does everything run?
  python -m astrobiogen.train --plan --memory 24                 what fits into 24 GiB?
  python -m astrobiogen.train --find-lr --output lr              which learning rate?
  python -m astrobiogen.train --preset small --print_config > my.yaml
  python -m astrobiogen.train --config my.yaml --optimizer.learning_rate 5e-4
  python -m astrobiogen.train --resume runs/20261124-101500-small
  python -m astrobiogen.train --output run --resume auto         start or go on: for schedulers that requeue"""


class _Help(jsonargparse.DefaultHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Options with their defaults; the examples as they are."""


@dataclasses.dataclass(frozen=True)
class Options:
    """What the command line asks for.

    Attributes:
        config: of the run.
        output: run folder to make; empty for `runs/<date>-<preset>`.
        resume: run folder to go on with; empty for a new run; "auto": whatever `output` needs.
        plan: print the memory plan instead of training.
        memory: GiB that the plan is compared with; 0: this machine's.
        find_lr: run the learning-rate range test instead of training.
        processes: that the plan is for; 0: those of the launch, or of the preset.
        force: start a run although its plan does not fit.
    """

    config: TrainConfig
    output: str
    resume: str
    plan: bool = False
    memory: float = 0.0
    find_lr: bool = False
    processes: int = 0
    force: bool = False


def _parser(defaults: dict[str, Any]) -> Parser:
    parser = Parser(
        prog="python -m astrobiogen.train",
        usage="python -m astrobiogen.train [--preset NAME] [--config FILE.yaml] [--KEY VALUE ...]",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=_Help,
    )
    parser.add_argument(_FILE, action="config", help="YAML file with any of the keys below; unknown keys are refused.")
    parser.add_argument(
        "--resume",
        type=str,
        default="",
        help="Folder of a run to go on with; its own configuration is used. auto: start in --output, go on with the "
        "run that is in it, or say that it has finished.",
    )
    parser.add_argument("--output", type=str, default="", help="Folder of the new run (default: runs/<date>-<preset>).")
    parser.add_argument(
        "--smoke",
        action="store_true",
        help="Two epochs on a few samples: checks that everything runs, in under a minute.",
    )
    parser.add_argument("--plan", action="store_true", help="Print the memory plan and exit; trains nothing.")
    parser.add_argument(
        "--memory",
        type=float,
        default=0.0,
        help="GiB that --plan compares with (default: the GPU's, of the preset's card or this machine's).",
    )
    parser.add_argument("--processes", type=int, default=0, help="That --plan is for (default: those of the launch).")
    parser.add_argument("--force", action="store_true", help="Start although the memory plan does not fit.")
    parser.add_argument(
        "--find-lr",
        action="store_true",
        help="Learning-rate range test: raise the rate until the loss diverges, print and plot a suggestion, and exit.",
    )
    parser.add_class_arguments(TrainConfig)
    parser.set_defaults({key: value for key, value in flatten(defaults).items() if value != {}})
    return parser


def _parsed(parser: Parser, arguments: Sequence[str]) -> jsonargparse.Namespace:
    try:
        return parser.parse_args(_files_first(arguments))
    except jsonargparse.ArgumentError as error:
        raise UserError(complaint(error) + _meant(parser, str(error))) from error


def _files_first(arguments: Sequence[str]) -> list[str]:
    """`arguments` with the --config files in front, so that single options go before them wherever they stand."""
    files: list[str] = []
    rest: list[str] = []
    for item in arguments:
        named = item == _FILE or item.startswith(f"{_FILE}=") or (files and files[-1] == _FILE)
        (files if named else rest).append(item)
    return files + rest


def _meant(parser: Parser, message: str) -> str:
    """The option that an unknown one is most like, if any is."""
    _, found, rest = message.partition("nrecognized arguments: ")
    wrong = rest.split()[0].partition("=")[0] if found and rest.split() else ""
    known = [name for action in parser._actions for name in action.option_strings]
    near = difflib.get_close_matches(wrong, known, n=1)
    return f"; did you mean {near[0]}?" if near else "; --help lists all options" if wrong else ""


def _as_config(parser: Parser, values: jsonargparse.Namespace) -> TrainConfig:
    try:
        return parser.made(values)
    except ValueError as error:
        raise UserError(" ".join(str(error).split())) from error


def parse(arguments: Sequence[str]) -> Options:
    """Read the command line.

    Raises:
        UserError: unknown or bad option, bad YAML, or a change that a resumed run does not allow.
        SystemExit: after --help or --print_config.
    """
    asked = any(name == "--help" or name == "-h" or name.startswith("--print_config") for name in arguments)
    base = to_dict(preset(_early_preset(arguments)))
    parser = _parser(base)
    values = _parsed(parser, arguments)
    if values.resume == requeue.AUTO and not values.output:
        raise UserError("--resume auto: needs --output FOLDER, the folder to start or go on in")
    if values.resume not in ("", requeue.AUTO) and not asked:
        folder = run_folder.find(values.resume)
        if values.output:
            raise UserError(f"--output {values.output}: not with --resume, which goes on in the run's own folder")
        return _resumed(folder, arguments)
    if values.preset != base["preset"]:  # named in the YAML file only
        parser = _parser(to_dict(preset(values.preset)))
        values = _parsed(parser, arguments)
    for name in ("memory", "processes"):
        if not getattr(values, name) >= 0:
            raise UserError(f"--{name}: got {getattr(values, name)}, expected 0 or more")
    config = _as_config(parser, values)
    wanted = smoke(config) if values.smoke else config
    return Options(
        wanted, values.output, values.resume, values.plan, values.memory, values.find_lr, values.processes, values.force
    )


def _early_preset(arguments: Sequence[str]) -> str:
    """The preset named on the command line itself, so that --help and --print_config show its values."""
    for number, item in enumerate(arguments):
        name = item.removeprefix("--preset=") if item.startswith("--preset=") else ""
        if item == "--preset" and number + 1 < len(arguments):
            name = arguments[number + 1]
        if name in PRESETS:
            return name
    return "tiny"


def _resumed(folder: Path, arguments: Sequence[str]) -> Options:
    saved = run_config.read(folder)
    parser = _parser(to_dict(saved))
    config = _as_config(parser, _parsed(parser, arguments))
    changed = changed_on_resume(to_dict(saved), to_dict(config))
    if changed:
        raise UserError(f"--resume: {refusal(changed, 'the run')}")
    return Options(config, "", str(folder))
