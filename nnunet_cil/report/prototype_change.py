"""How alike the classes' prototypes are, and how far they move from step to step."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from nnunet_cil.prototypes import PrototypeStore


def similarity(store: PrototypeStore) -> NDArray[np.float64]:
    """(K, K) cosines between a step's prototypes after subtracting their mean, as in section 5 of docs/method.md.

    NaN in the rows and columns of a class without prototype; 0 against a prototype that is the mean itself.
    """
    centred = store.means.astype(np.float64) - store.centre
    directions = centred / np.maximum(np.linalg.norm(centred, axis=1, keepdims=True), 1e-12)
    return np.clip(directions @ directions.T, -1, 1)


def alignment(before: PrototypeStore, after: PrototypeStore) -> dict[str, float]:
    """Cosine between each class's prototype after a step and before it, each less the mean of the classes of both.

    Our derivation: the common mean is taken out on both sides, as in section 5 of docs/method.md, over the same
    classes. NaN for a class that the step has no voxels of: its prototype was taken over, not measured.

    Returns:
        Class name -> cosine, for the classes that both have.
    """
    names = [name for name in before.class_names if name in after.class_names]
    rows = [[store.class_names.index(name) for name in names] for store in (before, after)]
    measured = before.usable[rows[0]] & after.usable[rows[1]] & ~after.stale[rows[1]]
    found = np.full(len(names), np.nan)
    if measured.any():
        both = zip((before, after), rows, strict=True)
        means = [store.means[row][measured].astype(np.float64) for store, row in both]
        old, new = (mean - mean.mean(0) for mean in means)
        lengths = np.linalg.norm(old, axis=1) * np.linalg.norm(new, axis=1)
        found[measured] = np.clip((old * new).sum(1) / np.maximum(lengths, 1e-12), -1, 1)
    return dict(zip(names, found.tolist(), strict=True))


def drift(stores: Sequence[PrototypeStore | None]) -> dict[str, NDArray[np.float64]]:
    """Distance of each class's prototype from where it was when first extracted, in units of the class's spread then.

    Our derivation: 1 is the root mean squared distance of the class's own voxels from their mean, so that organs and
    networks compare. NaN at a step without prototypes or without voxels of the class (its prototype is taken over, not
    measured), and from a class without spread.

    Args:
        stores: of one chain, in the order of its steps; None for a step without, as of stock nnU-Net.

    Returns:
        Class name -> (number of stores,) distances; 0 where first extracted, NaN before.
    """
    names = list(dict.fromkeys(name for store in stores if store is not None for name in store.class_names))
    found = {name: np.full(len(stores), np.nan) for name in names}
    for name, distances in found.items():
        first = None
        for position, store in enumerate(stores):
            if store is None or name not in store.class_names:
                continue
            row = store.class_names.index(name)
            if store.stale[row] or not store.usable[row]:
                continue
            mean = store.means[row].astype(np.float64)
            first = first or (mean, float(store.spread[row]))
            if len(mean) == len(first[0]) and first[1] > 0:
                distances[position] = np.linalg.norm(mean - first[0]) / first[1]
    return found
