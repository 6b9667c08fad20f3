"""Device functions that the convolution kernels share: where an output reads along one axis, and the fused epilogue.

An axis is described by one compile-time tuple AXIS = (kernel, stride, padding, dilation, mode). TRANSPOSED selects
the adjoint: the kernel
then walks the convolution's *input* positions and reads its outputs.
"""

import triton
import triton.language as tl


@triton.jit
def source(q, tap, size, AXIS: tl.constexpr, TRANSPOSED: tl.constexpr):
    """(row, inside) that position `q` reads through `tap` on an axis of `size` rows; `row` is only meaningful where
    `inside`."""
    if TRANSPOSED:
        shifted = q + AXIS[2] - tap * AXIS[3]
        if AXIS[4] == 1:  # circular, stride 1, output as long as the input: the adjoint wraps too
            row = tl.where(shifted < 0, shifted + size, tl.where(shifted >= size, shifted - size, shifted))
            inside = row == row
        else:
            if AXIS[1] == 1:
                row = shifted
                inside = (row >= 0) & (row < size)
            else:
                row = tl.maximum(shifted, 0) // AXIS[1]
                inside = (shifted >= 0) & (row < size) & (row * AXIS[1] == shifted)
    else:
        row = q * AXIS[1] + tap * AXIS[3] - AXIS[2]
        if AXIS[4] == 0:
            inside = (row >= 0) & (row < size)
        else:
            if AXIS[4] == 1:
                row = tl.where(row < 0, row + size, tl.where(row >= size, row - size, row))
            elif AXIS[4] == 2:
                row = tl.where(row < 0, -row, tl.where(row >= size, 2 * (size - 1) - row, row))
            else:
                row = tl.minimum(tl.maximum(row, 0), size - 1)
            inside = row == row
    return row, inside


@triton.jit
def first_tap(q, size, AXIS: tl.constexpr, TRANSPOSED: tl.constexpr):
    """First tap of position `q` that can reach a row. Taps in [first_tap, end_tap) of a strided adjoint still need
    `source`'s check."""
    if AXIS[4] != 0:
        return q * 0
    if TRANSPOSED:
        return tl.maximum(q + AXIS[2] - size * AXIS[1] + AXIS[3], 0) // AXIS[3]
    return tl.maximum(AXIS[2] - q * AXIS[1] + AXIS[3] - 1, 0) // AXIS[3]


@triton.jit
def end_tap(q, size, AXIS: tl.constexpr, TRANSPOSED: tl.constexpr):
    """One past the last tap of position `q` that can reach a row."""
    if AXIS[4] != 0:
        return q * 0 + AXIS[0]
    if TRANSPOSED:
        return tl.minimum(AXIS[0], (q + AXIS[2] + AXIS[3]) // AXIS[3])
    return tl.minimum(AXIS[0], tl.maximum(size - 1 + AXIS[2] - q * AXIS[1] + AXIS[3], 0) // AXIS[3])


@triton.jit
def product(a, b, acc, PRECISION: tl.constexpr):
    """acc + a b in fp32. "widened" serves the interpreter, whose dot takes bf16 numbers for integers."""
    if PRECISION == "widened":
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def activate(z, ACTIVATION: tl.constexpr):
    """silu(z) = z * sigmoid(z) for 1, the exact gelu(z) = z * Phi(z) for 2, else z; fp32."""
    if ACTIVATION == 1:
        return z * tl.sigmoid(z)
    if ACTIVATION == 2:
        return z * 0.5 * (1.0 + tl.erf(z * 0.70710678118654752))
    return z


@triton.jit
def finish(acc, y, kept, bias, offset, row_ok, channel, channel_ok, ACTIVATION: tl.constexpr, KEEP: tl.constexpr):
    """Adds the bias, keeps the sum for the backward if asked, activates and stores one [positions, channels] tile."""
    acc += tl.load(bias + channel, mask=channel_ok, other=0.0).to(tl.float32)[None, :]
    mask = row_ok[:, None] & channel_ok[None, :]
    if KEEP:
        tl.store(kept + offset, acc.to(kept.dtype.element_ty), mask=mask)
    tl.store(y + offset, activate(acc, ACTIVATION).to(y.dtype.element_ty), mask=mask)


@triton.jit
def outer_position(plane, N1, N2, N3):
    """(batch, q1, q2, q3) of a flat outer index."""
    q3 = plane % N3
    rest = plane // N3
    q2 = rest % N2
    rest = rest // N2
    return rest // N1, rest % N1, q2, q3
