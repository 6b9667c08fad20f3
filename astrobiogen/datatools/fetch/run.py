"""``python -m astrobiogen.data fetch SOURCE --raw DIR``: raw files from public sources (not verified online)."""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

from astrobiogen.datatools.fetch import biomodels, climates, oec, psg
from astrobiogen.datatools.fetch.download import Web
from astrobiogen.datatools.fetch.each import Fetched
from astrobiogen.datatools.progress import say

NOTICE = "note: the fetchers have not been verified against the real services; look at what came"


def _regular_expression(text: str) -> str:
    try:
        re.compile(text)
    except re.error as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no regular expression ({error})") from error
    return text


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m astrobiogen.data fetch",
        description="Download raw files into the folder that 'build' reads. Answers are checked by content; a file "
        "that is there and good is kept, so a repeated command continues. NOT VERIFIED ONLINE.",
        epilog="Exit status: 0 all there, 1 some could not be had (listed), 2 nothing could be asked for.",
    )
    sources = parser.add_subparsers(dest="source", required=True, metavar="SOURCE")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--raw", type=Path, help="raw folder; needed for all but --search")
    common.add_argument("--url", help="another address of the service (a mirror)")
    sources.add_parser("oec", parents=[common], help="Open Exoplanet Catalogue: table and descriptions")
    made = sources.add_parser("biomodels", parents=[common], help="metabolic networks by BioModels id (CC0)")
    made.add_argument("identifiers", nargs="*", metavar="ID")
    made.add_argument("--search", metavar="QUERY", help="list ids and names of models instead; downloads nothing")
    made.add_argument("--limit", type=int, default=100, help="how many --search lists (default 100)")
    made = sources.add_parser("psg", parents=[common], help="spectra from the Planetary Spectrum Generator")
    made.add_argument("configurations", nargs="+", type=Path, metavar="CONFIG")
    for name, what in (("rocke3d", "ROCKE-3D climates (Way et al. 2018)"), ("thai", "THAI climates of TRAPPIST-1 e")):
        made = sources.add_parser(name, parents=[common], help=what)
        made.add_argument(
            "--pattern",
            type=_regular_expression,
            required=True,
            help="regular expression for file names; the sets are large",
        )
    return parser


def _options(arguments: list[str]) -> argparse.Namespace:
    parser = _parser()
    options = parser.parse_args(arguments)
    searched = options.source == "biomodels" and options.search is not None
    if options.raw is None and not searched:
        parser.error("the following arguments are required: --raw")
    if options.source == "biomodels":
        if bool(options.identifiers) == searched:
            parser.error("biomodels: expected either ids or --search QUERY")
        if options.limit < 1:
            parser.error(f"--limit: got {options.limit}, expected at least 1")
    return options


def _search(options: argparse.Namespace, web: Web) -> int:
    found, matches = biomodels.search(options.search, web, options.url or biomodels.URL, options.limit)
    for model in found:
        sys.stdout.write(f"{model['id']}\t{model['name']}\n")
    say(f"{len(found)} of {matches} models that match")
    return 0


def _fetch(options: argparse.Namespace, web: Web) -> Fetched:
    if options.source == "oec":
        return Fetched(oec.fetch(options.raw, web, options.url or oec.URL))
    if options.source == "biomodels":
        return biomodels.fetch(options.raw, web, options.identifiers, options.url or biomodels.URL)
    if options.source == "psg":
        return psg.fetch(options.raw, web, options.configurations, options.url or psg.URL)
    return climates.fetch(options.source, options.raw, web, options.pattern, options.url)


def main(arguments: list[str], web: Web | None = None) -> int:
    """Command line of ``fetch``: prints the files; 1 when some could not be had, else 0."""
    options = _options(arguments)
    web = web or Web()
    say(NOTICE)
    if options.source == "biomodels" and options.search is not None:
        return _search(options, web)
    made = _fetch(options, web)
    for path in made.paths:
        sys.stdout.write(f"{path}\n")
    for problem in made.problems:
        sys.stdout.write(f"not fetched: {problem}\n")
    return 1 if made.problems else 0
