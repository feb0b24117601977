"""Draws every figure of a report that can be drawn, with its words, and says of each other one why it is left out."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from nnunet_cil import metrics
from nnunet_cil.chain import JOINT
from nnunet_cil.evaluate import HIGHER_IS_BETTER
from nnunet_cil.report.collect import Collected, Model, Run, last_scores
from nnunet_cil.report.figures import (
    forgetting_is_matrix,
    forgetting_of_runs,
    plot_drift,
    plot_forgetting,
    plot_loss_terms,
    plot_mean_dice,
    plot_score_matrix,
    plot_similarity,
    plot_subjects,
)
from nnunet_cil.report.parts import FigureFile
from nnunet_cil.report.prototype_change import drift, similarity
from nnunet_cil.report.qualitative import plot_panel, read_slice, typical_and_worst
from nnunet_cil.report.table import Row, marked
from nnunet_cil.report.words import last_scored_step, listed

_CLASSES_SIDE_BY_SIDE = 16
SCORES = {"dice": ("Dice (%)", 100.0), "hd95_mm": ("HD95 (mm)", 1.0), "nsd": ("NSD (%)", 100.0)}


@dataclass
class Shelf:
    """Figures of one kind, and sentences on what is left out."""

    figures: list[FigureFile] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)


def draw_all(found: Collected, folder: Path) -> dict[str, Shelf]:
    """Write all figures into a folder.

    Returns:
        ``scores``, ``subjects``, ``pictures``, ``training`` and ``prototypes``, each with its figures and gaps.
    """
    return {
        "scores": _scores(found, folder),
        "subjects": _subjects(found, folder),
        "pictures": _pictures(found, folder),
        "training": _training(found, folder),
        "prototypes": _prototypes(found, folder),
    }


def reference_method(found: Collected) -> str | None:
    """The method by which subjects are chosen: that of the paired differences, else the first scored one."""
    scored = [method for method in found.methods if last_scores(_runs(found, method), found.classes, "dice")[0]]
    chains = [method for method in scored if method != JOINT]
    compared = found.paired.get("reference")
    return compared if compared in scored else next(iter([*chains, *scored]), None)


def _runs(found: Collected, method: str) -> list:
    return [run for run in found.runs if run.method == method]


def _one_run_each(found: Collected, parts: Callable[[Run], int]) -> dict[str, Run]:
    """A run of each method: of those that have most parts of a figure that of the seed which most methods have so."""
    most = {}
    for method in found.methods:
        runs = _runs(found, method)
        most[method] = [run for run in runs if parts(run) == max(map(parts, runs))]
    methods_of = Counter(seed for runs in most.values() for seed in {run.seed for run in runs if parts(run)})
    return {method: max(runs, key=lambda run: methods_of[run.seed]) for method, runs in most.items()}


def _models_of(runs: Mapping[str, Run]) -> str:
    """A sentence on whose seed is shown; nothing where no run has one."""
    seeds = {run.seed for run in runs.values()}
    if len(seeds) == 1:
        return "" if seeds == {None} else f" Models of seed {seeds.pop()}."
    each = [f"{marked(method)} {'none' if run.seed is None else run.seed}" for method, run in runs.items()]
    return f" Seeds of the models: {', '.join(each)}."


def _named(methods: Sequence[str]) -> str:
    return listed([marked(method) for method in methods])


def _percent(value: float) -> str:
    return "no score" if math.isnan(value) else f"{100 * value:.1f}"


def _scores(found: Collected, folder: Path) -> Shelf:
    shelf = Shelf()
    rows = list(found.rows)
    if unscored := [method for method in found.methods if method not in {row.method for row in rows}]:
        shelf.missing.append(f"No model of {_named(unscored)} is scored yet.")
    if not rows:
        return shelf
    path = folder / "mean_dice.png"
    plot_mean_dice(rows, found.learned_at, path, found.methods)
    shelf.figures.append(
        FigureFile(
            path,
            "Mean Dice step by step",
            "Look at how far each line falls from left to right: a method that forgets drops at every step, one that "
            "keeps what it has learned stays high."
            + (" Small dots are single seeds." if any(len(row.seeds) > 1 for row in rows) else ""),
            "Line chart of the mean Dice in percent over all organs learned so far, after each step. "
            + " ".join(_by_step(row, found.learned_at) for row in rows),
        )
    )
    path = folder / "score_matrix.png"
    plot_score_matrix(rows, found.classes, found.learned_at, path)
    shelf.figures.append(
        FigureFile(
            path,
            "Dice of every organ after every step",
            "Read each column downwards: an organ whose cells turn dark was forgotten after it had been learned; cells "
            "are empty until an organ is learned.",
            "Heat maps of Dice in percent, one for each method, with steps as rows and organs as columns. "
            + " ".join(_last_row(row, found.classes) for row in rows),
        )
    )
    lost = {row.method: 100 * row.forgetting(found.learned_at) for row in rows}
    lost = {method: values for method, values in lost.items() if not np.isnan(values).all()}
    if not lost:
        shelf.missing.append(
            "Forgetting is not shown: it needs a method whose last step is scored, after an earlier one."
        )
        return shelf
    path = folder / "forgetting.png"
    plot_forgetting(rows, found.dice_by_run, found.classes, found.learned_at, path, found.methods)
    measured = {name for values in lost.values() for name, v in zip(found.classes, values, strict=True) if v == v}
    is_matrix = forgetting_is_matrix(len(lost), len(measured))
    look = "dark cells" if is_matrix else "markers far to the right"
    dots = (
        "; small dots are single runs"
        if not is_matrix and any(forgetting_of_runs(runs, found.learned_at) for runs in found.dice_by_run.values())
        else ""
    )
    shelf.figures.append(
        FigureFile(
            path,
            "Forgetting of each organ",
            f"Look for {look}: so many points has the organ fallen from its best score before the last step; near 0, "
            f"nothing was forgotten{dots}.",
            "Chart of forgetting in points of 100 Dice. "
            + " ".join(f"{marked(method)}: {_per_organ(found.classes, values)}." for method, values in lost.items()),
        )
    )
    return shelf


def _by_step(row: Row, learned_at: Sequence[int]) -> str:
    means = [metrics.mean(row.dice, learned_at, t) for t in range(1, len(row.dice) + 1)]
    return f"{marked(row.method)}: " + ", ".join(f"step {t} {_percent(m)}" for t, m in enumerate(means, 1)) + "."


def _last_row(row: Row, classes: Sequence[str]) -> str:
    t = last_scored_step(row.dice)
    return f"{marked(row.method)} after step {t}: {_per_organ(classes, 100 * row.dice[t - 1])}."


def _per_organ(classes: Sequence[str], values: NDArray[np.floating]) -> str:
    return ", ".join(f"{c} {value:.1f}" for c, value in zip(classes, values, strict=True) if not np.isnan(value))


def _subjects(found: Collected, folder: Path) -> Shelf:
    shelf = Shelf()
    for score, (label, factor) in SCORES.items():
        by_method = {
            method: factor * last_scores(_runs(found, method), found.classes, score)[1] for method in found.methods
        }
        by_method = {method: values for method, values in by_method.items() if not np.isnan(values).all()}
        if not by_method:
            shelf.missing.append(f"No subject has a {label.split()[0]} after the last step.")
            continue
        absent = [method for method in found.methods if method not in by_method]
        if unscored := [method for method in absent if not last_scores(_runs(found, method), found.classes, score)[0]]:
            shelf.missing.append(f"{_named(unscored)}: the last step is not scored, so there is no box in these plots.")
        if without := [method for method in absent if method not in unscored]:
            shelf.missing.append(f"{_named(without)}: no subject has a {label.split()[0]}, so there is no box.")
        n = max(len(values) for values in by_method.values())
        higher_is_better = score in HIGHER_IS_BETTER
        path = folder / f"subjects_{score}.png"
        plot_subjects(by_method, found.classes, label, path, found.methods)
        shelf.figures.append(
            FigureFile(
                path,
                f"{label.split()[0]} of each test subject after the last step",
                "Look at boxes that reach far down and at single points outside: these are subjects on whom an organ "
                "was missed, even where the average looks good."
                if higher_is_better
                else "Look at boxes that reach far up and at single points outside: there the outlines are far apart "
                "somewhere. A subject on whom the organ was not found at all has no distance, so read it beside Dice.",
                f"Box plots of {label} over {n} test subjects. "
                + " ".join(
                    f"{marked(method)}, medians: {_per_organ(found.classes, _medians(v))}."
                    for method, v in by_method.items()
                ),
                folded=score != "dice",
            )
        )
    return shelf


def _medians(values: NDArray[np.floating]) -> NDArray[np.floating]:
    columns = [column[~np.isnan(column)] for column in values.T]
    return np.array([np.median(column) if column.size else np.nan for column in columns])


def _pictures(found: Collected, folder: Path) -> Shelf:
    shelf = Shelf()
    reference = reference_method(found)
    if reference is None:
        shelf.missing.append("No pictures are shown: no method has its last step scored.")
        return shelf
    models = {}
    pictured = _one_run_each(found, lambda run: run.models[-1].predictions is not None)
    for method in found.methods:
        model = pictured[method].models[-1]
        if model.predictions is None:
            shelf.missing.append(
                f"{marked(method)} is not in the pictures: its predictions of the last step are not there."
            )
        else:
            models[method] = model
    cases, scores = last_scores([pictured[reference]], found.classes, "dice")
    if not models or not cases:
        shelf.missing.append("No pictures are shown: there are no predictions of the last step.")
        return shelf
    ending = str(found.test.get("file_ending", ".nii.gz"))
    slices, dice, about = {}, {}, []
    for kind, case in typical_and_worst(cases, scores).items():
        paths = {method: model.predictions / f"{case}{ending}" for method, model in models.items()}
        gone = [method for method, path in paths.items() if not path.is_file()]
        if gone:
            shelf.missing.append(f"{_named(gone)}: no prediction of the {kind} subject {case} is there.")
        try:
            read = read_slice(
                found.test_folder / "images" / f"{case}_0000{ending}",
                found.test_folder / "labels" / f"{case}{ending}",
                {method: path for method, path in paths.items() if method not in gone},
                len(found.classes),
                str(found.channels.get("0", "")),
            )
        except (ValueError, RuntimeError, OSError):
            shelf.missing.append(f"The {kind} subject {case} is not shown: its image or masks cannot be read or drawn.")
            continue
        means = {method: _mean_dice(model, case) for method, model in models.items()}
        title = f"{kind.capitalize()} subject: {case}, slice {read.position[0]} of {read.position[1]}"
        slices[title], dice[title] = read, means
        shown = ", ".join(f"{marked(method)} {_percent(value)}" for method, value in means.items())
        about.append(f"{kind.capitalize()} subject {case}, mean Dice over its organs: {shown}.")
    if not slices:
        return shelf
    path = folder / "qualitative.png"
    plot_panel(slices, dice, found.classes, path)
    kinds = "the subject whose mean Dice is the median, and the one with the lowest" if len(slices) > 1 else "a subject"
    shelf.figures.append(
        FigureFile(
            path,
            "Expert and methods side by side",
            "Compare each method's outlines with the expert's: a colour that is missing is an organ that was not "
            f"found, and the number is the subject's mean Dice. Chosen by the scores of {marked(reference)}: {kinds}."
            + _models_of({method: pictured[method] for method in models}),
            f"Axial slices of {kinds} by {marked(reference)}, with organs outlined by the expert and by each method. "
            + " ".join(about),
        )
    )
    return shelf


def _mean_dice(model: Model, case: str) -> float:
    values = [entry.get("dice") for entry in (model.scores or {}).get(case, {}).values()]
    present = [value for value in values if value is not None]
    return float(np.mean(present)) if present else math.nan


def _training(found: Collected, folder: Path) -> Shelf:
    shelf = Shelf()
    without = []
    shown = _one_run_each(found, lambda run: sum(bool(model.terms) for model in run.models))
    for method in found.methods:
        run = shown[method]
        terms = {f"step {model.step}": model.terms for model in run.models if model.terms}
        if not terms:
            without.append(method)
            continue
        path = folder / f"loss_terms_{_file_name(method)}.png"
        plot_loss_terms(terms, path)
        names = sorted({name.replace("_", " ") for term in terms.values() for name in term})
        shelf.figures.append(
            FigureFile(
                path,
                f"Loss terms of {marked(method)}",
                "Look at whether the lines have levelled off by the last epoch, and at how large the added terms are "
                "beside the segmentation loss.",
                f"Training curves of {listed(names)} for {listed(list(terms))} of {marked(method)}, seed {run.seed}. "
                + " ".join(_first_and_last(title, term) for title, term in terms.items()),
                folded=bool(shelf.figures),
            )
        )
    if without:
        shelf.missing.append(
            f"No loss terms of {_named(without)}: they are logged by steps after the first, and no such log is there."
        )
    return shelf


def _first_and_last(title: str, terms: Mapping[str, NDArray[np.floating]]) -> str:
    ends = {name: values[~np.isnan(values)] for name, values in terms.items()}
    parts = [f"{n.replace('_', ' ')} from {v[0]:.3g} to {v[-1]:.3g}" for n, v in ends.items() if v.size]
    return f"{title}: {', '.join(parts)}."


def _prototypes(found: Collected, folder: Path) -> Shelf:
    shelf = Shelf()
    similarities, drifts, without, unmeasured = {}, {}, [], []
    shown = _one_run_each(found, lambda run: sum(model.prototypes is not None for model in run.models))
    for method in found.methods:
        models = shown[method].models
        stores = [model.prototypes for model in models if model.prototypes is not None]
        if not stores:
            without.append(method)
            continue
        last = stores[-1]
        stale = [name for name, old in zip(last.class_names, last.stale, strict=True) if old]
        if stale:
            unmeasured.append(f"{marked(method)} ({', '.join(stale)})")
        names = [f"{name} *" if old else name for name, old in zip(last.class_names, last.stale, strict=True)]
        similarities[method] = (names, similarity(last))
        moved = drift([model.prototypes for model in models])
        if any((~np.isnan(distances)).sum() > 1 for distances in moved.values()):
            drifts[method] = moved
        if any(_of_another_checkpoint(model) for model in models):
            shelf.missing.append(f"{marked(method)}: prototypes and scores belong to different trainings of a step.")
    if without:
        shelf.missing.append(f"No prototypes of {_named(without)} are stored.")
    if unmeasured:
        shelf.missing.append(
            "*: no voxels of an organ were found in the training scans of the last step, so its prototype is that of "
            f"an earlier step, and its movement is not shown: {listed(unmeasured)}."
        )
    together = sum(len(names) for names, _ in similarities.values()) <= _CLASSES_SIDE_BY_SIDE
    for group in [list(similarities)] if similarities and together else [[method] for method in similarities]:
        path = folder / f"prototype_similarity{'' if together else '_' + _file_name(group[0])}.png"
        plot_similarity({method: similarities[method] for method in group}, found.classes, path)
        shelf.figures.append(
            FigureFile(
                path,
                "How alike the organs look to the network" + ("" if together else f": {marked(group[0])}"),
                "Look off the diagonal: a red pair is two organs whose features point the same way, and which the "
                "network may confuse." + _models_of({method: shown[method] for method in group}),
                "Cosine similarity between the prototypes of all classes after the last step. "
                + " ".join(_most_alike(method, *similarities[method]) for method in group),
                folded=bool(shelf.figures),
            )
        )
    if drifts:
        path = folder / "prototype_drift.png"
        plot_drift(drifts, found.classes, path)
        shelf.figures.append(
            FigureFile(
                path,
                "How far the organs' prototypes move",
                "Look for lines that rise: above 1, the features of an organ have moved further than they scatter "
                "among its own voxels, and what was stored about it no longer fits."
                + _models_of({method: shown[method] for method in drifts}),
                "Line charts of the distance that each class's prototype has moved since it was first extracted, in "
                "units of the class's spread. " + " ".join(_moved(method, moved) for method, moved in drifts.items()),
            )
        )
    elif similarities:
        shelf.missing.append("No movement of prototypes is shown: it needs one class measured after two steps.")
    return shelf


def _of_another_checkpoint(model: Model) -> bool:
    stored = model.prototypes.checkpoint_sha256 if model.prototypes else ""
    return bool(stored and model.checkpoint_sha256) and stored != model.checkpoint_sha256


def _most_alike(method: str, names: Sequence[str], matrix: NDArray[np.floating]) -> str:
    pairs = [
        (matrix[a, b], f"{names[a]} and {names[b]}")
        for a in range(len(names))
        for b in range(a)
        if not np.isnan(matrix[a, b])
    ]
    return f"{marked(method)}, most alike: {max(pairs)[1]} ({max(pairs)[0]:.2f})." if pairs else ""


def _moved(method: str, moved: Mapping[str, NDArray[np.floating]]) -> str:
    ends = {name: values[~np.isnan(values)] for name, values in moved.items()}
    return f"{marked(method)}: " + ", ".join(f"{name} {v[-1]:.2f}" for name, v in ends.items() if v.size > 1) + "."


def _file_name(text: str) -> str:
    return re.sub(r"[^\w.-]", "_", text)
