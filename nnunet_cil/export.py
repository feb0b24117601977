"""Give a step's model away: a folder and a zip that stock nnU-Net predicts with, and a card that says what it is."""

from __future__ import annotations

import json
import os
import shutil
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path, PurePosixPath
from typing import Any

import torch

from nnunet_cil.block import BLOCK_KEY
from nnunet_cil.chain import JOINT, Chain, Variant
from nnunet_cil.checkpoint import read_checkpoint
from nnunet_cil.evaluate import evaluation_file, score_matrix
from nnunet_cil.given_model import GivenModel, opened_zip
from nnunet_cil.lineage import Files, check_fold, exported, sealed
from nnunet_cil.report.table import marked
from nnunet_cil.step_files import CHECKPOINT, LINEAGE_FILE, PROTOTYPE_FILE, read_step_file, whole_folder, write_json
from nnunet_cil.teacher import sha256_of
from nnunet_cil.untrusted import dataset_json_of, parse_json

CARD_FILE = "model_card.json"
STOCK_TRAINER = "nnUNetTrainer"
KEPT_OF_CHECKPOINT = ("network_weights", "inference_allowed_mirroring_axes")
KEPT_OF_DATASET = ("channel_names", "labels", "numTraining", "file_ending", "overwrite_image_reader_writer")
MAX_CARD_BYTES = 1_000_000


def export_model(
    chain: Chain, variant: Variant, step: int | str, folds: Sequence[int | str], target: Path, licence: str | None
) -> Path:
    """Write ``target.zip`` and the folder ``target`` with the model of one step.

    Inside lies ``DATASET/nnUNetTrainer__PLANS__CONFIGURATION`` as nnU-Net lays it out, so that
    ``nnUNetv2_install_pretrained_model_from_zip`` takes the zip, and ``nnUNetv2_predict_from_modelfolder`` the folder.
    The trainer is another one where a given model's trainer builds a network of its own.
    Checkpoints hold the weights and what prediction needs; optimiser, logs and random states stay behind.

    Args:
        folds: some of the schedule's that are trained.
        target: path without ending; must not exist.
        licence: text for the card, such as ``CC BY 4.0``; None if the user has not said.

    Raises:
        FileNotFoundError: a fold is not trained.
        ValueError: a fold is not what its lineage says.
        FileExistsError: the target exists.
    """
    archive = target.with_name(target.name + ".zip")
    for path in (target, archive):
        if path.exists():
            raise FileExistsError(f"{path}: it exists and is not touched. Give another name, or remove it first.")
    source = chain.model_folder(variant, step)
    own = step == JOINT or int(step) in chain.schedule.own_steps
    needed = (CHECKPOINT, *([PROTOTYPE_FILE] if own else []))
    if missing := [f for f in folds if not all((source / f"fold_{f}" / name).is_file() for name in needed)]:
        raise FileNotFoundError(
            f"{source}: got no finished training of fold {missing}, expected {' and '.join(needed)} in each. Run "
            "`nnunet-cil status` to see where the chain stands."
        )
    _, plans_name, configuration = source.name.split("__")
    plans = json.loads((source / "plans.json").read_text(encoding="utf-8"))
    trainer = _network_of(chain, step, plans) or STOCK_TRAINER
    with whole_folder(target) as partial:
        model = partial / chain.dataset_name(step) / f"{trainer}__{plans_name}__{configuration}"
        model.mkdir(parents=True)
        write_json(model / "plans.json", plans)
        described = dataset_json_of(source)
        write_json(model / "dataset.json", {key: described[key] for key in KEPT_OF_DATASET if key in described})
        if (fingerprint := source / "dataset_fingerprint.json").is_file():
            shutil.copyfile(fingerprint, model / fingerprint.name)
        for fold in folds:
            _export_fold(source / f"fold_{fold}", model / f"fold_{fold}", trainer, configuration)
        card = model_card(chain, variant, step, folds, licence)
        files = sorted(path for path in model.rglob("*") if path.is_file())
        card["sha256"] = {path.relative_to(model).as_posix(): sha256_of(path) for path in files}
        write_json(model / CARD_FILE, sealed(card))
        packed = archive.with_name(f".{archive.name}.part")
        try:
            with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as zipped:
                for path in sorted(partial.rglob("*")):
                    if path.is_file():
                        zipped.write(path, path.relative_to(partial).as_posix())
            os.replace(packed, archive)
        finally:
            packed.unlink(missing_ok=True)
    return archive


def _network_of(chain: Chain, step: int | str, plans: Mapping[str, Any]) -> str | None:
    """The trainer that builds a model's network, if that is none of nnU-Net's own; a given model has its own plans."""
    if step != JOINT and int(step) not in chain.schedule.own_steps:
        return chain.content.get("network_of")
    return plans.get(BLOCK_KEY, {}).get("network_of")


def _export_fold(source: Path, target: Path, trainer: str, configuration: str) -> None:
    target.mkdir()
    lineage = check_fold(source, Files()) if (source / LINEAGE_FILE).is_file() else None
    checkpoint = read_checkpoint(source / CHECKPOINT)
    kept = {key: checkpoint[key] for key in KEPT_OF_CHECKPOINT if key in checkpoint}
    init_args = {"configuration": configuration, "fold": checkpoint["init_args"]["fold"]}
    torch.save({**kept, "trainer_name": trainer, "init_args": init_args}, target / CHECKPOINT)
    if (prototypes := source / PROTOTYPE_FILE).is_file():
        shutil.copyfile(prototypes, target / prototypes.name)
    if lineage is not None:
        write_json(target / LINEAGE_FILE, exported(lineage, sha256_of(target / CHECKPOINT)))


def model_card(
    chain: Chain, variant: Variant, step: int | str, folds: Sequence[int | str], licence: str | None
) -> dict[str, Any]:
    """What the model is, from the chain's files; names of subjects, machines and folders are left out."""
    schedule = chain.schedule
    number = chain.n_steps if step == JOINT else int(step)
    labels = dataset_json_of(chain.model_folder(variant, step))["labels"]
    steps = []
    for t in range(1, number + 1):
        marker = read_step_file(chain.raw(t)) or read_step_file(chain.preprocessed(t)) or {}
        entry = {"classes": list(schedule.steps[t - 1].classes), "training_subjects": marker.get("n_cases")}
        if t not in schedule.own_steps:
            entry["given_model"] = _card_of(schedule.model)
        steps.append(entry)
    return {
        "name": schedule.name,
        "method": variant.method,
        "step": step,
        "labels": labels,
        "steps": steps,
        "folds": list(folds),
        "seed": variant.seed,
        "scores": _scores(chain, variant, step, folds),
        "licence": licence,
        "versions": {name: version(name) for name in ("nnunet-cil", "nnunetv2", "torch")},
        "use": "Research only. No medical device: every result has to be checked by somebody who can.",
    }


def _card_of(model: GivenModel) -> dict[str, Any]:
    """The card of a given model, or its name if it has none."""
    try:
        return read_card(model.path)
    except (FileNotFoundError, ValueError):
        return {"name": model.name}


def _scores(chain: Chain, variant: Variant, step: int | str, folds: Sequence[int | str]) -> dict[str, Any]:
    scored = {}
    for fold in folds:
        path = evaluation_file(chain, variant, step, fold)
        if not path.is_file():
            continue
        row = (chain.n_steps if step == JOINT else int(step)) - 1
        values = score_matrix(chain, variant, fold)[row]
        dice = {name: round(float(v), 6) for name, v in zip(chain.schedule.classes, values, strict=True) if v == v}
        if not dice:  # scored on another test set or at another tolerance than now
            continue
        scored[f"fold_{fold}"] = {
            "mean_dice": dice,
            "test_subjects": len(json.loads(path.read_text(encoding="utf-8"))["scores"]),
        }
    return scored


def read_card(path: Path) -> dict[str, Any]:
    """The card in a model folder, anywhere below a folder, or in a zip, which is not unpacked.

    Raises:
        FileNotFoundError: there is no such path, or no card in it.
        ValueError: several cards, or one that is no JSON object or far too large.
    """
    with _opened(path) as (model, _), (model / CARD_FILE).open("rb") as file:
        text = file.read(MAX_CARD_BYTES + 1)
    if len(text) > MAX_CARD_BYTES:
        raise ValueError(f"{path}: got a {CARD_FILE} of more than {MAX_CARD_BYTES} bytes, expected a small one.")
    card = parse_json(text, f"{path}: {CARD_FILE}", "a JSON object")
    try:
        card_text(card)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(
            f"{path}: got a {CARD_FILE} that cannot be shown ({error!r}), expected one that `nnunet-cil export` wrote."
        ) from error
    return card


@contextmanager
def _opened(path: Path) -> Iterator[tuple[Path | zipfile.Path, list[str]]]:
    """The one folder with a card below a folder or in a zip, which is not unpacked, and the names of all its files.

    Raises:
        FileNotFoundError: there is no such path, or no card in it.
        ValueError: several cards, no zip, or a damaged one.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path}: got nothing there, expected a model folder or a zip.")
    if path.is_dir():
        names = [each.relative_to(path).as_posix() for each in path.rglob("*") if each.is_file()]
        inner = _only_model(path, names)
        yield path / inner, [name[len(inner) :] for name in names if name.startswith(inner)]
        return
    with opened_zip(path) as zipped:
        names = [name for name in zipped.namelist() if not name.endswith("/")]
        inner = _only_model(path, names)
        yield zipfile.Path(zipped, inner), [name[len(inner) :] for name in names if name.startswith(inner)]


def _only_model(path: Path, names: Sequence[str]) -> str:
    """Where the card lies: empty, or a folder with ``/`` at its end."""
    cards = [name for name in names if PurePosixPath(name).name == CARD_FILE]
    if not cards:
        raise FileNotFoundError(f"{path}: got no {CARD_FILE}, expected a model written by `nnunet-cil export`.")
    if len(cards) > 1:
        raise ValueError(f"{path}: got {len(cards)} cards, expected one. Name one model.")
    return cards[0][: -len(CARD_FILE)]


def verify_export(path: Path, files: Files) -> Iterator[str]:
    """Compare an exported model, folder or zip, with its card and its lineages; a line for each fold that fits.

    Args:
        files: takes what is compared.

    Raises:
        FileNotFoundError: there is no such path, or no card in it.
        ValueError: the first file that differs, is gone, or is not named by the card.
    """
    digests = read_card(path).get("sha256", {})
    with _opened(path) as (model, names):
        lineages = [name for name in digests if PurePosixPath(name).name == LINEAGE_FILE]
        if lineages:
            files.read_sealed(model / CARD_FILE)
        visible = {name for name in names if not PurePosixPath(name).name.startswith(".")} - {CARD_FILE}
        if odd := sorted(visible ^ set(digests)):
            got, expected = ("a file", "none") if odd[0] in visible else ("no file", "one")
            raise ValueError(
                f"{model / odd[0]}: got {got}, expected {expected} as {CARD_FILE} names the model's files."
            )
        for name, digest in digests.items():
            files.check(model / name, digest, model / CARD_FILE)
        yield f"{model.name}: {len(digests)} files as the card says"
        for name in lineages:
            content = check_fold((model / name).parent, files)
            origin = content.get("exported_from", {}).get("lineage")
            yield f"{name}: trained as {content['folder']}, lineage {origin}"
        if not lineages:
            yield f"no {LINEAGE_FILE}: exported by an earlier version, or trained by one"


def card_text(card: Mapping[str, Any]) -> str:
    """A card as lines to read; what cannot be printed, such as codes for a terminal, is replaced."""
    lines = [
        f"{card.get('name')}: {marked(str(card.get('method')))}, after step {card.get('step')}, seed {card.get('seed')}"
    ]
    organs = {name: value for name, value in card.get("labels", {}).items() if name != "background"}
    lines.append("labels: " + ", ".join(f"{value} {name}" for name, value in organs.items()))
    for number, step in enumerate(card.get("steps", ()), 1):
        subjects = step.get("training_subjects")
        origin = (
            f"the given model {step['given_model'].get('name')}" if "given_model" in step else "number not recorded"
        )
        origin = origin if subjects is None else f"{subjects} training subjects"
        lines.append(f"step {number}: {', '.join(step['classes'])}, {origin}")
    for fold, scores in card.get("scores", {}).items():
        dice = ", ".join(f"{name} {100 * value:.1f}" for name, value in scores["mean_dice"].items())
        lines.append(f"{fold}: mean Dice in % on {scores['test_subjects']} test subjects: {dice}")
    lines.append(f"licence: {card.get('licence') or 'not stated'}")
    lines.append("made with " + ", ".join(f"{name} {number}" for name, number in card.get("versions", {}).items()))
    lines.append(str(card.get("use", "")))
    lines += [f"sha256 {digest}  {name}" for name, digest in card.get("sha256", {}).items()]
    return "\n".join("".join(char if char.isprintable() else "\ufffd" for char in line) for line in lines)
