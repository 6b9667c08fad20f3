"""`python -m astrobiogen.predict RUN [RUN...] --climates PATH... --networks PATH...`: a table of predictions for files
that have no label."""

import argparse
import sys
import typing
from collections.abc import Sequence
from pathlib import Path

from astrobiogen import predict
from astrobiogen.data.errors import DataError
from astrobiogen.system.extras import Later
from astrobiogen.training.errors import UserError
from astrobiogen.training.observe import failure

if typing.TYPE_CHECKING:
    from astrobiogen.predict.rows import Predictions

# Loaded when the command line is understood and the packages that they need are there.
trained = Later("astrobiogen.predict.model")
plot = Later("astrobiogen.predict.plot")

OUTPUT = "predictions.csv"
_DESCRIPTION = """Predict with a trained model: how likely each climate is a habitat for the organism of each metabolic
network. Climates: netCDF files, Zarr stores, or folders of them; networks: SBML or JSON, plain or .gz, or folders. No
label and no second segment is needed. Several runs are an ensemble."""
_EPILOG = """A file that cannot be used is named on standard error and has rows with the flag "refused"; the rest is
answered. The table and the picture appear when they are whole: after a kill there is none, or the one from before, and
the same command starts again. Exit status: 0 done, 1 some files were refused, 2 wrong usage or nothing could be
answered, 130 interrupted."""


def _arguments(given: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m astrobiogen.predict", description=_DESCRIPTION, epilog=_EPILOG)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a run or of one checkpoint")
    parser.add_argument("--climates", nargs="+", type=Path, required=True, metavar="PATH")
    parser.add_argument("--networks", nargs="+", type=Path, required=True, metavar="PATH")
    parser.add_argument("--pairs", type=Path, help="CSV with columns climate, network; default: all with all")
    parser.add_argument(
        "--output", type=Path, default=Path(OUTPUT), help=f"CSV; a picture of the same name, .png (default {OUTPUT})"
    )
    parser.add_argument("--catalogue", type=Path, help="table of the Open Exoplanet Catalogue, for the stars")
    parser.add_argument("--workers", type=int, default=2, help="processes that read networks (default 2)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    options = parser.parse_args(list(given))
    if options.workers < 1:
        parser.error(f"--workers: got {options.workers}, expected at least 1")
    if options.output.suffix != ".csv":
        parser.error(f"--output: got {options.output}, expected a name that ends in .csv")
    if options.output.is_dir():
        parser.error(f"--output: {options.output} is a folder")
    return options


def _run(given: Sequence[str]) -> int:
    options = _arguments(given)
    predict.require_packages()
    pairs = trained.read_pairs(options.pairs) if options.pairs else None
    model = trained.load_model(options.runs, options.device)
    try:
        found = model.predict(
            options.climates, options.networks, pairs, workers=options.workers, catalogue=options.catalogue
        )
    except DataError as error:
        raise UserError(str(error)) from error
    picture = options.output.with_suffix(".png")
    found.write_csv(options.output)
    plot.write_png(found, picture)
    _say(found, options.output, picture)
    answered = sum(count for flag, count in found.counts().items() if flag != "refused")
    return 2 if not answered else 1 if found.refused else 0


def _say(found: "Predictions", table: Path, picture: Path) -> None:
    counts = ", ".join(f"{count} {flag}" for flag, count in found.counts().items())
    lines = [
        f"{table}: {len(found.rows)} pairs ({counts}); low and high: {found.interval}",
        f"{picture}: the same drawn",
    ]
    lines += [f"refused: {name}: {reason}" for name, reason in found.refused.items()]
    sys.stdout.write("\n".join(lines) + "\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    return failure.command(_run, arguments)


if __name__ == "__main__":
    sys.exit(main())
