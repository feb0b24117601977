"""Predict the test subjects with a step's model and score them: nnU-Net's predictor, nnU-Net's metrics."""

from __future__ import annotations

import json
import logging
import warnings
from pathlib import Path
from typing import Any

import numpy as np

from nnunet_cil import nnunet_api
from nnunet_cil.chain import JOINT, Chain, Variant, write_json
from nnunet_cil.labels import cumulative_labels
from nnunet_cil.metrics import summary
from nnunet_cil.parallel import over_cases
from nnunet_cil.report.table import Row
from nnunet_cil.teacher import sha256_of

logger = logging.getLogger(__name__)

TYPICAL_COMPRESSION = 50  # of a label file


def learned_at(chain: Chain) -> np.ndarray:
    """(K,) 1-based step at which each class is learned, classes in the order learned."""
    return np.array([number for number, step in enumerate(chain.schedule.steps, 1) for _ in step.classes])


def evaluation_file(chain: Chain, variant: Variant, step: int | str, fold: int | str) -> Path:
    """Where the scores of one model stand; step 1 belongs to the shared variant."""
    owner = chain.first_step(variant.seed) if step == 1 else variant
    return chain.folder / "predictions" / chain.plans_name(owner) / f"{_name(step)}_fold_{fold}" / "scores.json"


def _name(step: int | str) -> str:
    return str(step) if step == JOINT else f"step{step}"


def evaluate_model(chain: Chain, variant: Variant, step: int | str, fold: int | str, device: Any) -> dict[str, Any]:
    """Dice of each test subject and learned class for one model; what exists for checkpoint and test set is kept.

    Returns:
        ``{"checkpoint_sha256", "test_sha256", "dice": {case: {class: 0..1 or null}}, ...}``; null where reference and
        prediction are both empty. A class that the test set does not label is left out.
    """
    path = evaluation_file(chain, variant, step, fold)
    model = chain.model_folder(variant, step)
    key = {
        "checkpoint_sha256": sha256_of(model / f"fold_{fold}" / "checkpoint_final.pth"),
        "test_sha256": sha256_of(chain.folder / "test" / "test.json"),
    }
    if path.is_file() and (known := json.loads(path.read_text())).items() >= key.items():
        return known
    test = json.loads((chain.folder / "test" / "test.json").read_text())
    ending = test["file_ending"]
    images = nnunet_api.image_lists(chain.folder / "test" / "images", ending)
    predictions = path.parent / f"{key['checkpoint_sha256'][:16]}_{key['test_sha256'][:16]}"
    what = f"predicting {len(images)} test subjects with step {step} of {variant.method}"
    logger.info("%s; by hand:\n  %s", what, predict_line(chain, variant, step, fold))
    preprocessed = chain.folder / "test" / "preprocessed"
    nnunet_api.predict(model, fold, chain.schedule.configuration, images, preprocessed, predictions, device, _say)
    number = chain.n_steps if step == JOINT else int(step)
    labels = cumulative_labels([s.classes for s in chain.schedule.steps], number)
    scored = {
        case: {name: value for name, value in labels.items() if value in entry["labelled"]}
        for case, entry in test["cases"].items()
    }
    references = {case: chain.folder / "test" / "labels" / f"{case}{ending}" for case in scored}
    todo = [
        (references[case], predictions / f"{case}{ending}", test, list(values.values()), test["ignore"])
        for case, values in scored.items()
    ]
    n_bytes = TYPICAL_COMPRESSION * sum(file.stat().st_size for file in references.values())
    metrics = over_cases(nnunet_api.case_metrics, todo, n_bytes, "scoring")
    dice = {
        case: {name: _number(found[value]["Dice"]) for name, value in values.items()}
        for (case, values), found in zip(scored.items(), metrics, strict=True)
    }
    content = {**key, "method": variant.method, "seed": variant.seed, "step": step, "dice": dice}
    write_json(path, content)
    return content


def _say(line: str) -> None:
    logger.info("  %s", line)


def _number(value: float) -> float | None:
    return None if np.isnan(value) else float(value)


def predict_line(chain: Chain, variant: Variant, step: int | str, fold: int | str) -> str:
    """The plain ``nnUNetv2_predict`` command for a step's model."""
    owner = chain.first_step(variant.seed) if step == 1 else variant
    return nnunet_api.predict_line(
        chain.dataset_name(step),
        chain.schedule.configuration,
        fold,
        owner.trainer,
        chain.plans_name(owner),
        str(chain.folder / "test" / "images"),
    )


def score_matrix(chain: Chain, variant: Variant, fold: int | str) -> np.ndarray:
    """(T, K) mean Dice over test subjects; NaN where a class is not learned yet, not labelled, or not evaluated yet.

    Joint has one model, of all classes: only its last row is filled.
    """
    at = learned_at(chain)
    matrix = np.full((chain.n_steps, len(at)), np.nan)
    rows: list[tuple[int, int | str]] = [(t, t + 1) for t in range(chain.n_steps)]
    if variant.method == JOINT:
        rows = [(chain.n_steps - 1, JOINT)]
    for row, step in rows:
        path = evaluation_file(chain, variant, step, fold)
        if not path.is_file():
            continue
        dice = json.loads(path.read_text())["dice"]
        for column, name in enumerate(chain.schedule.classes):
            values = [case[name] for case in dice.values() if case.get(name) is not None]
            if values and (step == JOINT or at[column] <= row + 1):
                matrix[row, column] = float(np.mean(values))
    return matrix


def collect_scores(chain: Chain, variants: list[Variant]) -> tuple[dict[str, Any], list[Row]]:
    """All scores of a chain as JSON-able dict and as table rows, one a method: the mean over its seeds and folds."""
    at = learned_at(chain)
    content: dict[str, Any] = {
        "chain": chain.schedule.name,
        "classes": list(chain.schedule.classes),
        "learned_at": at.tolist(),
        "metric": "Dice, mean over test subjects, 0..1; null: not learned, not labelled or not evaluated",
        "n_test_subjects": _n_test(chain),
        "runs": [],
    }
    by_method: dict[str, list[np.ndarray]] = {}
    for variant in variants:
        for fold in chain.schedule.folds:
            matrix = score_matrix(chain, variant, fold)
            if np.isnan(matrix).all():
                continue
            by_method.setdefault(variant.method, []).append(matrix)
            content["runs"].append(
                {
                    "method": variant.method,
                    "seed": variant.seed,
                    "fold": fold,
                    "dice": _nullable(matrix),
                    "summary": {key: _nullable(value) for key, value in summary(matrix, at).items()},
                    "cost": _costs(chain, variant, fold),
                }
            )
    rows = []
    for method, matrices in by_method.items():
        stacked = np.stack(matrices)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # a cell that no seed has yet
            mean, std = np.nanmean(stacked, 0), np.nanstd(stacked, 0, ddof=1) if len(matrices) > 1 else None
        rows.append(Row(method=method, R=mean, seeds=len(matrices), R_std=std))
    return content, rows


def _n_test(chain: Chain) -> int:
    path = chain.folder / "test" / "test.json"
    return len(json.loads(path.read_text())["cases"]) if path.is_file() else 0


def _costs(chain: Chain, variant: Variant, fold: int | str) -> dict[str, Any]:
    steps: list[int | str] = [JOINT] if variant.method == JOINT else [*range(1, chain.n_steps + 1)]
    found = {_name(step): chain.model_folder(variant, step) / f"fold_{fold}" / "cost.json" for step in steps}
    return {name: json.loads(path.read_text()) for name, path in found.items() if path.is_file()}


def _nullable(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return [_nullable(entry) for entry in value.tolist()] if value.ndim == 1 else [_nullable(row) for row in value]
    if isinstance(value, list):
        return [_nullable(entry) for entry in value]
    if isinstance(value, (float, np.floating)):
        return None if np.isnan(value) else float(value)
    return value
