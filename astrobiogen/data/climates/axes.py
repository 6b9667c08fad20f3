"""Named axes of climate cubes and the canonical order [B, V, T, G, lev, lat, lon]."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

# batch, variable, time of the year, geological epoch, level from the top, latitude from the north, longitude
CANONICAL = ("batch", "variable", "time", "epoch", "lev", "lat", "lon")
# the six axes of the original system's cubes, [B, 2, 12, 32, 64, 10]
ORIGINAL = ("batch", "variable", "time", "lat", "lon", "lev")
MAY_BE_ABSENT = ("batch", "epoch")  # they become axes of size 1


def to_canonical(cube: Tensor, axes: Sequence[str] = ORIGINAL) -> Tensor:
    """A view of ``cube`` in the canonical order [B, V, T, G, lev, lat, lon]; no copy is made.

    Args:
        cube: Any dtype, one axis per name.
        axes: Names of its axes, a permutation of ``CANONICAL`` in which "batch" and "epoch" may be left out; the
            default is the layout [B, V, time, lat, lon, lev].

    Raises:
        ValueError: An unknown, repeated or missing name, or another number of names than axes.
    """
    names = tuple(axes)
    if len(names) != cube.ndim:
        raise ValueError(f"axes has {len(names)} names {names}, the cube has {cube.ndim} axes {tuple(cube.shape)}")
    if unknown := [n for n in names if n not in CANONICAL]:
        raise ValueError(f"axes holds {unknown}, expected names among {CANONICAL}")
    if len(set(names)) != len(names):
        raise ValueError(f"axes {names} names one axis twice")
    absent = [n for n in CANONICAL if n not in names]
    if lost := [n for n in absent if n not in MAY_BE_ABSENT]:
        raise ValueError(f"axes {names} lacks {lost}; only {MAY_BE_ABSENT} may be absent")
    for name in absent:
        cube = cube.unsqueeze(0)
        names = (name, *names)
    return cube.permute([names.index(n) for n in CANONICAL])


def from_canonical(cube: Tensor, axes: Sequence[str] = ORIGINAL) -> Tensor:
    """Inverse of ``to_canonical``: a view with the axes in the order of ``axes``; an axis left out must have size 1.

    Raises:
        ValueError: As ``to_canonical``, or a left-out axis of another size than 1.
    """
    if cube.ndim != len(CANONICAL):
        raise ValueError(f"cube has shape {tuple(cube.shape)}, expected seven axes {CANONICAL}")
    names: list[str] = list(CANONICAL)
    for name in CANONICAL:
        if name not in axes:
            place = names.index(name)
            if name not in MAY_BE_ABSENT or cube.shape[place] != 1:
                raise ValueError(f"axis {name!r} has size {cube.shape[place]} and is not in {tuple(axes)}")
            cube = cube.squeeze(place)
            names.remove(name)
    if sorted(axes) != sorted(names):
        raise ValueError(f"axes {tuple(axes)}, expected a permutation of {tuple(names)}")
    return cube.permute([names.index(n) for n in axes])
