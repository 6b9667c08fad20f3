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
def rounded_to_tf32(x):
    """fp32 `x` rounded to the nearest TF32, ties away from zero; NaN and infinities stay."""
    return tl.inline_asm_elementwise("cvt.rna.tf32.f32 $0, $1;", "=r,r", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def product(a, b, acc, PRECISION: tl.constexpr):
    """acc + a b in fp32. "widened" serves the interpreter, whose dot takes bf16 numbers for integers; "tf32" rounds the
    operands to the 10 bits of a tensor core's mantissa, which else drops the others: twice the error, all to one side.
    """
    if PRECISION == "widened":
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    if PRECISION == "tf32":
        a = rounded_to_tf32(a)
        b = rounded_to_tf32(b)
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
def activation_slope(z, ACTIVATION: tl.constexpr):
    """Derivative of `activate` at `z`; fp32."""
    if ACTIVATION == 1:
        s = tl.sigmoid(z)
        return s + s * (1.0 - s) * z
    if ACTIVATION == 2:
        phi = tl.exp(-0.5 * z * z) * 0.39894228040143268
        return 0.5 * (1.0 + tl.erf(z * 0.70710678118654752)) + z * phi
    return z * 0.0 + 1.0


@triton.jit
def channel_statistics(z, channel_ok, C: tl.constexpr, eps, NORM: tl.constexpr):
    """(normalised, mean, 1 / deviation) of rows z [positions, channels] fp32 for NORM 1 (RMS, mean 0) or 2 (layer);
    absent channels give 0."""
    value = tl.where(channel_ok[None, :], z, 0.0)
    mean = tl.sum(value, 1) * 0.0
    if NORM == 2:
        mean = tl.sum(value, 1) / C
        value = tl.where(channel_ok[None, :], z - mean[:, None], 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(value * value, 1) / C + eps)
    return value * rstd[:, None], mean, rstd


@triton.jit
def finish(
    acc, y, kept, bias, gamma, beta, mean, rstd, eps, row, row_ok, tile, channel, channel_ok,
    C: tl.constexpr, NORM: tl.constexpr, ACTIVATION: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    """Adds the bias, keeps the sum for the backward if asked, normalises, activates and stores one [positions,
    channels] tile of rows y [positions, C].

    NORM 1 and 2 need all channels in the tile and store mean and rstd per position if KEEP. NORM 3 (group) stores the
    sum as it is, and this tile's mean and sum of squared deviations per channel to mean, rstd [tiles, C].
    """
    acc += tl.load(bias + channel, mask=channel_ok, other=0.0).to(tl.float32)[None, :]
    mask = row_ok[:, None] & channel_ok[None, :]
    offset = row[:, None] * C + channel[None, :]
    if KEEP:
        tl.store(kept + offset, acc.to(kept.dtype.element_ty), mask=mask)
    if NORM == 3:
        count = tl.sum(row_ok.to(tl.float32), 0)
        center = tl.sum(tl.where(mask, acc, 0.0), 0) / count
        deviation = tl.where(mask, acc - center[None, :], 0.0)
        tl.store(mean + tile * C + channel, center, mask=channel_ok)
        tl.store(rstd + tile * C + channel, tl.sum(deviation * deviation, 0), mask=channel_ok)
        if not KEEP:
            tl.store(y + offset, acc.to(y.dtype.element_ty), mask=mask)
    else:
        if NORM != 0:
            acc, center, inverse = channel_statistics(acc, channel_ok, C, eps, NORM)
            if KEEP:
                if NORM == 2:
                    tl.store(mean + row, center, mask=row_ok)
                tl.store(rstd + row, inverse, mask=row_ok)
            acc *= tl.load(gamma + channel, mask=channel_ok, other=0.0).to(tl.float32)[None, :]
            acc += tl.load(beta + channel, mask=channel_ok, other=0.0).to(tl.float32)[None, :]
        tl.store(y + offset, activate(acc, ACTIVATION).to(y.dtype.element_ty), mask=mask)


@triton.jit
def outer_position(plane, N1, N2, N3):
    """(batch, q1, q2, q3) of a flat outer index."""
    q3 = plane % N3
    rest = plane // N3
    q2 = rest % N2
    rest = rest // N2
    return rest // N1, rest % N1, q2, q3
