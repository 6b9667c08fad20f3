"""Changes of training samples under which their labels stay true."""

import torch

from astrobiogen.training.batches import loading

_CUBE = "climate_datacube"


def roll_longitude(batch: loading.Batch) -> loading.Batch:
    """`batch` with each climate cube [B, ..., lon] turned by its own random number of columns around the rotation axis.

    Where longitude 0 lies is a convention: global means, budgets and the habitable area do not change. Draws from
    PyTorch's generator on the CPU, whose state is in every checkpoint, so that a resumed run turns alike.
    """
    cube = batch[_CUBE]
    columns = cube.shape[-1]
    shift = torch.randint(columns, (len(cube),))
    place = (torch.arange(columns) - shift[:, None]) % columns
    place = place.to(cube.device).view(len(cube), *[1] * (cube.ndim - 2), columns).expand_as(cube)
    return batch | {_CUBE: cube.gather(-1, place)}
