"""What simpler methods reach on the same split: the yardstick of the model's figures. Needs scikit-learn."""

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from astrobiogen import data
from astrobiogen.system.extras import Later
from astrobiogen.training.evaluation import metrics

# scikit-learn takes as long to load as torch: `--help` need not wait for it.
decomposition = Later("sklearn.decomposition")
ensemble = Later("sklearn.ensemble")
exceptions = Later("sklearn.exceptions")
linear_model = Later("sklearn.linear_model")
pipeline = Later("sklearn.pipeline")
preprocessing = Later("sklearn.preprocessing")
sparse = Later("scipy.sparse")

_FEW_PARAMS = ("stellar_flux", "star_temperature", "log10_p_co2")
_REGULARISATION = (0.01, 0.1, 1.0, 10.0)
_LEAVES = (1, 3, 10, 30)  # samples in a leaf of the extremely randomised trees
_TREES, _TREES_PER_SAMPLE = 400, 4  # of the extremely randomised trees, at most
_NETWORK_COMPONENTS = 12


class Features(NamedTuple):
    """Inputs of the baselines for one split.

    Attributes:
        params: planet parameters [n, P].
        flat: flattened coarse features of every modality [n, F].
        label: class [n].
        groups: names of planet and organism of each sample [n, 2].
        few: stellar flux, star temperature and CO2 [n, 3], where the data have them.
        control: `flat` without near-surface temperature.
        climate, network: the summaries of `data.summary_features` [n, C], [n, N], where the caller made them.
    """

    params: npt.NDArray[Any]
    flat: npt.NDArray[Any]
    label: npt.NDArray[Any]
    groups: npt.NDArray[np.str_]
    few: npt.NDArray[Any] | None = None
    control: npt.NDArray[Any] | None = None
    climate: npt.NDArray[Any] | None = None
    network: npt.NDArray[Any] | None = None


def _best_logistic(
    train: Any,
    label: npt.NDArray[Any],
    validation: Any,
    validation_label: npt.NDArray[Any],
    build: Callable[[float], Any],
) -> Any:
    """The logistic regression whose strength has the lowest cross-entropy on the validation set."""
    best, best_loss = None, np.inf
    for strength in _REGULARISATION:
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore", exceptions.ConvergenceWarning
            )  # the weakest regularisation may not converge; validation then rejects it
            model = build(strength).fit(train, label)
        loss = metrics.cross_entropy(model.predict_proba(validation)[:, 1], validation_label).mean()
        if loss < best_loss:
            best, best_loss = model, loss
    return best


def _one_hot(groups: npt.NDArray[np.str_], known: list[list[str]]) -> Any:
    """Indicator columns of the known planets and organisms; an unknown one has only zeros."""
    columns: list[dict[str, int]] = []
    offset = 0
    for names in known:
        columns.append({name: offset + number for number, name in enumerate(names)})
        offset += len(names)
    matrix = sparse.lil_matrix((len(groups), offset))
    for row, names in enumerate(groups):
        for name, column in zip(names, columns, strict=True):
            if name in column:
                matrix[row, column[name]] = 1.0
    return matrix.tocsr()


def predict(train: Features, validation: Features, test: Features, seed: int) -> dict[str, metrics.Floats]:
    """Fit every baseline on `train`, choose its strength on `validation`, and return P(class 1) [n] on `test` for each
    name.

    * "majority class": the share of class 1 in training, for every sample;
    * "logistic regression, planet parameters", and "logistic regression, flux + star + CO2" on three of them;
    * "gradient boosting, all features": HistGradientBoostingClassifier with as many trees as `validation` likes best;
    * "gradient boosting, no near-surface temperature": the same, trained and tested without it;
    * "extra trees, temperature shares + network" and "gradient boosting, temperature shares + network": on the summary
      of the lowest level's temperature and the first 12 principal components of the network's node means;
    * "planet + organism effects": logistic regression on indicators of both; an unseen one adds nothing.
    """
    share = float(train.label.mean())
    result = {"majority class": np.full(len(test.label), share)}
    if len(np.unique(train.label)) < 2:
        return result

    def scaled(strength: float) -> Any:
        return pipeline.make_pipeline(
            preprocessing.StandardScaler(), linear_model.LogisticRegression(C=strength, max_iter=1000)
        )

    logistic = _best_logistic(train.params, train.label, validation.params, validation.label, scaled)
    result["logistic regression, planet parameters"] = logistic.predict_proba(test.params)[:, 1]
    if train.few is not None and validation.few is not None and test.few is not None:
        logistic = _best_logistic(train.few, train.label, validation.few, validation.label, scaled)
        result["logistic regression, flux + star + CO2"] = logistic.predict_proba(test.few)[:, 1]
    sets = (train, validation, test)
    result["gradient boosting, all features"] = _boosting([s.flat for s in sets], train, validation, seed)
    controls = [s.control for s in sets if s.control is not None]
    if len(controls) == len(sets):
        name = "gradient boosting, no near-surface temperature"
        result[name] = _boosting(controls, train, validation, seed)
    result |= _on_summaries(sets, seed)
    known = [sorted(set(train.groups[:, column])) for column in range(2)]
    effects = [_one_hot(features.groups, known) for features in sets]
    additive = _best_logistic(
        effects[0],
        train.label,
        effects[1],
        validation.label,
        lambda strength: linear_model.LogisticRegression(C=strength, max_iter=1000),
    )
    result["planet + organism effects"] = additive.predict_proba(effects[2])[:, 1]
    return result


def _on_summaries(sets: tuple[Features, Features, Features], seed: int) -> dict[str, metrics.Floats]:
    """P(class 1) on the test set of the two baselines on summaries; none where a set lacks them."""
    climates = [s.climate for s in sets if s.climate is not None]
    networks = [s.network for s in sets if s.network is not None]
    if not len(climates) == len(networks) == len(sets):
        return {}
    train, validation, _ = sets
    count = min(_NETWORK_COMPONENTS, *networks[0].shape)
    scale = pipeline.make_pipeline(preprocessing.StandardScaler(), decomposition.PCA(count, random_state=seed))
    scale.fit(networks[0])
    inputs = [
        np.hstack([climate, scale.transform(network)]) for climate, network in zip(climates, networks, strict=True)
    ]
    return {
        "extra trees, temperature shares + network": _forest(inputs, train, validation, seed),
        "gradient boosting, temperature shares + network": _boosting(inputs, train, validation, seed),
    }


def _forest(inputs: list[npt.NDArray[Any]], train: Features, validation: Features, seed: int) -> metrics.Floats:
    """Extra trees on the inputs of train, validation and test; leaves by the lowest validation cross-entropy."""
    trees, lowest = None, np.inf
    count = min(_TREES, _TREES_PER_SAMPLE * len(train.label))
    for leaf in _LEAVES:
        model = ensemble.ExtraTreesClassifier(count, min_samples_leaf=leaf, max_features=0.5, random_state=seed)
        model.fit(inputs[0], train.label)
        loss = metrics.cross_entropy(model.predict_proba(inputs[1])[:, 1], validation.label).mean()
        if trees is None or loss < lowest:
            trees, lowest = model, loss
    assert trees is not None
    return np.asarray(trees.predict_proba(inputs[2])[:, 1])


def _boosting(inputs: list[npt.NDArray[Any]], train: Features, validation: Features, seed: int) -> metrics.Floats:
    """Gradient boosting on the inputs of train, validation and test; trees by the lowest validation cross-entropy."""
    options: dict[str, Any] = {"early_stopping": False}  # ours is below, on the validation set
    model = ensemble.HistGradientBoostingClassifier(max_iter=200, learning_rate=0.1, random_state=seed, **options)
    model.fit(inputs[0], train.label)
    losses = [
        metrics.cross_entropy(stage[:, 1], validation.label).mean() for stage in model.staged_predict_proba(inputs[1])
    ]
    best = int(np.argmin(losses))
    for number, stage in enumerate(model.staged_predict_proba(inputs[2])):
        if number == best:
            return np.asarray(stage[:, 1])
    raise ValueError("gradient boosting made no trees")


def baseline_inputs(samples: data.HabitatDataset) -> Features:
    """What the baselines learn from, in the order of `samples`."""
    params, flat, label, _ = data.baseline_features(samples)
    store = samples.store
    groups = [
        (str(store.planets[pair.climate].metadata["planet"]), str(store.organisms[pair.organism].metadata["organism"]))
        for pair in samples.pairs
    ]
    names = samples.spec.planet_param_names
    few = params[:, [names.index(n) for n in _FEW_PARAMS]] if set(_FEW_PARAMS) <= set(names) else None
    _, control, _, _ = data.baseline_features(data.without_near_surface(samples))
    climate, network = data.summary_features(samples)
    return Features(params, flat, label, np.asarray(groups), few, control, climate, network)
