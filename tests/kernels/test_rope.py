"""RoPE: the shared battery, shapes at random, the group property, second derivatives, and bad input."""

import math
from collections.abc import Callable

import hypothesis
import hypothesis.strategies as st
import pytest
import torch

from astrobiogen import ops
from astrobiogen.kernels.cases import Case, TensorMaker
from astrobiogen.kernels.rope import reference
from astrobiogen.kernels.rope.samples import CASES
from astrobiogen.kernels.rope.triton_kernels import column_tiles, constants_of
from astrobiogen.testing import check_battery, check_op

OPS = ("rope",)


def plain(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool = False) -> torch.Tensor:
    """The definition, with the public function's arguments."""
    return reference.rope(x, cos, sin, interleaved, False)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_rope_battery(case: Case) -> None:
    check_battery(ops.rope, plain, case, ops=OPS)


SHAPES = st.tuples(st.integers(1, 3), st.integers(1, 6), st.integers(1, 5), st.integers(0, 40), st.integers(0, 9))


def any_case(shape: tuple[int, int, int, int, int], interleaved: bool, per_batch: bool, head_first: bool) -> Case:
    batch, length, heads, half, rest = shape

    def build(make: TensorMaker) -> dict[str, object]:
        width = max(2 * half + rest, 1)
        x = (
            make.randn(batch, heads, length, width).transpose(1, 2)
            if head_first
            else make.randn(batch, length, heads, width)
        )
        angles = make.randn(*((batch,) if per_batch else ()), length, half)
        return {"x": x, "cos": angles.cos(), "sin": angles.sin(), "interleaved": interleaved}

    return Case("any", build, ("x",))


@hypothesis.given(SHAPES, st.booleans(), st.booleans(), st.booleans(), st.integers(0, 2**31))
def test_any_shape_on_the_cpu(
    shape: tuple[int, int, int, int, int], interleaved: bool, per_batch: bool, head_first: bool, seed: int
) -> None:
    case = any_case(shape, interleaved, per_batch, head_first)
    assert check_op(ops.rope, plain, case, torch.float32, ops=OPS, seed=seed)


@hypothesis.settings(max_examples=6)
@hypothesis.given(SHAPES, st.booleans(), st.booleans(), st.booleans(), st.integers(0, 2**31))
def test_any_shape_in_triton(
    shape: tuple[int, int, int, int, int], interleaved: bool, per_batch: bool, head_first: bool, seed: int
) -> None:
    case = any_case(shape, interleaved, per_batch, head_first)
    assert check_op(ops.rope, plain, case, torch.float32, ops=OPS, implementation="triton", seed=seed)


@pytest.mark.parametrize("interleaved", [False, True])
def test_turning_twice_adds_the_angles_and_transposed_turns_back(interleaved: bool) -> None:
    x = torch.randn(2, 5, 3, 20, dtype=torch.float64)
    first, second = torch.randn(2, 5, 8, dtype=torch.float64).unbind(0)
    once = ops.rope(x, first.cos(), first.sin(), interleaved)
    twice = ops.rope(once, second.cos(), second.sin(), interleaved)
    total = first + second
    torch.testing.assert_close(twice, ops.rope(x, total.cos(), total.sin(), interleaved), rtol=1e-13, atol=1e-13)
    back = torch.ops.astrobiogen.rope(once, first.cos(), first.sin(), interleaved, True)
    torch.testing.assert_close(back, x, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("interleaved", [False, True])
def test_scores_depend_on_the_distance_only(interleaved: bool) -> None:
    cos, sin = ops.rope_frequencies(40, 68, dtype=torch.float64)
    q, k = (torch.randn(68, dtype=torch.float64).expand(1, 40, 1, 68) for _ in range(2))
    scores = torch.einsum("bihd,bjhd->ij", ops.rope(q, cos, sin, interleaved), ops.rope(k, cos, sin, interleaved))
    for distance in (0, 1, 7, 39):
        diagonal = scores.diagonal(-distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("interleaved", [False, True])
def test_second_derivative(interleaved: bool) -> None:
    x = torch.randn(1, 2, 2, 6, dtype=torch.float64, requires_grad=True)
    angles = torch.randn(2, 2, dtype=torch.float64)

    def function(value: torch.Tensor) -> torch.Tensor:
        return ops.rope(value, angles.cos(), angles.sin(), interleaved)

    assert torch.autograd.gradgradcheck(function, (x,))


def test_interleaved_is_rotate_half_with_permuted_columns() -> None:
    x, angles = torch.randn(2, 4, 3, 68), torch.randn(4, 34)
    order = torch.arange(68).view(2, 34).T.reshape(-1)  # column i of the first half beside column i of the second
    halves = ops.rope(x, angles.cos(), angles.sin())
    torch.testing.assert_close(
        ops.rope(x[..., order], angles.cos(), angles.sin(), interleaved=True), halves[..., order], rtol=1e-6, atol=1e-6
    )


def test_packed_sequences_equal_separate_ones() -> None:
    lengths = [3, 1, 6]
    cos, sin = ops.rope_frequencies(8, 12)
    x = torch.randn(1, 10, 2, 12)
    bounds = torch.tensor([0, *torch.tensor(lengths).cumsum(0)])
    packed = ops.rope(x, *ops.rope_gather(cos, sin, ops.rope_positions(bounds, 10)))
    separate = [ops.rope(part, cos[: part.shape[1]], sin[: part.shape[1]]) for part in x.split(lengths, dim=1)]
    assert torch.equal(packed, torch.cat(separate, dim=1))


def test_position_ids_per_sequence() -> None:
    cos, sin = ops.rope_frequencies(32, 8)
    ids = torch.tensor([[5, 6, 7], [0, 31, 2]])
    x = torch.randn(2, 3, 4, 8)
    result = ops.rope(x, *ops.rope_gather(cos, sin, ids))
    for b in range(2):
        assert torch.equal(result[b : b + 1], ops.rope(x[b : b + 1], cos[ids[b]], sin[ids[b]]))


@hypothesis.given(columns=st.integers(0, 4096))
def test_column_tiles_cover_each_column_once(columns: int) -> None:
    first, second = column_tiles(columns)
    assert first <= columns <= first + second
    assert first + second < 1.5 * columns + 1


def test_flagship_program_has_no_idle_lane() -> None:
    constants = constants_of(64, 68, 34)
    assert (constants["C0"], constants["C1"], constants["R0"]) == (32, 2, 0)
    assert 64 % constants["HEADS"] == 0


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"x": [1.0]}, TypeError, r"x must be a torch\.Tensor, got list"),
        ({"x": torch.ones(1, 4, 2, 8).long()}, TypeError, r"x must be float32.*got torch\.int64"),
        ({"x": torch.ones(4, 2, 8)}, ValueError, r"x must have shape \[B, S, heads, D\], got \(4, 2, 8\)"),
        ({"cos": torch.ones(5, 4)}, ValueError, r"cos must have shape .* S = 4, .*got \(5, 4\)"),
        ({"sin": torch.ones(4, 5)}, ValueError, r"sin must have shape .* r/2 <= 4 .*got \(4, 5\)"),
        ({"cos": torch.ones(3, 4, 4)}, ValueError, r"cos must have shape .* B = 2 or 1, .*got \(3, 4, 4\)"),
        ({"cos": torch.ones(4)}, ValueError, r"cos must have shape .*got \(4,\)"),
        ({"sin": torch.ones(4, 3)}, ValueError, r"sin must have the shape of cos, \(4, 4\), got \(4, 3\)"),
        ({"cos": torch.ones(4, 4, dtype=torch.float64)}, TypeError, r"cos must be float32 or have the dtype of x"),
        ({"sin": torch.ones(4, 4, device="meta")}, ValueError, r"sin must be on the device of x, cpu, got meta"),
        ({"cos": torch.ones(4, 4, requires_grad=True)}, ValueError, r"cos must not require a gradient"),
        ({"sin": torch.ones(4, 4, requires_grad=True)}, ValueError, r"sin must not require a gradient"),
        ({"interleaved": "yes"}, TypeError, r"interleaved must be a bool, got str"),
    ],
)
def test_bad_input_is_named(arguments: dict[str, object], error: type[Exception], message: str) -> None:
    defaults = {"x": torch.ones(2, 4, 2, 8), "cos": torch.ones(4, 4), "sin": torch.ones(4, 4)}
    with pytest.raises(error, match=message):
        ops.rope(**{**defaults, **arguments})


def expected_tables(
    frequencies: list[float], positions: range, scale: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin from plain Python numbers."""
    angles = [[position * frequency for frequency in frequencies] for position in positions]
    cos = torch.tensor([[math.cos(angle) * scale for angle in row] for row in angles], dtype=torch.float64)
    sin = torch.tensor([[math.sin(angle) * scale for angle in row] for row in angles], dtype=torch.float64)
    return cos, sin


def plain_frequencies(rotary: int, base: float) -> list[float]:
    return [base ** (-2 * i / rotary) for i in range(rotary // 2)]


def assert_tables(got: tuple[torch.Tensor, torch.Tensor], expected: tuple[torch.Tensor, torch.Tensor]) -> None:
    for left, right in zip(got, expected):
        torch.testing.assert_close(left, right, rtol=1e-9, atol=1e-9)


def test_plain_and_linear_frequencies() -> None:
    frequencies = plain_frequencies(68, 10000.0)
    assert_tables(ops.rope_frequencies(6, 68, offset=3, dtype=torch.float64), expected_tables(frequencies, range(3, 9)))
    stretched = ops.rope_frequencies_linear(6, 68, factor=4.0, dtype=torch.float64)
    assert_tables(stretched, expected_tables([f / 4 for f in frequencies], range(6)))


def test_dynamic_ntk_keeps_short_contexts_and_stretches_long_ones() -> None:
    options = {"factor": 4.0, "original_length": 32, "dtype": torch.float64}
    short = ops.rope_frequencies_dynamic_ntk(32, 16, **options)
    assert_tables(short, ops.rope_frequencies(32, 16, dtype=torch.float64))
    base = 10000.0 * (4.0 * 80 / 32 - 3.0) ** (16 / 14)
    long = ops.rope_frequencies_dynamic_ntk(80, 16, **options)
    assert_tables(long, expected_tables(plain_frequencies(16, base), range(80)))


def test_yarn_keeps_fast_pairs_interpolates_slow_ones_and_scales() -> None:
    # pairs turn 512 / (2 pi) * 10^(-i/2) times in the 512 trained tokens: 81, 26, 8.1, 2.6, 0.8, 0.26, 0.08, 0.03;
    # pair(32) = 0.81 -> 0, pair(1) = 3.82 -> 4: a ramp 0, 1/4, 1/2, 3/4, 1, 1 ...
    ramp = [0.0, 0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 1.0]
    frequencies = [f * (1 - w) + f / 8 * w for f, w in zip(plain_frequencies(16, 10000.0), ramp)]
    got = ops.rope_frequencies_yarn(9, 16, factor=8.0, original_length=512, dtype=torch.float64)
    assert_tables(got, expected_tables(frequencies, range(9), 0.1 * math.log(8.0) + 1.0))
    options = {"mscale": 0.707, "mscale_all_dim": 1.0}
    got = ops.rope_frequencies_yarn(9, 16, factor=8.0, original_length=512, dtype=torch.float64, **options)
    scale = (0.0707 * math.log(8.0) + 1.0) / (0.1 * math.log(8.0) + 1.0)
    assert_tables(got, expected_tables(frequencies, range(9), scale))


def test_llama3_has_three_bands() -> None:
    frequencies = plain_frequencies(16, 500000.0)
    expected = []
    for f in frequencies:
        turns = 64 * f / (2 * math.pi)
        if turns > 4:
            expected.append(f)
        elif turns < 1:
            expected.append(f / 8)
        else:
            weight = (turns - 1) / 3
            expected.append((1 - weight) * f / 8 + weight * f)
    assert expected[0] == frequencies[0]
    assert frequencies[1] / 8 < expected[1] < frequencies[1]
    assert expected[-1] == frequencies[-1] / 8
    got = ops.rope_frequencies_llama3(5, 16, original_length=64, dtype=torch.float64)
    assert_tables(got, expected_tables(expected, range(5)))


# Inverse frequencies and attention factor of 16 rotary columns, computed with `ROPE_INIT_FUNCTIONS` of Hugging Face
# transformers 5.23.0.
TRANSFORMERS = {
    "linear": (
        lambda: ops.rope_frequencies_linear(2, 16, factor=4.0, dtype=torch.float64),
        [0.25, 0.079056941, 0.0250000004, 0.00790569466, 0.00249999994, 0.000790569466, 0.000250000012, 7.90569466e-05],
        1.0,
    ),
    "dynamic, 1000 of 256 tokens": (
        lambda: ops.rope_frequencies_dynamic_ntk(1000, 16, factor=4.0, original_length=256, dtype=torch.float64),
        [1.0, 0.22013101, 0.0484576598, 0.0106670344, 0.002348145, 0.00051689957, 0.000113785616, 2.50477442e-05],
        1.0,
    ),
    "yarn": (
        lambda: ops.rope_frequencies_yarn(2, 16, factor=4.0, original_length=256, dtype=torch.float64),
        [1.0, 0.25693506, 0.0625, 0.0138349654, 0.00249999994, 0.000790569466, 0.000250000012, 7.90569466e-05],
        1.138629436111989,
    ),
    "yarn with mscale": (
        lambda: ops.rope_frequencies_yarn(
            2, 16, factor=40.0, original_length=4096, mscale=0.707, mscale_all_dim=1.0, dtype=torch.float64
        ),
        [1.0, 0.316227764, 0.100000001, 0.0239147246, 0.00512499968, 0.000849862176, 2.49999994e-05, 7.90569447e-06],
        0.9210423553163399,
    ),
    "llama3": (
        lambda: ops.rope_frequencies_llama3(2, 16, original_length=64, base=10000.0, dtype=torch.float64),
        [1.0, 0.244384587, 0.0130422562, 0.00395284733, 0.00124999997, 0.000395284733, 0.000125000006, 3.95284733e-05],
        1.0,
    ),
}


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_frequencies_agree_with_transformers(name: str) -> None:
    build, frequencies, scale = TRANSFORMERS[name]
    cos, sin = (table[1] for table in build())
    # fp32 there; all frequencies are at most 1 radian, so the angle at position 1 is the frequency itself
    torch.testing.assert_close(
        torch.atan2(sin, cos), torch.tensor(frequencies, dtype=torch.float64), rtol=3e-7, atol=1e-12
    )
    torch.testing.assert_close(torch.hypot(sin, cos), torch.full((8,), scale, dtype=torch.float64), rtol=1e-12, atol=0)


def test_far_positions_are_exact_in_fp32() -> None:
    cos, sin = ops.rope_frequencies(2, 4, offset=1_000_000)
    exact = expected_tables(plain_frequencies(4, 10000.0), range(1_000_000, 1_000_002))
    torch.testing.assert_close((cos.double(), sin.double()), exact, rtol=0.0, atol=6e-8)


def test_positions_count_within_sequences_and_on_into_padding() -> None:
    positions = ops.rope_positions(torch.tensor([0, 3, 3, 5], dtype=torch.int32), 8)
    assert positions.tolist() == [0, 1, 2, 0, 1, 0, 1, 2]
    assert ops.rope_positions(torch.tensor([0]), 0).tolist() == []


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: ops.rope_frequencies(4, 7), ValueError, r"rotary must be an even number >= 2, got 7"),
        (lambda: ops.rope_frequencies(-1, 8), ValueError, r"length must be an integer >= 0, got -1"),
        (lambda: ops.rope_frequencies(4, 8, offset=-2), ValueError, r"offset must be an integer >= 0, got -2"),
        (lambda: ops.rope_frequencies(4, 8, base=1.0), ValueError, r"base must be a finite number > 1, got 1\.0"),
        (lambda: ops.rope_frequencies(4, 8, dtype=torch.int32), TypeError, r"dtype must be float32.*got torch\.int32"),
        (lambda: ops.rope_frequencies_linear(4, 8, factor=0.5), ValueError, r"factor must be .* >= 1, got 0\.5"),
        (
            lambda: ops.rope_frequencies_dynamic_ntk(4, 2, factor=2.0, original_length=8),
            ValueError,
            r"rotary must be an integer >= 4, got 2",
        ),
        (
            lambda: ops.rope_frequencies_yarn(4, 8, factor=2.0, original_length=8, mscale=1.0),
            ValueError,
            r"mscale and mscale_all_dim go together",
        ),
        (
            lambda: ops.rope_frequencies_yarn(4, 8, factor=2.0, original_length=8, beta_slow=64.0),
            ValueError,
            r"beta_slow must be in \(0, beta_fast = 32\.0\], got 64\.0",
        ),
        (
            lambda: ops.rope_frequencies_llama3(4, 8, low_frequency_factor=5.0),
            ValueError,
            r"low_frequency_factor must be in \(0, high_frequency_factor = 4\.0\), got 5\.0",
        ),
        (lambda: gather(torch.tensor([0, 4])), IndexError, r"position_ids must be in \[0, 4\).*from 0 to 4"),
        (lambda: gather(torch.tensor([-1, 2])), IndexError, r"position_ids must be in \[0, 4\).*from -1 to 2"),
        (lambda: gather(torch.tensor([0.0])), TypeError, r"position_ids must be int32 or int64, got torch\.float32"),
        (lambda: gather(torch.tensor(1)), ValueError, r"position_ids must have shape \[S\] or \[B, S\], got \(\)"),
        (lambda: ops.rope_positions(torch.tensor([1, 4]), 4), ValueError, r"cu_seqlens must rise from 0"),
        (lambda: ops.rope_positions(torch.tensor([0, 4, 2]), 4), ValueError, r"cu_seqlens must rise from 0"),
        (lambda: ops.rope_positions(torch.tensor([0, 5]), 4), ValueError, r"at most length = 4"),
        (lambda: ops.rope_positions(torch.tensor([[0, 4]]), 4), ValueError, r"cu_seqlens must have shape"),
    ],
)
def test_bad_frequency_input_is_named(call: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


def gather(position_ids: torch.Tensor) -> object:
    return ops.rope_gather(torch.ones(4, 2), torch.ones(4, 2), position_ids)
