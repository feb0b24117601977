"""The guard against forgetting: what a step did to the organs of the steps before it.

An organ that test subjects have labelled is judged by their Dice after the step before and after this one. Others, as
in a clinic without a test set, are judged by what both models find on a few of the step's own scans. No data of earlier
steps are read.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from nnunet_cil import nnunet_api
from nnunet_cil.chain import JOINT, Chain, Variant
from nnunet_cil.evaluate import evaluation_file, score_matrix
from nnunet_cil.prototypes import PrototypeStore
from nnunet_cil.report.prototype_change import alignment
from nnunet_cil.report.words import Outcome, fate, listed
from nnunet_cil.schedule import Guard
from nnunet_cil.step_files import CHECKPOINT, PROTOTYPE_FILE, write_json
from nnunet_cil.teacher import load_teacher, sha256_of
from nnunet_cil.untrusted import read_json

logger = logging.getLogger(__name__)

GUARD_FILE = "guard.json"
N_SCANS = 5
FOUND_FROM = 100  # voxels, below which what a model finds of an organ is chance


@dataclass(frozen=True)
class Organ:
    """What is known of an organ of an earlier step after a step; None where it is not known.

    Attributes:
        before, after: mean Dice over the test subjects in [0, 1], after the step before and after this one.
        agreement: Dice in [0, 1] between what both models find on new scans.
        cosine: of its prototype with that of the step before, see ``prototype_change.alignment``.
    """

    before: float | None = None
    after: float | None = None
    agreement: float | None = None
    cosine: float | None = None

    @property
    def labelled(self) -> bool:
        """Whether test subjects have it labelled."""
        return self.before is not None and self.after is not None

    def status(self, guard: Guard) -> str:
        """``kept``, ``weakened``, ``lost``, ``already lacking`` if the step before had not found it, or ``not scored``.

        Whether that one had lost it, or none ever learned it, two steps do not say.
        """
        if self.labelled:
            found = fate(self.before, self.after, guard)
        else:
            agreement = math.nan if self.agreement is None else self.agreement
            found = fate(1.0, agreement, replace(guard, weakened=1 - guard.agreement))
        return {"improved": "kept", "not learned": "already lacking"}.get(found, found)

    def __str__(self) -> str:
        cosine = "" if self.cosine is None else f", cosine of prototypes {self.cosine:.2f}"
        if self.labelled:
            return f"Dice {self.before:.3f} -> {self.after:.3f}{cosine}"
        if self.agreement is None:
            return f"no test subject has it labelled, and the new scans do not show it{cosine}"
        return f"agreement with the step before {self.agreement:.3f}{cosine}"


@dataclass(frozen=True)
class Check:
    """One step of one variant and fold, compared with the step before.

    Attributes:
        teacher_sha256, checkpoint_sha256: of the two models.
        n_scans: new scans on which both models were compared; 0 if test subjects have all organs labelled.
        organs: of earlier steps, in the order learned.
    """

    method: str
    seed: int | None
    fold: int | str
    step: int
    teacher_sha256: str
    checkpoint_sha256: str
    n_scans: int
    organs: Mapping[str, Organ]

    def outcomes(self, guard: Guard) -> list[Outcome]:
        """The organs without their numbers, for `words.fate_of_old`."""
        return [Outcome(name, 0, math.nan, math.nan, organ.status(guard)) for name, organ in self.organs.items()]

    def lost(self, guard: Guard) -> dict[str, Organ]:
        """The organs that are lost."""
        return {name: organ for name, organ in self.organs.items() if organ.status(guard) == "lost"}

    @property
    def judged_by(self) -> str:
        """In words, what the organs were judged by."""
        labelled = [organ.labelled for organ in self.organs.values()]
        by_agreement = not all(labelled) and self.n_scans > 0
        scans = f"agreement with the step before on {self.n_scans} new scan{'s' if self.n_scans != 1 else ''}"
        return listed((["test subjects"] if any(labelled) else []) + ([scans] if by_agreement else []))

    def to_json(self, guard: Guard) -> dict[str, Any]:
        """JSON-able, with each organ's status by these thresholds."""
        organs = {name: {"status": organ.status(guard), **asdict(organ)} for name, organ in self.organs.items()}
        return {**asdict(self), "organs": organs}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Check:
        """What `to_json` wrote, without the status, as thresholds may change."""
        organs = {
            name: Organ(**{key: value for key, value in organ.items() if key != "status"})
            for name, organ in content["organs"].items()
        }
        return cls(**{**content, "organs": organs})


def confusion(
    old: NDArray[np.integer], new: NDArray[np.integer], labels: NDArray[np.integer], n_old: int, n_classes: int
) -> NDArray[np.int64]:
    """(n_old, n_classes) voxels by what the old model calls them and what the new one does.

    What the step's own labels call a new class is left out: there the new model knows better.

    Args:
        old: (*S) decisions of the old model, below ``n_old``.
        new: (*S) decisions of the new model, below ``n_classes``.
        labels: (*S) the step's own labels.
    """
    counted = (labels < n_old) | (labels >= n_classes)
    pairs = old[counted].astype(np.int64) * n_classes + new[counted]
    return np.bincount(pairs, minlength=n_old * n_classes).reshape(n_old, n_classes)


def agreement(voxels: NDArray[np.integer]) -> NDArray[np.float64]:
    """(n_old - 1,) Dice between what both models find of each old organ, all scans taken together.

    NaN where the old model finds fewer than ``FOUND_FROM`` voxels of it: the scans do not show it.

    Args:
        voxels: of `confusion`, summed over scans.
    """
    both, old, new = np.diag(voxels), voxels.sum(1), voxels.sum(0)[: len(voxels)]
    dice = np.divide(2 * both, old + new, out=np.full(len(voxels), np.nan), where=old >= FOUND_FROM)
    return dice[1:]


def checks_of(content: Mapping[str, Any]) -> dict[str, Check]:
    """Content of ``guard.json`` by place: ``PLANS/stepT_fold_F``, as in the chain's ``predictions``."""
    return {place: Check.from_json(entry) for place, entry in content.items()}


def read_checks(chain: Chain) -> dict[str, Check]:
    """What the guard has seen in a chain, see `checks_of`.

    Raises:
        ValueError: the file is damaged.
    """
    path = chain.folder / GUARD_FILE
    expected = "what the guard against forgetting wrote there. Remove it: `nnunet-cil run` compares the steps anew"
    try:
        return checks_of(read_json(path, expected)) if path.is_file() else {}
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: got no record of steps ({error!r}), expected {expected}.") from error


def place_of(chain: Chain, variant: Variant, step: int | str, fold: int | str) -> str:
    """Where the check of a step stands in ``guard.json``."""
    folder = evaluation_file(chain, variant, step, fold).parent
    return folder.relative_to(chain.folder / "predictions").as_posix()


def stops(chain: Chain, check: Check) -> bool:
    """Whether no step may be trained on this one: of a comparison's other methods it is expected that they forget."""
    guard = chain.schedule.guard
    return guard.on_forgetting == "stop" and check.method == chain.default_method and bool(check.lost(guard))


def check_step(chain: Chain, variant: Variant, step: int | str, fold: int | str, device: torch.device) -> Check | None:
    """Compare a finished step with the step before, say what became of each old organ and write it to ``guard.json``.

    What is known of the same two models is not measured again, nor said.

    Args:
        step: whose model is scored, if there is a test set.
        device: for predictions, where test subjects do not have all old organs labelled.

    Returns:
        None for step 1 and for joint, which have no step before, and where the step before is not there any more.
    """
    if step in (1, JOINT) or not chain.trained(variant, int(step) - 1, fold):
        return None
    known, place = read_checks(chain), place_of(chain, variant, step, fold)
    folds = [chain.model_folder(variant, number) / f"fold_{fold}" for number in (int(step) - 1, int(step))]
    hashes = tuple(sha256_of(folder / CHECKPOINT) for folder in folds)
    before = known.get(place)
    if before is not None and (before.teacher_sha256, before.checkpoint_sha256) != hashes:
        before = None
    names = chain.schedule.classes_until(int(step) - 1)
    dice = np.full((2, len(names)), np.nan)
    if chain.schedule.test:
        dice = score_matrix(chain, variant, fold)[int(step) - 2 : int(step), : len(names)]
    agreements, n_scans = np.full(len(names), np.nan), 0
    if before is not None and before.n_scans:
        agreements, n_scans = [organ.agreement for organ in before.organs.values()], before.n_scans
    elif np.isnan(dice).any():
        voxels, n_scans = _compared_on_new_scans(chain, variant, int(step), fold, device)
        agreements = agreement(voxels)
    stores = [PrototypeStore.load(path) for folder in folds if (path := folder / PROTOTYPE_FILE).is_file()]
    cosines = alignment(*stores) if len(stores) == 2 else {}
    organs = {
        name: Organ(*map(_number, (*dice[:, c], agreements[c], cosines.get(name)))) for c, name in enumerate(names)
    }
    check = Check(variant.method, variant.seed, fold, int(step), *hashes, n_scans, organs)
    guard = chain.schedule.guard
    entry = check.to_json(guard)
    if before is None or before.to_json(guard) != entry:
        for name, organ in organs.items():
            status = organ.status(guard)
            say = logger.warning if status in ("weakened", "lost") else logger.info
            say("  guard: %s: %s (%s)", name, status, organ)
    with chain.locked("guard"):
        entries = {other: found.to_json(guard) for other, found in read_checks(chain).items()}
        write_json(chain.folder / GUARD_FILE, {**entries, place: entry})
    return check


def _few_cases(folder: Path, fold: int | str) -> list[str]:
    """Some preprocessed cases of a step; validation cases of the fold where its split says which these are."""
    cases = sorted(nnunet_api.preprocessed_dataset(folder).identifiers)
    splits = json.loads((folder.parent / "splits_final.json").read_text(encoding="utf-8"))
    if fold != "all" and int(fold) < len(splits):
        cases = [case for case in cases if case in splits[int(fold)]["val"]]
    return cases[:N_SCANS]


def _number(value: float | None) -> float | None:
    return None if value is None or math.isnan(value) else float(value)


def _compared_on_new_scans(
    chain: Chain, variant: Variant, step: int, fold: int | str, device: torch.device
) -> tuple[NDArray[np.int64], int]:
    """What the step and the step before find on a few of its preprocessed scans, see `confusion`, and on how many.

    These are validation cases where the fold has some. 0 scans where the step's data were removed.
    """
    configuration = chain.schedule.configuration
    n_old, n_classes = (1 + len(chain.schedule.classes_until(number)) for number in (step - 1, step))
    total = np.zeros((n_old, n_classes), np.int64)
    if step in chain.forgotten:
        return total, 0
    folders = [chain.model_folder(variant, number) for number in (step - 1, step)]
    models = [load_teacher(folder, fold, CHECKPOINT, device) for folder in folders]
    windows = [nnunet_api.SlidingWindow(m.network, m.plans, configuration, m.dataset_json, device) for m in models]
    chosen = nnunet_api.plans_manager(models[1].plans).get_configuration(configuration)
    folder = chain.preprocessed(step) / chosen.data_identifier
    cases = _few_cases(folder, fold)
    dataset = nnunet_api.preprocessed_dataset(folder, cases)
    logger.info("guard: comparing step %d with the step before on %d new scans", step, len(cases))
    for case in cases:
        image, labels = dataset.load_case(case)[:2]
        old, new = (window.logits(image).argmax(0).numpy() for window in windows)
        total += confusion(old, new, np.asarray(labels[0]), n_old, n_classes)
    return total, len(cases)
