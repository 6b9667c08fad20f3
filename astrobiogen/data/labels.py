"""The target S = habitat x viability, from label-segment surface fields, a measured growth range and a flux-balance
gate.

For planet p, epoch k and organism o, with surface temperature ts [K] and sea-ice cover sic [1] of the *later* segment,

    S = gate(o, p, k) * sum_t sum_ij w_i [ts_tij >= 273.15] [sic_tij < 0.5] [tmin_o <= ts_tij - 273.15 <= tmax_o] / T,

w_i = (sin(north bound) - sin(south bound)) / (2 n_lon). Liquid water thus means: above the melting point of fresh
water and less than half covered by sea ice; it does not look at soil moisture, pressure or salinity.

The growth range is the observed one of Corkrey et al. 2016 where at least three growth rates span a range; otherwise
[OGT - 22, OGT + 8] degrees C around the optimum growth temperature of Engqvist 2018. The half widths are a rule of
thumb (growth is lost faster above the optimum than below); organisms with neither are dropped, not guessed.

The gate is 1 when the network grows (objective > 1e-6) with the uptake of O2 closed where the atmosphere holds none;
N2 and CO2 are in every atmosphere of the set, and trace gases (H2, CH4, H2S, CO), of which the climate model knows
nothing, stay as in the published medium.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

MELTING_POINT = 273.15  # K
ICE_LIMIT = 0.5  # cover from which a cell counts as ice
BELOW_OPTIMUM, ABOVE_OPTIMUM = 22.0, 8.0  # degrees C
CLASS_THRESHOLD = 0.10  # a tenth of the surface-time
MIN_GROWTH_OBSERVATIONS = 3
O2_TRACE = 1e-4  # bar; below it the atmosphere counts as free of O2


def growth_range(ogt: float, observations: int, tmin: float, tmax: float) -> tuple[float, float] | None:
    """Growth range (tmin, tmax) in degrees C, or None when it is unknown.

    Args:
        ogt: Optimum growth temperature in degrees C, NaN if unknown.
        observations, tmin, tmax: Number of measured growth rates > 0 and their temperature range in degrees C, NaN if
            unknown.
    """
    if observations >= MIN_GROWTH_OBSERVATIONS and tmax > tmin:
        return float(tmin), float(tmax)
    if np.isfinite(ogt):
        return float(ogt) - BELOW_OPTIMUM, float(ogt) + ABOVE_OPTIMUM
    return None


def latitude_weights(bounds: NDArray[np.float64]) -> NDArray[np.float64]:
    """Area weights [lat], sum 1, from latitude bounds [lat + 1] in degrees: differences of the sine."""
    edges = np.sin(np.radians(bounds))
    return np.abs(np.diff(edges)) / np.abs(edges[-1] - edges[0])


def niche_fraction(
    ts: NDArray[np.floating], sic: NDArray[np.floating], weights: NDArray[np.float64], low: float, high: float
) -> float:
    """Area-time fraction in [0, 1] with liquid water and ``low <= ts - 273.15 <= high``.

    Args:
        ts, sic: [T, lat, lon], kelvin and fraction.
        weights: [lat], sum 1.
        low, high: Degrees C.
    """
    celsius = ts.astype(np.float64) - MELTING_POINT
    good = (celsius >= 0.0) & (sic < ICE_LIMIT) & (celsius >= low) & (celsius <= high)
    return float(good.mean(axis=(0, 2)) @ weights)


def gate(grows: bool, grows_without_o2: bool, p_o2: float) -> float:
    """1.0 when the organism's network grows in the atmosphere, else 0.0; ``p_o2`` in bar."""
    return float(grows if p_o2 > O2_TRACE else grows_without_o2)
