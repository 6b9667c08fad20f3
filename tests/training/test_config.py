"""Configuration: strict, typed, every key read, presets and resuming."""

import dataclasses
import importlib
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

import astrobiogen.training as package
from astrobiogen.training import config
from astrobiogen.training.config import as_dict, command_line, parser, resume_rules
from astrobiogen.training.config.model import ModelChanges
from astrobiogen.training.errors import UserError


def keys(value: Any, prefix: str = "") -> list[str]:
    names: list[str] = []
    for field in dataclasses.fields(value):
        item = getattr(value, field.name)
        names += keys(item, f"{prefix}{field.name}.") if dataclasses.is_dataclass(item) else [prefix + field.name]
    return names


def test_every_key_is_read_and_documented() -> None:
    folder = Path(package.__path__[0])
    own = ("schema.py", "watch.py")
    source = "\n".join(path.read_text() for path in folder.rglob("*.py") if path.name not in own)
    settings = "\n".join((folder / "config" / name).read_text() for name in own)
    for key in keys(config.TrainConfig()):
        if key.startswith("model."):  # read and documented where the model is
            continue
        group, _, name = key.rpartition(".")
        owners = "|".join(filter(None, (group, "_?config", "settings", "stop")))
        assert re.search(rf"\b(?:{owners})\.{name}\b", source), f"{key} is read nowhere"
        assert re.search(rf'    {name}: [^\n]+\n    """', settings), f"{key} has no docstring"


@pytest.mark.parametrize("name", config.PRESETS)
def test_presets_survive_a_round_trip(name: str) -> None:
    made = config.preset(name)
    assert made.preset == name
    assert parser.from_dict(yaml.safe_load(yaml.safe_dump(as_dict.to_dict(made)))) == made
    assert command_line.parse(["--preset", name]).config == made


def test_large_presets_keep_the_originals_recipe() -> None:
    made = config.preset("original")
    assert made.data.batch_size * made.data.accumulation == 32
    assert made.data.accumulation == 32
    assert (made.stop.patience, made.stop.target_accuracy, made.stop.max_hours) == (20, 0.96, 672.0)
    assert made.optimizer.clip_norm == 1.0
    assert made.optimizer.weight_decay == 1e-5
    assert made.checkpoint.keep == 5


def test_order_of_precedence(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("preset: small\nepochs: 7\noptimizer:\n  learning_rate: 1e-4\n  weight_decay: 0.5\n")
    made = command_line.parse(["--config", str(file), "--optimizer.weight_decay", "0.25"]).config
    assert made.preset == "small"
    assert made.epochs == 7
    assert made.optimizer.learning_rate == 1e-4
    assert made.optimizer.weight_decay == 0.25
    assert made.data == config.preset("small").data
    assert made.stop == config.preset("small").stop


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--optimizer.learning", "3"], "optimizer.learning"),
        (["--optimizer.learning_rate", "fast"], "optimizer.learning_rate"),
        (["--optimizer.learning_rate", "-1"], "optimizer.learning_rate: got -1.0, expected more than 0"),
        (["--preset", "huge"], "preset"),
        (["--checkpoint.keep", "1"], "checkpoint.keep: got 1, expected at least 2"),
        (["--precision.min_scale", "0"], "precision.min_scale"),
        (["--data.batch_size", "0"], "data.batch_size"),
        (["--epochs", "0"], "epochs"),
        (["--config", "nowhere.yaml"], "nowhere.yaml"),
        (["--resume", "nowhere"], "nowhere: no such folder"),
    ],
)
def test_bad_values_name_their_key(arguments: list[str], text: str) -> None:
    with pytest.raises(UserError) as caught:
        command_line.parse(arguments)
    assert text in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 2


def test_unknown_yaml_key_and_broken_yaml(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("optimizer:\n  lr: 0.1\n")
    with pytest.raises(UserError, match=r"'optimizer' does not accept option 'lr'"):
        command_line.parse(["--config", str(file)])
    file.write_text("optimizer: [\n")
    with pytest.raises(UserError):
        command_line.parse(["--config", str(file)])
    with pytest.raises(ValueError, match="'optimizer' does not accept option 'lr'"):
        parser.from_dict({"optimizer": {"lr": 1}})


def test_every_group_rejects_what_it_says() -> None:
    bad: list[tuple[type, dict[str, Any]]] = [
        (config.DataConfig, {"accumulation": 0}),
        (config.DataConfig, {"limit": -1}),
        (config.OptimizerConfig, {"beta2": 1.0}),
        (config.OptimizerConfig, {"ema_decay": 1.0}),
        (config.ScheduleConfig, {"warmup_fraction": 1.0}),
        (config.PrecisionConfig, {"initial_scale": 0.5}),
        (config.CheckpointConfig, {"every_minutes": -1.0}),
        (config.StopConfig, {"target_accuracy": 0.0}),
        (config.EvaluationConfig, {"bootstrap": -1}),
        (config.RuntimeConfig, {"threads": -1}),
    ]
    for group, values in bad:
        with pytest.raises(ValueError, match=f"{next(iter(values))}: got"):
            group(**values)


def test_resume_takes_the_runs_configuration_and_refuses_other_courses(tmp_path: Path) -> None:
    saved = dataclasses.replace(config.preset("tiny"), seed=5, model=ModelChanges(graph_weight=0.1))
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(as_dict.to_dict(saved)))
    same = command_line.parse(["--resume", str(tmp_path), "--stop.max_hours", "9", "--monitor.log_every", "1"])
    assert same.resume == str(tmp_path)
    assert same.config == dataclasses.replace(
        saved,
        stop=dataclasses.replace(saved.stop, max_hours=9.0),
        monitor=dataclasses.replace(saved.monitor, log_every=1),
    )
    with pytest.raises(UserError, match=r"seed: the run has 5, asked for 6"):
        command_line.parse(["--resume", str(tmp_path), "--seed", "6"])
    with pytest.raises(UserError, match="not with --resume"):
        command_line.parse(["--resume", str(tmp_path), "--output", "x"])
    (tmp_path / "config.yaml").write_text("seeed: 5\n")
    with pytest.raises(UserError, match=r"config\.yaml"):
        command_line.parse(["--resume", str(tmp_path)])


def test_help_and_printed_config(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as ended:
        command_line.parse(["--help"])
    assert ended.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "Decoupled weight decay" in text
    assert "--checkpoint.every_minutes" in text
    assert "[--KEY VALUE ...]" in text
    assert "--plan --memory 24" in text
    with pytest.raises(SystemExit):
        command_line.parse(["--preset", "small", "--seed", "3", "--print_config"])
    file = tmp_path / "printed.yaml"
    file.write_text(capsys.readouterr().out)
    assert command_line.parse(["--config", str(file)]).config == dataclasses.replace(config.preset("small"), seed=3)


@pytest.mark.parametrize(
    ("option", "hint"),
    [
        ("--optimizer.learning_rte", "did you mean --optimizer.learning_rate?"),
        ("--find_lr", "did you mean --find-lr?"),
        ("--xyzzy", "--help lists all options"),
    ],
)
def test_unknown_options_name_the_nearest_one(option: str, hint: str) -> None:
    for arguments in ([option, "1"], [f"{option}=1"]):
        with pytest.raises(UserError, match=re.escape(hint)):
            command_line.parse(arguments)


def test_every_key_is_classified_for_resuming_once() -> None:
    known = set(keys(config.TrainConfig()))
    groups = {key.split(".")[0] for key in known}
    tables = (resume_rules.FREE, resume_rules.ROUNDING, resume_rules.FIXED)
    for key in known:
        holders = [table for table in tables for name in {key, key.split(".")[0]} if name in table]
        assert len(holders) == 1, f"{key} is in {len(holders)} of FREE, ROUNDING and FIXED"
        assert holders[0] is resume_rules.group(key)
    for table in (*tables, resume_rules.OF_A_PROCESS):
        assert table.keys() <= known | groups, "a key that does not exist is classified"
        assert all(table.values()), "a key without a reason"
    assert resume_rules.group("data.a_key_of_tomorrow") is resume_rules.FIXED
    assert resume_rules.group("model.cnn_config.depth") is resume_rules.FIXED


def test_keys_that_a_saved_configuration_lacks_have_their_default() -> None:
    saved = as_dict.to_dict(config.TrainConfig())
    del saved["data"]["roll_longitude"]
    assert as_dict.changed_on_resume(saved, as_dict.to_dict(config.TrainConfig())) == {}
    changed = dataclasses.replace(config.TrainConfig(), data=config.DataConfig(roll_longitude=True))
    assert as_dict.changed_on_resume(saved, as_dict.to_dict(changed)) == {"data.roll_longitude": (False, True)}
    model = dataclasses.replace(config.TrainConfig(), model=ModelChanges(modalities=["climate", "text"]))
    assert as_dict.changed_on_resume(saved, as_dict.to_dict(model)) == {"model.modalities": (None, ["climate", "text"])}
    tuples = dataclasses.replace(config.TrainConfig(), model=ModelChanges(modalities=("climate", "text")))
    assert as_dict.changed_on_resume(as_dict.to_dict(tuples), as_dict.to_dict(model)) == {}


def test_the_name_that_the_documentation_gave_the_log_reader_still_works() -> None:
    old = importlib.import_module("astrobiogen.training.monitor")
    assert old.read_log is importlib.import_module("astrobiogen.training.observe").read_log
