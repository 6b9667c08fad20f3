"""Inputs that linear cross-entropy must handle, and the sizes worth timing."""

import dataclasses
from typing import Any

from astrobiogen.kernels.cases import Case, TensorMaker


@dataclasses.dataclass(frozen=True)
class Size:
    """A problem worth timing: `tokens` rows of `hidden` columns against `vocabulary` classes."""

    tokens: int
    hidden: int
    vocabulary: int


# The first is the CPU acceptance size and the `--quick` one.
BENCHMARK_SIZES = (Size(512, 512, 32000), Size(128, 1024, 50257))
# Flagship width with the vocabularies of Llama 2, GPT-2 (odd) and Llama 3.
GPU_BENCHMARK_SIZES = (
    Size(2048, 4352, 32000),
    Size(2048, 4352, 50257),
    Size(2048, 4352, 128256),
    Size(16384, 4352, 32000),
)


def _plain(*shape: int, vocabulary: int, **options: Any):
    """x of `shape` (the last axis is H) and weight scaled so that logits have a standard deviation near 1."""

    def build(make: TensorMaker) -> dict[str, Any]:
        return {
            "x": make.randn(*shape),
            "weight": make.randn(vocabulary, shape[-1]) * shape[-1] ** -0.5,
            "target": make.randint(0, vocabulary, *shape[:-1]),
            **options,
        }

    return build


def _ignored(every: int, **options: Any):
    def build(make: TensorMaker) -> dict[str, Any]:
        arguments = _plain(9, 12, vocabulary=37, **options)(make)
        arguments["target"][::every] = options.get("ignore_index", -100)
        return arguments

    return build


def _transposed(make: TensorMaker) -> dict[str, Any]:
    return {
        "x": make.randn(10, 3, 4).permute(2, 1, 0),
        "weight": make.randn(10, 33).t(),
        "target": make.randint(0, 33, 3, 4).t(),
    }


def _sliced(make: TensorMaker) -> dict[str, Any]:
    return {
        "x": make.randn(10, 40)[::2, 3:20],
        "weight": make.randn(62, 40)[::2, 5:22],
        "target": make.randint(0, 31, 10)[::2],
    }


def _expanded(make: TensorMaker) -> dict[str, Any]:
    return {
        "x": make.randn(1, 16).expand(5, 16),
        "weight": make.randn(19, 16),
        "target": make.randint(0, 19, 1).expand(5),
    }


def _large_logits(make: TensorMaker) -> dict[str, Any]:
    # Logits of several hundred: exp overflows without the running maximum. Half precision rounds such logits by 0.25
    # and more.
    arguments = _plain(4, 24, vocabulary=50)(make)
    return {**arguments, "x": arguments["x"] * 100}


def _common(common: float, *shape: int, vocabulary: int, **options: Any):
    """Logits that have `common` in common, exactly: x and the weight get one more column."""

    def build(make: TensorMaker) -> dict[str, Any]:
        arguments = _plain(*shape, vocabulary=vocabulary, **options)(make)
        arguments["x"][..., 0], arguments["weight"][:, 0] = common, 1.0
        return arguments

    return build


def _num_tokens(make: TensorMaker) -> dict[str, Any]:
    return _plain(6, 8, vocabulary=21, num_tokens=17)(make)


_GRADS = ("x", "weight")

CASES = (
    Case("gradcheck", _plain(3, 5, vocabulary=11), _GRADS, gradcheck=True),
    Case(
        "gradcheck_options",
        _plain(2, 2, 3, vocabulary=7, label_smoothing=0.1, z_loss=0.01, softcap=2.0, reduction="none"),
        _GRADS,
        gradcheck=True,
    ),
    Case("one_element", _plain(1, 1, vocabulary=1), _GRADS),
    Case("two_classes", _plain(3, 1, vocabulary=2), _GRADS),
    Case("no_tokens", _plain(0, 8, vocabulary=13, reduction="sum"), _GRADS),
    Case("no_batch", _plain(2, 0, 8, vocabulary=13, reduction="none"), _GRADS),
    Case("vector", _plain(20, vocabulary=13), _GRADS),
    Case("odd", _plain(2, 3, 67, vocabulary=131), _GRADS),
    Case("power_of_two", _plain(16, 32, vocabulary=64), _GRADS),
    Case("sum", _plain(5, 16, vocabulary=45, reduction="sum"), _GRADS),
    Case("ignored", _ignored(2), _GRADS),
    Case("ignored_in_range", _ignored(3, ignore_index=5, reduction="none"), _GRADS, masks=True),
    Case("smoothed", _ignored(4, label_smoothing=0.2), _GRADS),
    Case("z_loss", _ignored(4, z_loss=0.1, reduction="sum"), _GRADS),
    Case("softcap", _plain(6, 24, vocabulary=50, softcap=1.5), _GRADS),
    Case("num_tokens", _num_tokens, _GRADS),
    Case("transposed", _transposed, _GRADS),
    Case("sliced", _sliced, _GRADS),
    Case("expanded", _expanded, _GRADS),
    Case("large_logits", _large_logits, _GRADS),
    # More than one tile of tokens (512) and of vocabulary (1024 columns at that height) in C++.
    Case("tiles", _plain(521, 4, vocabulary=1041, label_smoothing=0.1), _GRADS, interpret=False),
    # More than one slab of the vocabulary (2048 columns at the least) and one block (4096) in Triton.
    Case("slabs", _plain(2, 2, vocabulary=4200, label_smoothing=0.1), _GRADS),
    Case("common", _common(1000.0, 4, 8, vocabulary=300, label_smoothing=0.1, reduction="none"), _GRADS),
    Case("common_z_loss", _common(-100.0, 3, 8, vocabulary=200, z_loss=0.01, reduction="sum"), _GRADS),
)

# Sums so long that an order of additions shows: over tokens in the weight's gradient, over classes in lse and the mean
# of the logits.
LONG_CASES = (
    Case("long_tokens", _plain(60_000, 8, vocabulary=24, reduction="sum"), _GRADS, interpret=False),
    Case("long_classes", _plain(6, 8, vocabulary=100_000, label_smoothing=0.1), _GRADS, interpret=False),
    Case("long_common", _common(1000.0, 64, 16, vocabulary=3000, reduction="none"), _GRADS, interpret=False),
    Case("long_smoothed", _common(1e4, 64, 16, vocabulary=3000, label_smoothing=0.1), _GRADS, interpret=False),
)
