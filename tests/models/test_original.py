"""The original system's calls, as its users wrote them: three dictionaries, its batch, its further names."""

import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers import models as token_models
from torch._subclasses.fake_tensor import FakeTensorMode
from torch_geometric.data import Batch, Data
from torch_geometric.data.data import BaseData

from astrobiogen import models
from astrobiogen.models import UnifiedMultiModalSystem, compute_multimodal_loss, config_from_original, from_original
from astrobiogen.models.common import trainable_parameters
from astrobiogen.models.original import names as original_names
from astrobiogen.training.config.as_dict import flatten, to_dict
from astrobiogen.training.config.schema import TrainConfig

# As in the original's notebook.
LLM: dict[str, Any] = {
    "hidden_size": 4352,
    "num_attention_heads": 64,
    "use_4bit_quantization": False,
    "use_lora": False,
    "use_scientific_reasoning": True,
    "use_rope": True,
    "use_gqa": True,
    "use_rms_norm": True,
    "use_swiglu": True,
}
GRAPH: dict[str, Any] = {
    "node_features": 64,
    "hidden_dim": 512,
    "latent_dim": 256,
    "max_nodes": 50,
    "num_layers": 6,
    "heads": 16,
    "use_biochemical_constraints": True,
}
CNN: dict[str, Any] = {
    "input_variables": 2,
    "output_variables": 2,
    "base_channels": 128,
    "depth": 6,
    "use_attention": True,
    "use_physics_constraints": True,
    "embed_dim": 256,
    "num_heads": 8,
    "num_transformer_layers": 6,
    "use_vit_features": True,
    "use_gradient_checkpointing": True,
}
NARROW = LLM | {"hidden_size": 136, "num_attention_heads": 2, "num_layers": 2, "intermediate_size": 256}
SMALL_CUBE = (2, 2, 4, 8, 8, 4)  # batch, variables, months, lat, lon, lev
SMALL_CNN = CNN | {"base_channels": 8, "depth": 2, "embed_dim": 16, "num_heads": 2, "num_transformer_layers": 1}
SMALL_GRAPH = GRAPH | {"hidden_dim": 16, "latent_dim": 8, "num_layers": 1, "heads": 2}
CHANGES_NOTHING = "names of the original system change nothing"
NO_CHEMISTRY = "carries no stoichiometry"


class LikeTransformers:
    """Called with a list of texts, as tokenizers of transformers are, and without a padding token."""

    def __call__(self, texts: list[str]) -> dict[str, list[list[int]]]:
        return {"input_ids": [[3 + len(word) for word in text.split()] for text in texts]}


def like_tokenizers() -> Tokenizer:
    made = Tokenizer(token_models.WordLevel({"[UNK]": 0, "a": 7, "planet": 8}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()  # pyright: ignore[reportAttributeAccessIssue]
    return made


def original_batch(cube: tuple[int, ...] = (2, 2, 12, 32, 64, 10), points: int = 1000) -> dict[str, Any]:
    """The notebook's batch: random values, graphs of 50 nodes and 100 edges without any chemistry."""
    size, generator = cube[0], torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    graphs: list[BaseData] = [
        Data(x=normal(50, 64), edge_index=torch.randint(50, (2, 100), generator=generator)) for _ in range(size)
    ]
    spectrum = normal(size, points, 3)
    spectrum[..., 0] = torch.linspace(0.6, 28.0, points)
    return {
        "run_ids": torch.arange(size),
        "planet_params": normal(size, 10),
        "climate_datacube": normal(*cube),
        "metabolic_graph": Batch.from_data_list(graphs),
        "spectroscopy": spectrum,
        "text_description": ["a rocky planet with an ocean", "a dry one"][:size],
        "habitability_label": torch.arange(size) % 2,
        "metadata": [{} for _ in range(size)],
        "data_completeness": None,
        "quality_scores": None,
    }


def step(system: UnifiedMultiModalSystem, batch: dict[str, Any]) -> dict[str, Any]:
    """Outputs of a forward call whose loss was differentiated."""
    with pytest.warns(UserWarning, match=NO_CHEMISTRY):
        outputs = system(batch)
    loss, parts = compute_multimodal_loss(outputs, batch, system.config, None)
    loss.backward()
    return outputs | {"parts": parts}


def test_the_three_dictionaries_of_the_original_at_their_size() -> None:
    """13 billion parameters on fake tensors: shapes of everything, no memory."""
    batch = from_original(original_batch(), LikeTransformers())
    mode = FakeTensorMode()
    for key, value in batch.items():
        if isinstance(value, torch.Tensor):
            batch[key] = mode.from_tensor(value)
    batch["metabolic_graph"] = batch["metabolic_graph"].clone().apply(mode.from_tensor)
    with mode:
        with pytest.warns(UserWarning, match=CHANGES_NOTHING):
            system = UnifiedMultiModalSystem(llm_config=LLM, graph_config=GRAPH, cnn_config=CNN)
        outputs = step(system, batch)
    assert trainable_parameters(system) > 13e9
    assert system.config.cnn_config.grid == (12, 1, 10, 32, 64)
    assert outputs["logits"].shape == (2, 2)
    assert outputs["present"].shape == (2, 5)
    assert all(parameter.grad is not None for parameter in system.text.layers.parameters())


def test_the_three_dictionaries_with_smaller_widths_are_differentiated() -> None:
    with pytest.warns(UserWarning, match=CHANGES_NOTHING):
        system = UnifiedMultiModalSystem(llm_config=NARROW, graph_config=SMALL_GRAPH, cnn_config=SMALL_CNN)
    outputs = step(system, from_original(original_batch(), LikeTransformers()))
    assert bool(outputs["present"].all())
    assert bool(outputs["logits"].isfinite().all())
    for term in ("classification", "reconstruction", "physics", "consistency", "llm", "graph"):
        assert outputs["parts"][term] > 0, term
    for part in ("climate", "graph", "spectrum", "text", "planet_params", "fusion"):
        used = [p.grad.abs().max() for p in getattr(system, part).parameters() if p.grad is not None]
        assert max(used) > 0, part


def configuration(*values: Any, **given: Any) -> models.MultiModalTrainingConfig:
    return models.MultiModalTrainingConfig(*values, **given)


@pytest.mark.filterwarnings(f"ignore:.*{CHANGES_NOTHING}")
def test_the_configuration_takes_the_dictionaries_too() -> None:
    parts: dict[str, Any] = {"llm_config": NARROW, "graph_config": SMALL_GRAPH, "cnn_config": SMALL_CNN}
    by_name = configuration(**parts, fusion_config=None)
    by_place = configuration(*parts.values())
    assert by_name == by_place
    assert by_name.llm_config.hidden_size == 136
    assert by_name.fusion_config == models.FusionConfig()
    assert by_name.spectrum_config.channels == 3
    own = configuration(**parts, spectrum_config=models.SpectrumConfig())
    assert own.spectrum_config.channels == 2
    with pytest.raises(TypeError, match="hidden"):
        configuration(**parts | {"llm_config": {"hidden": 3}})
    with pytest.raises(TypeError, match="cnn_config must be a DatacubeConfig or a dictionary"):
        configuration(**parts | {"cnn_config": 5})
    with pytest.raises(TypeError):
        configuration(NARROW, llm_config=NARROW)


NEUTRAL: tuple[tuple[type, dict[str, Any]], ...] = (
    (models.LLMConfig, {"use_lora": False, "use_4bit_quantization": False, "lora_r": 16, "learning_rate": 2e-4}),
    (models.GraphVAEConfig, {"max_nodes": 50, "learning_rate": 1e-4}),
    (models.DatacubeConfig, {"use_attention": True, "learning_rate": 1e-4}),
    (models.FusionConfig, {"fusion_strategy": "cross_attention", "modality_configs": None}),
    (
        models.MultiModalTrainingConfig,
        {"batch_size": 1, "gradient_accumulation_steps": 32, "max_epochs": 200, "learning_rate": 1e-4},
    ),
)
REFUSED: tuple[tuple[type, str, Any, str], ...] = (
    (models.LLMConfig, "use_lora", True, "every weight is trained"),
    (models.LLMConfig, "use_4bit_quantization", True, "adamw8bit"),
    (models.LLMConfig, "model_name", "microsoft/DialoGPT-medium", "swap_layers"),
    (models.DatacubeConfig, "physics_weight", 0.1, "MultiModalTrainingConfig.physics_weight"),
    (models.FusionConfig, "fusion_strategy", "weighted_sum", "cross-attention"),
    (models.MultiModalTrainingConfig, "use_gradient_checkpointing", True, "llm_config, graph_config and cnn_config"),
)


@pytest.mark.parametrize(("kind", "given"), NEUTRAL)
def test_neutral_names_pass_with_one_note(kind: type, given: dict[str, Any]) -> None:
    with pytest.warns(UserWarning, match=CHANGES_NOTHING) as notes:
        made = kind(**given)
    assert made == kind()
    assert len(notes) == 1
    assert all(name in str(notes[0].message) for name in given)
    assert notes[0].filename == __file__


@pytest.mark.parametrize(("kind", "name", "value", "instead"), REFUSED)
def test_names_that_ask_for_something_else_raise_with_what_replaces_them(
    kind: type, name: str, value: Any, instead: str
) -> None:
    with pytest.raises(TypeError, match=f"{name}=.*{re.escape(instead)}"):
        kind(**{name: value})


def test_options_named_in_the_notes_exist() -> None:
    known = set(flatten(to_dict(TrainConfig())))
    tables = (getattr(original_names, table) for table in dir(original_names) if table.endswith("_NAMES"))
    text = " ".join(entry.instead for table in tables for entry in table.values())
    options = re.findall(r"--([\w.]+)", text)
    assert len(options) > 5
    assert set(options) <= known


def test_both_spellings_of_the_fusion() -> None:
    assert models.RebuiltMultiModalIntegration is models.RebuiltMultimodalIntegration


def test_numerical_and_spectral_data_reach_the_language_model() -> None:
    config = models.LLMConfig(
        hidden_size=32, num_attention_heads=2, num_layers=1, intermediate_size=32, vocab_size=16,
        modality_dims={"numerical": 5, "spectral": 6},
    )  # fmt: skip
    model, ids = models.RebuiltLLMIntegration(config), torch.tensor([[1, 2, 3]])
    numbers, spectrum = torch.randn(1, 5), torch.randn(1, 6)
    named = model(ids, numerical_data=numbers, spectral_data=spectrum)["hidden_states"]
    ours = model(ids, modality_features={"numerical": numbers, "spectral": spectrum})["hidden_states"]
    assert torch.equal(named, ours)
    assert not torch.equal(named, model(ids)["hidden_states"])
    plain = models.RebuiltLLMIntegration(config, modality_dims={})
    with pytest.raises(ValueError, match=r"numerical.*modality_dims"):
        plain(ids, numerical_data=numbers)


def test_the_loss_takes_no_annotations() -> None:
    call: Callable[..., Any] = compute_multimodal_loss
    with pytest.raises(TypeError, match="multiply the loss"):
        call({}, {}, models.MultiModalTrainingConfig(), [{"quality": 1.0}])


def test_values_of_the_batch_are_kept() -> None:
    theirs = original_batch(SMALL_CUBE, points=9)
    theirs["spectroscopy"][0, 3, 1] = torch.nan
    theirs["planet_params"][1, 4] = torch.nan
    theirs["climate_datacube"][1] = 0.0
    ours = from_original(theirs, LikeTransformers())
    assert ours["climate_datacube"].shape == (2, 2, 4, 1, 4, 8, 8)
    assert ours["climate_datacube"][0, 1, 2, 0, 3, 4, 5] == theirs["climate_datacube"][0, 1, 2, 4, 5, 3]
    assert ours["climate_mask"].tolist() == [[True], [False]]
    assert ours["spectroscopy_mask"].sum(1).tolist() == [8, 9]
    assert ours["spectroscopy"][0, 3].tolist() == [0.0, 0.0, 0.0]
    assert torch.equal(ours["spectroscopy"][1], theirs["spectroscopy"][1])
    assert (~ours["planet_params_mask"]).nonzero().tolist() == [[1, 4]]
    assert ours["input_ids"].tolist() == [[4, 8, 9, 7, 5, 8], [4, 6, 6, 0, 0, 0]]
    assert ours["labels"][1].tolist() == [4, 6, 6, -100, -100, -100]
    assert ours["metabolic_graph"] is theirs["metabolic_graph"]
    seven = theirs | {"climate_datacube": ours["climate_datacube"]}
    assert torch.equal(from_original(seven, LikeTransformers())["climate_datacube"], ours["climate_datacube"])


def test_texts_of_both_kinds_of_tokenizer_and_absent_ones() -> None:
    theirs: dict[str, Any] = {"text_description": ["a planet", None]}
    made = from_original(theirs, like_tokenizers())
    assert made["input_ids"].tolist() == [[7, 8], [0, 0]]
    assert made["attention_mask"].tolist() == [[True, True], [False, False]]
    assert from_original(theirs, like_tokenizers(), max_length=1)["input_ids"].tolist() == [[7], [0]]
    ready = {"input_ids": torch.tensor([[5, 6, 0]]), "attention_mask": torch.tensor([[1, 1, 0]])}
    assert from_original(ready)["labels"].tolist() == [[5, 6, -100]]


def test_wavelengths_take_the_place_of_the_first_column() -> None:
    theirs = {"spectroscopy": torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(0))}
    with pytest.warns(UserWarning, match="column 0 is read as the wavelength"):
        from_original(theirs)
    waves = torch.linspace(1.0, 5.0, 5)
    made = from_original(theirs, wavelengths=waves)["spectroscopy"]
    assert torch.equal(made[..., 0], waves.expand(2, 5))
    assert torch.equal(made[..., 1:], theirs["spectroscopy"][..., 1:])


@pytest.mark.filterwarnings(f"ignore:.*{CHANGES_NOTHING}")
def test_sizes_come_from_the_batch() -> None:
    theirs = original_batch((2, 2, 10, 6, 14, 5), points=9)
    theirs["planet_params"], theirs["spectroscopy"] = torch.randn(2, 8), theirs["spectroscopy"][..., :2]
    ours = from_original(theirs, LikeTransformers())
    config = config_from_original(ours, llm_config=NARROW, graph_config=SMALL_GRAPH, cnn_config=SMALL_CNN)
    assert config.cnn_config.grid == (10, 1, 5, 6, 14)
    assert (config.planet_config.n_parameters, config.spectrum_config.channels) == (8, 2)
    assert step(UnifiedMultiModalSystem(config), ours)["logits"].shape == (2, 2)
    fixed = config_from_original(ours, cnn_config=models.DatacubeConfig())
    assert fixed.cnn_config == models.DatacubeConfig()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"climate_datacubes": 1}, r"'climate_datacubes' \(did you mean 'climate_datacube'\?\)"),
        ({"spectroscopy": torch.zeros(2, 9)}, "spectroscopy must have 3 axes"),
        ({"climate_datacube": torch.zeros(2, 2, 4, 8, 8)}, "climate_datacube must have 6 axes"),
        ({"climate_datacube": torch.full((2, 2, 4, 8, 8, 4), torch.inf)}, "climate_datacube holds"),
        ({"quality_scores": torch.ones(2)}, "quality_scores: nothing reads it"),
    ],
)
def test_wrong_batches_of_the_original(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        from_original(original_batch(SMALL_CUBE, points=9) | change, LikeTransformers())


def test_wrong_types_and_missing_tokenizers() -> None:
    theirs = original_batch(SMALL_CUBE, points=9)
    with pytest.raises(ValueError, match="needs a tokenizer"):
        from_original(theirs)
    with pytest.raises(TypeError, match="tokenizer must be"):
        from_original(theirs, 5)
    with pytest.raises(TypeError, match="planet_params must be a tensor, got list"):
        from_original(theirs | {"planet_params": [1.0]}, LikeTransformers())
    with pytest.raises(TypeError, match="text_description must be a list"):
        from_original(theirs | {"text_description": "a planet"}, LikeTransformers())


def test_values_in_units_are_told() -> None:
    theirs = {"climate_datacube": torch.full(SMALL_CUBE, 280.0)}
    with pytest.warns(UserWarning, match=r"variable 0 has values of 280.*standardised"):
        from_original(theirs)


def test_the_system_refuses_a_mistyped_key(spec: Any, make_batch: Callable[..., dict[str, Any]]) -> None:
    system, batch = UnifiedMultiModalSystem(models.presets.tiny(spec)), make_batch(2, spec)
    batch["spectroscopi"] = batch.pop("spectroscopy")
    with pytest.raises(ValueError, match=r"'spectroscopi' \(did you mean 'spectroscopy'\?\)"):
        system(batch)


def test_constraints_without_stoichiometry_are_told_once_per_model() -> None:
    graph = original_batch(SMALL_CUBE, points=9)["metabolic_graph"]
    small: dict[str, Any] = {"hidden_dim": 16, "latent_dim": 8, "num_layers": 1, "heads": 2}
    model = models.RebuiltGraphVAE(**small)
    with pytest.warns(UserWarning, match=NO_CHEMISTRY):
        outputs = model(graph)
    assert all(bool((value == 0).all()) for value in outputs["constraints"].values())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(graph)
        models.RebuiltGraphVAE(**small, use_biochemical_constraints=False)(graph)
