"""Global-mean water and energy budgets of an atmosphere on a sigma-level, latitude, longitude grid."""

from collections.abc import Sequence

import torch

from astrobiogen.models.common import HoldsConstants, at_least_float32, check_axes, require

HEAT_CAPACITY = 1004.64  # J kg⁻¹ K⁻¹, dry air at constant pressure
LATENT_HEAT = 2.501e6  # J kg⁻¹, vaporisation of water at 0 °C
AXES = ("batch", "variable", "climate_time", "geological_time", "lev", "lat", "lon")


class AtmosphereBudgets(HoldsConstants):
    """Budgets of standardised fields [B, V, months, epochs, lev, lat, lon] that hold temperature and specific humidity.

    With area weight a = (sin φ_north − sin φ_south) / 2 per row, spread evenly over longitude, and layer mass
    m = p_s Δσ / g (kg m⁻²), per month and epoch:

        water  W = Σ a m q                      kg m⁻²
        energy E = Σ a m (c_p T + L_v q)        J m⁻²   (enthalpy and latent heat; potential energy is left out)

    A field conserves relative to a reference if W and E agree with the reference's in every month and epoch; without
    a reference, if they are the same in every month (an isolated atmosphere). Violations are squared differences in
    units of the change that one standard deviation in every cell would make, so they have no unit and do not depend
    on p_s or g.

    Args:
        variables: names along the variable axis; "ta" (K) and "hus" (kg kg⁻¹) must be among them.
        level_bounds: σ at layer interfaces [lev + 1].
        latitude_bounds: degrees [lat + 1], in either direction.
        n_longitudes: evenly spaced columns.
        mean: [V][lev] subtracted by the standardisation.
        std: [V][lev] divided by it.
        surface_pressure: p_s in Pa.
        gravity: g in m s⁻².

    Raises:
        ValueError: a variable is missing or a list has the wrong length.
    """

    water_weight: torch.Tensor
    heat_weight: torch.Tensor
    dry_limit: torch.Tensor
    water_mean: torch.Tensor
    heat_mean: torch.Tensor
    water_scale: torch.Tensor
    energy_scale: torch.Tensor

    def __init__(
        self,
        variables: Sequence[str],
        level_bounds: Sequence[float],
        latitude_bounds: Sequence[float],
        n_longitudes: int,
        mean: Sequence[Sequence[float]],
        std: Sequence[Sequence[float]],
        surface_pressure: float = 1.0e5,
        gravity: float = 9.81,
    ) -> None:
        super().__init__()
        for name in ("ta", "hus"):
            require(name in variables, f"variables must contain {name!r} for the budgets, got {tuple(variables)}")
        self.temperature, self.humidity = list(variables).index("ta"), list(variables).index("hus")
        thickness = torch.tensor(level_bounds, dtype=torch.float64, device="cpu").diff().abs()
        self.sizes = {
            "variable": len(variables), "lev": len(thickness), "lat": len(latitude_bounds) - 1, "lon": n_longitudes
        }  # fmt: skip
        for name, table in (("mean", mean), ("std", std)):
            shape = (len(table), len(table[0]))
            expected = (len(variables), len(thickness))
            require(shape == expected, f"{name} must be [variable][lev] = {expected}, got {shape}")
        area = area_weights(latitude_bounds)
        layer_mass = surface_pressure / gravity * thickness
        column = (layer_mass[:, None, None] * area[None, :, None] / n_longitudes).expand(-1, -1, n_longitudes)
        spread, centre = (torch.tensor(table, dtype=torch.float64, device="cpu") for table in (std, mean))
        water = column * spread[self.humidity][:, None, None]
        heat = column * HEAT_CAPACITY * spread[self.temperature][:, None, None]
        self.hold("water_weight", water.flatten())
        self.hold("heat_weight", heat.flatten())
        self.hold("dry_limit", centre[self.humidity] / spread[self.humidity])
        self.hold("water_mean", (layer_mass * centre[self.humidity]).sum())
        self.hold("heat_mean", (layer_mass * HEAT_CAPACITY * centre[self.temperature]).sum())
        self.hold("water_scale", water.sum())
        self.hold("energy_scale", heat.sum() + LATENT_HEAT * water.sum())

    def budgets(self, field: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Water [B, months, epochs] in kg m⁻² and energy [B, months, epochs] in J m⁻² of a standardised field."""
        water, energy = self.anomaly(field)
        return water + self.water_mean, energy + self.heat_mean + LATENT_HEAT * self.water_mean

    def anomaly(self, field: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Budgets less those of the mean field; linear in `field`, so differences lose no digits."""
        check_axes("field", field, AXES, self.sizes)
        levels, rows = self.sizes["lev"], self.sizes["lat"]
        exact = torch.promote_types(field.dtype, torch.float32)  # sums of 20,000 cells need fp32
        water, heat = (
            # the weights are the same along a row: one pass of plain sums, then products of a 64th of the size
            (field[:, variable].sum(-1, dtype=exact) * weight.view(levels, rows, -1)[..., 0]).sum((-2, -1))
            for variable, weight in ((self.humidity, self.water_weight), (self.temperature, self.heat_weight))
        )
        return water, heat + LATENT_HEAT * water

    def violations(
        self, field: torch.Tensor, reference: torch.Tensor | None = None, epoch_mask: torch.Tensor | None = None
    ) -> dict[str, torch.Tensor]:
        """Squared relative budget differences, [B] each, mean over months and over the epochs in `epoch_mask` (bool
        [B, epochs]).

        Args:
            field: standardised, differentiable.
            reference: standardised field to agree with; None compares each month with the field's own annual mean.
            epoch_mask: epochs that exist; default all.

        Returns:
            ``water``, ``energy`` and ``negative_humidity`` (mass of negative vapour, which no atmosphere holds,
            relative to the same scale as ``water``).
        """
        if reference is None:
            water, energy = (budget - budget.mean(1, keepdim=True) for budget in self.anomaly(field))
        else:
            water, energy = self.anomaly(field - reference)
        humidity = at_least_float32(field[:, self.humidity]) + self.dry_limit[:, None, None]
        missing = humidity.clamp(max=0.0).flatten(3) @ self.water_weight
        return {
            "water": over_epochs((water / self.water_scale).square(), epoch_mask),
            "energy": over_epochs((energy / self.energy_scale).square(), epoch_mask),
            "negative_humidity": over_epochs((missing / self.water_scale).square(), epoch_mask),
        }


def area_weights(latitude_bounds: Sequence[float]) -> torch.Tensor:
    """Share of the sphere's area in each latitude row, |Δ sin φ| / Σ, float64 [lat] on the CPU; bounds in degrees."""
    sines = torch.deg2rad(torch.tensor(latitude_bounds, dtype=torch.float64, device="cpu")).sin()
    area = sines.diff().abs()
    return area / area.sum()


def over_epochs(values: torch.Tensor, epoch_mask: torch.Tensor | None) -> torch.Tensor:
    """Mean over months and existing epochs of [B, months, epochs]; 0 for a sample without epochs."""
    per_epoch = values.mean(1)
    if epoch_mask is None:
        return per_epoch.mean(1)
    weights = epoch_mask.to(per_epoch.dtype)
    return (per_epoch * weights).sum(1) / weights.sum(1).clamp(min=1.0)
