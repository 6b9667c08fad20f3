"""A trained model, or several as an ensemble, that answers for files which have no label."""

import csv
import dataclasses
import json
import logging
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from astrobiogen import data
from astrobiogen.data.dataset import PairEntry
from astrobiogen.datatools.progress import track
from astrobiogen.kernels.registry import use_kernels
from astrobiogen.predict import reading, tensors
from astrobiogen.predict.calibration import Calibration
from astrobiogen.predict.domain import Domain
from astrobiogen.predict.rows import OUTSIDE, REFUSED, UNKNOWN, WITHIN, Prediction, Predictions
from astrobiogen.training.batches import assemble, shared_items
from astrobiogen.training.distributed import runtime
from astrobiogen.training.errors import UserError
from astrobiogen.training.optim import precision
from astrobiogen.training.tools import trained

_LOG = logging.getLogger("astrobiogen")
_BLOCK = 10  # climates whose networks are asked together: each climate and network of a batch is encoded once
Paths = Iterable[str | Path]


def load_model(run: str | Path | Sequence[str | Path], device: str = "auto") -> "TrainedModel":
    """The trained model of a run's folder (its best weights) or of a checkpoint's; several folders are an ensemble.

    Args:
        run: one folder, or the folders of the members.
        device: "auto" (a GPU if there is one), "cpu" or "cuda".

    Raises:
        UserError: no such folder, no whole checkpoint, or members that were not trained on the same data.
    """
    folders = [Path(run)] if isinstance(run, str | Path) else [Path(folder) for folder in run]
    if not folders:
        raise UserError("run: got no folder, expected at least one")
    return TrainedModel([trained.find(folder) for folder in folders], runtime.choose_device(device))


class TrainedModel(nn.Module):
    """What `load_model` gives, in evaluation mode.

    `predict` reads files. `forward` takes and gives tensors only, so that `torch.export.export(model, (inputs,))` takes
    the model; `inputs` makes such tensors of samples.

    Args:
        members: checkpoints of models that were trained on the same data.
        device: where they run.

    Attributes:
        spec: axes, units, means and deviations of the data that the model was trained on.
    """

    def __init__(self, members: Sequence[trained.Trained], device: torch.device) -> None:
        super().__init__()
        first = members[0]
        if first.statistics is None:
            raise UserError(f"{first.path}: holds no statistics of its training data; it cannot read files")
        for other in members[1:]:
            if other.statistics != first.statistics or other.config.data.path != first.config.data.path:
                raise UserError(
                    f"{other.path}: trained on other data than {first.path}; an ensemble's members share it"
                )
        self._statistics, self._config = first.statistics, first.config
        self.spec = data.DataSpec.from_json(json.dumps(first.statistics["spec"]), "statistics")
        self._members = nn.ModuleList(member.model(self.spec) for member in members)
        self._device = device
        self._dtype, _ = precision.choose_dtype(first.config.precision, device)
        self.to(device).eval()

    def forward(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Answers for B pairs.

        Args:
            inputs: see `inputs`; C climates and K networks, each once, and B pairs that name them.

        Returns:
            ``probability`` [B] of class 1 and ``share`` [B], the predicted share of habitable surface and time, both
            the mean over the members; ``probabilities`` [members, B].
        """
        batch = tensors.batch_of(inputs)
        outputs = [member(batch) for member in self._members]
        each = torch.stack([output["logits"].double().softmax(-1)[:, 1] for output in outputs])
        share = torch.stack([output["regression"].double() for output in outputs]).mean(0)
        return {"probability": each.mean(0), "share": share, "probabilities": each}

    def inputs(self, samples: Sequence[data.Sample]) -> dict[str, Tensor]:
        """The tensors of samples (of `data.load` or of files), on the model's device, as `forward` takes them."""
        batch = shared_items.collate_shared(samples, self.spec.pad_id)
        return {name: value.to(self._device) for name, value in tensors.flattened(batch).items()}

    def predict(
        self,
        climates: Paths,
        networks: Paths,
        pairs: Iterable[tuple[str, str]] | None = None,
        *,
        workers: int = 2,
        catalogue: str | Path | None = None,
    ) -> Predictions:
        """Answer for climates and metabolic networks in files.

        Args:
            climates: netCDF files, Zarr stores, or folders of them, one climate each.
            networks: SBML or JSON files, plain or ``.gz``, or folders of them.
            pairs: (climate, network) to answer for, as file names or paths; None: each climate with each network.
            workers: processes that read networks, at least 1.
            catalogue: table of the Open Exoplanet Catalogue, for the star's mass, radius and metallicity and the
                orbital period of the planets it lists; None: those are unknown.

        Raises:
            UserError: `pairs` names a file that is not among the others, or there is nothing to answer for.
        """
        places = reading.climate_files(Path(path) for path in climates)
        organisms = reading.network_files(Path(path) for path in networks)
        asked = _asked(places, organisms, pairs)
        table = Path(catalogue) if catalogue is not None else None
        used = [list(dict.fromkeys(pair[side] for pair in asked)) for side in (0, 1)]
        given = reading.read(used[0], used[1], self._statistics, workers, table)
        good = [pair for pair in asked if not {str(path) for path in pair} & set(given.refused)]
        wanted = [PairEntry(str(place), str(organism), 0.0, 0, "new") for place, organism in good]
        answers = self._answers(data.HabitatDataset(given.store, wanted, "new"), "pairs")
        domain, low, high, interval = self._compared(answers)
        flags = _Flags(domain, given)
        rows = {
            pair: flags.row(pair, self._share(answers, k), answers["probability"][k], low[k], high[k])
            for k, pair in enumerate(good)
        }
        return Predictions([rows.get(pair) or flags.refusal(pair) for pair in asked], interval, given.refused)

    def _share(self, answers: dict[str, np.ndarray], number: int) -> float:
        """The predicted share; NaN where the model was not trained to predict it."""
        learnt = all(member.config.regression_weight > 0 for member in self._members)  # type: ignore[union-attr]
        return float(answers["share"][number]) if learnt else float("nan")

    def _compared(self, answers: dict[str, np.ndarray]) -> tuple[Domain | None, np.ndarray, np.ndarray, str]:
        """Where the training data lie, the interval of each answer, and what that interval is."""
        each = answers["probabilities"]
        several = len(self._members) > 1
        low, high = each.min(0), each.max(0)
        name = f"range of {len(self._members)} runs"
        try:
            bundle = assemble.load_bundle(self._config, self._statistics)
        except UserError as error:
            _LOG.warning("the training data cannot be read, nothing is known of what lies outside them: %s", error)
            unknown = np.full(each.shape[1], np.nan)
            return (None, low, high, name) if several else (None, unknown, unknown, "none: training data not found")
        if not several:
            held = self._answers(bundle.validation, "validation pairs")["probability"]
            found = Calibration(held, bundle.validation.labels().numpy().astype(np.float64))
            low, high = found.interval(answers["probability"])
            name = f"Venn-Abers calibration on {len(held)} validation pairs"
        return Domain.of(bundle.train), low, high, name

    def _answers(self, samples: data.HabitatDataset, what: str) -> dict[str, np.ndarray]:
        """Results of `forward` as float64 arrays, in the order of `samples`."""
        order = shared_items.in_blocks(samples, self._config.evaluation.batch_size, _BLOCK) if len(samples) else []
        kinds = {"probability": (), "share": (), "probabilities": (len(self._members),)}
        found = {name: np.zeros((*shape, len(samples))) for name, shape in kinds.items()}
        for numbers in track(order, f"batches of {what}", len(order)):
            inputs = self.inputs([samples[number] for number in numbers])
            with (
                torch.inference_mode(),
                use_kernels(self._config.runtime.kernels),
                precision.autocast(self._device, self._dtype),
            ):
                for name, value in self(inputs).items():
                    found[name][..., numbers] = value.double().cpu().numpy()
        if not np.isfinite(found["probabilities"]).all():
            raise UserError(f"{what}: the model gives values that are not finite; nothing was written", exit_code=1)
        return found


class _Flags:
    """Rows with what is known of where their files lie; each file is looked at once."""

    def __init__(self, domain: Domain | None, given: reading.Inputs) -> None:
        self._domain, self._given = domain, given
        self._distances: dict[str, dict[str, float]] = {}

    def row(self, pair: tuple[Path, Path], share: float, probability: float, low: float, high: float) -> Prediction:
        """The row of a pair that was answered."""
        climate, network = map(str, pair)
        earlier = [name for name in self._given.store.planets[climate].epochs.names[:-1] if name is not None]
        found = Prediction(
            *(climate, network, float(probability), share, float(low), float(high)),
            history=" ".join(earlier),
        )
        if self._domain is None:
            return dataclasses.replace(found, flag=UNKNOWN, reason="the training data were not found")
        distances = self._of(climate) | self._of(network)
        reasons = "; ".join(self._domain.reasons(distances))
        named = {f"{name}_distance": value for name, value in distances.items()}
        return dataclasses.replace(found, flag=OUTSIDE if reasons else WITHIN, reason=reasons, **named)

    def _of(self, name: str) -> dict[str, float]:
        if name not in self._distances and self._domain is not None:
            store = self._given.store
            self._distances[name] = (
                self._domain.of_climate(store.planets[name])
                if name in store.planets
                else self._domain.of_network(store.organisms[name])
            )
        return self._distances[name]

    def refusal(self, pair: tuple[Path, Path]) -> Prediction:
        """The row of a pair of which a file was refused."""
        refused = self._given.refused
        reasons = [f"{path}: {refused[str(path)]}" for path in pair if str(path) in refused]
        return Prediction(str(pair[0]), str(pair[1]), flag=REFUSED, reason="; ".join(reasons))


def _asked(
    places: Sequence[Path], organisms: Sequence[Path], pairs: Iterable[tuple[str, str]] | None
) -> list[tuple[Path, Path]]:
    """The pairs to answer for."""
    if pairs is None:
        found = [(place, organism) for place in places for organism in organisms]
    else:
        found = [(_named(place, places, "climate"), _named(one, organisms, "network")) for place, one in pairs]
    if not found:
        raise UserError(f"{len(places)} climates and {len(organisms)} networks: there is no pair to answer for")
    return list(dict.fromkeys(found))


def _named(name: str, paths: Sequence[Path], kind: str) -> Path:
    """The file that a row of the pairs means: by its path, or by its name alone where only one has it."""
    found = [path for path in paths if str(path) == name] or [path for path in paths if path.name == name]
    if len(found) != 1:
        problem = "is none of the files given" if not found else f"is the name of {len(found)} files: give its path"
        raise UserError(f"pairs: {kind} {name!r} {problem}")
    return found[0]


def read_pairs(path: Path) -> list[tuple[str, str]]:
    """Rows of a CSV with the columns climate and network.

    Raises:
        UserError: it cannot be read, or lacks a column.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            if missing := {"climate", "network"} - set(reader.fieldnames or ()):
                raise UserError(f"{path}: column {sorted(missing)[0]} absent; the header is {reader.fieldnames}")
            return [((row["climate"] or "").strip(), (row["network"] or "").strip()) for row in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: cannot be read ({error})") from error
