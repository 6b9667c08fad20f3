"""Accumulation, clipping, skipping, loss scale, schedules, weight decay groups."""

import copy
import importlib
import math
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from astrobiogen.models import CountsUpdates
from astrobiogen.training.config import DataConfig, OptimizerConfig, PrecisionConfig, ScheduleConfig
from astrobiogen.training.distributed.model import Parallel
from astrobiogen.training.distributed.share import Round
from astrobiogen.training.errors import NumericalError, UserError
from astrobiogen.training.optim import gated_adamw, schedule
from astrobiogen.training.optim.optimizer import build_optimizer, decay_groups
from astrobiogen.training.optim.precision import LossScaler, choose_dtype
from astrobiogen.training.tools import plan
from astrobiogen.training.update import Updater
from tests.training.conftest import ToyModel, ToySamples, collate, toy_config, toy_loss

SAMPLES = ToySamples(64, seed=5)


def updater(batch_size: int, accumulation: int, dtype: torch.dtype = torch.float32, **changes: Any) -> Updater:
    config = toy_config(data=DataConfig(batch_size=batch_size, accumulation=accumulation), **changes)
    torch.manual_seed(0)
    model = ToyModel(dropout=0.0)
    return Updater(
        Parallel.alone(model, toy_loss),
        build_optimizer(model, config.optimizer),
        config,
        10,
        torch.device("cpu"),
        dtype,
    )


def run_window(made: Updater, sizes: list[int]) -> tuple[dict[str, torch.Tensor], float]:
    """The gradients that the optimizer sees (weights would not do: Adam turns rounding of a zero gradient into a whole
    step).
    """
    start = 0
    seen: dict[str, torch.Tensor] = {}
    step = made.optimizer.step

    def spy(*args: Any, **options: Any) -> Any:
        seen.update(
            {name: value.grad.clone() for name, value in made.model.named_parameters() if value.grad is not None}
        )
        return step(*args, **options)

    made.optimizer.step = spy  # type: ignore[method-assign]
    for size in sizes:
        indices = list(range(start, start + size))
        made.add(Round.alone(indices), collate([SAMPLES[index] for index in indices]))
        start += size
    return seen, made.finish().norm


@pytest.mark.parametrize("sizes", [[1] * 32, [4, 4, 4, 1], [7, 5, 20]])
def test_accumulation_equals_the_full_batch(sizes: list[int]) -> None:
    full, full_norm = run_window(updater(sum(sizes), 1), [sum(sizes)])
    parts, norm = run_window(updater(max(sizes), len(sizes)), sizes)
    assert norm == pytest.approx(full_norm, rel=1e-6)
    for name in full:
        torch.testing.assert_close(parts[name], full[name], rtol=1e-6, atol=1e-6)


def test_short_last_window_is_not_divided_by_the_full_one() -> None:
    full, full_norm = run_window(updater(20, 1), [20])
    parts, norm = run_window(updater(1, 32), [1] * 20)
    assert norm == pytest.approx(full_norm, rel=1e-6)  # divided by 32 it would be 0.62 of it
    for name in full:
        torch.testing.assert_close(parts[name], full[name], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_are_summed_in_fp32(dtype: torch.dtype) -> None:
    made = updater(4, 2, dtype)
    made.add(Round.alone([0, 1, 2, 3]), collate([SAMPLES[index] for index in range(4)]))
    assert {value.grad.dtype for value in made.model.parameters() if value.grad is not None} == {torch.float32}
    assert {value.dtype for value in made.model.parameters()} == {torch.float32}


def test_loss_scale_does_not_change_the_gradient() -> None:
    plain, norm = run_window(updater(8, 1), [8])
    scaled = updater(8, 1)
    scaled.scaler.scale = 2.0**15
    parts, scaled_norm = run_window(scaled, [8])
    assert scaled_norm == pytest.approx(norm, rel=1e-6)
    for name in plain:
        torch.testing.assert_close(parts[name], plain[name], rtol=1e-6, atol=1e-6)


class CountingModel(CountsUpdates, ToyModel):
    """Counts the updates that it is told of."""

    counted = 0

    def after_update(self) -> None:
        self.counted += 1


def test_modules_are_told_of_updates_and_not_of_micro_batches_or_skips() -> None:
    model = CountingModel(dropout=0.0)
    config = toy_config(data=DataConfig(batch_size=4, accumulation=3), precision=PrecisionConfig(skip_budget=3))
    optimizer = build_optimizer(model, config.optimizer)
    made = Updater(Parallel.alone(model, toy_loss), optimizer, config, 10, torch.device("cpu"), torch.float32)
    for update in range(2):
        for _ in range(3):
            poison(made, good=True)
            assert model.counted == update
        made.finish()
    poison(made)
    assert made.finish().skipped
    assert model.counted == made.updates == 2


def poison(made: Updater, good: bool = False) -> None:
    batch = collate([SAMPLES[index] for index in range(4)])
    if not good:
        batch["planet_params"][2, 1] = math.nan
    made.add(Round.alone([0, 1, 2, 3]), batch)


def test_nan_updates_are_skipped_then_the_run_stops_with_the_batches() -> None:
    made = updater(4, 1, precision=PrecisionConfig(skip_budget=3))
    before = {name: value.detach().clone() for name, value in made.model.named_parameters()}
    for _ in range(3):
        poison(made)
        assert made.finish().skipped
    assert made.updates == 0
    assert made.skipped == 3
    assert all(torch.equal(before[name], value) for name, value in made.model.named_parameters())
    poison(made, good=True)
    assert not made.finish().skipped
    assert made.updates == 1
    assert made.skipped_in_row == 0
    poison(made)
    with pytest.raises(NumericalError, match=r"^4 updates of the run.*classification.*\[\[0, 1, 2, 3\]\]"):
        made.finish()


def test_scale_has_a_floor_and_hysteresis() -> None:
    scaler = LossScaler(PrecisionConfig(initial_scale=8.0, hysteresis=2, growth_interval=3), torch.float16)
    scales = []
    for _ in range(200):
        scaler.update(overflow=True)
        scales.append(scaler.scale)
    assert scales[:4] == [8.0, 4.0, 4.0, 2.0]
    assert min(scales) == 1.0
    for _ in range(3):
        scaler.update(overflow=False)
    assert scaler.scale == 2.0
    fixed = LossScaler(PrecisionConfig(), torch.bfloat16)
    fixed.update(overflow=True)
    assert fixed.scale == 1.0


def test_clipping() -> None:
    gradients, norm = run_window(updater(8, 1, optimizer=OptimizerConfig(clip_norm=1e-3)), [8])
    assert norm > 1e-2
    assert float(torch.nn.utils.get_total_norm(list(gradients.values()))) == pytest.approx(1e-3, rel=1e-3)


@pytest.mark.parametrize("cycle", [False, True])
def test_onecycle_equals_torch(cycle: bool) -> None:
    config = ScheduleConfig(name="onecycle", warmup_fraction=0.3, cycle_momentum=cycle)
    parameter = torch.nn.Parameter(torch.zeros(1))
    theirs = torch.optim.AdamW([parameter], betas=(0.9, 0.999))
    ours = torch.optim.AdamW([parameter], betas=(0.9, 0.999))
    parameter.grad = torch.zeros(1)
    total = 50
    reference = torch.optim.lr_scheduler.OneCycleLR(
        theirs,
        max_lr=3e-3,
        total_steps=total,
        pct_start=0.3,
        div_factor=10.0,
        final_div_factor=100.0,
        cycle_momentum=cycle,
    )
    for update in range(total):
        rate = schedule.apply(config, ours, 3e-3, update, total)
        assert rate == pytest.approx(theirs.param_groups[0]["lr"], rel=1e-9)
        assert ours.param_groups[0]["betas"][0] == pytest.approx(theirs.param_groups[0]["betas"][0], rel=1e-9)
        theirs.step()
        if update < total - 1:
            reference.step()


def test_other_schedules() -> None:
    assert schedule.learning_rate(ScheduleConfig(name="constant"), 0.1, 7, 10) == 0.1
    config = ScheduleConfig(name="cosine", warmup_fraction=0.2)
    rates = [schedule.learning_rate(config, 1.0, update, 100) for update in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == 1.0
    assert rates[-1] == pytest.approx(1e-3)
    assert rates[10] - rates[9] == pytest.approx(rates[5] - rates[4])
    assert schedule.learning_rate(ScheduleConfig(), 1.0, 5, 1) > 0  # longer than planned, after skipped updates


def test_decay_groups() -> None:
    model = ToyModel()
    decayed, plain = decay_groups(model, 0.1)
    assert {value.ndim for value in decayed["params"]} == {2}
    assert decayed["weight_decay"] == 0.1
    assert {value.ndim for value in plain["params"]} == {1}
    assert plain["weight_decay"] == 0.0


def test_missing_bitsandbytes_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> None:
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr("importlib.import_module", absent)
    with pytest.raises(UserError, match=r"bitsandbytes >= 0\.50"):
        build_optimizer(ToyModel(), OptimizerConfig(name="adamw8bit"))


def test_dtype_is_never_replaced() -> None:
    cpu = torch.device("cpu")
    assert choose_dtype(PrecisionConfig(dtype="fp16"), cpu)[0] == torch.float16
    assert choose_dtype(PrecisionConfig(dtype="bf16"), cpu)[0] == torch.bfloat16


def test_micro_batches_never_wait_for_the_device() -> None:
    """Fake tensors have no values: whatever reads one on the host raises."""
    made = updater(4, 2)
    with FakeTensorMode(allow_non_fake_inputs=True):
        parallel = Parallel.alone(ToyModel(), toy_loss)
        fake = Updater(parallel, made.optimizer, toy_config(), 10, torch.device("cpu"), torch.float32)
        for start in (0, 4):
            indices = list(range(start, start + 4))
            fake.add(Round.alone(indices), collate([SAMPLES[index] for index in indices]))
        with pytest.raises(DataDependentOutputException):
            float(fake.window.sums[0])  # type: ignore[index]
    assert fake.window.batches == 2


OPTIMIZERS = ("adamw", "adamw8bit", "paged_adamw8bit")
WIDE = 1_000  # 6,000 weights in a matrix: moments of 8 bits, the last block of 256 not full


def wide_updater(name: Any) -> Updater:
    config = toy_config(
        data=DataConfig(batch_size=4, accumulation=1),
        optimizer=OptimizerConfig(name=name, learning_rate=0.05, ema_decay=0.9),
    )
    torch.manual_seed(0)
    model = ToyModel(dropout=0.0, width=WIDE)
    optimizer = build_optimizer(model, config.optimizer)
    return Updater(Parallel.alone(model, toy_loss), optimizer, config, 10, torch.device("cpu"), torch.float32)


def everything(made: Updater) -> list[Any]:
    assert made.average is not None
    return [
        {name: value.clone() for name, value in made.model.state_dict().items()},
        copy.deepcopy(made.optimizer.state_dict()["state"]),
        {name: value.clone() for name, value in made.average.averages.items()},
    ]


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_bad_window_leaves_no_trace(name: str) -> None:
    """Weights, moments and step counts after good and bad windows are those after the good ones alone, to the bit; so
    is what a bad window leaves, also the very first one."""
    mixed, good = wide_updater(name), wide_updater(name)
    poison(mixed)
    before = mixed.model.state_dict()["first.weight"].clone()
    mixed.finish()
    assert torch.equal(before, mixed.model.state_dict()["first.weight"])
    for is_good in (True, False, False, True, True, False):
        start = everything(mixed)
        poison(mixed, is_good)
        assert mixed.finish().skipped != is_good
        if not is_good:
            torch.testing.assert_close(everything(mixed), start, rtol=0, atol=0)
            continue
        assert not torch.equal(start[0]["first.weight"], mixed.model.state_dict()["first.weight"])
        poison(good, True)
        schedule_as_in(good, mixed)
        good.finish()
    assert (mixed.updates, mixed.skipped) == (3, 4)
    torch.testing.assert_close(everything(mixed), everything(good), rtol=0, atol=0)
    if name != "adamw":
        moments = [state["state1"].dtype for state in mixed.optimizer.state.values()]
        assert torch.uint8 in moments
        assert torch.float32 in moments


def schedule_as_in(good: Updater, mixed: Updater) -> None:
    assert good.updates == mixed.updates - 1  # a skipped window takes no step of the schedule


class Order(TorchDispatchMode):
    """Notes in which order operations run and values reach the host."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.events: list[str] = []
        for name in ("tolist", "numpy", "cpu", "__array__"):
            plain = getattr(torch.Tensor, name)

            def noted(*args: Any, _name: str = name, _plain: Any = plain) -> Any:
                self.events.append("read")
                return _plain(*args)

            patch.setattr(torch.Tensor, name, noted)

    def __torch_dispatch__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func)
        kinds = {"_local_scalar_dense": "read", "is_nonzero": "read", "optimizer_update": "step", "fused_adamw": "step"}
        self.events.append(next((kind for part, kind in kinds.items() if part in name), name))
        return func(*args, **(kwargs or {}))


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
@pytest.mark.parametrize("good", [True, False])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_host_waits_for_the_device_once_and_after_the_step(
    name: str, good: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = wide_updater(name)
    poison(made, True)
    made.finish()
    poison(made, good)
    with Order(monkeypatch) as order:
        made.finish()
    steps = [number for number, event in enumerate(order.events) if event == "step"]
    reads = [number for number, event in enumerate(order.events) if event == "read"]
    assert steps
    assert len(reads) == 1
    assert reads[0] > steps[-1]
    assert any("isfinite" in event or "aten.ne" in event for event in order.events[: steps[0]])


def test_pieces_of_a_large_tensor_change_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    states = []
    for piece in (gated_adamw._PIECE, 1024):
        monkeypatch.setattr(gated_adamw, "_PIECE", piece)
        made = wide_updater("adamw8bit")
        for good in (True, False, True):
            poison(made, good)
            made.finish()
        states.append(everything(made))
    torch.testing.assert_close(states[0], states[1], rtol=0, atol=0)


def test_moments_of_8_bits_take_a_quarter_of_the_memory() -> None:
    """Measured on the live state of a matrix of 1,000 x 1,000, and what the plan says of it."""
    sizes = {}
    for name in OPTIMIZERS[:2]:
        model = torch.nn.Linear(1000, 1000, bias=False)
        model.weight.grad = torch.ones_like(model.weight)
        optimizer = build_optimizer(model, OptimizerConfig(name=name))  # type: ignore[arg-type]
        optimizer.step()
        (state,) = optimizer.state.values()
        sizes[name] = plan.tensor_bytes([value for key, value in state.items() if not key.startswith("qmap")])
        assert sizes[name] == plan.optimizer_bytes(model, name)
    assert sizes["adamw8bit"] / sizes["adamw"] < 0.255


def test_the_gated_optimizer_is_bitsandbytes_own_update() -> None:
    """The weights whose moments have 8 bits follow bitsandbytes' own step to the bit, the others to rounding."""
    library = importlib.import_module("bitsandbytes.optim")
    generator = torch.Generator().manual_seed(0)
    start = [torch.randn(5_000, generator=generator).view(50, 100), torch.randn(30, generator=generator)]
    ours, theirs = ([torch.nn.Parameter(value.clone()) for value in start] for _ in range(2))
    settings = OptimizerConfig(name="adamw8bit", learning_rate=0.01, weight_decay=0.1)
    module = torch.nn.ParameterList(ours)
    gated = build_optimizer(module, settings)
    options = {"lr": 0.01, "betas": (settings.beta1, settings.beta2), "eps": settings.eps}
    groups = [{"params": [theirs[0]], "weight_decay": 0.1}, {"params": [theirs[1]], "weight_decay": 0.0}]
    plain = library.AdamW8bit(groups, **options)
    for _ in range(5):
        for one, other in zip(ours, theirs):
            one.grad = torch.randn(one.shape, generator=generator)
            other.grad = one.grad.clone()
        gated.step()
        plain.step()
    assert torch.equal(ours[0], theirs[0])
    torch.testing.assert_close(ours[1], theirs[1], rtol=1e-6, atol=1e-7)
    with pytest.raises(ValueError, match="closure"):
        gated.step(lambda: 0.0)
