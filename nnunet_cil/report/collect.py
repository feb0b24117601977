"""What a report shows, read from the files of a chain and of its models. Nothing is trained, predicted or scored."""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nnunet_cil import metrics, nnunet_api
from nnunet_cil.chain import JOINT, Chain, Variant, method_of
from nnunet_cil.evaluate import (
    ENSEMBLE,
    check_cost,
    check_scores,
    check_test,
    collect_scores,
    counts_as_scored,
    evaluation_file,
    learned_at,
    predict_line,
    scored_folds,
    shown_scores,
)
from nnunet_cil.guard import GUARD_FILE, Check, checks_of, place_of
from nnunet_cil.prototypes import PrototypeStore
from nnunet_cil.report.by_test_set import TestSetScores, by_test_set
from nnunet_cil.report.table import Row, marked
from nnunet_cil.schedule import Guard
from nnunet_cil.step_files import COST_FILE, PROTOTYPE_FILE
from nnunet_cil.untrusted import read_json

logger = logging.getLogger(__name__)

_EPOCH = re.compile(r"Epoch ([0-9]{1,7}) *$")
_TERM = re.compile(r": loss_(\w+) (nan|-?inf|-?[0-9]+\.[0-9]+) *$")
_PRECISION = re.compile(r": Precision: (.*\S)")
_IMAGES = "TEST_IMAGES"  # so that the page has no path of this machine


@dataclass(frozen=True, eq=False)
class Model:
    """One trained or expected model. Step 1 belongs to the variant that all methods of its seed share.

    Attributes:
        method, seed, fold, step: which one; ``step`` is ``"joint"`` for the joint model.
        trained: whether its training has ended.
        scores: case -> class -> score name -> value, None where absent; None if it is not scored.
        checkpoint_sha256, test_sha256: of the checkpoint and the test set that were scored; "" if it is not scored.
        predictions: folder of its masks of the test subjects, if it is there.
        terms: loss term -> (epochs,) weighted values, NaN where an epoch has none.
        prototypes: of its last epoch, if there are any.
        cost: content of ``cost.json``; empty without.
        machine: device, GPU, precision and version of torch that it was trained with, as far as its files tell.
        train_command, predict_command: to type by hand; the first is "" for a given model.
    """

    method: str
    seed: int | None
    fold: int | str
    step: int | str
    trained: bool
    scores: Mapping[str, Mapping[str, Mapping[str, float | None]]] | None
    checkpoint_sha256: str
    test_sha256: str
    predictions: Path | None
    terms: Mapping[str, NDArray[np.float64]]
    prototypes: PrototypeStore | None
    cost: Mapping[str, float | None]
    machine: Mapping[str, str]
    train_command: str
    predict_command: str


@dataclass(frozen=True, eq=False)
class Run:
    """One method with one seed and fold: its models by step, in order; joint has one."""

    method: str
    seed: int | None
    fold: int | str
    models: tuple[Model, ...]


@dataclass(frozen=True)
class StepCost:
    """What a step of a method takes and what it finds of earlier steps' data, means over its trainings; None: unknown.

    Attributes:
        method, step: which; ``step`` is ``"step1"`` and so on, or ``"joint"``.
        seconds: for pseudo-labels, training and prototypes.
        memory_bytes, gpu_memory_bytes: largest use while training.
        parameters_added: to the network of the step before.
        prototype_bytes: size of the teacher's prototypes.
        replay_bytes: size of the cases of earlier steps that are kept.
    """

    method: str
    step: str
    seconds: float | None
    memory_bytes: float | None
    gpu_memory_bytes: float | None
    parameters_added: float | None
    prototype_bytes: float | None
    replay_bytes: float | None


@dataclass(frozen=True, eq=False)
class Collected:
    """All that a report shows.

    Attributes:
        name: of the chain.
        classes: K names in the order learned; class ``i`` has the value ``i + 1`` in masks.
        learned_at: the K steps, from 1.
        n_steps: T.
        rows: Dice by method, the mean over seeds and folds; only methods with a score.
        dice_by_run: method -> (T, K) Dice of each of its runs.
        runs: all runs that were asked for, in their order.
        predict_ensembles: commands for the ensembles of folds, if there are several folds.
        test: folder of the test set, with the content of its ``test.json``; empty without.
        schedule: settings in force.
        schedule_file: the file they come from.
        schedule_sha256: of that file.
        test_sha256: of the test set that the models were scored on; "" without scores.
        nsd_tolerance_mm: of the surface overlap.
        by_test_set: the test sets, if there are several or a single one is of a dataset that no step draws from.
        step_costs: of all scored steps, by method.
        paired: differences to a reference, as ``evaluate.collect_scores`` gives them.
        own_method: the schedule's.
        base_methods: method -> the method that its trainer is.
        own_settings: method -> its coefficients that differ from the schedule's.
        channels: channel names of the images, by their number.
        guard: by which an organ counts as kept, weakened or lost.
        checks: of the trained steps, each compared with the step before.
        problems: sentences on files that could not be read.
    """

    name: str
    classes: tuple[str, ...]
    learned_at: tuple[int, ...]
    n_steps: int
    rows: tuple[Row, ...]
    dice_by_run: Mapping[str, tuple[NDArray[np.float64], ...]]
    runs: tuple[Run, ...]
    predict_ensembles: tuple[str, ...]
    test: Mapping[str, Any]
    test_folder: Path
    schedule: Mapping[str, Any]
    schedule_file: Path
    schedule_sha256: str
    test_sha256: str
    nsd_tolerance_mm: float
    by_test_set: tuple[TestSetScores, ...]
    step_costs: tuple[StepCost, ...]
    paired: Mapping[str, Any]
    own_method: str
    base_methods: Mapping[str, str]
    own_settings: Mapping[str, Mapping[str, Any]]
    channels: Mapping[str, str]
    guard: Guard
    checks: tuple[Check, ...]
    problems: tuple[str, ...] = field(default=())

    @property
    def methods(self) -> tuple[str, ...]:
        """Methods in the order asked for."""
        return tuple(dict.fromkeys(run.method for run in self.runs))

    @property
    def models(self) -> tuple[Model, ...]:
        """Every model once."""
        return tuple({id(model): model for run in self.runs for model in run.models}.values())


def total_seconds(cost: Mapping[str, float | None]) -> float | None:
    """Time for pseudo-labels, training and prototypes, from the content of a ``cost.json``; None without any."""
    return sum(cost.get(f"seconds_{part}") or 0 for part in ("training", "preparing", "prototypes")) or None


def last_scores(runs: Sequence[Run], classes: Sequence[str], score: str) -> tuple[list[str], NDArray[np.float64]]:
    """Score of each test subject after the last step, the mean over the runs that have it.

    Args:
        runs: of one method.
        classes: K names.
        score: ``dice``, ``hd95_mm`` or ``nsd``.

    Returns:
        N subjects and (N, K) scores, NaN where absent; none while no run has its last step scored.
    """
    scored = [run.models[-1].scores for run in runs if run.models[-1].scores is not None]
    cases = sorted({case for scores in scored for case in scores})
    values = np.full((len(scored), len(cases), len(classes)), np.nan)
    for r, scores in enumerate(scored):
        for n, case in enumerate(cases):
            for c, name in enumerate(classes):
                value = scores.get(case, {}).get(name, {}).get(score)
                values[r, n, c] = np.nan if value is None else value
    return cases, metrics.over_seeds(values)[0]


def read_terms(folder: Path) -> dict[str, NDArray[np.float64]]:
    """Named loss terms by epoch from nnU-Net's training logs in a fold's folder; a resumed training has several.

    Returns:
        Term -> (epochs,) values; NaN where an epoch has none, empty without a log.
    """
    values: dict[str, dict[int, float]] = {}
    for path in _logs(folder):
        epoch = None
        for line in path.read_text(errors="replace").splitlines():
            if match := _EPOCH.search(line):
                epoch = int(match.group(1))
            elif (match := _TERM.search(line)) and epoch is not None:
                values.setdefault(match.group(1), {})[epoch] = float(match.group(2))
    n = 1 + max((epoch for by_epoch in values.values() for epoch in by_epoch), default=-1)
    return {
        name: np.array([by_epoch.get(epoch, np.nan) for epoch in range(n)]) for name, by_epoch in sorted(values.items())
    }


def collect(chain: Chain, variants: Sequence[Variant]) -> Collected:
    """Read everything that there is of these variants; what is missing stays empty, what is damaged is told.

    Args:
        chain: the chain.
        variants: methods with seeds, in the order to show.
    """
    problems: list[str] = []
    known: dict[tuple[str, int | None, int | str, int | str], Model] = {}
    runs, of_ensembles = [], []
    for variant in variants if chain.content["plans_name"] else ():
        owners = {step: chain.owner(variant, step) for step in chain.steps_of(variant)}
        for fold in chain.schedule.folds:
            models = []
            for step, owner in owners.items():
                key = (owner.method, owner.seed, fold, step)
                known[key] = known.get(key) or _model(chain, owner, step, fold, problems)
                models.append(known[key])
            runs.append(Run(variant.method, variant.seed, fold, tuple(models)))
        if ENSEMBLE in scored_folds(chain):
            device = _device(chain)
            of_ensembles += [
                predict_line(chain, each, step, ENSEMBLE, device, _IMAGES) for step, each in owners.items()
            ]
    content, rows = collect_scores(chain, list(variants)) if runs else ({"runs": []}, [])
    by_run: dict[str, list[NDArray[np.float64]]] = {}
    for run in (run for run in content["runs"] if run["fold"] != ENSEMBLE):
        by_run.setdefault(run["method"], []).append(np.array(run["dice"], dtype=np.float64))
    scored = [model for run in runs for model in run.models if model.scores is not None]
    return Collected(
        name=chain.schedule.name,
        classes=tuple(chain.schedule.classes),
        learned_at=tuple(int(step) for step in learned_at(chain)),
        n_steps=chain.n_steps,
        rows=tuple(rows),
        dice_by_run={method: tuple(matrices) for method, matrices in by_run.items()},
        runs=tuple(runs),
        predict_ensembles=tuple(dict.fromkeys(of_ensembles)),
        test=_read_json(chain.folder / "test" / "test.json", "the list of test subjects", problems, check_test),
        test_folder=chain.folder / "test",
        schedule=chain.schedule.to_dict(),
        schedule_file=chain.schedule.file,
        schedule_sha256=hashlib.sha256(chain.schedule.file.read_bytes()).hexdigest(),
        test_sha256=next((model.test_sha256 for model in scored), ""),
        nsd_tolerance_mm=chain.schedule.nsd_tolerance_mm,
        by_test_set=by_test_set(content["runs"]),
        step_costs=_step_costs(content["runs"]),
        paired=content.get("paired", {}),
        own_method=method_of(chain.schedule.trainer),
        base_methods={variant.method: method_of(variant.trainer) for variant in variants},
        own_settings={variant.method: _own_settings(chain, variant) for variant in variants},
        channels=_channels(chain, runs, problems),
        guard=chain.schedule.guard,
        checks=_checks(chain, runs, problems),
        problems=tuple(problems),
    )


def _step_costs(runs: Sequence[Mapping[str, Any]]) -> tuple[StepCost, ...]:
    """From the runs of ``collect_scores``; the ensemble has none."""
    found: dict[tuple[str, str], list[tuple[float | None, ...]]] = {}
    for run in (run for run in runs if run["fold"] != ENSEMBLE):
        for step, parameters in run["parameters"].items():
            cost, kept = run["cost"].get(step, {}), (run["bytes_kept"] or {}).get(step, {})
            memory = (cost.get("peak_memory_bytes"), cost.get("peak_gpu_memory_bytes"))
            numbers = (total_seconds(cost), *memory, parameters["added"], kept.get("prototypes"), kept.get("replay"))
            found.setdefault((run["method"], step), []).append(numbers)
    return tuple(
        StepCost(method, step, *(_mean_of_known(column) for column in zip(*rows, strict=True)))
        for (method, step), rows in found.items()
    )


def _mean_of_known(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def _checks(chain: Chain, runs: Sequence[Run], problems: list[str]) -> tuple[Check, ...]:
    known = checks_of(_read_json(chain.folder / GUARD_FILE, "what the guard against forgetting saw", problems))
    places = [
        place_of(chain, chain.variant(run.method, run.seed), model.step, run.fold)
        for run in runs
        for model in run.models
    ]
    return tuple(known[place] for place in dict.fromkeys(places) if place in known)


def _own_settings(chain: Chain, variant: Variant) -> dict[str, Any]:
    return {key: value for key, value in chain.settings(variant).items() if value != chain.schedule.method.get(key)}


def _channels(chain: Chain, runs: Sequence[Run], problems: list[str]) -> dict[str, str]:
    """Channel names, from the first model that has its nnU-Net files."""
    for model in (model for run in runs for model in run.models):
        variant = chain.variant(model.method, model.seed)
        path = chain.model_folder(variant, model.step) / "dataset.json"
        if content := _read_json(path, "the channel names", problems):
            return names if isinstance(names := content.get("channel_names"), dict) else {}
    return {}


def _model(chain: Chain, owner: Variant, step: int | str, fold: int | str, problems: list[str]) -> Model:
    of_step = "all organs" if step == JOINT else f"step {step}"
    title = f"{marked(owner.method)}, seed {owner.seed}, {of_step}, fold {fold}"
    folder = chain.model_folder(owner, step) / f"fold_{fold}"
    path = evaluation_file(chain, owner, step, fold)
    evaluation = _read_json(path, f"the scores of {title}", problems, check_scores)
    if not counts_as_scored(chain, owner, step, evaluation):
        evaluation = {}  # as in evaluate.score_matrix: of another test set or tolerance, so to be scored again
    hashes = [str(evaluation.get(key, "")) for key in ("checkpoint_sha256", "test_sha256")]
    predictions = path.parent / "_".join(part[:16] for part in hashes)
    debug = _read_json(folder / "debug.json", f"the settings of {title}", problems)
    device = str(debug.get("device", "")).split(":")[0]
    is_given = step == 1 and chain.schedule.model is not None
    return Model(
        method=owner.method,
        seed=owner.seed,
        fold=fold,
        step=step,
        trained=chain.trained(owner, step, fold),
        scores=shown_scores(evaluation) if evaluation else None,
        checkpoint_sha256=hashes[0],
        test_sha256=hashes[1],
        predictions=predictions if evaluation and predictions.is_dir() else None,
        terms=read_terms(folder),
        prototypes=_prototypes(folder / PROTOTYPE_FILE, title, problems),
        cost=_read_json(folder / COST_FILE, f"the cost of {title}", problems, check_cost),
        machine=_machine(folder, debug, device),
        train_command="" if is_given else _train_command(chain, owner, step, fold, device or _device(chain)),
        predict_command=predict_line(chain, owner, step, fold, device or _device(chain), _IMAGES),
    )


def _logs(folder: Path) -> list[Path]:
    """nnU-Net's training logs, oldest first; their names do not sort so, as days and months have no leading zeros."""
    return sorted(folder.glob("training_log_*.txt"), key=lambda path: (path.stat().st_mtime, path.name))


def _machine(folder: Path, debug: Mapping[str, Any], device: str) -> dict[str, str]:
    logs = _logs(folder)
    precision = _PRECISION.findall(logs[-1].read_text(errors="replace")) if logs else []
    found = {
        "device": device,
        "GPU": str(debug.get("gpu_name", "")),
        "precision": precision[-1].replace("torch.", "") if precision else "",
        "torch": str(debug.get("torch_version", "")),
    }
    return {key: value for key, value in found.items() if value}


def _device(chain: Chain) -> str:
    """What the schedule asks for; nnU-Net's own for ``auto``."""
    return "cuda" if chain.schedule.device == "auto" else chain.schedule.device


def _train_command(chain: Chain, owner: Variant, step: int | str, fold: int | str, device: str) -> str:
    arguments = nnunet_api.train_arguments(
        chain.dataset_name(step),
        chain.schedule.configuration,
        fold,
        owner.trainer,
        chain.plans_name(owner),
        device,
    )
    return " ".join(["nnUNetv2_train", *arguments])


def _read_json(
    path: Path, what: str, problems: list[str], check: Callable[[dict[str, Any], Path], None] | None = None
) -> dict[str, Any]:
    """Content of a JSON object; empty where there is no file, and told where it cannot be read or is refused."""
    try:
        content = read_json(path, "an object")
        if check is not None:
            check(content, path)
    except FileNotFoundError:
        return {}
    except (ValueError, OSError) as error:
        logger.warning("%s It is left out of the report.", error)
        problems.append(f"The file with {what} could not be read and is left out.")
        return {}
    return content


def _prototypes(path: Path, title: str, problems: list[str]) -> PrototypeStore | None:
    if not path.is_file():
        return None
    try:
        return PrototypeStore.load(path)
    except ValueError as error:
        logger.warning("%s", error)
        problems.append(f"The file with the prototypes of {title} could not be read and is left out.")
        return None
