"""Tables of cos and sin for `rope`: the plain frequencies, four ways to stretch them over a longer context, and
look-up by position.

Pair i of r rotary columns turns by  position * f_i  radians,  f_i = base^(-2i / r)  per token (Su et al. 2021,
arXiv:2104.09864). The scaled
variants change f_i only (YaRN also multiplies cos and sin), so every one of them serves the same kernel. Angles are
taken in fp64 and rounded once:
at position 100,000 an fp32 product is already wrong by 0.004 radians.
"""

import math

import torch

from astrobiogen.kernels.checks import (
    FLOAT_DTYPES,
    INT32_SAFE,
    check_int,
    check_same_device,
    check_same_dtype,
    check_tensor,
)
from astrobiogen.kernels.values import has_values

_INTEGERS = (torch.int32, torch.int64)
# An angle is a product in fp64, so at position p it is off by up to p / 2^53 turns of one radian: here 1e-7, the
# rounding of cos and sin in fp32.
MAX_POSITION = 2**30
MAX_ROTARY = 2**16
# Entries of a table: 8 GiB of angles in fp64.
MAX_ENTRIES = 2**30

Tables = tuple[torch.Tensor, torch.Tensor]


def rope_frequencies(
    length: int,
    rotary: int,
    *,
    base: float = 10000.0,
    offset: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> Tables:
    """cos and sin of the plain rotary embedding: f_i = base^(-2i / rotary), arXiv:2104.09864.

    Args:
        length: number of positions S, >= 0; offset + length <= 2^30.
        rotary: rotary columns r of a head, even, in [2, 2^16]; smaller than the head dimension for partial rotary.
        base: > 1; 10,000 in the original, 500,000 in Llama 3.
        offset: position of the first row (tokens that are already in a cache), >= 0.
        dtype: of the result; float32 is right for half-precision models too.
        device: of the result.

    Returns:
        (cos, sin), each [S, r/2]; no gradient.

    Raises:
        TypeError: `dtype` is not a floating-point dtype that the ops take, or an integer argument is no integer.
        ValueError: a number is out of its range.
    """
    frequencies = _plain(rotary, base, device)
    return _tables(frequencies, length, offset, 1.0, dtype)


def rope_frequencies_linear(
    length: int,
    rotary: int,
    *,
    factor: float,
    base: float = 10000.0,
    offset: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> Tables:
    """Position interpolation: f_i = base^(-2i / rotary) / factor (Chen et al. 2023, arXiv:2306.15595).

    Args:
        factor: new context over trained context, >= 1. The others as in `rope_frequencies`.

    Returns:
        (cos, sin), each [S, r/2].

    Raises:
        TypeError, ValueError: as in `rope_frequencies`.
    """
    _check_factor(factor)
    return _tables(_plain(rotary, base, device) / factor, length, offset, 1.0, dtype)


def rope_frequencies_dynamic_ntk(
    length: int,
    rotary: int,
    *,
    factor: float,
    original_length: int,
    base: float = 10000.0,
    offset: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> Tables:
    """Dynamic NTK-aware scaling: the base grows with the context in use (bloc97 and emozilla 2023; arXiv:2309.00071,
    section 3.1).

    base' = base * (factor * L / original_length - (factor - 1))^(rotary / (rotary - 2)),  L = max(offset + length,
    original_length); f_i from base'.

    Args:
        factor: >= 1. original_length: context of the training, >= 1. rotary: >= 4 here. The others as in
            `rope_frequencies`.

    Returns:
        (cos, sin), each [S, r/2]; up to `original_length` they are the plain ones.

    Raises:
        TypeError, ValueError: as in `rope_frequencies`.
    """
    _check_factor(factor)
    original_length = check_int("original_length", original_length, 1)
    rotary = check_int("rotary", rotary, 4, MAX_ROTARY)
    length, offset = _positions(length, offset)
    longest = max(offset + length, original_length)
    stretch = (factor * longest / original_length - (factor - 1.0)) ** (rotary / (rotary - 2))
    return _tables(_plain(rotary, base * stretch, device), length, offset, 1.0, dtype)


def rope_frequencies_yarn(
    length: int,
    rotary: int,
    *,
    factor: float,
    original_length: int,
    beta_fast: float = 32.0,
    beta_slow: float = 1.0,
    mscale: float | None = None,
    mscale_all_dim: float | None = None,
    base: float = 10000.0,
    offset: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> Tables:
    """YaRN (Peng et al. 2023, arXiv:2309.00071): interpolate slow pairs, keep fast ones, and sharpen attention through
    cos and sin.

    A pair that turns t times within `original_length` keeps its frequency for t >= beta_fast, has it divided by
    `factor` for t <= beta_slow, and
    lies on a linear ramp over the pair index between (bounds rounded outwards to whole pairs). cos and sin are
    multiplied by m(1) with
    m(s) = 0.1 s ln(factor) + 1, or by m(mscale) / m(mscale_all_dim) where both are given (DeepSeek).

    Args:
        factor: >= 1. original_length: context of the training, >= 1.
        beta_fast, beta_slow: turns, beta_fast >= beta_slow > 0.
        mscale, mscale_all_dim: > 0, both or neither. The others as in `rope_frequencies`.

    Returns:
        (cos, sin), each [S, r/2], times the attention factor.

    Raises:
        TypeError, ValueError: as in `rope_frequencies`.
    """
    _check_factor(factor)
    original_length = check_int("original_length", original_length, 1)
    if not 0.0 < beta_slow <= beta_fast:
        raise ValueError(f"beta_slow must be in (0, beta_fast = {beta_fast!r}], got {beta_slow!r}")
    if (mscale is None) != (mscale_all_dim is None):
        raise ValueError(
            f"mscale and mscale_all_dim go together, got mscale={mscale!r} and mscale_all_dim={mscale_all_dim!r}"
        )
    rotary = check_int("rotary", rotary, 2, MAX_ROTARY)
    plain = _plain(rotary, base, device)

    def pair(turns: float) -> float:
        return rotary * math.log(original_length / (turns * 2.0 * math.pi)) / (2.0 * math.log(base))

    low = max(math.floor(pair(beta_fast)), 0)
    high = min(math.ceil(pair(beta_slow)), rotary - 1)
    width = max(high - low, 0.001)  # a ramp of no width is a step
    ramp = ((torch.arange(rotary // 2, dtype=torch.float64, device=device) - low) / width).clamp(0.0, 1.0)
    scale = _attention_factor(factor, mscale, mscale_all_dim)
    return _tables(plain / factor * ramp + plain * (1.0 - ramp), length, offset, scale, dtype)


def rope_frequencies_llama3(
    length: int,
    rotary: int,
    *,
    factor: float = 8.0,
    low_frequency_factor: float = 1.0,
    high_frequency_factor: float = 4.0,
    original_length: int = 8192,
    base: float = 500000.0,
    offset: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> Tables:
    """Llama 3.1's scaling (Meta, llama-models, `apply_scaling`).

    With t = original_length * f / (2 pi) turns within the trained context: f stays for t > high_frequency_factor,
    becomes f / factor for
    t < low_frequency_factor, and is ((1 - w) / factor + w) f between, w = (t - low) / (high - low).

    Args:
        factor: >= 1. original_length: >= 1. low_frequency_factor, high_frequency_factor: turns, 0 < low < high.
        The others as in `rope_frequencies`.

    Returns:
        (cos, sin), each [S, r/2].

    Raises:
        TypeError, ValueError: as in `rope_frequencies`.
    """
    _check_factor(factor)
    original_length = check_int("original_length", original_length, 1)
    if not 0.0 < low_frequency_factor < high_frequency_factor:
        raise ValueError(
            f"low_frequency_factor must be in (0, high_frequency_factor = {high_frequency_factor!r}), "
            f"got {low_frequency_factor!r}"
        )
    plain = _plain(rotary, base, device)
    turns = plain * (original_length / (2.0 * math.pi))
    weight = ((turns - low_frequency_factor) / (high_frequency_factor - low_frequency_factor)).clamp(0.0, 1.0)
    return _tables(((1.0 - weight) / factor + weight) * plain, length, offset, 1.0, dtype)


def rope_gather(cos: torch.Tensor, sin: torch.Tensor, position_ids: torch.Tensor) -> Tables:
    """Rows of the tables at given positions, ready for `rope`.

    Args:
        cos: [L, r/2]. sin: shape, dtype and device of `cos`.
        position_ids: [S] or [B, S], int32 or int64 in [0, L), on the device of `cos`. For packed sequences:
            `rope_positions`.

    Returns:
        (cos[position_ids], sin[position_ids]), each [S, r/2] or [B, S, r/2].

    Raises:
        TypeError: `position_ids` is not int32 or int64.
        ValueError: a shape or device does not fit.
        IndexError: a position is outside [0, L); checked on the CPU, where it costs no synchronisation. CUDA asserts
            on the device.
    """
    check_tensor("cos", cos)
    check_tensor("sin", sin)
    check_tensor("position_ids", position_ids)
    check_same_dtype(cos=cos, sin=sin)
    check_same_device(cos=cos, sin=sin, position_ids=position_ids)
    if cos.dim() != 2 or cos.shape != sin.shape:
        raise ValueError(f"cos and sin must both have shape [L, r/2], got {tuple(cos.shape)} and {tuple(sin.shape)}")
    _check_integers("position_ids", position_ids)
    if position_ids.dim() not in (1, 2):
        raise ValueError(f"position_ids must have shape [S] or [B, S], got {tuple(position_ids.shape)}")
    if _values_are_cheap(position_ids) and position_ids.numel() > 0:
        low, high = (int(bound) for bound in torch.aminmax(position_ids))
        if low < 0 or high >= cos.shape[0]:
            raise IndexError(
                f"position_ids must be in [0, {cos.shape[0]}), the rows of cos, got values from {low} to {high}"
            )
    return cos[position_ids], sin[position_ids]


def rope_positions(cu_seqlens: torch.Tensor, length: int) -> torch.Tensor:
    """Position of every token inside its own sequence, for sequences packed end to end.

    Token t of sequence n (cu_seqlens[n] <= t < cu_seqlens[n + 1]) gets t - cu_seqlens[n]; tokens after the last
    boundary (padding) count on from it.

    Args:
        cu_seqlens: [sequences + 1], int32 or int64: 0, then the running sum of the sequence lengths.
        length: number of tokens, padding included, >= cu_seqlens[-1].

    Returns:
        [length] int64 on the device of `cu_seqlens`.

    Raises:
        TypeError: `cu_seqlens` is not int32 or int64.
        ValueError: it is not [n] with n >= 1, or (checked on the CPU only) it does not rise from 0 to at most `length`.
    """
    check_tensor("cu_seqlens", cu_seqlens)
    _check_integers("cu_seqlens", cu_seqlens)
    length = check_int("length", length, 0, INT32_SAFE)
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 1:
        raise ValueError(f"cu_seqlens must have shape [sequences + 1], got {tuple(cu_seqlens.shape)}")
    if _values_are_cheap(cu_seqlens):
        bounds = cu_seqlens.tolist()
        if bounds[0] != 0 or bounds[-1] > length or sorted(bounds) != bounds:
            raise ValueError(
                f"cu_seqlens must rise from 0 to at most length = {length}, got {bounds[:8]} ... {bounds[-1]}"
            )
    tokens = torch.arange(length, dtype=torch.int64, device=cu_seqlens.device)
    starts = cu_seqlens.to(torch.int64)
    begun = starts.new_zeros(length + 1).scatter_add(0, starts, torch.ones_like(starts)).cumsum(0)[:length]
    return tokens - starts[begun - 1]  # sequences begun at or before each token


def _plain(rotary: int, base: float, device: torch.device | str | None) -> torch.Tensor:
    rotary = check_int("rotary", rotary, 2, MAX_ROTARY)
    if rotary % 2 != 0:
        raise ValueError(f"rotary must be an even number >= 2, got {rotary!r}")
    if not 1.0 < base < math.inf:
        raise ValueError(f"base must be a finite number > 1, got {base!r}")
    exponents = torch.arange(0, rotary, 2, dtype=torch.float64, device=device) / rotary
    return torch.pow(torch.tensor(float(base), dtype=torch.float64, device=device), -exponents)


def _tables(frequencies: torch.Tensor, length: int, offset: int, scale: float, dtype: torch.dtype) -> Tables:
    length, offset = _positions(length, offset)
    if length * frequencies.numel() > MAX_ENTRIES:
        raise ValueError(
            f"length must be at most {MAX_ENTRIES // frequencies.numel()} for {frequencies.numel()} pairs, got {length}"
        )
    if dtype not in FLOAT_DTYPES:
        raise TypeError(f"dtype must be float32, bfloat16, float16 or float64, got {dtype}")
    positions = torch.arange(offset, offset + length, dtype=torch.float64, device=frequencies.device)
    angles = positions[:, None] * frequencies
    return (angles.cos() * scale).to(dtype), (angles.sin() * scale).to(dtype)


def _attention_factor(factor: float, mscale: float | None, mscale_all_dim: float | None) -> float:
    def magnitude(strength: float) -> float:
        return 0.1 * strength * math.log(factor) + 1.0

    if mscale is None or mscale_all_dim is None:
        return magnitude(1.0)
    return magnitude(mscale) / magnitude(mscale_all_dim)


def _check_factor(factor: float) -> None:
    if not 1.0 <= factor < math.inf:
        raise ValueError(f"factor must be a finite number >= 1, got {factor!r}")


def _positions(length: int, offset: int) -> tuple[int, int]:
    length, offset = check_int("length", length, 0, MAX_POSITION), check_int("offset", offset, 0, MAX_POSITION)
    if offset + length > MAX_POSITION:
        raise ValueError(f"offset + length must be at most {MAX_POSITION}, got offset {offset} and length {length}")
    return length, offset


def _check_integers(name: str, value: torch.Tensor) -> None:
    if value.dtype not in _INTEGERS:
        raise TypeError(f"{name} must be int32 or int64, got {value.dtype}")


def _values_are_cheap(value: torch.Tensor) -> bool:
    """True where looking at the values neither waits for a device nor breaks a traced graph or a transform."""
    return value.device.type == "cpu" and has_values(value)
