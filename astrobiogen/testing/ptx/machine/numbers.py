"""Number formats that NumPy lacks, and rounding as the hardware does it."""

import numpy as np

TF32_DROPPED = np.uint32(0x1FFF)  # mantissa bits that a tensor core does not read


def from_bf16(bits: np.ndarray) -> np.ndarray:
    """uint16 bits to fp32."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def to_bf16(values: np.ndarray) -> np.ndarray:
    """fp32 to uint16 bits, to the nearest, ties to even; NaN to the canonical one."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    even = (bits >> np.uint32(16)) & np.uint32(1)
    rounded = ((bits + np.uint32(0x7FFF) + even) >> np.uint32(16)).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FFF), rounded)


def from_f16(bits: np.ndarray) -> np.ndarray:
    """uint16 bits to fp32."""
    return bits.view(np.float16).astype(np.float32)


def to_f16(values: np.ndarray) -> np.ndarray:
    """fp32 to uint16 bits, to the nearest, ties to even."""
    return values.astype(np.float16).view(np.uint16)


def to_tf32(bits: np.ndarray) -> np.ndarray:
    """fp32 bits rounded to the nearest TF32, ties away from zero."""
    special = (bits & np.uint32(0x7F800000)) == np.uint32(0x7F800000)
    return np.where(special, bits, (bits + np.uint32(0x1000)) & ~TF32_DROPPED)


def fused(x: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
    """x y + z of fp32 numbers, rounded from fp64: the product is exact there, so that all but ties of the last bit
    are rounded once."""
    return (x.astype(np.float64) * y.astype(np.float64) + z.astype(np.float64)).astype(np.float32)


HALF_FORMATS = {"bf16": (from_bf16, to_bf16), "f16": (from_f16, to_f16)}


def halves(bits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(low, high) uint16 of uint32."""
    return bits.astype(np.uint16), (bits >> np.uint32(16)).astype(np.uint16)


def pair(low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """uint32 of two uint16."""
    return low.astype(np.uint32) | (high.astype(np.uint32) << np.uint32(16))
