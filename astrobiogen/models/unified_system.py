"""The multi-modal model: five encoders, a language model that reads the other four, and the fusion."""

import contextlib
import dataclasses
from collections.abc import Collection
from typing import Any

import torch
from torch import nn

from astrobiogen.kernels.registry import use_kernels
from astrobiogen.models.batch_keys import batch_size, check_keys, per_sample
from astrobiogen.models.common import check_axes, require, resolve_config
from astrobiogen.models.datacube.cnn import RebuiltDatacubeCNN
from astrobiogen.models.graph.inputs import GraphTensors, graph_tensors
from astrobiogen.models.graph.summary import NetworkSummary
from astrobiogen.models.graph.vae import RebuiltGraphVAE
from astrobiogen.models.llm_integration import RebuiltLLMIntegration
from astrobiogen.models.multimodal_integration import FusionConfig, RebuiltMultimodalIntegration, mean_answer
from astrobiogen.models.planet_encoder import PlanetParameterEncoder
from astrobiogen.models.spectrum_encoder import SpectrumEncoder
from astrobiogen.models.system_config import MODALITIES, MultiModalTrainingConfig


class UnifiedMultiModalSystem(nn.Module):
    """Climate cube, metabolic graph, spectrum, text and planet parameters -> habitability.

    The four non-text encoders run first; their features enter the language model as prefix tokens and the fusion as
    tokens; the text's features enter the fusion only. Every modality may be absent, for single samples (masks) or for
    all (keys left out).

    Args:
        config: a `MultiModalTrainingConfig`; default `MultiModalTrainingConfig()`, the original's sizes (13 billion
            parameters).
        **overrides: any of its fields.

    Raises:
        TypeError: an override is no field of the configuration.
        ValueError: sizes do not fit together.
    """

    def __init__(self, config: MultiModalTrainingConfig | None = None, **overrides: Any) -> None:
        super().__init__()
        config = resolve_config(MultiModalTrainingConfig, config, overrides)
        self.config = config
        dims: dict[str, int] = {}
        if "climate" in config.modalities:
            self.climate = RebuiltDatacubeCNN(config.cnn_config)
            dims["climate"] = self.climate.feature_dim
        if "graph" in config.modalities:
            self.graph = RebuiltGraphVAE(config.graph_config)
            dims["graph"] = self.graph.feature_dim
            if config.use_network_summary:
                graph = config.graph_config
                self.network_summary = NetworkSummary(graph.node_features, self.graph.feature_dim, graph.dropout)
        if "spectrum" in config.modalities:
            self.spectrum = SpectrumEncoder(config.spectrum_config)
            dims["spectrum"] = self.spectrum.feature_dim
        if "planet_params" in config.modalities:
            self.planet_params = PlanetParameterEncoder(config.planet_config)
            dims["planet_params"] = self.planet_params.feature_dim
        if "text" in config.modalities:
            self.text = RebuiltLLMIntegration(config.llm_config, modality_dims=dict(dims))
            dims["text"] = config.llm_config.hidden_size
        ordered = {name: dims[name] for name in MODALITIES if name in dims}
        self.fusion = RebuiltMultimodalIntegration(
            _of_the_present(config.fusion_config, ordered), modality_dims=ordered
        )
        simple = {"climate": config.cnn_config.statistics_thresholds > 0, "graph": config.use_network_summary}
        simple_dims = {name: ordered[name] for name, exists in simple.items() if exists and name in ordered}
        if config.summary_share and simple_dims:
            several = config.fusion_config.use_adaptive_weighting and len(simple_dims) > 1
            self.summary_fusion = RebuiltMultimodalIntegration(
                _of_the_present(config.fusion_config, simple_dims), modality_dims=simple_dims, use_modality_heads=False,
                use_adaptive_weighting=several,
            )  # fmt: skip

    def forward(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Run everything that the batch holds.

        Args:
            batch: see docs/models.md. With ``climate_index`` or ``graph_index`` (int64 [B]) the cube or the graph
                batch holds each distinct item once, and sample b uses item index[b]. With ``text_rows`` (int64 [K],
                ascending, K > 0) only the text of these samples is read, in place of a draw by `text_share`.

        Returns:
            ``logits`` [B, 2], ``regression`` [B], ``fused_features`` [B, fusion_dim], ``modality_weights`` [B, 5] in
            the order of `MODALITIES`, ``present`` bool [B, 5] (what the batch holds
            and `text_share` reads), ``fused`` bool [B, 5] (less
            what modality dropout hid), ``climate_features``, ``graph_features``, ``spectral_features``,
            ``planet_features``, ``llm_features`` ([B, size] or None), and the parts' own results ``cnn_outputs``,
            ``graph_vae_outputs``, ``llm_outputs``, ``fusion_outputs`` (empty when the part did not run; per-sample
            entries are [B]).

        Raises:
            ValueError: the batch has an unknown key, holds none of the modalities, or an axis has the wrong size.
        """
        reference = self.config.kernels == "reference"
        with use_kernels("reference") if reference else contextlib.nullcontext():
            return self._forward(batch)

    def _forward(self, batch: dict[str, Any]) -> dict[str, Any]:
        check_keys(batch)
        size = batch_size(batch)
        present = self._present(batch, size)
        require(
            len(present) > 0,  # `bool` of a dict breaks the graph in torch 2.11
            f"batch holds none of the modalities of this model, {self.config.modalities}; its keys are {sorted(batch)}",
        )
        features: dict[str, torch.Tensor] = {}
        cnn: dict[str, Any] = {}
        graph: dict[str, Any] = {}
        text: dict[str, Any] = {}
        if "climate" in present:
            cnn = per_sample(self.climate(batch["climate_datacube"], batch.get("climate_mask")), batch, "climate_index")
            features["climate"] = cnn["features"]
        if "graph" in present:
            graph = self.graph(batch["metabolic_graph"])
            if self.config.use_network_summary:
                graph |= self.network_summary(self._networks(batch["metabolic_graph"]))
                graph["features"] = graph["features"] + graph["summary_features"]
            graph = per_sample(graph, batch, "graph_index")
            features["graph"] = graph["features"]
        if "spectrum" in present:
            features["spectrum"] = self.spectrum(batch["spectroscopy"], batch.get("spectroscopy_mask"))
        if "planet_params" in present:
            features["planet_params"] = self.planet_params(batch["planet_params"], batch.get("planet_params_mask"))
        for name, value in features.items():
            check_axes(f"{name} features", value, ("batch", "feature"), {"batch": size})
        rows = self._text_rows(batch, size)
        if "text" in present:
            labels = batch.get("labels")
            if labels is not None:  # the words of an absent text are no targets
                check_axes("labels", labels, ("batch", "sequence"), {"batch": size})
                labels = labels.masked_fill(~present["text"][:, None], -100)
            text = self._read(batch | {"labels": labels}, features, present, rows)
            features["text"] = text["features"]
        fusion = self._fused(features, present, cnn, graph)
        absent = torch.zeros(size, dtype=torch.bool, device=fusion["logits"].device)
        return {
            "logits": fusion["logits"],
            "regression": fusion["regression"],
            "fused_features": fusion["fused_features"],
            "modality_weights": self._all_modalities(fusion["modality_weights"]),
            "present": torch.stack([present.get(name, torch.zeros_like(absent)) for name in MODALITIES], dim=1),
            "fused": self._all_modalities(fusion["present"]),
            "climate_features": features.get("climate"),
            "graph_features": features.get("graph"),
            "spectral_features": features.get("spectrum"),
            "planet_features": features.get("planet_params"),
            "llm_features": features.get("text"),
            "cnn_outputs": cnn,
            "graph_vae_outputs": graph,
            "llm_outputs": text,
            "fusion_outputs": fusion,
        }

    def _fused(
        self,
        features: dict[str, torch.Tensor],
        present: dict[str, torch.Tensor],
        cnn: dict[str, Any],
        graph: dict[str, Any],
    ) -> dict[str, torch.Tensor]:
        """What the fusion says, and the fusion of summaries, if there is one."""
        familiarity = {"graph": graph["familiarity"]} if "familiarity" in graph else None
        fusion = self.fusion(features, present, familiarity)
        if not hasattr(self, "summary_fusion"):
            return fusion
        found = {"climate": cnn.get("statistics_features"), "graph": graph.get("summary_features")}
        simple = {name: value for name, value in found.items() if value is not None}
        return fusion | self._second_reading(fusion, simple, {name: present[name] for name in simple}, familiarity)

    def _second_reading(
        self,
        first: dict[str, torch.Tensor],
        features: dict[str, torch.Tensor],
        present: dict[str, torch.Tensor],
        familiarity: dict[str, torch.Tensor] | None,
    ) -> dict[str, torch.Tensor]:
        """``first_logits``, ``first_regression``, ``second_logits``, ``second_regression`` of both fusions; the first
        takes the place of the second where a sample has none of `features`. In evaluation also ``logits`` and
        ``regression``, their mean.
        """
        answers = {name: [first[name], first[name]] for name in ("logits", "regression")}
        if features:
            second = self.summary_fusion(features, present, familiarity)
            held = torch.stack(list(present.values())).any(0)
            answers["logits"][1] = torch.where(held[:, None], second["logits"], first["logits"])
            answers["regression"][1] = torch.where(held, second["regression"], first["regression"])
        both = {f"{which}_{name}": answers[name][k] for k, which in enumerate(("first", "second")) for name in answers}
        if self.training:
            return both
        whole, summaries = zip(*answers.values())
        share = torch.full_like(first["regression"], self.config.summary_share)
        return both | dict(zip(answers, mean_answer(summaries, whole, share)))

    def remember_networks(self, graphs: Any) -> None:
        """Take in the distinct networks of the training set (`torch_geometric` `Batch`), see `use_network_summary`.

        Raises:
            ValueError: the system was built without.
        """
        require(
            self.config.use_network_summary and "graph" in self.config.modalities,
            "remember_networks: use_network_summary is off",
        )
        self.network_summary.remember(self._networks(graphs))

    def _networks(self, graphs: Any) -> GraphTensors:
        config = self.config.graph_config
        return graph_tensors(graphs, config.node_features, config.laplacian_dim, config.random_walk_dim)

    def _read(
        self,
        batch: dict[str, Any],
        features: dict[str, torch.Tensor],
        present: dict[str, torch.Tensor],
        rows: torch.Tensor | None,
    ) -> dict[str, Any]:
        """Results of the language model; ``features`` [B, H] in the order of the batch. Samples outside `rows` (None:
        none is) have features of 0, and their ``present["text"]`` is changed to False.
        """
        texts = {name: batch.get(name) for name in ("input_ids", "attention_mask", "labels")}
        size, others = present["text"].shape[0], {name: present[name] for name in features}
        if rows is None:
            return self.text(**texts, modality_features=dict(features), modality_present=others)
        outputs = self.text(
            **{name: None if value is None else value[rows] for name, value in texts.items()},
            modality_features={name: value[rows] for name, value in features.items()},
            modality_present={name: value[rows] for name, value in others.items()},
        )
        read = torch.zeros_like(present["text"]).index_fill(0, rows, True)
        present["text"] = present["text"] & read
        few = outputs["features"]
        return outputs | {"features": few.new_zeros(size, few.shape[1]).index_copy(0, rows, few)}

    def _text_rows(self, batch: dict[str, Any], size: int) -> torch.Tensor | None:
        """Sorted numbers of the samples whose text is read; None for all of them."""
        if batch.get("text_rows") is not None:
            return batch["text_rows"]
        count = max(1, round(self.config.text_share * size))
        if not self.training or count >= size:
            return None
        return torch.randperm(size, device=self.fusion.prior.device)[:count].sort().values

    def _present(self, batch: dict[str, Any], size: int) -> dict[str, torch.Tensor]:
        """bool [B] per modality that this model has and the batch holds."""
        sources = {
            "climate": ("climate_datacube", "climate_mask"),
            "graph": ("metabolic_graph", "graph_mask"),
            "spectrum": ("spectroscopy", "spectroscopy_mask"),
            "text": ("input_ids", "attention_mask"),
            "planet_params": ("planet_params", "planet_params_mask"),
        }
        device = self.fusion.prior.device
        present: dict[str, torch.Tensor] = {}
        for index, name in enumerate(MODALITIES):
            key, mask_key = sources[name]
            if name not in self.config.modalities or batch.get(key) is None:
                continue
            mask = torch.ones(size, dtype=torch.bool, device=device)
            if batch.get(mask_key) is not None:
                mask = batch[mask_key] if name == "graph" else batch[mask_key].any(1)
                if name == "climate" and batch.get("climate_index") is not None:
                    mask = mask[batch["climate_index"]]
            if batch.get("modality_mask") is not None:
                check_axes(
                    "modality_mask", batch["modality_mask"], ("batch", "modality"), {"batch": size, "modality": 5}
                )
                mask = mask & batch["modality_mask"][:, index]
            check_axes(f"presence of {name}", mask, ("batch",), {"batch": size})
            present[name] = mask
        return present

    def _all_modalities(self, values: torch.Tensor) -> torch.Tensor:
        """[B, M] of this model's modalities as [B, 5] in the order of `MODALITIES`, 0 or False for the others."""
        built = list(self.fusion.config.modality_dims)
        columns = [values[:, built.index(n)] if n in built else torch.zeros_like(values[:, 0]) for n in MODALITIES]
        return torch.stack(columns, dim=1)


def _of_the_present(config: FusionConfig, present: Collection[str]) -> FusionConfig:
    """`config` without its settings for those of `MODALITIES` that the system does not have; an unknown name stays, and
    is refused."""
    absent = set(MODALITIES) - set(present)
    return dataclasses.replace(
        config,
        modality_dropouts={name: value for name, value in config.modality_dropouts.items() if name not in absent},
    )
