"""What each step of a chain read, what is kept of it, and how a finished step's data are removed (docs/privacy.md).

Everything is taken from what lies on the disk, so it holds for whatever was trained in a chain, by hand too.
"""

from __future__ import annotations

import json
import os
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nnunet_cil import nnunet_api
from nnunet_cil.block import BLOCK_KEY
from nnunet_cil.cases import file_id, step_source
from nnunet_cil.chain import JOINT, Chain, is_finished, keeps_scans
from nnunet_cil.dataset import is_prepared, keep_source
from nnunet_cil.prototypes import PrototypeStore
from nnunet_cil.pseudo_labels import kept_cases_of
from nnunet_cil.step_files import FILES_FILE, PROTOTYPE_FILE, REPLAY_FILE, STEP_FILE, read_step_file, write_json
from nnunet_cil.untrusted import dataset_json_of

NOT_SAFE = "NOT privacy-safe"
TEXT_FILES = (".json", ".txt", ".log", ".csv", ".html", ".yaml", ".md", ".out", ".err")
PREDICTION_FOLDERS = ("validation", "predicted_next_stage", "crossval_results", "ensemble")  # begin so
_FOLD = re.compile(r"fold_(all|\d+)")

Inode = tuple[int, int]


@dataclass(frozen=True)
class Holding:
    """Files of one kind that the disk holds of a step; ``note`` says what is in them or who else has them."""

    what: str
    files: tuple[Path, ...]
    note: str = ""

    @property
    def n_bytes(self) -> int:
        """Size of all files, of links that of the link; a file of several names counts in each place."""
        return sum(path.lstat().st_size for path in self.files)


@dataclass(frozen=True)
class StepAudit:
    """One step of a chain.

    Args:
        step: number, or ``"joint"``.
        classes: that it learns.
        n_cases: training cases; None for a given model.
        names: of these cases, as far as they are still known.
        source: name of the user's dataset and how many images of its imagesTr are there, test subjects too; None for
            joint and for a given model.
        beyond: what a training read beyond the step's own cases, by model folder: the exceptions.
        kept: what stays when the data are removed.
        data: what ``forget`` removes.
        ids: text files that name cases of this step, and which.
        forgotten: whether its data were removed.
    """

    step: int | str
    classes: tuple[str, ...]
    n_cases: int | None
    names: tuple[str, ...]
    source: tuple[str, int] | None
    beyond: Mapping[str, str]
    kept: tuple[Holding, ...]
    data: tuple[Holding, ...]
    ids: Mapping[Path, tuple[str, ...]]
    forgotten: bool


def audit_chain(chain: Chain) -> list[StepAudit]:
    """All steps of a chain, and joint if it was made.

    Raises:
        ValueError: nothing is prepared yet.
    """
    if not chain.content["plans_name"]:
        raise ValueError(f"{chain.folder}: got a chain without data, expected a prepared one. Run `nnunet-cil run`.")
    names = {step: _case_names(chain, step) for step in _steps(chain)}
    holders = _holders(chain)
    return [_audit_step(chain, step, names, holders) for step in names]


def _audit_step(
    chain: Chain, step: int | str, names: Mapping[int | str, Set[str]], holders: Mapping[Inode, Set[str]]
) -> StepAudit:
    marker = read_step_file(chain.preprocessed(step)) or {}
    data = _data(chain, step)
    return StepAudit(
        step=step,
        classes=chain.schedule.classes if step == JOINT else chain.schedule.steps[int(step) - 1].classes,
        n_cases=marker.get("n_cases"),
        names=tuple(sorted(names[step])),
        source=_source(chain, step),
        beyond=_beyond(chain, step),
        kept=_kept(chain, step, {path for files in data.values() for path in files}),
        data=tuple(Holding(what, files, _shared(files, step, holders)) for what, files in data.items()),
        ids=_files_with_names(chain, step, names),
        forgotten=step in chain.forgotten,
    )


def _steps(chain: Chain) -> list[int | str]:
    """All steps, and joint if it has ever been prepared."""
    joint = [JOINT] if chain.preprocessed(JOINT).is_dir() else []
    return [*range(1, chain.n_steps + 1), *joint]


def _files(folder: Path, follow: bool = False) -> tuple[Path, ...]:
    """All files below a folder, sorted; links that lead nowhere too.

    Args:
        follow: also those behind links to folders, as of a model that was moved to another disk.
    """
    found: set[Path] = set()
    been: set[Path] = set()
    for above, folders, files in os.walk(folder, followlinks=follow):
        if (real := Path(above).resolve()) in been:  # a link that leads back
            folders.clear()
            continue
        been.add(real)
        found |= {Path(above, name) for name in files}
        if not follow:
            found |= {path for name in folders if (path := Path(above, name)).is_symlink()}
    return tuple(sorted(found))


def _case_names(chain: Chain, step: int | str) -> set[str]:
    """Training cases of a step, from its raw dataset and its splits."""
    images, splits = chain.raw(step) / "imagesTr", chain.preprocessed(step) / "splits_final.json"
    names = set()
    if images.is_dir():
        names |= set(nnunet_api.image_lists(images, dataset_json_of(chain.raw(step))["file_ending"]))
    if splits.is_file():
        folds = json.loads(splits.read_text(encoding="utf-8"))
        names |= {name for fold in folds for part in fold.values() for name in part}
    return names


def _source(chain: Chain, step: int | str) -> tuple[str, int] | None:
    """The user's own dataset behind a step, and how many of its training images are there."""
    schedule = chain.schedule
    if step == JOINT or step not in schedule.own_steps:
        return None
    if chain.source_is_gone(int(step)):
        written = schedule.raw["steps"][schedule.own_steps.index(int(step))]["dataset"]
        return str(written), 0
    folder = step_source(schedule, int(step))
    images = [path for files, _ in nnunet_api.training_cases(folder).values() for path in files]
    return folder.name, sum(path.is_file() for path in images)


def _beyond(chain: Chain, step: int | str) -> dict[str, str]:
    """Trainings that read more than the cases of their step, by model folder."""
    found = {}
    for model in _models(chain, step):
        if step == JOINT:
            found[model.name] = f"all labels of all steps at once: {NOT_SAFE}"
        kept = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(model.glob(f"fold_*/{REPLAY_FILE}"))]
        if kept:
            cases = {(name, case) for each in kept for name, listed in each["cases"].items() for case in listed}
            size = _size(sum(each["bytes"] for each in kept))
            found[model.name] = f"{len(cases)} scans of earlier steps, {size}, which replay keeps: {NOT_SAFE}"
    return found


def _models(chain: Chain, step: int | str) -> list[Path]:
    """Model folders of a step, of all methods, seeds and whoever trained there."""
    return sorted(path for path in chain.results(step).glob("*__*__*") if path.is_dir())


def _data(chain: Chain, step: int | str) -> dict[str, tuple[Path, ...]]:
    """What was made of a step's scans and labels, by kind."""
    raw, preprocessed = chain.raw(step), chain.preprocessed(step)
    apart = ("gt_segmentations", "pseudo_labels")
    folders = [path for path in sorted(preprocessed.glob("*")) if path.is_dir() and path.name not in apart]
    return {
        "raw images": _files(raw / "imagesTr"),
        "raw labels": _files(raw / "labelsTr"),
        "preprocessed": tuple(path for folder in folders for path in _files(folder)),
        "gt_segmentations": _files(preprocessed / "gt_segmentations"),
        "pseudo-labels": tuple(path for folder in _caches(chain, step) for path in _files(folder)),
        "predicted masks": tuple(_predicted_masks(chain.results(step))),
    }


def _caches(chain: Chain, step: int | str) -> Iterator[Path]:
    """Folders of pseudo-labels of a step's scans: its own, and those that replay has in later steps."""
    for holder in _steps(chain):
        for key in sorted(chain.preprocessed(holder).glob("pseudo_labels/*/key.json")):
            kept_of = json.loads(key.read_text(encoding="utf-8")).get("of")
            own = holder == step and kept_of is None
            if own or (step != JOINT and kept_of == kept_cases_of(int(step))):
                yield key.parent


def _predicted_masks(results: Path) -> Iterator[Path]:
    """Predictions of training cases that nnU-Net writes below a model; what else lies there is JSON, or one pickle."""
    for path in _files(results, follow=True):
        above = path.relative_to(results).parts[1:-1]
        predicted = any(part.startswith(PREDICTION_FOLDERS) for part in above)
        if predicted and path.suffix != ".json" and path.name != "postprocessing.pkl":
            yield path


def _kept(chain: Chain, step: int | str, data: Set[Path]) -> tuple[Holding, ...]:
    files = [path for path in _files(chain.results(step), follow=True) if path not in data]
    files += [path for path in sorted(chain.preprocessed(step).glob("*")) if path.is_file()]
    weights = tuple(path for path in files if path.suffix == ".pth")
    prototypes = tuple(path for path in files if path.name == PROTOTYPE_FILE)
    folder = step if step == JOINT else f"step{step}"
    scores = tuple(sorted(chain.folder.glob(f"predictions/*/{folder}_fold_*/scores.json")))
    rest = tuple(path for path in files if path not in {*weights, *prototypes})
    return (
        Holding("weights", weights),
        Holding("prototypes", prototypes, _shapes(prototypes)),
        Holding("scores", scores, "of test subjects" if scores else ""),
        Holding("plans, logs, ...", rest),
    )


def _shapes(prototypes: Iterable[Path]) -> str:
    shapes = dict.fromkeys(PrototypeStore.load(path).means.shape for path in prototypes)
    return "; ".join(f"{k} x {d} floats, {k} counts" for k, d in shapes)


def _holders(chain: Chain) -> dict[Inode, set[str]]:
    """Who has a file, whatever its path or name: steps, the user's datasets, the test set."""
    holders: dict[Inode, set[str]] = defaultdict(set)
    for step in _steps(chain):
        for files in _data(chain, step).values():
            _add(holders, files, _called(step))
    for step in chain.schedule.own_steps:
        folder = step_source(chain.schedule, step)
        listed = nnunet_api.training_cases(folder)
        _add(holders, [path for files, label in listed.values() for path in (*files, label)], f"your {folder.name}")
    _add(holders, _files(chain.folder / "test"), "the test set")
    return holders


def _add(holders: dict[Inode, set[str]], files: Iterable[Path], name: str) -> None:
    for path in files:
        if path.is_file():
            holders[file_id(path)].add(name)


def _called(step: int | str) -> str:
    return step if step == JOINT else f"step {step}"


def _shared(files: Sequence[Path], step: int | str, holders: Mapping[Inode, Set[str]]) -> str:
    others: dict[str, int] = defaultdict(int)
    for path in files:
        for name in holders.get(file_id(path), ()) if path.is_file() else ():
            others[name] += name != _called(step)
    return ", ".join(f"{n} also in {name}" for name, n in sorted(others.items()) if n)


def _files_with_names(
    chain: Chain, step: int | str, names: Mapping[int | str, Set[str]]
) -> dict[Path, tuple[str, ...]]:
    """Text files of the chain that name a step's cases. A name that another step has, too, counts in its own files."""
    places: list[tuple[Path, Set[str]]] = []
    for other, theirs in names.items():
        wanted = names[step] - (set() if other == step else theirs)
        places += [(folder, wanted) for folder in (chain.results(other), chain.preprocessed(other))]
    jobs = chain.folder / "jobs"  # submitit keeps there what a job raised, pickled
    test = chain.folder / "test" / "test.json"
    tested = set(json.loads(test.read_text(encoding="utf-8"))["cases"]) if test.is_file() else set()
    places.append((chain.folder, names[step] - tested))
    found = {}
    for folder, wanted in places:
        for path in _files(folder, follow=True) if wanted else ():
            is_text = path.suffix in TEXT_FILES or path.parent == jobs
            if is_text and (named := _named(path.read_text("utf-8", "replace"), wanted)):
                found[path] = named
    return found


def _named(text: str, names: Iterable[str]) -> tuple[str, ...]:
    """Names that stand in a text as whole words, also as JSON writes them; ``_0000`` may follow."""
    return tuple(
        name
        for name in sorted(names)
        if any(
            spelt in text and re.search(rf"(?<![A-Za-z0-9]){re.escape(spelt)}(?![A-Za-z0-9])", text)
            for spelt in {name, json.dumps(name)[1:-1]}
        )
    )


@dataclass(frozen=True)
class Forgetting:
    """What the removal of steps' data takes away.

    Args:
        data: by step.
        lost: trainings that were prepared and need these data, but were never done.
    """

    data: Mapping[int | str, tuple[Holding, ...]]
    lost: tuple[str, ...]


def check_forget(chain: Chain, steps: Sequence[int | str]) -> Forgetting:
    """What ``forget`` would remove; nothing is changed.

    Args:
        steps: numbers, or ``"joint"``. One whose data are removed already may be named again.

    Raises:
        ValueError: listing every reason against it: no such step, one that is not prepared or not trained to its end.
        FileExistsError: a folder is not of this chain.
    """
    found = {each.step: each for each in audit_chain(chain)}
    possible = [step for step in found if step == JOINT or step in chain.schedule.own_steps]
    problems = [f"--forget: got {step!r}, expected some of {possible}." for step in steps if step not in possible]
    known = [step for step in dict.fromkeys(steps) if step in possible and step not in chain.forgotten]
    if known:
        problems += [
            f"step {step}: got data that are not prepared, expected all steps' before any are removed, as they may be "
            "derived from these. Run `nnunet-cil prepare` first."
            for step in chain.schedule.own_steps
            if step not in chain.forgotten and not is_prepared(chain, step)
        ]
    lost = []
    for step in known:
        for folder in (chain.raw(step), chain.preprocessed(step)):
            chain.check_not_foreign(folder)
        own, readers = _models(chain, step), list(_readers(chain, step))
        if not own:
            problems.append(f"{_called(step)}: got no training, expected a finished one before its data are removed.")
        problems += [
            f"{fold}: got a training that has not ended, expected it to. Run the chain, or remove this folder's model."
            for model in dict.fromkeys([*own, *(model for _, models in readers for model in models)])
            for fold in _folds(chain, model)
            if not is_finished(fold)
        ]
        lost += [name for name, models in readers if not models]
    if problems:
        raise ValueError("\n".join(["nothing was removed:", *problems]))
    return Forgetting({step: found[step].data for step in dict.fromkeys(steps)}, tuple(dict.fromkeys(lost)))


def _folds(chain: Chain, model: Path) -> list[Path]:
    """Fold folders of a model: those that the schedule names, and any other that is there."""
    there = [path for path in sorted(model.iterdir()) if _FOLD.fullmatch(path.name)]
    return list(dict.fromkeys([*(model / f"fold_{fold}" for fold in chain.schedule.folds), *there]))


def _readers(chain: Chain, step: int | str) -> Iterator[tuple[str, list[Path]]]:
    """Prepared variants that need a step's data, with their models: its own, replay of later steps, joint of any."""
    for other in _steps(chain):
        for block, name in _prepared_plans(chain, other):
            replays = JOINT not in (step, other) and int(other) > int(step) and keeps_scans(block["method"])
            joins = other == JOINT and chain.schedule.source is None
            if other == step or replays or joins:
                models = [model for model in _models(chain, other) if model.name.split("__")[1] == name]
                yield f"{block['method']}, seed {block['training']['seed']}, {_called(other)}", models


def _prepared_plans(chain: Chain, step: int | str) -> Iterator[tuple[dict[str, Any], str]]:
    """Block and name of each plans file of a step."""
    for path in sorted(chain.preprocessed(step).glob("*.json")):
        content = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(content, dict) and BLOCK_KEY in content:
            yield content[BLOCK_KEY], content["plans_name"]


def forget(chain: Chain, steps: Sequence[int | str]) -> None:
    """Remove the data of finished steps; models, prototypes, plans, scores and logs stay, and the chain goes on.

    What is removed are the chain's own files, named in ``StepAudit.data``. Of hard links only the step's own names go.
    The user's datasets are not touched. Interrupted, the same call goes on.

    Raises:
        ValueError, FileExistsError: as ``check_forget``.
    """
    found = check_forget(chain, steps)
    for step in found.data:
        if step != JOINT:
            keep_source(chain, int(step))
    chain.content["forgotten"] = list(dict.fromkeys([*chain.forgotten, *found.data]))
    chain.save()
    for step, holdings in found.data.items():
        marker = read_step_file(chain.preprocessed(step)) or {}
        kept = {key: value for key, value in marker.items() if key in ("chain", "step", "n_cases")}
        emptied = {**kept, "complete": [], "configurations": [], "forgotten": True}
        write_json(chain.preprocessed(step) / STEP_FILE, emptied)
        for path in [path for holding in holdings for path in holding.files]:
            path.unlink()
        for name in ("dataset.json", FILES_FILE, STEP_FILE):
            (chain.raw(step) / name).unlink(missing_ok=True)
        for holder in _steps(chain):  # replay has pseudo-labels of this step's scans in later steps
            _remove_empty_folders(chain.preprocessed(holder))
        for folder in (chain.raw(step), *_models(chain, step)):
            _remove_empty_folders(folder)


def _remove_empty_folders(root: Path) -> None:
    for folder in sorted([root, *root.rglob("*")], reverse=True):
        if folder.is_dir() and not folder.is_symlink() and not any(folder.iterdir()):
            folder.rmdir()


def audit_text(chain: Chain, found: Sequence[StepAudit], with_names: bool = False) -> str:
    """An audit as lines to read; case names only where they are asked for."""
    schedule = chain.schedule
    lines = [f"chain {schedule.name} in {chain.folder}: all methods and seeds that are there"]
    if schedule.source is not None:
        lines += [
            f"{schedule.source.name} is cut up: `prepare` reads all its images and labels at once. A simulation, "
            f"{NOT_SAFE}."
        ]
    for step in found:
        lines += ["", *_step_lines(chain, step, with_names)]
    test = Holding("test", _files(chain.folder / "test"))
    masks = Holding("predictions", tuple(p for p in _files(chain.folder / "predictions") if p.suffix != ".json"))
    lines += ["", "test set, which all steps are scored on and which stays", *_holding_lines([test, masks])]
    return "\n".join(lines)


def _step_lines(chain: Chain, step: StepAudit, with_names: bool) -> list[str]:
    title = JOINT if step.step == JOINT else f"step {step.step} of {chain.n_steps}"
    title += f": {', '.join(step.classes)}; {chain.dataset_name(step.step)}"
    if step.n_cases is None:
        return [f"{title}, a given model, whose data were never here", *_holding_lines(step.kept)]
    lines = [title + ("; DATA REMOVED" if step.forgotten else "")]
    lines += [f"  read in training: {step.n_cases} cases of this step, with the labels of this step"]
    lines += [f"    {model}: {what}" for model, what in step.beyond.items()]
    if step.source is not None:
        name, n_images = step.source
        where = f"{n_images} images in its imagesTr, which nnunet-cil never removes" if n_images else "gone"
        lines += [f"  they come from your {name}: {where}"]
    if with_names:
        lines += [f"  cases: {', '.join(step.names)}"]
    lines += ["  kept for good:", *_holding_lines(step.kept), "  data:", *_holding_lines(step.data)]
    if not step.names:
        return [*lines, "  names of cases: not known any more, so not searched for"]
    lines += ["  files that name cases:" + ("" if step.ids else " none")]
    return lines + [
        f"    {_below_root(chain, path)}: {', '.join(named) if with_names else len(named)}"
        for path, named in step.ids.items()
    ]


def _below_root(chain: Chain, path: Path) -> str:
    for name, root in chain.paths.items():
        if path.is_relative_to(root):
            return f"{name}/{path.relative_to(root).as_posix()}"
    return str(path)


def _holding_lines(holdings: Iterable[Holding]) -> list[str]:
    lines = []
    for holding in holdings:
        amount = f"{len(holding.files):6d} files {_size(holding.n_bytes):>10s}" if holding.files else "  none"
        lines.append(f"    {holding.what:16s} {amount}   {holding.note}".rstrip())
    return lines


def forgetting_text(found: Forgetting) -> str:
    """What is about to be removed, as lines to read."""
    lines = []
    for step, holdings in found.data.items():
        lines += [f"to be removed of {_called(step)}:", *_holding_lines(holdings)]
    if found.lost:
        lines += ["never trained, and then never to be:", *(f"    {name}" for name in found.lost)]
    return "\n".join(lines)


def _size(n_bytes: float) -> str:
    for unit in ("B", "kB", "MB"):
        if n_bytes < 1000:
            return f"{n_bytes:.0f} B" if unit == "B" else f"{n_bytes:.1f} {unit}"
        n_bytes /= 1000
    return f"{n_bytes:.1f} GB"
