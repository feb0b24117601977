"""A step's nnU-Net dataset: linked images, relabelled labels, plans, and preprocessed data.

``prepare_chain`` turns a schedule into ``DatasetNNN_NAME_stepT`` folders in nnUNet_raw and nnUNet_preprocessed.
"""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from nnunet_cil import nnunet_api
from nnunet_cil.block import BLOCK_KEY, StepBlock
from nnunet_cil.cases import Case, final_labels, first_source, held_out_cases, joint_cases, step_cases, step_source
from nnunet_cil.chain import JOINT, Chain, Variant
from nnunet_cil.checkpoint import read_checkpoint
from nnunet_cil.intensity import set_intensity, warn_of_clipping
from nnunet_cil.labels import apply_remap, cumulative_labels
from nnunet_cil.parallel import over_cases
from nnunet_cil.plan_override import apply_override
from nnunet_cil.schedule import Schedule, kept_source
from nnunet_cil.source_check import (
    Scan,
    check_sources,
    check_test_set,
    scan_test_set,
    tell_of_labels,
    voxels_of,
    warn_of_axes,
)
from nnunet_cil.step_files import FILES_FILE, STEP_FILE, count_whole_cases, read_step_file, whole_folder, write_json
from nnunet_cil.teacher import inherited_from, sha256_of
from nnunet_cil.untrusted import dataset_json_of, read_json

logger = logging.getLogger(__name__)

CASES_TO_LOOK_AT, CASES_OF_A_RARE_CLASS = 12, 3


def _install_model(chain: Chain) -> None:
    """Copy a given model to where step 1 of a chain has its own, and note what later steps inherit."""
    model = chain.schedule.model
    if model is None:
        return
    target = chain.model_folder(chain.first_step(None), 1)
    if not target.exists():
        model.install(target, chain.schedule.folds, check=partial(_check_given, chain.schedule))
    if "network_of" not in chain.content:
        chain.content |= inherited_from(target, chain.schedule.folds[0])
    chain.content["plans_name"] = model.plans["plans_name"]
    chain.save()


def _check_given(schedule: Schedule, checkpoint: Path) -> None:
    """Refuse a model that cannot be read or cannot teach, and ``mirror_axes`` that it had no mirrored images of."""
    known = read_checkpoint(checkpoint).get("inference_allowed_mirroring_axes")
    known = list(known) if isinstance(known, (list, tuple)) else []
    if others := [axis for axis in schedule.mirror_axes or () if axis not in known]:
        raise ValueError(
            f"{schedule.file}: mirror_axes: got {others}, expected some of {known}, along which the given model was "
            "trained on mirrored images: along others it cannot teach. Leave these out."
        )
    inherited_from(checkpoint.parents[1], checkpoint.parent.name.removeprefix("fold_"))


def _write_case(case: Case, name: str, images: Path, labels: Path, ending: str, reader: Any) -> None:
    """Link a case's images and write its labels in the new values; both have the spacing of the images."""
    for channel, image in enumerate(case.images):
        nnunet_api.link_or_copy(image, images / f"{name}_{channel:04d}{ending}", symbolic=True)
    seg, properties = reader.read_seg(str(case.label))
    label = labels / f"{name}{ending}"
    reader.write_seg(apply_remap(seg[0], case.table), str(label), properties)
    if (spacing := nnunet_api.spacing_file(case.images[0])) is not None:
        for folder in (images, labels):
            shutil.copyfile(spacing, folder / f"{name}.json")
    nnunet_api.check_written(label, reader)


def _relink(images: Path, cases: Mapping[str, Case], ending: str) -> None:
    """Lead links whose images were moved, or whose chain was copied elsewhere, to where the schedule finds them now."""
    for name, case in cases.items() if images.is_dir() else ():
        for channel, image in enumerate(case.images):
            link = images / f"{name}_{channel:04d}{ending}"
            if link.is_symlink() and not link.exists() and image.is_file():
                anew = link.with_name(f".{link.name}.part")
                anew.unlink(missing_ok=True)
                nnunet_api.link_or_copy(image, anew, symbolic=True)
                os.replace(anew, link)


def write_raw(chain: Chain, step: int | str, cases: Sequence[Case], labels: Mapping[str, int], source: Path) -> None:
    """Write a step's raw dataset: linked images, relabelled labels; whole or not at all. An existing one is kept."""
    folder = chain.raw(step)
    chain.check_not_foreign(folder)
    if folder.exists():
        return
    own = dataset_json_of(source)
    ending = own["file_ending"]
    reader = nnunet_api.reader_writer(own, cases[0].images[0])
    kept = {key: own[key] for key in ("channel_names", "file_ending", "overwrite_image_reader_writer") if key in own}
    with whole_folder(folder) as partial:
        for name in ("imagesTr", "labelsTr"):
            (partial / name).mkdir()
        for case in cases:
            _write_case(case, case.name, partial / "imagesTr", partial / "labelsTr", ending, reader)
        write_json(partial / "dataset.json", {**kept, "labels": dict(labels), "numTraining": len(cases)})
        write_json(partial / FILES_FILE, {case.name: [*_state(case.label), sha256_of(case.label)] for case in cases})
        write_json(partial / STEP_FILE, {"chain": chain.schedule.name, "step": step, "n_cases": len(cases)})
    logger.info("%s: %d cases, labels %s", folder.name, len(cases), dict(labels))


def write_test_set(chain: Chain, tested: Mapping[str, Scan] | None = None) -> None:
    """Link the test images and relabel their labels to the final numbers, in the chain's ``test`` folder.

    What is there of the same images and labels stays.

    Args:
        tested: what `scan_test_set` found; None: that is done here.

    Raises:
        ValueError: images or labels are damaged, do not fit each other, or have unknown labels.
    """
    folder = chain.folder / "test"
    schedule = chain.schedule
    if not schedule.test:
        return
    own, cases = dataset_json_of(first_source(schedule)), held_out_cases(schedule)
    ending = own["file_ending"]
    _relink(folder / "images", {name: case for name, (_, case) in cases.items()}, ending)
    if test_set_is_written(chain):
        return
    tested = tested or scan_test_set(schedule)
    check_test_set(schedule, tested)
    for test in schedule.test:
        if test.dataset and (theirs := dataset_json_of(test.dataset)["channel_names"]) != own["channel_names"]:
            logger.warning(
                "%s: channel_names: got %s, expected %s as in the training data: the test images are normalised as "
                "these. If they are of another kind, say so beside the scores.",
                test.dataset / "dataset.json",
                theirs,
                own["channel_names"],
            )
    ignore = final_labels(schedule, chain.n_steps, {"ignore": None})["ignore"]
    listing = {name: {**entry, "sha256": tested[name].digest} for name, entry in _listing(cases).items()}
    content = {"test": schedule.to_dict()["test"], "ignore": ignore, "file_ending": ending, "cases": listing}
    if _test_json(chain) == json.loads(json.dumps(content)):
        write_json(folder / FILES_FILE, _file_states(cases))
        return
    with whole_folder(folder) as partial:
        for name in ("images", "labels"):
            (partial / name).mkdir()
        for name, (_, case) in cases.items():
            reader = nnunet_api.reader_writer(own, case.images[0])
            _write_case(case, name, partial / "images", partial / "labels", ending, reader)
        write_json(partial / "test.json", content)
        write_json(partial / FILES_FILE, _file_states(cases))
        shutil.rmtree(folder, ignore_errors=True)
    logger.info("test set: %d subjects", len(cases))


def _listing(cases: Mapping[str, tuple[int, Case]]) -> dict[str, Any]:
    return {name: {"labelled": list(case.labelled), "set": number} for name, (number, case) in cases.items()}


def _file_states(cases: Mapping[str, tuple[int, Case]]) -> dict[str, list[list[int]]]:
    """Size and time of change of each subject's label and images, by which a change is noticed without reading them."""
    files = {
        name: (case.label, *case.images, nnunet_api.spacing_file(case.images[0])) for name, (_, case) in cases.items()
    }
    return {name: [_state(path) for path in filter(None, found)] for name, found in files.items()}


def _state(path: Path) -> list[int]:
    state = path.stat()
    return [state.st_size, state.st_mtime_ns]


def _test_json(chain: Chain) -> dict[str, Any]:
    path = chain.folder / "test" / "test.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def test_set_is_written(chain: Chain) -> bool:
    """Whether the chain's ``test`` folder holds what the schedule names now, of files that have not changed since.

    True where it names nothing.
    """
    written, states = _test_json(chain), chain.folder / "test" / FILES_FILE
    if not chain.schedule.test or not written or not states.is_file():
        return not chain.schedule.test
    cases = held_out_cases(chain.schedule)
    listed = {name: {key: entry[key] for key in ("labelled", "set")} for name, entry in written["cases"].items()}
    return (
        written["test"] == json.loads(json.dumps(chain.schedule.to_dict()["test"]))
        and listed == _listing(cases)
        and json.loads(states.read_text(encoding="utf-8")) == _file_states(cases)
    )


def prepare_chain(chain: Chain, variants: Sequence[Variant]) -> None:
    """Make all datasets, plans and preprocessed data of a chain; what is there and whole is kept.

    Raises:
        ValueError: the data do not fit the schedule (nothing was written), or the plan cannot be made.
        FileExistsError: a dataset of somebody else is in the way.
    """
    schedule = chain.schedule
    chain.discard_abandoned()
    with_joint = any(variant.method == JOINT for variant in variants) and _joint_has_data(chain)
    wanted: list[int | str] = [*schedule.own_steps, *([JOINT] if with_joint else [])]
    steps = [step for step in wanted if step not in chain.forgotten]
    for step in steps:
        for folder in (chain.raw(step), chain.preprocessed(step)):
            chain.check_not_foreign(folder)
    _check_sources_are_there(chain, steps)
    _check_test_of_forgotten(chain)
    cases = {step: joint_cases(schedule) if step == JOINT else step_cases(schedule, int(step)) for step in steps}
    ending = dataset_json_of(first_source(schedule))["file_ending"]
    for step in steps:
        _check_same_cases(chain, step, cases[step])
        _relink(chain.raw(step) / "imagesTr", {case.name: case for case in cases[step]}, ending)
    _warn_of_mended_labels(chain, cases)
    tested = {} if test_set_is_written(chain) else scan_test_set(schedule)
    if not all(is_prepared(chain, step) for step in steps):
        if schedule.source is not None:
            logger.info("%s is cut up: all its labels are read, as only a simulation can", schedule.source.name)
        if JOINT in steps:
            logger.info("joint keeps the scans and labels of all steps, which is not privacy-safe")
        scans = check_sources(schedule, cases, tested)
        tell_of_labels(schedule, cases, scans)
        warn_of_axes(schedule, scans, tested)
        chain.claim_numbers()
        _install_model(chain)
        write_test_set(chain, tested)
        for step in steps:
            number = chain.n_steps if step == JOINT else int(step)
            source = first_source(schedule) if step == JOINT else step_source(schedule, number)
            sources = [step_source(schedule, t) for t in (schedule.own_steps if step == JOINT else [number])]
            own = {name: None for folder in sources for name in dataset_json_of(folder)["labels"]}
            labels = final_labels(schedule, number, own)
            write_raw(chain, step, cases[step], labels, source)
            if not is_prepared(chain, step):
                _plan(chain, step, cases[step], scans)
                if step == schedule.own_steps[0]:
                    _warn_of_clipping(chain, cases, scans)
                _preprocess(chain, step, cases[step], scans)
    _install_model(chain)
    write_test_set(chain, tested)
    for step in schedule.own_steps:
        keep_source(chain, step)
    for variant in variants:
        write_variant_plans(chain, variant)
    chain.save()


def keep_source(chain: Chain, step: int) -> None:
    """Keep the labels' names of a step's own dataset, without which no schedule loads, so that the dataset may go."""
    source = chain.schedule.steps[step - 1].dataset
    if source is None or chain.source_is_gone(step):
        return
    own = dataset_json_of(source)
    names = ("channel_names", "labels", "file_ending", "overwrite_image_reader_writer")
    kept = kept_source(chain.folder, step)
    write_json(kept / "dataset.json", {**{key: own[key] for key in names if key in own}, "dataset": {}})


def _joint_has_data(chain: Chain) -> bool:
    return chain.schedule.source is not None or not chain.forgotten


def _check_sources_are_there(chain: Chain, steps: Sequence[int | str]) -> None:
    for step in steps:
        if step != JOINT and chain.source_is_gone(int(step)):
            raise ValueError(
                f"{chain.schedule.file}: step {step}: got a dataset that is gone, expected its images and labels. If "
                "that is on purpose, remove what the chain has of them, too: "
                f"`nnunet-cil audit {chain.schedule.file} --forget {step}`."
            )


def _check_test_of_forgotten(chain: Chain) -> None:
    """Refuse to score on what a removed step was trained on: by name, as its files cannot be compared any more."""
    schedule = chain.schedule
    for step in [step for step in chain.forgotten if step != JOINT]:
        path = chain.preprocessed(step) / "splits_final.json"
        images = step_source(schedule, int(step)) / "imagesTr"
        if not path.is_file() or all(test.images != images for test in schedule.test):
            continue
        folds = json.loads(path.read_text(encoding="utf-8"))
        trained = {name for fold in folds for part in fold.values() for name in part}
        ending = dataset_json_of(images.parent)["file_ending"]
        tested = [case for number, case in held_out_cases(schedule).values() if schedule.test[number].images == images]
        if again := sorted({case.label.name.removesuffix(ending) for case in tested} & trained):
            raise ValueError(
                f"{schedule.file}: test: got {again}, which step {step} was trained on, expected other subjects."
            )


def _check_same_cases(chain: Chain, step: int | str, cases: Sequence[Case]) -> None:
    """Refuse a test set or source that would change which subjects an existing step dataset trains on."""
    folder = chain.raw(step)
    if not folder.is_dir():
        return
    ending = dataset_json_of(folder)["file_ending"]
    before = {path.name.removesuffix(ending) for path in (folder / "labelsTr").glob(f"*{ending}")}
    now = {case.name for case in cases}
    if before != now:
        raise ValueError(
            f"{folder}: got a dataset that trains on {sorted(before - now)} and not on {sorted(now - before)}, "
            "expected the subjects that the schedule names now. Was the test set changed, or a subject added? Give the "
            "schedule another name: what was trained on a subject must not be scored on it."
        )


def _warn_of_mended_labels(chain: Chain, cases: Mapping[int | str, Sequence[Case]]) -> None:
    """Tell of labels that changed after they were copied for steps that no training has learned from yet."""
    untrained = [step for step in cases if chain.raw(step).is_dir() and not chain.results(step).is_dir()]
    mended: dict[int | str, list[str]] = {}
    for step in untrained:
        copied_from = chain.raw(step) / FILES_FILE
        copied = read_json(copied_from, "what nnunet-cil wrote there: remove it") if copied_from.is_file() else {}
        for case in cases[step]:
            *state, digest = copied.get(case.name, (None,))
            if digest and state != _state(case.label) and digest != sha256_of(case.label):
                mended.setdefault(step, []).append(case.label.name)
    if mended:
        # what is planned for a step is planned for all after it
        stale = [step for step in untrained if step == JOINT or any(JOINT != first <= step for first in mended)]
        logger.warning(
            "%s: got labels that have changed since the chain copied them: %s. The next trainings learn from them as "
            "they were. To have the new ones, remove these folders and give the same command again:\n  %s",
            chain.schedule.file,
            "; ".join(f"step {step}: {', '.join(names)}" for step, names in mended.items()),
            "\n  ".join(str(folder) for step in stale for folder in (chain.raw(step), chain.preprocessed(step))),
        )


def is_prepared(chain: Chain, step: int | str) -> bool:
    """Whether a step's raw and preprocessed data are there and whole."""
    marker = read_step_file(chain.preprocessed(step)) if chain.raw(step).is_dir() else None
    return (
        marker is not None
        and chain.schedule.configuration in marker.get("configurations", ())
        and all(
            count_whole_cases(chain.preprocessed(step) / identifier) == marker["n_cases"]
            for identifier in marker["complete"]
        )
    )


def base_plans(chain: Chain) -> dict[str, Any]:
    """Plans of step 1, which all steps share, without block."""
    if chain.schedule.model is not None:
        return {key: value for key, value in chain.schedule.model.plans.items() if key != BLOCK_KEY}
    path = chain.preprocessed(1) / f"{chain.content['plans_name']}.json"
    return {key: value for key, value in json.loads(path.read_text(encoding="utf-8")).items() if key != BLOCK_KEY}


def _plan(chain: Chain, step: int | str, cases: Sequence[Case], scans: Mapping[Path, Scan]) -> None:
    """Fingerprint, splits, dataset.json and plans of one step, in its preprocessed folder."""
    folder = chain.preprocessed(step)
    folder.mkdir(parents=True, exist_ok=True)
    marker = {"chain": chain.schedule.name, "step": step, "n_cases": len(cases), "complete": [], "configurations": []}
    write_json(folder / STEP_FILE, {**marker, **_labelled_by_case(chain.schedule, step, cases)})
    shutil.copyfile(chain.raw(step) / "dataset.json", folder / "dataset.json")
    found = [scans[case.label] for case in cases]
    nnunet_api.write_fingerprint(
        folder / "dataset_fingerprint.json", [scan.crop for scan in found], [scan.intensities[step] for scan in found]
    )
    write_json(folder / "splits_final.json", nnunet_api.crossval_splits([case.name for case in cases]))
    if step == 1:
        _plan_first_step(chain)
    else:
        plans = {**base_plans(chain), "dataset_name": chain.dataset_name(step)}
        write_json(folder / f"{chain.content['plans_name']}.json", plans)


def _labelled_by_case(schedule: Schedule, step: int | str, cases: Sequence[Case]) -> dict[str, Any]:
    """Entry of the step file: values that are labelled, by case; none if these are the new classes' everywhere."""
    new = schedule.classes if step == JOINT else schedule.steps[int(step) - 1].classes
    labels = cumulative_labels([s.classes for s in schedule.steps], len(schedule.steps))
    usual = tuple(labels[name] for name in new)
    if all(case.labelled == usual for case in cases):
        return {}
    return {"labelled": {case.name: list(case.labelled) for case in cases}}


def _plan_first_step(chain: Chain) -> None:
    schedule, folder = chain.schedule, chain.preprocessed(1)
    if schedule.base_plans is not None:
        plans = read_json(schedule.base_plans, "a plans.json of nnU-Net")
        plans["dataset_name"] = chain.dataset_name(1)
        name = plans["plans_name"]
    else:
        name = nnunet_api.plan(chain.dataset_id(1), schedule.planner)
        plans = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
    if schedule.configuration not in plans["configurations"]:
        raise ValueError(
            f"{schedule.file}: configuration: got {schedule.configuration!r}, expected one that nnU-Net planned for "
            f"this data: {sorted(plans['configurations'])}."
        )
    nnunet_api.check_architecture(plans, schedule.configuration)
    plans.pop(BLOCK_KEY, None)
    plans = apply_override(plans, schedule.configuration, schedule.plans)
    plans = set_intensity(plans, schedule.intensity, chain.raw(1))
    write_json(folder / f"{name}.json", plans)
    chain.content["plans_name"] = name
    chain.save()


def _warn_of_clipping(chain: Chain, cases: Mapping[int | str, Sequence[Case]], scans: Mapping[Path, Scan]) -> None:
    for step in [step for step in chain.schedule.own_steps if step in cases]:
        labels = cumulative_labels([s.classes for s in chain.schedule.steps], step)
        names = {labels[name]: name for name in chain.schedule.steps[step - 1].classes}
        own = dataset_json_of(step_source(chain.schedule, step))
        some = _that_show(names, cases[step], scans)
        warn_of_clipping(base_plans(chain), chain.schedule.configuration, own, some, names, step)


def _that_show(values: Iterable[int], cases: Sequence[Case], scans: Mapping[Path, Scan]) -> list[Case]:
    """The first cases of a step, and of each class that none of them shows the first that do."""
    chosen = list(cases[:CASES_TO_LOOK_AT])
    for value in values:
        showing = [case for case in cases if voxels_of(case, scans[case.label])[value]]
        if not any(case in chosen for case in showing):
            chosen += showing[:CASES_OF_A_RARE_CLASS]
    return chosen


def _preprocess(chain: Chain, step: int | str, cases: Sequence[Case], scans: Mapping[Path, Scan]) -> None:
    """Bring a step's cases to the grid of the plans; an image that another step has there already is linked."""
    configuration, plans = chain.schedule.configuration, base_plans(chain)
    identifier = nnunet_api.plans_manager(plans).get_configuration(configuration).data_identifier
    folder = chain.preprocessed(step) / identifier
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    labels = chain.preprocessed(step) / "gt_segmentations"
    shutil.rmtree(labels, ignore_errors=True)
    labels.mkdir()
    dataset_json = dataset_json_of(chain.raw(step))
    can_derive = nnunet_api.can_derive(plans, configuration, dataset_json, cases[0].images[0])
    donors = _donors(chain, step, identifier) if can_derive else {}
    derive, anew = [], []
    for case in cases:
        label = chain.raw(step) / "labelsTr" / f"{case.name}{dataset_json['file_ending']}"
        for file in filter(None, (label, nnunet_api.spacing_file(label, is_label=True))):
            nnunet_api.link_or_copy(file, labels / file.name)
        common = (folder / case.name, plans, configuration, dataset_json)
        if case.name in donors:
            derive.append((donors[case.name] / case.name, label, scans[case.label].crop, *common))
        else:
            anew.append((case.images, label, *common))
    what = f"preprocessing {chain.dataset_name(step)}"
    n_voxels = sum(math.prod(scans[case.label].crop.shape) for case in cases)
    over_cases(nnunet_api.preprocess_case, anew, 4 * n_voxels, what)
    over_cases(nnunet_api.derive_case, derive, n_voxels, what)
    marker = read_step_file(chain.preprocessed(step)) or {}
    marker["complete"] = sorted({*marker["complete"], identifier})
    marker["configurations"] = sorted({*marker["configurations"], configuration})
    write_json(chain.preprocessed(step) / STEP_FILE, marker)


def _donors(chain: Chain, step: int | str, identifier: str) -> dict[str, Path]:
    """Preprocessed folder of an earlier, finished step by case; only where equal names mean equal images."""
    if chain.schedule.source is None:
        return {}
    earlier = [other for other in chain.schedule.own_steps if step == JOINT or other < int(step)]
    finished = [other for other in earlier if is_prepared(chain, other)]
    return {
        path.name.removesuffix(".pkl"): path.parent
        for other in finished
        for path in (chain.preprocessed(other) / identifier).glob("*.pkl")
    }


def write_variant_plans(chain: Chain, variant: Variant) -> None:
    """Plans with the ``"cil"`` block for each step of a variant, written anew at each call."""
    steps: Sequence[int | str] = [JOINT] if variant.method == JOINT else chain.schedule.own_steps
    check_same_settings(chain, [variant])
    for step in steps:
        owner = chain.owner(variant, step)
        name = chain.plans_name(owner)
        plans = {**base_plans(chain), "dataset_name": chain.dataset_name(step), "plans_name": name}
        plans[BLOCK_KEY] = block_of(chain, owner, step).to_json()
        write_json(chain.preprocessed(step) / f"{name}.json", plans)


def check_same_settings(chain: Chain, variants: Sequence[Variant]) -> None:
    """Refuse settings that differ from those of a training which was begun: nothing of it may be shown under them.

    Raises:
        ValueError: some do.
    """
    for variant in variants:
        for step in [JOINT] if variant.method == JOINT else chain.schedule.own_steps:
            _check_same_settings(chain, variant, step)


def _check_same_settings(chain: Chain, variant: Variant, step: int | str) -> None:
    """As `check_same_settings`, of one step.

    nnU-Net writes plans and dataset.json in place at each start of a training: half ones are nothing to compare with.
    """
    owner = chain.owner(variant, step)
    path = chain.model_folder(variant, step) / "plans.json"
    try:
        plans, dataset_json = read_json(path, "plans of nnU-Net"), dataset_json_of(path.parent)
        before = StepBlock.from_plans(plans, dataset_json).settings
    except nnunet_api.UNREADABLE:
        return
    now = block_of(chain, owner, step).settings
    if differing := [f"{k}: {before.get(k)} then, {now.get(k)} now" for k in now if before.get(k) != now.get(k)]:
        raise ValueError(
            f"{chain.schedule.file}: variants: {variant.method}: got other settings than {path.parent} was trained "
            f"with, expected the same:\n  " + "\n  ".join(differing) + "\nGive the variant another name."
        )


def block_of(chain: Chain, variant: Variant, step: int | str) -> StepBlock:
    """The block of a variant's step. Joint has one step, that learns all classes for as long as all steps together."""
    schedule = chain.schedule
    training = replace(schedule.training, seed=variant.seed)
    classes = tuple(s.classes for s in schedule.steps)
    teacher = None
    if step == JOINT:
        number, classes = 1, (schedule.classes,)
        training = replace(training, epochs=training.epochs * chain.n_steps)
    else:
        number = int(step)
        classes = classes[:number]
    if number > 1:
        folder = chain.model_folder(variant, number - 1)
        teacher = folder.relative_to(chain.paths["nnUNet_results"]).as_posix()
    return StepBlock(
        chain=schedule.name,
        step=number,
        classes=classes,
        method=variant.method,
        settings=chain.settings(variant),
        training=training,
        mirror_axes=chain.mirror_axes,
        teacher=teacher,
        network_of=chain.content.get("network_of"),
    )
