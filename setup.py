"""Builds the optional C++ extension `astrobiogen._C` from csrc/**.cpp. All other metadata is in pyproject.toml.

The extension needs the installed PyTorch's headers, so build without isolation: `pip install --no-build-isolation .`
Without PyTorch or a compiler the package still installs; its ops then run their plain PyTorch references on the CPU and
say so once.
"""

import os
import pathlib
import platform
import sys

from setuptools import setup
from setuptools.command.build_py import build_py
from setuptools.errors import BaseError

ROOT = pathlib.Path(__file__).parent
REASON_FILE = "extension_missing.txt"  # read by astrobiogen/extension.py


def native_files(pattern: str) -> list[str]:
    return sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob(pattern))


def notice(reason: str, build_lib: str | None) -> None:
    """Say why there is no extension, here and, for those who never see a build's output, in the built package."""
    if build_lib is not None:
        place = pathlib.Path(build_lib, "astrobiogen")
        place.mkdir(parents=True, exist_ok=True)
        (place / REASON_FILE).write_text(reason + "\n", encoding="utf-8")
    print(
        f"\nNOTICE: the C++ extension of astrobiogen was not built: {reason}\n"
        "        astrobiogen works without it, but its CPU operators run their slower plain PyTorch references.\n"
        "        To build it: install PyTorch and a C++20 compiler, then `pip install --no-build-isolation .`\n",
        file=sys.stderr,
    )


class BuildWithoutPyTorch(build_py):
    """Copies the Python files, and says why that is all."""

    def run(self) -> None:
        super().run()
        reason = (
            "PyTorch was not there when the package was built (an isolated build does not see an installed one): "
            "pip install --no-build-isolation ."
        )
        notice(reason, None if self.editable_mode else self.build_lib)


def extension_arguments() -> dict:
    """Arguments of `setup` that build the extension; empty, with a notice, where PyTorch is not there to build
    against."""
    try:
        from torch.utils import cpp_extension  # a build without PyTorch must get past this line
    except ImportError:
        return {"cmdclass": {"build_py": BuildWithoutPyTorch}}

    class OptionalBuild(cpp_extension.BuildExtension):
        """The compile step that reports a failure and lets the pure Python package install."""

        def run(self) -> None:
            try:
                super().run()
            except (BaseError, OSError, RuntimeError, ValueError) as error:
                if os.environ.get("ASTROBIOGEN_REQUIRE_EXTENSION") == "1":
                    raise
                self.extensions.clear()
                text = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no compiler'}"
                notice(text, None if self.inplace else self.build_lib)

    flags = [
        "-O3",
        "-std=c++20",
        "-fopenmp",
        "-fno-math-errno",
        "-fno-trapping-math",
        "-g0",
        "-Wall",
        "-Wextra",
        *(f"-isystem{path}" for path in cpp_extension.include_paths()),  # their warnings are not ours
    ]
    if platform.system() == "Darwin":
        flags.remove("-fopenmp")
    sanitizer = []
    if os.environ.get("ASTROBIOGEN_SANITIZE") == "1":  # `make fuzz-asan`
        sanitizer = ["-fsanitize=address,undefined", "-fno-sanitize=alignment,vptr", "-fno-sanitize-recover=undefined"]
        flags += [*sanitizer, "-O1", "-g1", "-fno-omit-frame-pointer"]
    extension = cpp_extension.CppExtension(
        "astrobiogen._C",
        native_files("*.cpp"),
        include_dirs=[str(ROOT / "csrc")],
        depends=native_files("*.h"),
        extra_compile_args=flags,
        extra_link_args=[*(flag for flag in flags if flag == "-fopenmp"), *sanitizer],
    )
    return {"ext_modules": [extension], "cmdclass": {"build_ext": OptionalBuild}}


setup(**extension_arguments())
