"""Loads the compiled CPU kernels, if they were built. `astrobiogen.kernel_status()` tells whether they serve."""

import importlib.util

if importlib.util.find_spec("astrobiogen._C") is not None:
    import torch  # its shared libraries must be loaded before the extension that links to them

    import astrobiogen._C

    CPU_CAPABILITY: str | None = astrobiogen._C.cpu_capability()
    BUILD_INFO: dict[str, object] | None = {**astrobiogen._C.build_info(), "torch": torch.__version__}
else:
    CPU_CAPABILITY = None
    BUILD_INFO = None
