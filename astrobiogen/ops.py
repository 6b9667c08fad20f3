"""The catalogue of operators: every public function of `astrobiogen.kernels`, one line each."""

from astrobiogen.kernels.rms_norm.op import add_rms_norm as add_rms_norm
from astrobiogen.kernels.rms_norm.op import rms_norm as rms_norm
