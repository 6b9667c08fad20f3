"""Every key counts: of the preset, of a YAML file and of the command line, in any mix and order; the model's too."""

import dataclasses
import itertools
import tempfile
import typing
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from astrobiogen import data, models
from astrobiogen.training.batches import assemble
from astrobiogen.training.config import PRESETS, TrainConfig, as_dict, command_line, parser, preset, run_config
from astrobiogen.training.config.model import ModelChanges, applied
from astrobiogen.training.errors import UserError

CANDIDATES: dict[type, tuple[Any, ...]] = {
    bool: (True, False),
    int: (2, 3, 7),
    float: (0.25, 1e-3, 2.0, 3.5),
    str: ("some", "other"),
}


def values_of(kind: Any) -> tuple[Any, ...]:
    """A few values of a type that a key may have."""
    options = [item for item in typing.get_args(kind) if item is not type(None)]
    if typing.get_origin(kind) is typing.Literal:
        return options
    if typing.get_origin(kind) is tuple:
        inner = values_of(options[0])
        if options[-1] is not Ellipsis:
            return tuple([value] * len(options) for value in inner)
        return tuple([value, value] for value in inner)
    return CANDIDATES[kind] if kind in CANDIDATES else values_of(options[0])


def settable(part: Any, inside: str = "") -> dict[str, list[Any]]:
    """Keys below a configuration and the values of `values_of` that they allow, of which there are at least two."""
    found: dict[str, list[Any]] = {}
    kinds = typing.get_type_hints(type(part))
    for field in dataclasses.fields(part):
        key, value = inside + field.name, getattr(part, field.name)
        if dataclasses.is_dataclass(value):
            found |= settable(value, f"{key}.")
            continue
        good = []
        for item in values_of(kinds[field.name]):
            try:
                dataclasses.replace(part, **{field.name: item})
            except ValueError:
                continue
            good.append(item)
        assert len(good) > 1, f"{key}: no two values to test with"
        found[key] = good
    return found


# An `initial_scale` below `min_scale` is refused; presets are chosen apart.
KEYS = {key: values for key, values in settable(TrainConfig()).items() if key not in ("preset", "precision.min_scale")}


def test_keys_of_every_part_are_tried() -> None:
    parts = {key.split(".")[0] for key in KEYS} | {key.rpartition(".")[0] for key in KEYS}
    assert {"seed", "optimizer", "hang", "model", "model.llm_config", "model.fusion_config.modality_dropouts"} <= parts
    assert len(KEYS) > 150


choices = st.sampled_from(sorted(KEYS)).flatmap(lambda key: st.tuples(st.just(key), st.sampled_from(KEYS[key])))


@settings(max_examples=25, deadline=None)
@given(
    one=choices,
    other=choices,
    places=st.tuples(*[st.sampled_from(("yaml", "dotted", "=", "space"))] * 2),
    name=st.sampled_from(PRESETS),
    where=st.sampled_from(("yaml", "line", "none")),
    order=st.permutations(range(4)),
)
def test_any_two_keys_from_anywhere_in_any_order(
    one: tuple[str, Any], other: tuple[str, Any], places: tuple[str, str], name: str, where: str, order: list[int]
) -> None:
    in_file: dict[str, Any] = {"preset": name} if where == "yaml" else {}
    line: dict[int, list[str]] = {3: ["--preset", name]} if where == "line" else {}
    expected = as_dict.flatten(as_dict.to_dict(preset("tiny" if where == "none" else name)))
    from_line: dict[str, Any] = {}
    given_there = {}
    for number in sorted((0, 1), key=lambda number: order.index(number)):
        (key, value), place = (one, other)[number], places[number]
        if place in ("yaml", "dotted"):
            given_there[key] = (value, place)
            expected[key] = value
            continue
        text = yaml.safe_dump(value, default_flow_style=True).removesuffix("\n").removesuffix("\n...")
        line[number] = [f"--{key}={text}"] if place == "=" else [f"--{key}", text]
        from_line[key] = value
    for key, (value, place) in given_there.items():
        inner = in_file
        *groups, last = [key] if place == "dotted" else key.split(".")
        for group in groups:
            inner = inner.setdefault(group, {})
        inner[last] = value
    with tempfile.TemporaryDirectory() as folder:
        if in_file:
            file = Path(folder) / "given.yaml"
            file.write_text(yaml.safe_dump(in_file))
            line[2] = ["--config", str(file)]
        made = command_line.parse(list(itertools.chain(*(line[number] for number in order if number in line)))).config
    got = as_dict.flatten(as_dict.to_dict(made))
    wanted = {key: value for key, value in (expected | from_line).items() if value != {}}
    assert {key: value for key, value in got.items() if value != {}} == wanted
    assert parser.from_dict(as_dict.to_dict(made)) == made


def test_several_options_of_one_part_of_the_model_all_count() -> None:
    given_ = ["--model.llm_config.num_layers", "4", "--model.llm_config.dropout", "0"]
    given_ += [
        "--model.fusion_config.modality_dropouts.graph",
        "0.1",
        "--model.fusion_config.modality_dropouts.text=0.2",
    ]
    _, model = assemble.build_model(command_line.parse(given_).config, data.load_bundled().spec)
    assert (model.llm_config.num_layers, model.llm_config.dropout) == (4, 0.0)
    assert model.fusion_config.modality_dropouts == {"graph": 0.1, "planet_params": 0.75, "text": 0.2}


def test_the_changes_have_the_models_keys_and_none_changes_nothing() -> None:
    made = models.MultiModalTrainingConfig()
    assert applied(made, ModelChanges()) == made
    flat = as_dict.flatten(dataclasses.asdict(made))
    names = {key.removeprefix("model.") for key in KEYS if key.startswith("model.")}
    of_fusion = {f"fusion_config.modality_dropouts.{name}" for name in models.unified_system.MODALITIES}
    left = {"llm_config.modality_dims", "fusion_config.modality_dims", "fusion_config.modality_dropouts"}
    assert names == flat.keys() - left | of_fusion


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--model.llm_config.num_layer", "4"], "did you mean --model.llm_config.num_layers?"),
        (
            ["--model.llm_config.num_layers", "x"],
            "model.llm_config.num_layers: expected int, got x",
        ),
        (["--model.kernels", "fast"], '"model.kernels": Expected'),
        (["--epochs", str(10**22)], f"epochs: got {10**22}, expected at most 1000000000"),
        (
            ["--model.llm_config.num_layers", str(10**10)],
            "model.llm_config.num_layers: got 10000000000, expected at most",
        ),
        (["--stop.max_hours", ".inf"], "stop.max_hours: got inf, expected a finite number"),
    ],
)
def test_bad_values_name_their_key(arguments: list[str], text: str) -> None:
    with pytest.raises(UserError) as caught:
        command_line.parse(arguments)
    assert text in str(caught.value)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("optimizer: {eps: 1e-8}\noptimizer: {beta1: 0.5}\n", "line 2: optimizer is given twice"),
        ("optimizer:\n  eps: 1e-8\n  eps: 1e-7\n", "line 3: eps is given twice"),
        ("optimizer.eps: 1e-8\noptimizer: {eps: 1e-7}\n", "optimizer.eps: is given twice"),
        ("model:\n  llm_config: 3\n", "model.llm_config: got 3, expected keys and values"),
        ("model: 3\n", "model: got 3, expected keys and values"),
        ("optimizer: [1]\n", r"optimizer: got [1], expected keys and values"),
    ],
)
def test_what_would_be_lost_in_a_file_is_refused(tmp_path: Path, text: str, complaint: str) -> None:
    (tmp_path / "config.yaml").write_text(text)
    for read in (
        lambda: command_line.parse(["--config", str(tmp_path / "config.yaml")]),
        lambda: run_config.read(tmp_path),
    ):
        with pytest.raises(UserError) as caught:
            read()
        assert complaint in str(caught.value)


def test_a_printed_configuration_holds_the_changes_of_the_model_and_reads_as_before(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["--preset", "small", "--model.llm_config.num_layers", "4", "--model.modalities", "[climate, text]"]
    with pytest.raises(SystemExit):
        command_line.parse([*asked, "--print_config"])
    printed = capsys.readouterr().out
    assert yaml.safe_load(printed)["model"] == {"llm_config": {"num_layers": 4}, "modalities": ["climate", "text"]}
    (tmp_path / "my.yaml").write_text(printed)
    assert command_line.parse(["--config", str(tmp_path / "my.yaml")]).config == command_line.parse(asked).config
