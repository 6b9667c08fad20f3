"""Packages that only a part of the library needs: missing ones are named with the extra that brings them, slow ones are
loaded when they are first used.
"""

import importlib
import importlib.util
from collections.abc import Iterable
from typing import Any


class MissingExtraError(ModuleNotFoundError):
    """A package of an extra is not installed; the message says how to install it."""


def require(part: str, extra: str, packages: Iterable[str]) -> None:
    """Check that `packages` can be imported, without importing them.

    Args:
        part: what needs them, "astrobiogen.training".
        extra: of this distribution that installs them, "train".
        packages: names to import.

    Raises:
        MissingExtraError: the first that is missing is its `name`; the message lists all of them.
    """
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        needs = f"{part} needs the package{'s' * (len(missing) > 1)} {', '.join(missing)}"
        raise MissingExtraError(f"{needs}: pip install 'astrobiogen[{extra}]'", name=missing[0])


class Later:
    """A module that is imported when one of its names is first asked for: `linear = Later("sklearn.linear_model")`."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, attribute: str) -> Any:
        """The module's own attribute."""
        return getattr(importlib.import_module(self._name), attribute)
