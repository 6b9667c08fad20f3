"""`python -m astrobiogen.evaluate RUN_OR_CHECKPOINT ...`: the closing examination again, for any run or checkpoint, or
for several of them as an ensemble."""

import argparse
import contextlib
import dataclasses
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

import astrobiogen
from astrobiogen.training.batches import assemble
from astrobiogen.training.checkpoint import chosen
from astrobiogen.training.config import HangConfig, TrainConfig, claim
from astrobiogen.training.context import Setting
from astrobiogen.training.distributed import runtime
from astrobiogen.training.errors import UserError
from astrobiogen.training.evaluation import ensemble, examination, metrics, passes, publication
from astrobiogen.training.observe import failure
from astrobiogen.training.observe.watchdog import NOTHING_LOST, Watchdog, limits_of
from astrobiogen.training.optim import precision
from astrobiogen.training.tools import trained

_LOG = logging.getLogger("astrobiogen")
PREDICTIONS = "predictions.csv"


def _arguments(given: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m astrobiogen.evaluate", description="Test figures of a trained model, with intervals."
    )
    parser.add_argument(
        "sources",
        nargs="+",
        metavar="source",
        help="folder of a run (its best model is taken) or of one checkpoint; several: their averaged probabilities",
    )
    parser.add_argument(
        "--data",
        default="",
        help="folder of another data set, of which every pair is scored; default: the test part of the run's own",
    )
    parser.add_argument(
        "--output",
        default="",
        help="new folder for metrics.json, report.html and predictions.csv; default: print only",
    )
    parser.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: cuda if there is one"
    )
    parser.add_argument(
        "--dtype", choices=("fp32", "bf16", "fp16"), default=None, help="format of the forward pass; default: the run's"
    )
    parser.add_argument(
        "--bootstrap", type=int, default=None, help="replicates of the intervals; default: as in the run"
    )
    parser.add_argument("--no-baselines", action="store_true", help="leave the baselines out")
    parser.add_argument("--no-ablation", action="store_true", help="leave the masked modalities out")
    return parser.parse_args(list(given))


def _config(found: trained.Trained, arguments: argparse.Namespace) -> TrainConfig:
    """The configuration of the run with what `arguments` say put in."""
    config = found.config
    try:
        evaluation = dataclasses.replace(
            config.evaluation,
            bootstrap=config.evaluation.bootstrap if arguments.bootstrap is None else arguments.bootstrap,
            # fitted on pairs that are scored themselves where another data set is given: no yardstick
            baselines=config.evaluation.baselines and not arguments.no_baselines and not arguments.data,
            ablation=config.evaluation.ablation and not arguments.no_ablation,
        )
        return dataclasses.replace(
            config,
            evaluation=evaluation,
            data=dataclasses.replace(config.data, path=arguments.data, limit=0) if arguments.data else config.data,
            runtime=dataclasses.replace(config.runtime, device=arguments.device),
            precision=dataclasses.replace(config.precision, dtype=arguments.dtype or config.precision.dtype),
        )
    except (ValueError, TypeError) as error:
        raise UserError(f"{found.path}: its configuration does not fit this version: {error}") from error


def _run(given: Sequence[str]) -> int:
    arguments = _arguments(given)
    # The limits of the run itself are in its configuration, which is read from where a read may hang.
    limits = limits_of(HangConfig())
    with (
        Watchdog(None, limits, advice=NOTHING_LOST) as watchdog,
        watchdog.section("setup"),
        contextlib.ExitStack() as stack,
    ):
        output = stack.enter_context(claim.claimed(arguments.output, "")).folder if arguments.output else None
        return _examined(arguments, output, watchdog)


def _check_members(found: Sequence[trained.Trained], configs: Sequence[TrainConfig]) -> None:
    """UserError unless the members of an ensemble share preset and data."""
    config, path = configs[0], found[0].path
    for other, its in zip(found[1:], configs[1:], strict=True):
        if (its.preset, its.data.path) != (config.preset, config.data.path):
            raise UserError(
                f"{other.path}: another preset or other data than {path}; members of an ensemble share both"
            )


def _examined(arguments: argparse.Namespace, output: Path | None, watchdog: Watchdog) -> int:
    """Examine what `arguments` name, print it and write it to `output`, a folder of our own."""
    found = [trained.find(Path(source)) for source in arguments.sources]
    configs = [_config(one, arguments) for one in found]
    config, path = configs[0], found[0].path
    _check_members(found, configs)
    device = runtime.choose_device(config.runtime.device)
    dtype, _ = precision.choose_dtype(config.precision, device)
    runtime.prepare(config.runtime, config.seed)
    with astrobiogen.use_kernels(config.runtime.kernels), runtime.Interrupt() as interrupt:
        statistics = found[0].statistics
        if statistics is None:
            _LOG.warning("%s does not hold the statistics of its data: those of the present data are used", path)
        bundle = assemble.load_bundle(config, statistics, to_train=not arguments.data)
        if arguments.data:
            bundle = assemble.every_pair(bundle)
        assembly = assemble.assemble(config, bundle)
        _LOG.info("data: %s; %s; %s", assembly.task.fingerprint, device, dtype)
        models = [one.model(assembly.bundle.spec).to(device) for one in found]

        passed: list[passes.Evaluation] = []

        def examine(model: nn.Module, settings: TrainConfig) -> tuple[dict[str, Any], dict[str, metrics.Predictions]]:
            with watchdog.section("examination") as section:

                def should_stop() -> bool:
                    section.beat()
                    return bool(interrupt.received)

                setting = Setting(settings, device, dtype)
                examined = examination.examine(assembly, model, setting, should_stop, passed.append)
            if examined is None:
                raise UserError(f"stopped by {interrupt.received}: nothing was written", exit_code=1)
            return examined

        if len(models) == 1:
            result, predictions = examine(models[0], config)
        else:
            brief = dataclasses.replace(config.evaluation, bootstrap=0, baselines=False, ablation=False)
            alone = dataclasses.replace(config, evaluation=brief)
            members = {
                source: examine(model, alone)[1]["model"]
                for source, model in zip(arguments.sources, models, strict=True)
            }
            result, predictions = examine(ensemble.Ensemble(models), config)
            result["ensemble"] = ensemble.spread(members)
            del result["total_loss"], result["loss_parts"]  # of the terms but the class's there is no average
    facts = _run_facts(models[0], found[0].taken)
    result |= {"checkpoint": [str(one.path) for one in found], "run": facts}
    if output:
        publication.publish(output, result, predictions)
        publication.write_predictions(output / PREDICTIONS, bundle.test, passed[-1])
    publication.show(result, output)
    if "ensemble" in result:
        facts = result["ensemble"]
        sys.stdout.write(
            f"Ensemble of {len(models)}: P(class 1) differs by {facts['mean_standard_deviation']:.3f} (standard "
            f"deviation over members, mean over samples); {100 * facts['share_in_dispute']:.1f} % in dispute\n"
        )
    return 0


def _run_facts(model: Any, taken: chosen.Chosen) -> dict[str, Any]:
    count = sum(parameter.numel() for parameter in model.parameters())
    return {
        "stopped": "not trained here",
        "epochs": taken.epoch,
        "best_epoch": taken.epoch if taken.kind == chosen.BEST else None,
        "weights": taken.facts(),
        "updates": 0,
        "training_seconds": 0.0,
        "parameters": count,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code: 0 done, 1 failed, 2 wrong input."""
    return failure.command(_run, arguments)


if __name__ == "__main__":
    sys.exit(main())
