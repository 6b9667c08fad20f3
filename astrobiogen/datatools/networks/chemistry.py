"""Recognising elements, compartments, cofactors and gases in the many spellings of published SBML models."""

from __future__ import annotations

import re

from astrobiogen.data.networks.features import COFACTORS, COMPARTMENTS, ELEMENTS, GASES

_FORMULA = re.compile(r"([A-Z][a-z]?)(\d*)")
_EC = re.compile(
    r"(?:ec-code[/:]|EC Number:?\s*|EC_NUMBER:?\s*|PROTEIN_CLASS:?\s*|^_?)([1-7])[._]\d{1,2}[._]", re.IGNORECASE
)

# Spellings: BiGG ids, ModelSEED compounds and plain names, in lower case without prefix or compartment.
_COFACTOR_NAMES: dict[str, tuple[str, ...]] = {
    "atp": ("atp", "cpd00002"),
    "adp": ("adp", "cpd00008"),
    "nad": ("nad", "nad+", "cpd00003"),
    "nadh": ("nadh", "cpd00004"),
    "nadp": ("nadp", "nadp+", "cpd00006"),
    "nadph": ("nadph", "cpd00005"),
    "coa": ("coa", "coenzyme a", "cpd00010"),
    "f420": ("f420", "f420_2", "f420_2h2", "f420-2", "f420-2h2", "coenzyme f420", "cpd00649", "cpd00792"),
    "com": ("com", "coenzyme m", "cpd02246", "cpd02438", "hs-com"),
    "ferredoxin": ("fdox", "fdred", "fdxox", "fdxrd", "fdxo_42", "fdxr_42", "ferredoxin", "cpd11620", "cpd11621"),
    "proton": ("h", "h+", "cpd00067", "proton"),
    "water": ("h2o", "cpd00001", "water"),
    "phosphate": ("pi", "cpd00009", "phosphate", "orthophosphate"),
    "diphosphate": ("ppi", "cpd00012", "diphosphate", "pyrophosphate"),
    "fad": ("fad", "fadh2", "cpd00015", "cpd00982"),
    "quinone": ("q8", "q8h2", "mqn8", "mql8", "cpd15560", "cpd15561", "mqn7", "mql7"),
}
_GAS_NAMES: dict[str, tuple[str, ...]] = {
    "o2": ("o2", "cpd00007", "oxygen", "dioxygen", "oxygenmolecule"),
    "h2": ("h2", "cpd11640", "hydrogen", "dihydrogen"),
    "co2": ("co2", "cpd00011", "carbon dioxide", "carbon_dioxide"),
    "ch4": ("ch4", "meth", "methane", "cpd01024"),
    "n2": ("n2", "cpd00528", "nitrogen", "dinitrogen"),
    "h2s": ("h2s", "hydrogen sulfide", "cpd00239", "sulfide"),
    "co": ("co", "carbon monoxide", "cpd00204"),
    "nh4": ("nh4", "nh3", "ammonia", "ammonium", "cpd00013"),
    "no": ("no", "nitric oxide", "cpd00418"),
}


def _index(names: dict[str, tuple[str, ...]], order: tuple[str, ...]) -> dict[str, int]:
    return {spelling: order.index(key) + 1 for key, spellings in names.items() for spelling in spellings}


_COFACTOR_CODE = _index(_COFACTOR_NAMES, COFACTORS)
_GAS_CODE = _index(_GAS_NAMES, GASES)


def parse_formula(text: str) -> tuple[list[int], bool]:
    """Atoms of ``ELEMENTS`` in a Hill formula, and whether it is fully known (a rest group R, X or a repeat unit is
    not).
    """
    counts = dict.fromkeys(ELEMENTS, 0)
    text = text.strip()
    if not text or not re.fullmatch(r"(?:[A-Z][a-z]?\d*)+", text):
        return list(counts.values()), False
    for symbol, number in _FORMULA.findall(text):
        if symbol in ("R", "X", "Z"):
            return [0] * len(ELEMENTS), False
        if symbol in counts:
            counts[symbol] += int(number) if number else 1
    return [min(v, 65535) for v in counts.values()], True


def compartment_code(identifier: str, name: str) -> int:
    """Bit of ``COMPARTMENTS`` for an SBML compartment."""
    word = f"{name or identifier}".lower()
    ident = identifier.lower()
    if "periplas" in word or ident in ("p", "c_p", "p0"):
        kind = "periplasm"
    elif any(k in word for k in ("extra", "external", "medium", "outside", "boundary")) or ident in (
        "e",
        "e0",
        "c_e",
        "b",
        "x",
    ):
        kind = "extracellular"
    elif any(k in word for k in ("cyto", "intra", "internal", "cell")) or ident in ("c", "c0", "c_c", "in"):
        kind = "cytosol"
    else:
        kind = "other"
    return 1 << COMPARTMENTS.index(kind)


def spellings(identifier: str, name: str) -> set[str]:
    """Lower-case candidates for what a species is: its id without prefix and compartment, and its name without
    brackets or formula.
    """
    ident = re.sub(r"^(?:M_|S_|_)+", "", identifier)
    bare = re.sub(r"(?:_LSQBKT_\w+?_RSQBKT_|\[\w+\]|__?\d{2,3}__?\w{1,3}__?\d{2,3}_?)$", "", ident)
    cut = re.sub(
        r"_(?:[cepbxmnrvgh]0?|in|out|ext|ex|cyto|cytosol|extracellular|periplasm|boundary|xt|CCO_\w+)$",
        "",
        bare,
        flags=re.IGNORECASE,
    )
    cut = re.sub(r"(?<=[A-Z0-9])xt$", "", cut)  # "O2xt": extracellular, in the models of one group
    title = re.sub(r"(?:\[\w+\]|\(\w\)|_[cep]0?| [cep]0)$", "", name.strip())
    title = re.sub(r"^M_", "", title)
    title = re.sub(r"_+[A-Z][A-Za-z0-9]*$", "", title) if title.count("_") else title
    plain = re.sub(r"(?:_ex|ext)$", "", re.sub(r"[()]", "", name))  # "oxygen_ex", "O(2)ext"
    return {part.lower().strip("_ ") for part in (ident, bare, cut, title, plain, name) if part}


def cofactor_code(words: set[str]) -> int:
    """0, or 1 + index in ``COFACTORS``."""
    return max((_COFACTOR_CODE.get(word, 0) for word in words), default=0)


def gas_code(words: set[str]) -> int:
    """0, or 1 + index in ``GASES``."""
    # "O2e": extracellular O2 in one fungal model
    outside = {word.removesuffix("e") for word in words if word.endswith("2e")}
    return max((_GAS_CODE.get(word, 0) for word in words | outside), default=0)


def ec_code(text: str) -> int:
    """0, or the first digit (1 to 7) of the first enzyme number found in an annotation, note or id."""
    found = _EC.search(text)
    return int(found.group(1)) if found else 0
