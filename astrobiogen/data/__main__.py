"""`python -m astrobiogen.data build|check|describe|export|fetch|make-climate`."""

import sys

from astrobiogen.datatools.commands import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
