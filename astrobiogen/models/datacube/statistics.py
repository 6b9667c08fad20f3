"""Area-weighted distributions of a climate cube: how much of the globe and year is warmer or moister than a threshold.

Few planets teach a convolution the pattern of each planet. The share of area and time above a threshold stays the same
when the pattern is turned, mirrored or shifted in time, and is what melting, freezing or growth depend on.
"""

from collections.abc import Sequence

import torch

from astrobiogen.models.common import HoldsConstants, at_least_float32, check_axes, require
from astrobiogen.models.datacube.physics import AXES, area_weights

FLOOR = 0.02  # smallest share that is told from none: 2 % of area and time


class ClimateStatistics(HoldsConstants):
    """Standardised cube [B, V, climate_time, geological_time, lev, lat, lon] -> log odds [B, v, levels, K] of the
    shares of area and time above K thresholds: v of the variables, lowest levels, last epoch.

    With thresholds e_k = low + k d, d = (high − low) / (K − 1), the area weight a of a row (Σ a = 1) and the mean over
    months and longitudes,

        s_k = mean Σ a(lat) clamp((x − e_k) / 2d + 1/2, 0, 1),     out_k = ln((s_k + ε) / (1 − s_k + ε)) / 2,

    where x is first cut off at low and high and ε = 0.02. s is continuous in x, and NaN where any of its x is. An
    absent epoch gives zeros. Nothing here is learned, and no gradient flows to the cube.

    Args:
        latitude_bounds: degrees [lat + 1].
        variables: positions of the v variables along the cube's axis.
        levels: how many of the lowest levels.
        thresholds: K, at least 2.
        limits: (low, high) in standard deviations.

    Raises:
        ValueError: fewer than 2 thresholds, no level, or limits in the wrong order.
    """

    row_weights: torch.Tensor

    def __init__(
        self,
        latitude_bounds: Sequence[float],
        variables: Sequence[int],
        levels: int = 1,
        thresholds: int = 16,
        limits: tuple[float, float] = (-2.5, 3.0),
    ) -> None:
        super().__init__()
        require(thresholds >= 2, f"thresholds must be at least 2, got {thresholds}")
        require(levels >= 1, f"levels must be at least 1, got {levels}")
        require(limits[0] < limits[1], f"limits must be (low, high) with low < high, got {limits}")
        self.variables, self.levels, self.thresholds, self.limits = list(variables), levels, thresholds, limits
        self.hold("row_weights", area_weights(latitude_bounds))

    @torch.no_grad()
    def forward(self, cube: torch.Tensor, epoch_mask: torch.Tensor) -> torch.Tensor:
        """Log odds of the shares of `cube`, fp32 [B, v, levels, K].

        Args:
            cube: [B, V, climate_time, geological_time, lev, lat, lon], standardised.
            epoch_mask: bool [B, geological_time].
        """
        check_axes("cube", cube, AXES, {"lat": self.row_weights.numel()})
        share = self.shares(at_least_float32(cube[:, self.variables, :, -1, -self.levels :]))
        odds = ((share + FLOOR) / (1.0 - share + FLOOR)).log() / 2
        return torch.where(epoch_mask[:, -1, None, None, None], odds, 0.0)

    def shares(self, field: torch.Tensor) -> torch.Tensor:
        """s [B, v, levels, K] of `field` [B, v, months, levels, lat, lon]."""
        batch, variables, months, levels, _, columns = field.shape
        low, high = self.limits
        # Each value is split between the two nearest of K cells; sums over the cells above make that cumulative.
        place = ((field - low) * ((self.thresholds - 1) / (high - low))).clamp(0.0, self.thresholds - 1)
        # A NaN is no cell's number: it is counted in the uppermost ones, from where it reaches every sum.
        lower = place.floor().clamp_(max=self.thresholds - 2).nan_to_num_(self.thresholds - 2)
        upper_part = place - lower
        weights = (self.row_weights / (months * columns))[:, None]
        first = torch.arange(batch * variables * levels, device=field.device) * self.thresholds
        index = (lower.long() + first.view(batch, variables, 1, levels, 1, 1)).flatten()
        cells = field.new_zeros(batch * variables * levels * self.thresholds)
        cells = cells.scatter_add(0, index, ((1.0 - upper_part) * weights).flatten())
        cells = cells.scatter_add(0, index + 1, (upper_part * weights).flatten())
        cells = cells.view(batch, variables, levels, self.thresholds)
        return cells.flip(-1).cumsum(-1).flip(-1) - 0.5 * cells
