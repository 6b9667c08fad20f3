"""``python -m astrobiogen.data fetch SOURCE --raw DIR``: raw files from public sources (not verified online)."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from astrobiogen.data.fetch import biomodels, climates, oec, psg
from astrobiogen.data.fetch.download import Web
from astrobiogen.data.progress import say

NOTICE = "note: the fetchers have not been verified against the real services; look at what came"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m astrobiogen.data fetch",
        description="Download raw files into the folder that 'build' reads. Answers are checked by content; a file "
        "that is there and good is kept, so a repeated command continues. NOT VERIFIED ONLINE.",
    )
    sources = parser.add_subparsers(dest="source", required=True, metavar="SOURCE")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--raw", type=Path, required=True, help="raw folder")
    common.add_argument("--url", help="another address of the service (a mirror)")
    sources.add_parser("oec", parents=[common], help="Open Exoplanet Catalogue: table and descriptions")
    made = sources.add_parser("biomodels", parents=[common], help="metabolic networks by BioModels id (CC0)")
    made.add_argument("identifiers", nargs="+", metavar="ID")
    made = sources.add_parser("psg", parents=[common], help="spectra from the Planetary Spectrum Generator")
    made.add_argument("configurations", nargs="+", type=Path, metavar="CONFIG")
    for name, what in (("rocke3d", "ROCKE-3D climates (Way et al. 2018)"), ("thai", "THAI climates of TRAPPIST-1 e")):
        made = sources.add_parser(name, parents=[common], help=what)
        made.add_argument("--pattern", required=True, help="regular expression for file names; the sets are large")
    return parser


def main(arguments: list[str], web: Web | None = None) -> int:
    """Command line of ``fetch``."""
    options = _parser().parse_args(arguments)
    web = web or Web()
    say(NOTICE)
    changed = {"url": options.url} if options.url else {}
    if options.source == "oec":
        made = oec.fetch(options.raw, web, **changed)
    elif options.source == "biomodels":
        made = biomodels.fetch(options.raw, web, options.identifiers, **({"base": options.url} if options.url else {}))
    elif options.source == "psg":
        made = psg.fetch(options.raw, web, options.configurations, **changed)
    else:
        made = climates.fetch(options.source, options.raw, web, options.pattern, options.url)
    for path in made:
        sys.stdout.write(f"{path}\n")
    return 0
