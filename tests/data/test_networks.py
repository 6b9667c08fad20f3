"""Networks from SBML (three bound conventions) and cobra JSON, encodings of large ones, and workers that die."""

import gzip
import importlib
import json
from pathlib import Path

import numpy as np
import pytest

from astrobiogen import data
from astrobiogen.data.networks import features
from astrobiogen.datatools.networks import assemble, cobra_json, encodings, fba, network, sbml
from astrobiogen.datatools.workers import map_isolated

METABOLITES = (("o2_e", "e", "O2", 0), ("o2_c", "c", "O2", 0), ("x_c", "c", "", None))
# id, stoichiometry, bounds, objective
REACTIONS = (
    ("EX_o2", {"o2_e": -1.0}, (-5.0, 1000.0), 0.0),
    ("O2t", {"o2_e": -1.0, "o2_c": 1.0}, (-3.0, 7.0), 0.0),
    ("make", {"o2_c": -0.5, "x_c": 1.0}, (0.0, 1000.0), 0.0),
    ("drain", {"x_c": -1.0}, (0.0, 1000.0), 1.0),
)
LIMIT = 10.0  # 5 O2, half an O2 per x


LAW = (
    '<kineticLaw><math xmlns="http://www.w3.org/1998/Math/MathML"><ci>v</ci></math>'
    "<listOfParameters>{}</listOfParameters></kineticLaw>"
)
OBJECTIVE = (
    '<fbc:listOfObjectives fbc:activeObjective="o"><fbc:objective fbc:id="o" fbc:type="maximize">'
    '<fbc:listOfFluxObjectives><fbc:fluxObjective fbc:reaction="R_drain" fbc:coefficient="1"/>'
    "</fbc:listOfFluxObjectives></fbc:objective></fbc:listOfObjectives>"
)
CONSTANT = ' constant="true"'


def many(tag: str, items: list[str]) -> str:
    return f"<{tag}>{''.join(items)}</{tag}>" if items else ""


def sbml_species(name: str, place: str, formula: str, charge: int | None, fbc: bool) -> str:
    extra = ""
    if fbc:
        extra = 'hasOnlySubstanceUnits="false" boundaryCondition="false" constant="false"'
        extra += f' fbc:chemicalFormula="{formula}"' if formula else ""
        extra += f' fbc:charge="{charge}"' if charge is not None else ""
    return f'<species id="M_{name}" name="{name}" compartment="{place}" {extra}/>'


def sbml_reaction(name: str, net: dict[str, float], low: float, high: float, goal: float, convention: str) -> str:
    fbc = convention != "law"
    sides: dict[bool, list[str]] = {True: [], False: []}
    for metabolite, amount in net.items():
        reference = f'species="M_{metabolite}" stoichiometry="{abs(amount)}"{CONSTANT if fbc else ""}'
        sides[amount < 0].append(f"<speciesReference {reference}/>")
    body = many("listOfReactants", sides[True]) + many("listOfProducts", sides[False])
    attributes = f'reversible="{str(low < 0).lower()}"' + (' fast="false"' if fbc else "")
    if convention == "fbc2":
        attributes += f' fbc:lowerFluxBound="{bound(low)}" fbc:upperFluxBound="{bound(high)}"'
    if not fbc:
        numbers = {"LOWER_BOUND": low, "UPPER_BOUND": high, "OBJECTIVE_COEFFICIENT": goal}
        body += LAW.format("".join(f'<parameter id="{k}" value="{v}"/>' for k, v in numbers.items()))
    return f'<reaction id="R_{name}" {attributes}>{body}</reaction>'


def sbml_text(convention: str) -> str:
    """The toy network with its bounds in fbc version 2, fbc version 1 or kinetic laws."""
    fbc = convention != "law"
    space = "level3/version1/core" if fbc else "level2"
    head = f'xmlns="http://www.sbml.org/sbml/{space}" level="{3 if fbc else 2}" version="1"'
    if fbc:
        url = f"http://www.sbml.org/sbml/level3/version1/fbc/version{convention[-1]}"
        head += f' xmlns:fbc="{url}" fbc:required="false"'
    places = [f'<compartment id="{c}"{CONSTANT if fbc else ""}/>' for c in ("c", "e")]
    text = many("listOfCompartments", places)
    text += many("listOfSpecies", [sbml_species(*m, fbc) for m in METABOLITES])
    if convention == "fbc2":
        values = sorted({v for _, _, bounds, _ in REACTIONS for v in bounds})
        text += many("listOfParameters", [f'<parameter id="{bound(v)}" value="{v}"{CONSTANT}/>' for v in values])
    made = [sbml_reaction(name, net, *bounds, goal, convention) for name, net, bounds, goal in REACTIONS]
    text += many("listOfReactions", made) + (OBJECTIVE if fbc else "")
    if convention == "fbc1":
        limits = [
            f'<fbc:fluxBound fbc:reaction="R_{name}" fbc:operation="{operation}" fbc:value="{value}"/>'
            for name, _, bounds, _ in REACTIONS
            for operation, value in zip(("greaterEqual", "lessEqual"), bounds, strict=True)
        ]
        text += many("fbc:listOfFluxBounds", limits)
    strict = ' fbc:strict="true"' if convention == "fbc2" else ""
    return f'<?xml version="1.0" encoding="UTF-8"?><sbml {head}><model id="toy"{strict}>{text}</model></sbml>'


def bound(value: float) -> str:
    return f"b_{'m' if value < 0 else ''}{abs(int(value))}"


def cobra_text(**changes: object) -> str:
    document = {
        "id": "toy",
        "compartments": {"c": "cytosol", "e": "extracellular"},
        "metabolites": [
            {"id": n, "name": n, "compartment": place, "formula": formula, "charge": charge}
            for n, place, formula, charge in METABOLITES
        ],
        "reactions": [
            {"id": n, "name": n, "metabolites": net, "lower_bound": low, "upper_bound": high,
             "objective_coefficient": goal, "gene_reaction_rule": "b1 and b2"}
            for n, net, (low, high), goal in REACTIONS
        ],
    }  # fmt: skip
    return json.dumps({**document, **changes})


@pytest.mark.parametrize("convention", ["fbc2", "fbc1", "law", "json", "json.gz"])
def test_every_convention_gives_one_network(tmp_path: Path, convention: str) -> None:
    if convention.startswith("json"):
        path = tmp_path / f"toy.{convention}"
        raw = cobra_text().encode()
        path.write_bytes(gzip.compress(raw) if convention.endswith("gz") else raw)
    else:
        path = tmp_path / "toy.xml"
        path.write_text(sbml_text(convention))
    found = network.read_network(path)
    assert found.objective_source == assemble.STATED
    np.testing.assert_array_equal(found.lower, [-5.0, -3.0, 0.0, 0.0])
    np.testing.assert_array_equal(found.upper, [1000.0, 7.0, 1000.0, 1000.0])
    np.testing.assert_array_equal(found.objective, [0.0, 0.0, 0.0, 1.0])
    np.testing.assert_array_equal(np.sort(found.stoichiometry), [-1.0, -1.0, -1.0, -0.5, 1.0, 1.0])
    assert fba.growth(found) == pytest.approx(LIMIT)
    assert fba.growth(found, ("o2",)) == pytest.approx(0.0)
    known = features.has(found.columns, features.FORMULA)[:3].tolist()
    assert known == ([True, True, False] if convention != "law" else [False] * 3)
    charged = features.has(found.columns, features.CHARGE)[:3].tolist()
    assert charged == ([True, True, False] if convention != "law" else [False] * 3)


def test_no_objective_is_named_or_refused(tmp_path: Path) -> None:
    text = sbml_text("law").replace('"OBJECTIVE_COEFFICIENT" value="1.0"', '"OBJECTIVE_COEFFICIENT" value="0"')
    (tmp_path / "none.xml").write_text(text)
    assert sbml.read_network(tmp_path / "none.xml").objective_source == assemble.NONE
    with pytest.raises(data.DataError, match=r"none\.xml \[objective\]: absent"):
        network.pack_network(tmp_path / "none.xml")
    (tmp_path / "named.xml").write_text(text.replace("R_drain", "R_biomass"))
    found = sbml.read_network(tmp_path / "named.xml")
    assert found.objective_source == assemble.BY_NAME
    assert found.objective[3] == 1.0


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"{", "cannot be read as JSON"),
        (b"[]", "holds a list"),
        (b'{"metabolites": []}', r"\[reactions\]: is not a list"),
        (b'{"metabolites": [], "reactions": []}', "empty network"),
        (cobra_text(reactions=[{"id": "r", "metabolites": {"nowhere": 1}}]).encode(), r"\[r\]: names unknown species"),
        (cobra_text(reactions=[{"id": "r", "metabolites": {"x_c": "much"}}]).encode(), r"\[r\.x_c\]: is 'much'"),
        (gzip.compress(cobra_text().encode(), mtime=0)[:60], "cannot be read"),
    ],
)
def test_bad_json_is_refused(tmp_path: Path, raw: bytes, message: str) -> None:
    (tmp_path / "bad.json").write_bytes(raw)
    with pytest.raises(data.DataError, match=message) as caught:
        cobra_json.read_network(tmp_path / "bad.json")
    assert "bad.json" in str(caught.value)


def random_edges(n_metabolites: int, n_reactions: int) -> np.ndarray:
    """Four metabolites near each other per reaction, as pathways are."""
    random = np.random.default_rng(0)
    reactions = np.repeat(np.arange(n_reactions), 4)
    place = (reactions * n_metabolites) // n_reactions + random.integers(0, 12, reactions.size)
    return np.unique(np.stack([place % n_metabolites, reactions + n_metabolites]), axis=1)


def test_encodings_of_five_thousand_nodes() -> None:
    edges = random_edges(2600, 2400)
    laplacian = encodings.laplacian_encoding(edges, 5000, 16)
    walk = encodings.random_walk_encoding(edges, 5000, 8)
    assert laplacian.shape == (5000, 16)
    np.testing.assert_allclose(np.abs(laplacian).max(axis=0), 1.0)
    assert ((walk >= 0) & (walk <= 1)).all()


def test_random_walk_against_dense_powers(monkeypatch: pytest.MonkeyPatch) -> None:
    edges = random_edges(60, 40)
    adjacency = np.zeros((100, 100))
    adjacency[edges[0], edges[1]] = adjacency[edges[1], edges[0]] = 1.0
    step = adjacency / np.maximum(adjacency.sum(axis=1, keepdims=True), 1.0)
    expected = np.stack([np.diag(np.linalg.matrix_power(step, 2 * k)) for k in range(1, 9)], axis=1)
    monkeypatch.setattr(encodings, "BLOCK", 32)
    # float32 powers: 8 products of at most 100 terms, 1e-7 each
    np.testing.assert_allclose(encodings.random_walk_encoding(edges, 100, 8), expected, atol=1e-5)


TROUBLE = """
import os, signal, time
from astrobiogen.data.errors import DataError

def handle(item):
    if item == "dies":
        os.kill(os.getpid(), signal.SIGABRT)
    if item == "raises":
        raise DataError("file", "field", "is bad")
    if item == "breaks":
        raise KeyError("surprise")
    if item == "hangs":
        time.sleep(60)
    return item.upper()
"""


def test_a_worker_that_dies_costs_one_item(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "trouble_for_workers.py").write_text(TROUBLE)
    monkeypatch.syspath_prepend(tmp_path)  # fresh interpreters get this path too
    troublesome = importlib.import_module("trouble_for_workers").handle
    items = ["a", "dies", "b", "raises", "c", "breaks", "hangs", "d"]
    found = list(map_isolated(troublesome, items, 2, time_limit=2.0))
    assert [f for f in found if isinstance(f, str)] == ["A", "B", "C", "D"]
    texts = [str(f) for f in found]
    assert texts[1] == "dies: the worker process died (killed by SIGABRT)"
    assert texts[3] == "file [field]: is bad"
    assert texts[5] == "breaks: KeyError: 'surprise'"
    assert texts[6] == "hangs: not finished after 2 s"
    assert list(map_isolated(troublesome, [], 2)) == []
    with pytest.raises(ValueError, match="workers is 0"):
        list(map_isolated(troublesome, items, 0))
