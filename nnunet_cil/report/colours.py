"""Colours of organs and methods: told apart by colour-blind readers, and the same in every figure.

Okabe and Ito's colours come first, then those of Paul Tol's "muted" scheme. Colour never stands alone: an organ also
has a kind of line and a hatch, a method a marker.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import count

BACKGROUND_COLOUR = "#767676"
TERM_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#882255")

_ORGAN_FIRST = ("#E69F00", "#56B4E9", "#009E73", "#D55E00", "#CC79A7", "#F0E442", "#0072B2")
_ORGAN_FURTHER = ("#44AA99", "#882255", "#999933", "#CC6677", "#88CCEE", "#AA4499", "#DDCC77")
PLAIN_ORGANS = len(_ORGAN_FIRST)
"""Number of organs that colour alone tells apart."""
_ORGAN_COLOURS = (*_ORGAN_FIRST, *_ORGAN_FURTHER)
_KNOWN_ORGANS = [
    frozenset(name.split())
    for name in ("liver", "spleen", "right kidney", "left kidney", "pancreas", "stomach", "gallbladder")
]

_METHODS = {
    "pgcd": ("#0072B2", "o"),
    "finetune": ("#D55E00", "s"),
    "joint": ("#000000", "*"),
    "pseudo": ("#009E73", "^"),
    "mib": ("#E69F00", "D"),
    "plop": ("#CC79A7", "v"),
    "pseudokd": ("#56B4E9", "P"),
    "lwf": ("#999999", "X"),
    "ilt": ("#882255", "<"),
    "ewf": ("#44AA99", ">"),
    "ewc": ("#332288", "p"),
    "replay": ("#999933", "h"),
}
_FURTHER_METHODS = (
    ("#AA4499", "d"),
    ("#117733", "H"),
    ("#CC6677", "8"),
    ("#88CCEE", "s"),
    ("#661100", "^"),
    ("#DDCC77", "D"),
    ("#6699CC", "v"),
    ("#888888", "P"),
    ("#44AA99", "X"),
    ("#D55E00", "v"),
    ("#009E73", "D"),
    ("#CC79A7", "^"),
)
_ENSEMBLE_MARKERS = ("d", "D")  # the second where a method has the first


@dataclass(frozen=True)
class OrganStyle:
    """Look of an organ: colour, kind of line, and hatch of areas ("" for none)."""

    colour: str
    line: str
    hatch: str


def organ_styles(classes: Collection[str]) -> dict[str, OrganStyle]:
    """Style of each class by name: the same for the same classes, in whatever order they are learned.

    Liver, spleen, right and left kidney, pancreas, stomach and gallbladder have one each (``kidney_right`` and
    ``Right Kidney`` are the right kidney); the others take what is free, by the alphabet. Seven styles are plain, the
    next seven dashed and hatched in other colours; after that the colours come again, dotted.
    """
    names = sorted(set(classes))
    known: dict[int, str] = {}
    for name in names:
        if (words := frozenset(re.split(r"[_\- ]+", name.lower()))) in _KNOWN_ORGANS:
            known.setdefault(_KNOWN_ORGANS.index(words), name)
    free = (place for place in count() if place not in known)
    places = {name: place for place, name in known.items()}
    return {name: _organ_style(places[name] if name in places else next(free)) for name in names}


def _organ_style(index: int) -> OrganStyle:
    line, hatch = "-", ""
    if index >= PLAIN_ORGANS:
        line, hatch = "--", "////"
    if index >= len(_ORGAN_COLOURS):
        line, hatch = ":", "...."
    return OrganStyle(_ORGAN_COLOURS[index % len(_ORGAN_COLOURS)], line, hatch)


def _further(index: int) -> tuple[str, str]:
    """The colours come again after a round, with other markers."""
    n, turn = len(_FURTHER_METHODS), index // len(_FURTHER_METHODS)
    return _FURTHER_METHODS[index % n][0], _FURTHER_METHODS[(index + 2 * turn) % n][1]


def method_styles(methods: Sequence[str]) -> dict[str, tuple[str, str]]:
    """Colour and marker by method.

    A known method keeps its own whatever stands beside it; any other keeps its own among the same methods. The ensemble
    of a method's folds, ``pgcd, 5 folds ensembled``, has its colour and a marker of ensembles.
    """
    keys = {method: method.partition(",")[0].lower().replace("_", "") for method in methods}
    unknown = sorted({key for key in keys.values() if key not in _METHODS})
    further = {key: _further(i) for i, key in enumerate(unknown)}
    found = {method: (_METHODS | further)[key] for method, key in keys.items()}
    return {
        method: (colour, _ENSEMBLE_MARKERS[marker == _ENSEMBLE_MARKERS[0]]) if "," in method else (colour, marker)
        for method, (colour, marker) in found.items()
    }
