"""Loads the compiled CPU kernels, if they were built. `astrobiogen.kernel_status()` tells whether they serve."""

import importlib
import importlib.util
import warnings
from pathlib import Path

# Written by setup.py where the extension could not be built: one line that says why.
REASON_FILE = Path(__file__).with_name("extension_missing.txt")


def load(name: str = "astrobiogen._C") -> tuple[str | None, dict[str, object] | None, str]:
    """CPU level and facts of the build of the extension `name`, and why there are none, empty where there are.

    An extension that does not fit the running PyTorch (an undefined symbol) is one warning, and the references serve.
    """
    if importlib.util.find_spec(name) is None:
        return None, None, f"the extension {name} was not built: {_reason()}"
    import torch  # noqa: PLC0415 (its shared libraries must be loaded before the extension that links to them)

    try:
        extension = importlib.import_module(name)
    except ImportError as error:
        text = " ".join(str(error).split())[:200]
        problem = f"the extension {name} does not load with torch {torch.__version__} ({text}): build it again"
        warnings.warn(f"{problem}; CPU operators run plain PyTorch", RuntimeWarning, stacklevel=2)
        return None, None, problem
    return extension.cpu_capability(), extension.build_info(), ""


def _reason() -> str:
    try:
        return REASON_FILE.read_text(encoding="utf-8").strip()
    except OSError:
        return "install PyTorch and a C++20 compiler, then `pip install --no-build-isolation .`"


CPU_CAPABILITY, BUILD_INFO, PROBLEM = load()
