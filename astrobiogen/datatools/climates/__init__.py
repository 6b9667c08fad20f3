"""Climate files of any model: netCDF and Zarr in, fields on one grid in our units out; and planets' parameters."""
