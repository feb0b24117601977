"""Predict the test subjects with a step's model and score them: nnU-Net's predictor and Dice, MONAI's HD95 and NSD."""

from __future__ import annotations

import csv
import logging
import math
import os
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from nnunet_cil import nnunet_api
from nnunet_cil.cases import first_source
from nnunet_cil.chain import JOINT, Chain, Variant
from nnunet_cil.checkpoint import read_checkpoint
from nnunet_cil.host_memory import keeping_freed_memory
from nnunet_cil.labels import cumulative_labels
from nnunet_cil.metrics import NO_FORWARD_TRANSFER, final_means, gap_to_joint, over_seeds, plasticity_gap, summary
from nnunet_cil.parallel import over_cases
from nnunet_cil.report.paired import Scores, paired_differences
from nnunet_cil.report.table import FinalScores, Row, marked
from nnunet_cil.step_files import CHECKPOINT, COST_FILE, PROTOTYPE_FILE, REPLAY_FILE, write_json
from nnunet_cil.surface_scores import ABSENCES, BOTH_EMPTY, INVENTED, absence
from nnunet_cil.teacher import sha256_of
from nnunet_cil.untrusted import dataset_json_of, is_ending, is_name, read_json

logger = logging.getLogger(__name__)

TYPICAL_COMPRESSION = 50  # of a label file
SCORES = ("dice", "nsd", "hd95_mm")
HIGHER_IS_BETTER = ("dice", "nsd")
ENSEMBLE = "ensemble"
"""In place of a fold: the mean prediction of all folds, as of ``nnUNetv2_predict -f 0 1 2``."""
UNLABELLED = "unlabelled"
UNITS = {
    "dice, nsd": "mean over test subjects, 0..1",
    "hd95_mm": "mm, mean over the test subjects in which reference and prediction both have the class",
    "summary_hd95_mm": "means over the classes that have a distance; compare them only where as much is absent",
    "matrices": "a row a step, a column a class; null: not learned, labelled or evaluated, or absent in all subjects",
    "absent": "test subjects without HD95: both_empty (no score at all), missed and invented (Dice and NSD are 0), and "
    "unlabelled (their labels do not hold the class: no score, and not among n_subjects)",
    "gap_to_joint, plasticity_gap": "joint minus this method, same seed and fold, over the classes that both have",
    "bytes_kept": "what a step can read of earlier steps' data, whether its method does or not; null: joint has it "
    "all, or the models are not here",
    "never_trained_on": "true: no step draws from this set's dataset; null: the set is two folders of unknown origin, "
    "or the chain began with a given model, whose data are unknown",
}


def learned_at(chain: Chain) -> np.ndarray:
    """(K,) 1-based step at which each class is learned, classes in the order learned."""
    return np.array([number for number, step in enumerate(chain.schedule.steps, 1) for _ in step.classes])


def evaluation_file(chain: Chain, variant: Variant, step: int | str, fold: int | str) -> Path:
    """Where the scores of one model stand; step 1 belongs to the shared variant."""
    plans_name = chain.plans_name(chain.owner(variant, step))
    return chain.folder / "predictions" / plans_name / f"{_name(step)}_fold_{fold}" / "scores.json"


def scored_folds(chain: Chain) -> tuple[int | str, ...]:
    """The chain's folds, and their ensemble where there are several."""
    folds = chain.schedule.folds
    return folds if len(folds) == 1 else (*folds, ENSEMBLE)


def _members(chain: Chain, fold: int | str) -> tuple[int | str, ...]:
    return chain.schedule.folds if fold == ENSEMBLE else (fold,)


def _checkpoints(chain: Chain, variant: Variant, step: int | str, fold: int | str) -> list[Path]:
    model = chain.model_folder(variant, step)
    return [model / f"fold_{member}" / CHECKPOINT for member in _members(chain, fold)]


def _name(step: int | str) -> str:
    return str(step) if step == JOINT else f"step{step}"


def evaluate_model(
    chain: Chain, variant: Variant, step: int | str, fold: int | str, device: torch.device
) -> dict[str, Any]:
    """Scores of each test subject and learned class for one model, or for the ``ENSEMBLE`` of all folds.

    What exists for checkpoint, test set and tolerance is kept; predictions that exist are kept also where it is not.

    Returns:
        ``{"checkpoint_sha256", "test_sha256", "nsd_tolerance_mm", "method", "trainer", "seed", "step", "fold",
        "parameters", "scores": {case: {class: {"dice": 0..1, "hd95_mm": 0 or more, "nsd": 0..1}}},
        "absent": {case: {class: why}}}``.
        A score that does not exist is null and named in ``absent``, see ``surface_scores.absence``. A class that the
        subject's labels do not hold is left out.

    Raises:
        ValueError: the model is truncated.
    """
    path, key = evaluation_file(chain, variant, step, fold), _key(chain, variant, step, fold)
    if (known := _stored(path, key)) is not None:
        return known
    model = chain.model_folder(variant, step)
    tolerance_mm = chain.schedule.nsd_tolerance_mm
    test = _test_set(chain)
    ending = test["file_ending"]
    images = nnunet_api.image_lists(chain.folder / "test" / "images", ending)
    predictions = path.parent / f"{key['checkpoint_sha256'][:16]}_{key['test_sha256'][:16]}"
    what = f"predicting {len(images)} test subjects with step {step} of {marked(variant.method)}"
    logger.info("%s; by hand:\n  %s", what, predict_line(chain, variant, step, fold, device.type))
    preprocessed = chain.folder / "test" / "preprocessed"
    folds = _members(chain, fold)
    say = partial(logger.info, "  %s")
    with keeping_freed_memory(device.type == "cpu"):
        nnunet_api.predict(model, folds, chain.schedule.configuration, images, preprocessed, predictions, device, say)
    number = chain.n_steps if step == JOINT else int(step)
    labels = cumulative_labels([s.classes for s in chain.schedule.steps], number)
    scored = {
        case: {name: value for name, value in labels.items() if value in entry["labelled"]}
        for case, entry in test["cases"].items()
    }
    references = {case: chain.folder / "test" / "labels" / f"{case}{ending}" for case in scored}
    own = dataset_json_of(first_source(chain.schedule))  # whose reader wrote the references
    todo = [
        (references[case], predictions / f"{case}{ending}", own, list(values.values()), test["ignore"], tolerance_mm)
        for case, values in scored.items()
    ]
    n_bytes = TYPICAL_COMPRESSION * sum(file.stat().st_size for file in references.values())
    metrics = dict(zip(scored, over_cases(nnunet_api.case_metrics, todo, n_bytes, "scoring"), strict=True))
    content = {
        **key,
        "method": variant.method,
        "trainer": chain.owner(variant, step).trainer,
        "seed": variant.seed,
        "step": step,
        "fold": fold,
        "parameters": sum(map(count_parameters, _checkpoints(chain, variant, step, fold))),
        "scores": {
            case: {name: _scores_of(metrics[case][value]) for name, value in values.items()}
            for case, values in scored.items()
        },
        "absent": {
            case: {name: why for name, value in values.items() if (why := _absence_of(metrics[case][value]))}
            for case, values in scored.items()
        },
    }
    write_json(path, content)
    return content


def is_scored(chain: Chain, variant: Variant, step: int | str, fold: int | str) -> bool:
    """Whether the scores of a trained model are there, for the checkpoint, test set and tolerance as they are now."""
    return _stored(evaluation_file(chain, variant, step, fold), _key(chain, variant, step, fold)) is not None


def _key(chain: Chain, variant: Variant, step: int | str, fold: int | str) -> dict[str, Any]:
    digests = [sha256_of(checkpoint) for checkpoint in _checkpoints(chain, variant, step, fold)]
    return {
        "checkpoint_sha256": digests[0] if len(digests) == 1 else sha256("".join(digests).encode()).hexdigest(),
        **scored_as(chain),
    }


def _stored(path: Path, key: Mapping[str, Any]) -> dict[str, Any] | None:
    known = read_scores(path)
    return known if known.items() >= key.items() else None


def _scores_of(found: Mapping[str, float]) -> dict[str, float | None]:
    return _nullable({"dice": found["Dice"], "hd95_mm": found["hd95_mm"], "nsd": found["nsd"]})


def _absence_of(found: Mapping[str, float]) -> str | None:
    return absence(int(found["n_ref"]), int(found["n_pred"]))


def count_parameters(checkpoint: Path) -> int:
    """Numbers in a checkpoint's network weights, a tensor that stands under several names once.

    Raises:
        ValueError: no checkpoint of nnU-Net.
    """
    try:
        weights = read_checkpoint(checkpoint, mapped=True)["network_weights"]
    except nnunet_api.UNREADABLE as error:
        raise ValueError(
            f"{checkpoint}: got an unreadable model ({type(error).__name__}: {error}), expected one of nnU-Net. Remove "
            "its folder and train the step again."
        ) from error
    return sum({(tensor.data_ptr(), tensor.shape): tensor.numel() for tensor in weights.values()}.values())


def read_scores(path: Path) -> dict[str, Any]:
    """What ``evaluate_model`` stored; empty where there is nothing, or what cannot be read, which is told."""
    if not path.is_file():
        return {}
    try:
        content = read_json(path, "scores of test subjects")
        check_scores(content, path)
    except ValueError as error:
        logger.warning("%s It counts as not scored.", error)
        return {}
    return content


def check_scores(content: Mapping[str, Any], path: Path) -> None:
    """Refuse the content of a ``scores.json`` that has not its form, or numbers that are no scores.

    Raises:
        ValueError: it is so.
    """
    try:
        found = [pair for classes in content["scores"].values() for each in classes.values() for pair in each.items()]
        for why in content.get("absent", {}).values():
            why.keys()
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: got no table of scores ({error!r}), expected scores by case and class.") from error
    if odd := [f"{name}: {value!r}" for name, value in found if not _is_score(name, value)]:
        raise ValueError(f"{path}: got {odd[0]}, expected scores in [0, 1] and distances in mm.")
    if not isinstance(content.get("parameters", 0), int):
        raise ValueError(f"{path}: got the parameters {content['parameters']!r}, expected a number.")


def _is_score(name: str, value: Any) -> bool:
    if value is None:
        return True
    is_number = isinstance(value, (int, float)) and math.isfinite(value) and value >= 0
    return is_number and (value <= 1 or name == "hd95_mm")


def _test_set(chain: Chain) -> dict[str, Any]:
    path = chain.folder / "test" / "test.json"
    content = read_json(path, "the list of test subjects that `nnunet-cil prepare` writes")
    check_test(content, path)
    return content


def check_test(content: Mapping[str, Any], path: Path) -> None:
    """Refuse the content of a ``test.json`` that has not its form, or whose names lead out of their folders.

    Raises:
        ValueError: it is so.
    """
    cases = content.get("cases")
    good = is_ending(content.get("file_ending")) and isinstance(cases, dict) and all(map(is_name, cases))
    if not good or not all(isinstance(case, dict) and isinstance(case.get("set"), int) for case in cases.values()):
        raise ValueError(f"{path}: got no names of cases and file_ending, expected what `nnunet-cil prepare` writes.")


def predict_line(
    chain: Chain, variant: Variant, step: int | str, fold: int | str, device: str, images: str | None = None
) -> str:
    """The plain ``nnUNetv2_predict`` command for a step's model, by default with the path of the test images."""
    trainer, plans_name, configuration = chain.model_folder(variant, step).name.split("__")
    return nnunet_api.predict_line(
        chain.dataset_name(step),
        configuration,
        _members(chain, fold),
        trainer,
        plans_name,
        images or str(chain.folder / "test" / "images"),
        device,
    )


def score_matrix(chain: Chain, variant: Variant, fold: int | str, score: str = "dice") -> NDArray[np.float64]:
    """(T, K) mean of a score over test subjects; NaN where a class is not learned yet, not labelled, or not evaluated.

    Joint has one model, of all classes: only its last row is filled. A model that was scored on another test set or at
    another tolerance, or before there were surface scores, counts as not evaluated.

    Args:
        score: ``dice``, ``nsd`` or ``hd95_mm``, in that unit; a subject without this score takes no part in the mean.

    Raises:
        ValueError: another score.
    """
    if score not in SCORES:
        raise ValueError(f"score: got {score!r}, expected one of {', '.join(SCORES)}.")
    return _matrix(chain, _evaluations(chain, variant, fold), score)


def _steps(chain: Chain, variant: Variant) -> dict[int, int | str]:
    """Row of the matrix -> step of the model whose scores stand there."""
    return {chain.n_steps - 1: JOINT} if variant.method == JOINT else {t: t + 1 for t in range(chain.n_steps)}


def _evaluations(chain: Chain, variant: Variant, fold: int | str) -> dict[int, dict[str, Any]]:
    """Row of the matrix -> what ``evaluate_model`` stored."""
    found = {row: _evaluation(chain, variant, step, fold) for row, step in _steps(chain, variant).items()}
    return {row: content for row, content in found.items() if content}


def _evaluation(chain: Chain, variant: Variant, step: int | str, fold: int | str) -> dict[str, Any]:
    """What ``evaluate_model`` stored of one model; empty where it does not count as scored."""
    content = read_scores(evaluation_file(chain, variant, step, fold))
    return content if counts_as_scored(chain, variant, step, content) else {}


def counts_as_scored(chain: Chain, variant: Variant, step: int | str, content: Mapping[str, Any]) -> bool:
    """Whether what ``evaluate_model`` stored was taken as now, of this trainer's model; earlier versions name none."""
    trainer = chain.owner(variant, step).trainer
    return content.items() >= scored_as(chain).items() and content.get("trainer", trainer) == trainer


def scored_as(chain: Chain) -> dict[str, Any]:
    """What scores must have been taken with, to stand beside others: tolerance, and the test set if it is there."""
    test = chain.folder / "test" / "test.json"
    own_test = {"test_sha256": sha256_of(test)} if test.is_file() else {}
    return {**own_test, "nsd_tolerance_mm": chain.schedule.nsd_tolerance_mm}


def _learned(chain: Chain, row: int) -> list[tuple[int, str]]:
    """Column and name of the classes that a row can have."""
    return list(enumerate(chain.schedule.classes_until(row + 1)))


def _matrix(
    chain: Chain, evaluations: Mapping[int, Mapping[str, Any]], score: str, cases: Collection[str] | None = None
) -> NDArray[np.float64]:
    matrix = np.full((chain.n_steps, len(chain.schedule.classes)), np.nan)
    for row, content in evaluations.items():
        shown = shown_scores(content, cases)
        for column, name in _learned(chain, row):
            found = [classes[name].get(score) for classes in shown.values() if name in classes]
            if values := [value for value in found if value is not None]:
                matrix[row, column] = float(np.mean(values))
    return matrix


def shown_scores(content: Mapping[str, Any], cases: Collection[str] | None = None) -> dict[str, dict[str, Any]]:
    """``{case: {class: {score: value}}}`` of what ``evaluate_model`` stored, of all or the named test subjects.

    A class that none of them has keeps no score: where one is invented that is an error, which is counted, but there is
    nothing that it was to be like, and a mean of 0 would set back who is not asked for it.
    """
    scores, absent = content["scores"], content.get("absent", {})
    of = {case: classes for case, classes in scores.items() if cases is None or case in cases}
    shown = {
        name
        for case, classes in of.items()
        for name in classes
        if absent.get(case, {}).get(name) not in (BOTH_EMPTY, INVENTED)
    }
    return {
        case: {name: values if name in shown else {} for name, values in classes.items()}
        for case, classes in of.items()
    }


def _counts(chain: Chain, evaluations: Mapping[int, Mapping[str, Any]]) -> dict[str, list[list[int | None]]]:
    """Matrices (T, K): test subjects that label a class, those of them without HD95, by kind, and those that do not
    label it; None as in UNITS."""
    n_classes = len(chain.schedule.classes)
    counts: dict[str, list[list[int | None]]] = {
        kind: [[None] * n_classes for _ in range(chain.n_steps)] for kind in ("subjects", *ABSENCES, UNLABELLED)
    }
    for row, content in evaluations.items():
        for column, name in _learned(chain, row):
            scores, absent = content["scores"], content.get("absent", {})
            why = [absent.get(case, {}).get(name) for case, classes in scores.items() if name in classes]
            for kind in ABSENCES:
                counts[kind][row][column] = why.count(kind)
            counts["subjects"][row][column] = len(why)
            counts[UNLABELLED][row][column] = len(content["scores"]) - len(why)
    return counts


def subject_scores(chain: Chain, variants: Sequence[Variant], score: str = "dice") -> Scores:
    """A score of every test subject after the last step: ``{method: {(seed, fold): {case: {class: value or None}}}}``.

    What is not evaluated is left out. Input of ``report.paired``.
    """
    found: dict[str, dict[Any, Any]] = defaultdict(dict)
    for variant in variants:
        for fold in chain.schedule.folds:
            if last := _evaluation(chain, variant, chain.steps_of(variant)[-1], fold):
                found[variant.method][variant.seed, fold] = {
                    case: {name: values.get(score) for name, values in classes.items()}
                    for case, classes in shown_scores(last).items()
                }
    return dict(found)


def reference_of(chain: Chain, scores: Scores) -> str | None:
    """With which method of `subject_scores` the others are compared: the chain's own, else the first, `joint` last."""
    return min(scores, key=lambda method: (method != chain.default_method, method == JOINT), default=None)


@dataclass(frozen=True, eq=False)
class _Run:
    """A method with a seed and a fold: what is stored of its models, and what follows from that, by score or kind."""

    variant: Variant
    fold: int | str
    evaluations: Mapping[int, Mapping[str, Any]]
    matrices: Mapping[str, NDArray[np.float64]]
    counts: Mapping[str, list[list[int | None]]]


def collect_scores(chain: Chain, variants: list[Variant]) -> tuple[dict[str, Any], list[Row]]:
    """All scores of a chain as JSON-able dict and as table rows, one a method: its seeds, each the mean of its folds.

    A row takes those seeds and folds of which the latest step is scored, so that all its cells are means over the same.
    The ensemble of several folds has a row of its own.

    The dict says under ``units`` what its numbers are.
    """
    runs = []
    for variant in variants:
        for fold in scored_folds(chain):
            found = _evaluations(chain, variant, fold)
            matrices = {score: _matrix(chain, found, score) for score in SCORES}
            if not np.isnan(matrices["dice"]).all():
                runs.append(_Run(variant, fold, found, matrices, _counts(chain, found)))
    joint = {(run.variant.seed, run.fold): run for run in runs if run.variant.method == JOINT}
    entries = []
    by_method: dict[str, list[tuple[_Run, dict[str, float]]]] = defaultdict(list)
    for run in runs:
        bound = None if run.variant.method == JOINT else joint.get((run.variant.seed, run.fold))
        gaps = {score: _gaps(chain, run, bound, score) for score in HIGHER_IS_BETTER}
        entries.append(_nullable(_entry(chain, run, gaps)))
        by_method[_row_name(chain, run)].append((run, gaps["dice"]))
    content = {
        "chain": chain.schedule.name,
        "classes": list(chain.schedule.classes),
        "learned_at": learned_at(chain).tolist(),
        "units": UNITS,
        "nsd_tolerance_mm": chain.schedule.nsd_tolerance_mm,
        "n_test_subjects": len(_cases(chain)),
        "runs": entries,
        "paired": _nullable(_paired(chain, variants)),
    }
    return content, [_row(chain, method, of_method) for method, of_method in by_method.items()]


def _row_name(chain: Chain, run: _Run) -> str:
    method = run.variant.method
    return f"{method}, {len(chain.schedule.folds)} folds ensembled" if run.fold == ENSEMBLE else method


def _gaps(chain: Chain, run: _Run, joint: _Run | None, score: str) -> dict[str, float]:
    if joint is None:
        return {"gap_to_joint": np.nan, "plasticity_gap": np.nan}
    arguments = run.matrices[score], joint.matrices[score], learned_at(chain)
    return {"gap_to_joint": gap_to_joint(*arguments), "plasticity_gap": plasticity_gap(*arguments)}


def _entry(chain: Chain, run: _Run, gaps: Mapping[str, Mapping[str, float]]) -> dict[str, Any]:
    at, is_joint = learned_at(chain), run.variant.method == JOINT
    return {
        "method": run.variant.method,
        "seed": run.variant.seed,
        "fold": run.fold,
        **run.matrices,
        "absent": {kind: run.counts[kind] for kind in (*ABSENCES, UNLABELLED)},
        "n_subjects": run.counts["subjects"],
        "summary": {**summary(run.matrices["dice"], at, is_joint), **gaps["dice"]},
        "summary_nsd": {**summary(run.matrices["nsd"], at, is_joint), **gaps["nsd"]},
        "summary_hd95_mm": final_means(run.matrices["hd95_mm"], at),
        "forward_transfer": {"value": None, "reason": NO_FORWARD_TRANSFER},
        "parameters": _parameters(chain, run),
        "bytes_kept": _bytes_kept(chain, run),
        "cost": _costs(chain, run),
        "by_test_set": _by_test_set(chain, run),
    }


def _row(chain: Chain, method: str, runs: Sequence[tuple[_Run, Mapping[str, float]]]) -> Row:
    """The runs that have come furthest: a seed is the mean of its folds, absent scores are summed."""
    furthest = max(max(run.evaluations) for run, _ in runs)
    runs = [(run, gaps) for run, gaps in runs if max(run.evaluations) == furthest]
    by_seed: dict[int | None, list[tuple[_Run, Mapping[str, float]]]] = defaultdict(list)
    for run, gaps in runs:
        by_seed[run.variant.seed].append((run, gaps))
    each = {
        score: np.stack([over_seeds([run.matrices[score] for run, _ in folds])[0] for folds in by_seed.values()])
        for score in SCORES
    }
    gaps = {name: [over_seeds([gap[name] for _, gap in folds])[0] for folds in by_seed.values()] for name in runs[0][1]}
    mean = {score: over_seeds(matrices)[0] for score, matrices in each.items()}
    without_hd95 = np.isnan(each["hd95_mm"][:, -1]) & ~np.isnan(each["dice"][:, -1])
    total = {kind: sum(n or 0 for run, _ in runs for n in run.counts[kind][-1]) for kind in ("subjects", *ABSENCES)}
    at = learned_at(chain)
    final = FinalScores(
        nsd=final_means(mean["nsd"], at)["mean"],
        nsd_tolerance_mm=chain.schedule.nsd_tolerance_mm,
        hd95_mm=np.nan if without_hd95.any() else final_means(mean["hd95_mm"], at)["mean"],
        n_scores=total["subjects"],
        **{kind: total[kind] for kind in ABSENCES},
        **{name: float(over_seeds(values)[0]) for name, values in gaps.items()},
        gap_seeds=tuple(seed for seed, gap in zip(by_seed, gaps["gap_to_joint"], strict=True) if not np.isnan(gap)),
    )
    return Row(method, each["dice"], tuple(by_seed), final)


def _paired(chain: Chain, variants: Sequence[Variant]) -> dict[str, Any]:
    """Differences to the reference by score, method and group of classes; none if nothing is scored."""
    by_score = {score: subject_scores(chain, variants, score) for score in HIGHER_IS_BETTER}
    reference, classes = reference_of(chain, by_score["dice"]), chain.schedule.classes
    differences = {}
    for score, scores in by_score.items():
        found = paired_differences(scores, reference, classes, learned_at(chain)) if reference else {}
        differences[score] = {
            method: {group: asdict(difference) for group, difference in groups.items()}
            for method, groups in found.items()
        }
    return {"reference": reference or chain.default_method, **differences}


def _cases(chain: Chain) -> dict[str, Any]:
    return _test_set(chain)["cases"] if (chain.folder / "test" / "test.json").is_file() else {}


def _by_test_set(chain: Chain, run: _Run) -> list[dict[str, Any]]:
    """Matrices and final means of each test set.

    Empty for a single one, whose scores are those of the run, unless no step draws from its dataset.
    """
    members: dict[int, list[str]] = defaultdict(list)
    for case, entry in _cases(chain).items():
        members[entry["set"]].append(case)
    found: list[dict[str, Any]] = []
    for number, cases in sorted(members.items()):
        matrices = {score: _matrix(chain, run.evaluations, score, cases) for score in SCORES}
        found.append(
            {
                "set": number,
                "name": _test_set_name(chain, number),
                "n_subjects": len(cases),
                "n_classes": int((~np.isnan(matrices["dice"])).any(0).sum()),
                "never_trained_on": _never_trained_on(chain, number),
                "mean": {score: final_means(matrix, learned_at(chain))["mean"] for score, matrix in matrices.items()},
                **matrices,
            }
        )
    return found if len(found) > 1 or any(one["never_trained_on"] for one in found) else []


def _test_set_name(chain: Chain, number: int) -> str:
    """Of its dataset; two folders may be called after a person, and have a number.

    So has every set where the schedule names other ones than those that the scores are of.
    """
    tests = chain.schedule.test if _is_of_schedule(chain) else ()
    dataset = tests[number].dataset if 0 <= number < len(tests) else None
    return f"test set {number + 1}" if dataset is None else dataset.name


def _is_of_schedule(chain: Chain) -> bool:
    """Whether the test set that the scores are of is the one that the schedule names now."""
    return _test_set(chain).get("test") == chain.schedule.to_dict()["test"]


def _never_trained_on(chain: Chain, number: int) -> bool | None:
    schedule = chain.schedule
    if not 0 <= number < len(schedule.test) or not _is_of_schedule(chain):
        return None
    test = schedule.test[number]
    trained_on = {path.resolve() for path in (schedule.source, *(step.dataset for step in schedule.steps)) if path}
    if (test.dataset or test.images.parent).resolve() in trained_on:
        return False
    return None if test.dataset is None or schedule.model is not None else True


def _parameters(chain: Chain, run: _Run) -> dict[str, dict[str, int | None]]:
    """By step: parameters of its network, and how many more than the step before has."""
    totals = {row: content["parameters"] for row, content in run.evaluations.items() if "parameters" in content}
    return {
        _name(step): {"total": totals[row], "added": totals[row] - totals[row - 1] if row - 1 in totals else None}
        for row, step in _steps(chain, run.variant).items()
        if row in totals
    }


def _bytes_kept(chain: Chain, run: _Run) -> dict[str, dict[str, int | None]] | None:
    """By step: size of the teacher's prototypes and of a replay method's memory, None where the models are not here.

    None for joint, which keeps it all.
    """
    if run.variant.method == JOINT:
        return None
    kept = {}
    for step in range(1, chain.n_steps + 1):
        here, before = _fold_folders(chain, run, step), _fold_folders(chain, run, step - 1) if step > 1 else []
        prototypes = [path.stat().st_size for folder in before if (path := folder / PROTOTYPE_FILE).is_file()]
        replays = [path for folder in here if (path := folder / REPLAY_FILE).is_file()]
        kept_bytes = [_read_numbers(path, "what replay keeps", ("bytes",)).get("bytes") for path in replays]
        memory = None if None in kept_bytes else sum(kept_bytes)
        kept[_name(step)] = {
            "prototypes": sum(prototypes) if all(folder.is_dir() for folder in before) else None,
            "replay": memory if all(folder.is_dir() for folder in here) else None,
        }
    return kept


def _costs(chain: Chain, run: _Run) -> dict[str, Any]:
    """By step; empty for an ensemble, whose folds have theirs."""
    if run.fold == ENSEMBLE:
        return {}
    found = {
        _name(step): _fold_folders(chain, run, step)[0] / COST_FILE for step in _steps(chain, run.variant).values()
    }
    return {name: _read_numbers(path, "the cost of a step") for name, path in found.items() if path.is_file()}


def check_cost(content: Mapping[str, Any], path: Path) -> None:
    """Refuse the content of a ``cost.json`` that holds anything but numbers and nulls.

    Raises:
        ValueError: it does.
    """
    for key, value in content.items():
        if value is not None and not (isinstance(value, (int, float)) and math.isfinite(value)):
            raise ValueError(f"{path}: got {key}: {value!r}, expected a number.")


def _read_numbers(path: Path, what: str, keys: Sequence[str] = ()) -> dict[str, Any]:
    """The numbers in a file, or those of these keys; empty, with a warning, for one that is damaged."""
    try:
        content = read_json(path, what)
        content = {key: content.get(key) for key in keys} if keys else content
        check_cost(content, path)
    except ValueError as error:
        logger.warning("%s It is left out.", error)
        return {}
    return content


def _fold_folders(chain: Chain, run: _Run, step: int | str) -> list[Path]:
    return [chain.model_folder(run.variant, step) / f"fold_{fold}" for fold in _members(chain, run.fold)]


def write_matrices(chain: Chain, content: Mapping[str, Any]) -> list[Path]:
    """Write each run's matrices to ``matrices/METHOD_seedS_foldF_SCORE.csv`` in the chain's folder, whole or not.

    A row a step, a column a class, and a first column with the step; an absent score is an empty field.

    Args:
        content: as ``collect_scores`` gives it.

    Returns:
        The files, in the order of the runs.
    """
    folder = chain.folder / "matrices"
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for run in content["runs"]:
        for score in SCORES:
            path = folder / f"{run['method']}_seed{run['seed']}_fold{run['fold']}_{score}.csv"
            unfinished = path.with_name(path.name + ".part")
            with open(unfinished, "w", newline="", encoding="utf-8") as file:
                lines = csv.writer(file, lineterminator="\n")
                lines.writerow(["step", *content["classes"]])
                lines.writerows([step, *row] for step, row in enumerate(run[score], start=1))
            os.replace(unfinished, path)
            written.append(path)
    return written


def _nullable(value: Any) -> Any:
    """JSON-able: arrays as lists, NaN as None."""
    if isinstance(value, Mapping):
        return {key: _nullable(entry) for key, entry in value.items()}
    if isinstance(value, np.ndarray):
        return _nullable(value.tolist())
    if isinstance(value, list):
        return [_nullable(entry) for entry in value]
    if isinstance(value, (float, np.floating)):
        return None if np.isnan(value) else float(value)
    return value
