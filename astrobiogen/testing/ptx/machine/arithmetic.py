"""Arithmetic, logic, comparison and selection."""

from collections.abc import Callable

import numpy as np

from astrobiogen.testing.ptx.machine.lanes import VIEWS, Lanes, Mask
from astrobiogen.testing.ptx.machine.numbers import HALF_FORMATS, fused, halves, pair
from astrobiogen.testing.ptx.machine.program import BYTES, Instruction, UnsupportedInstructionError

Binary = Callable[[np.ndarray, np.ndarray], np.ndarray]
WIDER = {"u16": "u32", "s16": "s32", "u32": "u64", "s32": "s64"}


def _integer_quotient(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Rounded towards zero; what a division by 0 gives is undefined, here all bits set."""
    divisor = np.where(y == 0, y.dtype.type(1), y)
    quotient = x // divisor
    away = (x % divisor != 0) & ((x < 0) != (divisor < 0))
    return np.where(y == 0, np.invert(np.zeros_like(x)), quotient + away.astype(x.dtype))


def _divide(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return x / y if x.dtype.kind == "f" else _integer_quotient(x, y)


def _remainder(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return x - _integer_quotient(x, y) * y


def _of_halves(kind: str, operation: Callable[..., np.ndarray]) -> Callable[..., np.ndarray]:
    """`operation` on fp32, for operands that are bits of bf16 or fp16."""
    widen, narrow = HALF_FORMATS[kind]
    return lambda *operands: narrow(operation(*(widen(operand) for operand in operands)).astype(np.float32))


def _elementwise(step: Instruction, lanes: Lanes, mask: Mask, operation: Callable[..., np.ndarray]) -> None:
    """Write operation(all sources) for any type, packed ones included."""
    kind = step.type
    target, *sources = step.operands
    if kind in ("bf16", "f16"):
        result = _of_halves(kind, operation)(*(lanes.raw(source, 2) for source in sources))
    elif kind in ("bf16x2", "f16x2"):
        packed = [halves(lanes.raw(source, 4)) for source in sources]
        narrow = _of_halves(kind[:-2], operation)
        result = pair(narrow(*(low for low, _ in packed)), narrow(*(high for _, high in packed)))
    else:
        result = np.asarray(operation(*(lanes.value(source, kind) for source in sources))).astype(VIEWS[kind])
    lanes.put(target, result, mask)


def _binary(operation: Binary) -> Callable[[Lanes, Instruction, Mask], None]:
    def run(lanes: Lanes, step: Instruction, mask: Mask) -> None:
        _elementwise(step, lanes, mask, operation)

    return run


def _logic(operation: Binary) -> Callable[[Lanes, Instruction, Mask], None]:
    def run(lanes: Lanes, step: Instruction, mask: Mask) -> None:
        target, first, second = step.operands
        if step.type == "pred":
            lanes.put(target, operation(lanes.truth(first), lanes.truth(second)), mask)
        else:
            width = BYTES[step.type]
            lanes.put(target, operation(lanes.raw(first, width), lanes.raw(second, width)), mask)

    return run


def _extreme(plain: Binary, propagating: Binary) -> Callable[[Lanes, Instruction, Mask], None]:
    def run(lanes: Lanes, step: Instruction, mask: Mask) -> None:
        number_wins = step.type[0] in "fb" and "NaN" not in step.modifiers
        _elementwise(step, lanes, mask, plain if number_wins else propagating)

    return run


def _not(lanes: Lanes, step: Instruction, mask: Mask) -> None:
    target, source = step.operands
    predicate = step.type == "pred"
    lanes.put(target, ~(lanes.truth(source) if predicate else lanes.raw(source, BYTES[step.type])), mask)


def _multiply(lanes: Lanes, step: Instruction, mask: Mask) -> None:
    kind, (target, first, second) = step.type, step.operands
    if "wide" in step.modifiers:
        wide = VIEWS[WIDER[kind]]
        lanes.put(target, lanes.value(first, kind).astype(wide) * lanes.value(second, kind).astype(wide), mask)
    elif "hi" in step.modifiers:
        lanes.put(target, _high_half(lanes.value(first, kind), lanes.value(second, kind)), mask)
    else:
        _elementwise(step, lanes, mask, np.multiply)


def _high_half(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Upper half of the double-width product of integers."""
    bits = 8 * x.dtype.itemsize
    if bits < 64:
        wide = np.int64 if x.dtype.kind == "i" else np.uint64
        return ((x.astype(wide) * y.astype(wide)) >> wide(bits)).astype(x.dtype)
    products = [(int(a) * int(b) >> 64) % 2**64 for a, b in zip(x, y)]
    return np.array(products, np.uint64).view(x.dtype)


def _multiply_add(lanes: Lanes, step: Instruction, mask: Mask) -> None:
    kind, (target, first, second, third) = step.type, step.operands
    if "wide" in step.modifiers:
        wide = WIDER[kind]
        product = lanes.value(first, kind).astype(VIEWS[wide]) * lanes.value(second, kind).astype(VIEWS[wide])
        lanes.put(target, product + lanes.value(third, wide), mask)
    else:
        _elementwise(step, lanes, mask, lambda x, y, z: x * y + z)


def _fused(lanes: Lanes, step: Instruction, mask: Mask) -> None:
    exact = step.type == "f64"  # the one type whose product and sum are rounded apart here
    _elementwise(step, lanes, mask, (lambda x, y, z: x * y + z) if exact else fused)


def _negate(lanes: Lanes, step: Instruction, mask: Mask) -> None:
    _elementwise(step, lanes, mask, np.negative)


def _absolute(lanes: Lanes, step: Instruction, mask: Mask) -> None:
    _elementwise(step, lanes, mask, np.abs)


def _shift_left(lanes: Lanes, step: Instruction, mask: Mask) -> None:
    width = BYTES[step.type]
    value, by = lanes.raw(step.operands[1], width), lanes.raw(step.operands[2], 4)
    moved = value << np.minimum(by, 8 * width - 1).astype(value.dtype)
    lanes.put(step.operands[0], np.where(by >= 8 * width, value.dtype.type(0), moved), mask)


def _shift_right(lanes: Lanes, step: Instruction, mask: Mask) -> None:
    bits = 8 * BYTES[step.type]
    value, by = lanes.value(step.operands[1], step.type), lanes.raw(step.operands[2], 4)
    moved = value >> np.minimum(by, bits - 1).astype(value.dtype)
    empty = (by >= bits) & (value.dtype.kind == "u")
    lanes.put(step.operands[0], np.where(empty, value.dtype.type(0), moved), mask)


def _funnel_shift(lanes: Lanes, step: Instruction, mask: Mask) -> None:
    low, high, by = (lanes.raw(operand, 4) for operand in step.operands[1:])
    by = by & np.uint32(31) if "wrap" in step.modifiers else np.minimum(by, np.uint32(32))
    joined = (high.astype(np.uint64) << np.uint64(32)) | low
    shift = by.astype(np.uint64)
    left = "l" in step.modifiers
    lanes.put(
        step.operands[0], ((joined << shift) >> np.uint64(32) if left else joined >> shift).astype(np.uint32), mask
    )


def _extract_bits(lanes: Lanes, step: Instruction, mask: Mask) -> None:
    value = lanes.raw(step.operands[1], 4).astype(np.uint64)
    first, length = (lanes.raw(operand, 4).astype(np.uint64) & np.uint64(255) for operand in step.operands[2:])
    one = np.uint64(1)
    field = (value >> np.minimum(first, np.uint64(63))) & ((one << np.minimum(length, np.uint64(32))) - one)
    if step.type == "s32":
        negative = (length > 0) & ((field >> (np.maximum(length, one) - one)) & one == one)
        field = np.where(negative, field | ~((one << length) - one), field)
    lanes.put(step.operands[0], field.astype(np.uint32), mask)


def _permute_bytes(lanes: Lanes, step: Instruction, mask: Mask) -> None:
    if step.type != "b32" or len(step.modifiers) != 1:
        raise UnsupportedInstructionError(step.text)
    low, high, selector = (lanes.raw(operand, 4) for operand in step.operands[1:])
    joined = (high.astype(np.uint64) << np.uint64(32)) | low
    result = np.zeros(lanes.count, np.uint64)
    for place in range(4):
        code = (selector >> np.uint32(4 * place)) & np.uint32(15)
        byte = (joined >> ((code & np.uint32(7)).astype(np.uint64) * np.uint64(8))) & np.uint64(255)
        sign = np.where(byte >= 128, np.uint64(255), np.uint64(0))
        result |= np.where(code >= 8, sign, byte) << np.uint64(8 * place)
    lanes.put(step.operands[0], result.astype(np.uint32), mask)


COMPARISONS = {
    "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal, "eq": np.equal, "ne": np.not_equal,
    "lo": np.less, "ls": np.less_equal, "hi": np.greater, "hs": np.greater_equal,
}  # fmt: skip


def compare(how: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """PTX comparison `how`; with a trailing "u" unordered numbers compare as true, else as false."""
    if x.dtype.kind != "f":
        return COMPARISONS[how](x, y)
    unordered = np.isnan(x) | np.isnan(y)
    if how in ("nan", "num"):
        return unordered if how == "nan" else ~unordered
    if how.endswith("u"):
        return COMPARISONS[how[:-1]](x, y) | unordered
    return COMPARISONS[how](x, y) & ~unordered


def _set_predicate(lanes: Lanes, step: Instruction, mask: Mask) -> None:
    kind, how, (target, first, second, *combined) = step.type, step.modifiers[0], step.operands
    if kind in ("bf16x2", "f16x2"):
        widen = HALF_FORMATS[kind[:-2]][0]
        pairs = zip(halves(lanes.raw(first, 4)), halves(lanes.raw(second, 4)))
        for register, (x, y) in zip(target.split("|"), pairs):
            lanes.put(register.strip(), compare(how, widen(x), widen(y)), mask)
        return
    if kind in HALF_FORMATS:
        widen = HALF_FORMATS[kind][0]
        result = compare(how, widen(lanes.raw(first, 2)), widen(lanes.raw(second, 2)))
    else:
        result = compare(how, lanes.value(first, kind), lanes.value(second, kind))
    if combined:
        join = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}[step.modifiers[1]]
        result = join(result, lanes.truth(combined[0]))
    lanes.put(target, result, mask)


def _select(lanes: Lanes, step: Instruction, mask: Mask) -> None:
    target, first, second, condition = step.operands
    chosen = lanes.truth(condition)
    if step.type == "pred":
        lanes.put(target, np.where(chosen, lanes.truth(first), lanes.truth(second)), mask)
    else:
        width = BYTES[step.type]
        lanes.put(target, np.where(chosen, lanes.raw(first, width), lanes.raw(second, width)), mask)


def _special(function: Callable[[np.ndarray], np.ndarray]) -> Callable[[Lanes, Instruction, Mask], None]:
    """A function of one number. The hardware's fp32 versions (ex2, lg2, tanh ...) are approximations within a few
    units of the last place; here they are rounded from exact ones."""

    def run(lanes: Lanes, step: Instruction, mask: Mask) -> None:
        _elementwise(step, lanes, mask, function)

    return run


def _count_bits(lanes: Lanes, step: Instruction, mask: Mask) -> None:
    lanes.put(step.operands[0], np.bitwise_count(lanes.raw(step.operands[1], BYTES[step.type])).astype(np.uint32), mask)


HANDLERS = {
    "add": _binary(np.add), "sub": _binary(np.subtract), "div": _binary(_divide), "rem": _binary(_remainder),
    "min": _extreme(np.fmin, np.minimum), "max": _extreme(np.fmax, np.maximum), "mul": _multiply,
    "mad": _multiply_add, "fma": _fused, "neg": _negate, "abs": _absolute, "and": _logic(np.bitwise_and),
    "or": _logic(np.bitwise_or), "xor": _logic(np.bitwise_xor), "not": _not, "shl": _shift_left, "shr": _shift_right,
    "shf": _funnel_shift, "bfe": _extract_bits, "prmt": _permute_bytes, "setp": _set_predicate, "selp": _select,
    "ex2": _special(np.exp2), "lg2": _special(np.log2), "rcp": _special(np.reciprocal),
    "rsqrt": _special(lambda x: 1 / np.sqrt(x)), "sqrt": _special(np.sqrt), "tanh": _special(np.tanh),
    "sin": _special(np.sin), "cos": _special(np.cos), "popc": _count_bits,
}  # fmt: skip
