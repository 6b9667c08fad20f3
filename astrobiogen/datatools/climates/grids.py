"""Grids and the way from one to another: conservative in area, linear in the logarithm of sigma, 12 parts of a year.

A field that is already on the target grid passes through unchanged, bit by bit.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
MONTHS = 12
# ExoPlaSim T21L10, the grid of the pack: mid points of its ten sigma layers, 32 Gaussian latitudes, 64 longitudes.
STANDARD_SIGMA = (0.0383, 0.1191, 0.21085, 0.31685, 0.4368, 0.5668, 0.69935, 0.82335, 0.9241, 0.9833)
_N_LATITUDES, _N_LONGITUDES = 32, 64
# degrees and sigma: the files hold float32, whose rounding is 7e-6 degrees at 90; a different grid differs by far more
SAME_DEGREES, SAME_SIGMA = 1e-3, 1e-3


@dataclass(frozen=True)
class Grid:
    """Coordinates: sigma levels from the top, latitudes from the north, longitudes eastward from 0, time steps."""

    levels: Floats
    latitudes: Floats
    longitudes: Floats
    months: int

    def same_map(self, other: Grid) -> bool:
        """True when both have the same latitudes and longitudes."""
        return _close(self.latitudes, other.latitudes, SAME_DEGREES) and _close(
            self.longitudes, other.longitudes, SAME_DEGREES
        )

    def same_levels(self, other: Grid) -> bool:
        """True when both have the same sigma levels."""
        return _close(self.levels, other.levels, SAME_SIGMA)


def _close(a: Floats, b: Floats, tolerance: float) -> bool:
    return a.shape == b.shape and bool(np.allclose(a, b, rtol=0.0, atol=tolerance))


def standard_grid() -> Grid:
    """32 Gaussian latitudes x 64 longitudes x 10 sigma levels x 12 times."""
    nodes, _ = np.polynomial.legendre.leggauss(_N_LATITUDES)
    latitudes = np.degrees(np.arcsin(nodes[::-1]))
    longitudes = np.arange(_N_LONGITUDES, dtype=np.float64) * (360.0 / _N_LONGITUDES)
    return Grid(np.array(STANDARD_SIGMA), latitudes, longitudes, MONTHS)


def latitude_edges(latitudes: Floats) -> Floats:
    """Edges [n + 1] in degrees: half way between neighbours, the poles at the ends; same direction as the input."""
    inner = (latitudes[1:] + latitudes[:-1]) / 2.0
    pole = 90.0 if latitudes[0] > latitudes[-1] else -90.0
    return np.concatenate([[pole], inner, [-pole]])


def longitude_edges(longitudes: Floats) -> Floats:
    """Edges [n + 1] in degrees of ascending longitudes within one turn: half way between neighbours, across 360 too."""
    after = np.append(longitudes[1:], longitudes[0] + 360.0)
    middle = (longitudes + after) / 2.0
    return np.concatenate([[middle[-1] - 360.0], middle])


def _overlap(low_a: Floats, high_a: Floats, low_b: Floats, high_b: Floats) -> Floats:
    """Lengths [a, b] of the intersections of intervals."""
    low, high = np.maximum(low_a[:, None], low_b[None]), np.minimum(high_a[:, None], high_b[None])
    return np.maximum(high - low, 0.0)


def latitude_matrix(source: Floats, target: Floats) -> Floats:
    """Weights [target, source], rows of sum 1: shares of each target band's area (differences of the sine of
    latitude).
    """
    a, b = (np.sin(np.radians(latitude_edges(x))) for x in (target, source))
    share = _overlap(np.minimum(a[1:], a[:-1]), np.maximum(a[1:], a[:-1]), np.minimum(b[1:], b[:-1]),
                     np.maximum(b[1:], b[:-1]))  # fmt: skip
    return share / share.sum(axis=1, keepdims=True)


def longitude_matrix(source: Floats, target: Floats) -> Floats:
    """Weights [target, source], rows of sum 1: shares of each target sector's width, around the circle."""
    a, b = longitude_edges(target), longitude_edges(source)
    share = sum(_overlap(a[:-1], a[1:], b[:-1] + turn, b[1:] + turn) for turn in (-360.0, 0.0, 360.0))
    total = np.asarray(share)
    return total / total.sum(axis=1, keepdims=True)


def regrid(field: Floats, source: Grid, target: Grid) -> Floats:
    """First-order conservative regridding of the last two axes (lat, lon); the area mean is kept to rounding.

    Args:
        field: [..., lat, lon] on ``source``, finite.
        source, target: Latitudes from the north, longitudes ascending from 0.

    Returns:
        Floats: [..., lat, lon] on ``target``; ``field`` itself when both grids are the same.
    """
    if source.same_map(target):
        return field
    rows = latitude_matrix(source.latitudes, target.latitudes)
    columns = longitude_matrix(source.longitudes, target.longitudes)
    return np.asarray(rows @ field @ columns.T)


def interpolate_levels(field: Floats, sigma: Floats, target: Floats) -> Floats:
    """Column by column, linear in ln(sigma); constant beyond the first and last level.

    Args:
        field: [T, L, lat, lon], levels from the top. NaN is allowed in the lowest levels of a column (below the ground,
            as models on pressure levels mark it): there the lowest known value is used.
        sigma: Pressure over surface pressure, [L] or [T, L, lat, lon], ascending along L, > 0.
        target: [K] ascending.

    Returns:
        Floats: [T, K, lat, lon]; NaN only where a column holds NaN elsewhere than at its lower end.
    """
    steps, levels, *_ = field.shape
    filled = field.copy()
    for k in range(1, levels):
        below = np.isnan(filled[:, k]) & np.isnan(field[:, k:]).all(axis=1)
        filled[:, k] = np.where(below, filled[:, k - 1], filled[:, k])
    x = np.log(np.broadcast_to(sigma if sigma.ndim == 4 else sigma[None, :, None, None], field.shape))
    out = np.empty((steps, target.size, *field.shape[2:]))
    for k, wanted in enumerate(np.log(target)):
        upper = np.clip((x <= wanted).sum(axis=1, keepdims=True), 1, levels - 1)
        x0, x1, y0, y1 = (np.take_along_axis(a, i, axis=1) for a in (x, filled) for i in (upper - 1, upper))
        out[:, k : k + 1] = y0 + np.clip((wanted - x0) / (x1 - x0), 0.0, 1.0) * (y1 - y0)
    return out


def time_matrix(steps: int, bins: int = MONTHS) -> Floats:
    """Weights [bins, steps], rows of sum 1: ``steps`` equal parts of the period to ``bins`` equal parts, by overlap."""
    a, b = np.linspace(0.0, 1.0, bins + 1), np.linspace(0.0, 1.0, steps + 1)
    share = _overlap(a[:-1], a[1:], b[:-1], b[1:])
    return share / share.sum(axis=1, keepdims=True)


def month_matrix(months: NDArray[np.integer]) -> Floats:
    """Weights [12, steps], rows of sum 1: the mean over all steps of each calendar month (1 to 12), over all years.

    Raises:
        ValueError: A month has no step.
    """
    hit = np.arange(1, MONTHS + 1)[:, None] == np.asarray(months)[None]
    if not hit.any(axis=1).all():
        raise ValueError(f"calendar months {(np.flatnonzero(~hit.any(axis=1)) + 1).tolist()} have no time step")
    return hit / hit.sum(axis=1, keepdims=True)
